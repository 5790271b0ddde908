"""Precision, averaging, accelerators: options of a stage that must not change what it learns."""

import re
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import TrlParser

from alignvlm.evaluation import evaluate_model
from alignvlm.evaluation.precision import choose_precision, is_native, matrix_rate
from alignvlm.stages.arguments import StageArguments, parse_anywhere
from alignvlm.stages.stage import main
from alignvlm.stages.trainer import module_of
from alignvlm.stages.weights import average_weights
from hub_upload.run_record import read_run_record
from tests.running import arguments_for


RECIPES = sorted((Path(__file__).parents[2] / "training/recipes").glob("*/stage*.yaml"))
LIMITS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def without_bf16(monkeypatch):
    """A processor without bf16 instructions, as far as the decision goes."""
    for variable, value in LIMITS.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def processor_with(monkeypatch):
    """Lets the processor have just these instructions, and oneDNN say that it takes bf16, as it does where it emulates it."""

    def pretend(*flags: str, architecture: str = "x86_64"):
        for variable in (*LIMITS, "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(variable, raising=False)
        found = {"architecture": architecture, **dict.fromkeys(flags, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        yes = types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: True)
        monkeypatch.setattr(torch.ops, "mkldnn", yes)

    return pretend


def test_bf16_is_native_where_it_is_not_slower():
    rates = {dtype: matrix_rate(dtype, seconds=0.1, size=256) for dtype in (torch.float32, torch.bfloat16)}
    # Emulated, it was 600 times slower; with instructions of its own it is 1.5 times faster or more.
    assert is_native("bf16")[0] == (rates[torch.bfloat16] > rates[torch.float32]), rates


@pytest.mark.parametrize(
    "flags, architecture, name",
    [
        (("avx2", "avx_ne_convert"), "x86_64", "fp32"),
        (("avx2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), "x86_64", "fp32"),
        (("avx2", "avx512_f", "avx512_bf16"), "x86_64", "bf16"),
        (("avx512_f", "amx_tile", "amx_bf16"), "x86_64", "bf16"),
        (("neon",), "aarch64", "fp32"),
        (("neon", "bf16"), "aarch64", "bf16"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_has_the_instructions(processor_with, flags, architecture, name):
    processor_with(*flags, architecture=architecture)
    assert choose_precision().name == name


@pytest.mark.parametrize("variable, value", [*LIMITS.items(), ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")])
def test_a_limit_on_instructions_counts(processor_with, monkeypatch, variable, value):
    processor_with("avx512_f", "avx512_bf16")
    monkeypatch.setenv(variable, value)
    found = choose_precision()
    assert found.name == "fp32" and f"{variable}={value}" in found.reason
    assert choose_precision("bf16").name == "bf16"
    monkeypatch.setenv(variable, "AVX512_CORE_AMX" if "ISA" in variable else "avx512")
    assert choose_precision().name == "bf16"


def test_a_checkpoint_is_used_as_stored_only_where_that_is_native(processor_with):
    processor_with("avx512_f", "avx512_bf16")
    names = {dtype: choose_precision(stored=dtype).name for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert names == {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp32"}
    with pytest.raises(ValueError, match="Unknown precision 'half'"):
        choose_precision("half")


def test_a_stage_says_what_it_computes_in_and_why(checkpoint, tmp_path, without_bf16, capsys):
    auto = arguments_for(checkpoint, tmp_path / "auto", projector_learning_rate=1e-3, bf16=None, max_steps=1)
    entry = main(auto)
    assert entry["precision"] == "fp32" and "ONEDNN_MAX_CPU_ISA=AVX2" in entry["precision_reason"]
    assert f"precision fp32 ({entry['precision_reason']})" in capsys.readouterr().out
    assert read_run_record(tmp_path / "auto")["stages"][-1]["precision_reason"] == entry["precision_reason"]

    named = arguments_for(checkpoint, tmp_path / "named", projector_learning_rate=1e-3, bf16=None, max_steps=1)
    with pytest.warns(UserWarning, match="times slower than in fp32 here") as warned:
        entry = main([*named, "--precision", "bf16"])
    assert (entry["precision"], entry["precision_reason"]) == ("bf16", "asked for by name")
    assert sum("times slower" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"bf16": None, "precision": "fp32"}, "fp32"),
        ({"bf16": None, "precision": "fp16"}, "fp16"),
        ({"bf16": False}, "fp32"),
        ({"bf16": True}, "bf16"),
        ({"bf16": None, "fp16": True}, "fp16"),
        ({"bf16": True, "precision": "bf16"}, "bf16"),
    ],
)
def test_flags_and_precision_are_one_choice(tmp_path, fields, name):
    given = arguments_for("model", tmp_path, projector_learning_rate=1e-3, **fields)
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(given)
    assert arguments.chosen_precision.name == name
    assert (arguments.bf16, arguments.fp16) == (name == "bf16", name == "fp16")
    assert arguments.mixed_precision == ("no" if name == "fp32" else name)


def test_every_recipe_leaves_the_precision_to_the_device(without_bf16):
    for recipe in RECIPES:
        fields = yaml.safe_load(recipe.read_text())
        assert fields["precision"] == "auto" and not {"bf16", "fp16"} & set(fields), recipe
    given = ["--config", str(RECIPES[0]), "--frozen_16_bit", "true"]
    if not torch.accelerator.is_available():
        (looked_at,) = parse_anywhere(given)  # for a plan, the GPU's 16 bits count
        assert looked_at.dtype_16_bit == torch.bfloat16
        with pytest.raises(ValueError, match=re.escape("computes in fp32 (ONEDNN_MAX_CPU_ISA=AVX2")):
            TrlParser(StageArguments).parse_args_and_config([*given, "--use_cpu", "true"])


def test_a_checkpoint_in_bf16_is_not_evaluated_in_emulated_bf16(checkpoint, tmp_path, make_model, without_bf16):
    folder = tmp_path / "model"
    make_model().to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        if (checkpoint / name).is_file():
            (folder / name).write_bytes((checkpoint / name).read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("A large red circle is at the top left.")
    command = [str(folder), "--task", "text_perplexity", "--data", str(text), "--use_cpu"]
    found = evaluate_model.evaluate_checkpoint(evaluate_model.parser().parse_args(command))
    assert found["dtype"] == "float32"
    command += ["--dtype", "bf16", "--name", "emulated"]
    with pytest.warns(UserWarning, match="times slower"):
        found = evaluate_model.evaluate_checkpoint(evaluate_model.parser().parse_args(command))
    assert found["dtype"] == "bfloat16"


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
    fields = {"language_learning_rate": 1e-3, "lora_r": 2, "bf16": True, "frozen_16_bit": True, "max_steps": 2}
    main(arguments_for(checkpoint, tmp_path / "apart", lora_merge=False, **fields))
    before, after = weights(checkpoint), weights(tmp_path / "apart")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    main(arguments_for(checkpoint, tmp_path / "merged", lora_target_modules=["q_proj"], **fields))
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
        ({"bf16": True, "precision": "fp32"}, "precision='fp32' and bf16=True contradict"),
        ({"bf16": False, "precision": "bf16"}, "precision='bf16' and bf16=False contradict"),
        ({"bf16": None, "fp16": True, "precision": "fp32"}, "precision='fp32' and fp16=True contradict"),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True exclude each other"),
        ({"bf16": None, "precision": "int8"}, "Unknown precision 'int8'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor needs"),
        ({"push_to": "user/my--model"}, "'user/my--model' names no repository"),
        ({"average_last": 2}, "average_last=2 needs checkpoints"),
        ({"average_last": 4, "save_strategy": "steps", "save_total_limit": 3}, "save_total_limit=3 keeps less"),
        ({"lora_r": 4, "language_learning_rate": None}, "set language_learning_rate"),
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
