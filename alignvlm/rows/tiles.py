"""What the rows of a batch need to know of an image that the processor cuts into tiles: its grid.

A grid is `(rows, columns)`, `WHOLE` for an image that is not cut. Processors of older checkpoints, with their own code, cut none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from alignvlm.data.images import BadImage, image_size
from modeling_alignvlm import WHOLE


Grid = tuple[int, int]


def cuts_images(processor: ProcessorMixin) -> bool:
    """Whether the processor cuts images into tiles."""
    return getattr(processor, "max_tiles", 1) > 1


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
