"""From records to the rows of a batch: shared-image packing, labels and token layout.

A row holds the trunk of a record (all up to its last image token) once, and each annotation as a branch behind it. Branches
see the trunk and themselves, and each branch's positions go on from the trunk's end, so a row trains exactly what separate
sequences would. Mask types under which the trunk looks into the prompt cannot share it: their records become one row per
annotation. With a `row_length`, rows of several records fill up to it, for attention kernels that skip what is masked.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from alignvlm.data.images import BadImage, read_image
from modeling_alignvlm import AlignVLMProcessor, TokenLayout, check_no_leak


SHARED_TRUNK_MASK_TYPES = ("causal", "image")
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

    def append(self, input_ids: list[int], branch: int, first_position: int, response_length: int = 0) -> None:
        """Adds tokens whose last `response_length` are a response; a branch's first token has nothing to be predicted from."""
        prompt_length = len(input_ids) - response_length
        labels = [IGNORED] * prompt_length + input_ids[prompt_length:]
        if labels:
            labels[0] = IGNORED
        self.input_ids += input_ids
        self.labels += labels
        self.record_ids += [0] * len(input_ids)
        self.position_ids += range(first_position, first_position + len(input_ids))
        self.branch_ids += [branch] * len(input_ids)
        self.prompt_mask += [True] * prompt_length + [False] * response_length

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
    """Turns records `{"images": [...], "annotations": [{"prompt", "response"}]}` into model inputs.

    Images are whatever `alignvlm.data.images.read_image` reads. Prompts and responses are written with the processor's chat template and
    tokenised apart, so that a prompt has the very tokens it has at inference. Only responses, with the token that ends them, carry
    labels. A record without images and with an empty prompt is plain text: no template, and every token but the first has a label.

    Args:
        processor (`AlignVLMProcessor`): with a chat template.
        mask_type (`str`): the mask type the rows are trained under; no row leaves here whose answers would leak.
        max_length (`int`, *optional*):
            the longest row. Annotations that do not fit any more are dropped; if none fits, the first whose prompt leaves room
            loses the end of its response, never an image token; a record without such a one is dropped.
        pad_to_multiple_of (`int`, *optional*).
        row_length (`int`, *optional*):
            fill rows of several records up to so many tokens, first fit. The default is one record per row, which suits kernels
            that compute masked places too (`sdpa`, `eager`); `flex_attention` skips them, and gains by less padding.
        shared_image (`bool`): False makes one row per annotation under every mask type, as other trainers do.
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
        self.shared_image = shared_image and mask_type in SHARED_TRUNK_MASK_TYPES
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}: expected 'raise' or 'skip'.")
        self.on_bad_image = on_bad_image
        self.name_records = name_records
        self._remember_texts()
        if processor.chat_template is None:
            raise ValueError(
                "The processor has no chat template, so prompts and responses cannot be written. Set one."
            )

    def _remember_texts(self) -> None:
        self._encode = lru_cache(maxsize=100_000)(
            self._encode_texts
        )  # questions and short answers come again and again

    def __getstate__(self) -> dict:
        """Without what was remembered, which cannot be sent to a data worker that is not forked."""
        return {name: value for name, value in vars(self).items() if name != "_encode"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._remember_texts()

    def encode(self, annotation: dict[str, str], image_count: int) -> tuple[list[int], list[int]]:
        """The token ids of one annotation's prompt (one image token per image, not yet expanded) and of its response.

        Raises:
            ValueError: if a text holds the image placeholder, which would stand for an image nobody gave.
        """
        prompt, response = self._encode(annotation["prompt"], annotation["response"], image_count)
        return list(prompt), list(response)

    def _encode_texts(self, prompt: str, response: str, image_count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for text in (prompt, response):
            if self.processor.image_token in text:
                raise ValueError(
                    f"The text {text!r} holds the placeholder {self.processor.image_token!r}. Remove it from the data."
                )
        if not image_count and not prompt:
            eos = self.tokenizer.eos_token_id
            return (), (*self.tokenizer(response)["input_ids"], *([] if eos is None else [eos]))
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        response = self.processor.apply_chat_template(messages)[len(prompt) :].rstrip("\n")
        return (
            tuple(self.tokenizer(prompt)["input_ids"]),
            tuple(self.tokenizer(response, add_special_tokens=False)["input_ids"]),
        )

    def rows(self, record: dict, losses: list[dict] | None = None) -> list[Row]:
        """The rows of one record: one, or one per annotation where the trunk cannot be shared. What does not fit is told in
        `losses`, if that is given."""
        if not record["annotations"]:
            raise ValueError("A record has no annotations; it would train nothing. Remove it from the data.")
        encoded = [self.encode(annotation, len(record["images"])) for annotation in record["annotations"]]
        losses = [] if losses is None else losses
        before = len(losses)
        groups = [encoded] if self.shared_image else [[one] for one in encoded]
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

    def _row(self, images: list, encoded: list[tuple[list[int], list[int]]], losses: list[dict]) -> Row | None:
        row = Row(images)
        trunk, _ = self._split(encoded[0][0], len(images))
        row.append(trunk, branch=0, first_position=0)
        single = len(encoded) == 1  # then all of it is trunk
        branches = [
            (index, self._split(prompt, len(images))[1], response)
            for index, (prompt, response) in enumerate(encoded, 1)
        ]
        chosen = self._fitting(branches, len(trunk), losses)
        for index, prompt, response in chosen:
            row.append(prompt + response, 0 if single else index, len(trunk), len(response))
        return row if chosen else None

    def _fitting(self, branches: list[tuple], trunk_length: int, losses: list[dict]) -> list[tuple]:
        """The branches that fit into `max_length` behind the trunk; else one with the end of its response cut; else none."""
        if self.max_length is None:
            return branches
        room = self.max_length - trunk_length
        if room < 2 and trunk_length > 0:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and a response behind {trunk_length} tokens up to the last "
                "image. Raise max_length."
            )
        chosen, used = [], 0
        for branch in branches:
            length = len(branch[1]) + len(branch[2])
            if used + length <= room:
                chosen.append(branch)
                used += length
        if not chosen:
            cuttable = next((branch for branch in branches if len(branch[1]) < room), None)
            if cuttable is None:
                losses.append(
                    {
                        "kind": "dropped_record",
                        "what": f"{len(branches)} prompts, none of which leaves room for a response",
                    }
                )
                return []
            index, prompt, response = cuttable
            chosen = [(index, prompt, response[: room - len(prompt)])]
            losses.append({"kind": "cut_response", "what": f"{len(response)} tokens to {room - len(prompt)}"})
        for index, prompt, response in branches:
            if index not in [branch[0] for branch in chosen]:
                losses.append({"kind": "dropped_annotation", "what": f"{len(prompt)} + {len(response)} tokens"})
        return chosen

    def _split(self, prompt: list[int], image_count: int) -> tuple[list[int], list[int]]:
        """A prompt's trunk, up to its last image token, with images expanded, and the rest."""
        image_token = self.processor.image_token_id
        places = [i for i, token in enumerate(prompt) if token == image_token]
        if len(places) != image_count:
            raise ValueError(f"The chat template wrote {len(places)} image placeholders for {image_count} image(s).")
        split = places[-1] + 1 if places else 0
        trunk = []
        for token in prompt[:split]:
            trunk += [token] * (self.processor.image_seq_length if token == image_token else 1)
        return trunk, prompt[split:]

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """Model inputs of all rows: `input_ids`, `attention_mask`, `labels`, `position_ids` and the layout, each
        `(rows, length)` and padded on the right, and `pixel_values` `(images, channels, height, width)` if there are any.
        If every record had to be skipped, there is one row of one token without a label."""
        losses: list[dict] = []
        rows = [row for record in self._readable(records, losses) for row in self.rows(record, losses)]
        if not rows:
            rows = [Row([])]
            rows[0].append([self._pad_token_id], branch=0, first_position=0)
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
    text = record["annotations"][0]["response"] if record["annotations"] else ""
    return f"{record.get('source', 'record')}{record.get('number', '')} ({text[:40]!r})"
