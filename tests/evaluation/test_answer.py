"""Batched answers equal answers one by one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from alignvlm.evaluation.answer import answer
from alignvlm.rows.encode import Encoder, shared_length
from modeling_alignvlm import AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests.modeling_alignvlm.test_native_shapes import native, native_model
from tests.modeling_alignvlm.test_tiles import picture, tiled
from tests.running import recompute_activations


COLOURS = ((200, 30, 60), (20, 90, 220), (240, 240, 10))


def alone(model, processor, image, prompt: str, **options) -> str:
    """What plain `generate` answers to one prompt about one image, without any of `answer`'s sharing."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    written = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=written, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


def conversation_alone(model, processor, images: list, messages: list[dict], **options) -> str:
    """What plain `generate` answers to one conversation as transformers' chat template call prepares it."""
    remaining = iter(images)
    messages = [
        {
            "role": message["role"],
            "content": [{**part, "image": next(remaining)} if part["type"] == "image" else part for part in content]
            if not isinstance(content := message["content"], str)
            else content,
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


IMAGE = {"type": "image"}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def turn(role: str, *content) -> dict:
    return {"role": role, "content": [said(part) if isinstance(part, str) else part for part in content]}


HISTORY = [turn("user", IMAGE, "What colour is it?"), turn("assistant", "Red.")]
# Per entry the number of its images, and its prompts: images anywhere, several turns, plain prompts among them.
ENTRIES = [
    (1, [[*HISTORY, turn("user", "Why?")], "Why?", [*HISTORY, turn("user", "How many are there?")]]),
    (0, ["Why?", [turn("system", "Be brief."), turn("user", "How many?")], [turn("user", "How many circles?")]]),
    (2, [[*HISTORY, turn("user", "And this", IMAGE, "?")], [*HISTORY, turn("user", "And here?", IMAGE)], "What differs?"]),
    (3, [[turn("user", "First", IMAGE, IMAGE, "then", IMAGE, "what?")], [turn("user", "Why?")]]),
    (2, []),
    (3, [[turn("user", IMAGE), turn("assistant", "A circle."), turn("user", IMAGE, "Where?")]]),
    (1, [[{"role": "user", "content": "No image here."}]]),
]  # fmt: skip


def shown_images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), colour) for colour in COLOURS[:count]]


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_conversations_have_the_answers_of_one_at_a_time(make_model, processor, mask_type, num_beams, batch_size):
    model = make_model(mask_type).double()
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    images = [shown_images(count) for count, _ in ENTRIES]
    prompts = [group for _, group in ENTRIES]
    expected = []
    for entry, group in zip(images, prompts):
        written = [[turn("user", *[IMAGE] * len(entry), p)] if isinstance(p, str) else p for p in group]
        expected.append([conversation_alone(model, processor, entry, m, **options) for m in written])
    assert answer(model, processor, images, prompts, batch_size=batch_size, **options) == expected
    flat = [text for group in expected for text in group]
    assert len(set(flat)) > len(flat) * 2 // 3  # they tell prompts apart


def test_what_conversations_share_is_computed_once(make_model, processor):
    """Not only up to the last image: the turns that all prompts of an entry begin with, but no token beyond."""
    model = make_model()
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    prompts = [[*HISTORY, turn("user", text)] for text in ("Why?", "How many are there?", "Where?")]
    answer(model, processor, [shown_images(1)] * 2, [prompts, prompts[:2]], max_new_tokens=1)
    encoder = Encoder(processor)
    tokens = [encoder.prompt(messages).input_ids for messages in prompts]
    shared = shared_length(tokens)
    history = len(encoder.processor.tokenizer(processor.apply_chat_template(HISTORY))["input_ids"])
    assert shared > history
    assert lengths == [(2, shared), (5, max(map(len, tokens)) - shared)]


def test_images_that_no_conversation_shows_are_not_encoded(make_model, processor):
    model = make_model()
    encoded = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    prompts = [[*HISTORY, turn("user", "Why?")], [turn("user", "Why?")]]
    found = answer(model, processor, [shown_images(3), shown_images(2)], [prompts, prompts[1:]], max_new_tokens=4)
    assert sum(encoded) == 1 and found[0][1] == found[1][0]
    assert found[0][1] == answer(model, processor, [[]], [prompts[1:]], max_new_tokens=4)[0][0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", IMAGE, IMAGE, "?")], r"prompts\[1\]\[1\] has 2 image part\(s\).* holds 1 image"),
        (HISTORY, r"prompts\[1\]\[1\]: The last message is from the assistant; expected one of the user"),
        ([], r"prompts\[1\]\[1\]: The last message is missing"),
        ([turn("user", {"type": "video"})], r"prompts\[1\]\[1\]: .*type 'video'"),
        ([turn("tool", "x"), turn("user", "?")], r"prompts\[1\]\[1\]: .*role 'tool'"),
        ([{"role": "user", "text": "?"}], r"prompts\[1\]\[1\]: messages\[0\] is .*expected a mapping with `role`"),
        (turn("user", "Why?"), r"prompts\[1\]\[1\] is a single message"),
        ([*HISTORY, turn("user", "a <image>")], "'a <image>' holds the placeholder"),
    ],
)
def test_conversations_that_cannot_be_answered_are_named(make_model, processor, messages, message):
    with pytest.raises(ValueError, match=message):
        answer(make_model(), processor, [shown_images(1)] * 2, [["Why?"], ["Why?", messages]], max_new_tokens=1)


def test_a_text_in_place_of_a_list_is_refused(make_model, processor):
    """Its letters would be the prompts."""
    with pytest.raises(ValueError, match="a text in place of a list"):
        answer(make_model(), processor, shown_images(1), ["Why?"])


def test_a_processor_of_older_code_is_answered_too(make_model, processor, monkeypatch):
    """It cannot say who adds special tokens: the tokenizer does."""
    model, images = make_model(), [shown_images(1)]
    expected = answer(model, processor, images, [["Why?"]], max_new_tokens=6)
    monkeypatch.delattr(AlignVLMProcessor, "adds_special_tokens")
    assert answer(model, processor, images, [["Why?"]], max_new_tokens=6) == expected


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
        {"model_type": "mistral", "sliding_window": 100},
        {"model_type": "llama"},
    ],
    ids=lambda text: f"{text['model_type']}-{text.get('sliding_window')}",
)
def test_trunks_are_shared_under_other_language_models(make_model, processor, text):
    """Unless a window is so short that the padding behind a trunk would take the place of its tokens."""
    model = make_model(text=text).double()
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    prompts = [["What colour is the large circle at the top left?", "Why?", "How many?"], ["Why?", ""], ["How many?"]]
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
@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_has_the_room_that_its_prompt_leaves(make_model, processor, mask_type, num_beams):
    """Whatever prompts are asked beside it; GPT-2 has no position beyond its last."""
    text = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": None}
    model = make_model(mask_type, text=text).double()
    (image,) = shown_images(1)
    prompts = ["Why?", "red " * 12, "Where is it?", "blue " * 8]
    lengths = [len(Encoder(processor).prompt([turn("user", IMAGE, prompt)])) for prompt in prompts]
    rooms = [min(16, 40 - length) for length in lengths]
    assert 0 < min(rooms) < 16 == max(rooms)
    expected = [
        alone(model, processor, image, prompt, max_new_tokens=room, num_beams=num_beams)
        for prompt, room in zip(prompts, rooms)
    ]
    assert answer(model, processor, [image], [prompts], max_new_tokens=16, num_beams=num_beams) == [expected]


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_answered(make_model, processor, monkeypatch):
    model = make_model()
    model.config.text_config.max_position_embeddings = 40
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("asked"))
    images, prompts = shown_images(2), [["Why?"], ["Why?", "red " * 60]]
    message = r"prompts\[1\]\[1\] has \d+ tokens with its images; the language model takes 40, the answer among them\. Shorten it"
    with pytest.raises(ValueError, match=message):
        answer(model, processor, images, prompts, batch_size=1)


def test_a_benchmark_may_leave_long_prompts_unanswered(make_model, processor):
    model = make_model()
    model.config.text_config.max_position_embeddings = 40
    images, long = shown_images(3), "red " * 60
    prompts = [["Why?", long, "Where is it?"], [long], [long, "Why?"]]
    with pytest.warns(UserWarning, match=r"3 prompts are not answered\. The first: prompts\[0\]\[1\] has \d+ tokens"):
        answers = answer(model, processor, images, prompts, max_new_tokens=4, refuse_long_prompts=False)
    assert [[text == "" for text in group] for group in answers] == [[False, True, False], [True], [True, False]]
    short = answer(model, processor, images, [["Why?", "Where is it?"], [], ["Why?"]], max_new_tokens=4)
    assert [[text for text in group if text] for group in answers] == short


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


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("changed", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_answers_without_a_cache_or_with_another_are_the_same(make_model, processor, mask_type, num_beams, changed):
    """Asked for by an option, by a given configuration or by the model's own; of prompts that share images and of one alone."""
    model, options = make_model(mask_type).double(), {"max_new_tokens": 6, "num_beams": num_beams}
    images = [shown_images(count) for count, _ in ENTRIES]
    prompts = [group for _, group in ENTRIES]
    expected = answer(model, processor, images, prompts, **options)
    one = [answer(model, processor, images[3:4], [["Why?"]], **options)]
    given = GenerationConfig(**changed)
    for named in (changed, {"generation_config": given}):
        assert answer(model, processor, images, prompts, batch_size=4, **options, **named) == expected
        assert [answer(model, processor, images[3:4], [["Why?"]], **options, **named)] == one
    model.generation_config.update(**changed)
    assert answer(model, processor, images, prompts, **options) == expected
    undone = {"use_cache": True, "cache_implementation": None}
    assert answer(model, processor, images, prompts, **options, **undone) == expected


def test_an_answer_without_a_cache_sees_images_of_different_sizes(make_model, processor):
    """Of tiles and in native shape."""
    images = [[picture((40, 20), 1), picture((16, 16), 2)], [picture((33, 50), 3)]]
    prompts = [
        ["What differs?", "Why?", [turn("user", IMAGE, "What is it?")]],
        ["What is it?", [turn("user", "Why?")]],
    ]
    for own, model in (
        (tiled(processor, tile_marks=True), make_model(image_block="image")),
        (native(processor, 2), native_model(make_model, "image", 2)),
    ):
        model.double().generation_config.eos_token_id = None
        expected = answer(model, own, images, prompts, max_new_tokens=5)
        assert answer(model, own, images, prompts, batch_size=2, max_new_tokens=5, use_cache=False) == expected


def test_a_given_generation_config_goes_before_the_defaults(make_model, processor, monkeypatch):
    """What it sets; and what the caller names goes before it. The model's own cache is kept."""
    model, images = make_model(), shown_images(1)
    model.generation_config.eos_token_id = None
    asked = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: asked.append(kwargs) or generate(**kwargs))

    def options(**named) -> tuple:
        asked.clear()
        answer(model, processor, images, [["Why?", "How many?"]], **named)
        return asked[0]["do_sample"], asked[0]["max_new_tokens"], asked[0]["num_beams"]

    model.generation_config.update(do_sample=True, max_new_tokens=7)
    assert options() == options(generation_config=GenerationConfig(max_length=5)) == (False, 32, 1)
    given = GenerationConfig(do_sample=True, max_new_tokens=2, num_beams=3)
    assert options(generation_config=given) == (True, 2, 3)
    named = {"generation_config": given, "do_sample": False, "max_new_tokens": 4, "num_beams": 2}
    assert options(**named) == (False, 4, 2)
    given = GenerationConfig(do_sample=True, temperature=50.0, max_new_tokens=12)
    texts = {answer(model, processor, images, [["Why?"]], generation_config=given)[0][0] for _ in range(3)}
    assert len(texts) == 3  # it does sample
    for name, value in (("use_cache", False), ("cache_implementation", "static")):
        own = make_model()
        own.generation_config.update(**{name: value})
        monkeypatch.setattr(own, "generate", lambda **kwargs: asked.append(kwargs) or kwargs["input_ids"])
        answer(own, processor, images, [["Why?"]])
        assert asked[-1][name] == value


def test_training_with_activation_checkpointing_is_refused(make_model, processor):
    """It fills no cache, so that later tokens would not see the prompt. Training alone is not refused."""
    model, images = make_model(), shown_images(1)
    expected = answer(model, processor, images, [["Why?", "How many?"]], max_new_tokens=4)
    recompute_activations(model)
    assert answer(model, processor, images, [["Why?", "How many?"]], max_new_tokens=4) == expected
    model.train()
    for prompts in (["Why?"], ["Why?", "How many?"]):
        with pytest.raises(
            ValueError, match=r"training mode with activation checkpointing.*Call model\.eval\(\) first"
        ):
            answer(model, processor, images, [prompts], max_new_tokens=4)
    plain = make_model().train()
    assert answer(plain, processor, images, [["Why?", "How many?"]], max_new_tokens=4) == expected


def test_images_may_be_arrays(make_model, processor):
    model, image = make_model(), Image.new("RGB", (16, 16), COLOURS[0])
    fractions = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    prompts = [["Why?"], ["Why?"], ["Why?"]]
    first, second, third = answer(model, processor, [image, np.asarray(image), [fractions]], prompts, max_new_tokens=6)
    assert first == second == third
