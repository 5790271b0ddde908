"""Configuration of AlignVLM: a vision encoder, a projector and a causal language model."""

from typing import ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .masking_alignvlm import (
    IMAGE_BLOCKS,
    MASK_TYPES,
    same_image,
)  # needs torch alone, which transformers has imported by now


FORMAT_VERSION = 2  # raised whenever an older version of this file could no longer read a checkpoint
PROJECTOR_TYPES = ("linear", "mlp", "pool")
LAYER_FUSIONS = ("concatenate", "weighted_sum")
NATIVE_SHAPES = ("siglip2_vision_model",)  # encoders that take images of any shape, as patches
# Options that a config.json names only where they are on, and what they are where they are off.
OFF = {
    "vision_layer_fusion": "concatenate",
    "merge_image_tokens": None,
    "modality_calibration": False,
    "image_block": None,
    "max_num_patches": None,
}
AUTO_MAP = {
    "AutoConfig": "configuration_alignvlm.AlignVLMConfig",
    "AutoModel": "modeling_alignvlm.AlignVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_alignvlm.AlignVLMForConditionalGeneration",
    "AutoProcessor": "processing_alignvlm.AlignVLMProcessor",
}
# What AutoModel names in a package for vLLM, whose transformers backend puts its own head on the model.
BASE_MODEL = "modeling_alignvlm.AlignVLMModel"
# Keys that transformers itself, and scripts that train with it, add to a configuration.
_LIBRARY_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "quantization_config", "tokenizer_class", "torch_dtype", "transformers.js_config", "use_cache",
    *(f"{name}_token_id" for name in ("bos", "decoder_start", "eos", "pad", "sep")),
}  # fmt: skip


class AlignVLMConfig(PreTrainedConfig):
    """
    Args:
        vision_config (`dict` or `PreTrainedConfig`):
            Configuration of the vision encoder, of any registered model type that yields one feature per position of an
            image, as a sequence (SigLIP, CLIP, DINOv2, ViT, ...) or as a map (ResNet, ConvNeXt, ...). Defaults to SigLIP.
        text_config (`dict` or `PreTrainedConfig`):
            Configuration of the language model, of any registered causal LM. Defaults to Qwen2.
        projector_type (`str`):
            `"mlp"` (two layers), `"linear"`, or `"pool"` (averages of squares of patches, RMS norm, a layer without bias: as in Gemma 3).
        projector_hidden_act (`str`): activation of the MLP projector.
        pixel_shuffle_factor (`int`):
            Merges squares of `factor x factor` neighbouring patches into one image token: `"pool"` averages them, the other projectors
            take them stacked.
        vision_feature_layer (`int` or `list[int]`):
            -1 takes the encoder's final output; any other value indexes its `hidden_states` (0 are the embeddings). Of a list, every layer
            is taken, all from one pass.
        vision_layer_fusion (`str`):
            how several layers become one feature: `"concatenate"` puts their channels side by side, as LLaVA's class in transformers does;
            `"weighted_sum"` adds them up with learned weights (see `AlignVLMLayerFusion`).
        merge_image_tokens (`int`, *optional*):
            Merges similar tokens of an image until this number is left (see `similar_groups`), before the projector's layers.
        modality_calibration (`bool`):
            Scales and shifts the hidden states of image tokens behind every layer of the language model (see `AlignVLMCalibration`).
        attention_mask_type (`str`):
            Which later tokens a token may see too: a name of `masking_alignvlm.MASK_TYPES`, such as `"causal"` (none) or
            `"image"` (those of the same image).
        image_block (`str`, *optional*):
            For images that the processor cuts into tiles: whether the mask types take a `"tile"` for an image, or the `"image"` with the
            marks between its tiles. None: images are not cut.
        image_token_id (`int`): the id of the placeholder that image features replace.
        image_size (`list[int]`, *optional*): height and width in pixels of the image processor's output.
        image_grid (`list[int]`, *optional*): rows and columns of the encoder's feature grid.
        vision_hidden_size (`int`, *optional*):
            width of the features of one layer. Assembly measures these three; left out, they are the vision config's `image_size`,
            `image_size // patch_size` and `hidden_size`, for a square input.
        max_num_patches (`int`, *optional*):
            Of an encoder that takes images in their native shape (`NATIVE_SHAPES`): the most patches of an image, which then has a grid of
            its own and no more than `image_seq_length` tokens. Defaults to the vision config's `num_patches`.
        supported_mask_types (`list[str]`, *optional*):
            the mask types that assembly saw the language model keep; left out: all.
        packing (`bool`):
            whether rows may hold several annotations of an image or several records, and questions share a prefilled image.
            False for language models that do not honour `position_ids` or carry a state from token to token.
        tie_word_embeddings (`bool`): whether head and embeddings share weights; defaults to the text config's value.

    Raises:
        ValueError: for an unknown key or value (the message lists the valid ones), for a checkpoint written by a later
            version, for feature grids that the pixel shuffle factor does not divide, and for an encoder whose config does
            not state the grid if `image_grid` is left out.
    """

    model_type = "alignvlm"
    sub_configs: ClassVar = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp"
    projector_hidden_act: str = "gelu"
    pixel_shuffle_factor: int = 1
    vision_feature_layer: int | list[int] = -1
    vision_layer_fusion: str = "concatenate"
    merge_image_tokens: int | None = None
    modality_calibration: bool = False
    attention_mask_type: str = "image"
    image_block: str | None = None
    image_token_id: int | None = None
    image_size: list[int] | None = None
    image_grid: list[int] | None = None
    vision_hidden_size: int | None = None
    max_num_patches: int | None = None
    supported_mask_types: list[str] | None = None
    packing: bool = True
    tie_word_embeddings: bool | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint was written by a later version of AlignVLM (format {self.format_version}; this code "
                f"reads up to {FORMAT_VERSION}). Update the package, or load it with the code in its own folder."
            )
        self.format_version = FORMAT_VERSION  # what is written from here has all fields
        unknown = [key for key in kwargs if key not in _LIBRARY_KEYS and not key.startswith("_")]
        if unknown:
            raise ValueError(
                f"Unknown AlignVLMConfig key(s): {', '.join(sorted(unknown))}. Valid keys: {', '.join(self._own_fields())}."
            )
        self.vision_config = self._sub_config("vision_config", "siglip_vision_model")
        self.text_config = self._sub_config("text_config", "qwen2")
        if hasattr(self.vision_config, "vision_use_head"):
            self.vision_config.vision_use_head = False  # SigLIP's pooling head is never read
        if self.native_shapes and self.max_num_patches is None:
            self.max_num_patches = self.vision_config.num_patches
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        super().__post_init__(**kwargs)
        self.auto_map = self._complete_auto_map()

        self._check_value("attention_mask_type", tuple(MASK_TYPES))
        self._check_value("projector_type", PROJECTOR_TYPES)
        self._check_feature_layers()
        self._check_value("image_block", (None, *IMAGE_BLOCKS))
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the vocabulary of {self.text_config.vocab_size} "
                "tokens. Add the image token to the tokenizer and resize the embeddings first."
            )
        self.check_mask_type()
        factor = self.pixel_shuffle_factor
        self._check_native_shapes()
        if not self.native_shapes and (factor < 1 or any(side % factor for side in self.feature_grid)):
            height, width = self.feature_grid
            raise ValueError(
                f"pixel_shuffle_factor={factor} must be at least 1 and divide the feature grid of {height} x {width}."
            )
        self.check_merging()

    def check_mask_type(self) -> None:
        """Raises a `ValueError` if `attention_mask_type` is not among `supported_mask_types`."""
        kept = self.supported_mask_types
        if kept is not None and self.attention_mask_type not in kept:
            raise ValueError(
                f"The language model {self.text_config.model_type!r} cannot keep attention_mask_type="
                f"{self.attention_mask_type!r}, or was assembled before that mask type existed. It was seen to keep: {', '.join(kept)}."
            )

    def check_merging(self) -> None:
        """Raises a `ValueError` if `merge_image_tokens` is no number of tokens that can be left."""
        kept, most = self.merge_image_tokens, self.unmerged_seq_length
        if kept is not None and self.native_shapes:
            raise ValueError(
                f"merge_image_tokens={kept!r} leaves every image as many tokens, and the encoder {self.vision_config.model_type!r} takes "
                "images in their native shape, of different numbers. Leave it out; max_num_patches and pixel_shuffle_factor limit them."
            )
        if kept is not None and (type(kept) is not int or not 1 <= kept <= most):
            raise ValueError(
                f"merge_image_tokens={kept!r} must be from 1 to {most}, the tokens that an image has without it. Leave it out to merge none."
            )

    def _check_native_shapes(self) -> None:
        factor, most = self.pixel_shuffle_factor, self.max_num_patches
        if not self.native_shapes:
            if most is not None:
                raise ValueError(
                    f"max_num_patches={most} is for encoders that take images in their native shape ({', '.join(NATIVE_SHAPES)}), not for "
                    f"{self.vision_config.model_type!r}. Leave it out."
                )
            return
        if type(most) is not int or factor < 1 or most < factor**2:
            raise ValueError(
                f"max_num_patches={most!r} must be a number of patches, at least pixel_shuffle_factor**2, with pixel_shuffle_factor={factor} "
                "at least 1."
            )
        if self.image_block is not None:
            raise ValueError(
                f"image_block={self.image_block!r} is for images that are cut into tiles, and the encoder "
                f"{self.vision_config.model_type!r} takes images in their native shape. Leave it out."
            )

    def _check_feature_layers(self) -> None:
        layers = self.vision_feature_layer
        if isinstance(layers, (list, tuple)):
            if not layers or any(type(layer) is not int for layer in layers) or len(set(layers)) < len(layers):
                raise ValueError(
                    f"vision_feature_layer={layers!r} must be a number, or a list of different ones: -1 for the encoder's final output, else "
                    "an index of its hidden states."
                )
            self.vision_feature_layer = layers[0] if len(layers) == 1 else list(layers)
        self._check_value("vision_layer_fusion", LAYER_FUSIONS)
        if self.vision_layer_fusion == "weighted_sum" and len(self.feature_layers) < 2:
            raise ValueError(
                f"vision_layer_fusion='weighted_sum' adds up several layers, and vision_feature_layer={layers!r} names one. Name at least "
                "two, or leave out vision_layer_fusion."
            )

    @classmethod
    def _own_fields(cls) -> list[str]:
        return [name for name in AlignVLMConfig.__annotations__ if name != "sub_configs"]

    def _check_value(self, key: str, valid: tuple[str | None, ...]) -> None:
        if getattr(self, key) not in valid:
            raise ValueError(f"Unknown {key} {getattr(self, key)!r}. Valid values: {', '.join(map(str, valid))}.")

    def _sub_config(self, key: str, default_model_type: str) -> PreTrainedConfig:
        value = getattr(self, key)
        if isinstance(value, PreTrainedConfig):
            return value
        value = dict(value or {})
        model_type = value.pop("model_type", default_model_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"Unknown model_type {model_type!r} in {key}. Valid values are the model types registered in "
                f"transformers: {', '.join(CONFIG_MAPPING)}."
            )
        return CONFIG_MAPPING[model_type](**value)

    def _complete_auto_map(self) -> dict[str, str]:
        """All auto classes, in this folder; of a given mapping only the base model as `AutoModel` stays."""
        given = (getattr(self, "auto_map", None) or {}).get("AutoModel", "")
        return {**AUTO_MAP, "AutoModel": BASE_MODEL} if given.endswith(BASE_MODEL) else dict(AUTO_MAP)

    @property
    def is_mm_prefix_lm(self) -> bool:
        """Whether tokens of an image see each other, and nothing else looks ahead: what vLLM asks before it makes its masks."""
        return MASK_TYPES[self.attention_mask_type].looks_ahead is same_image

    @property
    def native_shapes(self) -> bool:
        """Whether the encoder takes images in their native shape: each has a grid and a number of tokens of its own."""
        return self.vision_config.model_type in NATIVE_SHAPES

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the encoder's input in pixels."""
        if self.image_size is not None:
            height, width = self.image_size
            return height, width
        return (self._stated("image_size", getattr(self.vision_config, "image_size", None)),) * 2

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Rows and columns of the encoder's feature grid, the same for every image; with `native_shapes` there is none."""
        if self.image_grid is not None:
            height, width = self.image_grid
            return height, width
        patch_size = self._stated("patch_size", getattr(self.vision_config, "patch_size", None))
        return (self._stated("image_size", getattr(self.vision_config, "image_size", None)) // patch_size,) * 2

    @property
    def feature_layers(self) -> list[int]:
        """The encoder's layers whose features are taken."""
        layers = self.vision_feature_layer
        return list(layers) if isinstance(layers, (list, tuple)) else [layers]

    @property
    def feature_size(self) -> int:
        """Width of the encoder's features, those of all `feature_layers` side by side."""
        stated = getattr(self.vision_config, "hidden_size", None)
        return len(self.feature_layers) * (self.vision_hidden_size or self._stated("hidden_size", stated))

    def _stated(self, key: str, value: int | list[int] | None) -> int:
        """Returns a value of the vision config; raises a `ValueError` if it is missing."""
        if value is None:
            raise ValueError(
                f"The configuration of the vision encoder {self.vision_config.model_type!r} has no {key!r}. Give image_size, "
                "image_grid and vision_hidden_size, as `alignvlm.stages.backbones` measures them."
            )
        return max(value) if isinstance(value, (list, tuple)) else value

    @property
    def image_seq_length(self) -> int:
        """Tokens that one image, or one tile of it, takes in the language model; with `native_shapes` the most."""
        return self.unmerged_seq_length if self.merge_image_tokens is None else self.merge_image_tokens

    @property
    def unmerged_seq_length(self) -> int:
        """Tokens of one image or tile before similar ones are merged: one for each square of the grid."""
        return self.positions // self.pixel_shuffle_factor**2

    @property
    def positions(self) -> int:
        """Positions for which the encoder computes features of one image or tile, those of padding too."""
        if self.native_shapes:
            return self.max_num_patches
        height, width = self.feature_grid
        return height * width

    def to_dict(self) -> dict:
        """As in transformers, but the same before and after a round trip: `auto_map` in full, one dtype for all parts, and no option
        that is off."""
        values = {**super().to_dict(), "auto_map": self._complete_auto_map()}
        values = {key: value for key, value in values.items() if key not in OFF or value != OFF[key]}
        for key in self.sub_configs:
            values[key] = {**values[key], "dtype": values.get("dtype"), "_name_or_path": ""}
        return values


__all__ = ["NATIVE_SHAPES", "AlignVLMConfig"]
