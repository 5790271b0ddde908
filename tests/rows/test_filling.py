"""Filled rows: every record once, the same rows whatever reads them, nearly full, and trained as if each record had a row of its own."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alignvlm.data.mixture import Mixture, MixtureSampler, load_mixture
from alignvlm.rows import filling
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.filling import Pieces, RowSampler, fill, fill_rows, level, measure, rows_of_epochs, sizes_of
from alignvlm.rows.packing import IGNORED
from benchmarks import models
from benchmarks import rows as benchmark
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples
from tests.conftest import TEXT, VISION
from tests.records import of_exchanges
from tests.rows.test_packing import assert_same, loss_and_gradients, random_record


SOURCES = [
    {"name": "scenes", "annotations": ["short_caption", "questions"], "count": 20},
    {"name": "scene_texts", "count": 10},
    {"data": "rows.jsonl", "tag": "[mine]"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of no, one or two images."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index, count in enumerate((0, 1, 2, 1, 2, 0, 1)):
        names = [f"{index}_{k}.png" for k in range(count)]
        for name in names:
            Image.new("RGB", (20, 12), (30 * index, 90, 10)).save(folder / name)
        answer = "red " * (1 + 2 * index)
        messages = [{"role": "user", "content": f"What is {index}?"}, {"role": "assistant", "content": answer.strip()}]
        lines.append(json.dumps({"images": names, "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def mixture_of(collator: AlignVLMCollator, data, **options) -> Mixture:
    return load_mixture(SOURCES, collator.token_counts, data, **options)


def labels_of(batch: dict) -> Counter:
    return Counter(batch["labels"][batch["labels"] != IGNORED].tolist())


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_rows_hold_all_rows_of_all_records_once_and_are_as_long_as_counted(processor, data, mask_type, monkeypatch):
    monkeypatch.setattr(filling, "WINDOW", 16)
    collator = AlignVLMCollator(processor, mask_type, max_length=120)
    mixture = mixture_of(collator, data)
    rows = fill_rows(mixture, collator, 200, batch_size=2, rows_per_step=4)
    count = rows.description["rows_per_epoch"]
    assert count <= len(rows.sampler) < count + 4 and len(rows.sampler) % 4 == 0
    seen, trained, tokens = Counter(), Counter(), 0
    for index in rows.sampler:
        example = rows.dataset[index]
        if not example["records"]:  # completes the last step
            continue
        batch = collator([example])
        assert len(batch["input_ids"]) == 1 and batch["input_ids"].shape[1] <= 200
        tokens += batch["input_ids"].shape[1]
        trained += labels_of(batch)
        seen.update((record["source"], record["number"], record["piece"]) for record in example["records"])
    expected, labels = Counter(), Counter()
    for record in mixture.dataset:
        expected.update((record["source"], record["number"], piece) for piece in range(len(collator.rows(record))))
        labels += labels_of(collator([record]))
    assert seen == expected and trained == labels
    assert rows.description["fill"] == pytest.approx(tokens / 200 / count, abs=1e-4)
    # Records make several rows: one of each annotation, or what `max_length` divides.
    assert len(seen) > len(mixture.sampler)


def test_rows_do_not_depend_on_workers_or_how_a_step_is_cut_but_on_the_seed(processor, data):
    collator = AlignVLMCollator(processor, max_length=120)
    given = {"row_length": 150, "batch_size": 4, "rows_per_step": 4, "epochs": 2}

    def rows(seed: int = 0, **changed):
        return fill_rows(mixture_of(collator, data, seed=seed, epochs=2), collator, **{**given, **changed})

    one, other, cut = rows(), rows(workers=2), rows(batch_size=1)
    assert one.description == other.description == cut.description
    assert one.description["sha256"] != rows(seed=1).description["sha256"]
    for epoch in (0, 1):
        orders = []
        for found in (one, other, cut):
            found.sampler.set_epoch(epoch)
            orders.append(list(found.sampler))
        rows_of_epoch = range(epoch * len(one.sampler), (epoch + 1) * len(one.sampler))
        assert orders[0] == orders[1] and sorted(orders[0]) == sorted(orders[2]) == list(rows_of_epoch)
        for start in range(0, len(orders[0]), 4):
            assert set(orders[0][start : start + 4]) == set(orders[2][start : start + 4])
    assert one.dataset[0] == other.dataset[0]


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=2),
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
    st.integers(1, 3),
    st.floats(0, 0.2),
    st.randoms(use_true_random=False),
)
def test_every_epoch_has_its_records_in_as_many_rows(sizes, draws, epochs, share, rng):
    texts_first = min(share, draws[1] / sum(draws) / epochs)
    sampler = MixtureSampler(sizes, draws, [True, False], 3, epochs * sum(draws), texts_first)
    made = {
        record: [(rng.randint(0, 60), int(record < sizes[0])) for _ in range(rng.randint(1, 3))]
        for record in range(sum(sizes))
    }
    pieces = Pieces.of(made)
    found = rows_of_epochs(sampler, pieces, 60, epochs)
    assert len(found) == epochs and len({len(rows) for rows in found}) == 1
    for epoch, rows in enumerate(found):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(piece for row in rows for piece in row) == sorted(pieces.of_records(order))
        assert all(pieces.tokens[row].sum() <= 60 for row in rows)
        first = sum(len(made[record]) for record in order[: sampler.texts_first])
        if epochs == 1:  # rows that even out epochs stand at the end
            before = [piece for row in rows for piece in row][:first]
            assert not any(pieces.images[piece] for piece in before)
    longer = rows_of_epochs(sampler, pieces, 60, 1, needed=len(found[0]) * epochs)
    assert sum(map(len, longer)) >= len(found[0]) * epochs


@pytest.mark.parametrize("name, row_lengths", [("coco", (2112, 4096, 8192)), ("pathvqa", None), ("cauldron", None)])
def test_rows_are_at_least_95_percent_full(name, row_lengths):
    """COCO's records are so alike that no more than six fit into 2,048 tokens, and seven into 2,112: rows of 2,048 are less full, and hardly padded."""
    shape = benchmark.SHAPES[name]
    for seed in (0, 1):
        lengths = shape.lengths(4096, seed)
        for row_length in row_lengths or shape.row_lengths:
            rows = benchmark.filled(lengths, row_length)
            assert sum(rows) == sum(lengths)
            assert sum(rows) / len(rows) / row_length >= 0.95, row_length
            assert benchmark.padding(rows, 2) < 0.05
        assert benchmark.padding(benchmark.filled(lengths, 2048), 2) < 0.05


def test_the_lengths_of_the_benchmark_are_those_of_its_records():
    words = 5000  # so many that no two questions begin alike
    _, processor = models.alignvlm({**VISION, "vision_use_head": False}, {**TEXT, "vocab_size": words})
    collator = AlignVLMCollator(processor)
    for shape in benchmark.SHAPES.values():
        for record in benchmark.made_records(shape, 3, VISION["image_size"], words):
            (row,) = collator.rows(record)
            conversations = benchmark.Record.from_row(record).conversations
            exchanges = [(len(c.prompt.split()), len(c.responses[0].split())) for c in conversations]
            images = len(record["images"])
            smaller = images * (shape.image_tokens - processor.image_seq_length)
            assert len(row) == shape.length(images, exchanges) - smaller


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=24), st.sampled_from((1, 2, 4)))
def test_levelled_micro_batches_differ_by_at_most_the_images_of_a_row(images, batch_size):
    images = images[: len(images) // batch_size * batch_size]
    order = level(images, batch_size)
    assert sorted(order) == list(range(len(images)))
    found = spread(images, order, batch_size, len(images) // batch_size)
    assert found <= max(images)


def spread(images: list[int], order: list[int], batch_size: int, processes: int) -> float:
    """How many images more the process with the most has than the one with the least, a mean over micro-steps."""
    counts = [
        sum(images[row] for row in order[start : start + batch_size]) for start in range(0, len(order), batch_size)
    ]
    together = [counts[start : start + processes] for start in range(0, len(counts), processes)]
    return float(np.mean([max(step) - min(step) for step in together]))


def test_processes_have_about_as_many_images():
    """Eight processes with two rows each: no process waits long for one with more images."""
    shape, rng = benchmark.SHAPES["cauldron"], np.random.default_rng(0)
    drawn = [shape.draw(rng) for _ in range(3000)]
    pieces = Pieces.of({index: [(shape.length(*record), record[0])] for index, record in enumerate(drawn)})
    rows = fill(list(range(len(drawn))), pieces, 2048, seed=[0])
    rows = rows[: len(rows) // 16 * 16]
    images = [int(pieces.images[row].sum()) for row in rows]
    order = list(RowSampler(np.array([images]), batch_size=2, rows_per_step=16))
    before, after = (spread(images, each, 2, 8) for each in (range(len(rows)), order))
    assert before > 12 and after < before / 4


@settings(max_examples=examples(6), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(MASK_TYPES)), st.sampled_from(("sdpa", "eager")))
def test_filled_rows_train_what_records_train_in_rows_of_their_own(processor, make_model, seed, mask_type, kernel):
    """In float64 but for the loss and the rotary angles; on the other side every annotation has a row of its own. Flex attention: see
    test_packing.py."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(rng.randint(2, 6))]
    collator = AlignVLMCollator(processor, mask_type)
    pieces = Pieces.of({index: sizes_of(record, collator) for index, record in enumerate(records)})
    longest = int(pieces.tokens.max())
    rows = fill(list(range(len(records))), pieces, rng.randint(longest, 3 * longest), seed=[seed])
    filled = collator(
        [{"records": [{**records[pieces.record[p]], "piece": int(pieces.number[p])} for p in row]} for row in rows]
    )
    assert len(filled["input_ids"]) == len(rows)
    model = make_model(mask_type, attn_implementation=kernel).double().train()
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)(records)
    loss, gradients = loss_and_gradients(model, filled)
    expected_loss, expected = loss_and_gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected, tolerance=2e-5)


@pytest.mark.slow
def test_a_worker_need_not_be_forked_from_its_parent(processor, tmp_path):
    """As on macOS and Windows, and with Python 3.14: data and collator are sent to it."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "captions": ["A circle. " * count]} for count in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collator = AlignVLMCollator(processor)
    sources = [{"data": "rows.jsonl"}, {"name": "scenes", "count": 2}]
    mixture = load_mixture(sources, collator.token_counts, tmp_path)
    here, there = (measure(mixture, collator, [2, 0, 1], *own) for own in ((), (1, "spawn")))
    assert len(here.record) == 3 and here.tokens.min() > 0
    assert all(np.array_equal(getattr(here, name), getattr(there, name)) for name in ("record", "tokens", "images"))


def test_a_record_in_several_rows_is_counted_once(processor):
    exchanges = [("Is there a circle?", "yes"), ("What colour is it?", "red " * 60), ("How many?", "two")]
    image = Image.new("RGB", (16, 16), (60, 200, 30))
    whole = of_exchanges([image], exchanges, source="whole")
    damaged = of_exchanges([{"bytes": b"no image", "path": None}], exchanges, source="damaged")
    collator = AlignVLMCollator(processor, "prefix", max_length=60, on_bad_image="skip", name_records=True)
    pieces = [len(sizes_of(record, collator)) for record in (whole, damaged)]
    assert pieces == [3, 3]
    rows = [{"records": [{**whole, "piece": piece}, {**damaged, "piece": piece}]} for piece in range(3)]
    batch = collator(rows)
    assert len(batch["input_ids"]) == 3 and len(batch["pixel_values"]) == 3
    dropped = Counter((loss["kind"], loss["source"]) for loss in batch["losses_of_data"])
    assert dropped == {("cut_response", "whole"): 1, ("bad_image", "damaged"): 1}
    assert batch["records_read"] == 2 and len(batch["record_names"]) == 6
    assert "losses_of_data" not in collator(rows[1:]) and collator(rows[1:])["records_read"] == 0
    alone = collator([{"records": [{**damaged, "piece": 0}]}, {"records": []}])
    assert alone["input_ids"].shape == (1, 1) and (alone["labels"] == IGNORED).all()
