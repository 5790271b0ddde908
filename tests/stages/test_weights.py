"""The options for a model's weights: nested in any combination, they leave what they must."""

import json
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trl import TrlParser

from alignvlm.stages.arguments import DataArguments, ModelArguments, StageArguments, TrainerArguments
from alignvlm.stages.lora import has_lora
from alignvlm.stages.options import Nested, StageOption
from alignvlm.stages.trainer import AlignVLMTrainer, freeze_all_but, module_of
from alignvlm.stages.weights import HELD, WRITTEN, Average, Frozen16Bit, KeepLanguage, LoRA, asked_for
from modeling_alignvlm import AlignVLMForConditionalGeneration
from tests.running import arguments_for


RATES = {"projector_learning_rate": 1e-3, "language_learning_rate": 1e-3}
TARGETS = ("q_proj", "down_proj")
SCALE = 8.0 / 2  # alpha / rank


def parsed(checkpoint, output, **fields) -> StageArguments:
    return TrlParser(StageArguments).parse_args_and_config(arguments_for(checkpoint, output, **fields))[0]


def pretend_to_train(model, folder, seed: int) -> None:
    """Moves what trains, and writes a checkpoint as the trainer does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": seed}))


@pytest.mark.parametrize(
    "lora, half, average, keep", product([None, "merged", "apart"], [False, True], [False, True], [0.0, 0.25])
)
def test_nested_options_leave_the_weights_they_must(checkpoint, tmp_path, lora, half, average, keep):
    fields = {"bf16": True, "frozen_16_bit": half}
    if lora:
        fields |= {
            "lora_r": 2,
            "lora_alpha": 8.0,
            "lora_target_modules": list(TARGETS),
            "lora_merge": lora == "merged",
        }
    if average:
        fields |= {"average_last": 2, "save_strategy": "steps"}
    fields["keep_language"] = keep
    arguments = parsed(checkpoint, tmp_path, **RATES, **fields)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "of_an_earlier_run").write_text("")
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    nested = Nested(model)
    nested.enter(*asked_for(arguments, HELD))
    freeze_all_but(model, arguments.learning_rates)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16 if half else torch.float32}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    nested.enter(*asked_for(arguments, WRITTEN))
    for step in (1, 2, 3):
        pretend_to_train(model, tmp_path / f"checkpoint-{step}", step)
    record = nested.leave()

    steps = [load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in ((2, 3) if average else (3,))]
    trained = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    result = model.state_dict()
    assert result.keys() == original.keys() and not has_lora(model)
    for name, value in result.items():
        assert value.dtype == torch.float32, name
        module, _, kind = name.rpartition(".")
        expected = original[name]
        if module_of(name) == "projector" or (module_of(name) == "language" and not lora):
            expected = trained.get(name, trained.get("model.language_model.embed_tokens.weight"))  # the head is tied
            if module_of(name) == "language":
                expected = (1 - keep) * expected + keep * original[name]
        elif lora == "merged" and kind == "weight" and "language_model." in name and module.endswith(TARGETS):
            a, b = (trained[f"{module}.lora_{letter}.default.weight"] for letter in "AB")
            expected = original[name] + (1 - keep) * SCALE * b @ a
            assert not torch.equal(value, original[name]), name
        exact = module_of(name) == "vision" or (lora == "apart" and module_of(name) == "language")
        torch.testing.assert_close(value, expected, **({"rtol": 0, "atol": 0} if exact else {}), msg=name)

    written = {path.name for path in tmp_path.glob("lora/*")}
    assert written == ({"adapter_config.json", "adapter_model.safetensors"} if lora == "apart" else set())
    if lora == "apart":
        saved = load_file(tmp_path / "lora/adapter_model.safetensors")
        for name, value in saved.items():
            full = trained[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
            torch.testing.assert_close(value, full * (1 - keep if "lora_B" in name else 1), msg=name)
    assert record.get("keep_language", {}).get("share") == (keep or None)
    assert record.get("averaged") == (["checkpoint-2", "checkpoint-3"] if average else None)
    assert record.get("frozen_16_bit") == (True if half else None)
    assert record.get("lora", {}).get("merge") == {None: None, "merged": True, "apart": False}[lora]


def test_the_last_entered_is_left_first(make_model):
    calls = []

    class Noted(StageOption):
        def __init__(self, name):
            self.name = name

        def before(self, model):
            calls.append(f"before {self.name}")

        def after(self, model):
            calls.append(f"after {self.name}")

        def record(self):
            return {self.name: len(calls)}

    nested = Nested(make_model())
    nested.enter(Noted("a"), Noted("b"))
    nested.enter(Noted("c"))
    assert nested.leave() == {"a": 6, "b": 6, "c": 6}
    assert calls == ["before a", "before b", "before c", "after c", "after b", "after a"]


def test_only_what_is_asked_for_is_an_option_and_needs_complete_weights(checkpoint, tmp_path):
    class Sharded(SimpleNamespace):
        check_complete_weights = AlignVLMTrainer.check_complete_weights

    plain = asked_for(parsed(checkpoint, tmp_path, **RATES), (*HELD, *WRITTEN))
    for option in plain:
        option.check(Sharded(is_sharded=True))
    fields = {"lora_r": 2, "bf16": True, "frozen_16_bit": True, "average_last": 2, "save_strategy": "steps"}
    fields["keep_language"] = 0.25
    options = asked_for(parsed(checkpoint, tmp_path, **RATES, **fields), (*HELD, *WRITTEN))
    assert [type(option) for option in options] == [LoRA, Frozen16Bit, KeepLanguage, Average]
    for option, name in zip(options, ("lora_r", "frozen_16_bit", "keep_language", "average_last")):
        option.check(Sharded(is_sharded=False))
        with pytest.raises(
            ValueError, match=f"^{name} needs complete weights on every process: use one process or DDP"
        ):
            option.check(Sharded(is_sharded=True))


@dataclass
class ModelAlone(ModelArguments, TrainerArguments): ...


@dataclass
class DataAlone(DataArguments, TrainerArguments): ...


def test_a_part_of_the_arguments_checks_its_own_fields(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert ModelAlone(model="m", projector_learning_rate=1e-3, **given).learning_rate == 1e-3
    with pytest.raises(ValueError, match="Nothing trains"):
        ModelAlone(model="m", **given)
    assert DataAlone(sources='[{"name": "scenes"}]', **given).sources == [{"name": "scenes"}]
    with pytest.raises(ValueError, match="needs `model`"):
        DataAlone(**given)


@pytest.mark.parametrize("there", [0, 2, 3])
def test_a_mean_of_fewer_checkpoints_than_asked_for_is_told(checkpoint, tmp_path, caplog, there):
    arguments = parsed(checkpoint, tmp_path, **RATES, average_last=3, save_strategy="steps")
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    freeze_all_but(model, arguments.learning_rates)
    nested = Nested(model)
    nested.enter(*asked_for(arguments, WRITTEN))
    for step in range(1, there + 1):
        pretend_to_train(model, tmp_path / f"checkpoint-{step}", step)
    assert len(nested.leave().get("averaged", [])) == there
    assert (f"average_last=3: {tmp_path} holds {there} checkpoints" in caplog.text) == (there < 3)
