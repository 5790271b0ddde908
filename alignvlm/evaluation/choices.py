"""Measures how likely a model finds each choice of multiple-choice questions, and each of their letters.

What calibrates them is measured too: each choice without the image and without any question, and the letters with the choices in other
orders. Images and the tokens that answers share are computed once for many answers, as in training; under masks that let images see the
prompt, each answer is a row of its own.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from alignvlm.data.formats import lettered, letters_of
from alignvlm.data.record import Conversation, Record
from alignvlm.evaluation.questions import without_images
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import IGNORED


ROW = 32  # answers computed at once
NO_QUESTION = [{"role": "user", "content": [{"type": "text", "text": ""}]}]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    conversations: Sequence[Conversation],
    in_all_orders: Collection[int] = (),
) -> list[dict]:
    """Returns for each conversation what `metrics/choice_accuracy` judges, beside the written answer; an empty dict for one without choices.

    Args:
        images: of one record; the k-th image part of every conversation shows the k-th.
        in_all_orders: the indices of conversations whose letters are measured in every rotation of the choices.

    Returns:
        `likelihoods`, for each choice: `sum`, the log-likelihood in nats of its tokens and of the token that ends the answer, as the answer to the
        prompt; `tokens`, how many these are; `without_image`, the sum for the prompt without the images (None if there are none); and
        `without_question`, the sum as the answer to an empty message. And `letters`, the sums of the letters as answers: a list for the prompt as
        it is, and with `in_all_orders` one for each further rotation, in which the first choice goes last once more.
    """
    asked: list[tuple[Sequence[Image.Image], Conversation]] = []
    orders = {}
    for index, conversation in enumerate(conversations):
        choices = conversation.choices
        if choices:
            orders[index] = rotations(conversation) if index in in_all_orders else [conversation]
            asked.append((images, _answered(conversation, choices)))
            asked.append(([], _answered(without_images(conversation), choices)))
            asked.append(([], _answered(replace(conversation, messages=NO_QUESTION), choices)))
            asked += [(images, _answered(order, letters_of(len(choices)))) for order in orders[index]]
    measured = iter(_sums(model, processor, asked))
    found: list[dict] = []
    for index, conversation in enumerate(conversations):
        if index not in orders:
            found.append({})
            continue
        shows = bool(images) and conversation.image_count > 0
        likelihoods = [
            {**own, "without_image": alone["sum"] if shows else None, "without_question": prior["sum"]}
            for own, alone, prior in zip(next(measured), next(measured), next(measured), strict=True)
        ]
        letters = [[one["sum"] for one in next(measured)] for _ in orders[index]]
        found.append({"likelihoods": likelihoods, "letters": letters})
    return found


def in_all_orders_of(records: Sequence[Sequence[Conversation]]) -> list[set[int]]:
    """Returns for each record which of its questions are measured in all orders of their choices, to learn the letters' prior from: a twentieth
    of all questions, evenly spread, but at least a hundred."""
    with_choices = [
        (place, index) for place, group in enumerate(records) for index, c in enumerate(group) if c.choices
    ]
    found: list[set[int]] = [set() for _ in records]
    for place, index in with_choices[:: max(1, min(20, len(with_choices) // 100))]:
        found[place].add(index)
    return found


def _answered(conversation: Conversation, responses: Sequence[str]) -> Conversation:
    """Returns a conversation with these answers, each a branch."""
    return replace(conversation, responses=list(responses), train_on="last")


def rotations(conversation: Conversation) -> list[Conversation]:
    """Returns a question with its choices rotated by 0, 1, ... places; only as it is if the choices are not listed in it once, as `lettered` does."""
    choices, last = conversation.choices or [], conversation.messages[-1]
    listed = lettered(choices)
    parts = Conversation.parts(last)
    if sum(part.get("text", "").count(listed) for part in parts if part["type"] == "text") != 1:
        return [conversation]
    found = []
    for shift in range(len(choices)):
        turned = [*choices[shift:], *choices[:shift]]
        content = [
            {**part, "text": part["text"].replace(listed, lettered(turned))} if part["type"] == "text" else part
            for part in parts
        ]
        messages = [*conversation.messages[:-1], {**last, "content": content}]
        found.append(replace(conversation, messages=messages, choices=turned))
    return found


def _sums(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[tuple[Sequence[Image.Image], Conversation]]
) -> list[list[dict]]:
    """Returns `sum` and `tokens` of each response of each conversation. Conversations with images and
    those without are never in one row, where they would have no trunk in common."""
    packs = getattr(model.config, "packing", True)
    collator = AlignVLMCollator(processor, model.config.attention_mask_type, shared_image=packs)
    found: dict[int, list[dict]] = {}
    for has_images in (True, False):
        group: list[int] = []
        fitting = [index for index, (images, _) in enumerate(asked) if bool(images) == has_images]
        for index in fitting:
            group.append(index)
            responses = [asked[other][1].responses for other in group]
            if sum(map(len, responses)) < ROW and index != fitting[-1]:
                continue
            record = Record(list(asked[index][0]), [asked[other][1] for other in group])
            measured = iter(_by_branch(model, collator([record.to_row()])))
            found |= {other: [next(measured) for _ in own] for other, own in zip(group, responses)}
            group = []
    return [found[index] for index in range(len(asked))]


def _by_branch(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[dict]:
    """Returns the log-likelihoods of the labels of each branch, in the branches' order. The token before a label, in the same branch, predicts it."""
    labels, branch_ids = batch.pop("labels"), batch["branch_ids"]
    predicting = (labels != IGNORED).any(0).nonzero().flatten() - 1  # columns
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    logits = model(
        **inputs, use_cache=False, logits_to_keep=predicting.to(model.device)
    ).logits  # (rows, columns, vocabulary)
    found = []
    for row in range(len(labels)):
        places = (labels[row] != IGNORED).nonzero().flatten()
        columns = torch.searchsorted(predicting, places - 1)
        predicted = logits[row, columns.to(logits.device)].float().log_softmax(-1).cpu()
        values = predicted.gather(1, labels[row, places, None]).flatten()
        for branch in branch_ids[row, places].unique().tolist():  # sorted
            own = values[branch_ids[row, places] == branch]
            found.append({"sum": own.sum().item(), "tokens": len(own)})
    return found
