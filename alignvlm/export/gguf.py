"""Writes a checkpoint as the two GGUF files that llama.cpp runs: the language model with its tokenizer, and encoder and projector.

`homes.py` says which of llama.cpp's projectors computes the same. What was written is read back and compared: each weight, with the
rounding of its number format, and the tokens that llama.cpp makes of conversations by the tokenizer and the chat template in the file.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from alignvlm.export import gguf_language, gguf_vision
from alignvlm.export.gguf_prompt import PROBES, Prompt, llama_cpp_ids, llama_cpp_template, training_ids
from alignvlm.export.gguf_tokenizer import Vocabulary, read_vocabulary, rebuild
from alignvlm.stages.chat_templates import IMAGE_BEGIN, IMAGE_END
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


CARD = """\
# {title}

The checkpoint `{checkpoint}`, trained with AlignVLM (a recipe after [arXiv 2503.19508](https://arxiv.org/abs/2503.19508)), for llama.cpp
and what is built on it: the language model, and `mmproj-...` with vision encoder and projector (type `{class_name}`).

```bash
llama-mtmd-cli --jinja -m {language} --mmproj {vision} --image photo.png -p "{question}" --temp 0
llama-server -m {language} --mmproj {vision}
```

An image must be square as the checkpoint saw it: llama.cpp pads others to a square, where training squeezed them.
"""

# Number formats by llama.cpp's names: that of matrices, and that of the embeddings and of encoder and projector.
OUTTYPES = {"f32": ("F32", "F32"), "f16": ("F16", "F16"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q8_0")}
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
QUANTISED = ("Q8_0", "Q4_0")
RESIZES = {"gemma3": (2, "bilinear"), "mlp": (3, "bicubic")}  # what llama.cpp does to an image, by Pillow's number

logger = logging.get_logger(__name__)


def kind_of(name: str, shape: tuple[int, ...], matrices: str, embeddings: str) -> str:
    """The number format of a tensor: vectors stay in 32 bit; what cannot be quantised is in 16 bit, or 32 where little is gained."""
    wanted = embeddings if name.startswith(("token_embd.", "output.")) else matrices
    if len(shape) < 2:
        return "F32"
    if name.startswith(gguf_vision.EXACT):
        return "F16" if wanted == "F16" and name.startswith("v.patch_embd.") else "F32"
    if wanted in QUANTISED and (shape[-1] % 32 or name.startswith(gguf_vision.NOT_QUANTISED)):
        return "F16"
    return wanted


def encode(weight: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor's values in a number format: of quantised ones the bytes."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(over="ignore"):  # what is too large for 16 bit is found when the file is compared
        return quants.quantize(weight.detach().float().cpu().numpy(), GGMLQuantizationType[kind])


def rounding(weight: np.ndarray, kind: str) -> np.ndarray:
    """How far a value may lie from the original in a number format. Blocks of 32 values share a step, itself in 16 bit."""
    if kind == "F32":
        return np.zeros(1, np.float32)
    if kind == "F16":
        return np.abs(weight) * 2.0**-11 + 2.0**-24
    largest = np.abs(weight.reshape(-1, 32)).max(1)
    steps, levels = (0.5, 127) if kind == "Q8_0" else (1.0, 8)
    step = largest / levels
    off = np.abs(step - step.astype(np.float16).astype(np.float32))
    return np.repeat(steps * step * 1.001 + levels * off, 32).reshape(weight.shape)


def compare_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compares the weights in a file with those they were made from.

    Raises:
        ValueError: if one is missing or differs by more than its number format rounds.
    """
    from gguf import GGUFReader, quants

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if found.keys() != expected.keys():
        raise ValueError(f"{path.name} has other weights: {sorted(found.keys() ^ expected.keys())}.")
    for name, weight in expected.items():
        kind, weight = found[name].tensor_type, weight.detach().float().cpu().numpy()
        values = quants.dequantize(found[name].data, kind).reshape(weight.shape)
        # `not <=` refuses values that are not finite too
        if not (np.abs(values - weight) <= rounding(weight, kind.name)).all():
            raise ValueError(
                f"{path.name} holds other values of {name} than the checkpoint, by more than {kind.name} rounds. Try --outtype f32."
            )


def compare_tokens(path: Path, processor: AlignVLMProcessor, prompt: Prompt) -> None:
    """Compares the tokens that llama.cpp makes of conversations by this file with those of training.

    Raises:
        ValueError: if they differ. The message says where.
    """
    from gguf import GGUFReader

    fields = {
        name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer.")
    }
    vocabulary = Vocabulary(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.token_type"],
        fields["tokenizer.ggml.merges"],
        fields["tokenizer.ggml.pre"],
    )
    prompt = replace(
        prompt, template=fields["tokenizer.chat_template"], adds_bos=fields["tokenizer.ggml.add_bos_token"]
    )
    tokenizer, compared = rebuild(vocabulary), 0
    for messages in PROBES:
        try:
            expected, _ = training_ids(processor, messages)
        except Exception as error:  # a template raises what it likes for a role it does not take
            logger.info(f"not compared: {error}")
            continue
        found = llama_cpp_ids(processor, messages, prompt, tokenizer)
        if found != expected:
            decode = processor.tokenizer.decode
            raise ValueError(
                f"llama.cpp writes other tokens than this checkpoint was trained on: {decode(found)!r} for {decode(expected)!r}."
            )
        compared += 1
    if compared == 0:
        raise ValueError(
            "The chat template of this checkpoint takes none of the conversations that the export compares."
        )


def write_file(
    path: Path, architecture: str, kind: str, tensors: dict[str, torch.Tensor], formats: tuple[str, str], *parts
) -> None:
    """Writes a GGUF file.

    Args:
        kind: what it holds, `gguf.GGUFType`.
        formats: the number formats of matrices and of embeddings.
        parts: functions that write keys.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_name(path.parent.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[formats[0]]])
    if formats[0] in QUANTISED:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for add in parts:
        add(writer)
    for name, weight in tensors.items():
        format_ = kind_of(name, tuple(weight.shape), *formats)
        writer.add_tensor(name, encode(weight, format_), raw_dtype=gguf.GGMLQuantizationType[format_])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor, home, folder: Path, outtype: str = "f16"
) -> dict[str, str]:
    """Writes the new folder, for its name `NAME-F16.gguf` and `mmproj-NAME-F16.gguf` by the number format, and compares them.

    Args:
        outtype: the number format, a name of `OUTTYPES`.

    Returns:
        The names of both files, for the card.

    Raises:
        ValueError: if what was written is not what was given.
        ImportError: if the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("The export to GGUF needs the package gguf: pip install 'alignvlm[export]'.") from error
    config, text = model.config, model.config.text_config
    resample, name = RESIZES[home.class_name]
    if int(processor.image_processor.resample) != resample:
        height, width = config.input_size
        logger.warning(
            f"llama.cpp makes images smaller by {name} interpolation, and this image processor by another: what it sees differs a little "
            f"unless images have {width} x {height} pixels. One change before training mends it: image_resample: {name}"
        )
    if home.class_name == "gemma3" and config.image_seq_length > 512:
        logger.warning(
            f"An image has {config.image_seq_length} tokens, and llama.cpp takes 512 at once: start it with --ubatch-size "
            f"{config.image_seq_length} or more, or some tokens of an image do not see others."
        )
    begin, end = (IMAGE_BEGIN, IMAGE_END) if home.class_name == "gemma3" else ("", "")
    adds_bos = training_ids(processor, PROBES[0])[1]
    prompt = Prompt(llama_cpp_template(processor, begin, end), adds_bos, begin, end)
    vocabulary = read_vocabulary(processor.tokenizer, text.vocab_size)
    ends = gguf_language.end_ids(model, processor)
    matrices, others = OUTTYPES[outtype]

    folder.mkdir(parents=True)
    language = folder / f"{folder.name}-{matrices}.gguf"
    vision = folder / f"mmproj-{folder.name}-{others}.gguf"
    weights = gguf_language.tensors(model)
    write_file(
        *(language, text.model_type, gguf.GGUFType.MODEL, weights, (matrices, others)),
        lambda writer: gguf_language.add_keys(writer, text),
        lambda writer: gguf_language.add_tokenizer(writer, vocabulary, processor, ends, prompt),
    )
    compare_tensors(language, weights)
    compare_tokens(language, processor, prompt)
    weights = gguf_vision.tensors(model, home.class_name)
    write_file(
        *(vision, "clip", gguf.GGUFType.MMPROJ, weights, (others, others)),
        lambda writer: gguf_vision.add_keys(writer, config, processor, home.class_name),
    )
    compare_tensors(vision, weights)
    return {"language": language.name, "vision": vision.name}
