"""Images in their native shape in training rows, in answers and in heat maps: packed as separate, with the processor's tokens."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.rows.collator import AlignVLMCollator, count_images
from alignvlm.rows.encode import Encoder
from alignvlm.rows.filling import sizes_of
from alignvlm.rows.tiles import grids_of
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples
from tests.modeling_alignvlm.test_native_shapes import MOST, PATCH, SIZES, native, native_model
from tests.modeling_alignvlm.test_tiles import picture
from tests.records import of_exchanges
from tests.rows.test_packing import WORDS, assert_same, loss_and_gradients


def random_record(rng: random.Random) -> dict:
    """A record with no, one or two images of any shape and one to four annotations."""
    images = [picture(rng.choice(SIZES), rng.randint(0, 99)) for _ in range(rng.choice((0, 1, 1, 2)))]
    words = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    return of_exchanges(images, [(words(4), words(5)) for _ in range(rng.randint(1, 4))])


@settings(max_examples=examples(8), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(MASK_TYPES)), st.sampled_from([1, 2]))
def test_packed_equals_separate(processor, make_model, seed, mask_type, factor):
    """Loss and gradients in float64, of the encoder's weights too, with several records a row."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(rng.randint(1, 3))]
    own, model = native(processor, factor), native_model(make_model, mask_type, factor).double().train()
    packed = AlignVLMCollator(own, mask_type, row_length=rng.choice((None, 400)))(records)
    separate = AlignVLMCollator(own, mask_type, shared_image=False)(records)
    assert count_images(packed) == sum(len(record["images"]) for record in records) or mask_type in (
        "prefix",
        "mutual",
    )
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected)


def test_rows_know_their_images_and_count_their_tokens(processor):
    rng = random.Random(1)
    records = [random_record(rng) for _ in range(6)]
    own = native(processor, 2)
    collator = AlignVLMCollator(own, row_length=300)
    batch = collator(records)
    for record in records:
        grids = grids_of(own, record["images"])
        rows = collator.rows(record)
        assert collator.token_counts(record)[0] == sum(own.token_count(grid) for grid in grids)
        assert sizes_of(record, collator) == [(len(rows[0]), len(record["images"]))]
        for index, grid in enumerate(grids):
            of_image = [token for token, of in zip(rows[0].input_ids, rows[0].image_ids) if of == index]
            assert of_image == [own.image_token_id] * own.token_count(grid)
    assert batch["spatial_shapes"].shape == (len(batch["pixel_values"]), 2)
    assert int((batch["image_ids"] >= 0).sum()) * 4 == int(batch["spatial_shapes"].prod(-1).sum())


def test_a_prompt_has_the_processors_tokens_and_needs_grids(processor):
    own, images = native(processor), [picture((60, 10)), picture((20, 20))]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "red?"}]
    branch = Encoder(own).prompt([{"role": "user", "content": parts}], grids_of(own, images))
    shown = [{**part, "image": image} for part, image in zip(parts, images)]
    batch = own.apply_chat_template(
        [{"role": "user", "content": [*shown, parts[2]]}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(branch.input_ids) == batch["input_ids"][0] and list(branch.image_ids) == batch["image_ids"][0]
    with pytest.raises(ValueError, match=r"takes images in their native shape, so 2 image\(s\) need as many `grids`"):
        Encoder(own).prompt([{"role": "user", "content": parts}])


def test_max_length_makes_room_for_the_largest_image(processor):
    own = native(processor)
    needed = Encoder(own).up_to_an_image
    assert Encoder(own).most_image_tokens == MOST
    with pytest.raises(ValueError, match=rf"behind {needed} tokens up to the end of an image"):
        AlignVLMCollator(own, max_length=needed + 1)([of_exchanges([picture((20, 20))], [("a", "b")])])


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_answers_of_a_batch_are_those_of_each_image_alone(processor, make_model, mask_type):
    """With a prefilled trunk where the mask type allows one, and by `generate` on the processor's inputs."""
    own, model = native(processor, 2), native_model(make_model, mask_type, 2).double()
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    questions = ["is it red", "what"]
    together = answer(model, own, images, [questions] * len(images), max_new_tokens=3)
    for image, found in zip(images, together):
        assert answer(model, own, [image], [questions], max_new_tokens=3) == [found]
        for question, text in zip(questions, found):
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = own.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
            written = own.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            assert written.strip() == text


def test_heat_maps_have_the_grid_of_each_image(processor, make_model):
    """A map holds the attention to the tokens of its image in their order, and zeros beyond its grid."""
    own, model = native(processor), native_model(make_model).double()
    images = [picture((60, 10)), picture((8, 40))]
    looked = attention_to_images(model, own, images, "What?", "A red circle.")
    grids = grids_of(own, images)
    assert looked.grids == grids and grids[0] != grids[1]
    most = max(r for r, _ in grids), max(c for _, c in grids)
    assert looked.layers.shape[2:] == (2, *most) and looked.rollout.shape[1:] == (2, *most)
    branch = Encoder(own).encode(of_conversation("What?", "A red circle."), grids)[0]
    inputs = own.process_images(images, return_tensors="pt")
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.model(
            input_ids=torch.tensor([branch.input_ids]),
            image_ids=torch.tensor([branch.image_ids]),
            pixel_values=inputs["pixel_values"],
            spatial_shapes=inputs["spatial_shapes"],
            output_attentions=True,
        ).attentions
    for layer, values in enumerate(weights):
        row = values[0].mean(0)[branch.prompt_length - 1]
        for image, (rows, columns) in enumerate(grids):
            read = row[[place for place, of in enumerate(branch.image_ids) if of == image]]
            found = looked.layers[layer, 0, image]
            torch.testing.assert_close(found[:rows, :columns].reshape(-1), read.double(), rtol=1e-5, atol=1e-7)
            assert found.sum() == pytest.approx(float(read.sum()))


def of_conversation(question: str, response: str):
    from alignvlm.data.record import Conversation

    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]
    return Conversation([{"role": "user", "content": content}], [response])


def test_the_contact_sheet_shows_an_image_in_its_shape(processor):
    from alignvlm.tools.contact_sheet import after_processing

    own, image = native(processor, 2), picture((60, 10))
    shown = after_processing(image, own)
    rows, columns = own.image_grid((10, 60))
    assert shown.size == (columns * 2 * PATCH, rows * 2 * PATCH)
    expected = image.resize(shown.size, own.image_processor.resample)
    assert np.abs(np.asarray(shown, np.int16) - np.asarray(expected, np.int16)).max() <= 1
