"""Writes a checkpoint as one of transformers' own classes, so that it loads without remote code.

`homes.py` says which class. The weights go over under that class's names, with tokenizer, image processor, chat template and generation
settings. What was written is loaded again and compared with the checkpoint: the tokens of conversations, the pixel values of images, the
logits and a greedy text.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    DeepseekVLConfig,
    FastVlmConfig,
    Gemma3Config,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    ShieldGemma2Config,
    SmolLM3Config,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.utils import logging

from alignvlm.export.homes import TOKENS_BEFORE_PATCHES, Home
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor, get_mask_type


CARD = """\
# {title}

The checkpoint `{checkpoint}`, trained with AlignVLM (a recipe after [arXiv 2503.19508](https://arxiv.org/abs/2503.19508)), as
`{class_name}` of transformers: it loads without remote code.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repository}")
processor = AutoProcessor.from_pretrained("{repository}")
```

Give RGB images, upright and without transparency. Logits equal those of the checkpoint in float32 (`alignvlm export` compared them).
"""

TOLERANCE = 1e-5  # of logits in float32, relative to the largest


@dataclass(frozen=True)
class Writer:
    """How a checkpoint becomes one home.

    Args:
        config: the class's configuration of an AlignVLM one, both halves given.
        projector: the weights of our projector `{name: tensor}` under the class's names.
        processor: the stock processor of ours.
        vision_name, projector_name: what the class calls these two of its parts.
        first_position: the number that the class gives the position of the first token. Rotary positions depend on differences alone, but
            the angles round otherwise.
    """

    config: Callable[[AlignVLMConfig], PreTrainedConfig]
    projector: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    processor: Callable[[AlignVLMProcessor, AlignVLMConfig], ProcessorMixin]
    vision_name: str = "vision_tower"
    projector_name: str = "multi_modal_projector"
    first_position: int = 0


def _halves(config: AlignVLMConfig) -> dict:
    """Both halves of a configuration and what every class calls alike."""
    return {
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _llava_config(config: AlignVLMConfig) -> LlavaConfig:
    return LlavaConfig(
        **_halves(config),
        image_seq_length=config.image_seq_length,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=_strategy(config),
    )


def _strategy(config: AlignVLMConfig) -> str:
    """LLaVA's word for whether a token before the patches is dropped."""
    return "default" if TOKENS_BEFORE_PATCHES[config.vision_config.model_type] else "full"


def _llava_projector(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"linear_{number}.{kind}": weights[f"layers.{index}.{kind}"]
        for number, index in ((1, 0), (2, 2))
        for kind in ("weight", "bias")
    }


def plain_parts(processor: AlignVLMProcessor) -> tuple[BaseImageProcessor, PreTrainedTokenizerBase]:
    """Image processor and tokenizer as others load them: copies that do not name our code."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # our processor pads on the left by itself
    image_processor = copy.deepcopy(processor.image_processor)
    image_processor.__dict__.pop("auto_map", None)  # the name of our processor's code
    for name in ("auto_map", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return image_processor, tokenizer


def _counting_processor(
    processor: AlignVLMProcessor, config: AlignVLMConfig, patch_size: int, strategy: str, tokens_before: int
) -> LlavaProcessor:
    """LLaVA's processor, which counts an image's tokens by squares of `patch_size` pixels and `tokens_before` them."""
    image_processor, tokenizer = plain_parts(processor)
    if getattr(image_processor, "crop_size", None) is None:
        # Unused without do_center_crop; vLLM has an image's tokens counted by it.
        image_processor.crop_size = dict(zip(("height", "width"), config.input_size))
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=tokens_before,
    )


def _llava_processor(processor: AlignVLMProcessor, config: AlignVLMConfig) -> LlavaProcessor:
    tokens_before = TOKENS_BEFORE_PATCHES[config.vision_config.model_type]
    return _counting_processor(processor, config, config.vision_config.patch_size, _strategy(config), tokens_before)


def _fast_vlm_config(config: AlignVLMConfig) -> FastVlmConfig:
    halves = _halves(config)
    halves["vision_config"].hidden_size = config.feature_size  # which the projector reads, and few such encoders state
    halves["text_config"].tie_word_embeddings = config.tie_word_embeddings  # what it says is believed
    return FastVlmConfig(
        **halves, image_seq_length=config.image_seq_length, projector_hidden_act=config.projector_hidden_act
    )


def _fast_vlm_processor(processor: AlignVLMProcessor, config: AlignVLMConfig) -> LlavaProcessor:
    """LLaVA's, which counts patches, for an encoder without: a token stands for a square of the image."""
    return _counting_processor(processor, config, config.input_size[0] // config.feature_grid[0], "full", 0)


def _deepseek_vl_config(config: AlignVLMConfig) -> DeepseekVLConfig:
    halves = _halves(config)
    return DeepseekVLConfig(**halves | {"image_token_id": halves.pop("image_token_index")})


def _deepseek_vl_projector(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("_", "", 1): tensor for name, tensor in _llava_projector(weights).items()}  # linear1, linear2


def _gemma3_config(config: AlignVLMConfig) -> Gemma3Config | ShieldGemma2Config:
    """`Gemma3Config` reads the language model of every file as Gemma 3's. ShieldGemma 2 has the same class, and a configuration that
    reads any."""
    token, halves = config.image_token_id, _halves(config)
    options = {"mm_tokens_per_image": config.image_seq_length, "boi_token_index": token, "eoi_token_index": token}
    text = halves["text_config"]
    if text.model_type == "gemma3_text":
        return Gemma3Config(**halves, **options)
    if text.model_type == "llama":
        text = _smollm3_config(text)
    if text.sliding_window is None:  # the class makes a mask of this width, whether a layer uses it or not
        text.use_sliding_window, text.sliding_window = True, text.max_position_embeddings
    text.tie_word_embeddings = config.tie_word_embeddings
    return ShieldGemma2Config(**halves | {"text_config": text}, **options)


def _smollm3_config(llama: LlamaConfig) -> SmolLM3Config:
    """A Llama as SmolLM3: the same layers, if all of them have rotary positions."""
    values = llama.to_dict()
    values.pop("model_type")
    return SmolLM3Config(**values, no_rope_layers=[1] * llama.num_hidden_layers)


def _gemma3_projector(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = weights["layers.0.weight"]
    less = norm.float() - 1  # Gemma's norms multiply by one more
    return {
        # In 16 bit if that is exact: of a weight below a half, one less needs more digits.
        "mm_soft_emb_norm.weight": less.to(norm.dtype) if torch.equal(less.to(norm.dtype).float(), less) else less,
        "mm_input_projection_weight": weights["layers.1.weight"].T.contiguous(),
    }


def _gemma3_processor(processor: AlignVLMProcessor, config: AlignVLMConfig) -> Gemma3Processor:
    """`Gemma3Processor` writes an image as two line breaks, a begin token, the image tokens, an end token and two line breaks. Here
    begin and end are image tokens too, and the tokenizer drops these line breaks, so that an image has its own tokens and no other."""
    given, token = processor.tokenizer, processor.image_token
    if not hasattr(given, "backend_tokenizer"):
        raise ValueError(f"The tokenizer {type(given).__name__} has no tokenizer.json, which the export would write.")
    backend = json.loads(given.backend_tokenizer.to_str())
    for added in backend["added_tokens"]:
        if added["content"] == token:
            added["normalized"] = True  # found behind the normalizer, which drops the line breaks around it
    drops = [
        {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
        for pattern in (rf"\n\n(?={re.escape(token)})", rf"(?<={re.escape(token)})\n\n")
    ]
    first = [backend["normalizer"]] if backend["normalizer"] else []
    backend["normalizer"] = {"type": "Sequence", "normalizers": [*first, *drops]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        **{name: getattr(given, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        padding_side=given.padding_side,
        model_max_length=given.model_max_length,
        clean_up_tokenization_spaces=given.clean_up_tokenization_spaces,
        extra_special_tokens={"boi_token": token, "eoi_token": token, "image_token": token},
    )
    resized = processor.image_processor
    pil = type(resized).__name__.endswith("Pil")
    image_processor = (Gemma3ImageProcessorPil if pil else transformers.Gemma3ImageProcessor)(
        **{name: getattr(resized, name) for name in ("size", "resample", "rescale_factor", "image_mean", "image_std")},
        do_pan_and_scan=False,
    )
    return Gemma3Processor(
        image_processor, tokenizer, processor.chat_template, image_seq_length=processor.image_seq_length - 2
    )


def _paligemma_config(config: AlignVLMConfig) -> PaliGemmaConfig:
    halves = _halves(config)
    halves[
        "text_config"
    ].use_bidirectional_attention = False  # asked for by name; the masks are made from `token_type_ids`
    width = config.text_config.hidden_size
    return PaliGemmaConfig(**halves, projection_dim=width, hidden_size=width, vocab_size=config.text_config.vocab_size)


def _paligemma_projector(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"linear.{kind}": weights[f"layers.{kind}"] for kind in ("weight", "bias")}


def _paligemma_processor(processor: AlignVLMProcessor, config: AlignVLMConfig) -> LlavaProcessor:
    """`PaliGemmaProcessor` has a prompt of its own. LLaVA's writes ours; its tokenizer adds `token_type_ids`, 0 for a prompt."""
    made = _llava_processor(processor, config)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    made.tokenizer.model_input_names = made.tokenizer.init_kwargs["model_input_names"] = names
    return made


WRITERS = {
    "FastVLM": Writer(_fast_vlm_config, _llava_projector, _fast_vlm_processor),
    "DeepSeek-VL": Writer(  # its own processor keeps an image's proportions; LLaVA's writes ours
        _deepseek_vl_config,
        _deepseek_vl_projector,
        _llava_processor,
        vision_name="vision_model",
        projector_name="aligner",
    ),
    "PaliGemma": Writer(_paligemma_config, _paligemma_projector, _paligemma_processor, first_position=1),
    "LLaVA": Writer(_llava_config, _llava_projector, _llava_processor),
    "Gemma 3": Writer(_gemma3_config, _gemma3_projector, _gemma3_processor),
}


def stock_model(model: AlignVLMForConditionalGeneration, home: Home) -> PreTrainedModel:
    """A model of the home's class with the weights of `model` in the dtype of its configuration, to be saved: its buffers are empty.

    Raises:
        ValueError: if the class has other weights.
    """
    writer = WRITERS[home.name]
    config = writer.config(model.config)
    config.dtype = dtype = model.config.dtype
    with torch.device("meta"):
        stock = getattr(transformers, home.class_name)(config)
    weights, projector = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # batch norms count in integers
            tensor = tensor.to(dtype)
        if name.startswith("model.projector."):
            projector[name.removeprefix("model.projector.")] = tensor
        else:
            weights[re.sub(r"^model\.vision_tower\.", f"model.{writer.vision_name}.", name)] = tensor
    for name, tensor in writer.projector(projector).items():
        weights[f"model.{writer.projector_name}.{name}"] = tensor
    try:
        stock.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{home} has other weights than this checkpoint: {error}") from error
    if config.tie_word_embeddings:
        stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


# Conversations whose tokens must be those of training: a system message, a question about an image, several turns, text alone.
def probes() -> list[list[dict]]:
    image, noise = Image.new("RGB", (40, 24), (200, 30, 60)), Image.effect_noise((30, 50), 80).convert("RGB")

    def user(*parts):
        return {
            "role": "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in parts
            ],
        }

    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    return [
        [user(image, "What colour is it?")],
        [user("Look:\n\n", noise, "\n\nwhat is it?")],
        [user("Look: ", noise, " and at ", image, " then compare.")],
        [user(image, "What is it?"), said("assistant", "A square."), user("And its colour?")],
        [said("system", "Answer in a word."), user(image, "What is it?")],
        [user("How are you?")],
    ]


@torch.no_grad()
def compare(
    model: AlignVLMForConditionalGeneration,
    processor: AlignVLMProcessor,
    stock: PreTrainedModel,
    other: ProcessorMixin,
    tolerance: float = TOLERANCE,
    first_position: int = 0,
) -> None:
    """Compares what two checkpoints, both in float32, make of the same conversations.

    Args:
        tolerance: how far logits may differ, relative to the largest.
        first_position: where the other counts positions from. Its logits are compared with ours at the same positions, its text with ours
            as it is.

    Raises:
        ValueError: if tokens, pixel values or logits differ. The message says which.
    """
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    needs_prompt = get_mask_type(model.config.attention_mask_type).needs_prompt
    compared = 0
    for messages in probes():
        try:
            ours = processor.apply_chat_template(messages, **options)
        except Exception as error:  # a template raises what it likes for a role it does not take
            logging.get_logger(__name__).info(f"not compared: {error}")
            continue
        theirs = other.apply_chat_template(messages, **options)
        if not torch.equal(ours["input_ids"], theirs["input_ids"]):
            raise ValueError(
                f"{type(other).__name__} writes other tokens than this checkpoint was trained on: "
                f"{other.tokenizer.decode(theirs['input_ids'][0])!r} for {processor.tokenizer.decode(ours['input_ids'][0])!r}."
            )
        if "pixel_values" in ours and not torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-6):
            raise ValueError(f"{type(other.image_processor).__name__} makes other pixel values of an image.")
        prompt = {"prompt_mask": ours["attention_mask"].bool()} if needs_prompt else {}
        counted = first_position + torch.arange(ours["input_ids"].shape[1])[None]
        positions = {"position_ids": counted} if first_position else {}
        expected, actual = model(**ours, **prompt, **positions).logits, stock(**theirs).logits
        difference = float((actual - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:
            raise ValueError(
                f"{type(stock).__name__} gives other logits than this checkpoint (relative difference {difference:.1e})."
            )
        if compared < 2:
            length = {"max_new_tokens": 8, "do_sample": False}
            if not torch.equal(model.generate(**ours, **length), stock.generate(**theirs, **length)):
                raise ValueError(f"{type(stock).__name__} writes another greedy text than this checkpoint.")
        compared += 1
    if compared == 0:
        raise ValueError(
            "The chat template of this checkpoint takes none of the conversations that the export compares."
        )


def write(model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor, home: Home, folder: Path) -> None:
    """Writes the new folder of a home's class, loads it as anybody would and compares it with `model`, which is in float32.

    Raises:
        ValueError: if what was written is not what was given.
    """
    made = stock_model(model, home)
    # In memory ShieldGemma 2's weights would be renamed for a class around this one; what is loaded again keeps its names.
    made.save_pretrained(folder, save_original_format=made.config.model_type != "shieldgemma2")
    WRITERS[home.name].processor(processor, model.config).save_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if type(stock).__name__ != home.class_name:
        raise ValueError(f"The folder loads as {type(stock).__name__}, not as {home.class_name}.")
    other, first_position = AutoProcessor.from_pretrained(folder), WRITERS[home.name].first_position
    compare(model, processor, stock, other, first_position=first_position)
