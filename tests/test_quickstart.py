"""The quickstart from end to end, with a handful of steps: everything it promises is there, whatever the model has learned."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from training import nano
from training.quickstart import main


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory) -> Path:
    """The nano recipe with few scenes."""
    folder = tmp_path_factory.mktemp("recipe")
    for path in (ROOT / "training/recipes/nano").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        for source in recipe["sources"] + recipe["eval_sources"]:
            source["count"] = 32
        (folder / path.name).write_text(yaml.safe_dump(recipe))
    return folder


def run(output: Path, recipe: Path) -> dict:
    given = {"output_dir": output, "recipe": recipe, "test_scenes": 10, "vision_steps": 3, "language_steps": 3}
    return main([item for name, value in given.items() for item in (f"--{name}", str(value))])


def test_quickstart_leaves_four_stages_and_a_summary_and_repeats_itself(small_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano, "SCENE_COUNT", 256)
    summary = run(tmp_path / "first", small_recipe)
    assert json.loads((tmp_path / "first/summary.json").read_text()) == summary
    assert [stage["stage"] for stage in summary["stages"]] == [1, 2, 3, 4]
    assert set(summary["accuracy_by_kind"]) == {"yes_no", "colour", "count", "position"}
    for stage in range(5):
        assert (tmp_path / f"first/stage{stage}/alignvlm_run.json").is_file()
        if stage:
            assert json.loads((tmp_path / f"first/stage{stage}/results/scenes.json").read_text())["metrics"]["cider"]
    assert summary["captions"] == 20 and summary["questions"] == 80
    assert summary["description"].startswith("Describe the picture in detail.  ->")  # said by the child process
    report = capsys.readouterr().out
    assert "projector, language" in report and "image blanked" in report
    assert "CIDEr" in report and "nan" not in report
    for before, after in pairwise(summary["stages"]):
        # The other figures are on each stage's own held-out records.
        assert after["text_perplexity_before"] == pytest.approx(before["text_perplexity_after"], rel=1e-3)
        assert after["mir_after"] and after["image_embedding_norm_after"]

    again = run(tmp_path / "second", small_recipe)
    for key in ("accuracy", "accuracy_blank_image", "accuracy_by_kind", "cider", "description"):
        assert again[key] == summary[key]
    losses = [[stage["logged_losses"] for stage in run["stages"]] for run in (summary, again)]
    assert losses[0] == losses[1]
    shutil.rmtree(tmp_path)
