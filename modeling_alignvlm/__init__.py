"""AlignVLM's model code. Importing it registers the classes, so that the Auto classes work without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_alignvlm import AlignVLMConfig
from .masking_alignvlm import (
    IMAGE_BLOCKS,
    MASK_TYPES,
    MaskType,
    TokenLayout,
    attention_rule,
    check_no_leak,
    dense_mask,
    get_mask_type,
    leaking_edges,
    same_image,
)
from .modeling_alignvlm import CACHE_NAME, AlignVLMForConditionalGeneration, AlignVLMModel
from .processing_alignvlm import WHOLE, AlignVLMProcessor, number_images, tiles_of, to_rgb


AutoConfig.register("alignvlm", AlignVLMConfig)
AutoModel.register(AlignVLMConfig, AlignVLMForConditionalGeneration)
AutoModelForImageTextToText.register(AlignVLMConfig, AlignVLMForConditionalGeneration)
AutoProcessor.register(AlignVLMConfig, AlignVLMProcessor)

# What a saved checkpoint must carry to be loaded by the Auto classes with `trust_remote_code=True`.
AlignVLMConfig.register_for_auto_class("AutoConfig")
AlignVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
AlignVLMProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "CACHE_NAME",
    "IMAGE_BLOCKS",
    "MASK_TYPES",
    "WHOLE",
    "AlignVLMConfig",
    "AlignVLMForConditionalGeneration",
    "AlignVLMModel",
    "AlignVLMProcessor",
    "MaskType",
    "TokenLayout",
    "attention_rule",
    "check_no_leak",
    "dense_mask",
    "get_mask_type",
    "leaking_edges",
    "number_images",
    "same_image",
    "tiles_of",
    "to_rgb",
]
