"""LoRA on the language model (arXiv 2106.09685), by `peft`, injected in place so that module names stay what they are."""

from pathlib import Path

import torch
from torch import nn
from transformers.utils import cached_file


LORA_FOLDER = "lora"  # of a checkpoint whose LoRA weights are not merged
LORA_PREFIX = "lora_"  # in the names of LoRA weights


def has_lora(model: nn.Module) -> bool:
    """Whether the model has LoRA layers."""
    return any(LORA_PREFIX in name for name, _ in model.named_parameters())


def language_linear_layers(model: nn.Module) -> list[str]:
    """Lists the last names of the language model's linear layers, without its head."""
    names = (n for n, module in model.named_modules() if "language_model." in n and isinstance(module, nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Puts LoRA layers on the linear layers of the language model whose names end in one of `targets`.

    Raises:
        ValueError: if a target names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = language_linear_layers(model)
    if missing := sorted(set(targets) - set(linear)):
        raise ValueError(f"lora_target_modules {missing} name no linear layer of the language model; it has {linear}.")
    pattern = rf".*language_model\..*\.({'|'.join(targets)})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, bias="none")
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
        {f"base_model.model.{name}": value.float().contiguous().cpu() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config["default"].save_pretrained(folder)


def merge_saved_lora(model: nn.Module, checkpoint: str | Path, revision: str | None = None) -> bool:
    """Merges the unmerged LoRA weights of a checkpoint (folder or Hub id) into `model`; returns False if it has none."""
    files = [
        cached_file(
            str(checkpoint), f"{LORA_FOLDER}/{name}", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    if not all(files):
        return False
    model.load_adapter(str(Path(files[0]).parent))
    remove_lora(model, merge=True)
    model._hf_peft_config_loaded = False
    return True
