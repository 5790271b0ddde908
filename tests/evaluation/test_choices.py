"""Likelihoods of choices and letters are those of the model for each answer alone, under every mask type."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from alignvlm.data.formats import multiple_choice
from alignvlm.data.record import Conversation, one_turn
from alignvlm.evaluation.choices import in_all_orders_of, measure, rotations
from alignvlm.evaluation.questions import without_images
from alignvlm.rows.encode import Encoder
from modeling_alignvlm import MASK_TYPES


def question(asked: str, choices: list[str]) -> Conversation:
    row = {"image": "a.png", "question": asked, "choices": choices, "answer": "A"}
    return multiple_choice(row).conversations[0]


def nothing() -> Conversation:
    return Conversation([{"role": "user", "content": ""}], ["-"])


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_every_answer_is_as_likely_as_alone(mask_type, make_model, processor):
    model = make_model(mask_type).double().eval()
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    encoder = Encoder(processor)
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"].double()

    def alone(conversation: Conversation, answer: str) -> tuple[float, int]:
        (branch,) = encoder.encode(replace(conversation, responses=[answer]))
        ids = torch.tensor([branch.input_ids])
        given = {"input_ids": ids, "prompt_mask": torch.arange(ids.shape[1])[None] < branch.prompt_length}
        if conversation.image_count:
            given["pixel_values"] = pixel_values
        with torch.no_grad():
            logits = model(**given).logits
        places = torch.tensor([index for index, trained in enumerate(branch.trained) if trained])
        values = logits[0, places - 1].log_softmax(-1).gather(1, ids[0, places, None])
        return values.sum().item(), len(places)

    given = [
        question("Which shape?", ["circle", "a red square", "circle of red"]),
        one_turn("What is it?", ["a circle"], 1),
        question("Which colour?", ["red", "blue"]),
    ]
    found = measure(model, processor, [image], given, in_all_orders=[0])
    assert found[1] == {} and [len(own["letters"]) for own in found if own] == [3, 1]
    for conversation, own in ((given[0], found[0]), (given[2], found[2])):
        for choice, one in zip(conversation.choices, own["likelihoods"], strict=True):
            total, tokens = alone(conversation, choice)
            assert one["tokens"] == tokens and one["sum"] == pytest.approx(total, rel=1e-5)
            assert one["without_image"] == pytest.approx(alone(without_images(conversation), choice)[0], rel=1e-5)
            assert one["without_question"] == pytest.approx(alone(nothing(), choice)[0], rel=1e-5)
            assert len({round(one[name], 6) for name in ("sum", "without_image", "without_question")}) == 3
        for shift, sums in enumerate(own["letters"]):
            turned = [*conversation.choices[shift:], *conversation.choices[:shift]]
            order = question(conversation.prompt.split("\n")[0], turned)
            expected = [alone(order, letter)[0] for letter in "ABC"[: len(turned)]]
            assert sums == pytest.approx(expected, rel=1e-5)
    (blind,) = measure(model, processor, [], [without_images(given[2])])
    assert [one["sum"] for one in blind["likelihoods"]] == [
        pytest.approx(one["without_image"], rel=1e-5) for one in found[2]["likelihoods"]
    ]
    assert all(one["without_image"] is None for one in blind["likelihoods"])


def test_choices_that_the_question_lists_itself_are_not_rotated():
    listed = multiple_choice({"image": "a.png", "question": "Which? A: red, B: blue", "answer": "B"}).conversations[0]
    assert rotations(listed) == [listed]
    texts = [order.prompt for order in rotations(question("Which?", ["x", "y", "z"]))]
    assert [text.split("\n")[1:4] for text in texts] == [
        ["A. x", "B. y", "C. z"],
        ["A. y", "B. z", "C. x"],
        ["A. z", "B. x", "C. y"],
    ]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (30, 30), (500, 100), (4000, 200)])
def test_a_twentieth_is_asked_in_all_orders_but_at_least_a_hundred(count, expected):
    asked = [one_turn("Why?", ["-"], 1), question("Which?", ["x", "y"])]
    chosen = in_all_orders_of([asked] * count)
    assert sum(map(len, chosen)) == expected and all(own <= {1} for own in chosen)
