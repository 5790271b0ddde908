"""FSDP 2 as `training/accelerate/fsdp2.yaml` asks for it, on two CPU processes: weights, losses and checkpoints are those of one process."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignvlm.stages.stage import main
from hub_upload.run_record import read_run_record
from tests import forked
from tests.running import arguments_for


FIELDS = {
    "language_learning_rate": 1e-3,
    "projector_learning_rate": 1e-3,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_sources": [{"name": "scenes", "annotations": ["questions"], "count": 5, "seed": 3}],
    "eval_strategy": "steps",
    "eval_steps": 3,
    "text_sources": [{"name": "scene_texts", "count": 8}],
    "alignment_records": 2,
}


def run_sharded(given: list[str]) -> None:
    """Runs a stage under the settings of fsdp2.yaml. accelerate shards on accelerators alone, so it is told that these are some."""
    from accelerate import state

    config = yaml.safe_load(Path("training/accelerate/fsdp2.yaml").read_text())
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ |= {name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in config["fsdp_config"].items()}  # fmt: skip
    made = state.PartialState.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        shared = state.PartialState._shared_state
        if shared["distributed_type"] == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = make
    entry = main(given)
    assert state.AcceleratorState().distributed_type == state.DistributedType.FSDP
    assert entry["processes"] == 2
    policy = state.AcceleratorState().fsdp_plugin.mixed_precision_policy
    assert (policy is None) == (entry["precision"] == "fp32")
    assert policy is None or (policy.reduce_dtype, policy.output_dtype) == (torch.float32, None)


def sharded(checkpoint: Path, folder: Path, **fields) -> dict:
    given = arguments_for(checkpoint, folder, **{**FIELDS, **fields}, per_device_train_batch_size=2)
    forked.run("tests.stages.test_fsdp:run_sharded", given, log=folder.with_suffix(".log"), processes=2)
    return read_run_record(folder)["stages"][-1]


def assert_same_weights(folder: Path, other: Path) -> None:
    found, expected = (load_file(each / "model.safetensors") for each in (folder, other))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_and_can_be_gone_on_with(checkpoint, tmp_path):
    one = main(arguments_for(checkpoint, tmp_path / "one", **FIELDS, per_device_train_batch_size=4))
    two = sharded(checkpoint, tmp_path / "two")
    assert two["logged_losses"] == pytest.approx(one["logged_losses"], rel=1e-4)
    assert (
        two["eval_loss_after"] == pytest.approx(one["eval_loss_after"], rel=1e-4) and two["eval_loss_before"] is None
    )
    for name in ("text_perplexity_before", "text_perplexity_after", "mir_after"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    assert_same_weights(tmp_path / "two", tmp_path / "one")

    shutil.copytree(tmp_path / "two/checkpoint-3", tmp_path / "again/checkpoint-3")
    again = sharded(checkpoint, tmp_path / "again", resume_from_checkpoint="last")
    assert again["resumed_at"] == [3] and again["logged_losses"] == pytest.approx(two["logged_losses"], rel=1e-5)
    assert_same_weights(tmp_path / "again", tmp_path / "two")


@pytest.mark.slow
def test_losses_of_16_bit_are_added_up_in_32(checkpoint, tmp_path):
    """The sum of a batch's 90 labels, some 650, has steps of 4 in bf16."""
    fields = {
        **FIELDS,
        "bf16": True,
        "max_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "alignment_records": None,
    }
    one = main(arguments_for(checkpoint, tmp_path / "one", **fields, per_device_train_batch_size=4))
    two = sharded(checkpoint, tmp_path / "two", **fields)
    assert two["logged_losses"] == pytest.approx(one["logged_losses"], rel=3e-3)
