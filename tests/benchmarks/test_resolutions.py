"""`benchmarks/resolutions.py` against FLOPs counted by hand from the dimensions."""

import pytest

from benchmarks import models
from benchmarks.resolutions import LABELS, TEXT_TOKENS, count


@pytest.mark.parametrize(("pixels", "factor", "tokens"), [(224, 1, 196), (384, 3, 64)])
def test_the_flops_are_those_of_the_dimensions(pixels, factor, tokens):
    found = count("b16-224+135m", pixels, factor)
    vision, text = models.configs("b16-224+135m")
    wide, patches = vision["hidden_size"], (pixels // 16) ** 2
    of_a_layer = 4 * wide**2 + 2 * wide * vision["intermediate_size"]
    encoder = vision["num_hidden_layers"] * patches * (2 * of_a_layer + 4 * patches * wide)
    assert found["tokens"] == tokens and found["encoder"] == pytest.approx(
        encoder, rel=0.03
    )  # and the embedding and the pooling head
    hidden, inner, length = text["hidden_size"], text["intermediate_size"], tokens + TEXT_TOKENS
    heads = text["num_key_value_heads"] / text["num_attention_heads"]
    weights = text["num_hidden_layers"] * ((2 + 2 * heads) * hidden**2 + 3 * hidden * inner)
    pairs = text["num_hidden_layers"] * length**2 * 4 * hidden * 3
    head = LABELS * 2 * hidden * text["vocab_size"]
    projector = tokens * 2 * (wide * factor**2 * hidden + hidden**2)
    assert found["stage 1"] == pytest.approx(
        found["encoder"] + 3 * projector + 4 * weights * length + pairs + 2 * head, rel=0.01
    )
    assert found["stage 3"] == pytest.approx(
        found["encoder"] + 3 * projector + 6 * weights * length + pairs + 3 * head, rel=0.01
    )
