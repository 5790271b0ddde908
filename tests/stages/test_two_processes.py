"""Options of a stage, all on at once: two processes write what one writes."""

import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from alignvlm.stages.stage import main
from hub_upload.run_record import read_run_record
from tests import forked
from tests.running import SOURCES, arguments_for


OPTIONS = {
    "sources": [*SOURCES, {"name": "scenes", "annotations": ["detailed_caption"], "count": 8, "seed": 2}],
    "row_length": 400,
    "max_length": 400,
    "projector_start": "least_squares",
    "attention_mask_type": '{"image": 0.5, "causal": 0.5}',
    "keep_language": 0.25,
    "projector_learning_rate": 1e-3,
    "language_learning_rate": 1e-3,
    "optim": "sgd",
    "eval_sources": [
        {"name": "scenes", "annotations": ["questions"], "count": 3, "seed": 3}
    ],  # measured before training, too
    "max_steps": 5,
}


def train_apart(given: list[str]) -> None:
    """A stage whose model is not put into DDP, as accelerate did with one that had been evaluated."""
    Accelerator.prepare_model = lambda self, model, *args, **kwargs: model
    main(given)


@pytest.mark.slow
def test_processes_that_do_not_train_together_are_stopped(checkpoint, tmp_path):
    given = arguments_for(checkpoint, tmp_path / "two", **OPTIONS, per_device_train_batch_size=2)
    with pytest.raises(AssertionError):
        forked.run("tests.stages.test_two_processes:train_apart", given, log=tmp_path / "log", processes=2)
    assert re.search(
        "The norms of the gradients are .* on the 2 processes, which must be the same", (tmp_path / "log").read_text()
    )


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, tmp_path):
    """Counted tokens, filled rows, the projector's normal equations, drawn mask types, the untouched language model's share."""
    AcceleratorState._reset_state(reset_partial_state=True)
    one = main(arguments_for(checkpoint, tmp_path / "one", **OPTIONS, per_device_train_batch_size=4))
    given = arguments_for(checkpoint, tmp_path / "two", **OPTIONS, per_device_train_batch_size=2)
    forked.run("alignvlm.stages.stage:main", given, log=tmp_path / "log", processes=2)
    two = read_run_record(tmp_path / "two")["stages"][-1]
    assert two["processes"] == 2 and two["projector_start"]["images"] == one["projector_start"]["images"] == 32
    for moment in ("loss_before", "loss_after"):
        assert two["projector_start"][moment] == pytest.approx(one["projector_start"][moment], abs=2e-3)
    assert two["rows"] == {**one["rows"], "padding_share": two["rows"]["padding_share"]}
    assert len(set(one["logged_losses"])) == 5
    for moment in ("eval_loss_before", "eval_loss_after"):
        assert two[moment] == pytest.approx(one[moment], rel=1e-4)
    assert two["logged_losses"] == pytest.approx(one["logged_losses"], rel=1e-4)
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"row_length": 400, "max_length": 400}], ids=["records", "filled rows"])
def test_two_processes_go_on_within_a_later_epoch(checkpoint, tmp_path, options):
    """With the records that were left of it, in its own order."""
    rates = {"projector_learning_rate": 1e-3, "language_learning_rate": 1e-3}
    saved = {"max_steps": None, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    fields = {**rates, **saved, "per_device_train_batch_size": 8 if not options else 1, **options}
    run = "alignvlm.stages.stage:main"
    forked.run(run, arguments_for(checkpoint, tmp_path / "whole", **fields), log=tmp_path / "log", processes=2)
    whole = read_run_record(tmp_path / "whole")["stages"][-1]
    steps = whole["steps"]
    assert steps >= 6 and steps % 3 == 0
    last = f"checkpoint-{steps - 1}"
    shutil.copytree(tmp_path / "whole" / last, tmp_path / "again" / last)
    given = [*arguments_for(checkpoint, tmp_path / "again", **fields), "--resume_from_checkpoint"]
    forked.run(run, given, log=tmp_path / "log", processes=2)
    assert read_run_record(tmp_path / "again")["stages"][-1]["logged_losses"] == whole["logged_losses"]
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(written[name], value) for name, value in expected.items())
