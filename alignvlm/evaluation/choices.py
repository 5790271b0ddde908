"""Measures how likely a model finds each choice of multiple-choice questions.

A record's questions with all their choices are one row, as in training: its images and the tokens that questions share are computed once.
Under masks that let images see the prompt, each choice is a row of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from alignvlm.data.record import Conversation, Record
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import IGNORED


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    conversations: Sequence[Conversation],
) -> list[list[dict]]:
    """Returns for each conversation and each of its choices how likely the choice is as the answer.

    Args:
        images: of one record; the k-th image part of every conversation shows the k-th.
        conversations: with `choices`; others get an empty list.

    Returns:
        `sum`, the log-likelihood in nats of the choice's tokens and of the token that ends the answer, and `tokens`, how many these are.
    """
    packs = getattr(model.config, "packing", True)
    collator = AlignVLMCollator(processor, model.config.attention_mask_type, shared_image=packs)
    asked = [replace(c, responses=list(c.choices), train_on="last") for c in conversations if c.choices]
    if not asked:
        return [[] for _ in conversations]
    batch = collator([Record(list(images), asked).to_row()])
    labels, branch_ids = batch.pop("labels"), batch["branch_ids"]
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    logits = model(**inputs, use_cache=False).logits
    found = _by_branch(logits, labels, branch_ids)
    counts = iter(found)
    return [[next(counts) for _ in c.choices or []] for c in conversations]


def _by_branch(logits: Tensor, labels: Tensor, branch_ids: Tensor) -> list[dict]:
    """Returns the log-likelihoods of the labels of each branch, in the branches' order.

    Args:
        logits: `(rows, length, vocabulary)`; the token before a label, in the same branch, predicts it.
        labels, branch_ids: `(rows, length)`.
    """
    found = []
    for row in range(len(labels)):
        places = (labels[row] != IGNORED).nonzero().flatten()
        predicted = logits[row, places.to(logits.device) - 1].float().log_softmax(-1).cpu()
        values = predicted.gather(1, labels[row, places, None]).flatten()
        for branch in branch_ids[row, places].unique().tolist():  # sorted
            own = values[branch_ids[row, places] == branch]
            found.append({"sum": own.sum().item(), "tokens": len(own)})
    return found
