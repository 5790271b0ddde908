"""Loads a checkpoint for inference: the one way for evaluation, `alignvlm ask` and `alignvlm chat`."""

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import PROCESSOR_NAME

from alignvlm.evaluation.precision import Precision, choose_precision, warn_if_emulated
from hub_upload.package import weights_of
from hub_upload.repository import check_model, commit_of, file_of
from hub_upload.run_record import read_run_record, sha256_of
from modeling_alignvlm import AlignVLMConfig


LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNDER_LORA = ".base_layer."  # in the names of weights that stand below LoRA weights while a stage runs
IN_A_LORA_STAGE = (
    "It is a checkpoint from the middle of a stage with LoRA: go on with that stage (--resume_from_checkpoint) and take the folder that "
    "it writes in the end."
)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_checkpoint` and `device_for` take."""
    parser.add_argument("--revision", help="Revision of a Hub checkpoint.")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run the checkpoint's own code, not this package's."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="fp32, bf16, fp16, or auto: as stored if the device does that natively, else fp32.",
    )
    parser.add_argument("--attn_implementation", metavar="NAME", help="eager, sdpa or flex_attention.")
    parser.add_argument("--use_cpu", action="store_true", help="Compute on the CPU even where there is a GPU.")


def device_for(use_cpu: bool = False) -> torch.device:
    """Returns the current accelerator, or the CPU if there is none or `use_cpu` asks for it."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def load_checkpoint(
    checkpoint: str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    merge_image_tokens: int | None = None,
    others: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin, Precision]:
    """Returns model, processor and what the model computes in. Loads LoRA weights that a stage saved apart (`lora/`), too.

    Args:
        checkpoint: a folder or a Hub repository.
        device: where the model goes.
        revision: of a Hub repository.
        trust_remote_code: run the checkpoint's own code instead of this package's.
        dtype: see `choose_precision`.
        attn_implementation: as for `from_pretrained`.
        merge_image_tokens: of an image, until this number is left, also of a checkpoint that was trained without; 0: none. None: as the
            checkpoint has it.
        others: load any model of transformers that answers about images, too; its processor is not ours.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for an unknown `dtype`, a number of tokens that cannot be left, a model that is none of ours (or, with `others`, does not
            answer about images), and a checkpoint that lacks weights, has damaged ones, or a tokenizer without its image token.
    """
    check_checkpoint(checkpoint, revision, ours=not others)
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(f"The folder {checkpoint!r} holds no checkpoint: it has no config.json.")
    options = {"revision": revision} if revision else {}
    options["trust_remote_code"] = trust_remote_code
    processor = AutoProcessor.from_pretrained(checkpoint, **options)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if merge_image_tokens is not None:
        options["merge_image_tokens"] = merge_image_tokens or None
    model = load_weights(AutoModelForImageTextToText, checkpoint, dtype="auto", **options)
    check_image_token(checkpoint, model.config, processor)
    if merge_image_tokens is not None:
        processor.image_seq_length = model.config.image_seq_length
    precision = choose_precision(dtype, device, model.dtype)
    warn_if_emulated(precision, device)
    model.to(precision.dtype)
    found = [file_of(checkpoint, f"lora/{name}", revision) for name in LORA_FILES]
    if all(found):  # a stage with `lora_merge: false` saves its LoRA weights apart
        model.load_adapter(str(Path(found[0]).parent))
    return model.eval().to(device), processor, precision


def check_checkpoint(name: str, revision: str | None = None, ours: bool = True, weights_only: bool = False) -> None:
    """Checks that a checkpoint exists, and is no backbone, before anything is loaded.

    Args:
        ours: whether it must be one of AlignVLM; else any model that answers about images will do.
        weights_only: whether nothing but its weights is read of it, so that it needs no processor.

    Raises:
        FileNotFoundError: as `hub_upload.repository.check_model`, and for a folder of ours without the processor that it needs.
        ValueError: for a model of another kind, such as a language model; the message says how a checkpoint is made of it. And for a folder
            of a stage with LoRA that has not ended.
    """
    check_model(name, revision)
    if any(UNDER_LORA in weight for file in Path(name).glob("*.safetensors") for weight in _names_in(file)):
        raise ValueError(f"{str(name)!r} cannot be loaded. {IN_A_LORA_STAGE}")
    if (file := file_of(name, "config.json", revision)) is None:  # of adapters
        return
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    kind = config.get("model_type")
    others = not ours and ("auto_map" in config or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if kind != AlignVLMConfig.model_type and not others:
        what = "no checkpoint of AlignVLM" if ours else "no checkpoint that answers about images"
        remedy = (
            "`alignvlm assemble` makes a checkpoint of a vision encoder and a language model: name what it writes."
        )
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            remedy = (
                "Name the checkpoint that it was exported from. To evaluate a model of another class, serve it and give `alignvlm evaluate` "
                "the --server."
            )
        raise ValueError(f"{str(name)!r} is {what} but a model of type {kind!r}. {remedy}")
    if weights_only or kind != AlignVLMConfig.model_type or not Path(name).is_dir():
        return
    if not (Path(name) / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(f"{str(name)!r} lacks its {PROCESSOR_NAME}. Copy the checkpoint's folder whole.")


def check_image_token(checkpoint: str, config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Checks that the tokenizer of one of our checkpoints knows the image token as its model does.

    Raises:
        ValueError: for another tokenizer, such as the empty one that transformers makes where the files are missing.
    """
    if config.model_type != AlignVLMConfig.model_type:
        return
    found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if found != config.image_token_id:
        raise ValueError(
            f"The tokenizer of {str(checkpoint)!r} does not have {processor.image_token!r} as its token {config.image_token_id}: its files are missing or "
            "those of another model. Copy the checkpoint's folder whole."
        )


def _names_in(file: Path) -> list[str]:
    """Returns the names of a file's weights; none of one that cannot be read, of which loading tells."""
    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except SafetensorError:
        return []


def load_weights(model_class: type, checkpoint: str, **options) -> PreTrainedModel:
    """Returns `model_class.from_pretrained(checkpoint, **options)`.

    Raises:
        ValueError: if one of ours lacks weights, for which `from_pretrained` only warns and draws some at random; and for a damaged file.
    """
    try:
        model, loading = model_class.from_pretrained(checkpoint, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {str(checkpoint)!r} cannot be read: {error}. They were not written or copied to their end: copy the checkpoint again."
        ) from error
    if model.config.model_type != AlignVLMConfig.model_type or not loading["missing_keys"]:
        return model
    missing, other = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    has = f" It has {other[0]!r}, which the model does not know." if other else ""
    remedy = "Take the folder of a finished stage."
    if any(UNDER_LORA in name for name in other):
        remedy = IN_A_LORA_STAGE
    raise ValueError(
        f"The checkpoint {checkpoint!r} lacks {len(missing)} of the model's weights, the first {missing[0]!r}.{has} {remedy}"
    )


def evaluation_tag(checkpoint: str, revision: str | None = None) -> str:
    """Returns the source tag that the checkpoint's recipe puts before prompts, from its run record; empty without a record."""
    stages = read_run_record(checkpoint, revision)["stages"]
    return stages[-1].get("evaluation_tag", "") if stages else ""


def with_tag(tag: str, question: str) -> str:
    """Returns the prompt as the checkpoint's recipe wants it at evaluation."""
    return f"{tag} {question}".strip() if tag else question


def model_identity(model: str, revision: str | None = None) -> dict[str, str | None]:
    """Returns which weights these are: a repository's commit, or the hash of a folder's weights."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model, "revision": commit_of(model, revision)}
    weights = [*weights_of(folder), *sorted(folder.glob("pytorch_model*.bin"))]
    return {"name": folder.resolve().name, "weights_sha256": sha256_of(weights)}
