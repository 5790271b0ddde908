"""The quickstart from end to end, with a step of everything: all it promises is there, whatever the model has learned."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignvlm.data.formats import CAPTION_PROMPT, DETAILED_PROMPT
from alignvlm.evaluation.precision import choose_precision
from alignvlm.quickstart import nano
from alignvlm.quickstart.quickstart import QuickstartArguments, expected_flops, forecast, main


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory) -> Path:
    """The nano recipe with few scenes."""
    folder = tmp_path_factory.mktemp("recipe")
    for path in (ROOT / "training/recipes/nano").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        for source in recipe["sources"] + recipe["eval_sources"] + recipe["text_sources"]:
            source["count"] = 8
        (folder / path.name).write_text(yaml.safe_dump({**recipe, "alignment_records": 8}))
    return folder


@pytest.mark.slow
def test_quickstart_leaves_four_stages_and_a_summary(small_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano, "SCENE_COUNT", 128)
    given = {"output_dir": tmp_path, "recipe": small_recipe, "test_scenes": 5, "vision_steps": 1, "language_steps": 1}
    summary = main([item for name, value in given.items() for item in (f"--{name}", str(value))])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [stage["stage"] for stage in summary["stages"]] == [1, 2, 3, 4]
    assert set(summary["accuracy_by_kind"]) == {"yes_no", "colour", "count", "position"}
    assert set(summary["cider_by_prompt"]) == {"short", "detailed"}
    for stage in range(5):
        assert (tmp_path / f"stage{stage}/alignvlm_run.json").is_file()
        if stage:
            metrics = json.loads((tmp_path / f"stage{stage}/results/scenes.json").read_text())["metrics"]
            assert set(metrics["cider"]["by_prompt"]) == {
                CAPTION_PROMPT,
                DETAILED_PROMPT,
            }
    page = (tmp_path / "report.html").read_text()
    assert page.count("<canvas") > 1 and "Stage 4" in page and "every image replaced by grey" in page
    assert (tmp_path / "stage3/report.html").is_file()
    assert summary["captions"] == 10 and summary["questions"] == 40
    assert summary["precision"] == choose_precision().name == summary["stages"][0]["precision"]
    assert summary["flops"] > expected_flops(
        QuickstartArguments(recipe=str(small_recipe), vision_steps=1, language_steps=1)
    )
    described = summary["description"].split("\n")  # said by the child process
    assert described[0].startswith("Write a short caption.  ->") and len(described) == 3
    report = capsys.readouterr().out
    assert re.search(r"About \d+ minutes? at the speed", report.split("== Backbones")[0])
    assert "projector, language" in report and "image blanked" in report
    assert "CIDEr short" in report and "nan" not in report
    for before, after in pairwise(summary["stages"]):
        # The other figures are on each stage's own held-out records.
        assert after["text_perplexity_before"] == pytest.approx(before["text_perplexity_after"], rel=1e-3)
        assert after["mir_after"] and after["image_embedding_norm_after"]


def test_without_a_terminal_backbones_say_where_they_are_in_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano, "SCENE_COUNT", 128)
    nano.train_vision_encoder(tmp_path, 0, steps=2)
    said = capsys.readouterr()
    assert re.fullmatch(r"vision encoder  2/2  loss \d+\.\d{4}\n", said.out)
    assert "vision encoder" not in said.err and "drawing" not in said.err


def test_backbones_repeat_themselves_and_differ_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "SCENE_COUNT", 128)
    weights = []
    for folder, seed in (("first", 0), ("second", 0), ("other", 1)):
        nano.train_vision_encoder(tmp_path / folder, seed, steps=2)
        weights.append(load_file(tmp_path / folder / "model.safetensors"))
    first, second, other = weights
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_short_captions_are_trained_in_every_stage_and_the_scenes_are_many_enough():
    for number in (1, 2, 3, 4):
        recipe = yaml.safe_load((ROOT / f"training/recipes/nano/stage{number}.yaml").read_text())
        kinds = {kind for source in recipe["sources"] for kind in source.get("annotations", ())}
        assert "short_caption" in kinds, number
        assert number == 1 or "detailed_caption" in kinds, number


def test_the_forecast_grows_with_the_work(small_recipe):
    usual, long = QuickstartArguments(), QuickstartArguments(vision_steps=100_000)
    assert expected_flops(QuickstartArguments(recipe=str(small_recipe))) < expected_flops(usual) < expected_flops(long)
    minutes = [int(re.search(r"About (\d+) minute", forecast(arguments))[1]) for arguments in (usual, long)]
    assert minutes[0] < minutes[1]
    assert choose_precision().reason in forecast(usual)


def test_a_recipe_with_data_of_ones_own_has_no_forecast(small_recipe, tmp_path):
    recipe = tmp_path / "recipe"
    shutil.copytree(small_recipe, recipe)
    values = yaml.safe_load((recipe / "stage4.yaml").read_text())
    (recipe / "stage4.yaml").write_text(yaml.safe_dump({**values, "sources": [{"data": "mine.jsonl"}]}))
    assert "not known beforehand" in forecast(QuickstartArguments(recipe=str(recipe)))
