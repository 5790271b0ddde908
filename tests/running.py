"""Arguments of a short stage on the tiny model, as on the command line."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image


SOURCES = [
    {"name": "scenes", "annotations": ["short_caption", "questions"], "count": 24},
    {"name": "scene_texts", "count": 8},
]


def arguments_for(model: Path, output: Path, **fields) -> list[str]:
    """The command line of a stage; lists are written as JSON, and a field of None is left out."""
    values = {
        "stage": 3,
        "model": model,
        "output_dir": output,
        "sources": SOURCES,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **fields,
    }
    return [
        item
        for name, value in values.items()
        if value is not None
        for item in (f"--{name}", json.dumps(value) if isinstance(value, list) else str(value))
    ]


def parse(given: list[str]):
    """The `StageArguments` of a stage's command line."""
    # Here, since children import this module before the package: once that is imported, the Auto classes prefer its classes.
    from trl import TrlParser

    from alignvlm.stages.arguments import StageArguments

    (arguments,) = TrlParser(StageArguments).parse_args_and_config(given)
    return arguments


def weights_alone(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint as `model.save_pretrained` writes it: without its processor."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder / name)
    return folder


def recompute_activations(model) -> None:
    """Activation checkpointing, which transformers before 5.24 calls gradient checkpointing."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


@torch.no_grad()
def answer_of(model, processor) -> tuple[torch.Tensor, str]:
    """The logits of a question about a plain image, and the greedy answer to it."""
    parts = [
        {"type": "image", "image": Image.new("RGB", (20, 12), (200, 30, 60))},
        {"type": "text", "text": "What is it?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return model(**inputs).logits, processor.decode(tokens[0], skip_special_tokens=True)
