"""Makes a batch of records: encodes conversations, packs them into rows and pads them; decodes and prepares images.

Mask types whose trunk sees the prompt cannot share the trunk: their records become one row per branch. With a `row_length`, several
records fill a row up to it, for attention kernels that skip masked positions.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignvlm.data.images import BadImage, image_hash, read_image
from alignvlm.data.record import Record
from alignvlm.rows.encode import Encoder
from alignvlm.rows.features import FeatureStore
from alignvlm.rows.packing import IGNORED, Packer, Row
from modeling_alignvlm import AlignVLMProcessor, TokenLayout, check_no_leak, get_mask_type


@dataclass
class KeptImage:
    """An undecoded image whose features are kept under `key`."""

    image: Any
    key: str


class AlignVLMCollator:
    """Turns rows that hold records (see `Record.from_row`) into model inputs.

    Images may be anything that `alignvlm.data.images.read_image` reads. Conversations are written with the processor's chat template, as
    `Encoder` says. Only responses (under `train_on: all` every turn of the assistant) have labels, including the token that ends them. A
    conversation without messages is plain text: it has no template, and every token but the first has a label.

    Args:
        processor (`AlignVLMProcessor`): with a chat template.
        mask_type (`str` or `list[str]`): the mask types of training; a row whose answers would leak under any of them is refused.
        max_length (`int`, *optional*):
            the longest row of a record. Branches that do not fit are dropped. If none fits, the first branch whose prompt leaves room
            is kept with its response cut, never an image. A record without such a branch is dropped.
        pad_to_multiple_of (`int`, *optional*).
        row_length (`int`, *optional*):
            fill rows with several records up to this number of tokens, first fit. The default of one record per row suits kernels
            that compute masked positions too (`sdpa`, `eager`). `flex_attention` skips them and gains from less padding.
        shared_image (`bool`): False makes one row per branch under every mask type, as other trainers do.
        on_bad_image (`str`):
            what to do with an image that cannot be read: `raise`, or `skip` its record.
        name_records (`bool`):
            put the records' names into the batch as `record_names`, a list of strings. The trainer takes them out and reports them
            if a loss is not finite.

    The batch's `losses_of_data` lists dropped data, if there is any: mappings of `"kind"` (`bad_row`, `bad_image`,
    `dropped_record`, `dropped_annotation` or `cut_response`), `"source"` and `"what"`. The trainer takes the list out, counts and records it.

    After `keep_features`, a batch has `image_features` instead of `pixel_values` where the features of all its images are kept.
    """

    def __init__(
        self,
        processor: AlignVLMProcessor,
        mask_type: str | list[str] = "image",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        shared_image: bool = True,
        row_length: int | None = None,
        on_bad_image: str = "raise",
        name_records: bool = False,
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.mask_types = [mask_type] if isinstance(mask_type, str) else mask_type
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}: expected 'raise' or 'skip'.")
        self.on_bad_image = on_bad_image
        self.name_records = name_records
        self.encoder = Encoder(processor)
        shares_trunk = all(get_mask_type(name).shares_trunk for name in self.mask_types) and shared_image
        self.packer = Packer(self.encoder, max_length, row_length, shares_trunk)
        self.features: FeatureStore | None = None
        self.sizes: Set[int] = frozenset()

    def keep_features(self, features: FeatureStore | None, sizes: Set[int] = frozenset()) -> None:
        """Takes features from a store in batches of these numbers of images; None: from now on in none."""
        self.features, self.sizes = features, sizes

    def rows(self, record: dict, dropped: list[dict] | None = None) -> list[Row]:
        """Makes the rows of one record: one, or one per branch where the trunk cannot be shared. Adds dropped data to `dropped`."""
        conversations = Record.from_row(record).conversations
        branches = [branch for conversation in conversations for branch in self.encoder.encode(conversation)]
        own: list[dict] = []
        rows = self.packer.rows(record["images"], branches, own)
        if dropped is not None:
            dropped += ({**loss, "source": record.get("source", "")} for loss in own)
        return rows

    def token_counts(self, record: dict) -> tuple[int, int]:
        """Counts the image and the text tokens of a record's rows; its images need not be readable."""
        rows = self.rows(record)
        image = sum(len(row.images) for row in rows) * self.processor.image_seq_length
        return image, sum(map(len, rows)) - image

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """Returns the model inputs of all rows: `input_ids`, `attention_mask`, `labels`, `position_ids` and the layout, each
        `(rows, length)` and padded on the right, and `pixel_values` `(images, channels, height, width)` if there are images (or
        `image_features` `(images, positions, vision_hidden)`).
        If every record is skipped, there is one row of one token without a label."""
        dropped: list[dict] = []
        rows = [row for record in self._readable(records, dropped) for row in self.rows(record, dropped)]
        rows = self.packer.arranged(rows)
        length = max(map(len, rows))
        length += -length % self.pad_to_multiple_of

        def padded(name: str, value: int | bool) -> torch.Tensor:
            return torch.tensor([getattr(row, name) + [value] * (length - len(row)) for row in rows])

        record_ids = padded("record_ids", -1)
        batch = {
            "input_ids": padded("input_ids", self.packer.pad_token_id),
            "attention_mask": (record_ids >= 0).long(),
            "labels": padded("labels", IGNORED),
            "position_ids": padded("position_ids", 0),
            "record_ids": record_ids,
            "branch_ids": padded("branch_ids", 0),
            "prompt_mask": padded("prompt_mask", False),
        }
        layout = TokenLayout.from_input_ids(
            batch["input_ids"],
            self.processor.image_token_id,
            self.processor.image_seq_length,
            record_ids=batch["record_ids"],
            branch_ids=batch["branch_ids"],
            prompt_mask=batch["prompt_mask"],
        )
        for mask_type in self.mask_types:
            check_no_leak(layout, mask_type, response_mask=batch["labels"] != IGNORED)
        images = [image for row in rows for image in row.images]
        if images:
            batch |= self._image_inputs(images)
        if dropped:
            batch["losses_of_data"] = dropped
        if self.name_records:
            batch["record_names"] = [_name(record) for record in records]
        return batch

    def pixel_values(self, images: list) -> Tensor:
        """Prepares decoded images as the vision encoder wants them: `(images, channels, height, width)`."""
        return torch.from_numpy(
            np.asarray(self.processor.image_processor(images, return_tensors="np")["pixel_values"])
        )

    def _image_inputs(self, images: list) -> dict[str, Tensor]:
        """Returns the kept features of a batch's images if all of them have some, else their pixel values."""
        if len(images) in self.sizes and all(isinstance(image, KeptImage) for image in images):
            return {"image_features": self.features.stacked([image.key for image in images])}
        decoded = [read_image(image.image) if isinstance(image, KeptImage) else image for image in images]
        return {"pixel_values": self.pixel_values(decoded)}

    def _read(self, image: Any) -> Any:
        """Decodes an image, unless its features are kept."""
        if self.features is not None and (key := image_hash(image)) in self.features:
            return KeptImage(image, key)
        return read_image(image)

    def _readable(self, records: list[dict], dropped: list[dict]) -> list[dict]:
        """Returns the records with their images decoded or known to be kept, without records whose images cannot be read."""
        readable = []
        for record in records:
            if record.get("bad_row"):  # a stream cannot be checked before it is read
                dropped.append({"kind": "bad_row", "source": record.get("source", ""), "what": record["bad_row"]})
                continue
            try:
                readable.append({**record, "images": [self._read(image) for image in record["images"]]})
            except BadImage as error:
                if self.on_bad_image == "raise":
                    raise BadImage(f"{error} Replace it, or set `on_bad_image: skip`.") from error
                dropped.append({"kind": "bad_image", "source": record.get("source", ""), "what": str(error)})
        return readable


def _name(record: dict) -> str:
    """Returns a record's name in messages: its source, its number there, and the beginning of its first response."""
    name = f"{record.get('source') or 'record'}{record.get('number') or ''}"
    if record.get("bad_row"):
        return name
    return f"{name} ({Record.from_row(record).conversations[0].responses[0][:40]!r})"
