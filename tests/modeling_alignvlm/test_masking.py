"""The mask rules against the written definition, token by token."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_alignvlm import TokenLayout, attention_rule, check_no_leak, dense_mask, leaking_edges
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples


def layout_of(rows: list[list[tuple[int, int, int, bool]]]) -> TokenLayout:
    """A layout from rows of (image, record, branch, prompt) tuples."""
    image, record, branch, prompt = (torch.tensor([[token[i] for token in row] for row in rows]) for i in range(4))
    return TokenLayout(image, record, branch, prompt.bool())


@dataclass
class Token:
    index: int
    image: int
    prompt: bool


# DESIGN.md's table, written for single tokens: a new mask type needs its line here.
LOOKS_AHEAD = {
    "causal": lambda q, k: False,
    "image": lambda q, k: q.image != -1 and q.image == k.image,
    "prefix": lambda q, k: q.prompt and k.prompt,
    "mutual": lambda q, k: q.image != -1 and (q.image == k.image or k.prompt),
}


def oracle(layout: TokenLayout, mask_type: str) -> torch.Tensor:
    """DESIGN.md's sentence, written as loops."""
    batch, length = layout.image_ids.shape
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        image, record, branch, prompt = (
            values[b].tolist()
            for values in (layout.image_ids, layout.record_ids, layout.branch_ids, layout.prompt_mask)
        )
        tokens = list(map(Token, range(length), image, prompt))
        for q in range(length):
            for k in range(length):
                forward = LOOKS_AHEAD[mask_type](tokens[q], tokens[k])
                real = record[k] != -1
                in_reach = record[q] == record[k] and branch[k] in (0, branch[q])
                mask[b, 0, q, k] = (real and in_reach and (k <= q or forward)) or q == k
    return mask


T, F = True, False
TEXT, PAD = (-1, 0, 0, T), (-1, -1, 0, F)
I0, I1, ANSWER = (0, 0, 0, T), (1, 0, 0, T), (-1, 0, 0, F)
LAYOUTS = {
    "one image": [[TEXT, I0, I0, I0, TEXT, ANSWER, ANSWER]],
    "two adjacent images": [[I0, I0, I1, I1, TEXT, ANSWER]],
    "interleaved": [[TEXT, I0, I0, TEXT, I1, I1, TEXT, ANSWER]],
    "multi-turn": [[I0, I0, TEXT, ANSWER, ANSWER, (-1, 0, 0, F), (1, 0, 0, F), (1, 0, 0, F), ANSWER]],
    "no image": [[TEXT, TEXT, ANSWER]],
    "right padding": [[TEXT, I0, I0, ANSWER, PAD, PAD], [I0, I0, TEXT, TEXT, ANSWER, ANSWER]],
    "left padding": [[PAD, PAD, I0, I0, TEXT, ANSWER], [TEXT, I0, I0, TEXT, ANSWER, ANSWER]],
    "packed branches": [[TEXT, I0, I0, (-1, 0, 1, T), (-1, 0, 1, F), (-1, 0, 2, T), (-1, 0, 2, F), (-1, 0, 2, F)]],
    "packed records": [
        [I0, I0, (-1, 0, 1, T), (-1, 0, 1, F), (1, 1, 0, T), (1, 1, 0, T), (-1, 1, 1, F), (-1, 1, 2, F), PAD]
    ],
}


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_equals_the_written_definition(name, mask_type):
    layout = layout_of(LAYOUTS[name])
    assert torch.equal(dense_mask(layout, mask_type), oracle(layout, mask_type))


CONVERSATION = [TEXT, TEXT, I0, I0, TEXT, TEXT, I1, I1, TEXT, TEXT, ANSWER, ANSWER]


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_the_table_says_what_the_rules_do(mask_type):
    """A row's three claims against its rule, on one conversation with text, an image, text, an image, text and an answer."""
    row, layout = MASK_TYPES[mask_type], layout_of([CONVERSATION])
    mask = dense_mask(layout, mask_type)[0, 0]
    ahead = torch.ones_like(mask).triu(1)
    without_prompt = layout_of([[(image, record, branch, F) for image, record, branch, _ in CONVERSATION]])
    assert row.needs_prompt == (not torch.equal(dense_mask(without_prompt, mask_type)[0, 0], mask))
    text = layout_of([[token for token in CONVERSATION if token[0] < 0]])
    assert row.text_looks_ahead == dense_mask(text, mask_type)[0, 0].triu(1).any()
    # A trunk ends before the last token of the prompt and never inside an image.
    trunks = [end for end in range(1, 10) if end not in (3, 7)]
    assert row.shares_trunk == (not any(mask[:end, end:].any() for end in trunks))
    assert (row.looks_ahead is None) == (not (mask & ahead).any())
    assert row.needs_prompt or not row.text_looks_ahead, "text that looks ahead everywhere sees responses"


@st.composite
def random_layouts(draw) -> TokenLayout:
    """Rows of records with images, branches, prompts and padding on either side, in the order rows have them."""
    length = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        tokens, image = [], 0
        for record in range(draw(st.integers(1, 3))):
            for _ in range(draw(st.integers(0, 2))):
                tokens += [(-1, record, 0, T)] * draw(st.integers(0, 2)) + [(image, record, 0, T)] * draw(
                    st.integers(1, 3)
                )
                image += 1
            branches = draw(st.integers(0, 3))
            for branch in range(1, branches + 1):
                tokens += [(-1, record, branch, T)] * draw(st.integers(0, 2)) + [(-1, record, branch, F)] * draw(
                    st.integers(1, 2)
                )
        tokens = tokens[:length]
        padding = [PAD] * (length - len(tokens))
        rows.append(padding + tokens if draw(st.booleans()) else tokens + padding)
    return layout_of(rows)


@settings(max_examples=examples(60), deadline=None)
@given(random_layouts(), st.sampled_from(list(MASK_TYPES)))
def test_mask_equals_the_definition_for_random_layouts(layout, mask_type):
    assert torch.equal(dense_mask(layout, mask_type), oracle(layout, mask_type))


@settings(max_examples=examples(60), deadline=None)
@given(random_layouts(), st.sampled_from(list(MASK_TYPES)), st.data())
def test_leaking_edges_are_those_that_jump_over_or_onto_a_response_token(layout, mask_type, data):
    batch, length = layout.image_ids.shape
    response = torch.tensor([[data.draw(st.booleans()) for _ in range(length)] for _ in range(batch)])
    mask, found = oracle(layout, mask_type), leaking_edges(layout, mask_type, response)
    for b in range(batch):
        for q in range(length):
            for k in range(length):
                expected = mask[b, 0, q, k] and k > q and bool(response[b, q + 1 : k + 1].any())
                assert found[b, q, k] == expected


@settings(max_examples=examples(150), deadline=None)
@given(random_layouts(), st.sampled_from(list(MASK_TYPES)), st.data())
def test_the_leak_check_agrees_with_transitive_reachability(layout, mask_type, data):
    """Prompts and responses lie anywhere: there is an unsafe edge iff some chain of attention leads from a place to a response
    token behind it, which that place predicts, or which comes after what it predicts."""
    batch, length = layout.image_ids.shape
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    layout.prompt_mask = torch.tensor([data.draw(flags) for _ in range(batch)]) & (layout.record_ids >= 0)
    response = torch.tensor([data.draw(flags) for _ in range(batch)]) & (layout.record_ids >= 0)
    reached = oracle(layout, mask_type)[:, 0]
    for _ in range(length.bit_length()):  # chains of twice the length
        reached = (reached.float() @ reached.float()) > 0
    ahead = torch.ones(length, length).triu(1).bool()
    leaks = (reached & ahead & response[:, None, :]).any()
    assert bool(leaks) == bool(leaking_edges(layout, mask_type, response).any())


@settings(max_examples=examples(40), deadline=None)
@given(random_layouts(), st.sampled_from(("causal", "image")))
def test_no_response_leaks_under_causal_and_image_masks(layout, mask_type):
    response = ~layout.prompt_mask & (layout.record_ids >= 0) & (layout.image_ids < 0)
    check_no_leak(layout, mask_type, response)


def test_a_prompt_mask_that_covers_the_answer_is_caught():
    layout = layout_of([[I0, I0, TEXT, TEXT]])
    response = torch.tensor([[F, F, F, T]])
    check_no_leak(layout, "image", response)
    with pytest.raises(ValueError, match=r"token 0 of row 0 sees token 3"):
        check_no_leak(layout, "prefix", response)
    with pytest.raises(ValueError, match="mutual"):
        check_no_leak(layout, "mutual", response)


def test_layout_from_input_ids_finds_adjacent_images_and_padding():
    input_ids = torch.tensor([[9, 9, 9, 9, 1, 2], [0, 0, 5, 9, 9, 3]])
    attention_mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    layout = TokenLayout.from_input_ids(input_ids, 9, image_seq_length=2, attention_mask=attention_mask)
    assert layout.image_ids.tolist() == [[0, 0, 1, 1, -1, -1], [-1, -1, -1, 0, 0, -1]]
    assert layout.record_ids.tolist() == [[0] * 6, [-1, -1, 0, 0, 0, 0]]


@settings(max_examples=examples(40), deadline=None)
@given(random_layouts(), st.integers(0, 3), st.integers(0, 2))
def test_a_layout_behind_a_cache_gives_the_rows_of_the_whole_mask(layout, past, unused):
    """New tokens behind a text-only past, in a cache with room to spare, see what they would see in one piece."""
    batch, length = layout.image_ids.shape
    single = TokenLayout(
        layout.image_ids, layout.record_ids.clamp(max=0), torch.zeros_like(layout.branch_ids), layout.prompt_mask
    )
    whole = TokenLayout(
        *(
            torch.cat([torch.full((batch, past), value, dtype=field.dtype), field], dim=1)
            for field, value in zip(
                (single.image_ids, single.record_ids, single.branch_ids, single.prompt_mask), (-1, 0, 0, False)
            )
        )
    )
    attention_mask = torch.cat([torch.ones(batch, past), (single.record_ids >= 0).float()], dim=1)
    placed = single.placed_in_cache(past, past + length + unused, attention_mask)
    got = dense_mask(placed, "image")[:, :, past : past + length]
    assert torch.equal(got[..., : past + length], dense_mask(whole, "image")[:, :, past:])
    assert not got[..., past + length :].any()


def test_errors_name_what_is_wrong():
    layout = layout_of(LAYOUTS["one image"])
    with pytest.raises(ValueError, match=r"'sideways'.*causal, image, prefix, mutual"):
        attention_rule(layout, "sideways")
    with pytest.raises(ValueError, match=r"`branch_ids` has shape \(1, 6\)"):
        TokenLayout(layout.image_ids, layout.record_ids, layout.branch_ids[:, :6], layout.prompt_mask)
    with pytest.raises(ValueError, match="response_mask"):
        leaking_edges(layout, "image", torch.zeros(1, 3, dtype=torch.bool))
