"""The AlignVLM processor: images and texts in, the model's inputs out.

Every image placeholder in a text becomes `image_seq_length` image tokens; every image, whatever its type, mode or orientation,
becomes an 8-bit RGB image and then pixel values. Texts of unequal lengths are padded on the left, as generation needs it. On request
the processor also returns the model's dense attention mask.

With `max_tiles`, an image larger than the encoder's input becomes several: an overview of it all, then the tiles of a grid, row by row.
Each is encoded like an image and has `image_seq_length` tokens; `image_ids` say which of them are of one image.

An image processor of native shapes (SigLIP 2 NaFlex) makes patches of an image in its own shape, as many as fit into `max_num_patches`:
each image has the grid of its tokens, and `image_ids` tell images apart.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .masking_alignvlm import TokenLayout, dense_mask


ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "image_url")
TILE_MARK = "<row_{row}_col_{column}>"  # SmolVLM's, as text: a tokenizer that has it as a token takes that one
WHOLE = (1, 1)  # the grid of an image that is not cut


def to_rgb(image, input_data_format: str | None = None) -> Image.Image:
    """Converts a PIL image or an array to an upright 8-bit RGB image.

    The EXIF rotation is applied, transparency is laid on white, and of an animation the current frame is taken. Values become 8-bit by
    dtype and range: booleans are black and white; integers are 0..255 or, if one is larger, 0..65535 (a PIL image of 16 bits always);
    floating numbers are 0..1 or, if one is at least 2, 0..255.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            an array has the shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, with 1 channel
            (grey), 2 (grey, alpha), 3 (red, green, blue) or 4 (and alpha). Where both ends could be channels, they are
            first in a tensor, as torchvision writes them, and last in any other array, as PIL does.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays of three dimensions.

    Raises:
        ValueError: if the image cannot be decoded (truncated or corrupt), or an array has another shape, dtype or range.
    """
    if not isinstance(image, Image.Image):
        return to_rgb(_from_array(image, input_data_format))
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return Image.fromarray(_scaled(np.asarray(image), 1 / 257)).convert("RGB")
        if image.mode in ("F", "I"):
            values = np.asarray(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        else:
            return image.convert("RGB")
    except Exception as error:  # on damaged data Pillow's decoders raise any exception of a format's parser
        name = getattr(image, "filename", "") or "an image in memory"
        raise ValueError(f"Cannot decode {name}: {error}. The file is damaged; replace it or leave it out.") from error
    return Image.fromarray(_to_8_bit(values)).convert("RGB")


def _from_array(array, input_data_format: str | None) -> Image.Image:
    """Converts an array to a PIL image: grey, colours, or either with transparency, by the number of channels."""
    preferred = "channels_first" if isinstance(array, torch.Tensor) else "channels_last"
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    array = np.asarray(array)
    ends = {"channels_first": 0, "channels_last": -1}
    if input_data_format not in (None, *ends):
        raise ValueError(f"input_data_format={str(input_data_format)!r} is unknown; use one of {', '.join(ends)}.")
    fitting = [name for name in ends if array.ndim == 3 and array.shape[ends[name]] <= 4]
    chosen = input_data_format or (preferred if preferred in fitting else next(iter(fitting), None))
    if array.size == 0 or not (array.ndim == 2 or chosen in fitting):
        given = f" as {input_data_format}" if input_data_format else ""
        raise ValueError(
            f"Cannot take an array of shape {array.shape}{given} for an image. Give (height, width), (height, width, channels) "
            "or (channels, height, width) with 1 to 4 channels."
        )
    values = _to_8_bit(array)
    if array.ndim == 3:
        values = np.moveaxis(values, ends[chosen], -1)
    values = np.ascontiguousarray(values.squeeze(-1) if values.ndim == 3 and values.shape[-1] == 1 else values)
    return Image.fromarray(values)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Converts values of an image to `uint8`; rounds those less than half an 8-bit step outside their range to its end."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    low, high = (float(values.min()), float(values.max())) if values.dtype.kind in "iuf" else (np.nan, np.nan)
    step = 1 / 255
    if values.dtype.kind == "f" and -step / 2 < low and high < 1 + step / 2:
        scale = 255
    elif low > -0.5 and high < 255.5 and (values.dtype.kind != "f" or high >= 2):
        scale = 1
    elif low >= 0 and high <= 65535 and values.dtype.kind != "f":
        scale = 1 / 257
    else:
        raise ValueError(
            f"Cannot take values of dtype {values.dtype} from {low:g} to {high:g} for an image. Give floating numbers from 0 to 1 or "
            "from 0 to 255, integers from 0 to 255 or to 65535, or booleans. Give normalised values to the model as "
            "`pixel_values`, and clamp those that interpolation carried over the ends."
        )
    return _scaled(values, scale)


def _scaled(values: np.ndarray, scale: float) -> np.ndarray:
    return (values.astype(np.float32) * scale).round().clip(0, 255).astype(np.uint8)


def best_grid(size: tuple[int, int], tile_size: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """Returns rows and columns of the grid of at most `max_tiles` tiles whose shape is nearest to that of an image.

    A grid has no more rows and columns than the image fills with its own pixels, so that an image no larger than a tile is not cut. Of
    grids of one shape the largest is taken of whose pixels the image has at least half (as in InternVL 1.5, arXiv 2404.16821).

    Args:
        size, tile_size: heights and widths in pixels.
    """
    (height, width), (tile_height, tile_width) = size, tile_size
    most_rows, most_columns = math.ceil(height / tile_height), math.ceil(width / tile_width)

    def badness(grid: tuple[int, int]) -> tuple[float, bool, int]:
        rows, columns = grid
        grid_height, grid_width = rows * tile_height, columns * tile_width
        stretch = abs(math.log(grid_width * height / (grid_height * width)))
        return round(stretch, 9), grid_height * grid_width > 2 * height * width, -rows * columns

    grids = [
        (rows, columns)
        for rows in range(1, min(most_rows, max_tiles) + 1)
        for columns in range(1, min(most_columns, max_tiles // rows) + 1)
    ]
    return min(grids, key=badness)


class AlignVLMProcessor(ProcessorMixin):
    """Wraps an image processor and a tokenizer into one. The tokenizer pads on the left from then on, whatever its files say:
    behind padding on the right a decoder would generate from the wrong token.

    Args:
        image_processor: the vision encoder's image processor.
        tokenizer: the language model's tokenizer; it must know `image_token` as one token.
        image_seq_length (`int`): image tokens per image, `AlignVLMConfig.image_seq_length`; of images in native shape the most.
        image_token (`str`): the placeholder for one image in a text.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
        template_writes_special_tokens (`bool`):
            whether `chat_template` writes all special tokens, as the language model's own does: then the tokenizer adds none.
        max_tiles (`int`): the most tiles that an image is cut into, beside its overview; 1: images are not cut.
        tile_marks (`bool`): whether a text before each tile says its row and column: `TILE_MARK`.
        pixel_shuffle_factor (`int`):
            `AlignVLMConfig.pixel_shuffle_factor`, for images in native shape: both sides of their grid of patches are multiples of it.
    """

    _auto_class = "AutoProcessor"
    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 1,
        image_token: str = "<image>",
        chat_template=None,
        template_writes_special_tokens: bool = False,
        max_tiles: int = 1,
        tile_marks: bool = False,
        pixel_shuffle_factor: int = 1,
    ):
        if not isinstance(max_tiles, int) or max_tiles < 1:
            raise ValueError(f"max_tiles={max_tiles!r}: expected a whole number of at least 1, which cuts no image.")
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.max_tiles = max_tiles
        self.tile_marks = tile_marks
        self.template_writes_special_tokens = template_writes_special_tokens
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know the image token {image_token!r}. Add it as a special token."
            )
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what gets saved
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if self.native_shapes and max_tiles > 1:
            raise ValueError(
                f"max_tiles={max_tiles} cuts images into tiles, and {type(image_processor).__name__} takes them in their native shape. "
                "Leave it out."
            )

    def __call__(
        self, images=None, text=None, dense_mask_type: str | None = None, image_block: str = "image", **kwargs
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: an image, a list of them (in the order of the placeholders), or one list per text; an image is a PIL
                image, an array (see `to_rgb` for shapes and ranges; four dimensions are a list of images), a path, a URL or a
                base64 string.
            text (`str` or `list[str]`): with one `image_token` per image; where it begins with the BOS token, none is added.
            dense_mask_type (`str`, *optional*):
                return `attention_mask` as the dense bool mask `(batch, 1, length, length)` of this mask type, with the
                complete text counted as prompt. Needs `return_tensors="pt"`, and padding in batches of unequal lengths.
            image_block (`str`): what that mask type takes for an image that is cut: see `AlignVLMConfig`.
            **kwargs: for tokenizer and image processor, such as `padding`, `padding_side` (left by default),
                `return_tensors`, `input_data_format`.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at image tokens) of shape `(batch, length)`, and
            `pixel_values` `(images, channels, height, width)` with the images of all texts in order. With `max_tiles`, `pixel_values`
            hold the tiles of all images in order, and there are `image_ids` `(batch, length)`: the index of each token's image in its
            row, of the marks between its tiles too; -1 at text. In native shape, `pixel_values` hold patches, padded to `(images,
            max_num_patches, channels * patch_size**2)`, and there are `spatial_shapes` `(images, 2)`, the rows and columns of patches of
            each, and `image_ids`.

        Raises:
            ValueError: for an empty batch, an unreadable image, or other than one image per placeholder.
        """
        texts = [text] if isinstance(text, str) else text or []
        options = {**kwargs, **(kwargs.get("text_kwargs") or {})}
        if texts and "add_special_tokens" not in options and all(map(self._begins_with_bos, texts)):
            kwargs["add_special_tokens"] = False  # a chat template wrote it
        batch = super().__call__(images=images, text=text, **kwargs)
        grids = batch.pop("image_grids", [])
        if self.has_grids and "input_ids" in batch:
            batch["image_ids"] = self._image_ids(batch["input_ids"], grids)
        if dense_mask_type is not None:
            if not isinstance(batch.get("input_ids"), torch.Tensor):
                raise ValueError(f"dense_mask_type={dense_mask_type!r} needs `text` and return_tensors='pt'.")
            layout = TokenLayout.from_input_ids(
                batch["input_ids"],
                self.image_token_id,
                self.image_seq_length,
                attention_mask=batch["attention_mask"],
                prompt_mask=batch["attention_mask"].bool(),
                image_ids=batch.get("image_ids"),
                image_block=image_block,
            )
            batch["attention_mask"] = dense_mask(layout, dense_mask_type)
        return batch

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must add its special tokens (a BOS token) to a text that `apply_chat_template` wrote; without them
        `processor(text, add_special_tokens=False)` gives the tokens that `apply_chat_template` gives when it tokenizes."""
        return not self.template_writes_special_tokens and not self._begins_with_bos(text)

    def _begins_with_bos(self, text) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and isinstance(text, str) and text.startswith(bos)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers, but refuses parts of a conversation that would vanish silently.

        Args:
            conversation: a list of messages `{"role", "content"}`, or a list of such lists. The content is a text, or a list of
                `{"type": "text", "text"}` and `{"type": "image"}`, the latter with `image`, `path`, `url` or `base64` where the
                conversation is tokenized too; OpenAI's `image_url` parts are images.
            chat_template (`str`, *optional*): a template in place of the processor's.
            **kwargs: as in transformers; options of `__call__`, such as `padding`, go into `processor_kwargs`.

        Raises:
            ValueError: for an empty conversation and a part that is neither text nor image; and for roles other than system, user and
                assistant, further fields of a message (such as `tool_calls`), `tools` and `documents`, unless the template reads them.
        """
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template) or ""
        for name in ("tools", "documents"):
            if kwargs.get(name) and not _reads(template, name):
                raise ValueError(f"The chat template does not read `{name}`. Leave them out.")
        conversation = getattr(conversation, "messages", conversation)
        if len(conversation) == 0:
            raise ValueError("The conversation is empty: it has no messages.")
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        for messages in conversation if batched else [conversation]:
            for index, message in enumerate(getattr(messages, "messages", messages)):
                if not isinstance(message, dict):  # an object of OpenAI's client, say
                    message = message.model_dump() if hasattr(message, "model_dump") else asdict(message)
                _check_message(message, index, template)
        if self.template_writes_special_tokens and kwargs.get("tokenize"):
            given = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **given}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks counts text by text, then flattens the images and makes them RGB."""
        for name, given in (("videos", videos), ("audio", audio)):
            if given is not None:
                raise ValueError(f"AlignVLM takes images and text, not `{name}`.")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        if texts == []:
            raise ValueError("The batch is empty: `text` is an empty list.")
        flat = _flatten(images)
        if kwargs.get("sanitize_control_tokens"):
            pass  # placeholders that a user typed are marked as text, and transformers counts the others
        elif texts is not None and all(isinstance(sample, str) for sample in texts):
            nested = isinstance(images, (list, tuple)) and any(_holds_images(sample) for sample in images)
            counts = [sample.count(self.image_token) for sample in texts]
            if nested and len(images) == len(texts):
                self._check_counts(counts, [len(_flatten(sample)) for sample in images])
            else:
                self._check_counts([sum(counts)], [len(flat)])
        options = {**(kwargs.get("images_kwargs") or {}), **kwargs}
        rgb_images = [self._open(image, options) for image in flat]
        return rgb_images or None, texts, videos, audio

    def _check_counts(self, placeholders: list[int], images: list[int]) -> None:
        for index, (expected, given) in enumerate(zip(placeholders, images)):
            where = f"text {index}" if len(placeholders) > 1 else "the text"
            found = f"Found {expected} {self.image_token!r} placeholder(s) in {where} but {given} image(s)."
            if expected < given:
                raise ValueError(
                    f"{found} Write {self.image_token!r} once per image, where it belongs in the text, or give messages with "
                    'an {"type": "image"} part per image, which the chat template writes in.'
                )
            if expected > given:
                raise ValueError(
                    f"{found} Give one image per placeholder; if a user typed {self.image_token!r}, remove it from the text "
                    "first."
                )

    def _open(self, image, options: dict) -> Image.Image:
        """Opens an RGB image; reads URLs and base64 strings as transformers does."""
        if isinstance(image, (str, os.PathLike)):
            try:
                image = Image.open(image) if os.path.isfile(image) else self.image_processor.fetch_images(str(image))
            except Exception as error:  # also any exception of the library that fetches URLs
                reason = str(error).replace(str(image), "...")[:500]
                raise ValueError(f"Cannot read the image {str(image)[:200]!r}: {reason}") from error
        if not isinstance(image, Image.Image):
            if not hasattr(image, "__array__"):
                raise ValueError(
                    f"Cannot take a {type(image).__name__} for an image. Give a PIL image, an array, a path, a URL or a base64 "
                    "string."
                )
            if options.get("do_rescale") is False:
                raise ValueError(
                    "do_rescale=False is not for arrays: floating numbers from 0 to 1 are known by their range. Leave it out."
                )
        return to_rgb(image, options.get("input_data_format"))

    def _process_images(self, images, input_data_format=None, **kwargs):
        """As `process_images`, and the text of each image; `input_data_format` was for arrays, which are RGB images by now."""
        image_inputs = self.process_images(images, **kwargs)
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(images))]

    def process_images(self, images: list[Image.Image], **kwargs) -> BatchFeature:
        """Prepares RGB images: `pixel_values` `(tiles of all images, channels, height, width)`, of each image its overview and then its
        tiles, row by row; and, with `max_tiles`, `image_grids` `(images, 2)`, the grid of each (`image_grid`). In native shape they are
        patches, with `spatial_shapes`: see `__call__`. `kwargs` are the image processor's."""
        if self.native_shapes:
            return self._in_native_shape(images, **kwargs)
        batch = self.image_processor(images, **kwargs)
        if self.max_tiles == 1:
            return batch
        grids = [self.image_grid((image.height, image.width)) for image in images]
        tiles = [tile for image, grid in zip(images, grids) for tile in self._cut(image, grid)]
        if tiles:
            # A tile has its size: an image processor that cuts off the margins of images would cut off those of tiles.
            options = self.image_processor.to_dict()
            as_they_are = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if options.get(name)}
            rest = iter(self.image_processor(tiles, **{**kwargs, **as_they_are})["pixel_values"])
            values = [
                value
                for overview, grid in zip(batch["pixel_values"], grids)
                for value in (overview, *(next(rest) for _ in range(tiles_of(grid) - 1)))
            ]
            batch["pixel_values"] = torch.stack(values) if isinstance(values[0], torch.Tensor) else np.stack(values)
        batch["image_grids"] = grids
        return batch

    def _in_native_shape(self, images: list[Image.Image], **kwargs) -> BatchFeature:
        """Resizes each image to the size of its grid; the image processor makes patches. Which of these are padding, the shapes tell."""
        token_size = self.image_processor.patch_size * self.pixel_shuffle_factor
        grids = [self.image_grid((image.height, image.width)) for image in images]
        resized = [
            image.resize((columns * token_size, rows * token_size), int(self.image_processor.resample))
            for image, (rows, columns) in zip(images, grids)
        ]
        batch = self.image_processor(resized, **{**kwargs, "do_resize": False})
        batch.pop("pixel_attention_mask")
        batch["image_grids"] = grids
        return batch

    @cached_property
    def tile_size(self) -> tuple[int, int]:
        """Height and width of a tile, which is what the image processor makes of an image."""
        values = self.image_processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"]
        height, width = np.asarray(values).shape[-2:]
        return height, width

    @property
    def native_shapes(self) -> bool:
        """Whether the image processor makes patches of images in their own shape, as SigLIP 2's for NaFlex does."""
        return "spatial_shapes" in getattr(self.image_processor, "model_input_names", ())

    @property
    def has_grids(self) -> bool:
        """Whether the number of an image's tokens depends on its shape."""
        return self.max_tiles > 1 or self.native_shapes

    def image_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the rows and columns of an image of this height and width: of the tiles it is cut into, `WHOLE` if it is not cut; or,
        in native shape, of its tokens."""
        if self.native_shapes:
            # Here, so that no other checkpoint depends on where transformers keeps it.
            from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

            token_size = self.image_processor.patch_size * self.pixel_shuffle_factor
            most = self.image_processor.max_num_patches // self.pixel_shuffle_factor**2
            height, width = get_image_size_for_max_num_patches(*size, token_size, most)
            return height // token_size, width // token_size
        return best_grid(size, self.tile_size, self.max_tiles) if self.max_tiles > 1 else WHOLE

    def token_count(self, grid: tuple[int, int]) -> int:
        """Returns the number of image tokens of an image of this grid."""
        return grid[0] * grid[1] if self.native_shapes else tiles_of(grid) * self.image_seq_length

    def _cut(self, image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
        """Resizes an image to the size of its grid and cuts it into tiles, row by row; none of an image that is not cut."""
        if grid == WHOLE:
            return []
        (rows, columns), (height, width) = grid, self.tile_size
        resample = getattr(self.image_processor, "resample", None)
        resample = Image.Resampling.BICUBIC if resample is None else int(resample)
        image = image.resize((columns * width, rows * height), resample)
        corners = [(row * height, column * width) for row in range(rows) for column in range(columns)]
        return [image.crop((left, top, left + width, top + height)) for top, left in corners]

    def image_text(self, grid: tuple[int, int]) -> str:
        """Returns what stands for an image of this grid in a text: image tokens of its overview, then of each tile behind its mark."""
        if self.native_shapes:
            return self.image_token * self.token_count(grid)
        tile = self.image_token * self.image_seq_length
        if grid == WHOLE:
            return tile
        marks = [
            TILE_MARK.format(row=row, column=column) if self.tile_marks else ""
            for row in range(1, grid[0] + 1)
            for column in range(1, grid[1] + 1)
        ]
        return tile + "".join(mark + tile for mark in marks)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_text(tuple(image_inputs["image_grids"][image_idx]) if self.has_grids else WHOLE)

    def _image_ids(self, input_ids, grids):
        """Returns the index of each token's image in its row, -1 at text, in the form of `input_ids` `(batch, length)`."""
        rows, grids = (given.tolist() if hasattr(given, "tolist") else given for given in (input_ids, grids))
        lengths = iter(map(self.token_count, grids))
        image_ids = [number_images(row, self.image_token_id, lengths) for row in rows]
        if isinstance(input_ids, torch.Tensor):
            return torch.tensor(image_ids)
        return np.array(image_ids) if isinstance(input_ids, np.ndarray) else image_ids

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Counts the tokens and the rows of `pixel_values` of images of any `(height, width)`, under the name that vLLM asks for."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_grid(tuple(size)) for size in image_sizes]
        texts = [self.image_text(grid) for grid in grids]
        return MultiModalData(
            num_image_tokens=[len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts],
            num_image_patches=[1 if self.native_shapes else tiles_of(grid) for grid in grids],
        )

    def to_dict(self) -> dict:
        """As in transformers; without the options of tiles and native shapes where they are off, as in checkpoints from before there were
        any."""
        off = set() if self.max_tiles > 1 else {"max_tiles", "tile_marks"}
        off |= set() if self.native_shapes else {"pixel_shuffle_factor"}
        return {name: value for name, value in super().to_dict().items() if name not in off}

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, but does not write down how the tokenizer was found on this machine."""
        for key in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(key, None)
        return super().save_pretrained(save_directory, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = [*super().model_input_names, "mm_token_type_ids", *(["image_ids"] if self.has_grids else [])]
        return [name for name in names if name != "pixel_attention_mask"] if self.native_shapes else names


def tiles_of(grid: tuple[int, int]) -> int:
    """Returns how many rows of `pixel_values` an image of this grid has: its overview and its tiles."""
    rows, columns = grid
    return 1 if rows * columns == 1 else 1 + rows * columns


def number_images(input_ids: list[int], image_token_id: int, lengths: Iterator[int]) -> list[int]:
    """Returns the index of each token's image in a row, -1 at text.

    Args:
        lengths: yields the number of image tokens of each image. An image reaches from its first image token to its last: what stands
            between them, the marks of tiles, belongs to it.
    """
    image_ids, places, index, length = [-1] * len(input_ids), [], 0, 0
    for place, token in enumerate(input_ids):
        if token == image_token_id:
            length = length if places else next(lengths, 0)
            places.append(place)
            if len(places) == length:
                image_ids[places[0] : place + 1] = [index] * (place + 1 - places[0])
                places, index = [], index + 1
    return image_ids


def _flatten(images) -> list:
    """Flattens an image, a list, nested lists or arrays of four dimensions into one list of images."""
    if images is None:
        return []
    if _holds_images(images):
        return [image for item in images for image in _flatten(item)]
    return [images]


def _holds_images(value) -> bool:
    """Whether a value is a list of images, or an array of four dimensions, rather than an image."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4


def _reads(template: str, *names: str) -> bool:
    """Whether these names follow each other in a template, behind any signs: `message.tool_calls`, `message['name']`."""
    words = "".join(character if character.isalnum() or character == "_" else " " for character in template).split()
    return f" {' '.join(names)} " in f" {' '.join(words)} "


def _check_message(message: dict, index: int, template: str) -> None:
    """Refuses parts of a message that the template would drop or the model has never seen."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
        raise ValueError(f"Message {index} has the role {role!r}; the chat template knows {', '.join(ROLES)}.")
    further = []
    for name, value in message.items():
        empty = value is None or value is False or (hasattr(value, "__len__") and len(value) == 0)
        if name not in ("role", "content") and not empty:
            further.append(name)
            if not any(_reads(template, *path, name) for path in (("message",), ("message", "get"), ("msg",), ("m",))):
                raise ValueError(
                    f"Message {index} ({role}) has {name!r}, which the chat template does not read. Remove it, or write it into the "
                    "content."
                )
    if content is None and not further:
        raise ValueError(f"Message {index} ({role}) has no content.")
    for part in [] if content is None or isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES:
            given = f"a part of type {kind!r}" if isinstance(part, dict) else f"a {type(part).__name__} as a part"
            raise ValueError(
                f"Message {index} ({role}) has {given}; AlignVLM takes the types {', '.join(PART_TYPES)}. Write it as one of these, or "
                "leave it out."
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(
                f"Message {index} ({role}) has a text part whose 'text' is {part.get('text')!r}, not a string."
            )


__all__ = ["WHOLE", "AlignVLMProcessor", "best_grid", "number_images", "tiles_of", "to_rgb"]
