"""Tiles in training rows: tokens as the processor writes them, packed as separate, trunks and cuts that divide no image."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from alignvlm.data.images import image_size, read_image
from alignvlm.data.record import Conversation
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Branch, Encoder
from alignvlm.rows.packing import IGNORED, shortened, trunk_length
from alignvlm.rows.tiles import grids_of, image_inputs_of
from modeling_alignvlm import IMAGE_BLOCKS, AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples
from tests.modeling_alignvlm.test_tiles import SIZES, picture, tiled
from tests.records import of_exchanges
from tests.rows.test_packing import WORDS, assert_same, loss_and_gradients


def random_record(rng: random.Random) -> dict:
    """A record with no, one or two images of any shape and one to four annotations."""
    images = [picture(rng.choice(SIZES), rng.randint(0, 99)) for _ in range(rng.choice((0, 1, 1, 2)))]
    words = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    return of_exchanges(images, [(words(4), words(5)) for _ in range(rng.randint(1, 4))])


@settings(max_examples=examples(8), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(MASK_TYPES)), st.sampled_from(IMAGE_BLOCKS), st.booleans())
def test_packed_equals_separate_with_tiles(processor, make_model, seed, mask_type, block, tile_marks):
    """Loss and gradients in float64, with several records a row."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(rng.randint(1, 3))]
    own, model = tiled(processor, tile_marks=tile_marks), make_model(mask_type, image_block=block).double().train()
    packed = AlignVLMCollator(own, mask_type, row_length=rng.choice((None, 400)))(records)
    separate = AlignVLMCollator(own, mask_type, shared_image=False)(records)
    assert "image_ids" in packed
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_rows_know_their_images_and_tiles(processor, seed, tile_marks):
    """The number of each token's image in a row is that of its picture; a batch has as many pictures as tiles in its rows."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(3)]
    own = tiled(processor, tile_marks=tile_marks)
    collator = AlignVLMCollator(own, row_length=500)
    rows = collator.packer.arranged([row for record in records for row in collator.rows(record)])
    for row in rows:
        assert len(row.image_ids) == len(row)
        for index, image in enumerate(row.images):
            tokens = [token for token, of in zip(row.input_ids, row.image_ids) if of == index]
            assert tokens == list(collator.encoder.image_tokens(grids_of(own, [image])[0]))
        assert max(row.image_ids) == len(row.images) - 1
    batch = collator(records)
    image_tokens = int((batch["input_ids"] == own.image_token_id).sum())
    assert image_tokens == 4 * (len(batch["pixel_values"]) if "pixel_values" in batch else 0)
    counted = [collator.token_counts(record) for record in records]
    alone = [AlignVLMCollator(own)([record]) for record in records]
    for (image, text), single in zip(counted, alone):
        assert image == int((single["input_ids"] == own.image_token_id).sum())
        assert image + text == int(single["attention_mask"].sum())


TOKENIZERS = ("tokenizers/gpt2", "tokenizers/qwen2.5", "weights/stories260k")


@pytest.mark.parametrize("name", ["ours", *TOKENIZERS])
def test_a_prompt_has_the_processors_tokens(processor, request, name):
    """Also with tokenizers whose marks would merge with what stands around them, or that write a sign before a word."""
    tokenizer = processor.tokenizer
    if name != "ours":
        folder = request.getfixturevalue("shared_data") / name
        if not folder.is_dir():
            folder = next(path for path in folder.parent.iterdir() if path.name.lower().startswith(folder.name[:4]))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    own = AlignVLMProcessor(
        processor.image_processor, tokenizer, 4, chat_template=processor.chat_template, max_tiles=4, tile_marks=True
    )
    images = [picture((33, 50)), picture((16, 16)), picture((40, 20))]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "row<"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    branch = Encoder(own).prompt(messages, grids_of(own, images))
    remaining = iter(images)
    shown = [{**part, "image": next(remaining)} if part["type"] == "image" else part for part in parts]
    batch = own.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(branch.input_ids) == batch["input_ids"][0]
    assert list(branch.image_ids) == batch["image_ids"][0]


def test_grids_are_needed_where_images_are_cut(processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    with pytest.raises(ValueError, match=r"up to 4 tiles, so 1 image\(s\) need as many `grids`; got None"):
        Encoder(tiled(processor)).prompt(messages)
    assert Encoder(processor).prompt(messages).image_ids.count(0) == 4


@pytest.mark.parametrize("length, kept", [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 6), (7, 7)])
def test_no_cut_divides_an_image_or_its_marks(length, kept):
    """An image of two tiles of two tokens, with a mark between them."""
    ids, image_ids = (7, 1, 1, 5, 1, 1, 8, 9), (-1, 0, 0, 0, 0, 0, -1, -1)
    assert len(shortened(Branch(ids, (True,) * 8, 0, image_ids), length)) == kept
    branch = Branch(ids, (False,) * 8, length + 1, image_ids)
    assert trunk_length([branch, branch]) == kept


def test_max_length_makes_room_for_the_largest_image(processor):
    own = tiled(processor)
    record = of_exchanges([picture((33, 50))], [("a", "b")])
    needed = Encoder(own).up_to_an_image
    with pytest.raises(ValueError, match=rf"behind {needed} tokens up to the end of an image of up to 4 tiles"):
        AlignVLMCollator(own, max_length=needed + 1)([record])
    batch = AlignVLMCollator(own, max_length=needed + 2)([record])
    assert "losses_of_data" not in batch and int((batch["labels"] != IGNORED).sum()) > 0
    longer = of_exchanges([picture((33, 50))], [("a " * needed, "b")])
    batch = AlignVLMCollator(own, max_length=needed + 2)([longer])
    assert [loss["kind"] for loss in batch["losses_of_data"]] == ["dropped_record"]


def test_a_size_is_read_from_the_header_as_the_image_is_decoded(tmp_path):
    """Turned by its EXIF orientation too; and what cannot be read counts as one tile."""
    image = picture((40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = ("turned.jpg", "turned.png", "turned.webp", "turned.tif")
    for name in turned:
        image.save(tmp_path / name, exif=exif)
    image.save(tmp_path / "plain.png")
    for name in (*turned, "plain.png"):
        path = tmp_path / name
        decoded = read_image(path)
        for value in (path, {"bytes": path.read_bytes(), "path": None}, decoded):
            assert image_size(value) == (decoded.height, decoded.width)
    assert {image_size(tmp_path / name) for name in turned} == {(40, 20)}


def test_counts_of_undecoded_images_are_those_of_decoded_ones(processor, tmp_path):
    own = tiled(processor)
    picture((40, 20)).save(tmp_path / "0.png")
    collator = AlignVLMCollator(own)
    counts = []
    for image in ({"bytes": None, "path": str(tmp_path / "0.png")}, picture((40, 20)), {"bytes": b"", "path": None}):
        counts.append(collator.token_counts(of_exchanges([image], [("a", "b")]))[0])
    assert counts == [12, 12, 4]
    assert image_inputs_of(own, [picture((40, 20))])["pixel_values"].shape[0] == 3


def test_conversations_with_the_same_words_and_other_shapes_have_other_tokens(processor):
    """The encoder remembers what it has encoded."""
    own = tiled(processor)
    encoder = Encoder(own)
    conversation = Conversation([{"role": "user", "content": [{"type": "image"}]}], ["a"])
    lengths = [len(encoder.encode(conversation, [grid])[0]) for grid in ((1, 1), (1, 2), (1, 1))]
    assert lengths[0] == lengths[2] < lengths[1]
