"""A stage with `row_length`: the steps of unfilled rows, resumed bit for bit, the same for any number of workers and processes."""

import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from alignvlm.rows import filling
from alignvlm.stages.arguments import parse_anywhere
from alignvlm.stages.stage import main
from alignvlm.tools.plan import main as plan_main
from alignvlm.tools.plan import plan_stages
from tests.running import SOURCES, arguments_for
from tests.stages.test_stages import weights
from tests.tools.test_plan import parse


HELD_OUT = [{**SOURCES[0], "split": "test", "count": 5}]
FILLED = {"row_length": 400, "max_length": 400, "language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}


def run(model, output, *more: str, **fields) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([*arguments_for(model, output, **{**FILLED, **fields}), *more])


def assert_same(one, other) -> None:
    expected, actual = weights(one), weights(other)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


@pytest.mark.parametrize("mask_type", ["image", "mutual"])  # one that shares trunks, one that cannot
def test_a_step_of_filled_rows_is_that_of_its_records(checkpoint, tmp_path, mask_type, capfd):
    """One step over everything; `length` weighs the tokens of each annotation by their number. Held-out records are not filled."""
    fields = {"attention_mask_type": mask_type, "max_steps": 1, "optim": "sgd", "token_weighting": "length"}
    fields |= {"per_device_train_batch_size": 200, "eval_sources": HELD_OUT, "per_device_eval_batch_size": 2}
    filled = run(checkpoint, tmp_path / "filled", **fields)
    assert f"{filled['rows']['rows_per_epoch']} rows of 400 tokens an epoch" in capfd.readouterr().out
    records = run(checkpoint, tmp_path / "records", row_length=None, **fields)
    assert filled["rows"]["rows_per_epoch"] < 32 * (1 if mask_type == "image" else 5) / 2 and "rows" not in records
    assert filled["rows"]["fill"] > 0.8 and filled["rows"]["padding_share"] < 0.2 < records["log"][0]["padding_share"]
    assert filled["logged_losses"] == pytest.approx(records["logged_losses"], rel=1e-5)
    assert filled["eval_loss_before"] == records["eval_loss_before"] != filled["eval_loss_after"]
    assert filled["records"] == records["records"] == 32
    before = weights(checkpoint)
    for name, value in weights(tmp_path / "records").items():
        moved = value - before[name]
        difference = weights(tmp_path / "filled")[name] - before[name] - moved
        assert difference.norm() <= 1e-4 * moved.norm() + 1e-7, name


CASES = {
    "indexed": {"gradient_accumulation_steps": 2, "max_steps": 8},
    "streamed": {"streaming": True, "sources": [SOURCES[0]], "max_steps": 5, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_resumed_run_is_one_that_was_not_interrupted(checkpoint, tmp_path, fields, monkeypatch):
    """Within an epoch and behind it, where other workers read on."""
    monkeypatch.setattr(filling, "WINDOW", 16)
    fields = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1, **fields}
    straight = run(checkpoint, tmp_path / "whole", **fields)
    assert straight["steps"] == fields["max_steps"] and len(set(straight["logged_losses"])) == straight["steps"]
    last = fields["max_steps"] - 1
    for step, workers in ((2, 0), (last, 0 if "streaming" in fields else 1)):
        folder = tmp_path / f"from_{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", folder / f"checkpoint-{step}")
        again = run(checkpoint, folder, "--resume_from_checkpoint", dataloader_num_workers=workers, **fields)
        assert again["logged_losses"] == straight["logged_losses"]
        assert again["rows"] == straight["rows"] and again["epochs"] == straight["epochs"]
        assert_same(tmp_path / "whole", folder)
    if "streaming" not in fields:
        with pytest.raises(ValueError, match=r"read other data: rows\.row_length was 400 and is 410"):
            run(checkpoint, folder, "--resume_from_checkpoint", row_length=410, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_length": 401}, "max_length=401 allows records that are longer than rows of row_length=400 tokens"),
        ({"max_length": None}, "max_length=1024 allows records"),
        ({"max_steps": 5, "image_start_fraction": 0.1}, "image_start_fraction counts records"),
        ({"packing": True}, "packing: leave it out; row_length fills rows"),
    ],
    ids=["longer", "the default", "a stream", "TRL's packing"],
)
def test_what_cannot_be_filled_is_refused(checkpoint, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path, **fields)


@pytest.mark.slow
def test_the_plan_knows_the_rows(checkpoint, tmp_path, capsys):
    fields = {"max_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    fields |= {"per_device_train_batch_size": 2, "sources": [{**SOURCES[0], "count": 200}]}
    given = arguments_for(checkpoint, tmp_path / "run", **{**FILLED, **fields})
    (plan,) = plan_stages([parse(*given)], processes=1)
    rows = run(checkpoint, tmp_path / "run", **{**fields, "max_steps": 1, "num_train_epochs": None})["rows"]
    assert plan.records == 600 and plan.rows == pytest.approx(3 * rows["rows_per_epoch"], rel=0.05)
    assert plan.steps == pytest.approx(plan.rows / 4, abs=1)
    assert all(batch.rows == 2 and batch.length <= 400 for batch in plan.batches)
    (on_a_gpu,) = parse_anywhere([*given, "--attn_implementation", "flex_attention"])
    (flex,) = plan_stages([on_a_gpu], processes=1)
    assert flex.step_flops < plan.step_flops  # what lies between records is skipped
    recipe = tmp_path / "stage.yaml"
    recipe.write_text("logging_steps: 1\n")
    plan_main(["--config", str(recipe), *given])
    assert f"600 records in about {plan.rows} rows of 400 tokens, " in capsys.readouterr().out
    plan_main(["--config", str(recipe), *given, "--row_length", "250", "--max_length", "250"])
    said = capsys.readouterr().out
    found = re.search(r"rows of 250 tokens, 77% filled \(row_length (\d+): 95% or more\)", said)
    assert found, said
    plan_main(["--config", str(recipe), *given, "--row_length", found[1], "--max_length", "250"])
    assert re.search(r"9[5-9]% filled, \d", capsys.readouterr().out)
