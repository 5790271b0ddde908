"""Generation on every path: given embeddings, later turns on a kept cache, beams, prompt lookup and an assistant equal the plain way.

Exactness is compared in float64, where the order of sums does not matter.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_alignvlm import CACHE_NAME
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, get_mask_type


IMAGE = -1  # in the rows below: four image tokens
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
GREEDY["return_dict_in_generate"] = True


@pytest.fixture(scope="module", params=MASK_TYPES)
def model(request, make_model):
    return make_model(request.param).double()


@pytest.fixture(scope="module")
def inputs_of(make_model):
    """Model inputs of rows of token ids, padded on the left; `pixels` holds the images of all rows."""
    image_token = make_model().config.image_token_id

    def build(*given: list[int]) -> dict[str, torch.Tensor]:
        expanded = [[t for token in row for t in ([image_token] * 4 if token == IMAGE else [token])] for row in given]
        length = max(map(len, expanded))
        images = sum(row.count(IMAGE) for row in given)
        inputs = {
            "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in expanded]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in expanded]),
        }
        pixels = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {**inputs, **({"pixel_values": pixels} if images else {})}

    return build


def as_embeddings(model, inputs: dict, merged: bool) -> dict:
    """The same inputs as embeddings and token types; `merged`: the image features are in place already."""
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    given = {"attention_mask": inputs["attention_mask"], "mm_token_type_ids": is_image.long()}
    if merged:
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), features)
    else:
        given["pixel_values"] = inputs["pixel_values"]
    return {**given, "inputs_embeds": embeddings}


def assert_same_generation(actual, expected, skip: int = 0) -> None:
    """Equal new tokens and logits; the sequences may begin with other prompts (`skip`: tokens only `expected` has in front)."""
    assert torch.equal(actual.sequences, expected.sequences[:, skip:])
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_given_embeddings_have_the_mask_of_their_tokens(model, inputs_of, kernel, merged):
    model.set_attn_implementation(kernel)
    inputs = inputs_of(
        [5, IMAGE, IMAGE, 6], [IMAGE, 7, 8, IMAGE]
    )  # eager softmax is in float32: no padding in float64
    embedded = as_embeddings(model, inputs, merged)
    prompt = {}
    if get_mask_type(model.config.attention_mask_type).needs_prompt:
        prompt["prompt_mask"] = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        model(**embedded, **prompt).logits, model(**inputs, **prompt).logits, atol=1e-10, rtol=1e-10
    )
    expected = model.generate(**inputs, **GREEDY)
    length = inputs["input_ids"].shape[1]
    assert_same_generation(model.generate(**embedded, **GREEDY), expected, skip=length)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("given", ["pixel values", "pixel values and ids", "image features in place and ids"])
@torch.no_grad()
def test_images_are_found_among_embeddings_without_token_types(model, inputs_of, given):
    """As transformers' own classes do: by the ids, if they are given too, else by the embedding of the image token."""
    inputs = inputs_of([5, IMAGE, IMAGE, 6], [IMAGE, 7])
    embedded = as_embeddings(model, inputs, merged=given.startswith("image features"))
    del embedded["mm_token_type_ids"]
    ids, skip = (
        ({}, inputs["input_ids"].shape[1]) if given == "pixel values" else ({"input_ids": inputs["input_ids"]}, 0)
    )
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        expected = model.generate(**inputs, **options)
        found = model.generate(**ids, **embedded, **options)
        assert torch.equal(found.sequences, expected.sequences[:, skip:])
    if given == "pixel values":
        prompt = {"prompt_mask": inputs["attention_mask"].bool()}
        real = inputs["attention_mask"].bool()
        logits = model(**embedded, **prompt).logits[real]
        torch.testing.assert_close(logits, model(**inputs, **prompt).logits[real], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_token_types_of_another_length_are_refused_in_a_sentence(model, inputs_of):
    """As prompt tuning leaves them, which puts embeddings of its own before those of the prompt."""
    embedded = as_embeddings(model, inputs_of([5, IMAGE, 6]), merged=False)
    embedded["inputs_embeds"] = torch.cat([embedded["inputs_embeds"][:, :1]] * 2 + [embedded["inputs_embeds"]], dim=1)
    embedded["attention_mask"] = torch.ones(1, 8, dtype=torch.long)
    embedded["prompt_mask"] = embedded["attention_mask"].bool()
    with pytest.raises(ValueError, match=r"`mm_token_type_ids` has shape \(1, 6\), but the tokens have \(1, 8\)"):
        model(**embedded)
    del embedded["mm_token_type_ids"]
    assert torch.isfinite(model(**embedded).logits).all()


@torch.no_grad()
def test_embeddings_without_a_cache_are_refused(model, inputs_of):
    """`generate` gives the embeddings to the first step only, so later ones would not see the prompt."""
    embedded = as_embeddings(model, inputs_of([5, IMAGE, 6]), merged=True)
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(**embedded, **GREEDY, use_cache=False)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_beams_with_embeddings_equal_beams_with_tokens(model, inputs_of, merged, options):
    inputs = inputs_of([5, IMAGE, 6], [7, IMAGE, IMAGE, 8])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**as_embeddings(model, inputs, merged), **options), expected)


@torch.no_grad()
def test_several_samples_of_embeddings_keep_their_own_images(model, inputs_of):
    inputs = inputs_of([5, IMAGE, 6], [7, IMAGE, IMAGE, 8])
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "eos_token_id": None}
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**as_embeddings(model, inputs, False), **options), expected)


@torch.no_grad()
def test_prompt_lookup_equals_greedy(model, inputs_of):
    """Also where the text behind the image repeats what stands before it, so that image tokens are proposed as candidates."""
    for row in ([5, 6, IMAGE, 7, 5, 6], [IMAGE, 9, 5, 5, 5, 5]):
        inputs = inputs_of(row)
        expected = model.generate(**inputs, **GREEDY)
        found = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences, expected.sequences)
        given = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()}
        found = model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences, expected.sequences)


@torch.no_grad()
def test_an_assistant_proposes_and_changes_nothing(model, inputs_of, make_model):
    inputs = inputs_of([5, IMAGE, 6, 7])
    expected = model.generate(**inputs, **GREEDY)
    for seed in (0, 1):  # one that is always right, and one that never is
        assistant = make_model(model.config.attention_mask_type, seed=seed).double()
        seen = []
        hook = assistant.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = model.generate(**inputs, **GREEDY, assistant_model=assistant)
        hook.remove()
        assert seen and torch.equal(found.sequences, expected.sequences)


@torch.no_grad()
def test_a_language_model_without_images_can_be_the_assistant(model, inputs_of):
    """It proposes from the text alone, and every proposal is checked: the same language model's, and those of another."""
    inputs = inputs_of([5, IMAGE, 6, 7])
    expected = model.generate(**inputs, **GREEDY)
    for same in (True, False):
        assistant = AutoModelForCausalLM.from_config(model.config.text_config).double().eval()
        if same:
            assistant.model.load_state_dict(model.model.language_model.state_dict())
        seen = []
        hook = assistant.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = model.generate(**inputs, **GREEDY, assistant_model=assistant)
        hook.remove()
        assert seen and torch.equal(found.sequences, expected.sequences)


def one_pass(model, inputs: dict, prompt_length: int) -> torch.Tensor:
    """Logits of a forward pass over a whole row whose first response begins at `prompt_length`."""
    prompt_mask = torch.arange(inputs["input_ids"].shape[1])[None] < prompt_length
    return model(**inputs, prompt_mask=prompt_mask).logits


@pytest.mark.parametrize("given", ["whole conversation", "new tokens"])
@pytest.mark.parametrize("second", [[9, 10, 11], [9, IMAGE, 10]], ids=["text", "image"])
@pytest.mark.parametrize("first", [[5, IMAGE, 6, 7], [5, 6, 7]], ids=["after image", "after text"])
@torch.no_grad()
def test_a_second_turn_on_a_kept_cache_equals_one_pass(model, inputs_of, first, second, given):
    options = {**GREEDY, "max_new_tokens": 3}
    start = inputs_of(first)
    prompt_length = start["input_ids"].shape[1]
    turn = model.generate(**start, **options)
    answer = turn.sequences[:, prompt_length:].tolist()[0]
    conversation = inputs_of([*first, *answer, *second])
    cache = getattr(turn, CACHE_NAME)
    inputs = dict(conversation)
    if given == "new tokens":
        inputs["input_ids"] = conversation["input_ids"][:, cache.get_seq_length() :]
        if IMAGE in second:
            inputs["pixel_values"] = conversation["pixel_values"][-1:]
        else:
            inputs.pop("pixel_values", None)
    again = model.generate(**inputs, **options, **{CACHE_NAME: cache})
    new = again.sequences[:, -3:]
    whole = {
        **conversation,
        "input_ids": torch.cat([conversation["input_ids"], new], dim=1),
        "attention_mask": torch.ones(1, conversation["input_ids"].shape[1] + 3, dtype=torch.long),
    }
    expected = one_pass(model, whole, prompt_length)[:, -4:-1]
    # `generate` gives its logits in float32.
    torch.testing.assert_close(torch.stack(again.logits, dim=1), expected.float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(new, expected.argmax(-1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_second_turn_in_forward_needs_no_layout_inputs(model, inputs_of, kind):
    inputs = inputs_of([5, IMAGE, 6, 7, IMAGE, 8, 9])
    cut = 7  # the second turn begins with the token before its image
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config.text_config, max_cache_len=20)
    prompt_mask = torch.ones(1, cut, dtype=torch.bool)
    first = model(
        input_ids=inputs["input_ids"][:, :cut],
        pixel_values=inputs["pixel_values"][:1],
        prompt_mask=prompt_mask,
        **{CACHE_NAME: cache},
    )
    second = model(
        input_ids=inputs["input_ids"][:, cut:],
        pixel_values=inputs["pixel_values"][1:],
        attention_mask=inputs["attention_mask"],
        **{CACHE_NAME: getattr(first, CACHE_NAME)},
    )
    expected = one_pass(model, inputs, cut)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_part_of_an_image_is_an_error(model, inputs_of):
    """As left by a truncation through an image: the images behind it would be counted wrongly."""
    inputs = inputs_of([5, IMAGE, IMAGE, 6])
    embedded = as_embeddings(model, inputs, merged=True)
    cut = {name: value[:, 2:] for name, value in embedded.items()}
    if get_mask_type(model.config.attention_mask_type).needs_prompt:
        cut["prompt_mask"] = cut["attention_mask"].bool()
    if model.config.attention_mask_type == "causal":
        model(**cut)
    else:
        with pytest.raises(ValueError, match="7 image tokens"):
            model(**cut)


@torch.no_grad()
def test_a_prefill_in_pieces_is_refused_where_tokens_look_ahead(model, inputs_of):
    inputs = inputs_of([5, 6, 7, 8, 9])
    if not get_mask_type(model.config.attention_mask_type).text_looks_ahead:  # text alone: causal
        expected = model.generate(**inputs, **GREEDY)
        assert_same_generation(model.generate(**inputs, **GREEDY, prefill_chunk_size=2), expected)
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=2)


@torch.no_grad()
def test_guidance_is_refused_where_text_looks_ahead(model, inputs_of):
    """Its pass without images has no prompt that could look ahead."""
    inputs = inputs_of([5, IMAGE, 6])
    if get_mask_type(model.config.attention_mask_type).text_looks_ahead:
        with pytest.raises(ValueError, match=r"guidance_scale=1\.5 compares the answer with one .* Leave it out"):
            model.generate(**inputs, **GREEDY, guidance_scale=1.5)
    else:
        guided = model.generate(**inputs, **GREEDY, guidance_scale=1.5)
        assert (torch.stack(guided.logits) - torch.stack(model.generate(**inputs, **GREEDY).logits)).abs().max() > 0
    model.generate(**inputs, **GREEDY, guidance_scale=1.0)


@torch.no_grad()
def test_a_cache_goes_by_both_of_its_names(make_model, inputs_of):
    """transformers 5.24 calls `past_key_values` `cache`; a lost cache would show as a mask of the wrong width, or as other logits."""
    model = make_model("image").double()
    inputs = inputs_of([5, IMAGE, 6, 7])
    whole = model(**inputs).logits
    for name in ("cache", "past_key_values"):
        first = model(**{**inputs, "input_ids": inputs["input_ids"][:, :5], "attention_mask": None}, use_cache=True)
        rest = {name: getattr(first, CACHE_NAME), "input_ids": inputs["input_ids"][:, 5:]}
        torch.testing.assert_close(model(**rest).logits, whole[:, 5:], atol=1e-10, rtol=1e-10)
