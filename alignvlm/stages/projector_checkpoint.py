"""A trained projector as the start of another model's: taken from a checkpoint, or written apart to be shared.

    alignvlm projector out/stage1 out/projector                                           # writes it apart: megabytes
    alignvlm assemble --vision ... --language ... --projector out/projector --output_dir out/stage0

A projector that was trained with one language model starts that of another: "VPGTrans: Transfer Visual Prompt Generator across LLMs",
arXiv 2305.01278. It is followed by the paper's word converter, a linear map from the embeddings of the one to those of the other, here
solved for by least squares on the tokens that both vocabularies have; the two maps make one layer. Between versions of one language
model, whose embeddings are nearly the same, it is taken as it is; and between models of one width whose embeddings tell nothing of each other.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from alignvlm.evaluation.load import load_weights
from alignvlm.stages.projector_start import NormalEquations, last_linear_layer
from alignvlm.stages.resume import differences
from hub_upload.card_text import GENERATED, join_card
from hub_upload.command_line import ArgumentParser, run
from hub_upload.licences import licence_of
from hub_upload.repository import check_model, commit_of, file_of
from hub_upload.run_record import RUN_RECORD, read_json, read_run_record, write_json, write_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


logger = logging.get_logger(__name__)

WEIGHTS = "projector.safetensors"
MODEL_TYPE = "alignvlm_projector"
PREFIXES = {"projector": "model.projector.", "encoder": "model.vision_tower."}
SHAPED_BY = (
    "projector_type",
    "projector_hidden_act",
    "pixel_shuffle_factor",
    "vision_feature_layer",
    "vision_layer_fusion",
    "modality_calibration",
)
RIDGE = 1e-4  # of the word converter
VERSION = 0.5  # the share of the embeddings' variance that equal tokens have in common, from which on two language models are versions of one
LITTLE = 0.1  # the share that a word converter explains, below which the start is worth little
CHUNK = 8192  # embeddings computed with in float64 at once
# What of an encoder's config says nothing about its features, or is the image processor's business.
PASSING = (
    "_name_or_path",
    "architectures",
    "dtype",
    "image_size",
    "torch_dtype",
    "transformers_version",
    "vision_use_head",
)
CARD = """
# {title}

The projector of an [AlignVLM](https://arxiv.org/abs/2503.19508) model, without its encoder and language model. It maps features of
`{vision}` to the embeddings of `{language}`, and begins a model of that encoder and this or another language model:

    alignvlm assemble --vision ... --language ... --projector {title} --output_dir out/stage0

`config.json` holds the configuration of the model that it is of, `alignvlm_run.json` how it was trained.
"""


@dataclass
class SavedProjector:
    """A projector with what it was trained on: the configuration and run record of its model, and the hash of its encoder's weights.

    `complete`: whether it was taken from a checkpoint, whose language model can be read too.
    """

    name: str
    revision: str | None
    config: AlignVLMConfig
    weights: dict[str, Tensor]
    record: dict[str, Any]
    encoder_sha256: str
    complete: bool

    @classmethod
    def read(cls, name: str, revision: str | None = None) -> "SavedProjector":
        """Reads it from a checkpoint, or from what `export_projector` wrote: a folder or a repository of the Hub.

        Raises:
            FileNotFoundError: if there is no such folder or repository.
            ValueError: if it holds neither.
        """
        check_model(name, revision)
        file = file_of(name, "config.json", revision)
        values = read_json(Path(file)) if file else {}
        record = read_run_record(name, revision)
        if values.get("model_type") == MODEL_TYPE:
            weights = load_file(_needed(name, WEIGHTS, revision))
            config = AlignVLMConfig.from_dict(values["alignvlm_config"])
            return cls(name, revision, config, weights, record, values["encoder_sha256"], complete=False)
        if values.get("model_type") != "alignvlm":
            raise ValueError(
                f"{name!r} is of type {values.get('model_type')!r}, neither an AlignVLM checkpoint nor a projector as `alignvlm projector` "
                "writes it."
            )
        parts = {part: dict(_weights(name, revision, prefix)) for part, prefix in PREFIXES.items()}
        config = AlignVLMConfig.from_pretrained(name, revision=revision)
        return cls(name, revision, config, parts["projector"], record, sha256_of_tensors(parts["encoder"]), True)

    def check_fits(self, vision: PreTrainedConfig, text: PreTrainedConfig, **fields: Any) -> None:
        """Raises a `ValueError` if it cannot begin the projector of a model with this encoder and this language model.

        Args:
            fields: those of `SHAPED_BY` that the model will have.
        """
        if others := [name for name in fields if fields[name] != getattr(self.config, name)]:
            flags = " ".join(f"--{name} {_written(getattr(self.config, name))}" for name in others)
            given = ", ".join(f"{name}={fields[name]}" for name in others)
            raise ValueError(f"The projector of {self.name!r} is made with {flags}, not {given}. Give these options.")
        ours, theirs = (
            {key: value for key, value in config.to_dict().items() if key not in PASSING}
            for config in (self.config.vision_config, vision)
        )
        if others := list(differences(ours, theirs)):
            raise ValueError(
                f"The projector of {self.name!r} belongs to another vision encoder: {'; '.join(others[:3])}. Take the encoder "
                f"{self.record.get('backbones', {}).get('vision', 'it was trained with')}, or leave out --projector."
            )
        hidden_size, width = text.hidden_size, self.config.text_config.hidden_size
        layers, count = (config.num_hidden_layers for config in (text, self.config.text_config))
        if self.config.modality_calibration and (hidden_size, layers) != (width, count):
            raise ValueError(
                f"The projector of {self.name!r} holds the modality_calibration of a language model with {count} layers of width {width}, and "
                f"this one has {layers} of {hidden_size}. Take one of the same layers, or leave out --projector."
            )
        if hidden_size < width and self.config.projector_type == "mlp":
            raise ValueError(
                f"The mlp projector of {self.name!r} has a hidden layer of {width} values, as its language model, and one of {hidden_size} "
                "cannot compute the same. Take a language model at least as wide; `linear` and `pool` can become narrower, too."
            )
        if hidden_size != width and not self.complete:
            raise ValueError(
                f"The projector of {self.name!r} ends at a language model of width {width}, and this one has "
                f"{hidden_size}. Converting it needs the embeddings that it was trained with: name the complete checkpoint it is of."
            )


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _needed(name: str, file: str, revision: str | None) -> str:
    found = file_of(name, file, revision)
    if found is None:
        raise ValueError(f"{name!r} lacks the file {file}: it was not written to its end.")
    return found


def _weights(name: str, revision: str | None, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yields those weights of a checkpoint whose names begin with `prefix`, without it."""
    index = file_of(name, "model.safetensors.index.json", revision)
    files = {"model.safetensors"}
    if index:
        places = read_json(Path(index))["weight_map"]
        files = {file for weight, file in places.items() if weight.startswith(prefix)}
    for file in sorted(files):
        with safe_open(_needed(name, file, revision), framework="pt") as opened:
            for weight in opened.keys():  # noqa: SIM118 - not a dictionary
                if weight.startswith(prefix):
                    yield weight.removeprefix(prefix), opened.get_tensor(weight)


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights as float32, whatever they are stored in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def start_projector(
    model: AlignVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, saved: SavedProjector, language: str
) -> dict[str, Any]:
    """Puts a saved projector into a model that it fits (`SavedProjector.check_fits`), as it is or followed by a word converter.

    Args:
        language: what the model's run record calls its language model.

    Returns:
        what the run record says of it.

    Raises:
        ValueError: if the vocabularies have too few tokens in common for a converter that is needed.
    """
    projector = model.model.projector
    layer = last_linear_layer(projector)
    converter = _word_converter(model, tokenizer, saved, language, with_bias=layer.bias is not None)
    if converter is None:
        projector.load_state_dict(saved.weights)
    else:
        last = next(name for name, module in projector.named_modules() if module is layer)
        weight, bias, _ = converter
        for name, parameter in projector.named_parameters():
            value = saved.weights[name].double()
            if name == f"{last}.weight":
                # A wider hidden layer has further values, which stay as they were drawn and have no weight yet.
                value = nn.functional.pad(weight @ value, (0, parameter.shape[1] - value.shape[1]))
            elif name == f"{last}.bias":
                value = weight @ value + bias
            parameter[: len(value)].copy_(value)
    encoder = model.model.vision_tower.state_dict()
    if sha256_of_tensors(encoder) != saved.encoder_sha256:
        trained = [stage["stage"] for stage in saved.record["stages"] if "vision" in stage.get("learning_rates", {})]
        why = f"stage {trained[-1]} trained its own" if trained else "it was trained with another of the same form"
        logger.warning(
            f"The vision encoder has other weights than the one that the projector of {saved.name!r} was trained with: {why}. It is a rougher start."
        )
    return {
        "from": Path(saved.name).resolve().name if Path(saved.name).is_dir() else saved.name,
        "revision": commit_of(saved.name, saved.revision),
        "backbones": saved.record.get("backbones", {}),
        "stages": [stage["stage"] for stage in saved.record["stages"]],
        "converted": converter[2] if converter else None,
    }


def _word_converter(
    model: AlignVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    saved: SavedProjector,
    language: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor | None, dict[str, Any]] | None:
    """Solves for the map `(hidden, hidden of saved)` from embeddings of the saved projector's language model to those of `model`.

    Returns:
        weight and bias in float64, and what the run record says: the `tokens`, and the share of the embeddings' variance `explained`, of each token by a
        map solved on the others. None if there is nothing to convert: the two are versions of one language model, as is supposed of a projector alone, without embeddings;
        or widths are equal and the map would explain next to nothing.
    """
    width = saved.config.text_config.hidden_size
    same_width = width == model.config.text_config.hidden_size
    if not saved.complete:  # of the same width, or it would not fit
        origin = saved.record.get("backbones", {}).get("language")
        if origin != language:
            logger.warning(
                f"The projector of {saved.name!r} was trained with the language model {origin!r}, without whose embeddings it is taken as it is. "
                f"That is right if {language!r} is a version of it; if not, name the complete checkpoint in --projector."
            )
        return None
    source = load_weights(AlignVLMForConditionalGeneration, saved.name, revision=saved.revision, dtype=torch.float32)
    processor = AlignVLMProcessor.from_pretrained(saved.name, revision=saved.revision)
    theirs, ours = (_tokens_of(each) for each in (processor.tokenizer, tokenizer))
    shared = sorted(theirs.keys() & ours.keys())
    x, t = (
        of.get_input_embeddings()(torch.tensor([tokens[token] for token in shared], dtype=torch.long)).float()
        for of, tokens in ((source, theirs), (model, ours))
    )
    if same_width and len(shared) > 1 and _explained(t - x, t) > VERSION:
        return None
    if len(shared) <= width:
        raise ValueError(
            f"The vocabularies of {saved.name!r} and of this language model have {len(shared)} tokens in common, and a converter between "
            f"embeddings of width {width} needs more than that. Leave out --projector, or use --projector_start in stage 1."
        )
    equations = NormalEquations(x.shape[1], t.shape[1])
    for inputs, targets in zip(x.split(CHUNK), t.split(CHUNK)):
        equations.add(inputs, targets)
    weight, bias = equations.solve(RIDGE, with_bias)
    missed = t - x @ weight.T.float() - (0 if bias is None else bias.float())
    alone = torch.cat([equations.leverages(inputs, RIDGE, with_bias) for inputs in x.split(CHUNK)]).float()
    explained = _explained(missed / (1 - alone).unsqueeze(-1), t)
    if explained < LITTLE:
        logger.warning(
            f"Of the embeddings of {language!r}, those of {saved.name!r} explain {max(explained, 0):.0%} of the variance of tokens that the map was not "
            "solved on: its projector may be no better a start than a new one. Leave out --projector, and try --projector_start in stage 1."
        )
        if same_width:
            return None
    return weight, bias, {"tokens": len(shared), "explained": round(explained, 4)}


def _explained(missed: Tensor, embeddings: Tensor) -> float:
    """The share of the variance of `embeddings` `(tokens, hidden)` that is explained by what misses them by `missed`, of the same shape."""
    return 1 - (missed.square().sum() / (embeddings - embeddings.mean(0)).square().sum()).item()


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of a vocabulary's tokens by their text, without added ones; a leading space is written as byte-level BPE does."""
    added = tokenizer.get_added_vocab()
    return {token.replace("▁", "Ġ"): id for token, id in tokenizer.get_vocab().items() if token not in added}


def export_projector(checkpoint: str, out: str | Path, revision: str | None = None) -> Path:
    """Writes the projector of a checkpoint into the new folder `out`, which is there only when it is complete.

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is none of AlignVLM.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} is there already. Name a new folder.")
    saved = SavedProjector.read(checkpoint, revision)
    backbones = saved.record.get("backbones", {})
    names = {half: backbones.get(half, "unknown") for half in ("vision", "language")}
    try:
        licence = licence_of(saved.record)
    except ValueError:  # not known: the card states none
        licence = {}
    card = ModelCardData(library_name="alignvlm", tags=["alignvlm", "projector"], **licence)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workspace:
        folder = Path(workspace) / out.name
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in saved.weights.items()}, folder / WEIGHTS)
        config = {"model_type": MODEL_TYPE, "encoder_sha256": saved.encoder_sha256}
        config["alignvlm_config"] = json.loads(saved.config.to_json_string())
        write_json(folder / "config.json", config)
        (folder / "README.md").write_text(
            join_card(card.to_dict(), CARD.format(title=out.name, **names).lstrip(), GENERATED), encoding="utf-8"
        )
        write_run_record(folder, saved.record)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return out


def main(argv: list[str] | None = None) -> None:
    p = ArgumentParser(
        description="Writes the projector of a checkpoint apart, to be shared or to begin another model's."
    )
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument("out", help="The new folder.")
    p.add_argument("--revision", help="Revision of a Hub checkpoint.")
    arguments = p.parse_args(argv)
    out = export_projector(arguments.checkpoint, arguments.out, arguments.revision)
    size = (out / WEIGHTS).stat().st_size
    print(f"{out}: {size / 1e6:,.2f} MB, with {RUN_RECORD}. To begin with it: alignvlm assemble ... --projector {out}")


if __name__ == "__main__":
    run(main)
