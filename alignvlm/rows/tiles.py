"""What the rows of a batch need to know of images whose number of tokens depends on their shape: the grid of each.

A grid is `(rows, columns)`: of the tiles that the processor cuts an image into, `WHOLE` for one that is not cut; or, in native shape, of its
tokens. Processors of older checkpoints, with their own code, know neither.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from alignvlm.data.images import BadImage, image_size
from modeling_alignvlm import WHOLE


Grid = tuple[int, int]


def cuts_images(processor: ProcessorMixin) -> bool:
    """Whether the processor cuts images into tiles."""
    return getattr(processor, "max_tiles", 1) > 1


def has_grids(processor: ProcessorMixin) -> bool:
    """Whether the number of an image's tokens depends on its shape."""
    return getattr(processor, "has_grids", False)


def takes_native_shapes(processor: ProcessorMixin) -> bool:
    """Whether images are taken in their native shape."""
    return getattr(processor, "native_shapes", False)


def set_max_tiles(config: PreTrainedConfig, processor: ProcessorMixin, max_tiles: int) -> None:
    """Lets a checkpoint cut images into at most this number of tiles, beside their overview; 1: not at all.

    Raises:
        ValueError: for fewer than 1, for more than the language model's context holds, and for a checkpoint whose own code knows no tiles.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles={max_tiles} must be at least 1, which cuts no image.")
    if not hasattr(processor, "max_tiles"):
        raise ValueError(
            f"max_tiles={max_tiles}: the checkpoint's own code cuts no images. Load it without trust_remote_code."
        )
    if max_tiles > 1 and takes_native_shapes(processor):
        raise ValueError(
            f"max_tiles={max_tiles} cuts images into squares, and the encoder {config.vision_config.model_type!r} takes them in their native "
            "shape. Leave it out; for more of an image, assemble the checkpoint with more max_num_patches."
        )
    context = getattr(config.text_config, "max_position_embeddings", None) or math.inf
    tokens = (max_tiles + 1) * processor.image_seq_length
    if max_tiles > 1 and tokens > context:
        raise ValueError(
            f"max_tiles={max_tiles}: an image of so many tiles, with its overview, has {tokens:,} tokens, and the context of the language model "
            f"holds {context:,}. At most {max(int(context // processor.image_seq_length) - 1, 1)} fit."
        )
    processor.max_tiles = max_tiles
    config.image_block = None if max_tiles == 1 else config.image_block or "image"


def describe_tiles(config: PreTrainedConfig, processor: ProcessorMixin) -> dict[str, Any]:
    """Returns what a record of a run says of tiles or native shapes; nothing where images are not cut and become squares."""
    if takes_native_shapes(processor):
        return {"max_num_patches": config.max_num_patches}
    if not cuts_images(processor):
        return {}
    return {"max_tiles": processor.max_tiles, "tile_marks": processor.tile_marks, "image_block": config.image_block}


def grids_of(processor: ProcessorMixin, images: Sequence[Any]) -> list[Grid]:
    """Returns the grids of images, decoded or not (see `alignvlm.data.images.image_size`); `WHOLE` for one that cannot be read."""
    if not has_grids(processor):
        return [WHOLE] * len(images)
    return [_grid_of(processor, image) for image in images]


def _grid_of(processor: ProcessorMixin, image: Any) -> Grid:
    try:
        return processor.image_grid(image_size(image))
    except BadImage:  # whoever decodes it will say so
        return WHOLE


def largest_grids(count: int) -> list[Grid]:
    """Returns the grids of at most `count` tiles to which neither a row nor a column can be added."""
    return [(rows, count // rows) for rows in range(1, count + 1) if count // rows > count // (rows + 1)]


def tokens_of(processor: ProcessorMixin, grid: Grid) -> int:
    """Returns the number of image tokens of an image of this grid."""
    return processor.token_count(grid) if has_grids(processor) else processor.image_seq_length


def image_inputs_of(processor: ProcessorMixin, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Prepares RGB images as the model wants them: `pixel_values` `(tiles of all images, channels, height, width)`; in native shape patches,
    with `spatial_shapes` (see `AlignVLMProcessor.__call__`)."""
    process = processor.process_images if has_grids(processor) else processor.image_processor
    batch = process(list(images), return_tensors="np")
    names = ("pixel_values", "spatial_shapes") if takes_native_shapes(processor) else ("pixel_values",)
    return {name: torch.from_numpy(np.asarray(batch[name])) for name in names}
