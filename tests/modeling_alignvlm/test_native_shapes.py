"""Images in their native shape (SigLIP 2 NaFlex): the grid, the patches, the tokens, and what padding may not change."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DynamicCache
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from alignvlm.stages.chat_templates import PLAIN_TEMPLATE
from modeling_alignvlm import CACHE_NAME, AlignVLMConfig, AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, get_mask_type
from tests import examples
from tests.modeling_alignvlm.test_tiles import GREEDY, picture


PATCH, MOST = 4, 24
NATIVE = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "num_patches": 16,
}
SIZES = [(20, 20), (60, 10), (8, 40), (30, 20)]  # width, height
PROJECTORS = [("mlp", 1), ("mlp", 2), ("linear", 2), ("pool", 2)]


def native(processor, factor: int = 1, most: int = MOST, **options) -> AlignVLMProcessor:
    """The tiny processor with SigLIP 2's image processor."""
    return AlignVLMProcessor(
        Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=most),
        processor.tokenizer,
        image_seq_length=most // factor**2,
        chat_template=PLAIN_TEMPLATE,
        pixel_shuffle_factor=factor,
        **options,
    )


def native_model(make_model, mask_type: str = "image", factor: int = 1, **config):
    """As `make_model`, with an encoder of native shapes. Its weights are large, so that what a patch sees matters."""
    fields = {"vision": NATIVE, "pixel_shuffle_factor": factor, "max_num_patches": MOST, **config}
    model = make_model(mask_type, **fields)
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def make_native(make_model):
    return partial(native_model, make_model)


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 3]), st.integers(9, 60))
def test_a_grid_fits_and_turns_with_the_image(processor, height, width, factor, most):
    own = native(processor, factor, most)
    rows, columns = own.image_grid((height, width))
    fitting = most // factor**2
    assert rows >= 1 and columns >= 1 and rows * columns <= fitting
    assert own.token_count((rows, columns)) == rows * columns
    assert own.image_grid((width, height)) == (columns, rows)


@pytest.mark.parametrize("size", SIZES)
def test_without_pixel_shuffle_patches_are_those_of_the_image_processor(processor, size):
    own, image = native(processor), picture(size)
    found = own(images=image, text="<image>", return_tensors="pt")
    expected = own.image_processor(image, return_tensors="pt")
    assert torch.equal(found["spatial_shapes"], expected["spatial_shapes"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert found["input_ids"].tolist() == [[own.image_token_id] * int(expected["pixel_attention_mask"].sum())]
    assert "pixel_attention_mask" not in found


@pytest.mark.parametrize("factor", [1, 2])
def test_patches_are_the_whole_image_at_the_size_of_its_grid(processor, factor):
    """Row by row, each patch row by row with its colours last; what is behind them is padding."""
    own = native(processor, factor)
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    batch = own.process_images(images, return_tensors="np")
    assert batch["pixel_values"].shape == (4, MOST, 3 * PATCH**2)
    for image, values, (rows, columns), grid in zip(
        images, batch["pixel_values"], batch["spatial_shapes"], batch["image_grids"]
    ):
        assert (rows, columns) == (grid[0] * factor, grid[1] * factor) and grid == own.image_grid(image.size[::-1])
        resized = np.asarray(image.resize((columns * PATCH, rows * PATCH), Image.Resampling.BILINEAR), np.float64)
        for row, column in itertools.product(range(rows), range(columns)):
            expected = resized[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] / 127.5 - 1
            np.testing.assert_allclose(values[row * columns + column], expected.ravel(), atol=1e-5)
        assert not values[rows * columns :].any()


def test_texts_have_a_token_for_each_place_and_say_which_image_it_is_of(processor):
    own = native(processor, 2)
    images = [picture((60, 10)), picture((20, 20))]
    batch = own(images=images, text="a <image><image> b", return_tensors="pt")
    counts = [own.token_count(own.image_grid(image.size[::-1])) for image in images]
    assert counts[0] != counts[1]
    ids, image_ids = batch["input_ids"][0].tolist(), batch["image_ids"][0].tolist()
    assert own.decode(ids) == "a " + "<image>" * sum(counts) + " b"
    assert [index for index in image_ids if index >= 0] == [0] * counts[0] + [1] * counts[1]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["image_ids"] >= 0)
    found = own._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])
    assert found["num_image_tokens"] == counts and found["num_image_patches"] == [1, 1]
    assert {"spatial_shapes", "image_ids"} <= set(own.model_input_names) and set(batch) == set(own.model_input_names)


def by_hand(model, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The tokens of one image `(tokens, hidden)`: its patches alone through the encoder, then each square through the projector."""
    outputs = model.model.vision_tower(
        pixel_values=patches[None],
        pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.long),
        spatial_shapes=torch.tensor([[rows, columns]]),
    )
    places = outputs.last_hidden_state[0].reshape(rows, columns, -1)
    projector, factor = model.model.projector, model.config.pixel_shuffle_factor
    tokens = []
    for row, column in itertools.product(range(0, rows, factor), range(0, columns, factor)):
        square = [places[row + y, column + x] for y in range(factor) for x in range(factor)]
        joined = sum(square) / len(square) if projector.pools else torch.cat(square)
        tokens.append(projector.layers(joined))
    return torch.stack(tokens)


@pytest.mark.parametrize("projector_type, factor", PROJECTORS)
@torch.no_grad()
def test_an_image_has_the_same_tokens_alone_and_beside_larger_ones(processor, make_native, projector_type, factor):
    """In float64, and whatever stands in the padding."""
    own, model = native(processor, factor), make_native(factor=factor, projector_type=projector_type).double()
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    batch = own.process_images(images, return_tensors="pt")
    values, shapes = batch["pixel_values"].double(), batch["spatial_shapes"]
    expected = [by_hand(model, own_values[: r * c], r, c) for own_values, (r, c) in zip(values, shapes.tolist())]
    counts = [len(tokens) for tokens in expected]
    assert len(set(counts)) > 1 and counts == [own.token_count(grid) for grid in batch["image_grids"]]
    for index, (rows, columns) in enumerate(shapes.tolist()):
        values[index, rows * columns :] = 1e3
    together = model.get_image_features(values, shapes).pooler_output
    torch.testing.assert_close(together, torch.cat(expected)[None], atol=1e-10, rtol=1e-10)
    for index, tokens in enumerate(expected):
        alone = model.get_image_features(values[index : index + 1], shapes[index : index + 1]).pooler_output
        torch.testing.assert_close(alone[0], tokens, atol=1e-10, rtol=1e-10)
    changed = values.clone()
    changed[0, 0] += 1
    assert (model.get_image_features(changed, shapes).pooler_output[0, : counts[0]] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["concatenate", "weighted_sum"])
@torch.no_grad()
def test_several_layers_leave_out_padding_too(processor, make_native, fusion):
    own = native(processor, 2)
    model = make_native(factor=2, vision_feature_layer=[1, -1], vision_layer_fusion=fusion).double()
    batch = own.process_images([picture((60, 10)), picture((20, 20))], return_tensors="pt")
    values, shapes = batch["pixel_values"].double(), batch["spatial_shapes"]
    together = model.get_image_features(values, shapes).pooler_output[0]
    alone = []
    for own_values, (rows, columns) in zip(values, shapes.tolist()):
        patches, grid = own_values[None, : rows * columns], torch.tensor([[rows, columns]])
        alone.append(model.get_image_features(patches, grid).pooler_output[0])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=1e-10)


PROMPTS = {  # a text with its images
    "a <image> b": [picture((60, 10), 1)],
    "c d": [],
    "<image><image> is it red": [picture((8, 40), 2), picture((20, 20), 3)],
}


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@torch.no_grad()
def test_generation_and_batches_are_exact(processor, make_native, mask_type, factor):
    """In float64: a batch with padding gives the logits and tokens of each row alone, tokens with a cache are those without one, and the
    processor's dense mask gives the same logits. Two adjacent images stay two."""
    own, model = native(processor, factor), make_native(mask_type, factor).double()
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
        ready = own(**given, dense_mask_type=mask_type)
        torch.testing.assert_close(model(**ready).logits, alone, atol=1e-10, rtol=1e-10)
        assert torch.equal(model.generate(**single, **GREEDY, use_cache=False)[0, length:], tokens[row])
        expected = torch.zeros(length, length, dtype=torch.bool)
        image_of = single["image_ids"][0].tolist()
        for q, k in itertools.product(range(length), repeat=2):
            same = image_of[q] == image_of[k] >= 0
            ahead = {"causal": False, "image": same, "prefix": True, "mutual": same or image_of[q] >= 0}
            expected[q, k] = k <= q or ahead.get(mask_type, False)
        if mask_type in ("causal", "image", "prefix", "mutual"):  # others are added in docs/extend.md
            assert torch.equal(ready["attention_mask"][0, 0], expected)


@torch.no_grad()
def test_adjacent_images_that_were_counted_otherwise_give_other_logits(processor, make_native):
    """Else the test above would compare equal with equal."""
    own, model = native(processor), make_native().double()
    batch = own(images=[picture((8, 40)), picture((20, 20))], text="<image><image> a", return_tensors="pt")
    merged = {**batch, "image_ids": batch["image_ids"].clamp(max=0)}
    assert (model(**batch).logits - model(**merged).logits).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
@torch.no_grad()
def test_beams_and_samples_see_their_own_images(processor, make_native, options):
    own, model = native(processor, 2), make_native(factor=2).double()
    batch = own(images=list(PROMPTS.values()), text=list(PROMPTS), padding=True, return_tensors="pt")
    given = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": False, **options}
    together = model.generate(**batch, **given)[:, batch["input_ids"].shape[1] :]
    alone = []
    for text, images in PROMPTS.items():
        single = own(images=images or None, text=text, return_tensors="pt")
        alone.append(model.generate(**single, **given)[:, single["input_ids"].shape[1] :])
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_a_later_turn_on_a_kept_cache_takes_only_the_new_image(processor, make_native):
    own, model = native(processor), make_native().double()
    first, second = picture((60, 10), 1), picture((20, 20), 2)
    before = own(images=[first], text="a <image> b", return_tensors="pt")
    outputs = model(**before, use_cache=True)
    cache = getattr(outputs, CACHE_NAME)
    assert isinstance(cache, DynamicCache)
    both = own(images=[first, second], text="a <image> b c <image> d", return_tensors="pt")
    length = before["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][:, :length], before["input_ids"])
    expected = model.generate(**both, **GREEDY)
    assert torch.equal(model.generate(**both, **GREEDY, **{CACHE_NAME: cache}), expected)


@torch.no_grad()
def test_embeddings_with_images_in_place_give_the_same_logits(processor, make_native):
    own, model = native(processor, 2), make_native(factor=2).double()
    batch = own(images=[picture((60, 10)), picture((20, 20))], text="<image><image> a", return_tensors="pt")
    expected = model(**batch).logits
    features = model.get_image_features(batch["pixel_values"], batch["spatial_shapes"]).pooler_output
    is_image = batch["image_ids"] >= 0
    embeddings = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(is_image[..., None], features)
    kept = {name: batch[name] for name in ("attention_mask", "mm_token_type_ids", "image_ids")}
    torch.testing.assert_close(model(inputs_embeds=embeddings, **kept).logits, expected)
    encoded = model.model.encode_images(batch["pixel_values"], batch["spatial_shapes"])
    given = {name: batch[name] for name in ("input_ids", *kept)}
    torch.testing.assert_close(model.model(image_features=encoded, **given)[0], model.model(**batch)[0])


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
@torch.no_grad()
def test_kernels_agree(processor, make_native, kernel):
    own = native(processor)
    batch = own(images=list(PROMPTS.values()), text=list(PROMPTS), padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    # Not compiled: inductor's flex attention for AVX2 gives NaN in a batch with padding.
    with torch.compiler.set_stance("force_eager"):
        found, expected = (make_native(attn_implementation=each)(**batch).logits[real] for each in (kernel, "sdpa"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_training_without_images_keeps_the_encoder_in_the_graph(processor, make_native):
    model = make_native(factor=2).train()
    ids = torch.tensor([[5, 6, 7]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.projector.parameters())
    assert all(p.grad is not None for p in model.model.vision_tower.parameters())
    assert not any(p.grad.any() for p in model.model.vision_tower.parameters())


def test_a_checkpoint_remembers_it_and_others_say_nothing_of_it(processor, make_native, make_model, tmp_path):
    own, model = native(processor, 2), make_native(factor=2)
    own.save_pretrained(tmp_path / "native")
    model.save_pretrained(tmp_path / "native")
    again = AlignVLMProcessor.from_pretrained(tmp_path / "native")
    assert again.native_shapes and again.pixel_shuffle_factor == 2 and again.image_processor.max_num_patches == MOST
    config = AlignVLMConfig.from_pretrained(tmp_path / "native")
    assert (
        config.max_num_patches == MOST
        and config.image_seq_length == MOST // 4
        and config.to_dict() == model.config.to_dict()
    )
    batch = [p(images=picture((60, 10)), text="<image> a", return_tensors="pt") for p in (own, again)]
    with torch.no_grad():
        loaded = type(model).from_pretrained(tmp_path / "native")
        assert torch.equal(loaded(**batch[1]).logits, model(**batch[0]).logits)
    processor.save_pretrained(tmp_path / "squares")
    make_model().config.save_pretrained(tmp_path / "squares")
    assert "pixel_shuffle_factor" not in (tmp_path / "squares" / "processor_config.json").read_text()
    assert "max_num_patches" not in (tmp_path / "squares" / "config.json").read_text()
    assert AlignVLMConfig(vision_config=NATIVE).max_num_patches == 16  # as the encoder's config says


def test_what_cannot_be_is_refused(processor, make_model, make_native):
    with pytest.raises(ValueError, match="max_num_patches=24 is for encoders that take images in their native shape"):
        make_model(max_num_patches=24)
    with pytest.raises(ValueError, match="merge_image_tokens=3 leaves every image as many tokens"):
        make_native(merge_image_tokens=3)
    with pytest.raises(ValueError, match="image_block='tile' is for images that are cut into tiles"):
        make_native(image_block="tile")
    with pytest.raises(ValueError, match="max_num_patches=3 must be"):
        make_native(factor=2, max_num_patches=3)
    with pytest.raises(ValueError, match="max_tiles=2 cuts images into tiles, and Siglip2ImageProcessorPil"):
        native(processor, max_tiles=2)
    with pytest.raises(ValueError, match="has no 'image_size'"):
        _ = make_native().config.feature_grid

    own, model = native(processor), make_native()
    batch = own(images=picture((60, 10)), text="<image> a", return_tensors="pt")
    without = {name: value for name, value in batch.items() if name != "image_ids"}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"takes images in native shape.*needs `image_ids`"):
            call(**without, **({"num_beams": 2} if call != model else {}))
    with pytest.raises(ValueError, match=r"and `spatial_shapes` \(\); expected \(images, patches, values\)"):
        model(**{**batch, "spatial_shapes": None})
    for wrong in ([[1, MOST + 1]], [[0, 4]], [[3, 2]]):
        with pytest.raises(ValueError, match=r"`spatial_shapes` is \[\["):
            make_native(factor=2)(**{**batch, "spatial_shapes": torch.tensor(wrong)})
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**{**batch, "spatial_shapes": torch.tensor([[1, 2]])})
