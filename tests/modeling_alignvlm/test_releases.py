"""A checkpoint means the same under every release of the libraries: `make test-newest` and `make test-lowest` exchange some."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.running import answer_of


ROOT = Path(__file__).parents[2]

READ = """
import sys, torch, transformers
from tests.running import answer_of
from transformers import AutoModelForImageTextToText, AutoProcessor

given, written = sys.argv[1:]
# The folder's own code first: once the package is imported, the Auto classes prefer its classes.
remote = AutoModelForImageTextToText.from_pretrained(given, trust_remote_code=True)
found = {"remote": answer_of(remote, AutoProcessor.from_pretrained(given, trust_remote_code=True))}
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor

model, processor = AlignVLMForConditionalGeneration.from_pretrained(given), AlignVLMProcessor.from_pretrained(given)
assert type(remote) is not type(model)
found |= {"transformers": transformers.__version__, "package": answer_of(model, processor)}
model.save_pretrained(written)
processor.save_pretrained(written)
torch.save(found, f"{written}/found.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif("ALIGNVLM_OTHER_PYTHON" not in os.environ, reason="ALIGNVLM_OTHER_PYTHON names no interpreter")
def test_checkpoints_travel_between_releases(checkpoint, tmp_path):
    written = tmp_path / "written"
    result = subprocess.run(
        [os.environ["ALIGNVLM_OTHER_PYTHON"], "-c", READ, str(checkpoint), str(written)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    there = torch.load(written / "found.pt")
    print(f"checkpoints exchanged between transformers {transformers.__version__} and {there['transformers']}")
    expected = None
    for folder in (checkpoint, written):
        model = AlignVLMForConditionalGeneration.from_pretrained(folder)
        here = answer_of(model, AlignVLMProcessor.from_pretrained(folder))
        expected = here if expected is None else expected
        assert here[1] == expected[1]
        torch.testing.assert_close(here[0], expected[0], rtol=0, atol=0)
    for found in (there["package"], there["remote"]):
        assert found[1] == expected[1]
        # The same operations of the same PyTorch build: what differs is at most their order, a few roundings of logits below ten.
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)


def test_the_package_loads_a_folder_whose_own_code_is_of_another_release(checkpoint, tmp_path):
    """Code that was pushed before a release of transformers cannot know it; the package's classes do not run it."""
    shutil.copytree(checkpoint, tmp_path / "old")
    (tmp_path / "old" / "modeling_alignvlm.py").write_text("raise ImportError('of another release')\n")
    answers = []
    for folder in (checkpoint, tmp_path / "old"):
        model = AlignVLMForConditionalGeneration.from_pretrained(folder)
        answers.append(answer_of(model, AlignVLMProcessor.from_pretrained(folder)))
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1]
