"""Batched answers equal answers one by one."""

import pytest
import torch
from PIL import Image

from evaluation.generate import answer


COLOURS = ((200, 30, 60), (20, 90, 220), (240, 240, 10))


def test_answers_are_those_of_one_prompt_at_a_time(make_model, processor):
    model = make_model()
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    prompts = [["What colour is it?", "Is there a circle at the top left?"], [], ["Why?"]]
    given = answer(model, processor, images, prompts, batch_size=2, max_new_tokens=6)
    assert [len(group) for group in given] == [2, 0, 1]
    for image, group, answers in zip(images, prompts, given):
        for prompt, text in zip(group, answers):
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            written = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(images=image, text=written, return_tensors="pt")
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(tokens, skip_special_tokens=True).strip() == text


def test_every_image_needs_its_list_of_prompts(make_model, processor):
    with pytest.raises(ValueError, match="Got 1 images and 2 lists"):
        answer(make_model(), processor, [Image.new("RGB", (16, 16))], [["a"], ["b"]])
