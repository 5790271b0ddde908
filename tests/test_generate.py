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


def test_an_image_is_encoded_once_for_all_its_prompts(make_model, processor):
    model = make_model()
    encoded = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    answer(model, processor, images, [["a", "b", "c", "d", "e"], ["a"], ["b", "c"]], batch_size=2, max_new_tokens=3)
    assert sum(encoded) == 3


def test_entries_may_have_no_image_or_several(make_model, processor):
    model = make_model()
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in COLOURS[:2])
    entries = [[], [red, blue], red, [red], [blue, red]]
    prompts = [["Why?"], ["What differs?", "Why?"], ["Why?"], ["Why?"], ["Why?"]]
    together = answer(model, processor, entries, prompts, batch_size=4, max_new_tokens=6)
    alone = [answer(model, processor, [e], [p], batch_size=1, max_new_tokens=6)[0] for e, p in zip(entries, prompts)]
    assert together == alone
    assert together[2] == together[3] and together[1][1] != together[4][0]
    assert answer(model, processor, [[]], [["Why?"]], max_new_tokens=6) == [together[0]]
