"""Makes a batch of records: encodes conversations, packs them into rows and pads them; decodes and prepares images.

Mask types whose trunk sees the prompt cannot share the trunk: their records become one row per branch. Several records may share a row:
those that `alignvlm/rows/filling.py` has put together, or, with a `row_length`, those of a batch that fit.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignvlm.data.images import BadImage, image_hash, read_image
from alignvlm.data.record import Record
from alignvlm.rows.encode import Encoder
from alignvlm.rows.features import FeatureStore
from alignvlm.rows.packing import IGNORED, Packer, Row, joined
from alignvlm.rows.tiles import grids_of, has_grids, image_inputs_of, takes_native_shapes
from modeling_alignvlm import AlignVLMProcessor, TokenLayout, check_no_leak, get_mask_type


@dataclass
class KeptImage:
    """An undecoded image whose features are kept under `key`."""

    image: Any
    key: str


@dataclass
class LeftOut:
    """How much of records `max_length` leaves out; as text, a sentence, which is empty if nothing is.

    Args:
        max_length: as of the collator.
    """

    max_length: int | None
    records: int = 0
    annotations: int = 0
    lost: int = 0  # annotations
    cut: int = 0  # responses

    def note(self, record: dict, losses: list[dict]) -> None:
        """Counts a record, and what `AlignVLMCollator.rows` dropped of it."""
        own = sum(len(conversation["responses"]) for conversation in record["conversations"])
        kinds = [loss["kind"] for loss in losses]
        self.records, self.annotations = self.records + 1, self.annotations + own
        self.lost += own if "dropped_record" in kinds else kinds.count("dropped_annotation")
        self.cut += kinds.count("cut_response")

    def __str__(self) -> str:
        if not self.lost + self.cut:
            return ""
        cuts = f", and cuts {self.cut:,} responses" if self.cut else ""
        return (
            f"max_length={self.max_length} leaves out {self.lost:,} of the {self.annotations:,} annotations of {self.records:,} "
            f"records{cuts}"
        )


class AlignVLMCollator:
    """Turns rows that hold records (see `Record.from_row`) into model inputs.

    Images may be anything that `alignvlm.data.images.read_image` reads. Conversations are written with the processor's chat template, as
    `Encoder` says. Only responses (under `train_on: all` every turn of the assistant) have labels, including the token that ends them. A
    conversation without messages is plain text: it has no template, and every token but the first has a label.

    Args:
        processor (`AlignVLMProcessor`): with a chat template.
        mask_type (`str` or `list[str]`): the mask types of training; a row whose answers would leak under any of them is refused.
        max_length (`int`, *optional*):
            the longest row of a record. Branches for which there is no room make further rows of the same images. A branch that is longer
            by itself has its response cut, never an image; if its prompt leaves no room for a response, it is dropped.
        pad_to_multiple_of (`int`, *optional*).
        row_length (`int`, *optional*):
            join the rows of a batch to rows of at most this number of tokens, best fit. A stage's `row_length` does better: it chooses
            from many records, and its batches hold filled rows.
        shared_image (`bool`): False makes one row per branch under every mask type, as other trainers do.
        on_bad_image (`str`):
            what to do with an image that cannot be read: `raise`, or `skip` its record.
        name_records (`bool`):
            put the records' names into the batch as `record_names`, a list of strings, and how many records begin in it as
            `records_read`. The trainer takes them out, reports the names if a loss is not finite, and counts.

    The batch's `losses_of_data` lists dropped data, if there is any: mappings of `"kind"` (`bad_row`, `bad_image`,
    `dropped_record`, `dropped_annotation` or `cut_response`), `"source"` and `"what"`. The trainer takes the list out, counts and records it.

    Where the processor cuts images into tiles, the batch has `image_ids`, and `pixel_values` hold the tiles of all images in order. Where it
    takes them in native shape, the batch has `image_ids` and `spatial_shapes`.

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
        """Makes the rows of one record: one, more where it is longer than `max_length`, or one per branch where the trunk cannot be
        shared; of a record with a `piece`, that one of them. Adds dropped data to `dropped`, with the first."""
        conversations = Record.from_row(record).conversations
        grids = grids_of(self.processor, record["images"])
        branches = [branch for conversation in conversations for branch in self.encoder.encode(conversation, grids)]
        own: list[dict] = []
        rows = self.packer.rows(record["images"], branches, own)
        piece = record.get("piece")
        if dropped is not None and not piece:
            dropped += ({**loss, "source": record.get("source", "")} for loss in own)
        return rows if piece is None else rows[piece : piece + 1]

    def token_counts(self, record: dict, left_out: LeftOut | None = None) -> tuple[int, int]:
        """Counts the image and the text tokens of a record's rows; its images need not be readable. Marks between tiles are text.

        Args:
            left_out: notes what the record loses.
        """
        losses: list[dict] = []
        rows = self.rows(record, losses)
        if left_out is not None:
            left_out.note(record, losses)
        image = sum(row.input_ids.count(self.processor.image_token_id) for row in rows)
        return image, sum(map(len, rows)) - image

    def tile_count(self, row: Row) -> int:
        """Counts what the encoder encodes for a row: its images, or their tiles."""
        if takes_native_shapes(self.processor):
            return len(row.images)
        return row.input_ids.count(self.processor.image_token_id) // self.processor.image_seq_length

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Args:
            examples: records, or filled rows of records (see `alignvlm/rows/filling.py`). One with a true `repeated` has no labels
                (see `alignvlm/stages/held_out.py`).

        Returns:
            the model inputs of all rows: `input_ids`, `attention_mask`, `labels`, `position_ids` and the layout, each
            `(rows, length)` and padded on the right, and `pixel_values` `(images, channels, height, width)` if there are images (or
            `image_features` `(images, positions, vision_hidden)`). If every record is skipped, there is one row of one token without
            a label.
        """
        dropped: list[dict] = []
        rows: list[Row] = []
        for example in examples:
            found = [
                row for record in self._readable(records_of(example), dropped) for row in self.rows(record, dropped)
            ]
            for row in found:
                self._check_no_leak(row)
                if example.get("repeated"):
                    row.labels = [IGNORED] * len(row)
            rows += [joined(found)] if "records" in example and found else found
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
        if has_grids(self.processor):
            batch["image_ids"] = padded("image_ids", -1)
        images = [image for row in rows for image in row.images]
        if images:
            batch |= self._image_inputs(images)
        if dropped:
            batch["losses_of_data"] = dropped
        if self.name_records:
            records = [record for example in examples for record in records_of(example)]
            batch["record_names"] = [_name(record) for record in records]
            batch["records_read"] = sum(not record.get("piece") for record in records)
        return batch

    def _check_no_leak(self, row: Row) -> None:
        """Raises a `ValueError` if an answer of the row of a record could reach its own prediction. Joined rows do not see each other, so
        that none need be checked again; the check takes the square of a row's length."""
        layout = TokenLayout.from_input_ids(
            torch.tensor([row.input_ids]),
            self.processor.image_token_id,
            self.processor.image_seq_length,
            record_ids=torch.tensor([row.record_ids]),
            branch_ids=torch.tensor([row.branch_ids]),
            prompt_mask=torch.tensor([row.prompt_mask]),
            image_ids=torch.tensor([row.image_ids]) if has_grids(self.processor) else None,
        )
        for mask_type in self.mask_types:
            check_no_leak(layout, mask_type, response_mask=torch.tensor([row.labels]) != IGNORED)

    def pixel_values(self, images: list) -> Tensor:
        """Prepares decoded images as the vision encoder wants them: `(images, channels, height, width)`."""
        return image_inputs_of(self.processor, images)["pixel_values"]

    def _image_inputs(self, images: list) -> dict[str, Tensor]:
        """Returns the kept features of a batch's images if all of them have some, else their pixel values."""
        if len(images) in self.sizes and all(isinstance(image, KeptImage) for image in images):
            return {"image_features": self.features.stacked([image.key for image in images])}
        decoded = [read_image(image.image) if isinstance(image, KeptImage) else image for image in images]
        return image_inputs_of(self.processor, decoded)

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
                if not record.get("piece"):
                    dropped.append({"kind": "bad_image", "source": record.get("source", ""), "what": str(error)})
        return readable


def records_of(example: dict) -> list[dict]:
    """Returns the records of a filled row, or the one record that an example is."""
    return example.get("records", [example])


def count_images(batch: dict[str, Tensor]) -> int:
    """Counts the images of a batch's rows, each once where it is cut into tiles."""
    if "image_ids" in batch:
        return int((batch["image_ids"].amax(-1) + 1).sum())
    return sum(len(batch[name]) for name in ("pixel_values", "image_features") if name in batch)


def _name(record: dict) -> str:
    """Returns a record's name in messages: its source, its number there, and the beginning of its first response."""
    name = f"{record.get('source') or 'record'}{record.get('number') or ''}"
    if record.get("bad_row"):
        return name
    return f"{name} ({Record.from_row(record).conversations[0].responses[0][:40]!r})"
