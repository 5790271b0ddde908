"""What a configuration can become in other people's programs, and why not: one table, `HOMES`.

A home is a class or graph that computes what an AlignVLM model of one mask type and one projector does, so that the same weights need no
code of ours. `obstacles` compares a configuration with a home; where one field of the recipe is all that is in the way, it is named.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModel

from modeling_alignvlm import AlignVLMConfig


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
        mask_type, projector_type: those that the class computes.
        more: further obstacles of a configuration.
    """

    form: str
    name: str
    class_name: str
    mask_type: str
    projector_type: str
    more: Callable[[AlignVLMConfig], list[Obstacle]]

    def __str__(self) -> str:
        return f"{self.name} ({self.class_name})"


def _encoder(config: AlignVLMConfig) -> list[Obstacle]:
    """What every home asks of the encoder: patches of the configured size, in rows, behind a known number of tokens."""
    vision = config.vision_config
    if vision.model_type not in TOKENS_BEFORE_PATCHES:
        known = ", ".join(TOKENS_BEFORE_PATCHES)
        return [Obstacle(f"the vision encoder is {vision.model_type!r}, and transformers' own classes take {known}")]
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


def _llava(config: AlignVLMConfig) -> list[Obstacle]:
    found = _encoder(config) + _language_model(config)
    vision = config.vision_config
    if config.vision_feature_layer == -1 and vision.model_type not in OUTPUT_IS_A_STATE:
        found.append(
            Obstacle(
                f"it reads hidden states, and the final output of {vision.model_type!r} is none of them (vision_feature_layer=-1)",
                "vision_feature_layer: -2",
            )
        )
    if config.pixel_shuffle_factor != 1:
        found.append(Obstacle("it has no pixel shuffle", "pixel_shuffle_factor: 1"))
    return found + _uncapped(config)


def _final_output(config: AlignVLMConfig) -> list[Obstacle]:
    """What homes ask that read the encoder's final output as it is."""
    found = _encoder(config)
    if TOKENS_BEFORE_PATCHES.get(config.vision_config.model_type, 0):
        kind = config.vision_config.model_type
        found.append(Obstacle(f"it takes no encoder with tokens before the patches, such as {kind!r}"))
    if config.vision_feature_layer != -1:
        found.append(
            Obstacle(
                f"it reads the encoder's final output, not vision_feature_layer={config.vision_feature_layer}",
                "vision_feature_layer: -1",
            )
        )
    return found + _language_model(config)


def _deepseek_vl(config: AlignVLMConfig) -> list[Obstacle]:
    found = _final_output(config) + _uncapped(config)
    if config.pixel_shuffle_factor != 1:
        found.append(Obstacle("it has no pixel shuffle", "pixel_shuffle_factor: 1"))
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
    if config.vision_feature_layer != -1:
        found.append(
            Obstacle(
                f"it reads the encoder's final output, not vision_feature_layer={config.vision_feature_layer}",
                "vision_feature_layer: -1",
            )
        )
    if config.pixel_shuffle_factor != 1:
        found.append(Obstacle("it has no pixel shuffle", "pixel_shuffle_factor: 1"))
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
    if config.pixel_shuffle_factor != 1:
        found.append(Obstacle("it has no pixel shuffle", "pixel_shuffle_factor: 1"))
    kind = config.text_config.model_type
    if kind not in TAKES_READY_MASKS:
        found.append(Obstacle(f"it takes the language models {', '.join(TAKES_READY_MASKS)}, not {kind!r}"))
    elif "sliding_attention" in (getattr(config.text_config, "layer_types", None) or []):
        found.append(Obstacle("it makes no mask for sliding windows of this language model"))
    return found


HOMES = (
    Home("transformers", "LLaVA", "LlavaForConditionalGeneration", "causal", "mlp", _llava),
    Home("transformers", "DeepSeek-VL", "DeepseekVLForConditionalGeneration", "causal", "mlp", _deepseek_vl),
    Home("transformers", "FastVLM", "FastVlmForConditionalGeneration", "causal", "mlp", _fast_vlm),
    Home("transformers", "Gemma 3", "Gemma3ForConditionalGeneration", "image", "pool", _gemma3),
    Home("transformers", "PaliGemma", "PaliGemmaForConditionalGeneration", "prefix", "linear", _paligemma),
)


def obstacles(config: AlignVLMConfig, home: Home) -> list[Obstacle]:
    """All that keeps a configuration from becoming `home`; an empty list if nothing does."""
    found = []
    if config.attention_mask_type != home.mask_type:
        kept = config.supported_mask_types is None or home.mask_type in config.supported_mask_types
        found.append(
            Obstacle(
                f"its attention mask is {home.mask_type!r}, not {config.attention_mask_type!r}",
                f"attention_mask_type: {home.mask_type}" if kept else None,
            )
        )
    if config.projector_type != home.projector_type:
        found.append(
            Obstacle(
                f"its projector is {home.projector_type!r}, not {config.projector_type!r}",
                f"projector_type: {home.projector_type}",
            )
        )
    return found + home.more(config)


def describe_homes(config: AlignVLMConfig, form: str | None = None) -> list[str]:
    """A line for each home (of one form, if it is given): that it is open, or all that is in the way, and the one change that would open it if there is one."""
    lines = []
    for home in HOMES:
        if form not in (None, home.form):
            continue
        found = obstacles(config, home)
        line = f"{home}: " + ("; ".join(obstacle.reason for obstacle in found) or "yes")
        if len(found) == 1 and found[0].change:
            line += f". One change before training opens it: {found[0].change}"
        lines.append(line)
    return lines
