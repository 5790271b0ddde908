"""Merging of similar image tokens: the published algorithm, its count, order and gradients, and all that counts image tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.checkpoint import save_checkpoint
from modeling_alignvlm import AlignVLMConfig, AlignVLMProcessor
from modeling_alignvlm.modeling_alignvlm import group_means, similar_groups
from tests.conftest import VISION
from tests.records import of_exchanges


def published(tokens: np.ndarray, count: int) -> list[tuple[np.ndarray, set[int]]]:
    """ToMe's bipartite soft matching in the words of its paper, in numpy, edge by edge, for one image `(positions, hidden)`.

    Returns:
        `(token, its positions)`, in the order of the positions of the tokens that others were merged into.
    """
    state = [(token, 1, {index}) for index, token in enumerate(tokens)]
    while len(state) > count:
        r = min(len(state) - count, max(1, len(state) // 8))
        # 1. Partition the tokens into two sets A and B of roughly equal size, alternating.
        a, b = list(range(0, len(state), 2)), list(range(1, len(state), 2))
        # 2. Draw one edge from each token in A to its most similar token in B.
        edges = []
        for i in a:
            cosines = [
                state[i][0] @ state[j][0] / (np.linalg.norm(state[i][0]) * np.linalg.norm(state[j][0])) for j in b
            ]
            best = int(np.argmax(cosines))
            edges.append((cosines[best], i, b[best]))
        # 3. Keep the r most similar edges.
        kept = sorted(edges, key=lambda edge: -edge[0])[:r]
        # 4. Merge connected tokens, averaging their features, weighted by their sizes.
        merged = dict(enumerate(state))
        for _, i, j in kept:
            (x, n, xs), (y, m, ys) = merged.pop(i), merged[j]
            merged[j] = ((n * x + m * y) / (n + m), n + m, xs | ys)
        # 5. Gather the two sets back together; here in the order of their positions.
        state = [merged[index] for index in sorted(merged)]
    return [(token, positions) for token, _, positions in state]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.data(), st.integers(0, 10_000))
def test_groups_and_means_are_those_of_the_published_algorithm(positions, data, seed):
    count = data.draw(st.integers(1, positions))
    tokens = np.random.default_rng(seed).normal(size=(3, positions, 5))
    features = torch.from_numpy(tokens)
    groups = similar_groups(features, count)
    means = group_means(features, groups, count)
    assert groups.shape == (3, positions) and means.shape == (3, count, 5)
    for image in range(3):
        expected = published(tokens[image], count)
        found = [set((groups[image] == group).nonzero().flatten().tolist()) for group in range(count)]
        assert found == [members for _, members in expected]
        np.testing.assert_allclose(means[image], [token for token, _ in expected], atol=1e-12)
    sizes = torch.stack([(groups == group).sum(1) for group in range(count)], dim=1)
    torch.testing.assert_close(
        (means * sizes[..., None]).sum(1), features.sum(1)
    )  # no position counts more than another
    assert torch.equal(similar_groups(features.flip(0), count).flip(0), groups)  # images do not touch each other


def test_alike_positions_come_together_and_nothing_else_does():
    corners = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])  # four squares of four equal patches
    features = torch.eye(4, dtype=torch.float64)[corners][None]
    groups = similar_groups(features, 4)[0]
    assert [set(corners[groups == group].tolist()) for group in range(4)] == [{0}, {1}, {2}, {3}]
    assert torch.equal(group_means(features, groups[None], 4)[0], torch.eye(4, dtype=torch.float64))


def test_16_bit_features_are_grouped_in_32_bit():
    features = torch.randn(2, 30, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        groups = similar_groups(features, 9)
    assert torch.equal(groups, similar_groups(features.float(), 9))


MORE_PATCHES = {**VISION, "patch_size": 4}  # 16 positions
PROJECTORS = [{}, {"projector_type": "linear"}, {"projector_type": "pool"}, {"pixel_shuffle_factor": 2}]
PROJECTORS += [{"projector_type": "pool", "pixel_shuffle_factor": 2}]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_the_projector_takes_the_means_and_gradients_flow_through_them(make_model, projector):
    count = 3
    model = make_model(vision=MORE_PATCHES, merge_image_tokens=count, **projector).double()
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        squares = model.model.projector.prepare(model.model.encode_images(pixel_values))
    expected = [np.stack([token for token, _ in published(image.numpy(), count)]) for image in squares]
    expected = model.model.projector.layers(torch.from_numpy(np.stack(expected)))
    tokens = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)

    groups = model.model.projector.tokens_of_squares(model.model.encode_images(pixel_values))
    given = squares.clone().requires_grad_()
    group_means(given, groups, count).sum().backward()
    sizes = torch.nn.functional.one_hot(groups, count).sum(1)  # each position moves the mean of its group by its share
    torch.testing.assert_close(given.grad, (1 / sizes.gather(1, groups)).double()[..., None].expand_as(given))


def test_all_that_counts_image_tokens_counts_the_merged_ones(make_model, processor, tmp_path):
    """The prompt, the layout of two adjacent images, packed rows, answers of several prompts, and heat maps."""
    model = make_model(vision=MORE_PATCHES, merge_image_tokens=5)
    ours = AlignVLMProcessor(
        processor.image_processor,
        processor.tokenizer,
        model.config.image_seq_length,
        chat_template=processor.chat_template,
    )
    save_checkpoint(model, ours, tmp_path / "model", {"stages": []})
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    ours = AlignVLMProcessor.from_pretrained(tmp_path / "model")
    assert (loaded.config.merge_image_tokens, ours.image_seq_length) == (5, 5)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    batch = ours(images=images, text="<image><image> Both?", return_tensors="pt")
    assert int((batch["input_ids"] == loaded.config.image_token_id).sum()) == 10
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)

    record = of_exchanges([images[0]], [("What is it?", "A red square."), ("Which colour?", "Red.")])
    losses = []
    for shared_image in (True, False):
        rows = AlignVLMCollator(ours, mask_type="image", shared_image=shared_image)([record])
        rows = {name: value for name, value in rows.items() if isinstance(value, torch.Tensor)}
        count = (rows["labels"] != -100).sum()
        losses.append(model.double()(**rows, num_items_in_batch=count).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-12, rtol=1e-12)

    model.float()
    texts = answer(model, ours, [[images[0]]], [["What is it?", "Which colour?"]], max_new_tokens=4)
    alone = [
        answer(model, ours, [[images[0]]], [[text]], max_new_tokens=4)[0][0]
        for text in ("What is it?", "Which colour?")
    ]
    assert texts == [alone]

    looked = attention_to_images(model, ours, [images[0]], "What is it?", "A red square.")
    assert looked.mean.shape[1:] == (1, 4, 4)
    model.config.merge_image_tokens = None
    ours.image_seq_length = 16
    whole = attention_to_images(model, ours, [images[0]], "What is it?", "A red square.")
    assert 0 < looked.mean.sum() < looked.mean.shape[0] and whole.mean.shape == looked.mean.shape


@pytest.mark.parametrize("count", [0, 5, -1, 2.0, True])
def test_a_number_that_cannot_be_left_is_refused_with_the_range(make_model, count):
    with pytest.raises(
        ValueError, match=rf"merge_image_tokens={count} must be from 1 to 4, the tokens that an image has"
    ):
        make_model(merge_image_tokens=count)


def test_it_is_off_unless_asked_for(make_model):
    config = AlignVLMConfig()
    assert config.merge_image_tokens is None and "merge_image_tokens" not in config.to_dict()
    assert config.image_seq_length == config.unmerged_seq_length == 196
    assert make_model().state_dict().keys() == make_model(merge_image_tokens=2).state_dict().keys()
