"""What a configuration can become in other people's programs, and why not: one table, `HOMES`.

A home is a class or graph that computes what an AlignVLM model of one mask type and one projector does, so that the same weights need no
code of ours. `obstacles` compares a configuration, and its processor, with a home; where one field of the recipe is all that is in the
way, it is named.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from transformers import AutoModel

from alignvlm.export.gguf_prompt import writes_around_images
from alignvlm.export.gguf_tokenizer import pre_tokenizer_name
from alignvlm.stages.chat_templates import IMAGE_BEGIN, IMAGE_END
from modeling_alignvlm import AlignVLMConfig, AlignVLMProcessor


# Encoders that give a token per patch, and how many tokens stand before these.
TOKENS_BEFORE_PATCHES = {"siglip_vision_model": 0, "clip_vision_model": 1, "vit": 1, "dinov2": 1}
# Encoders whose final output is the last of their hidden states; others have a layer norm between the two.
OUTPUT_IS_A_STATE = ("clip_vision_model",)
# Encoders seen to give a map of features, whose places become the tokens.
GIVES_A_MAP = ("convnext", "convnextv2", "mobilenet_v2", "regnet", "resnet")
# Language models seen to keep the masks that PaliGemma makes, in a forward pass and in generation.
TAKES_READY_MASKS = ("qwen2", "qwen3", "llama", "smollm3")
# Language models that take a mask for each kind of layer by its name, as Gemma 3's class gives them; Llama's class takes none, and
# SmolLM3's computes the same.
TAKES_NAMED_MASKS = ("gemma3_text", "qwen2", "qwen3", "smollm3", "olmo3", "llama")
AROUND_IMAGES = f"image_begin: {IMAGE_BEGIN}, image_end: {IMAGE_END}"  # what `projector_type: pool` sets, too
IN_GGUF = ("llama", "qwen2", "qwen3", "smollm3")  # language models that `gguf_language.py` writes


@dataclass(frozen=True)
class Obstacle:
    """Why a configuration cannot become a home, and the field of the recipe that would change it (None: no field does)."""

    reason: str
    change: str | None = None


@dataclass(frozen=True)
class Home:
    """A class or graph of another program, and what a configuration must be to become one.

    Args:
        form: the form of the export (`alignvlm export --to`).
        name: as people call it.
        class_name: the class or graph.
        mask_type, projector_type: those that the class computes; None for any.
        more: further obstacles of a configuration.
        of_processor: obstacles of the tokenizer, chat template or image processor.
    """

    form: str
    name: str
    class_name: str
    mask_type: str | None
    projector_type: str | None
    more: Callable[[AlignVLMConfig], list[Obstacle]]
    of_processor: Callable[[AlignVLMProcessor], list[Obstacle]] = lambda processor: []

    def __str__(self) -> str:
        return f"{self.name} ({self.class_name})"


def _encoder(config: AlignVLMConfig, takes: Collection[str] = TOKENS_BEFORE_PATCHES) -> list[Obstacle]:
    """What homes ask of an encoder of patches: the configured size, in rows, behind a known number of tokens.

    Args:
        takes: the types that the home takes, for the sentence about one that no home of this kind does.
    """
    vision = config.vision_config
    if vision.model_type not in TOKENS_BEFORE_PATCHES:
        return [Obstacle(f"it takes the vision encoders {', '.join(takes)}, not {vision.model_type!r}")]
    grid = tuple(side // vision.patch_size for side in config.input_size)
    if config.feature_grid != grid:
        return [Obstacle(f"the encoder's features are a grid of {config.feature_grid}, its patches one of {grid}")]
    return []


def _language_model(config: AlignVLMConfig) -> list[Obstacle]:
    """What every home asks of the language model: a head tied to embeddings finds them by their usual name."""
    if not config.tie_word_embeddings:
        return []
    with torch.device("meta"):
        model = AutoModel.from_config(config.text_config, attn_implementation="eager")
    if hasattr(model, "embed_tokens"):
        return []
    kind = config.text_config.model_type
    return [
        Obstacle(f"it ties the head to `embed_tokens`, and the language model {kind!r} calls its embeddings otherwise")
    ]


def _uncapped(config: AlignVLMConfig) -> list[Obstacle]:
    """What homes ask whose logits are the head's as they are."""
    text = config.text_config
    if getattr(text, "final_logit_softcapping", None) is None:
        return []
    return [Obstacle(f"it does not cap logits as the language model {text.model_type!r} does")]


def _no_shuffle(config: AlignVLMConfig) -> list[Obstacle]:
    shuffles = config.pixel_shuffle_factor != 1
    return [Obstacle("it has no pixel shuffle", "pixel_shuffle_factor: 1")] if shuffles else []


def _last_layer(config: AlignVLMConfig) -> list[Obstacle]:
    layer = config.vision_feature_layer
    sentence = f"it reads the encoder's final output, not vision_feature_layer={layer}"
    return [Obstacle(sentence, "vision_feature_layer: -1")] if layer != -1 else []


def _llava(config: AlignVLMConfig) -> list[Obstacle]:
    found = _encoder(config) + _language_model(config)
    vision, layers = config.vision_config, config.feature_layers
    if -1 in layers and vision.model_type not in OUTPUT_IS_A_STATE:
        others = [layer for layer in layers if layer != -1] or -2
        found.append(
            Obstacle(
                f"it reads hidden states, and the final output of {vision.model_type!r} is none of them "
                f"(vision_feature_layer={config.vision_feature_layer})",
                f"vision_feature_layer: {others}",
            )
        )
    if config.vision_layer_fusion != "concatenate":
        sentence = f"it concatenates layers, and knows no vision_layer_fusion={config.vision_layer_fusion!r}"
        found.append(Obstacle(sentence, "vision_layer_fusion: concatenate"))
    found += _no_shuffle(config)
    return found + _uncapped(config)


def _final_output(config: AlignVLMConfig) -> list[Obstacle]:
    """What homes ask that read the encoder's final output as it is."""
    found = _encoder(config, [kind for kind, tokens in TOKENS_BEFORE_PATCHES.items() if not tokens])
    if TOKENS_BEFORE_PATCHES.get(config.vision_config.model_type, 0):
        kind = config.vision_config.model_type
        found.append(Obstacle(f"it takes no encoder with tokens before the patches, such as {kind!r}"))
    found += _last_layer(config)
    return found + _language_model(config)


def _deepseek_vl(config: AlignVLMConfig) -> list[Obstacle]:
    found = _final_output(config) + _uncapped(config)
    found += _no_shuffle(config)
    if config.projector_hidden_act != "gelu":
        found.append(Obstacle(f"its projector's activation is 'gelu', not {config.projector_hidden_act!r}"))
    return found


def _fast_vlm(config: AlignVLMConfig) -> list[Obstacle]:
    found = _language_model(config) + _uncapped(config)
    kind = config.vision_config.model_type
    (height, width), (rows, columns) = config.input_size, config.feature_grid
    if kind not in GIVES_A_MAP:
        found.append(Obstacle(f"its encoder gives a map of features ({', '.join(GIVES_A_MAP)}), not {kind!r}"))
    elif height % rows or height // rows != width // columns or width % columns:
        found.append(
            Obstacle(
                f"its processor counts squares of pixels, and {rows} x {columns} do not divide {height} x {width}"
            )
        )
    found += _last_layer(config)
    found += _no_shuffle(config)
    return found


def _gemma3(config: AlignVLMConfig) -> list[Obstacle]:
    found = _final_output(config)
    height, width = config.feature_grid
    if height != width:
        found.append(Obstacle(f"its grid of patches is square, not {height} x {width}"))
    if config.image_seq_length < 3:
        found.append(Obstacle(f"its processor writes at least 3 tokens an image, not {config.image_seq_length}"))
    kind = config.text_config.model_type
    if kind not in TAKES_NAMED_MASKS:
        found.append(Obstacle(f"it takes the language models {', '.join(TAKES_NAMED_MASKS)}, not {kind!r}"))
    return found + _uncapped(config)


def _paligemma(config: AlignVLMConfig) -> list[Obstacle]:
    found = _final_output(config)
    found += _no_shuffle(config)
    kind = config.text_config.model_type
    if kind not in TAKES_READY_MASKS:
        found.append(Obstacle(f"it takes the language models {', '.join(TAKES_READY_MASKS)}, not {kind!r}"))
    elif "sliding_attention" in (getattr(config.text_config, "layer_types", None) or []):
        found.append(Obstacle("it makes no mask for sliding windows of this language model"))
    return found


def _llama_cpp(config: AlignVLMConfig) -> list[Obstacle]:
    """What llama.cpp asks of the language model and of any encoder."""
    found, text, vision = [], config.text_config, config.vision_config
    kind = text.model_type
    if kind not in IN_GGUF:
        found.append(Obstacle(f"it is written for the language models {', '.join(IN_GGUF)}, not {kind!r}"))
        return found
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        found.append(Obstacle(f"llama.cpp has no sliding windows for the language model {kind!r}"))
    rope = text.rope_parameters["rope_type"]
    if rope not in ("default", "llama3") or (rope == "llama3" and kind != "llama"):
        found.append(Obstacle(f"it is not written for rope_type={rope!r} of the language model {kind!r}"))
    if getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False):
        found.append(Obstacle(f"it is not written for biases of the language model {kind!r}"))
    if text.hidden_act != "silu":
        found.append(Obstacle(f"it has the activation 'silu' in the language model, not {text.hidden_act!r}"))
    if kind == "smollm3" and any(rope != ((index + 1) % 4 > 0) for index, rope in enumerate(text.no_rope_layers)):
        found.append(Obstacle("llama.cpp leaves every fourth layer of SmolLM3 without positions, and this one others"))
    if vision.model_type == "siglip_vision_model":
        if vision.hidden_act != "gelu_pytorch_tanh":
            reason = f"llama.cpp has the activation 'gelu_pytorch_tanh' in this encoder, not {vision.hidden_act!r}"
            found.append(Obstacle(reason))
        if vision.intermediate_size == vision.hidden_size:
            found.append(Obstacle("llama.cpp swaps both layers of an encoder's MLP that is no wider than the encoder"))
    height, width = config.input_size
    if height != width or height != getattr(vision, "image_size", None):
        found.append(Obstacle(f"its encoder takes squares of the size it was made for, not {height} x {width} pixels"))
    return found


def _llama_cpp_pool(config: AlignVLMConfig) -> list[Obstacle]:
    return _final_output(config) + _llama_cpp(config)


def _llama_cpp_mlp(config: AlignVLMConfig) -> list[Obstacle]:
    found = _encoder(config, ["siglip_vision_model"])
    kind = config.vision_config.model_type
    if not found and kind != "siglip_vision_model":
        behind = ", since llama.cpp puts a class token behind the patches" if TOKENS_BEFORE_PATCHES[kind] else ""
        found.append(Obstacle(f"it takes the encoder siglip_vision_model, not {kind!r}{behind}"))
    if len(config.feature_layers) > 1:
        found.append(Obstacle(f"it is written for one layer, not vision_feature_layer={config.vision_feature_layer}"))
    found += _no_shuffle(config)
    if config.projector_hidden_act not in ("gelu", "gelu_pytorch_tanh"):
        found.append(Obstacle(f"its projector has the activation 'gelu', not {config.projector_hidden_act!r}"))
    return found + _llama_cpp(config)


def _llama_cpp_processor(processor: AlignVLMProcessor) -> list[Obstacle]:
    images = processor.image_processor
    found = []
    try:
        pre_tokenizer_name(processor.tokenizer)
    except ValueError as error:
        found.append(Obstacle(str(error)))
    if not images.do_rescale or abs(images.rescale_factor * 255 - 1) > 1e-6:
        found.append(Obstacle("it divides pixel values by 255, and the image processor does not"))
    return found


def _gemma3_processor(processor: AlignVLMProcessor) -> list[Obstacle]:
    found = _llama_cpp_processor(processor)
    if not writes_around_images(processor, IMAGE_BEGIN, IMAGE_END):
        found.append(
            Obstacle(
                f"llama.cpp writes {IMAGE_BEGIN} and {IMAGE_END} around an image, and the chat template does not",
                AROUND_IMAGES,
            )
        )
    return found


def _onnx(config: AlignVLMConfig) -> list[Obstacle]:
    kinds = set(getattr(config.text_config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        kind, found = config.text_config.model_type, ", ".join(sorted(kinds))
        return [Obstacle(f"its cache is keys and values, and the language model {kind!r} has layers of type {found}")]
    return []


HOMES = (
    Home("transformers", "LLaVA", "LlavaForConditionalGeneration", "causal", "mlp", _llava),
    Home("transformers", "DeepSeek-VL", "DeepseekVLForConditionalGeneration", "causal", "mlp", _deepseek_vl),
    Home("transformers", "FastVLM", "FastVlmForConditionalGeneration", "causal", "mlp", _fast_vlm),
    Home("transformers", "Gemma 3", "Gemma3ForConditionalGeneration", "image", "pool", _gemma3),
    Home("transformers", "PaliGemma", "PaliGemmaForConditionalGeneration", "prefix", "linear", _paligemma),
    Home("gguf", "llama.cpp", "gemma3", "image", "pool", _llama_cpp_pool, _gemma3_processor),
    Home("gguf", "llama.cpp", "mlp", "causal", "mlp", _llama_cpp_mlp, _llama_cpp_processor),
    Home("onnx", "ONNX", "graphs for onnxruntime and transformers.js", None, None, _onnx),
)


def obstacles(config: AlignVLMConfig, home: Home, processor: AlignVLMProcessor | None = None) -> list[Obstacle]:
    """All that keeps a configuration, with its processor if it is given, from becoming `home`; an empty list if nothing does."""
    if getattr(config, "native_shapes", False):
        return [Obstacle("it takes images of one size, and the encoder takes them in their native shape")]
    found, of_processor = [], home.of_processor(processor) if processor else []
    if config.image_block is not None or getattr(processor, "max_tiles", 1) > 1:
        found.append(Obstacle("it does not cut images into tiles as this checkpoint's processor does (max_tiles)"))
    if home.mask_type not in (None, config.attention_mask_type):
        kept = config.supported_mask_types is None or home.mask_type in config.supported_mask_types
        found.append(
            Obstacle(
                f"its attention mask is {home.mask_type!r}, not {config.attention_mask_type!r}",
                f"attention_mask_type: {home.mask_type}" if kept else None,
            )
        )
    if home.projector_type not in (None, config.projector_type):
        found.append(
            Obstacle(
                f"its projector is {home.projector_type!r}, not {config.projector_type!r}",
                f"projector_type: {home.projector_type}",
            )
        )
        of_processor = [obstacle for obstacle in of_processor if obstacle.change != AROUND_IMAGES]
    if config.modality_calibration:
        sentence = "it does not scale and shift image tokens behind each layer, as modality_calibration asks for"
        found.append(Obstacle(sentence, "modality_calibration: false"))
    if config.merge_image_tokens is not None and home.form != "onnx":
        sentence = f"it merges no image tokens, as merge_image_tokens={config.merge_image_tokens} asks for"
        found.append(Obstacle(sentence, "merge_image_tokens: 0"))
    return found + home.more(config) + of_processor


def describe_homes(
    config: AlignVLMConfig, form: str | None = None, processor: AlignVLMProcessor | None = None
) -> list[str]:
    """A line for each home (of one form, if it is given): that it is open, or all that is in the way, and the one change that would open it if there is one."""
    lines = []
    for home in HOMES:
        if form not in (None, home.form):
            continue
        found = obstacles(config, home, processor)
        line = f"{home}: " + ("; ".join(obstacle.reason for obstacle in found) or "yes")
        if len(found) == 1 and found[0].change:
            line += f". One change before training opens it: {found[0].change}"
        lines.append(line)
    return lines
