"""From records to the rows of a batch: shared-image packing, labels and token layout.

A row holds the trunk of a record (what all its conversations begin with: see `trunk_length`) once, and what follows of each as a branch
behind it. Branches see the trunk and themselves, and each branch's positions go on from the trunk's end, so a row trains exactly what
separate sequences would. Mask types under which the trunk looks into the prompt cannot share it: their records become one row per
branch. With a `row_length`, rows of several records fill up to it, for attention kernels that skip what is masked.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from alignvlm.data.images import BadImage, read_image
from alignvlm.data.record import Conversation, Record
from alignvlm.rows.encode import Branch, Encoder, shortened, trunk_length
from modeling_alignvlm import AlignVLMProcessor, TokenLayout, check_no_leak, get_mask_type


IGNORED = -100  # the label of tokens that are not predicted


@dataclass
class Row:
    """One sequence of a batch; the lists have one entry per token."""

    images: list
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    record_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    branch_ids: list[int] = field(default_factory=list)
    prompt_mask: list[bool] = field(default_factory=list)

    def append(self, branch: Branch, number: int, start: int = 0, end: int | None = None) -> None:
        """Adds the tokens from `start` to `end` of a branch, as branch `number` of the row's record (0: its trunk)."""
        end = len(branch) if end is None else end
        labels = [token if trained else IGNORED for token, trained in zip(branch.input_ids, branch.trained)]
        self.input_ids += branch.input_ids[start:end]
        self.labels += labels[start:end]
        self.record_ids += [0] * (end - start)
        self.position_ids += range(start, end)
        self.branch_ids += [number] * (end - start)
        self.prompt_mask += [index < branch.prompt_length for index in range(start, end)]

    def extend(self, other: "Row") -> None:
        """Puts the records of another row behind this one's; they keep their positions and cannot be seen from here."""
        first_record = self.record_ids[-1] + 1
        self.images = [*self.images, *other.images]
        self.record_ids += [first_record + record for record in other.record_ids]
        for name in ("input_ids", "labels", "position_ids", "branch_ids", "prompt_mask"):
            getattr(self, name).extend(getattr(other, name))

    def __len__(self) -> int:
        return len(self.input_ids)


def first_fit(rows: list[Row], row_length: int) -> list[Row]:
    """Puts every row into the first one before it with room for it: rows of at most `row_length` tokens, or of one record."""
    filled: list[Row] = []
    for row in rows:
        place = next((other for other in filled if len(other) + len(row) <= row_length), None)
        if place is None:
            filled.append(row)
        else:
            place.extend(row)
    return filled


class AlignVLMCollator:
    """Turns rows that hold records (see `Record.from_row`) into model inputs.

    Images are whatever `alignvlm.data.images.read_image` reads. Conversations are written with the processor's chat template, as
    `Encoder` says. Only responses (under `train_on: all` every turn of the assistant), with the token that ends them, carry labels. A
    conversation without messages is plain text: no template, and every token but the first has a label.

    Args:
        processor (`AlignVLMProcessor`): with a chat template.
        mask_type (`str`): the mask type the rows are trained under; no row leaves here whose answers would leak.
        max_length (`int`, *optional*):
            the longest row. Branches that do not fit any more are dropped; if none fits, the first whose prompt leaves room
            loses the end of its response, never an image token; a record without such a one is dropped.
        pad_to_multiple_of (`int`, *optional*).
        row_length (`int`, *optional*):
            fill rows of several records up to so many tokens, first fit. The default is one record per row, which suits kernels
            that compute masked places too (`sdpa`, `eager`); `flex_attention` skips them, and gains by less padding.
        shared_image (`bool`): False makes one row per branch under every mask type, as other trainers do.
        on_bad_image (`str`):
            what an image that cannot be read does: `raise`, or `skip` its record.
        name_records (`bool`):
            put the records' names into the batch as `record_names`, a list of strings; the trainer takes them out, and tells them
            where a loss is not finite.

    What is skipped, dropped or cut is told in the batch's `losses_of_data`, a list of
    `{"kind": "bad_row" | "bad_image" | "dropped_record" | "dropped_annotation" | "cut_response", "source", "what"}`, which is there only if there
    is something to tell; the trainer takes it out, counts and records it.
    """

    def __init__(
        self,
        processor: AlignVLMProcessor,
        mask_type: str = "image",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        shared_image: bool = True,
        row_length: int | None = None,
        on_bad_image: str = "raise",
        name_records: bool = False,
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.mask_type = mask_type
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self.row_length = row_length
        self.shared_image = get_mask_type(mask_type).shares_trunk and shared_image
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}: expected 'raise' or 'skip'.")
        self.on_bad_image = on_bad_image
        self.name_records = name_records
        self.encoder = Encoder(processor)

    def rows(self, record: dict, losses: list[dict] | None = None) -> list[Row]:
        """The rows of one record: one, or one per branch where the trunk cannot be shared. What does not fit is told in
        `losses`, if that is given."""
        conversations = Record.from_row(record).conversations
        branches = [branch for conversation in conversations for branch in self.encoder.encode(conversation)]
        losses = [] if losses is None else losses
        before = len(losses)
        groups = [branches] if self.shared_image else [[branch] for branch in branches]
        rows = [row for group in groups if (row := self._row(record["images"], group, losses)) is not None]
        for loss in losses[before:]:
            loss["source"] = record.get("source", "")
        return rows

    def arrange(self, rows: list[Row]) -> list[Row]:
        """The rows of a batch from those of its records."""
        return rows if self.row_length is None else first_fit(rows, self.row_length)

    def token_counts(self, record: dict) -> tuple[int, int]:
        """The image and the text tokens of a record's rows; its images need not be readable."""
        rows = self.rows(record)
        image = sum(len(row.images) for row in rows) * self.processor.image_seq_length
        return image, sum(map(len, rows)) - image

    def _row(self, images: list, branches: list[Branch], losses: list[dict]) -> Row | None:
        branches = self._fitting(branches, losses)
        if not branches:
            return None
        row = Row([])
        trunk = len(branches[0]) if len(branches) == 1 else self._trunk_length(branches)
        row.append(branches[0], 0, end=trunk)
        row.images = images[: self._image_count(branches[0], trunk)]
        if len(branches) > 1:
            for number, branch in enumerate(branches, 1):
                row.append(branch, number, start=trunk)
                row.images = [*row.images, *images[self._image_count(branch, trunk) : self._image_count(branch)]]
        return row

    def _trunk_length(self, branches: list[Branch]) -> int:
        return trunk_length(branches, self.processor.image_token_id, self.processor.image_seq_length)

    @cached_property
    def _up_to_an_image(self) -> int:
        """The tokens up to the end of the image in a conversation that begins with one: what any image needs, whatever else a record
        holds."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        (branch,) = self.encoder.encode(Conversation(messages, ["?"]))
        return branch.input_ids.index(self.processor.image_token_id) + self.processor.image_seq_length

    def _image_count(self, branch: Branch, length: int | None = None) -> int:
        """The images among the first `length` tokens of a branch."""
        return branch.input_ids[:length].count(self.processor.image_token_id) // self.processor.image_seq_length

    def _fitting(self, branches: list[Branch], losses: list[dict]) -> list[Branch]:
        """The branches that fit into `max_length` behind their trunk; else one with the end of its response cut; else none."""
        if self.max_length is None:
            return branches
        image_token, image_length = self.processor.image_token_id, self.processor.image_seq_length
        if image_token in branches[0].input_ids and self.max_length < self._up_to_an_image + 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and a response behind {self._up_to_an_image} tokens up to the "
                "end of an image. Raise max_length."
            )
        used = self._trunk_length(branches)
        trunk, chosen, left_out = used, [], []
        for branch in branches:
            if used + len(branch) - trunk <= self.max_length:
                chosen.append(branch)
                used += len(branch) - trunk
            else:
                left_out.append(branch)
        if not chosen:
            for branch in branches:
                if (cut := shortened(branch, self.max_length, image_token, image_length)) is not None:
                    chosen, left_out = [cut], [other for other in branches if other is not branch]
                    what = f"{branch.response_length} tokens to {cut.response_length}"
                    losses.append({"kind": "cut_response", "what": what})
                    break
            else:
                what = f"{len(branches)} prompts, none of which leaves room for a response"
                losses.append({"kind": "dropped_record", "what": what})
                return []
        for branch in left_out:
            what = f"{branch.prompt_length - trunk} + {branch.response_length} tokens"
            losses.append({"kind": "dropped_annotation", "what": what})
        return chosen

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """Model inputs of all rows: `input_ids`, `attention_mask`, `labels`, `position_ids` and the layout, each
        `(rows, length)` and padded on the right, and `pixel_values` `(images, channels, height, width)` if there are any.
        If every record had to be skipped, there is one row of one token without a label."""
        losses: list[dict] = []
        rows = [row for record in self._readable(records, losses) for row in self.rows(record, losses)]
        if not rows:
            rows = [Row([])]
            rows[0].append(Branch((self._pad_token_id,), (False,), prompt_length=1), 0)
        rows = self.arrange(rows)
        length = max(map(len, rows))
        length += -length % self.pad_to_multiple_of

        def padded(name: str, value: int | bool) -> torch.Tensor:
            return torch.tensor([getattr(row, name) + [value] * (length - len(row)) for row in rows])

        record_ids = padded("record_ids", -1)
        batch = {
            "input_ids": padded("input_ids", self._pad_token_id),
            "attention_mask": (record_ids >= 0).long(),
            "labels": padded("labels", IGNORED),
            "position_ids": padded("position_ids", 0),
            "record_ids": record_ids,
            "branch_ids": padded("branch_ids", 0),
            "prompt_mask": padded("prompt_mask", False),
        }
        check_no_leak(
            TokenLayout.from_input_ids(
                batch["input_ids"],
                self.processor.image_token_id,
                self.processor.image_seq_length,
                record_ids=batch["record_ids"],
                branch_ids=batch["branch_ids"],
                prompt_mask=batch["prompt_mask"],
            ),
            self.mask_type,
            response_mask=batch["labels"] != IGNORED,
        )
        images = [image for row in rows for image in row.images]
        if images:
            pixel_values = self.processor.image_processor(images, return_tensors="np")["pixel_values"]
            batch["pixel_values"] = torch.from_numpy(np.asarray(pixel_values))
        if losses:
            batch["losses_of_data"] = losses
        if self.name_records:
            batch["record_names"] = [_name(record) for record in records]
        return batch

    @property
    def _pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _readable(self, records: list[dict], losses: list[dict]) -> list[dict]:
        """The records with their images decoded, without those that cannot be."""
        readable = []
        for record in records:
            if record.get("bad_row"):  # of a stream, which cannot be checked before it is read
                losses.append({"kind": "bad_row", "source": record.get("source", ""), "what": record["bad_row"]})
                continue
            try:
                readable.append({**record, "images": [read_image(image) for image in record["images"]]})
            except BadImage as error:
                if self.on_bad_image == "raise":
                    raise BadImage(f"{error} Replace it, or set `on_bad_image: skip`.") from error
                losses.append({"kind": "bad_image", "source": record.get("source", ""), "what": str(error)})
        return readable


def _name(record: dict) -> str:
    """What a message calls a record: its number in its source, and how its first response begins."""
    name = f"{record.get('source') or 'record'}{record.get('number') or ''}"
    if record.get("bad_row"):
        return name
    return f"{name} ({Record.from_row(record).conversations[0].responses[0][:40]!r})"
