"""The model: every attention kernel and way of decoding gives the same numbers, and every bad input a clear error."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3Config, SiglipVisionConfig, StaticCache
from transformers.exporters.utils import decompose_multimodal
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from modeling_alignvlm import CACHE_NAME, AlignVLMConfig, AlignVLMForConditionalGeneration, TokenLayout, dense_mask
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests.conftest import VISION
from tests.running import recompute_activations


IMAGE = -7  # stands for an image of four tokens in the rows below


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Builds `(inputs, pixel_values)` from rows of token ids and IMAGE, padded on either side."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")

    def build(*given, side="right"):
        expanded = [[t for x in row for t in ([image_token] * 4 if x == IMAGE else [x])] for row in given]
        length = max(map(len, expanded))
        pad = [[0] * (length - len(row)) for row in expanded]
        ones = [[1] * len(row) for row in expanded]
        join = (lambda a, b: b + a) if side == "left" else (lambda a, b: a + b)
        generator = torch.Generator().manual_seed(0)
        images = sum(row.count(IMAGE) for row in given)
        inputs = {
            "input_ids": torch.tensor([join(row, p) for row, p in zip(expanded, pad)]),
            "attention_mask": torch.tensor([join(row, p) for row, p in zip(ones, pad)]),
        }
        if images:
            inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        return inputs

    return build


def use_kernel(model, kernel: str) -> None:
    """Sets the attention kernel. PyTorch 2.13's C++ code for flex attention with dynamic shapes does not compile on a CPU, so
    each use starts from an empty cache and compiles for its own shape."""
    torch.compiler.reset()
    model.set_attn_implementation(kernel)


def with_prompt_mask(inputs, mask_type):
    prompt_mask = {"prompt_mask": inputs["attention_mask"].bool()}
    return inputs | (prompt_mask if MASK_TYPES[mask_type].needs_prompt else {})


@pytest.mark.parametrize(
    "mask_type, row", [("image", [5, IMAGE, IMAGE, 6]), ("image", [5, 6, 7]), ("mutual", [5, IMAGE, 6])]
)
@torch.no_grad()
def test_a_forward_pass_can_be_exported(make_model, rows, mask_type, row):
    """As those of transformers' own classes can: no step of it depends on what the tokens are."""
    model = make_model(mask_type)
    inputs = {**with_prompt_mask(rows(row), mask_type), "use_cache": False}
    exported = torch.export.export(model, (), kwargs=inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_attention_kernels_agree_and_apply_the_dense_mask(make_model, rows, tokenizer, mask_type, side):
    """The reference is SDPA in float64. Eager attention rounds its probabilities to float32 in any dtype and flex attention has no float64
    on a CPU: in float32, logits of 7 were up to 3e-5 away from it, and one wrong entry of the mask moves one by 8e-3 or more."""
    given = rows([5, IMAGE, IMAGE, 6, 7], [8, IMAGE, 9], side=side)
    real = given["attention_mask"].bool()
    layout = TokenLayout.from_input_ids(
        *(given["input_ids"], make_model().config.image_token_id, 4),
        attention_mask=given["attention_mask"],
        prompt_mask=real,
    )
    model, expected = make_model(mask_type), None
    for kernel, dtype, tolerance in (
        ("sdpa", torch.float64, 5e-6),  # RMS norms round to float32
        ("eager", torch.float32, 2e-4),
        ("flex_attention", torch.float32, 2e-4),
    ):
        model.to(dtype)
        use_kernel(model, kernel)
        inputs = {**given, "pixel_values": given["pixel_values"].to(dtype)}
        logits = model(**with_prompt_mask(inputs, mask_type)).logits[real].double()
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
        if side == "right":  # positions of left-padded rows depend on the 2D mask only through generate
            use_kernel(model, kernel)
            dense = model(**{**inputs, "attention_mask": dense_mask(layout, mask_type)}).logits[real].double()
            torch.testing.assert_close(dense, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_mask_types_differ_where_images_are(make_model, rows):
    inputs = rows([5, IMAGE, 6, 7])
    logits = {m: make_model(m)(**with_prompt_mask(inputs, m)).logits for m in MASK_TYPES}
    for a, b in [("causal", "image"), ("image", "prefix"), ("image", "mutual"), ("prefix", "mutual")]:
        assert (logits[a] - logits[b]).abs().max() > 1e-3, (a, b)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@torch.no_grad()
def test_cached_uncached_and_static_decoding_agree(make_model, rows, mask_type):
    model = make_model(mask_type)
    inputs = rows([5, IMAGE, 6, 7, IMAGE, 8], [9, IMAGE, 10], side="left")
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**inputs, **options)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        again = model.generate(**inputs, **options, **other)
        assert torch.equal(again.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(cached.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_equals_a_forward_pass_over_the_whole_row(make_model, rows):
    model = make_model("image")
    inputs = rows([5, IMAGE, 6, 7])
    sequence = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = model(input_ids=sequence, pixel_values=inputs["pixel_values"]).logits
    length = inputs["input_ids"].shape[1]
    assert torch.equal(whole[:, length - 1 : -1].argmax(-1), sequence[:, length:])


@torch.no_grad()
def test_multi_token_continuation_of_a_cache_equals_one_pass(make_model, rows):
    """A second turn with an image of its own, behind a cached first turn; dynamic and static cache."""
    model = make_model("image")
    inputs = rows([5, IMAGE, 6, 7, IMAGE, 8, 9])
    whole = model(**inputs).logits
    for cache in (None, StaticCache(model.config.text_config, max_cache_len=20)):
        first = model(
            input_ids=inputs["input_ids"][:, :7],
            pixel_values=inputs["pixel_values"][:1],
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        second = model(
            input_ids=inputs["input_ids"][:, 7:],
            pixel_values=inputs["pixel_values"][1:],
            attention_mask=inputs["attention_mask"],
            **{CACHE_NAME: getattr(first, CACHE_NAME)},
        )
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batch_of_many_equals_batches_of_one(make_model, rows):
    model = make_model("image")
    given = ([5, IMAGE, 6, 7], [8, IMAGE, IMAGE, 9], [10, 11, 12])
    many = rows(*given, side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**many, **options)[:, many["input_ids"].shape[1] :]
    images = many["pixel_values"].split([1, 2, 0])
    for index, row in enumerate(given):
        one = rows(row)
        if len(images[index]):
            one["pixel_values"] = images[index]
        alone = model.generate(**one, **options)[:, one["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[index]), index


@torch.no_grad()
def test_beams_keep_each_row_with_its_own_images(make_model, rows):
    model = make_model("image")
    given = ([5, IMAGE, 6], [8, IMAGE, IMAGE, 9])
    many = rows(*given, side="left")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    types = (many["input_ids"] == model.config.image_token_id).long()
    _, expanded = model._expand_inputs_for_generation(
        3, input_ids=many["input_ids"], pixel_values=many["pixel_values"], mm_token_type_ids=types
    )
    order = [0, 0, 0, 1, 2, 1, 2, 1, 2]  # each beam of a row, one after the other, with all of that row's images
    assert torch.equal(expanded["pixel_values"], many["pixel_values"][order])
    together = model.generate(**many, **options)
    for index, images in enumerate(many["pixel_values"].split([1, 2])):
        one = {**rows(given[index]), "pixel_values": images}
        alone = model.generate(**one, **options)
        assert torch.equal(alone.sequences[0, -5:], together.sequences[index, -5:])
        torch.testing.assert_close(alone.sequences_scores[0], together.sequences_scores[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_inputs_embeds_with_token_types_equal_input_ids(make_model, rows):
    model = make_model("image")
    inputs = rows([5, IMAGE, IMAGE, 6])
    expected = model(**inputs).logits
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    actual = model(inputs_embeds=embeds, mm_token_type_ids=types, pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(actual, expected)


def test_text_alone_is_the_language_model(make_model, rows):
    """Text-only rows, also padded ones, give exactly what the language model alone gives."""
    model = make_model("image")
    inputs = rows([5, 6, 7], [8, 9], side="left")
    with torch.no_grad():
        expected = model.lm_head(model.model.language_model(**inputs).last_hidden_state)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)


VISION_ENCODERS = {
    "siglip_vision_model": {},
    "clip_vision_model": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "vit": {},
}


@pytest.mark.parametrize("model_type", VISION_ENCODERS)
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_vision_encoders_yield_one_token_per_patch(make_model, rows, model_type, layer):
    vision = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        **VISION_ENCODERS[model_type],
    }
    model = make_model(vision=vision, vision_feature_layer=layer)
    inputs = rows([5, IMAGE, 6])
    features = model.get_image_features(inputs["pixel_values"])
    assert features.last_hidden_state.shape == (1, 4, 32) and features.pooler_output.shape == (1, 4, 32)
    outputs = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    whole = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    assert torch.equal(features.last_hidden_state, whole[:, -4:])
    assert model(**inputs).logits.shape[:2] == (1, 6)


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_image_features_come_with_the_states_that_are_asked_for(make_model, rows, layer):
    model = make_model(vision_feature_layer=layer, attn_implementation="eager")
    pixels = rows([5, IMAGE, IMAGE])["pixel_values"]
    asked = {"output_hidden_states": True, "output_attentions": True}
    features, encoder = model.get_image_features(pixels, **asked), model.model.vision_tower(pixels, **asked)
    for name in ("hidden_states", "attentions"):
        assert len(features[name]) == len(encoder[name]) > 0
        for actual, expected in zip(features[name], encoder[name]):
            torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    assert set(model.get_image_features(pixels)) == {"last_hidden_state", "pooler_output"}


LANGUAGE_MODELS = {
    "qwen2": {},
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 3},
    "gemma2": {"head_dim": 16, "sliding_window": 3},
    "gemma3_text": {"head_dim": 16, "sliding_window": 3},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@torch.no_grad()
def test_language_models_decode_alike_with_and_without_cache(make_model, rows, model_type):
    text = {"model_type": model_type, **LANGUAGE_MODELS[model_type]}
    kernel = "eager" if model_type == "gemma2" else "sdpa"
    model = make_model("image", text=text, attn_implementation=kernel)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied, whatever the embeddings are called
    inputs = rows([5, IMAGE, 6, 7, 8], [9, IMAGE, IMAGE, 10], side="left")
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, uncached = model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-3, rtol=1e-3)
    causal = make_model("causal", text=text, attn_implementation=kernel)
    assert (causal(**inputs).logits - model(**inputs).logits).abs().max() > 1e-4  # the mask reaches the kernel


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_a_vocabulary_grows_in_the_embeddings_and_the_head(make_model, model_type):
    """Wherever a language model keeps its embeddings."""
    model = make_model(text={"model_type": model_type, **LANGUAGE_MODELS[model_type]}, attn_implementation="eager")
    size = model.config.text_config.vocab_size + 8
    model.resize_token_embeddings(size)
    embeddings = model.get_input_embeddings()
    assert embeddings is model.model.get_input_embeddings() is model.model.language_model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head and model.lm_head.weight is embeddings.weight
    assert len(embeddings.weight) == size


ALTERNATING = {
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 6},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "sliding_window": 6},
    "mistral": {"sliding_window": 6},
}


@pytest.mark.parametrize("model_type", ALTERNATING)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@torch.no_grad()
def test_windows_are_kept_in_every_cache_and_under_a_ready_mask(make_model, rows, processor, model_type, mask_type):
    """The size of a static cache was taken from the first layer, and a ready mask put every layer out of its window."""
    model = make_model(mask_type, text={"model_type": model_type, **ALTERNATING[model_type]}).double()
    inputs = rows([5, IMAGE, 6, 7, 8, 9, 10], [9, IMAGE, 10], side="left")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
    expected = model.generate(**inputs, **options, return_dict_in_generate=True, use_cache=False)
    for kind in ({}, {"cache_implementation": "static"}):
        found = model.generate(**inputs, **options, return_dict_in_generate=True, **kind)
        assert torch.equal(found.sequences, expected.sequences), kind
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-10, rtol=1e-10)

    plain, real = with_prompt_mask(inputs, mask_type), inputs["attention_mask"].bool()
    layout = TokenLayout.from_input_ids(
        inputs["input_ids"], processor.image_token_id, 4, attention_mask=real, prompt_mask=real
    )
    ready = {**inputs, "attention_mask": dense_mask(layout, mask_type)}
    narrow = model(**plain).logits[real]
    torch.testing.assert_close(model(**ready).logits[real], narrow, atol=1e-10, rtol=1e-10)
    model.model.language_model.config.sliding_window = 100
    assert (model(**plain).logits[real] - narrow).abs().max() > 1e-3  # the window hides something here


@torch.no_grad()
def test_sliding_window_hides_what_is_far_behind_but_not_the_image_ahead(make_model, rows):
    model = make_model("image", text={"model_type": "mistral", "sliding_window": 2, "num_hidden_layers": 1})
    inputs = rows([IMAGE, 5, 6, 7, 8, 9])
    changed = inputs["pixel_values"] + 1.0
    before, after = model(**inputs).logits, model(**{**inputs, "pixel_values": changed}).logits
    assert torch.allclose(before[:, 5:], after[:, 5:])  # further than the window behind the image
    assert not torch.allclose(before[:, 4], after[:, 4])


@torch.no_grad()
def test_a_kernel_that_the_encoder_lacks_is_set_for_the_language_model_alone(make_model, rows):
    """As at loading. `eager` could be set, and nothing else after it."""
    encoder = {"model_type": "convnext", "num_channels": 3, "patch_size": 4, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}  # fmt: skip
    sizes = {"image_size": [16, 16], "image_grid": [2, 2], "vision_hidden_size": 32}
    model = make_model(vision={**encoder, "image_size": 16}, **sizes).double()
    inputs = rows([5, IMAGE, 6])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = model(**inputs).logits
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        assert model.model.language_model.config._attn_implementation == kernel
        torch.testing.assert_close(
            model(**inputs).logits, expected, atol=1e-5, rtol=1e-5
        )  # eager softmax is in float32
    with pytest.raises(ValueError, match="triangular"):
        model.set_attn_implementation("triangular")


@pytest.mark.parametrize("projector_type", ["mlp", "linear", "pool"])
@torch.no_grad()
def test_an_encoder_may_compute_in_16_bit(make_model, rows, projector_type):
    model = make_model(projector_type=projector_type)
    inputs = rows([5, IMAGE, 6])
    model.model.vision_tower.bfloat16()
    features = model.model.encode_images(inputs.pop("pixel_values").bfloat16())
    assert features.dtype == torch.bfloat16
    found, expected = (model(**inputs, image_features=given).logits for given in (features, features.float()))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "given", [{"pad_token_id": 0}, {"eos_token_id": [1, 2]}, {"tokenizer_class": "GPT2Tokenizer"}]
)
def test_what_a_script_sets_in_the_configuration_is_saved_and_loaded(make_model, tmp_path, given):
    """`model.config.pad_token_id = ...` before training made a checkpoint that nobody could load."""
    model = make_model()
    for name, value in given.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    loaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in given} == given


@pytest.mark.parametrize(
    "projector",
    [
        {"projector_type": "linear"},
        {"projector_type": "pool"},
        {"pixel_shuffle_factor": 2},
        {"projector_type": "pool", "pixel_shuffle_factor": 2},
    ],
)
@torch.no_grad()
def test_projectors(make_model, rows, projector):
    model = make_model(**projector)
    tokens = model.config.image_seq_length
    assert tokens == (1 if "pixel_shuffle_factor" in projector else 4)
    assert model.get_image_features(torch.randn(2, 3, 16, 16)).pooler_output.shape == (2, tokens, 32)


def test_pixel_shuffle_stacks_neighbouring_patches(make_model):
    vision = {"model_type": "siglip_vision_model", "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 4}
    vision |= {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    projector = make_model(vision=vision, pixel_shuffle_factor=2).model.projector
    patches = torch.arange(16.0).reshape(1, 16, 1).expand(1, 16, 2)
    stacked = projector.pixel_shuffle(patches)[0, :, ::2]
    assert stacked.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@torch.no_grad()
def test_the_pooling_projector_computes_what_that_of_gemma_3_does(make_model):
    vision = {**VISION, "image_size": 48, "layer_norm_eps": 1e-5}
    model = make_model(vision=vision, text={"hidden_size": 24}, projector_type="pool", pixel_shuffle_factor=3)
    projector = model.model.projector
    norm, linear = projector.layers
    norm.weight.uniform_(0.3, 3.0)
    vision_config = SiglipVisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
    gemma = Gemma3MultiModalProjector(
        Gemma3Config(text_config={"hidden_size": 24}, vision_config=vision_config, mm_tokens_per_image=4)
    )
    gemma.mm_soft_emb_norm.weight.copy_(norm.weight - 1)  # Gemma's norms multiply by one more than their weight
    gemma.mm_input_projection_weight.copy_(linear.weight.T)
    features = torch.randn(2, 36, 32)
    expected = gemma(features)
    assert expected.shape == (2, 4, 24) and expected.abs().max() > 0.1
    torch.testing.assert_close(projector(features), expected, atol=1e-6, rtol=1e-6)


def test_the_pooling_projector_takes_grids_that_are_not_square(make_model):
    grid = {"image_size": [32, 64], "image_grid": [4, 8], "pixel_shuffle_factor": 2, "projector_type": "pool"}
    projector = make_model(**grid).model.projector
    features = torch.randn(2, 32, 32)
    expected = torch.nn.functional.avg_pool2d(features.transpose(1, 2).reshape(2, 32, 4, 8), 2)
    torch.testing.assert_close(projector.average(features), expected.flatten(2).transpose(1, 2))
    with pytest.raises(
        ValueError, match="pixel_shuffle_factor=3 must be at least 1 and divide the feature grid of 4 x 8"
    ):
        make_model(**{**grid, "pixel_shuffle_factor": 3})


def test_exporters_of_transformers_find_every_part(make_model, rows):
    model = make_model("image")
    parts = decompose_multimodal(model, rows([5, IMAGE, 6]))
    assert parts["multi_modal_projector"][0] is model.model.projector
    assert parts["image_encoder"][0] is model.model.vision_tower
    assert parts["language_model"][0] is model.model.language_model and parts["lm_head"][0] is model.lm_head
    assert not any("multi_modal" in name for name in model.state_dict())  # the name in checkpoints stays


@pytest.mark.parametrize(
    "projector_type, names",
    [
        ("linear", {"weight", "bias"}),
        ("mlp", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("pool", {"0.weight", "1.weight"}),
    ],
)
def test_weights_have_the_names_of_format_2(make_model, tmp_path, projector_type, names):
    """Code of any release with this format finds them in what this code saves, and this code in what that one saved."""
    model = make_model(projector_type=projector_type)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    stored = load_file(tmp_path / "model.safetensors")
    others = ("model.vision_tower.", "model.language_model.", "lm_head.")
    assert {name for name in stored if not name.startswith(others)} == {
        f"model.projector.layers.{name}" for name in names
    }
    again, info = AlignVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in stored.items())


def test_loss_is_that_of_the_labels_and_honours_num_items_in_batch(make_model, rows):
    model = make_model()
    inputs = rows([5, IMAGE, 6, 7, 8])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -3:-1], labels[0, -2:], reduction="sum")
    torch.testing.assert_close(output.loss, expected / 2)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=torch.tensor(8)).loss, expected / 8)


@torch.no_grad()
def test_logits_to_keep(make_model, rows):
    model, inputs = make_model(), rows([5, IMAGE, 6, 7])
    whole = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_activation_checkpointing_changes_no_gradient(make_model, rows):
    inputs = rows([5, IMAGE, 6, 7])
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            recompute_activations(model)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("vision_tower" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_a_row_of_branches_gives_the_logits_of_separate_rows(make_model, rows):
    model = make_model("image")
    trunk, branches = [5, IMAGE], ([6, 7, 8], [9, 10], [11, 12, 13, 14])
    packed = rows(trunk + [t for branch in branches for t in branch])
    branch_ids = [0] * 5 + [i for i, branch in enumerate(branches, 1) for _ in branch]
    position_ids = list(range(5)) + [5 + i for branch in branches for i in range(len(branch))]
    logits = model(
        input_ids=packed["input_ids"],
        pixel_values=packed["pixel_values"],
        branch_ids=torch.tensor([branch_ids]),
        position_ids=torch.tensor([position_ids]),
    ).logits[0]
    start = 5
    for branch in branches:
        alone = model(**{**rows(trunk + branch), "pixel_values": packed["pixel_values"]}).logits[0]
        torch.testing.assert_close(logits[start : start + len(branch)], alone[5:], atol=1e-5, rtol=1e-5)
        start += len(branch)


def test_errors_name_the_value_and_the_remedy(make_model, rows):
    model = make_model("image")
    inputs = rows([5, IMAGE, 6])
    pixels = inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"4 image tokens, and 2 image\(s\) of 4 tokens need 8"):
        model(**{**inputs, "pixel_values": pixels.repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(3, 16, 16\)"):
        model(**{**inputs, "pixel_values": pixels[0]})
    with pytest.raises(ValueError, match="batch is empty"):
        model(input_ids=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match=r"`branch_ids` has shape \(1, 5\).*\(1, 6\)"):
        model(**inputs, branch_ids=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"bool of shape \(1, 1, 6, 6\).*\(1, 1, 6, 5\)"):
        model(**{**inputs, "attention_mask": torch.ones(1, 1, 6, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"torch.float32"):
        model(**{**inputs, "attention_mask": torch.zeros(1, 1, 6, 6)})
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 4\)"):
        model(**{**inputs, "attention_mask": torch.ones(1, 4)})
    with pytest.raises(TypeError, match=r"`attention_mask` is a dictionary; expected one tensor"):
        model(**{**inputs, "attention_mask": {"full_attention": None}})
    with pytest.raises(ValueError, match=r"'prefix' needs `prompt_mask`"):
        make_model("prefix")(**inputs)


def test_image_tokens_without_images_are_an_error(make_model, rows):
    inputs = rows([5, IMAGE, 6])
    with pytest.raises(ValueError, match="no `pixel_values`"):
        make_model()(input_ids=inputs["input_ids"])


def test_flash_kernels_are_refused_unless_the_mask_is_causal(make_model, rows):
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot apply the mask type 'image'"):
        make_model("image", attn_implementation="flash_attention_2")
    model = make_model("image")
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    inputs = rows([5, IMAGE, 6])
    with pytest.raises(ValueError, match="cannot apply the mask type"):
        model(**inputs)
    model.config.attention_mask_type = "causal"
    with pytest.raises(ValueError, match="cannot keep the records or branches of a packed row apart"):
        model(**inputs, branch_ids=torch.zeros_like(inputs["input_ids"]))


class TestConfig:
    def test_unknown_keys_list_the_valid_ones(self):
        with pytest.raises(ValueError, match=r"projektor_type.*projector_type"):
            AlignVLMConfig(projektor_type="mlp")

    @pytest.mark.parametrize("key, value", [("attention_mask_type", "sideways"), ("projector_type", "conv")])
    def test_unknown_values_list_the_valid_ones(self, key, value):
        with pytest.raises(ValueError, match=rf"{key} '{value}'. Valid values: "):
            AlignVLMConfig(**{key: value})

    def test_unknown_model_types_and_impossible_sizes(self):
        with pytest.raises(ValueError, match=r"'resnet99' in vision_config"):
            AlignVLMConfig(vision_config={"model_type": "resnet99"})
        with pytest.raises(ValueError, match="pixel_shuffle_factor=5"):
            AlignVLMConfig(pixel_shuffle_factor=5)
        with pytest.raises(ValueError, match="image_token_id=200000"):
            AlignVLMConfig(image_token_id=200000)

    def test_a_later_format_says_so(self):
        with pytest.raises(ValueError, match="later version of AlignVLM"):
            AlignVLMConfig(format_version=99)

    def test_round_trip(self, tmp_path):
        config = AlignVLMConfig(
            attention_mask_type="mutual", text_config={"model_type": "llama", "tie_word_embeddings": True}
        )
        config.save_pretrained(tmp_path)
        again = AlignVLMConfig.from_pretrained(tmp_path)
        assert again.to_dict() == {**config.to_dict(), "transformers_version": again.transformers_version}
        assert again.tie_word_embeddings and set(again.auto_map) >= {"AutoConfig", "AutoModel", "AutoProcessor"}


def test_half_precision_checkpoints_load_and_run(make_model, rows, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model(**rows([5, IMAGE, 6])).logits.isfinite().all()
