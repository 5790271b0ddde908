"""lmms-eval finds and runs a checkpoint through its plug-in entry point, on a small local task in its YAML form."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm.data import scenes
from tests.records import exchanges_of


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install 'alignvlm[lmms]')")

TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: "{data}"}}
task: alignvlm_scenes
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: !function utils.answer
process_results: !function utils.judge
generation_kwargs: {{max_new_tokens: 6, do_sample: false, until: ["\\n"]}}
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
def images(doc):
    return [image.convert("RGB") for image in doc["images"]]

def question(doc):
    return doc["conversations"][2]["messages"][0]["content"][-1]["text"]

def answer(doc):
    return doc["conversations"][2]["responses"][0]

def judge(doc, results):
    return {"exact": float(results[0] == answer(doc))}
"""


def run(checkpoint: Path, folder: Path, count: int) -> dict:
    """The results and samples that lmms-eval writes for the task on so many scenes."""
    folder.mkdir(exist_ok=True)
    scenes.make_scenes(count, "test").to_parquet(folder / "test.parquet")
    (folder / "task.yaml").write_text(TASK.format(data=folder / "test.parquet", output_type="generate_until"))
    (folder / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "alignvlm", "--tasks", "alignvlm_scenes"]
    command += ["--model_args", f"pretrained={checkpoint},attn_implementation=eager", "--include_path", str(folder)]
    command += ["--batch_size", "4", "--device", "cpu", "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out").glob("**/*results.json")
    (samples,) = (folder / "out").glob("**/*samples*.jsonl")
    return {
        "results": json.loads(results.read_text())["results"]["alignvlm_scenes"],
        "samples": [json.loads(line) for line in samples.open()],
    }


def test_lmms_eval_answers_as_we_do(checkpoint, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from alignvlm.evaluation.answer import answer

    found = run(checkpoint, tmp_path / "task", 6)
    assert len(found["samples"]) == 6 and "exact,none" in found["results"]
    records = scenes.make_scenes(6, "test")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    ours = answer(
        model,
        processor,
        [record["images"][0] for record in records],
        [[exchanges_of(record)[2][0]] for record in records],
        max_new_tokens=6,
    )
    theirs = {sample["doc_id"]: sample["filtered_resps"] for sample in found["samples"]}
    assert [theirs[i] for i in range(6)] == [text.split("\n")[0].strip() for (text,) in ours]


def test_log_likelihoods_tell_what_greedy_decoding_writes(checkpoint):
    """lmms-eval's other kind of request: the most likely answer is the greedy one, and probabilities chain."""
    from lmms_eval.api.instance import Instance

    from alignvlm.evaluation.lmms_eval_adapter import AlignVLM

    adapter = AlignVLM(str(checkpoint), device="cpu", attn_implementation="eager")
    record = scenes.make_scenes(1, "test")[0]
    adapter.task_dict = {"task": {"test": [record]}}

    def request(kind: str, *arguments) -> Instance:
        place = (lambda doc: doc["images"], 0, "task", "test")
        arguments = ("What is it?", *arguments, *place)
        return Instance(kind, arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})

    (written,) = adapter.generate_until([request("generate_until", {"max_new_tokens": 1})])
    special = set(adapter.tokenizer.all_special_ids)
    vocabulary = [adapter.tokenizer.decode([token]) for token in set(range(len(adapter.tokenizer))) - special]
    texts = [text for text in vocabulary if len(adapter.tokenizer(text, add_special_tokens=False)["input_ids"]) == 1]
    found = dict(zip(texts, adapter.loglikelihood([request("loglikelihood", text) for text in texts])))
    greedy = [text for text, (_, is_greedy) in found.items() if is_greedy]
    assert all(text.strip() == written for text in greedy) and len(greedy) <= 1
    if greedy:
        assert found[greedy[0]][0] == max(value for value, _ in found.values())
    assert sum(math.exp(value) for value, _ in found.values()) <= 1 + 1e-4
