"""The frontier of `benchmarks/tokens.py`: arms differ in what they are named after alone, what they cost, and a real arm."""

import json

import pytest

from alignvlm.data import scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.backbones import BackboneArguments
from alignvlm.stages.checkpoint import save_checkpoint
from benchmarks.tokens import ARMS, Arm, Frontier, folder_name, kept_bytes, run, table
from hub_upload.run_record import RUN_RECORD
from modeling_alignvlm import AlignVLMProcessor


def test_every_arm_can_be_assembled_or_has_another_s_checkpoint():
    assert len({folder_name(name) for name in ARMS}) == len(ARMS)
    baseline = next(iter(ARMS.values()))
    assert baseline == Arm()
    for name, arm in ARMS.items():
        assert (
            (arm.trained is None) == (arm.merged is None)
            and arm.max_tiles is None
            and not (arm.assembly and arm.trained)
        ), name
        assert arm.trained is None or list(ARMS).index(arm.trained) < list(ARMS).index(name)
        BackboneArguments("vision", "language", "out", **arm.assembly)


def test_a_step_keeps_less_of_fewer_tokens(make_model, processor):
    found = []
    for count in (4, 1):
        model = make_model(merge_image_tokens=count)
        ours = AlignVLMProcessor(
            processor.image_processor, processor.tokenizer, count, chat_template=processor.chat_template
        )
        batch = AlignVLMCollator(ours, "image")([scenes.make_scenes(2)[i] for i in range(2)])
        found.append(kept_bytes(model, batch))
        assert found[-1] == kept_bytes(model, batch)  # counted, not sampled
    length = batch["input_ids"].shape[1]
    hidden = 2 * length * model.config.text_config.hidden_size * 4  # what a layer takes, in bytes
    assert found[0] > found[1] > 2 * hidden


class TinyFrontier(Frontier):
    """One stage on a few scenes, from models with random weights."""

    sizes = (8, 8, 8)
    make_checkpoint = None

    def start(self, seed, name, arm):
        folder = self.output / f"seed{seed}" / folder_name(name) / "stage0"
        if not (folder / RUN_RECORD).is_file():
            type(self).make_checkpoint(folder, **arm.assembly)
            scenes.make_scenes(2, "test", seed=seed).to_parquet(self.output / f"seed{seed}/test.parquet")
        return folder

    def stages(self, *sizes, **changes):
        number, changes = super().stages(*sizes)[0]
        return [(number, {**changes, "per_device_train_batch_size": 8})]


@pytest.mark.slow
def test_an_arm_runs_once_and_another_evaluates_it_with_fewer_tokens(tmp_path, make_model, processor, monkeypatch):
    def make_checkpoint(folder, **assembly):
        model = make_model(**assembly)
        ours = AlignVLMProcessor(
            processor.image_processor,
            processor.tokenizer,
            model.config.image_seq_length,
            chat_template=processor.chat_template,
        )
        save_checkpoint(model, ours, folder, {"stages": []})

    monkeypatch.setattr(TinyFrontier, "make_checkpoint", staticmethod(make_checkpoint))
    monkeypatch.setattr("benchmarks.tokens.ANSWERED", 2)
    world, results = TinyFrontier(tmp_path / "work"), tmp_path / "results.json"
    arms = {"two": Arm({"merge_image_tokens": 2}), "one": Arm(trained="two", merged=1)}
    run(world, arms, seeds=1, results=results)
    found = json.loads(results.read_text())["tokens"]
    assert found["tokens"] == {"two": 2, "one": 1}
    values = {name: runs["0"]["values"] for name, runs in found["runs"].items()}
    assert values["two"]["training_seconds"] == values["one"]["training_seconds"] >= 0  # rounded
    assert values["two"]["step_mb"] > values["one"]["step_mb"] and 0 <= values["one"]["accuracy"] <= 1
    assert not (world.output / "seed0/one/stage1").exists()
    lines = table(found).splitlines()
    assert lines[2].startswith("| two | 2 | ") and lines[3].startswith("| one | 1 | ")
    assert len({line.count("|") for line in lines}) == 1

    monkeypatch.setattr("subprocess.run", None)  # nothing is trained again
    monkeypatch.setattr("benchmarks.tokens.load_checkpoint", None)  # and nothing timed
    run(world, arms, seeds=1, results=results)
    assert json.loads(results.read_text())["tokens"]["runs"] == found["runs"]
