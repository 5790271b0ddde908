"""Where the model looked, against the same attention computed by hand in numpy, in float64."""

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.evaluation.attention import attention_rollout, attention_to_images, words_of
from alignvlm.rows.encode import Encoder
from modeling_alignvlm import MASK_TYPES
from tests.evaluation.test_answer import IMAGE, shown_images, turn


ANSWER = "A red circle is at the left."
TWO_IMAGES = [turn("user", IMAGE, "What is it?"), turn("assistant", "A square."), turn("user", "And", IMAGE, "here?")]


def tokens_of(tokenizer, text: str) -> list[int]:
    """An answer's tokens as the plain template writes it, behind a space."""
    return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]


def may_see(mask_type: str, is_image: np.ndarray, image_of: np.ndarray, prompt_length: int) -> np.ndarray:
    """Who sees whom in a row of one record, as the table in DESIGN says it, pair by pair."""
    length = len(is_image)
    seen = np.zeros((length, length), dtype=bool)
    for q in range(length):
        for k in range(length):
            same_image = is_image[q] and is_image[k] and image_of[q] == image_of[k]
            ahead = {
                "causal": False,
                "image": same_image,
                "prefix": q < prompt_length and k < prompt_length,
                "mutual": same_image or (is_image[q] and k < prompt_length),
            }[mask_type]
            seen[q, k] = k <= q or ahead
    return seen


def rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions for `(heads, length, size)`."""
    _, length, size = x.shape
    angles = np.arange(length)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([part, part], axis=-1) for part in (np.cos(angles), np.sin(angles)))
    return x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1) * sin


def attention_by_hand(model, embeddings: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The weights of a Qwen2 model averaged over heads, `(layers, length, length)`, computed layer by layer."""
    config = model.config.text_config
    weights = {name: value.double().numpy() for name, value in model.model.language_model.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // heads

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[name]

    found, hidden = [], embeddings
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{name}.self_attn.{each}_proj.weight"].T + weights[f"{name}.self_attn.{each}_proj.bias"])
            .reshape(len(x), -1, size)
            .transpose(1, 0, 2)
            for each in "qkv"
        )
        theta = config.rope_parameters["rope_theta"]
        q, k, v = rotated(q, theta), rotated(k, theta).repeat(groups, axis=0), v.repeat(groups, axis=0)
        scores = np.where(seen, q @ k.transpose(0, 2, 1) / np.sqrt(size), -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        found.append(attention.mean(0))
        read = (attention @ v).transpose(1, 0, 2).reshape(len(x), -1)
        hidden = hidden + read @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{name}.post_attention_layernorm.weight")
        gate = x @ weights[f"{name}.mlp.gate_proj.weight"].T
        up = x @ weights[f"{name}.mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    return np.stack(found)


def rollout_by_hand(attention: np.ndarray) -> np.ndarray:
    """Equation 1 of Abnar and Zuidema, from the first layer to the last."""
    length = attention.shape[-1]
    joint = np.eye(length)
    for layer in attention:
        joint = (0.5 * layer + 0.5 * np.eye(length)) @ joint
    return joint


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_maps_equal_attention_computed_by_hand(make_model, processor, mask_type, key_value_heads):
    text = {"num_attention_heads": 4, "num_key_value_heads": key_value_heads, "num_hidden_layers": 3}
    model = make_model(mask_type, text=text).double()
    images = shown_images(2)
    looked = attention_to_images(model, processor, images, TWO_IMAGES, ANSWER)

    prompt = list(Encoder(processor).prompt(TWO_IMAGES).input_ids)
    answer = tokens_of(processor.tokenizer, ANSWER)
    input_ids = torch.tensor([*prompt, *answer])
    is_image = (input_ids == model.config.image_token_id).numpy()
    image_of = (is_image.cumsum() - 1) // 4
    with torch.no_grad():
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"].double()
        embeddings = model.get_input_embeddings()(input_ids).numpy()
        embeddings[is_image] = model.get_image_features(pixel_values).pooler_output.flatten(0, 1).numpy()
    seen = may_see(mask_type, is_image, image_of, len(prompt))
    attention = attention_by_hand(model, embeddings, seen)
    rollout = rollout_by_hand(attention)

    assert looked.layers.shape == (3, len(answer), 2, 2, 2)
    assert looked.rollout.shape == (len(answer), 2, 2, 2)
    for token in range(len(answer)):
        position = len(prompt) - 1 + token  # the one that predicts it
        for image in range(2):
            places = np.flatnonzero(is_image & (image_of == image))
            for layer in range(3):
                expected = attention[layer, position, places].reshape(2, 2)
                np.testing.assert_allclose(looked.layers[layer, token, image], expected, rtol=1e-4, atol=1e-6)
            expected = rollout[position, places].reshape(2, 2)
            np.testing.assert_allclose(looked.rollout[token, image], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_rollout_is_a_distribution_over_what_a_position_may_reach(mask_type):
    rng = np.random.default_rng(0)
    is_image = np.array([0, 1, 1, 0, 1, 1, 0, 0, 0], dtype=bool)
    seen = may_see(mask_type, is_image, (is_image.cumsum() - 1) // 2, prompt_length=7)
    attention = rng.random((3, 9, 9)) * seen
    attention /= attention.sum(-1, keepdims=True)
    flow = attention_rollout([torch.from_numpy(layer) for layer in attention]).numpy()
    np.testing.assert_allclose(flow, rollout_by_hand(attention), rtol=1e-12)
    np.testing.assert_allclose(flow.sum(-1), 1)
    reach = np.linalg.matrix_power(seen.astype(float), 3) > 0
    assert (flow[~reach] == 0).all() and (flow[reach] > 0).all()
    # A triangular rollout would give nothing to the later tokens of an image.
    assert (flow[1, 2] > 0) == (mask_type != "causal")


CONVOLUTIONS = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


@pytest.mark.parametrize("factor, rows, columns", [(1, 2, 4), (2, 1, 2)])
def test_the_grid_is_that_of_the_image_tokens(make_model, processor, factor, rows, columns):
    """Images of 16 x 32 pixels through a convolutional encoder, whose map has 2 x 4 places; squares of 2 x 2 may be one token."""
    given = {"image_size": [16, 32], "image_grid": [2, 4], "vision_hidden_size": 16, "pixel_shuffle_factor": factor}
    model = make_model(vision=CONVOLUTIONS, **given)
    image_processor = type(processor.image_processor)(size={"height": 16, "width": 32})
    template = processor.chat_template
    wide = type(processor)(image_processor, processor.tokenizer, rows * columns, chat_template=template)
    image = Image.new("RGB", (64, 32), (200, 30, 60))
    looked = attention_to_images(model, wide, [image], "What?", ANSWER)
    assert looked.layers.shape[2:] == (1, rows, columns) and looked.rollout.shape[1:] == (1, rows, columns)


def test_the_answer_may_be_a_text_or_what_generate_returned(make_model, processor, tokenizer):
    model = make_model()
    images = shown_images(1)
    ids = tokens_of(tokenizer, ANSWER)
    by_text = attention_to_images(model, processor, images, "What?", ANSWER)
    ended = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    for given in (ids, ended, torch.tensor(ended)):
        found = attention_to_images(model, processor, images, "What?", given)
        assert found.tokens == by_text.tokens and torch.equal(found.layers, by_text.layers)
    # An image token that a model has written is text.
    written = [*ids, model.config.image_token_id, *ids]
    found = attention_to_images(model, processor, images, "What?", written)
    assert found.layers.shape[1:] == (len(written), 1, 2, 2)
    torch.testing.assert_close(found.layers[:, : len(ids)], by_text.layers, rtol=1e-4, atol=1e-6)


def test_an_answer_is_read_word_by_word(make_model, processor):
    looked = attention_to_images(make_model(), processor, shown_images(1), "What?", ANSWER)
    assert [word.text for word in looked.words] == ANSWER.split()
    assert "".join(looked.tokens) == f" {ANSWER}"
    for number, word in enumerate(looked.words):
        assert "".join(looked.tokens[word.start : word.stop]).strip() == word.text
        mean = sum(looked.layers[:, token].mean(0) for token in range(word.start, word.stop)) / (
            word.stop - word.start
        )
        torch.testing.assert_close(looked.of_word(number), mean)
        torch.testing.assert_close(looked.of_word(number, 1), looked.layers[1, word.start : word.stop].mean(0))
        torch.testing.assert_close(looked.of_word(number, "rollout"), looked.rollout[word.start : word.stop].mean(0))
    with pytest.raises(ValueError, match=r"layer=7\. Valid values: 'mean', 'rollout', 0 to 1"):
        looked.of_word(0, 7)


def test_tokens_become_words():
    assert [w.text for w in words_of(["Two", " dogs", ",", " a", " c", "at", "."])] == ["Two", "dogs,", "a", "cat."]
    assert [w.text for w in words_of(["a ", "b", "\n", "c"])] == ["a", "b", "c"]
    assert [w.text for w in words_of(["红", "色", "圆", " ok"])] == ["红", "色", "圆", "ok"]
    assert [(w.text, w.start, w.stop) for w in words_of([" ", "", "é", "t"])] == [("ét", 2, 4)]


def test_a_character_of_several_tokens_stays_whole(make_model, processor):
    looked = attention_to_images(make_model(), processor, shown_images(1), "What?", "a 🐕 b")
    assert [word.text for word in looked.words] == ["a", "🐕", "b"] and "".join(looked.tokens) == " a 🐕 b"
    assert len(looked.tokens) > 5  # the tokenizer has bytes only


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_kernel_is_as_before(make_model, processor, kernel):
    model = make_model(attn_implementation=kernel)
    attention_to_images(model, processor, shown_images(1), "What?", ANSWER)
    assert model.model.language_model.config._attn_implementation == kernel
    with pytest.raises(ValueError, match="values of dtype float64 from nan"):
        attention_to_images(model, processor, [np.full((4, 4, 3), np.nan)], "What?", ANSWER)
    assert model.model.language_model.config._attn_implementation == kernel


def test_what_cannot_be_shown_is_refused(make_model, processor):
    model, (image,) = make_model(), shown_images(1)
    with pytest.raises(ValueError, match=r"shows 0 image\(s\)"):
        attention_to_images(model, processor, [], "What?", ANSWER)
    with pytest.raises(ValueError, match=r"shows 2 image\(s\), and 1 were given"):
        attention_to_images(model, processor, [image], TWO_IMAGES, ANSWER)
    for empty in ("", [], [processor.tokenizer.eos_token_id]):
        with pytest.raises(ValueError, match="has no words"):
            attention_to_images(model, processor, [image], "What?", empty)


def test_it_looks_where_the_image_is_different(make_model, processor):
    """The maps change with the image, and images in messages need not be there: the given ones are shown."""
    model = make_model()
    first, second = shown_images(2)
    carried = [{"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": "What?"}]}]
    by_text = attention_to_images(model, processor, [first], "What?", ANSWER)
    by_messages = attention_to_images(model, processor, [first], carried, ANSWER)
    assert torch.equal(by_text.layers, by_messages.layers)
    half = Image.new("RGB", (16, 16), (200, 30, 60))
    half.paste((0, 0, 0), (8, 0, 16, 16))
    other = attention_to_images(model, processor, [half], "What?", ANSWER)
    assert (other.layers - by_text.layers).abs().max() > 1e-4
