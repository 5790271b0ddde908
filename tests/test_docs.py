"""The pages under docs/ and the README: their links lead somewhere, and what is written by a script is as the script writes it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_page_of_the_tree_names_every_file():
    spec = importlib.util.spec_from_file_location("write_tree_page", ROOT / "docs/write_tree_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert (ROOT / "docs/tree.md").read_text() == page, "Run docs/write_tree_page.py"
    files = [
        file
        for folder in ("modeling_alignvlm", "hub_upload", "alignvlm", "training")
        for file in (ROOT / folder).rglob("*.py")
    ]
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        if file.name != "__init__.py" and "/metrics/" not in path:
            assert f"(../{path})" in page
            assert module.purpose(file), f"{path} has no docstring"


def insert(file: Path, behind: str, text: str) -> None:
    content = file.read_text()
    assert content.count(behind) == 1, f"{file.name} has {behind!r} {content.count(behind)} times"
    file.write_text(content.replace(behind, behind + text))


@pytest.mark.slow
def test_the_mask_type_of_the_page_on_extending_works(tmp_path):
    """Puts the page's code where the page says, in a copy of the sources, and runs the tests there that the page names."""
    page = (ROOT / "docs/extend.md").read_text().split("## ")[1]
    assert page.startswith("A mask type")
    rule, row, definition = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for name in ("modeling_alignvlm", "alignvlm", "hub_upload", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    masking = tmp_path / "modeling_alignvlm/masking_alignvlm.py"
    insert(
        masking,
        "    return same_image(layout, b, q, k) | ((layout.image_ids[b, q] >= 0) & layout.prompt_mask[b, k])\n",
        f"\n\n{rule}",
    )
    insert(masking, "MASK_TYPES = {\n", row)
    insert(tmp_path / "tests/modeling_alignvlm/test_masking.py", "LOOKS_AHEAD = {\n", definition)
    # Kernels are compiled for a minute; the other tests compare with the same dense mask.
    options = [
        "-m",
        *command.split(),
        "--verbose",
        "--verbose",
        "--deselect",
        "tests/modeling_alignvlm/test_modeling.py::test_attention_kernels_agree_and_apply_the_dense_mask",
    ]
    done = subprocess.run(
        [sys.executable, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "test_mask_equals_the_written_definition",
        "test_a_packed_row_gives_loss_and_gradients",
        "test_answers_are_those",
    ):
        assert name in done.stdout
