"""LoRA on the language model (arXiv 2106.09685), by `peft`, injected in place so that module names stay what they are."""

from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file


LORA_FOLDER = "lora"  # of a checkpoint whose LoRA weights are not merged
LORA_PREFIX = "lora_"  # in the names of LoRA weights
SAVED_PREFIX = "base_model.model."  # of the names that `peft` saves


def has_lora(model: nn.Module) -> bool:
    """Whether the model has LoRA layers."""
    return any(LORA_PREFIX in name for name, _ in model.named_parameters())


def language_linear_layers(model: nn.Module) -> list[str]:
    """Lists the last names of the language model's linear layers, without its head."""
    return sorted({name.rsplit(".", 1)[-1] for name in _linear_layers(model)})


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The language model's linear layers by name, GPT-2's `Conv1D` among them; its head is outside of it."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if "language_model." in name and isinstance(layer, (nn.Linear, Conv1D))
    }


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Puts LoRA layers on the linear layers of the language model whose names end in one of `targets`.

    Raises:
        ValueError: if a target names no layer, or if there is none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = language_linear_layers(model)
    if not linear:
        kind = model.config.text_config.model_type
        raise ValueError(
            f"The language model {kind!r} has no linear layers that LoRA could be added to. Leave out lora_r."
        )
    if missing := sorted(set(targets) - set(linear)):
        raise ValueError(f"lora_target_modules {missing} name no linear layer of the language model; it has {linear}.")
    pattern = rf".*language_model\..*\.({'|'.join(targets)})"
    layers = [layer for name, layer in _linear_layers(model).items() if name.rsplit(".", 1)[-1] in targets]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        bias="none",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )
    inject_adapter_in_model(config, model)


@torch.no_grad()
def remove_lora(model: nn.Module, merge: bool) -> None:
    """Takes the LoRA layers off again; with `merge`, adds their products to the weights first.

    Raises:
        ValueError: if a merged weight would not be finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        if merge:
            layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Writes the LoRA weights as `peft` does; `model.load_adapter(folder)` and `PeftModel.from_pretrained` read them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model)
    save_file(
        {f"{SAVED_PREFIX}{name}": value.float().contiguous().cpu() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config["default"].save_pretrained(folder)


def merge_saved_lora(model: nn.Module, checkpoint: str | Path, revision: str | None = None) -> bool:
    """Merges the unmerged LoRA weights of a checkpoint (folder or Hub id) into `model`; returns False if it has none.

    By `peft` alone: `model.load_adapter` would leave the model with a translation of names by which it saves all weights from then on.

    Raises:
        ValueError: if the weights are not those of LoRA layers of this model.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    files = [
        cached_file(
            str(checkpoint), f"{LORA_FOLDER}/{name}", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    if not all(files):
        return False
    saved = {name.removeprefix(SAVED_PREFIX): value for name, value in load_file(files[1]).items()}
    inject_adapter_in_model(LoraConfig.from_pretrained(Path(files[0]).parent), model)
    own = set(get_peft_model_state_dict(model))
    if own != set(saved):
        raise ValueError(
            f"{files[1]} does not hold the LoRA weights of this model: {sorted(own ^ set(saved))[0]!r} is only in one of them. Train the "
            f"stage that wrote {checkpoint} again, or remove its folder {LORA_FOLDER}/ to go on without."
        )
    set_peft_model_state_dict(model, saved)
    remove_lora(model, merge=True)
    return True
