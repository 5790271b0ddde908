"""Precision, averaging, accelerators: options of a stage that must not change what it learns."""

import pytest
import torch
from safetensors.torch import load_file
from trl import TrlParser

from tests.running import arguments_for
from training.checkpoint import average_weights, read_run_record
from training.stage import StageArguments, main
from training.trainer import module_of


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "rates", [{"projector": 1e-2}, {"projector": 1e-2, "language": 1e-2}], ids=["stage 1", "stage 3"]
)
def test_frozen_modules_in_16_bits_give_the_same_loss_and_are_saved_as_read(checkpoint, tmp_path, rates):
    fields = {f"{module}_learning_rate": rate for module, rate in rates.items()} | {"bf16": True, "max_steps": 6}
    losses = {}
    for half in (False, True):
        entry = main(arguments_for(checkpoint, tmp_path / str(half), frozen_16_bit=half, **fields))
        losses[half] = entry["logged_losses"]
    assert losses[True] == pytest.approx(losses[False], rel=0.02) and losses[True] != losses[False]
    before, after = weights(checkpoint), weights(tmp_path / "True")
    for name, value in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(value, after[name]) == (module_of(name) not in rates), name
    assert read_run_record(tmp_path / "True")["stages"][-1]["frozen_16_bit"] is True


def test_a_base_in_16_bits_under_lora_is_saved_as_read(checkpoint, tmp_path):
    fields = {"language_learning_rate": 1e-3, "lora_rank": 2, "bf16": True, "frozen_16_bit": True, "max_steps": 2}
    main(arguments_for(checkpoint, tmp_path / "apart", lora_merge=False, **fields))
    before, after = weights(checkpoint), weights(tmp_path / "apart")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    main(arguments_for(checkpoint, tmp_path / "merged", lora_targets=["q_proj"], **fields))
    merged = weights(tmp_path / "merged")
    changed = {name for name, value in before.items() if not torch.equal(value, merged[name])}
    assert changed and all("q_proj" in name and module_of(name) == "language" for name in changed)
    assert all((merged[name] - before[name]).abs().max() < 1e-2 for name in changed)


def test_a_stage_in_16_bits_resumes(checkpoint, tmp_path):
    fields = {"projector_learning_rate": 1e-2, "bf16": True, "frozen_16_bit": True}
    fields |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = main(arguments_for(checkpoint, tmp_path / "whole", **fields))
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "again/checkpoint-2")
    again = main([*arguments_for(checkpoint, tmp_path / "again", **fields), "--resume_from_checkpoint"])
    assert again["logged_losses"] == whole["logged_losses"]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_precisions_agree(checkpoint, tmp_path):
    losses = {}
    for bf16 in (False, True):
        fields = {"language_learning_rate": 1e-3, "bf16": bf16, "max_steps": 6}
        losses[bf16] = main(arguments_for(checkpoint, tmp_path / str(bf16), **fields))["logged_losses"]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_activation_checkpointing_changes_nothing(checkpoint, tmp_path):
    losses = []
    for on in (False, True):
        rates = dict.fromkeys(("vision_learning_rate", "projector_learning_rate", "language_learning_rate"), 1e-3)
        entry = main(arguments_for(checkpoint, tmp_path / str(on), activation_checkpointing=on, **rates))
        losses.append(entry["logged_losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_mean_of_the_last_checkpoints(checkpoint, tmp_path):
    fields = {"language_learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    entry = main(arguments_for(checkpoint, tmp_path, average_last=3, save_total_limit=3, **fields))
    assert entry["averaged"] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    parts = [weights(tmp_path / name) for name in entry["averaged"]]
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, sum(part[name] for part in parts) / 3, msg=name)
    moved = [name for name, value in weights(tmp_path).items() if not torch.equal(value, parts[-1][name])]
    assert moved and all(module_of(name) == "language" for name in moved)


def test_averages_of_sharded_weights(make_model, tmp_path):
    models = [make_model(seed=seed) for seed in (0, 1)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index), max_shard_size="20KB")
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 2
    found = average_weights([tmp_path / "0", tmp_path / "1"])
    mean = make_model(seed=2)
    assert not mean.load_state_dict(found, strict=False).unexpected_keys
    for (name, value), a, b in zip(mean.named_parameters(), models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(value, (a + b) / 2, msg=name)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"frozen_16_bit": True}, "frozen_16_bit needs bf16 or fp16"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor needs"),
        ({"push_to": "user/my--model"}, "'user/my--model' names no repository"),
        ({"average_last": 2}, "average_last=2 needs checkpoints"),
        ({"average_last": 4, "save_strategy": "steps", "save_total_limit": 3}, "save_total_limit=3 keeps less"),
        ({"lora_rank": 4, "language_learning_rate": None}, "set language_learning_rate"),
        ({"alignment_records": 4}, "taken from eval_sources"),
        ({"token_weighting": "length", "loss_type": "dft"}, "leave out loss_type"),
        ({"infinite_schedule": '{"final": 2}'}, "final=2 must be"),
    ],
)
def test_options_that_do_not_go_together_are_named(fields, message):
    given = arguments_for(
        "model", "out", **{"projector_learning_rate": 1e-3, "language_learning_rate": 1e-3, **fields}
    )
    with pytest.raises((ValueError, RuntimeError), match=message):
        TrlParser(StageArguments).parse_args_and_config(given)


def test_tensorboard_gets_the_log_and_nothing_is_reported_by_default(checkpoint, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    main(arguments_for(checkpoint, tmp_path / "run", projector_learning_rate=1e-3, report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "train/annotations_per_second", "train/padding_share"} <= set(events.Tags()["scalars"])
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(
        arguments_for(checkpoint, tmp_path, projector_learning_rate=1e-3, report_to=None)
    )
    assert arguments.report_to == []
