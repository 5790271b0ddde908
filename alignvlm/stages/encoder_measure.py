"""Measures what a vision encoder makes of an image: sends pictures through its image processor and through the encoder.

What the config says is not asked: its image size may be another one than the image processor's, and features may be patches,
windows merged several times over, or a map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_alignvlm.configuration_alignvlm import NATIVE_SHAPES
from modeling_alignvlm.modeling_alignvlm import chosen_layers


SHAPES = ((240, 320), (320, 240), (300, 300))  # height and width of the pictures sent through
EXTRA_TOKENS = 16  # class and register tokens that may stand before the features; encoders have 0, 1, 2, 5 or 9


@dataclass
class EncoderMeasure:
    """Of one image: `input_size` is height and width in pixels, `grid` rows and columns of features of `hidden_size` values a layer.

    Of an encoder that takes images in their native shape, these two are None, and `max_num_patches` is the most features of an image.
    """

    input_size: tuple[int, int] | None
    grid: tuple[int, int] | None
    hidden_size: int
    max_num_patches: int | None = None

    def fields(self) -> dict[str, Any]:
        """Returns what it says in `AlignVLMConfig`."""
        if self.max_num_patches is not None:
            return {"vision_hidden_size": self.hidden_size, "max_num_patches": self.max_num_patches}
        return {
            "vision_hidden_size": self.hidden_size,
            "image_size": list(self.input_size),
            "image_grid": list(self.grid),
        }


def pictures() -> list[Image.Image]:
    """Noise in landscape, portrait and square form."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


def has_native_shapes(encoder: nn.Module) -> bool:
    """Whether images of an encoder have their native shape."""
    return encoder.config.model_type in NATIVE_SHAPES


def set_max_num_patches(name: str, encoder: nn.Module, image_processor, count: int) -> None:
    """Lets an image processor make at most `count` patches of an image.

    Raises:
        ValueError: for an encoder that takes squares.
    """
    if not has_native_shapes(encoder):
        raise ValueError(
            f"max_num_patches={count} is for encoders that take images in their native shape ({', '.join(NATIVE_SHAPES)}), and {name!r} is "
            f"of type {encoder.config.model_type!r}. Leave it out; --image_size sets the side of its squares."
        )
    image_processor.max_num_patches = count


def set_image_size(image_processor, side: int) -> None:
    """Lets an image processor make squares of `side` pixels: by its crop where it crops, else by resizing both sides."""
    square = {"height": side, "width": side}
    crops = bool(getattr(image_processor, "do_center_crop", False))
    image_processor.size = {"shortest_edge": side} if crops else square
    image_processor.do_resize = True
    if crops or hasattr(image_processor, "crop_size"):
        image_processor.crop_size = square


def without_timm(name: str, image_processor):
    """An image processor that is saved with the checkpoint: transformers' wrapper of timm's cannot be. All others stay as they are.

    Pixel values are those of timm's transforms for evaluation, but for one pixel at the edge where a crop leaves an odd rest.

    Raises:
        ValueError: for transforms that transformers' own image processors do not have.
    """
    if type(image_processor).__name__ != "TimmWrapperImageProcessor":
        return image_processor
    config = image_processor.data_config
    (_, height, width), mode = config["input_size"], config.get("crop_mode") or "center"
    kind = getattr(Image.Resampling, str(config["interpolation"]).upper(), None)
    if mode not in ("center", "squash") or (mode == "center" and height != width) or kind is None:
        raise ValueError(
            f"The images of {name!r} are prepared by timm with crop_mode={mode!r}, interpolation={config['interpolation']!r} and "
            f"input_size={config['input_size']}, which no image processor of transformers does. Use an encoder of crop_mode='center' "
            "(a square) or 'squash', with bilinear or bicubic interpolation."
        )
    scaled = [math.floor(side / (config.get("crop_pct") or 0.875)) for side in (height, width)]  # timm's default
    return CLIPImageProcessorPil(
        size={"shortest_edge": scaled[0]} if mode == "center" else {"height": scaled[0], "width": scaled[1]},
        crop_size={"height": height, "width": width},
        resample=kind,
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


@torch.no_grad()
def measure_encoder(name: str, encoder: nn.Module, image_processor, layers: Sequence[int] = (-1,)) -> EncoderMeasure:
    """Measures an encoder.

    Args:
        name: what messages call it.
        layers: which `hidden_states` are taken; -1 for the final output.

    Raises:
        ValueError: if the encoder does not have these layers, or not all of one shape, if pictures of different forms do not become equally many features, if the encoder does not take what the
            image processor makes, or if its features are no positions of the image or not the same twice.
    """
    if has_native_shapes(encoder):
        return _measure_patches(name, encoder, image_processor, layers)
    training = encoder.training
    encoder.eval()
    try:
        pixel_values = _pixel_values(name, image_processor)
        features = _features(name, encoder, pixel_values, layers)
        again = _features(name, encoder, pixel_values.flip(0), layers).flip(0)
        if not features.isfinite().all():
            raise ValueError(
                f"The features of the vision encoder {name!r} ({encoder.config.model_type}) are not finite."
            )
        if not torch.allclose(features, again, atol=1e-3 * features.std().item(), rtol=1e-3):
            raise ValueError(
                f"The vision encoder {name!r} ({encoder.config.model_type}) makes other features of the same picture each time, as "
                "ViT-MAE does, which masks and shuffles patches at random. Its weights are those of a ViT: load them with "
                "`ViTModel.from_pretrained`, save that, and name it instead."
            )
    finally:
        encoder.train(training)
    size = tuple(pixel_values.shape[-2:])
    if features.ndim == 4:
        _check_channels_first(name, encoder, pixel_values, features, layers)
        return EncoderMeasure(size, tuple(features.shape[2:]), features.shape[1] // len(layers))
    grid = _grid(encoder.config, size, features.shape[1])
    if grid is None:
        raise ValueError(
            f"The vision encoder {name!r} ({encoder.config.model_type}) makes {features.shape[1]} features of a picture of {size[0]} x "
            f"{size[1]} pixels: no grid of positions with at most {EXTRA_TOKENS} class and register tokens before it. Use an encoder "
            "with one feature per place."
        )
    return EncoderMeasure(size, grid, features.shape[2] // len(layers))


def _measure_patches(name: str, encoder: nn.Module, image_processor, layers: Sequence[int]) -> EncoderMeasure:
    """As `measure_encoder`, of an encoder that takes images in their native shape."""
    kind, patch_size = type(image_processor).__name__, getattr(image_processor, "patch_size", None)
    if "spatial_shapes" not in image_processor.model_input_names or patch_size != encoder.config.patch_size:
        raise ValueError(
            f"The image processor of {name!r} ({kind}, patch_size={patch_size}) does not make the patches that the encoder "
            f"{encoder.config.model_type!r} takes, of {encoder.config.patch_size} x {encoder.config.patch_size} pixels. Use the image processor "
            "that the encoder was trained with."
        )
    inputs = image_processor(pictures(), return_tensors="pt")
    outputs = encoder(**inputs, output_hidden_states=list(layers) != [-1], return_dict=True)
    features = chosen_layers(outputs, list(layers), f"{name} ({encoder.config.model_type})")
    if not features[inputs["pixel_attention_mask"].bool()].isfinite().all():
        raise ValueError(f"The features of the vision encoder {name!r} ({encoder.config.model_type}) are not finite.")
    return EncoderMeasure(None, None, features.shape[-1] // len(layers), int(image_processor.max_num_patches))


def _pixel_values(name: str, image_processor) -> Tensor:
    """`(pictures, channels, height, width)`, the same for pictures of any form."""
    made = []
    for picture in pictures():
        try:
            values = image_processor(picture, return_tensors="np")["pixel_values"]
        except Exception as error:  # whatever an image processor of others raises
            raise ValueError(
                f"The image processor of {name!r} ({type(image_processor).__name__}) cannot make pixel values of one RGB picture of "
                f"{picture.height} x {picture.width} pixels: {error}"
            ) from error
        made.append(np.asarray(values))
    shapes = [values.shape for values in made]
    if any(len(shape) != 4 or shape[0] != 1 for shape in shapes):
        raise ValueError(
            f"The image processor of {name!r} ({type(image_processor).__name__}) makes pixel values of shape {shapes[0]} of one "
            "picture; AlignVLM needs (1, channels, height, width), one view of each picture."
        )
    if len(set(shapes)) > 1:
        sizes = ", ".join(f"{h} x {w} becomes {s[2]} x {s[3]}" for (h, w), s in zip(SHAPES, shapes))
        raise ValueError(
            f"The image processor of {name!r} ({type(image_processor).__name__}) makes pictures of different sizes: {sizes} pixels. "
            "Every picture must take equally many tokens: give --image_size, the side of the square that all are resized to."
        )
    return torch.from_numpy(np.concatenate(made))


def _features(name: str, encoder: nn.Module, pixel_values: Tensor, layers: Sequence[int]) -> Tensor:
    """The encoder's features, a sequence `(images, tokens, layers * hidden)` or a map `(images, layers * hidden, height, width)`."""
    kind = encoder.config.model_type
    try:
        outputs = encoder(pixel_values.to(encoder.dtype), output_hidden_states=list(layers) != [-1], return_dict=True)
    except Exception as error:  # whatever an encoder of others raises
        own = getattr(encoder.config, "image_size", None)
        asked = "" if list(layers) == [-1] else f", with vision_feature_layer={list(layers)}"
        remedy = f" Its config says image_size={own}: try --image_size {own}." if own is not None else ""
        raise ValueError(
            f"The vision encoder {name!r} ({kind}) does not take what its image processor makes, pixel values of "
            f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}{asked}: {type(error).__name__}: {error}.{remedy}"
        ) from error
    features = chosen_layers(outputs, list(layers), f"{name} ({kind})")
    if features.ndim not in (3, 4) or features.shape[0] != pixel_values.shape[0]:
        raise ValueError(
            f"The vision encoder {name!r} ({kind}) makes features of shape {tuple(features.shape)} of {pixel_values.shape[0]} "
            "pictures; AlignVLM needs (images, positions, hidden) or (images, hidden, height, width)."
        )
    return features


def _check_channels_first(
    name: str, encoder: nn.Module, pixel_values: Tensor, features: Tensor, layers: Sequence[int]
) -> None:
    """A map's positions grow with the image, its channels do not. An encoder of one size only is taken at its word."""
    taller = nn.functional.pad(pixel_values, (0, 0, 0, pixel_values.shape[-2]), mode="replicate")
    try:
        other = _features(name, encoder, taller, layers)
    except ValueError:
        return
    if other.ndim == 4 and other.shape[1] != features.shape[1] and other.shape[-1] == features.shape[-1]:
        raise ValueError(
            f"The vision encoder {name!r} ({encoder.config.model_type}) makes maps of shape {tuple(features.shape)}, which are not "
            "(images, hidden, height, width). Use an encoder whose maps have the channels first."
        )


def _grid(config, input_size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of a sequence of `tokens` features: by patches if that fits, else the largest grid of the input's form."""
    patch = getattr(config, "patch_size", None)
    if patch is not None:
        rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        grid = input_size[0] // rows, input_size[1] // columns
        if 0 <= tokens - grid[0] * grid[1] <= EXTRA_TOKENS:
            return grid
    ratio = input_size[0] / input_size[1]
    columns = int((tokens / ratio) ** 0.5 + 1e-6)
    grid = round(columns * ratio), columns
    return grid if columns and 0 <= tokens - grid[0] * grid[1] <= EXTRA_TOKENS else None
