"""PathVQA at greater length: the recipe's fields that it changes, and what is measured of the checkpoint."""

import json

import pytest
from PIL import Image

from alignvlm.stages.arguments import StageArguments
from benchmarks.pathvqa_longer import CHANGES, measure, table
from benchmarks.real_photos import CONTROLS, RECIPE
from benchmarks.stage_runs import stage_values


def test_the_changed_fields_are_those_of_a_stage(tmp_path):
    arguments = StageArguments(**stage_values(RECIPE, 4, tmp_path / "start", tmp_path / "end", **CHANGES))
    assert arguments.learning_rates.keys() == {"projector", "language"} and arguments.cache_features
    assert arguments.num_train_epochs == 2 and [source["data"] for source in arguments.sources] == [
        "pathvqa/train.jsonl"
    ]


def test_a_checkpoint_is_asked_about_its_own_other_and_grey_images(checkpoint, tmp_path):
    rows = []
    for index, shade in enumerate((20, 90, 160, 230)):
        Image.new("RGB", (24, 24), (shade, 30, 60)).save(tmp_path / f"{index}.png")
        questions = [{"question": "is it red?", "answer": "yes"}, {"question": "what is it?", "answer": f"a {index}"}]
        rows.append({"image": f"{index}.png", "questions": questions, "split": "dev"})
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = measure(checkpoint, tmp_path, tmp_path / "results")
    files = {name: next((tmp_path / "results" / name).glob("*.json")) for name in ("image", *CONTROLS)}
    kept = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert [kept[name].get("control") for name in ("image", *CONTROLS)] == [None, *CONTROLS]
    for name, numbers in found["metrics"].items():
        assert numbers["accuracy"]["value"] == kept[name]["metrics"]["pathvqa_accuracy"]["accuracy"]
    for control in CONTROLS:
        own, other = (found["metrics"][name]["accuracy"]["value"] for name in ("image", control))
        assert found["differences"][control]["accuracy"]["difference"] == pytest.approx(own - other)
    lines = table(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "accuracy",
        "yes/no accuracy",
        "open, exact",
        "open, token F1",
    ]
