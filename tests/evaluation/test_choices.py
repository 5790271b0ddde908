"""Likelihoods of choices are those of the model for each choice alone, under every mask type."""

import pytest
import torch
from PIL import Image

from alignvlm.data.record import one_turn
from alignvlm.evaluation.choices import likelihoods
from alignvlm.rows.encode import Encoder
from modeling_alignvlm import MASK_TYPES


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_choice_is_as_likely_as_alone(mask_type, make_model, processor):
    model = make_model(mask_type).double().eval()
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    asked = [
        one_turn("Which shape?\nA. circle\nB. a red square", ["A"], 1),
        one_turn("What is it?", ["a circle"], 1),
        one_turn("Which colour?", ["B"], 1),
    ]
    choices = [["circle", "a red square", "circle of red"], None, ["red", "blue"]]
    given = [type(c)(c.messages, c.responses, choices=own) for c, own in zip(asked, choices)]
    found = likelihoods(model, processor, [image], given)
    assert [len(own) for own in found] == [3, 0, 2]
    encoder = Encoder(processor)
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"].double()
    for conversation, measured in zip(given, found):
        for choice, one in zip(conversation.choices or [], measured):
            (branch,) = encoder.encode(type(conversation)(conversation.messages, [choice]))
            ids = torch.tensor([branch.input_ids])
            prompt_mask = torch.arange(ids.shape[1])[None] < branch.prompt_length
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=pixel_values, prompt_mask=prompt_mask).logits
            places = torch.tensor([index for index, trained in enumerate(branch.trained) if trained])
            values = logits[0, places - 1].log_softmax(-1).gather(1, ids[0, places, None])
            assert one["tokens"] == len(places) and one["sum"] == pytest.approx(values.sum().item(), rel=1e-5)
    assert len({round(one["sum"], 3) for own in found for one in own}) == 5
