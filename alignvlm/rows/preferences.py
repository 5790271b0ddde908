"""Makes a batch of preferences: prompts with a better and a worse answer each, as TRL's `DPOTrainer` takes them."""

from dataclasses import replace
from typing import Any

import torch

from alignvlm.data.record import Conversation
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Branch
from modeling_alignvlm import TokenLayout, check_no_leak


class PreferenceCollator:
    """Turns examples into rows, padded on the right: first every prompt with its chosen answer, then every one with its rejected answer.

    TRL's own collator would tokenize prompts and answers otherwise than the other stages and the model at inference, and knows no mask.

    Args:
        collator (`AlignVLMCollator`): encodes conversations and prepares images.
        max_length (`int`, *optional*): the longest row; answers are cut.
    """

    def __init__(self, collator: AlignVLMCollator, max_length: int | None = None):
        self.collator, self.max_length = collator, max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes the model inputs of examples with `conversation` (a mapping of the fields of `Conversation`), `chosen`, `rejected`, `images`
        (decoded) and `id`.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, `prompt_mask` and `completion_mask` (1 at the answers) of shape `(rows, length)`;
            `pixel_values` `(images, channels, height, width)`, if there are images; `record_names`; `losses_of_data`, the answers that
            were cut, if there are any, as `AlignVLMCollator` lists them.

        Raises:
            ValueError: for a prompt that leaves no room for an answer.
        """
        dropped: list[dict] = []
        rows = [self._branch(example, name, dropped) for name in ("chosen", "rejected") for example in examples]
        length = max(map(len, rows))
        pad = self.collator.packer.pad_token_id

        def padded(values: list[list], value: int) -> torch.Tensor:
            return torch.tensor([own + [value] * (length - len(own)) for own in values])

        answers = [row.trained for row in rows]
        batch = {
            "input_ids": padded([list(row.input_ids) for row in rows], pad),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "position_ids": padded([list(range(len(row))) for row in rows], 0),
            "prompt_mask": padded([[index < row.prompt_length for index in range(len(row))] for row in rows], False),
            "completion_mask": padded([list(map(int, trained)) for trained in answers], 0),
        }
        processor = self.collator.processor
        layout = TokenLayout.from_input_ids(
            batch["input_ids"],
            processor.image_token_id,
            processor.image_seq_length,
            attention_mask=batch["attention_mask"],
            prompt_mask=batch["prompt_mask"],
        )
        for mask_type in self.collator.mask_types:
            check_no_leak(layout, mask_type, response_mask=batch["completion_mask"].bool())
        images = [image for example in examples for image in example["images"]]
        if images:
            batch["pixel_values"] = self.collator.pixel_values(images).repeat(2, 1, 1, 1)
        batch["record_names"] = [example["id"] for example in examples]
        if dropped:
            batch["losses_of_data"] = dropped
        return batch

    def _branch(self, example: dict[str, Any], name: str, dropped: list[dict]) -> Branch:
        """Encodes the prompt with one of its answers; adds to `dropped` if the answer is cut."""
        said = Conversation(**example["conversation"])
        (branch,) = self.collator.encoder.encode(replace(said, responses=[example[name]], train_on="last"))
        if self.max_length is None or len(branch) <= self.max_length:
            return branch
        if branch.prompt_length >= self.max_length:
            raise ValueError(
                f"{example['id']}: its prompt has {branch.prompt_length} tokens, and max_length={self.max_length} leaves no room for an "
                "answer. Raise it, or remove the record."
            )
        what = f"{branch.response_length} tokens to {self.max_length - branch.prompt_length}"
        dropped.append({"kind": "cut_response", "source": example["id"], "what": what})
        return replace(
            branch, input_ids=branch.input_ids[: self.max_length], trained=branch.trained[: self.max_length]
        )
