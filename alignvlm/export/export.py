"""Writes a checkpoint in the form in which somebody else's program runs it: a class of transformers' own, llama.cpp's files, or ONNX graphs.

    alignvlm export out/stage4                                  # says what the checkpoint can become, and why not
    alignvlm export out/stage4 out/llava --to transformers
    alignvlm export out/stage4 out/my-vlm --to gguf --outtype q8_0
    alignvlm export out/stage4 out/onnx --to onnx --int8

`homes.py` is the table of what can become what. Each form has a module that writes the files and compares what was written with the
checkpoint; here the folder gets its card and, when all that succeeded, its name.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging

from alignvlm.evaluation.load import LORA_FILES, check_image_token, evaluation_tag, load_weights, with_tag
from alignvlm.export import gguf, onnx, stock
from alignvlm.export.homes import HOMES, Home, describe_homes, obstacles
from hub_upload.card import PLACEHOLDER
from hub_upload.card_text import GENERATED, join_card, split_card
from hub_upload.command_line import ArgumentParser, run
from hub_upload.licences import FIELDS
from hub_upload.repository import check_model, file_of
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


@dataclass(frozen=True)
class Form:
    """A form in which a checkpoint can be written.

    Args:
        write: makes the new folder for a model in evaluation mode, its processor and one of the form's homes, and compares what was
            written with them; a ValueError says what differs. The model is nobody else's: it may be converted.
            Options of the form follow as keywords; the folder's name is that of the export. Returns what else the card has places for.
        card: the card's text, with places for {title}, {repository}, {checkpoint}, {class_name} and {question}.
        library: the Hub's name of what loads the folder.
        achieved: what may be said of the folder when it is there.
        options: the names of further options that `write` takes.
    """

    write: Callable[..., dict[str, str] | None]
    card: str
    library: str
    achieved: str
    options: tuple[str, ...] = ()


FORMS = {
    "transformers": Form(stock.write, stock.CARD, "transformers", "loads without remote code"),
    "gguf": Form(gguf.write, gguf.CARD, "gguf", "runs in llama.cpp", ("outtype",)),
    "onnx": Form(
        onnx.write, onnx.CARD, "transformers.js", "logits and a text compared with the checkpoint's", ("int8",)
    ),
}


def choose_home(config: AlignVLMConfig, form: str, processor: AlignVLMProcessor | None = None) -> Home:
    """The home of a configuration, and of its processor, in one form.

    Raises:
        ValueError: if it has none; the message says why not, home by home, and which one change would open a door.
    """
    for home in HOMES:
        if home.form == form and not obstacles(config, home, processor):
            return home
    reasons = "\n".join(f"  {line}" for line in describe_homes(config, form, processor))
    raise ValueError(f"None of the homes in the form {form!r} computes what this checkpoint does:\n{reasons}")


def read_config(checkpoint: str, revision: str | None = None) -> AlignVLMConfig:
    """The configuration of an AlignVLM checkpoint; no code of the checkpoint is run.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is of another project, or its LoRA weights lie apart.
    """
    check_model(checkpoint, revision)
    if file_of(checkpoint, "config.json", revision) is None:
        raise FileNotFoundError(f"{checkpoint!r} holds no checkpoint: it has no config.json.")
    values, _ = PreTrainedConfig.get_config_dict(checkpoint, revision=revision)
    if values.get("model_type") != "alignvlm":
        raise ValueError(
            f"{checkpoint!r} is a model of type {values.get('model_type')!r}, not an AlignVLM checkpoint. Its code was not run."
        )
    if any(file_of(checkpoint, f"lora/{name}", revision) for name in LORA_FILES):
        raise ValueError(
            f"{checkpoint!r} keeps LoRA weights apart (lora/), which the export would lose. Merge them first: "
            "`python -m hub_upload.package CHECKPOINT OUT`, then export OUT."
        )
    return AlignVLMConfig.from_pretrained(checkpoint, revision=revision)


def write_card(
    checkpoint: str, revision: str | None, home: Home, folder: Path, title: str, more: dict[str, str]
) -> None:
    """Writes a card that keeps the licence, the backbones and the data sets on the checkpoint's own, and says what the folder is.

    Args:
        more: what the form's `write` returned.
    """
    found = file_of(checkpoint, "README.md", revision)
    try:
        kept = split_card(Path(found).read_text(encoding="utf-8"))[0] if found else {}
    except ValueError:
        kept = {}
    names = (*FIELDS, "language", "base_model", "base_model_relation", "datasets")
    data = ModelCardData(
        library_name=FORMS[home.form].library,
        pipeline_tag="image-text-to-text",
        tags=["alignvlm", "vision-language-model"],
        **{"language": "en", **{name: kept[name] for name in names if kept.get(name)}},
    )
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    tag = evaluation_tag(checkpoint, revision)
    question = json.dumps(with_tag(tag, "What is it?"), ensure_ascii=False)[1:-1]  # between quotation marks
    body = FORMS[home.form].card.format(
        title=title, repository=PLACEHOLDER, checkpoint=name, class_name=home.class_name, question=question, **more
    )
    if tag:
        body += f"\nIts prompts begin with `{tag}`, as in training; nothing writes that for you.\n"
    (folder / "README.md").write_text(join_card(data.to_dict(), body, GENERATED), encoding="utf-8")


def export(
    checkpoint: str, out: str | Path, form: str = "transformers", revision: str | None = None, **options
) -> Home:
    """Writes a checkpoint in one of `FORMS` into the new folder `out`, which is there only when it is complete.

    Args:
        **options: further options of the form (`Form.options`).

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        FileNotFoundError: if there is no such checkpoint.
        OSError: if the files cannot be written.
        ValueError: for a checkpoint of another project, LoRA weights that lie apart, damaged weights, a tokenizer without the image token, a
            configuration without a home, an option of another form, and a comparison that failed.
    """
    for name in options:
        if name not in FORMS[form].options:
            owner = next(other for other, each in FORMS.items() if name in each.options)
            raise ValueError(f"--{name} is an option of the form {owner!r}, not of {form!r}.")
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} is there already. Name a new folder.")
    config = read_config(checkpoint, revision)
    processor = AlignVLMProcessor.from_pretrained(checkpoint, revision=revision)
    check_image_token(checkpoint, config, processor)
    home = choose_home(config, form, processor)
    # In float32 whatever the checkpoint has: in 16 bit what a language model computes when it is made is rounded, such as Gemma's scale.
    model = load_weights(AlignVLMForConditionalGeneration, checkpoint, revision=revision, dtype=torch.float32).eval()
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part.dtype = config.dtype or torch.float32
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workspace:
        folder = Path(workspace) / out.name
        try:
            more = FORMS[form].write(model, processor, home, folder, **options) or {}
            write_card(checkpoint, revision, home, folder, out.name, more)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{str(out)!r} cannot be written: {error}. Make room, or name another folder.") from error
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return home


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s CHECKPOINT [OUT] [options]")
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument(
        "out", nargs="?", help="The new folder. Left out: says what the checkpoint can become, and why not."
    )
    p.add_argument("--to", choices=FORMS, help="The form. Default: transformers, a class of its own.")
    p.add_argument(
        "--outtype", choices=gguf.OUTTYPES, help="gguf: the number format, by llama.cpp's names. Default: f16."
    )
    p.add_argument("--revision", help="Revision of a Hub checkpoint.")
    p.add_argument("--int8", action="store_true", help="onnx: write files with 8-bit weights too (*_quantized.onnx).")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    logging.disable_progress_bar()
    names = [name for form in FORMS.values() for name in form.options]
    options = {name: value for name in names if (value := getattr(arguments, name))}
    try:
        if arguments.out is None:
            if given := [name for name in ("to", *names) if getattr(arguments, name)]:
                raise ValueError(f"--{given[0]} is of an export: name OUT, too, the new folder that is to be written.")
            config = read_config(arguments.checkpoint, arguments.revision)
            processor = AlignVLMProcessor.from_pretrained(arguments.checkpoint, revision=arguments.revision)
            print("\n".join(describe_homes(config, processor=processor)))
            return
        form = arguments.to or "transformers"
        home = export(arguments.checkpoint, arguments.out, form, arguments.revision, **options)
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{arguments.out}: {home}, {FORMS[form].achieved}")


if __name__ == "__main__":
    run(main)
