"""What the rows of a batch need to know of an image that the processor cuts into tiles: its grid.

A grid is `(rows, columns)`, `WHOLE` for an image that is not cut. Processors of older checkpoints, with their own code, cut none.
"""

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


def set_max_tiles(config: PreTrainedConfig, processor: ProcessorMixin, max_tiles: int) -> None:
    """Lets a checkpoint cut images into at most this number of tiles, beside their overview; 1: not at all.

    Raises:
        ValueError: for fewer than 1, and for a checkpoint whose own code knows no tiles.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles={max_tiles} must be at least 1, which cuts no image.")
    if not hasattr(processor, "max_tiles"):
        raise ValueError(
            f"max_tiles={max_tiles}: the checkpoint's own code cuts no images. Load it without trust_remote_code."
        )
    processor.max_tiles = max_tiles
    config.image_block = None if max_tiles == 1 else config.image_block or "image"


def describe_tiles(config: PreTrainedConfig, processor: ProcessorMixin) -> dict[str, Any]:
    """Returns what a record of a run says of tiles; nothing where images are not cut."""
    if not cuts_images(processor):
        return {}
    return {"max_tiles": processor.max_tiles, "tile_marks": processor.tile_marks, "image_block": config.image_block}


def grids_of(processor: ProcessorMixin, images: Sequence[Any]) -> list[Grid]:
    """Returns the grids of images, decoded or not (see `alignvlm.data.images.image_size`); `WHOLE` for one that cannot be read."""
    if not cuts_images(processor):
        return [WHOLE] * len(images)
    return [_grid_of(processor, image) for image in images]


def _grid_of(processor: ProcessorMixin, image: Any) -> Grid:
    try:
        return processor.tile_grid(image_size(image))
    except BadImage:  # whoever decodes it will say so
        return WHOLE


def grids_up_to(count: int) -> list[Grid]:
    """Returns all grids of at most `count` tiles."""
    return [(rows, columns) for rows in range(1, count + 1) for columns in range(1, count // rows + 1)]


def pixel_values_of(processor: ProcessorMixin, images: Sequence[Image.Image]) -> Tensor:
    """Prepares RGB images as the vision encoder wants them: `(tiles of all images, channels, height, width)`."""
    process = processor.process_images if cuts_images(processor) else processor.image_processor
    return torch.from_numpy(np.asarray(process(list(images), return_tensors="np")["pixel_values"]))
