"""lmms-eval finds and runs a checkpoint through its plug-in entry point, on a small local task in its YAML form."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from alignvlm.data import scenes
from alignvlm.evaluation.evaluate_model import main
from hub_upload.run_record import RUN_RECORD, read_run_record
from tests.records import exchanges_of


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install 'alignvlm[lmms]')")

TASKS = Path(__file__).parents[2] / "alignvlm/evaluation/lmms_tasks"
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


def run(checkpoint: Path, folder: Path, task: str) -> dict:
    """The results and samples that lmms-eval writes for a task of a folder."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "alignvlm", "--tasks", task]
    command += ["--model_args", f"pretrained={checkpoint},attn_implementation=eager", "--include_path", str(folder)]
    command += ["--batch_size", "4", "--device", "cpu", "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out").glob("**/*results.json")
    (samples,) = (folder / "out").glob("**/*samples*.jsonl")
    return {
        "results": json.loads(results.read_text())["results"][task],
        "samples": [json.loads(line) for line in samples.open()],
    }


def test_lmms_eval_answers_as_we_do(checkpoint, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from alignvlm.evaluation.answer import answer

    scenes.make_scenes(6, "test").to_parquet(tmp_path / "test.parquet")
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "test.parquet", output_type="generate_until"))
    (tmp_path / "utils.py").write_text(UTILS)
    found = run(checkpoint, tmp_path, "alignvlm_scenes")
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


@pytest.mark.parametrize("task", ["pathvqa", "vqa_rad"])
def test_our_tasks_give_the_numbers_of_our_evaluation(task, checkpoint, tmp_path):
    """The task as shipped, with local data in place of the Hub's."""
    asked = [
        ("Is it red?", "yes"),
        ("Is it blue?", "no"),
        ("What is it?", "a circle"),
        ("What shape is it?", "circle"),
    ]
    rows = [
        {"image": Image.new("RGB", (9, 8), (60 * index, 30, 90)), "question": question, "answer": answer}
        for index, (question, answer) in enumerate(asked)
    ]
    features = Features({"image": datasets.Image(), "question": Value("string"), "answer": Value("string")})
    (tmp_path / "data").mkdir()
    data = tmp_path / "data/test.parquet"
    Dataset.from_list(rows, features=features).to_parquet(data)
    local = {"include": str(TASKS / f"{task}.yaml"), "task": f"{task}_local", "dataset_path": "parquet"}
    (tmp_path / "local.yaml").write_text(json.dumps({**local, "dataset_kwargs": {"data_files": {"test": str(data)}}}))
    found = run(checkpoint, tmp_path, f"{task}_local")
    common = ["--max_new_tokens", "40", "--attn_implementation", "eager", "--use_cpu", "--output_dir", str(tmp_path)]
    main([str(checkpoint), "--task", task, "--data", str(data.parent), *common])
    ours = json.loads((tmp_path / f"{task}.json").read_text())
    theirs = sorted(found["samples"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in theirs] == [p["prediction"] for p in ours["predictions"]]
    for name in ("accuracy", "yes_no_accuracy", "free_form_accuracy"):
        assert found["results"][f"{name},none"] == pytest.approx(ours["metrics"]["pathvqa_accuracy"][name])


def test_lmms_eval_finds_our_tasks():
    from lmms_eval.tasks import TaskManager

    assert {"pathvqa", "vqa_rad"} <= set(TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks)


def test_numbers_are_those_of_the_metric():
    spec = importlib.util.spec_from_file_location("utils", TASKS / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    pairs = [("Yes.", "yes"), ("no", "yes"), ("a circle", "circle")]
    assert (utils.accuracy(pairs), utils.yes_no_accuracy(pairs), utils.free_form_accuracy(pairs)) == (2 / 3, 0.5, 1.0)
    assert math.isnan(utils.yes_no_accuracy(pairs[2:]))
    told = {"post_prompt": "\nIn a word."}
    assert (
        utils.question({"question": "Why? "}, told) == "Why?\nIn a word."
        and utils.question({"question": "Why?"}) == "Why?"
    )


def test_rounds_go_on_until_the_task_has_no_more(checkpoint):
    """A round's prompt holds what the task puts into it: here the last answer, and another image in the second round."""
    from lmms_eval.api.instance import Instance

    from alignvlm.evaluation.answer import answer
    from alignvlm.evaluation.lmms_eval_adapter import AlignVLM

    adapter = AlignVLM(str(checkpoint), device="cpu", attn_implementation="eager", batch_size=2)
    pictures = [Image.new("RGB", (9, 8), (80 * index, 30, 90)) for index in range(3)]
    documents = [{"rounds": 3, "own": pictures[0]}, {"rounds": 1, "own": pictures[1]}]
    adapter.task_dict = {"task": {"test": documents}}
    notes = []

    def following(document, previous_output, round_idx, previous_round_info):
        notes.append(previous_round_info)
        assert len(previous_output) == round_idx
        if round_idx == document["rounds"]:
            return None, None, True, previous_output, None
        images = [document["own"], pictures[2]] if round_idx == 1 else None
        return images, f"<image>You said {previous_output[-1]}. Why?", False, previous_output, round_idx

    def request(index: int) -> Instance:
        options = {"max_new_tokens": 4, "until": None, "temperature": 0, "do_sample": False}
        arguments = ("What is it?", options, lambda document: [document["own"]], following, index, "task", "test")
        return Instance("generate_until_multi_round", arguments, 0, {"task": "task", "doc_id": index, "repeats": 1})

    found = adapter.generate_until_multi_round([request(0), request(1)])

    def alone(prompt: str, *images) -> str:
        ((text,),) = answer(adapter.model, adapter.processor, [list(images)], [[prompt]], max_new_tokens=4)
        return text

    first = alone("What is it?", pictures[0])
    second = alone(f"You said {first}. Why?", pictures[0], pictures[2])
    assert found == [[first, second, alone(f"You said {second}. Why?")], [alone("What is it?", pictures[1])]]
    assert notes == [None, None, 1, 2]


def test_a_question_longer_than_the_context_does_not_end_a_task(checkpoint):
    from lmms_eval.api.instance import Instance

    from alignvlm.evaluation.lmms_eval_adapter import AlignVLM

    adapter = AlignVLM(str(checkpoint), device="cpu", attn_implementation="eager")
    adapter.task_dict = {"task": {"test": [{}]}}
    adapter.model.config.text_config.max_position_embeddings = 60
    place = (lambda document: [Image.new("RGB", (9, 8), (80, 30, 90))], 0, "task", "test")

    def asked(*questions: str) -> list[str]:
        about = {"task": "task", "doc_id": 0, "repeats": 1}
        return adapter.generate_until(
            [Instance("generate_until", (q, {"max_new_tokens": 4}, *place), 0, about) for q in questions]
        )

    with pytest.warns(UserWarning, match="1 prompts are not answered"):
        found = asked("What is it?", "What is it? " * 40)
    assert found == [*asked("What is it?"), ""]


def test_prompts_have_the_tag_of_the_recipe(checkpoint, tmp_path):
    from lmms_eval.api.instance import Instance

    from alignvlm.evaluation.lmms_eval_adapter import AlignVLM

    found = {}
    for tag, question in (("[photos]", "What is it?"), ("", "[photos] What is it?"), ("", "What is it?")):
        folder = tmp_path / f"{len(found)}"
        shutil.copytree(checkpoint, folder)
        record = read_run_record(folder)
        (folder / RUN_RECORD).write_text(json.dumps({**record, "stages": [{"evaluation_tag": tag}]}))
        adapter = AlignVLM(str(folder), device="cpu", attn_implementation="eager")
        adapter.task_dict = {"task": {"test": [{}]}}
        place = (lambda document: [Image.new("RGB", (9, 8), (80, 30, 90))], 0, "task", "test")
        about = {"task": "task", "doc_id": 0, "repeats": 1}
        (likely,) = adapter.loglikelihood([Instance("loglikelihood", (question, "a circle", *place), 0, about)])
        options = {"max_new_tokens": 8}
        (text,) = adapter.generate_until([Instance("generate_until", (question, options, *place), 0, about)])
        found[tag, question] = likely[0], text
    tagged, written, plain = found.values()
    assert tagged == written and tagged[0] != plain[0]


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
