"""Batched answers equal answers one by one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from alignvlm.evaluation.answer import answer
from modeling_alignvlm.masking_alignvlm import MASK_TYPES


COLOURS = ((200, 30, 60), (20, 90, 220), (240, 240, 10))


def alone(model, processor, image, prompt: str, **options) -> str:
    """What plain `generate` answers to one prompt about one image, without any of `answer`'s sharing."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    written = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=written, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_answers_are_those_of_one_prompt_at_a_time(make_model, processor, mask_type, num_beams, batch_size):
    """From shared trunks, in batches that split the prompts of an image or join several images."""
    model = make_model(mask_type)
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    prompts = [["What colour is it?", "Is there a circle at the top left?", "Why?"], [], ["Why?", "How many?"]]
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    given = answer(model, processor, images, prompts, batch_size=batch_size, **options)
    assert [len(group) for group in given] == [3, 0, 2]
    assert given == [[alone(model, processor, i, p, **options) for p in group] for i, group in zip(images, prompts)]


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "mistral", "sliding_window": 6},
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "llama"},
    ],
    ids=lambda text: text["model_type"],
)
def test_trunks_are_shared_under_other_language_models(make_model, processor, text):
    model = make_model(text=text)
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    prompts = [["What colour is the large circle at the top left?", "Why?", "How many?"], ["Why?"], ["How many?"]]
    together = answer(model, processor, images, prompts, batch_size=2, max_new_tokens=8)
    assert together == [
        [alone(model, processor, i, p, max_new_tokens=8) for p in group] for i, group in zip(images, prompts)
    ]


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


def test_a_prompt_with_the_image_placeholder_is_named(make_model, processor):
    with pytest.raises(ValueError, match=r"'What is <image>\?' holds the placeholder"):
        answer(make_model(), processor, [Image.new("RGB", (16, 16))], [["What is <image>?"]])


@pytest.mark.parametrize("mask_type", ["image", "prefix"])
def test_several_answers_per_prompt_are_refused(make_model, processor, mask_type):
    """Flattened, the second answer to one prompt would be taken for the first to the next."""
    model, images = make_model(mask_type), [Image.new("RGB", (16, 16), colour) for colour in COLOURS[:2]]
    for options in (
        {"num_return_sequences": 2, "num_beams": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
    ):
        with pytest.raises(ValueError, match="one text per prompt, which num_return_sequences=2 does not"):
            answer(model, processor, images, [["Why?"], ["How many?"]], **options)
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        answer(model, processor, images, [["Why?"], ["How many?"]], return_dict_in_generate=True)


@pytest.mark.parametrize("mask_type", ["image", "prefix"])
def test_the_generation_config_of_a_checkpoint_holds(make_model, processor, mask_type):
    """Its beams, on both paths; but one answer per prompt."""
    model, images = make_model(mask_type), [Image.new("RGB", (16, 16), colour) for colour in COLOURS[:2]]
    prompts = [["Why?", "What colour is it?"], ["How many?"]]
    greedy = answer(model, processor, images, prompts, max_new_tokens=6)
    beams = answer(model, processor, images, prompts, max_new_tokens=6, num_beams=3)
    assert greedy != beams
    model.generation_config.update(num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    assert answer(model, processor, images, prompts, max_new_tokens=6) == beams
    given = GenerationConfig(**{**model.generation_config.to_dict(), "num_beams": 1, "num_return_sequences": 1})
    given.return_dict_in_generate = False
    assert answer(model, processor, images, prompts, max_new_tokens=6, generation_config=given) == greedy


def test_images_may_be_arrays(make_model, processor):
    model, image = make_model(), Image.new("RGB", (16, 16), COLOURS[0])
    fractions = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    prompts = [["Why?"], ["Why?"], ["Why?"]]
    first, second, third = answer(model, processor, [image, np.asarray(image), [fractions]], prompts, max_new_tokens=6)
    assert first == second == third
