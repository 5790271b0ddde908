"""The AlignVLM processor: pictures and texts in, the model's inputs out.

Every image placeholder in a text becomes `image_seq_length` image tokens; every picture, whatever its mode or orientation,
becomes RGB and then pixel values. On request the processor also returns the dense attention mask the model would build.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin

from .masking_alignvlm import TokenLayout, dense_mask


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image of any PIL image.

    The EXIF rotation is applied, transparency is laid on white, 16 and 32 bit grey values are scaled to 8 bit, and of an
    animation the current frame is taken.

    Raises:
        ValueError: if the picture cannot be decoded (truncated or corrupt).
    """
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.nan_to_num(np.asarray(image, dtype=np.float32))
            if image.mode == "F":
                values = values * (255 if values.max() <= 1 else 1)
            else:
                values = values / (257 if values.max() > 255 else 1)
            return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(image, "filename", "") or "an image in memory"
        raise ValueError(f"Cannot decode {name}: {error}. The file is damaged; replace it or leave it out.") from error


class AlignVLMProcessor(ProcessorMixin):
    """Wraps an image processor and a tokenizer into one.

    Args:
        image_processor: the vision encoder's image processor.
        tokenizer: the language model's tokenizer; it must know `image_token` as one token.
        image_seq_length (`int`): image tokens per image, `AlignVLMConfig.image_seq_length`.
        image_token (`str`): the placeholder for one image in a text.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
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
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know the image token {image_token!r}. Add it as a special token."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, dense_mask_type: str | None = None, **kwargs) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: a picture, a list of them (in the order of the placeholders), or one list per text; a picture is a PIL
                image, an array, a path, a URL or a base64 string.
            text (`str` or `list[str]`): with one `image_token` per image.
            dense_mask_type (`str`, *optional*):
                return `attention_mask` as the dense bool mask `(batch, 1, length, length)` of this mask type, with the
                whole text counted as prompt. Needs `return_tensors="pt"`, and padding in batches of unequal lengths.
            **kwargs: for tokenizer and image processor, such as `padding`, `padding_side`, `return_tensors`.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at image tokens) of shape `(batch, length)`, and
            `pixel_values` `(images, channels, height, width)` with the images of all texts in order.

        Raises:
            ValueError: for an empty batch, an unreadable image, or other than one image per placeholder.
        """
        batch = super().__call__(images=images, text=text, **kwargs)
        if dense_mask_type is not None:
            if not isinstance(batch.get("input_ids"), torch.Tensor):
                raise ValueError(f"dense_mask_type={dense_mask_type!r} needs `text` and return_tensors='pt'.")
            layout = TokenLayout.from_input_ids(
                batch["input_ids"],
                self.image_token_id,
                self.image_seq_length,
                attention_mask=batch["attention_mask"],
                prompt_mask=batch["attention_mask"].bool(),
            )
            batch["attention_mask"] = dense_mask(layout, dense_mask_type)
        return batch

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks counts text by text, then flattens the images and makes them RGB."""
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        if texts == []:
            raise ValueError("The batch is empty: `text` is an empty list.")
        if texts is not None and all(isinstance(sample, str) for sample in texts):
            nested = isinstance(images, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in images)
            counts = [sample.count(self.image_token) for sample in texts]
            if nested and len(images) == len(texts):
                self._check_counts(counts, [len(sample) for sample in images])
            else:
                self._check_counts([sum(counts)], [len(_flatten(images))])
        pictures = [self._open(image) for image in _flatten(images)]
        return pictures or None, texts, videos, audio

    def _check_counts(self, placeholders: list[int], images: list[int]) -> None:
        for index, (expected, given) in enumerate(zip(placeholders, images)):
            if expected != given:
                where = f"text {index}" if len(placeholders) > 1 else "the text"
                raise ValueError(
                    f"Found {expected} {self.image_token!r} placeholder(s) in {where} but {given} image(s). Give one image per "
                    f"placeholder; if a user typed {self.image_token!r}, remove it from the text first."
                )

    def _open(self, image):
        """A picture as the image processor wants it; URLs and base64 strings are read the way transformers reads them."""
        if isinstance(image, (str, os.PathLike)):
            try:
                image = Image.open(image) if os.path.isfile(image) else self.image_processor.fetch_images(str(image))
            except (OSError, ValueError, UnidentifiedImageError) as error:
                raise ValueError(f"Cannot read the image {str(image)[:200]!r}: {error}") from error
        return to_rgb(image) if isinstance(image, Image.Image) else image

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, but how the tokenizer was found on this machine is not written down."""
        for key in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(key, None)
        return super().save_pretrained(save_directory, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]


def _flatten(images) -> list:
    """One flat list of pictures, from a picture, a list, or nested lists."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flatten(item)]
    return [images]


__all__ = ["AlignVLMProcessor", "to_rgb"]
