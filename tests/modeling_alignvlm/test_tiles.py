"""Images cut into tiles: the grid, the pixels, the tokens, and who may attend to whom."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention.flex_attention import create_mask
from transformers import DynamicCache
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from alignvlm.stages.chat_templates import PLAIN_TEMPLATE
from modeling_alignvlm import (
    CACHE_NAME,
    IMAGE_BLOCKS,
    AlignVLMConfig,
    AlignVLMProcessor,
    TokenLayout,
    attention_rule,
    dense_mask,
    number_images,
    tiles_of,
)
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, get_mask_type
from modeling_alignvlm.processing_alignvlm import best_grid
from tests import examples


SIZES = [
    (16, 16),
    (20, 44),
    (40, 20),
    (33, 50),
]  # width, height: of one tile, of 2 x 1, 1 x 2 and 3 x 2 before max_tiles
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def tiled(processor, max_tiles: int = 4, tile_marks: bool = True, image_processor=None) -> AlignVLMProcessor:
    return AlignVLMProcessor(
        image_processor or processor.image_processor,
        processor.tokenizer,
        processor.image_seq_length,
        chat_template=PLAIN_TEMPLATE,
        max_tiles=max_tiles,
        tile_marks=tile_marks,
    )


@settings(max_examples=examples(300), deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(5, 40), st.integers(5, 40), st.integers(1, 9))
def test_the_grid_is_the_one_of_the_nearest_shape(height, width, tile_height, tile_width, most):
    rows, columns = best_grid((height, width), (tile_height, tile_width), most)

    def stretch(rows: int, columns: int) -> float:
        ratio = (width / height) / (columns * tile_width / (rows * tile_height))
        return max(ratio, 1 / ratio)

    fitting = [
        (r, c)
        for r, c in itertools.product(range(1, most + 1), repeat=2)
        if r * c <= most and (r - 1) * tile_height < height and (c - 1) * tile_width < width
    ]
    assert (rows, columns) in fitting
    assert stretch(rows, columns) <= min(itertools.starmap(stretch, fitting)) * (1 + 1e-6)
    if height <= tile_height and width <= tile_width:
        assert (rows, columns) == (1, 1)
    alike = [grid for grid in fitting if math.isclose(stretch(*grid), stretch(rows, columns), rel_tol=1e-8)]
    own = [r * c for r, c in alike if r * c * tile_height * tile_width <= 2 * height * width]
    assert rows * columns == (max(own) if own else max(r * c for r, c in alike))


def test_some_grids():
    found = [best_grid(size, (384, 384), 6) for size in ((384, 384), (300, 200), (400, 800), (768, 768), (1080, 1620))]
    assert found == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 3)]


IMAGE_PROCESSORS = {
    "siglip": None,
    "clip, which crops": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    "convnext, which enlarges and crops": ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.8),
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_tiles_are_the_whole_image_at_the_size_of_the_grid(processor, name):
    own = tiled(processor, image_processor=IMAGE_PROCESSORS[name])
    images = [picture((40, 70)), picture((16, 10)), picture((33, 16))]
    batch = own.process_images(images, return_tensors="np")
    grids = [tuple(grid) for grid in batch["image_grids"]]
    assert grids == [(2, 1), (1, 1), (1, 2)]
    values = np.asarray(batch["pixel_values"])
    assert values.shape == (3 + 1 + 3, 3, 16, 16)
    first = 0
    for image, (rows, columns) in zip(images, grids):
        overview = np.asarray(own.image_processor([image], return_tensors="np")["pixel_values"])[0]
        assert np.array_equal(values[first], overview)
        if rows * columns > 1:
            parts = values[first + 1 : first + 1 + rows * columns].reshape(rows, columns, 3, 16, 16)
            joined = parts.transpose(2, 0, 3, 1, 4).reshape(3, rows * 16, columns * 16)
            resized = image.resize((columns * 16, rows * 16), int(own.image_processor.resample))
            expected = np.asarray(resized, np.float64).transpose(2, 0, 1) / 255
            mean, std = (
                np.array(v)[:, None, None] for v in (own.image_processor.image_mean, own.image_processor.image_std)
            )
            assert np.allclose(joined, (expected - mean) / std, atol=1e-5)
        first += tiles_of((rows, columns))


@pytest.mark.parametrize("tile_marks", [False, True])
def test_an_image_becomes_the_tokens_of_its_tiles(processor, tile_marks):
    own = tiled(processor, tile_marks=tile_marks)
    batch = own(images=[picture((40, 20)), picture((16, 16))], text="a <image> b <image>", return_tensors="pt")
    ids, image_ids = batch["input_ids"][0].tolist(), batch["image_ids"][0].tolist()
    tile = "<image>" * 4
    marks = ["<row_1_col_1>", "<row_1_col_2>"] if tile_marks else ["", ""]
    assert own.decode(ids) == f"a {tile}{marks[0]}{tile}{marks[1]}{tile} b {tile}"
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    for image, length in ((0, 12), (1, 4)):
        places = [place for place, index in enumerate(image_ids) if index == image]
        assert places == list(range(places[0], places[-1] + 1))
        assert [ids[places[0]], ids[places[-1]]] == [own.image_token_id] * 2
        assert sum(ids[place] == own.image_token_id for place in places) == length
    assert own.image_token_id not in [token for token, index in zip(ids, image_ids) if index < 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == own.image_token_id)
    counts = own._get_num_multimodal_tokens(image_sizes=[(20, 40), (16, 16)])
    assert counts["num_image_tokens"] == [image_ids.count(0), image_ids.count(1)]
    assert counts["num_image_patches"] == [3, 1]


def test_an_image_of_one_tile_gives_what_it_gives_without_tiles(processor):
    own, image = tiled(processor), picture((16, 12))
    found, expected = (each(images=image, text="a <image> b", return_tensors="pt") for each in (own, processor))
    assert found.pop("image_ids").tolist() == [[-1 if t != own.image_token_id else 0 for t in found["input_ids"][0]]]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unpadded_and_text_only_inputs_have_image_ids(processor):
    own = tiled(processor)
    lists = own(images=[[picture((40, 20))], []], text=["<image> a", "b"])
    assert list(map(len, lists["input_ids"])) == list(map(len, lists["image_ids"]))
    assert set(lists["image_ids"][1]) == {-1} and max(lists["image_ids"][0]) == 0
    assert own(text="b", return_tensors="pt")["image_ids"].max() == -1


def test_tiles_leave_no_trace_where_there_are_none(processor, make_model, tmp_path):
    processor.save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    for name in ("processor_config.json", "config.json"):
        text = (tmp_path / name).read_text()
        assert "tile" not in text and "image_block" not in text
    assert "image_ids" not in processor(images=picture((40, 20)), text="<image>")
    tiled(processor).save_pretrained(tmp_path)
    again = AlignVLMProcessor.from_pretrained(tmp_path)
    assert (again.max_tiles, again.tile_marks) == (4, True)
    make_model(image_block="tile").config.save_pretrained(tmp_path)
    assert AlignVLMConfig.from_pretrained(tmp_path).image_block == "tile"
    assert json.loads((tmp_path / "config.json").read_text())["image_block"] == "tile"


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_other_numbers_of_tiles_are_refused(processor, value):
    with pytest.raises(ValueError, match=f"max_tiles={value}"):
        tiled(processor, value)


def test_other_blocks_are_refused(make_model):
    with pytest.raises(ValueError, match=r"image_block 'row'. Valid values: None, tile, image"):
        make_model(image_block="row")


# Who may attend to whom. A token of a row is (image, tile, prompt); a mark has an image and no tile.


@st.composite
def random_rows(draw) -> list[list[tuple[int, int, bool]]]:
    """Rows of text and images, each of tiles of two tokens, with marks between them or not; adjacent images too."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        tokens, tile = [], 0
        for image in range(draw(st.integers(0, 3))):
            tokens += [(-1, -1, True)] * draw(st.integers(0, 2))
            for number in range(draw(st.integers(1, 3))):
                tokens += [(image, -1, True)] * (draw(st.integers(0, 2)) if number else 0)
                tokens += [(image, tile, True)] * 2
                tile += 1
        answer = draw(st.integers(0, 2))
        tokens += [(-1, -1, True)] * draw(st.integers(1 - min(answer, 1), 2)) + [(-1, -1, False)] * answer
        rows.append(tokens)
    return rows


def looks_ahead(mask_type: str, block: str, q: tuple, k: tuple) -> bool:
    """The rules of docs/masks.md for two tokens, with a block for an image."""
    of_q, of_k = ((t[0] if block == "image" else t[1]) for t in (q, k))
    same = of_q != -1 and of_q == of_k
    return {
        "causal": False,
        "image": same,
        "prefix": q[2] and k[2],
        "mutual": same or (of_q != -1 and k[2]),
    }[mask_type]


@settings(max_examples=examples(120), deadline=None)
@given(random_rows(), st.sampled_from(list(MASK_TYPES)), st.sampled_from(IMAGE_BLOCKS), st.booleans())
def test_masks_of_tiles_equal_the_written_definition(rows, mask_type, block, pads_left):
    """By brute force, as a dense mask and as the mask function of flex attention."""
    length = max(map(len, rows))
    padded = [[None] * (length - len(row)) + row if pads_left else row + [None] * (length - len(row)) for row in rows]
    values = [[t or (-1, -1, False) for t in row] for row in padded]
    layout = TokenLayout.from_image_mask(
        torch.tensor([[t[1] != -1 for t in row] for row in values]),
        2,
        attention_mask=torch.tensor([[t is not None for t in row] for row in padded]),
        prompt_mask=torch.tensor([[t[2] for t in row] for row in values]),
        image_ids=torch.tensor([[t[0] for t in row] for row in values]),
        image_block=block,
    )
    expected = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    for b, row in enumerate(padded):
        for q, k in itertools.product(range(length), repeat=2):
            real = row[q] is not None and row[k] is not None
            expected[b, 0, q, k] = q == k or (real and (k <= q or looks_ahead(mask_type, block, row[q], row[k])))
    assert torch.equal(dense_mask(layout, mask_type), expected)

    rule = attention_rule(layout, mask_type)
    assert torch.equal(create_mask(rule, len(rows), 1, length, length, device="cpu"), expected)


CASES = [(mask_type, block, True) for mask_type in MASK_TYPES for block in IMAGE_BLOCKS] + [("image", "image", False)]
PROMPTS = {  # a text with its images
    "a <image> b": [picture((40, 20), 1)],
    "c d": [],
    "<image><image> is it red": [picture((20, 44), 2), picture((16, 16), 3)],
}


@pytest.mark.parametrize("mask_type, block, tile_marks", CASES)
@torch.no_grad()
def test_generation_and_batches_of_tiles_are_exact(processor, make_model, mask_type, block, tile_marks):
    """In float64: a batch with padding gives the logits and tokens of each row alone, tokens with a cache are those without one, and the
    processor's dense mask gives the same logits."""
    own, model = tiled(processor, tile_marks=tile_marks), make_model(mask_type, image_block=block).double()
    batch = own(images=list(PROMPTS.values()), text=list(PROMPTS), padding=True, return_tensors="pt")
    tokens = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    needs_prompt = get_mask_type(mask_type).needs_prompt

    def logits(inputs) -> torch.Tensor:
        prompt = {"prompt_mask": inputs["attention_mask"].bool()} if needs_prompt else {}
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # rotary angles are in float32
        return model(**inputs, **prompt, position_ids=positions).logits

    together = logits(batch)
    for row, (text, images) in enumerate(PROMPTS.items()):
        given = {"images": images or None, "text": text, "return_tensors": "pt"}
        single = own(**given)
        alone = logits(single)
        length = alone.shape[1]
        torch.testing.assert_close(together[row, -length:], alone[0], atol=1e-10, rtol=1e-10)
        ready = own(**given, dense_mask_type=mask_type, image_block=block)
        torch.testing.assert_close(model(**ready).logits, alone, atol=1e-10, rtol=1e-10)
        assert torch.equal(model.generate(**single, **GREEDY, use_cache=False)[0, length:], tokens[row])


@torch.no_grad()
def test_blocks_and_marks_matter(processor, make_model):
    """Else the tests above would compare equal with equal: the blocks give other logits, and an image's other tiles are seen."""
    own = tiled(processor)
    batch = own(images=picture((40, 20)), text="<image> a", return_tensors="pt")
    found = {block: make_model(image_block=block).double()(**batch).logits for block in IMAGE_BLOCKS}
    assert (found["tile"] - found["image"]).abs().max() > 1e-3
    first = batch["input_ids"].shape[1] - batch["input_ids"][0].tolist()[::-1].index(own.image_token_id) - 1
    changed = batch["pixel_values"].clone()
    changed[-1] += 1  # the last tile
    for block, sees in (("tile", False), ("image", True)):
        model = make_model(image_block=block).double()
        logits = model(**{**batch, "pixel_values": changed}).logits
        assert bool((logits[0, 0] != found[block][0, 0]).any()) == sees and first > 0


def test_image_ids_that_got_lost_are_asked_for(processor, make_model):
    batch = tiled(processor)(images=picture((40, 20)), text="<image> a", return_tensors="pt")
    del batch["image_ids"]
    with pytest.raises(ValueError, match="image_block='image' needs `image_ids`"):
        make_model(image_block="image")(**batch)
    make_model(image_block="tile")(**batch)  # every four image tokens are one


@torch.no_grad()
def test_embeddings_with_tiles_have_the_mask_of_their_tokens(processor, make_model):
    own = tiled(processor)
    batch = own(images=picture((40, 20)), text="<image> a", return_tensors="pt")
    for block in IMAGE_BLOCKS:
        model = make_model(image_block=block).double()
        expected = model(**batch).logits
        is_image = batch["mm_token_type_ids"] == 1
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        embeddings = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(is_image[..., None], features)
        given = {"inputs_embeds": embeddings, "image_ids": batch["image_ids"]}
        found = model(**given, mm_token_type_ids=batch["mm_token_type_ids"]).logits
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    model = make_model(image_block="tile").double()
    with pytest.raises(ValueError, match="needs `mm_token_type_ids`"):
        model(**given)


@torch.no_grad()
def test_a_later_turn_with_a_tiled_image_goes_on_from_the_cache(processor, make_model):
    own, model = tiled(processor), make_model(image_block="image").double()
    one, two = picture((40, 20), 1), picture((20, 44), 2)
    first = own(images=one, text="a <image> b", return_tensors="pt")
    both = own(images=[one, two], text="a <image> b c <image> d", return_tensors="pt")
    cache = {CACHE_NAME: DynamicCache(config=model.config.text_config)}
    model(**first, **cache)
    assert torch.equal(both["input_ids"][:, : first["input_ids"].shape[1]], first["input_ids"])
    found = model.generate(**both, **cache, **GREEDY)
    assert torch.equal(found, model.generate(**both, **GREEDY))


def test_numbers_of_images_follow_their_lengths():
    ids = [7, 1, 1, 5, 1, 1, 1, 1, 8, 1]  # the last one stands for no image
    assert number_images(ids, 1, iter([4, 2])) == [-1, 0, 0, 0, 0, 0, 1, 1, -1, -1]
