"""Packed rows train what separate sequences train: on every path, for random records, through the real trainer."""

import copy
import random
from itertools import combinations

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from alignvlm.data.scenes import RECORD_FEATURES
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Branch
from alignvlm.rows.packing import IGNORED, Row, best_fit, fuller_row_length, joined
from alignvlm.stages.arguments import TrainerArguments
from alignvlm.stages.trainer import AlignVLMTrainer, freeze_all_but
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples
from tests.records import of_exchanges
from tests.running import recompute_activations


WORDS = "a red green circle square is at the top left how many shapes yes no two".split()


def random_record(rng: random.Random, most_annotations: int = 5) -> dict:
    """A record with no, one or two images and one to `most_annotations` annotations of differing lengths."""
    images = [
        Image.new("RGB", (16, 16), tuple(rng.choices(range(256), k=3))) for _ in range(rng.choice((0, 1, 1, 1, 2)))
    ]
    exchanges = [
        (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))), " ".join(rng.choices(WORDS, k=rng.randint(1, 6))))
        for _ in range(rng.randint(1, most_annotations))
    ]
    return of_exchanges(images, exchanges)


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 5e-6) -> None:
    """Equal within `tolerance` of each one's norm; what is zero but for rounding (a key projection's bias) is left out."""
    largest = max(value.norm() for value in other.values())
    for name, value in other.items():
        if value.norm() > 1e-6 * largest:
            found = one.get(name, torch.zeros_like(value))
            assert (found - value).norm() <= tolerance * value.norm(), name


@settings(max_examples=examples(6), deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(MASK_TYPES)),
    st.sampled_from((None, 25, 40)),
    st.sampled_from((None, 60, 200)),
)
def test_packed_equals_separate_for_random_records(processor, make_model, seed, mask_type, max_length, row_length):
    """In float64 but for the loss and the rotary angles, so that rounding feigns no difference; `test_collator.py` and below have float32."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(rng.randint(1, 4))]
    model = make_model(mask_type).double().train()
    collator = AlignVLMCollator(processor, mask_type, max_length, row_length=row_length)
    packed = collator(records)
    separate = AlignVLMCollator(processor, mask_type, max_length, shared_image=False)(records)
    assert packed.pop("losses_of_data", []) == separate.pop("losses_of_data", [])
    assert max_length is None or all(len(row) <= max_length for record in records for row in collator.rows(record))
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("variant", ["lora", "checkpointing", "several records per row"])
def test_packed_equals_separate_with(variant, mask_type, processor, make_model):
    """In float64, as above."""
    rng = random.Random(3)
    records = [random_record(rng) for _ in range(4)]
    model = make_model(mask_type).double().train()
    if variant == "lora":
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=r".*language_model.*(q|v|gate)_proj", init_lora_weights=False)
        ).double()
    separate_model = copy.deepcopy(model)
    if variant == "checkpointing":
        recompute_activations(model)
    row_length = 300 if variant == "several records per row" else None
    packed = AlignVLMCollator(processor, mask_type, row_length=row_length)(records)
    if row_length:
        assert packed["record_ids"].max() > 0
    loss, gradients = loss_and_gradients(model, packed)
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)(records)
    expected_loss, expected = loss_and_gradients(separate_model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected)


def one_optimizer_step(model, collator, records, folder, accumulation: int) -> dict[str, torch.Tensor]:
    """What one step of plain gradient descent takes from each parameter, by the real trainer with accumulation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainerArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(records) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = AlignVLMTrainer(
        model,
        learning_rates=dict.fromkeys(("vision", "projector", "language"), 1.0),
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list(records, features=RECORD_FEATURES),
        processing_class=collator.processor,
    )
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_packed_and_accumulated_equals_separate_in_one_batch(mask_type, processor, make_model, tmp_path):
    """Micro-batches hold different numbers of labels: each counts by its labels, not as one of four."""
    rng = random.Random(5)
    records = [random_record(rng) for _ in range(4)]
    model = make_model(mask_type)
    packed = AlignVLMCollator(processor, mask_type, row_length=200)
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)
    steps = [
        one_optimizer_step(copy.deepcopy(model), collator, records, tmp_path / str(accumulation), accumulation)
        for collator, accumulation in ((packed, 4), (separate, 1))
    ]
    assert_same(*steps, tolerance=1e-4)  # the step is a difference of float32 parameters


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.integers(0, 30), max_size=14), st.integers(5, 60))
def test_best_fit_puts_every_item_into_one_row_and_leaves_no_row_that_another_has_room_for(lengths, row_length):
    rows = best_fit(lengths, row_length)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
    filled = [sum(lengths[item] for item in row) for row in rows]
    for row, tokens in zip(rows, filled):
        assert tokens <= row_length or len(row) == 1
    for one, other in combinations(filled, 2):
        assert one + other > row_length
    assert best_fit(lengths, row_length) == rows


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([5, 8, 2], 10) == [[0], [1, 2]]
    assert best_fit([8, 7, 3, 2], 10) == [[0, 3], [1, 2]]
    assert best_fit([30, 10, 10, 1, 0], 20) == [[0], [1, 2, 4], [3]]


def test_the_closest_row_length_that_fills_rows_is_found():
    alike = [299] * 420  # 6 in 2,048: 88%; 7 in 2,093
    assert fuller_row_length(alike, 2048) == 2096
    assert fuller_row_length(alike, 4096, 0.9) == 4096
    assert fuller_row_length([100, 100, 100], 100, 0.99) is None  # 112 to 192 hold one, 208 two of them
    assert fuller_row_length([300], 64, 0.9) is None  # longer than twice


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_joined_rows_hold_the_records_one_after_the_other(lengths):
    rows = []
    for index, length in enumerate(lengths):
        row = Row([index])
        row.append(Branch((index,) * length, (False,) * length, length, (-1,) * length), 0)
        rows.append(row)
    row = joined(rows)
    expected = [index for index, length in enumerate(lengths) for _ in range(length)]
    assert row.images == list(range(len(lengths)))
    assert row.input_ids == row.record_ids == expected
    assert row.position_ids == [position for length in lengths for position in range(length)]


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_changed_response_token_moves_only_what_comes_after_it_in_its_branch(mask_type, processor, make_model):
    rng = random.Random(11)
    records = [random_record(rng, 3) for _ in range(4)]
    batch = AlignVLMCollator(processor, mask_type, row_length=150)(records)
    labels = batch.pop("labels")
    model = make_model(mask_type)
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
    places = (labels != IGNORED).nonzero().tolist()
    for row, token in rng.sample(places, 12):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][row, token] = (changed["input_ids"][row, token] + 7) % 256 + 4
        with torch.no_grad():
            after = model(**changed, use_cache=False).logits
        moved = (after - before).abs().amax(-1) > 1e-5
        own = torch.zeros_like(moved)
        own[row] = (batch["record_ids"][row] == batch["record_ids"][row, token]) & (
            batch["branch_ids"][row] == batch["branch_ids"][row, token]
        )
        own[row, :token] = False
        assert moved[row, token]
        assert not (moved & ~own).any()


def test_frozen_parts_cost_no_gradients_and_the_head_works_only_at_labels(processor, make_model):
    """Counted in floating-point operations of the backward pass, for the stages that freeze something."""
    records = (random_record(random.Random(seed)) for seed in range(100))
    batch = AlignVLMCollator(processor)([next(record for record in records if len(record["images"]) == 1)])
    labels = batch.pop("labels")
    keep = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED

    def backward_operations(rates: dict[str, float]) -> tuple[int, int]:
        model = make_model(attn_implementation="eager").train()
        freeze_all_but(model, rates)
        with FlopCounterMode(display=False) as forward:
            hidden = model.model(**batch, positions_to_keep=keep, use_cache=False).last_hidden_state
            loss = model.lm_head(hidden).logsumexp(-1).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        head = model.lm_head.weight.numel() * 2 * int(keep.sum())
        assert hidden.shape[1] == int(keep.sum()) and forward.get_total_flops() > head
        return forward.get_total_flops(), backward.get_total_flops()

    with FlopCounterMode(display=False) as vision:
        make_model(attn_implementation="eager").get_image_features(batch["pixel_values"])
    forward, stage1 = backward_operations({"projector": 1.0})
    _, stage2 = backward_operations({"projector": 1.0, "vision": 1.0})
    _, everything = backward_operations({"projector": 1.0, "vision": 1.0, "language": 1.0})
    language = forward - vision.get_total_flops()
    # Attention's two products have two gradients each whatever trains, so a frozen language model costs a little over its forward.
    assert language * 0.9 < stage1 < language * 1.5
    assert 1.8 * vision.get_total_flops() * 0.8 < stage2 - stage1 < 2.2 * vision.get_total_flops()
    assert everything - stage2 > language * 0.5


@pytest.mark.slow
@pytest.mark.parametrize("mask_type", ["image", "mutual"])  # one that shares trunks, one that cannot
def test_rows_of_several_records_under_a_compiled_flex_kernel(make_model, processor, mask_type):
    """The loss, and every response's log-probabilities, are those of one record per row under SDPA."""
    rng = random.Random(3)
    records = [random_record(rng) for _ in range(6)]
    model = make_model(mask_type).eval()
    found = {}
    for kernel, row_length in (("sdpa", None), ("flex_attention", 256)):
        torch.compiler.reset()  # see test_modeling.set_kernel
        model.set_attn_implementation(kernel)
        collator = AlignVLMCollator(processor, mask_type, row_length=row_length, pad_to_multiple_of=128)
        batch = collator(records)
        with torch.no_grad():
            outputs = model(**batch, use_cache=False)
        labels = batch["labels"][:, 1:]
        log_probs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        found[kernel] = (outputs.loss, log_probs[labels != IGNORED].sort().values, len(batch["input_ids"]))
    assert found["flex_attention"][2] < found["sdpa"][2]
    torch.testing.assert_close(found["flex_attention"][0], found["sdpa"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["flex_attention"][1], found["sdpa"][1], rtol=1e-4, atol=1e-4)
