"""The comparisons of `benchmarks/findings.py`: their statistics, that arms differ in what they are named after alone, and a real arm."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from alignvlm.data import scenes
from benchmarks import findings
from benchmarks.findings import Finding, Scenes, band, run, steps_to, summarise, t_interval
from docs.write_results_page import fill
from modeling_alignvlm.masking_alignvlm import MASK_TYPES


VALUES = st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=2, max_size=6)


@given(VALUES)
def test_the_interval_is_that_of_the_t_test(values):
    if np.ptp(values) == 0:
        assert t_interval(values) == pytest.approx([values[0]] * 2)
    else:
        assert t_interval(values) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)))
    assert t_interval(values[:1]) is None


def test_a_new_seed_lies_in_the_band_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= new <= high for *others, new in rng.normal(5, 2, (4000, 4)) for low, high in [band(others)]]
    assert np.mean(inside) == pytest.approx(0.99, abs=0.006)


def test_differences_are_paired_by_seed():
    arms = {
        "first": {0: {"values": {"loss": 1.0}}, 1: {"values": {"loss": 5.0}}, 2: {"values": {"loss": 9.0}}},
        "other": {0: {"values": {"loss": 1.5}}, 2: {"values": {"loss": 9.7}}},
    }
    found = summarise(arms)
    assert "difference" not in found["first"]["loss"]
    assert found["other"]["loss"]["difference"] == pytest.approx(0.6)
    assert found["other"]["loss"]["interval"] == pytest.approx(t_interval([0.5, 0.7]))


def test_steps_to_a_training_loss_go_on_over_stages():
    first = {"steps": 8, "log": [{"step": 5, "loss": 4.0}]}
    second = {"steps": 12, "log": [{"step": 5, "loss": 3.5}, {"step": 10, "loss": 3.0}]}
    entries = [first, second]
    assert [steps_to(entries, level) for level in (4.5, 4.0, 3.9, 3.0, 2.9)] == [5, 5, 13, 18, 20]


def test_arms_differ_only_in_what_they_are_named_after(tmp_path):
    found = Scenes(tmp_path).findings(seed=3)
    for mask, stages in found["masks"].arms.items():
        assert [changes.pop("attention_mask_type") for _, changes in stages] == [mask] * 3
    assert len({json.dumps(stages) for stages in found["masks"].arms.values()}) == 1
    counts = {
        arm: [sum(source["count"] for source in changes["sources"] if source["name"] == "scenes") for _, changes in stages]
        for arm, stages in found["alignment"].arms.items()
    }  # fmt: skip
    short, long = counts["short"], counts["long"]
    assert sum(short) == pytest.approx(sum(long), rel=0.001) and short[0] < long[0] and short[1] < long[1]
    from_nothing, from_stage3 = found["downstream"].arms.values()
    assert from_nothing[-1] == from_stage3[-1]


class TinyScenes(Scenes):
    """One stage on a few scenes after a shared one or not, from a model with random weights."""

    checkpoint = None
    prepared: list = []

    def assembled(self, seed):
        folder = self.output / f"seed{seed}"
        if not folder.exists():
            shutil.copytree(self.checkpoint, folder / "stage0")
            scenes.make_scenes(2, "test", seed=seed).to_parquet(folder / "test.parquet")
        return folder / "stage0"

    def findings(self, seed):
        changes = dict(self.stages(8, 8, 8)[0][1], per_device_train_batch_size=4, save_strategy="steps", save_steps=1)
        arms = {mask: [(1, {**changes, "attention_mask_type": mask})] for mask in ("causal", "image")}
        after = Finding(
            {"nothing more": [], "more": [(1, changes)]},
            ("scenes",),
            shared=((1, changes),),
            prepare=self.prepared.append,
        )
        return {"masks": Finding(arms, ("scenes",), curve=True), "recaptions": after}


@pytest.mark.slow
def test_a_finding_runs_once_and_is_summarised(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(TinyScenes, "checkpoint", checkpoint)
    world, results = TinyScenes(tmp_path / "work"), tmp_path / "results.json"
    run("scenes", world, ["masks"], seeds=1, results=results)
    found = json.loads(results.read_text())["scenes"]["masks"]
    assert set(found["runs"]) == {"causal", "image"} and set(found["runs"]["image"]) == {"0"}
    arm = found["runs"]["image"]["0"]
    assert set(arm["values"]) == {"CIDEr", "accuracy"} and arm["steps"] == [2] and {"0", "1"} <= set(arm["curve"])
    records = [
        json.loads((world.output / f"seed0/masks/{mask}/stage1/alignvlm_run.json").read_text())["stages"][-1]
        for mask in ("causal", "image")
    ]
    assert [record["attention_mask_type"] for record in records] == ["causal", "image"]
    assert [record["seed"] for record in records] == [0, 0]
    monkeypatch.setattr("subprocess.run", None)  # nothing is trained again
    for again, file in ((world, tmp_path / "others.json"), (TinyScenes(tmp_path / "elsewhere"), results)):
        run("scenes", again, ["masks"], seeds=1, results=file)
        repeated = json.loads(file.read_text())["scenes"]["masks"]
        assert repeated["summary"] == found["summary"] and set(repeated["runs"]) == {"causal", "image"}


@pytest.mark.slow
def test_arms_go_on_from_the_end_of_shared_stages(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(TinyScenes, "checkpoint", checkpoint)
    monkeypatch.setattr(findings, "train", partial(findings.train, in_process=True))
    world = TinyScenes(tmp_path / "work")
    run("scenes", world, ["recaptions"], seeds=1, results=tmp_path / "results.json")
    folder = world.output / "seed0/recaptions"
    assert world.prepared == [folder / "shared/stage1"]  # only where an arm has stages of its own
    runs = json.loads((tmp_path / "results.json").read_text())["scenes"]["recaptions"]["runs"]
    assert {arm: found["0"]["steps"] for arm, found in runs.items()} == {"nothing more": [2], "more": [2, 2]}
    stages = json.loads((folder / "more/stage1/alignvlm_run.json").read_text())["stages"]
    assert len(stages) == 2
    assert (folder / "nothing_more/results").is_dir() and not (folder / "nothing_more/stage1").exists()


def test_a_page_is_filled_between_its_comments():
    page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n<!-- begin: y --><!-- end: y -->\n"
    filled = fill(page, {"x": "new \\1"})
    assert filled == "a\n<!-- begin: x -->\n\nnew \\1\n\n<!-- end: x -->\nb\n<!-- begin: y --><!-- end: y -->\n"
    assert fill(filled, {"x": "new \\1"}) == filled
    with pytest.raises(ValueError, match=r"no place for 'z'"):
        fill(page, {"z": ""})


def test_every_finding_and_mask_has_its_question_and_arm(tmp_path):
    assert set(Scenes(tmp_path).findings(0)) <= set(findings.QUESTIONS)
    assert set(Scenes(tmp_path).findings(0)["masks"].arms) == set(MASK_TYPES)
