"""Weighted losses against plain computations, through the real trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import TrlParser

from alignvlm.data import scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.losses import contrast_weights, length_weights, response_segments
from alignvlm.stages.trainer import AlignVLMTrainer
from modeling_alignvlm import AlignVLMForConditionalGeneration
from tests.running import arguments_for


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_length_weights_by_counting(segments):
    weights = length_weights(torch.tensor(segments))
    expected = [4 / segments.count(segment) ** 0.5 for segment in segments]
    assert weights.tolist() == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 2)), min_size=1, max_size=20))
def test_contrast_weights_by_looking_at_each_token(tokens):
    tokens = sorted(tokens, key=lambda token: token[1])
    differences, segments = zip(*tokens)
    weights = contrast_weights(torch.tensor(differences), torch.zeros(len(tokens)), torch.tensor(segments))
    for i, segment in enumerate(segments):
        near = [j for j in (i - 1, i, i + 1) if 0 <= j < len(tokens) and segments[j] == segment]
        expected = sum(min(max(differences[j], 1), 5) for j in near) / len(near)
        assert weights[i].item() == pytest.approx(expected, rel=1e-5)


def test_a_segment_is_a_branch_of_a_record_of_a_row():
    record_ids = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    branch_ids = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 1, 2, 2]])
    segments = response_segments(record_ids, branch_ids)
    places = [(b, int(record_ids[b, t]), int(branch_ids[b, t])) for b in range(2) for t in range(6)]
    flat = segments.flatten().tolist()
    assert all((flat[i] == flat[j]) == (places[i] == places[j]) for i in range(12) for j in range(12))


def make_trainer(checkpoint, processor, folder, weighting, **fields) -> tuple[AlignVLMTrainer, AlignVLMCollator]:
    rates = {"language_learning_rate": 1e-3, "vision_learning_rate": 1e-3, "projector_learning_rate": 1e-3}
    given = arguments_for(checkpoint, folder, token_weighting=weighting, **rates, **fields)
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(given)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    collator = AlignVLMCollator(processor)
    trainer = AlignVLMTrainer(
        model,
        arguments.learning_rates,
        token_weighting=arguments.token_weighting,
        args=arguments,
        train_dataset=scenes.make_scenes(8, annotations=("short_caption", "questions")),
        data_collator=collator,
        processing_class=processor,
    )
    return trainer, collator


def log_probabilities(model, rows: list[dict]) -> list[torch.Tensor]:
    """Of each label of each row, one row at a time and with the whole head."""
    found = []
    for row in rows:
        logits = model(**{k: v for k, v in row.items() if k != "labels"}, use_cache=False).logits[0, :-1]
        labels = row["labels"][0, 1:]
        keep = labels != -100
        found.append(logits.log_softmax(-1)[keep].gather(1, labels[keep, None])[:, 0])
    return found


@pytest.mark.parametrize("weighting", ["length", "contrast"])
def test_the_trainers_weighted_loss_is_the_plain_one_weighted(checkpoint, processor, tmp_path, weighting):
    """Packed rows with branches, against one row per annotation, without the image where that is asked for."""
    trainer, collator = make_trainer(checkpoint, processor, tmp_path, weighting)
    records = [trainer.train_dataset[i] for i in range(4)]
    batch = collator(records)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()

    plain = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).train()
    rows = [collator([{**r, "conversations": [c]}]) for r in records for c in r["conversations"]]
    with_image = log_probabilities(plain, rows)
    weights = []
    for row, own in zip(rows, with_image):
        if weighting == "length":
            weights.append(torch.full_like(own, 4 / len(own) ** 0.5))
            continue
        is_image = row["input_ids"] == processor.image_token_id
        text = {k: v[~is_image][None] for k, v in row.items() if k != "pixel_values"}  # the row with the image cut out
        with torch.no_grad():
            (without,) = log_probabilities(plain, [text])
        difference = (own.detach() - without).clamp(1, 5).tolist()
        near = [difference[max(i - 1, 0) : i + 2] for i in range(len(difference))]
        weights.append(torch.tensor([sum(values) / len(values) for values in near]))
    assert weighting == "length" or any(w.min() != w.max() for w in weights)
    expected = -sum((w * p).sum() for w, p in zip(weights, with_image)) / sum(map(len, with_image))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for (name, parameter), (_, other) in zip(trainer.model.named_parameters(), plain.named_parameters()):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=2e-3, atol=2e-5, msg=name)


def test_weighted_losses_do_not_depend_on_accumulation(checkpoint, processor, tmp_path):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        trainer, _ = make_trainer(
            *(checkpoint, processor, tmp_path / str(batch_size), "length"),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def test_an_unknown_weighting_is_named(checkpoint, processor, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown token_weighting 'heavy'. Valid values: none, length, contrast"):
        make_trainer(checkpoint, processor, tmp_path, "heavy")
