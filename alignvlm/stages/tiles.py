"""Cuts images into tiles, as a recipe or an assembly asks for: `max_tiles`, `tile_marks` and `image_block` (docs/tiles.md)."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from alignvlm.rows.tiles import cuts_images, set_max_tiles, takes_native_shapes
from modeling_alignvlm import IMAGE_BLOCKS, AlignVLMProcessor


@dataclass(kw_only=True)
class TileArguments:
    """How images become tiles. What is left out stays as the checkpoint has it."""

    max_tiles: int | None = field(
        default=None,
        metadata={"help": "The most tiles that an image is cut into, beside its overview; 1: images are not cut."},
    )
    tile_marks: bool | None = field(
        default=None,
        metadata={"help": "Write `<row_1_col_1>` before each tile, as text.", "nargs": "?", "const": True},
    )
    image_block: str | None = field(
        default=None,
        metadata={
            "help": "What the mask types take for an image: `image`, all its tiles with their marks, or each `tile`."
        },
    )

    def check_tiles(self) -> None:
        """Raises a `ValueError` for values that there are not."""
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles={self.max_tiles} must be at least 1, which cuts no image.")
        if self.image_block not in (None, *IMAGE_BLOCKS):
            raise ValueError(f"image_block={self.image_block!r}. Valid values: {', '.join(IMAGE_BLOCKS)}.")

    def check_cut(self, max_tiles: int) -> None:
        """Raises a `ValueError` for an option that does nothing, because `max_tiles` cuts no image."""
        for name in ("tile_marks", "image_block") if max_tiles == 1 else ():
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value!r} is for images that are cut into tiles, and max_tiles={max_tiles} cuts none. Leave out {name}, or set "
                    "max_tiles to 2 or more."
                )


def cut_images(arguments: TileArguments, config: PreTrainedConfig, processor: AlignVLMProcessor) -> None:
    """Sets what `arguments` ask for in a checkpoint's configuration and processor.

    Raises:
        ValueError: for an option that does nothing, because images are not cut.
    """
    set_max_tiles(config, processor, arguments.max_tiles or processor.max_tiles)
    arguments.check_cut(processor.max_tiles)
    if not cuts_images(processor):
        processor.tile_marks = False
        return
    if arguments.tile_marks is not None:
        processor.tile_marks = arguments.tile_marks
    config.image_block = arguments.image_block or config.image_block


def check_not_native(processor: AlignVLMProcessor, what: str) -> None:
    """Raises a `ValueError` if images are taken in their native shape where something, in the words of `what`, needs one size."""
    if takes_native_shapes(processor):
        raise ValueError(
            f"{what}, and {type(processor.image_processor).__name__} takes images in their native shape. Leave it out, or take an encoder of "
            "squares."
        )


def check_not_cut(processor: AlignVLMProcessor, what: str) -> None:
    """Raises a `ValueError` if images are cut into tiles, or taken in their native shape, where something, in the words of `what`, takes only
    complete ones of one size."""
    check_not_native(processor, what)
    if cuts_images(processor):
        raise ValueError(
            f"{what}, and max_tiles={processor.max_tiles} cuts images into tiles. Leave out one of the two; max_tiles: 1 cuts none."
        )
