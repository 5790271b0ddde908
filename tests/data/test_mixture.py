"""Mixtures: shares in tokens, the order of records over seeds, epochs, processes and resumption, streams, and what is left out."""

import itertools
import json
import math
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, prepare_data_loader, skip_first_batches
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from alignvlm.data.mixture import (
    MixtureSampler,
    Part,
    image_sample_probability,
    load_mixture,
    records_per_epoch,
)
from alignvlm.data.sources import read_source
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import parse_anywhere
from alignvlm.stages.loading import make_mixture
from alignvlm.stages.stage import main as run
from alignvlm.tools.show_data import main
from hub_upload.run_record import read_run_record
from tests import examples
from tests.records import exchanges_of, of_exchanges, responses_of
from tests.running import arguments_for


CAPTIONS = {"name": "scenes", "annotations": ["detailed_caption"], "count": 40}
QUESTIONS = {"name": "scenes", "annotations": ["questions"], "count": 300, "seed": 5}
TEXTS = {"name": "scene_texts", "count": 200}


@pytest.fixture
def collator(processor) -> AlignVLMCollator:
    return AlignVLMCollator(processor)


def stage_arguments(model, output, **fields) -> list[str]:
    return arguments_for(model, output, **{"projector_learning_rate": 1e-3, **fields})


def tokens_of(mixture, collator, indices) -> tuple[Counter, Counter]:
    """Image and text tokens of the records at the indices, per source."""
    image, text = Counter(), Counter()
    for index in indices:
        record = mixture.dataset[index]
        counts = collator.token_counts(record)
        image[record["source"]] += counts[0]
        text[record["source"]] += counts[1]
    return image, text


class TestShares:
    @given(
        r=st.floats(0.01, 0.99),
        v=st.floats(1, 1000),
        c=st.floats(1, 1000),
        t=st.floats(1, 5000),
        delta=st.floats(1e-3, 1),
    )
    def test_the_probability_gives_the_share_and_the_bound_is_the_largest(self, r, v, c, t, delta):
        largest = v / (v + c)
        if r <= largest:
            p = image_sample_probability(r, v, c, t)
            assert 0 <= p <= 1 + 1e-9
            assert p * v / (p * (v + c) + (1 - p) * t) == pytest.approx(r)
        else:
            with pytest.raises(ValueError, match=r"largest feasible share is (\S+)\.$") as caught:
                image_sample_probability(r, v, c, t)
            stated = float(re.search(r"share is (\S+)\.$", str(caught.value)).group(1))
            assert stated <= largest < stated + 2e-4
            image_sample_probability(stated, v, c, t)

    @given(
        sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=5),
        tokens=st.lists(st.floats(5, 900), min_size=5, max_size=5),
        raw=st.lists(st.floats(0.02, 1), min_size=5, max_size=5),
        free=st.integers(0, 5),
    )
    def test_draws_give_the_shares_of_tokens(self, sizes, tokens, raw, free):
        """Brute force: what the draws weigh is what was asked for, up to one record."""
        parts = []
        scale = sum(raw[: len(sizes)]) * (1.5 if free else 1)
        for i, size in enumerate(sizes):
            share = None if i < min(free, len(sizes) - 1) else raw[i] / scale
            parts.append(Part(str(i), range(size), share, "", tokens[i] / 2, tokens[i] / 2))
        given = [part.share for part in parts if part.share is not None]
        assume(sum(given) < 0.98 or len(given) == len(parts))
        draws = records_per_epoch(parts)
        total = sum(draw * part.tokens for draw, part in zip(draws, parts))
        for draw, part in zip(draws, parts):
            if part.share is None:
                assert draw == len(part.source)
            elif draw > 1:
                slack = (max(tokens) * len(parts)) / total
                assert draw * part.tokens / total == pytest.approx(part.share, abs=slack)
        if len(given) == len(parts):
            assert all(draw <= len(part.source) for draw, part in zip(draws, parts))
            assert any(draw == len(part.source) for draw, part in zip(draws, parts))

    @pytest.mark.parametrize(
        "shares, message",
        [
            ([0.5, 0.6], r"sum to 1\.1 instead of 1\. The largest feasible share of the last is 0\.5"),
            ([None, 1.0], "leaves no tokens to the sources without one"),
            ([None, -0.1], "must be positive"),
        ],
    )
    def test_impossible_shares_are_errors_that_say_what_is_possible(self, shares, message):
        parts = [Part("a", range(10), share, "", 1.0, 1.0) for share in shares]
        with pytest.raises(ValueError, match=message):
            records_per_epoch(parts)

    def test_observed_shares_are_those_asked_for(self, collator):
        """Over some thousand draws of real records, counted one by one: within two percent of all tokens."""
        sources = [{**CAPTIONS, "count": 1500}, {**TEXTS, "share": 0.1}]
        mixture = load_mixture(sources, collator.token_counts)
        order = list(mixture.sampler)
        assert len(order) > 1500
        image, text = tokens_of(mixture, collator, order)
        assert (text["scene_texts"]) / (image + text).total() == pytest.approx(0.1, abs=0.005)
        prefix = tokens_of(mixture, collator, order[:1000])
        assert prefix[1]["scene_texts"] / (prefix[0] + prefix[1]).total() == pytest.approx(0.1, abs=0.02)

    def test_the_share_of_image_tokens_is_reached(self, collator):
        sources = [{**CAPTIONS, "count": 800}, TEXTS]
        for share in (0.03, 0.06):
            mixture = load_mixture(sources, collator.token_counts, image_token_share=share)
            image, text = tokens_of(mixture, collator, list(mixture.sampler))
            assert image.total() / (image + text).total() == pytest.approx(share, abs=0.01)
        with pytest.raises(ValueError, match="largest feasible share"):
            load_mixture(sources, collator.token_counts, image_token_share=0.9)
        with pytest.raises(ValueError, match="sources with images and sources without"):
            load_mixture([CAPTIONS], collator.token_counts, image_token_share=0.1)


SAMPLER = st.builds(
    lambda sizes, seed: (sizes, seed),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 5),
)


def make_sampler(made, epochs: float = 1, image_start_fraction: float = 0.0) -> MixtureSampler:
    parts, seed = made
    sizes, draws, has_images = map(list, zip(*parts))
    return MixtureSampler(sizes, draws, has_images, seed, epochs * sum(draws), image_start_fraction)


def orders(sampler: MixtureSampler, epochs: int) -> list[list[int]]:
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


class TestOrder:
    @given(SAMPLER)
    @settings(max_examples=examples(60))
    def test_epochs_draw_what_they_should_and_no_record_comes_again_before_all_have(self, made):
        sizes, draws, _ = zip(*made[0])
        epochs = orders(make_sampler(made), 4)
        assert epochs == orders(make_sampler(made), 4)  # the seed decides, and nothing else
        first = 0
        for size, draw in zip(sizes, draws):
            taken = [[i - first for i in epoch if first <= i < first + size] for epoch in epochs]
            assert all(len(part) == draw for part in taken)
            # Within an epoch the draws are shuffled among the other parts, in the order of the chain.
            chain = flat(taken)
            for start in range(0, len(chain) - size + 1, size):
                assert sorted(chain[start : start + size]) == list(range(size))
            first += size

    def test_epochs_and_seeds_differ(self):
        made = [(50, 50, True), (20, 30, False)]
        one, two = orders(make_sampler((made, 0)), 2)
        assert one != two and sorted(one) != sorted(two)  # of the second part other records as well
        assert orders(make_sampler((made, 1)), 1)[0] != one

    @given(SAMPLER, st.integers(1, 5), st.integers(1, 4))
    @settings(max_examples=examples(60))
    def test_ranks_split_an_epoch_without_overlap(self, made, ranks, batch_size):
        """As accelerate shards it; only the last round may begin again to fill up."""
        sampler = make_sampler(made)
        shards = []
        for rank in range(ranks):
            shard = BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), ranks, rank)
            shards.append(list(shard))
        assert len({len(shard) for shard in shards}) == 1
        seen = flat(flat(zip(*shards)))
        assert seen[: len(sampler)] == list(sampler)
        assert len(seen) - len(sampler) < ranks * batch_size

    @given(SAMPLER, st.integers(0, 6), st.integers(0, 2))
    @settings(max_examples=examples(30))
    def test_resuming_goes_on_where_it_stopped(self, made, steps, epoch):
        sampler = make_sampler(made)
        sampler.set_epoch(epoch)
        whole = [batch.tolist() for batch in DataLoader(range(10_000), batch_size=3, sampler=sampler)]
        resumed = skip_first_batches(DataLoader(range(10_000), batch_size=3, sampler=sampler), steps)
        assert [batch.tolist() for batch in resumed] == whole[steps:]

    def test_workers_do_not_change_the_order(self, collator):
        mixture = load_mixture([CAPTIONS, {**TEXTS, "share": 0.3}], collator.token_counts)

        def batches(workers):
            loader = DataLoader(
                mixture.dataset, batch_size=8, sampler=mixture.sampler, num_workers=workers, collate_fn=collator
            )
            return list(loader)

        for alone, together in zip(batches(0), batches(2), strict=True):
            assert alone.keys() == together.keys()
            assert all(torch.equal(alone[name], together[name]) for name in alone)

    @given(SAMPLER, st.floats(0, 1), st.one_of(st.integers(1, 3), st.floats(0.1, 3)))
    @settings(max_examples=examples(80))
    def test_no_image_comes_before_its_fraction(self, made, fraction, epochs):
        sizes, draws, has_images = zip(*made[0])
        total, texts = sum(draws), sum(d for d, images in zip(draws, has_images) if not images)
        needed = min(round(fraction * epochs * total), total)
        if needed > texts:
            with pytest.raises(ValueError, match="The largest feasible fraction is"):
                make_sampler(made, epochs, fraction)
            return
        sampler = make_sampler(made, epochs, fraction)
        is_image = [images for size, images in zip(sizes, has_images) for _ in range(size)]
        stage = flat(orders(sampler, math.ceil(epochs)))
        plain = flat(orders(make_sampler(made, epochs), math.ceil(epochs)))
        assert sorted(stage) == sorted(plain)  # only moved
        assert not any(is_image[index] for index in stage[: round(fraction * epochs * total)])


@pytest.mark.parametrize(
    "length, records", [({"max_steps": 6}, 24), ({"max_steps": None, "num_train_epochs": 0.5}, 20)]
)
def test_the_fraction_is_one_of_what_the_stage_reads(checkpoint, collator, tmp_path, length, records):
    """Steps of 4 records, or half of 40."""
    sources = [{**QUESTIONS, "count": 16}, {**TEXTS, "count": 24}]
    given = stage_arguments(checkpoint, tmp_path, sources=sources, image_start_fraction=0.5, **length)
    (arguments,) = parse_anywhere(given)
    assert make_mixture(arguments, collator, [], processes=1).sampler.texts_first == records // 2


class TestStreams:
    SOURCES = [{**QUESTIONS, "share": 0.8}, {**TEXTS, "share": 0.2}]

    def load(self, collator, **options):
        return load_mixture(self.SOURCES, collator.token_counts, streaming=True, **options)

    def test_shares_seeds_and_epochs(self, collator):
        mixture = self.load(collator)
        image, text = Counter(), Counter()
        for record in islice(mixture.dataset, 3000):
            counts = collator.token_counts(record)
            image[record["source"]] += counts[0]
            text[record["source"]] += counts[1]
        assert text["scene_texts"] / (image + text).total() == pytest.approx(0.2, abs=0.02)

        def first(stream):
            return [r["conversations"] for r in islice(stream, 50)]

        assert first(mixture.dataset) == first(self.load(collator).dataset)
        assert first(mixture.dataset) != first(self.load(collator, seed=1).dataset)
        before = first(mixture.dataset)
        mixture.dataset.set_epoch(1)
        assert first(mixture.dataset) != before

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_do_not_overlap(self, collator, ranks):
        """Neither as accelerate shards a stream nor as `datasets` does."""
        source = {**QUESTIONS, "annotations": ["detailed_caption", "questions"]}
        stream = load_mixture([source], collator.token_counts, streaming=True).dataset
        count = 40 * ranks

        def seen(records):
            return [json.dumps(r["conversations"]) for r in records]

        whole = seen(islice(stream, count))
        shards = [IterableDatasetShard(stream, 5, num_processes=ranks, process_index=r) for r in range(ranks)]
        by_rank = [seen(islice(shard, 40)) for shard in shards]
        assert flat(by_rank[rank][i : i + 5] for i in range(0, 40, 5) for rank in range(ranks)) == whole
        nodes = [split_dataset_by_node(stream, r, ranks) for r in range(ranks)]
        assert seen(flat(zip(*(islice(node, 40) for node in nodes)))) == whole

    def test_texts_come_first(self, collator):
        stream = self.load(collator, image_start_fraction=0.5, records=100).dataset
        kinds = [bool(r["images"]) for r in islice(stream, 100)]
        assert not any(kinds[:50]) and any(kinds[50:60])

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_texts_come_first_on_every_process(self, collator, ranks, workers):
        stream = self.load(collator, image_start_fraction=0.5, records=80).dataset
        for rank in range(ranks):
            loader = DataLoader(stream, batch_size=4, collate_fn=list, num_workers=workers)
            prepared = prepare_data_loader(
                loader, num_processes=ranks, process_index=rank, dispatch_batches=False, put_on_device=False
            )
            kinds = [bool(r["images"]) for batch in islice(prepared, 80 // 4 // ranks) for r in batch]
            half = len(kinds) // 2
            assert not any(kinds[:half]) and any(kinds[half:])

    @pytest.mark.parametrize("fraction", [0.0, 0.1])
    def test_workers_leave_out_no_file(self, tmp_path, fraction):
        for number in range(4):
            rows = [{"prompt": "Say", "completion": f"{number}"} for _ in range(10)]
            (tmp_path / f"train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        source, options = {"data": str(tmp_path)}, {"image_start_fraction": fraction, "records": 100}
        stream = load_mixture([source], lambda record: (0, 3), streaming=True, **options).dataset
        loader = DataLoader(stream, batch_size=10, collate_fn=list, num_workers=2)
        read = [record["conversations"][0]["responses"][0] for batch in islice(loader, 12) for record in batch]
        assert set(read) == {"0", "1", "2", "3"}

    def test_a_stream_without_shares_is_refused(self, collator):
        with pytest.raises(ValueError, match="every source needs a share; scene_texts has none"):
            load_mixture([{**QUESTIONS, "share": 0.5}, TEXTS], collator.token_counts, streaming=True)

    def test_a_stage_trains_from_streams(self, checkpoint, tmp_path):
        arguments = stage_arguments(checkpoint, tmp_path / "out", streaming=True, sources=self.SOURCES, max_steps=None)
        with pytest.raises(ValueError, match="streaming needs max_steps"):
            run(arguments)
        entry = run([*arguments, "--max_steps", "3", "--dataloader_num_workers", "2"])
        assert entry["steps"] == 3 and entry["records"] is None and entry["data"][0]["share"] == 0.8


def test_a_tag_stands_before_every_prompt_and_the_recipe_says_which_to_use(collator, checkpoint, tmp_path):
    sources = [{**CAPTIONS, "tag": "[web]"}, {**TEXTS, "tag": "[book]"}]
    mixture = load_mixture(sources, collator.token_counts)
    for index in (0, 45):
        record, tag = mixture.dataset[index], "[web]" if index < 40 else "[book]"
        assert all(prompt.startswith(f"{tag} ") for prompt, _ in exchanges_of(record))
    arguments = stage_arguments(checkpoint, tmp_path, sources=sources, max_steps=1, evaluation_tag="[web]")
    entry = run(arguments)
    assert entry["evaluation_tag"] == "[web]" and [d["tag"] for d in entry["data"]] == ["[web]", "[book]"]


def test_rehearsal_reads_the_sources_of_an_earlier_stage(checkpoint, tmp_path):
    run(stage_arguments(checkpoint, tmp_path / "stage1", stage=1, sources=[CAPTIONS], max_steps=1))
    rehearsal = {"name": "rehearsal", "stage": 1, "share": 0.25}
    entry = run(
        stage_arguments(tmp_path / "stage1", tmp_path / "stage2", stage=2, sources=[QUESTIONS, rehearsal], max_steps=1)
    )
    assert [d["name"] for d in entry["data"]] == ["scenes", "scenes"]
    tokens = [d["records_per_epoch"] * (d["image_tokens"] + d["text_tokens"]) for d in entry["data"]]
    assert tokens[1] / sum(tokens) == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match=r"Cannot rehearse .*one of \[1\]"):
        run(stage_arguments(tmp_path / "stage1", tmp_path / "x", sources=[{**rehearsal, "stage": 7}], max_steps=1))


def test_rehearsal_keeps_the_proportions_of_the_earlier_stage(processor):
    """Whatever the sizes of its sources: here a tenth of text, of which there is more than of anything else."""
    collator = AlignVLMCollator(processor)
    sources = [CAPTIONS, {"name": "scene_texts", "count": 3000, "share": 0.1}]
    stages = [{"stage": 3, "sources": sources}]
    mixture = load_mixture(
        [QUESTIONS, {"name": "rehearsal", "stage": 3, "share": 0.5}], collator.token_counts, earlier_stages=stages
    )
    tokens = [part.tokens * draws for part, draws in zip(mixture.parts, mixture.draws)]
    assert sum(tokens[1:]) / sum(tokens) == pytest.approx(0.5, abs=0.02)
    assert tokens[2] / sum(tokens[1:]) == pytest.approx(0.1, abs=0.01)


def test_a_stage_that_rehearsed_is_rehearsed_whole(processor):
    """Its own rehearsal stands for the stage before it, in the share that it had there."""
    collator = AlignVLMCollator(processor)
    texts = {"name": "scene_texts", "count": 40}
    rehearsed = [{**CAPTIONS, "share": 0.8}, {"name": "rehearsal", "stage": 1, "share": 0.2}]
    stages = [{"stage": 1, "sources": [texts]}, {"stage": 3, "sources": rehearsed}]
    again = [QUESTIONS, {"name": "rehearsal", "stage": 3, "share": 0.5}]
    mixture = load_mixture(again, collator.token_counts, earlier_stages=stages)
    assert [part.name for part in mixture.parts] == ["scenes", "scenes", "scene_texts"]
    tokens = [part.tokens * draws for part, draws in zip(mixture.parts, mixture.draws)]
    assert sum(tokens[1:]) / sum(tokens) == pytest.approx(0.5, abs=0.05)
    assert tokens[2] / sum(tokens[1:]) == pytest.approx(0.2, abs=0.05)
    with pytest.raises(ValueError, match=r"one of \[\], the stages"):  # of the stages before it, none is left
        load_mixture(again, collator.token_counts, earlier_stages=stages[1:])


class TestLeftOut:
    @pytest.fixture
    def photos(self, tmp_path):
        """Twenty photos, of which two cannot be read."""
        folder = tmp_path / "data"
        folder.mkdir()
        rows = []
        for index in range(20):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
            rows.append({"image": f"{index}.png", "captions": [f"number {index}"]})
        (folder / "3.png").write_bytes(b"")
        (folder / "7.png").unlink()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def arguments(self, checkpoint, photos, output, **options):
        sources = [{"name": "local", "data": "rows.jsonl"}]
        given = {
            "data_dir": photos,
            "sources": sources,
            "num_train_epochs": 1,
            "max_steps": -1,
            **options,
        }
        return stage_arguments(checkpoint, output, **given)

    def test_a_bad_image_stops_the_run_by_name_or_is_skipped_and_recorded(self, checkpoint, photos, tmp_path):
        with pytest.raises(ValueError, match=r"[37]\.png.*on_bad_image: skip"):
            run(self.arguments(checkpoint, photos, tmp_path / "a"))
        entry = run(self.arguments(checkpoint, photos, tmp_path / "b", on_bad_image="skip"))
        found = entry["losses_of_data"]
        assert found["bad_image"] == len(found["bad_image_list"]) == 2
        assert set(re.findall(r"\d\.png", " ".join(found["bad_image_list"]))) == {"3.png", "7.png"}
        assert read_run_record(tmp_path / "b")["stages"][-1]["losses_of_data"] == found
        assert entry["records"] == 20

    def test_too_many_bad_images_stop_the_run(self, checkpoint, photos, tmp_path):
        with pytest.raises(RuntimeError, match=r"more than max_bad_images=0\.0001.*\.png"):
            run(self.arguments(checkpoint, photos, tmp_path, on_bad_image="skip", max_bad_images=1e-4))

    def test_a_batch_of_nothing_but_bad_images_trains_nothing(self, processor, photos, make_model):
        collator = AlignVLMCollator(processor, on_bad_image="skip")
        record = of_exchanges([str(photos / "3.png")], [("p", "r")], source="x")
        batch = collator([record, record])
        assert [loss["kind"] for loss in batch.pop("losses_of_data")] == ["bad_image"] * 2
        assert (batch["labels"] == -100).all() and "pixel_values" not in batch
        assert make_model()(**batch).logits.isfinite().all()

    def test_over_long_annotations_lose_the_end_of_a_response_or_all_of_it_and_it_is_counted(
        self, checkpoint, photos, tmp_path
    ):
        rows = [
            {
                "image": "0.png",
                "annotations": [
                    {"prompt": "p", "response": "short"},
                    {"prompt": "p", "response": "long " * 40},
                    {"prompt": "long " * 40, "response": "r"},
                ],
            },
            {"image": "1.png", "annotations": [{"prompt": "p", "response": "long " * 40}]},
            {"image": "2.png", "annotations": [{"prompt": "long " * 40, "response": "r"}]},
        ]
        (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = run(self.arguments(checkpoint, photos, tmp_path / "a", max_length=40))
        assert entry["losses_of_data"] == {
            "dropped_annotation": 1,
            "cut_response": 2,
            "dropped_record": 1,
            "bad_image_list": [],
            "bad_row_list": [],
        }

    @pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
    def test_a_bad_row_stops_the_run_by_name_or_is_skipped_and_recorded(
        self, checkpoint, photos, tmp_path, streaming, capfd
    ):
        """Long before it is its turn, where the rows are indexed; in a stream when it is, in whichever worker."""
        rows = [{"image": f"{index}.png", "captions": ["" if index == 2 else "c"]} for index in (0, 1, 2, 4)]
        (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "max_steps": 3,
            "num_train_epochs": None,
            "streaming": streaming,
            "dataloader_num_workers": int(streaming),
        }
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3: `captions\[0\]` is empty"):
            run(self.arguments(checkpoint, photos, tmp_path / "a", **options))
        entry = run(self.arguments(checkpoint, photos, tmp_path / "b", on_bad_row="skip", **options))
        found = entry["losses_of_data"]
        assert found["bad_row"] == len(found["bad_row_list"]) >= 1 and entry["steps"] == 3
        assert set(found["bad_row_list"]) == {
            "local: rows.jsonl, line 3: `captions[0]` is empty. Fill it in, or remove the row."
        }
        assert streaming or found["bad_row"] == 1
        if not streaming:
            main(
                [
                    *self.arguments(checkpoint, photos, tmp_path / "d", on_bad_row="skip"),
                    "--sheet",
                    str(tmp_path / "x.html"),
                ]
            )
            assert re.search(r"1 bad rows, left out:\n +rows.jsonl, line 3: ", capfd.readouterr().out)
        if streaming:
            with pytest.raises(
                RuntimeError, match=r"came of rows that cannot be used, more than max_bad_rows=1e-05.*line 3"
            ):
                run(
                    self.arguments(checkpoint, photos, tmp_path / "c", on_bad_row="skip", max_bad_rows=1e-5, **options)
                )

    def test_bad_rows_of_a_stream_keep_their_place_and_are_no_part_of_the_limit(self, photos):
        """Nor do they part the rows of one image."""
        rows = [{"image": f"{i}.png", "caption": said} for i, said in ((0, "a"), (1, "b"), (1, ""), (1, "c"), (0, ""))]
        rows += [{"image": f"{index}.png", "caption": "d"} for index in range(4, 20)]
        (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def read(streaming: bool, **options) -> list[list[str] | str]:
            source = read_source({"data": "rows.jsonl", **options}, photos, streaming, max_bad_rows=0.5)
            records = source.rows if streaming else source
            return [r.get("bad_row") or flat(c["responses"] for c in r["conversations"]) for r in records]

        found = read(streaming=True)
        assert found[:2] == [["a"], ["b", "c"]] and found[4:] == [["d"]] * 16
        assert [re.match("rows.jsonl, line (.): ", problem)[1] for problem in found[2:4]] == ["3", "5"]
        for limit in (1, 2, 3, 100):
            limited = read(streaming=True, limit=limit)
            assert [record for record in limited if isinstance(record, list)] == read(streaming=False, limit=limit)
            assert limited == found[: len(limited)]

    @pytest.mark.parametrize(
        "captions, message", [(["", ""], "The first bad row: rows.jsonl, line 1: "), (["x"], "options leave out")]
    )
    def test_a_stream_without_a_record_is_told_in_a_sentence(self, photos, collator, captions, message):
        rows = [{"image": "0.png", "question": "q?", "answer": said, "q_lang": "en"} for said in captions]
        (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data": "rows.jsonl", "format": "question", "language": "en" if len(rows) > 1 else "zh"}
        with pytest.raises(ValueError, match=rf"Source 'rows.jsonl' has no record that can be used.*{message}"):
            load_mixture([source], collator.token_counts, photos, streaming=True, max_bad_rows=0.5)


@pytest.mark.parametrize("tag", [5, ["x"], True, "<image> x"])
def test_a_tag_is_a_text_without_an_image(tag):
    with pytest.raises(ValueError, match=r"tag=.* of source .*(is no text. Write it in quotes|Remove it)"):
        load_mixture([{**CAPTIONS, "tag": tag}], lambda record: (1, 1))


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize("share", [0, -0.5, math.nan, math.inf])
def test_a_share_is_positive(share, streaming):
    sources = [{**CAPTIONS, "share": share}, {**TEXTS, "share": 0.5}]
    with pytest.raises(ValueError, match=r"share=.* of source .* is not positive.*Leave out a source"):
        load_mixture(sources, lambda record: (1, 1), streaming=streaming)


def test_batches_of_text_alone_train_too(checkpoint, tmp_path):
    entry = run(stage_arguments(checkpoint, tmp_path, sources=[TEXTS], max_steps=2))
    assert entry["steps"] == 2 and math.isfinite(entry["train_loss"])


def test_the_table_and_the_contact_sheet_show_what_the_model_gets(checkpoint, tmp_path, capfd):
    sources = [{**CAPTIONS, "tag": "[web]"}, {**TEXTS, "share": 0.1}]
    main(
        [
            *stage_arguments(checkpoint, tmp_path, sources=sources),
            "--show",
            "6",
            "--sheet",
            str(tmp_path / "a/sheet.html"),
        ]
    )
    table = capfd.readouterr().out
    assert re.search(r"scenes +40 +40 +1\.00 .* 0 of 40", table) and re.search(r"scene_texts +200 +\d+ +10\.0%", table)
    sheet = (tmp_path / "a/sheet.html").read_text()
    assert sheet.count("<article>") == 6 and sheet.count("<img") == 3 and "[4 image tokens]" in sheet
    dataset = load_mixture(sources, AlignVLMCollator_of(checkpoint).token_counts).dataset
    response = responses_of(dataset[0])[0]
    assert f"<b> {response}&lt;/s&gt;</b>" in sheet and "[web]" in sheet


def test_images_are_cut_and_merged_as_the_recipe_says(checkpoint, tmp_path, capfd):
    """Not as the checkpoint does, which neither cuts nor merges."""

    def shown(**fields) -> tuple[str, str]:
        sources = [{"name": "scene_signs", "count": 8, "image_size": 40}]
        given = stage_arguments(checkpoint, tmp_path, sources=sources, **fields)
        main([*given, "--show", "2", "--sheet", str(tmp_path / "sheet.html")])
        return capfd.readouterr().out, (tmp_path / "sheet.html").read_text()

    def longest(table: str) -> int:
        return int(re.search(r"(\d+) +[\d.]+% +0 of 8$", table, re.MULTILINE)[1])

    whole, merged, cut = shown(), shown(merge_image_tokens=3), shown(max_tiles=6, tile_marks=True, image_block="tile")
    assert "[4 image tokens]" in whole[1] and "[3 image tokens]" in merged[1] and "[4 image tokens]" not in merged[1]
    assert longest(merged[0]) == longest(whole[0]) - 1
    assert "&lt;row_1_col_1&gt;" in cut[1] and "row_1_col_1" not in whole[1] + merged[1]
    assert longest(cut[0]) >= longest(whole[0]) + 16  # four tiles or six
    with pytest.raises(ValueError, match="image_block='tile' is for images that are cut into tiles"):
        shown(image_block="tile")
    with pytest.raises(ValueError, match="max_length=20 leaves no room"):
        shown(max_tiles=6, max_length=20)


def AlignVLMCollator_of(checkpoint) -> AlignVLMCollator:
    from modeling_alignvlm import AlignVLMProcessor

    return AlignVLMCollator(AlignVLMProcessor.from_pretrained(checkpoint))


@pytest.mark.slow
def test_real_photos_and_questions_through_the_mixture(shared_data, collator):
    """Flickr8k, DAQUAR and PathVQA's text in the shares of a stage, decoded and collated by a worker."""
    sources = [
        {"name": "local", "data": "flickr8k/captions.jsonl", "limit": 500},
        {"name": "local", "data": "daquar/qa.jsonl", "share": 0.3},
        {"name": "text", "data": "pathvqa/qa.jsonl", "share": 0.1, "tag": "[medical]"},
    ]
    mixture = load_mixture(sources, collator.token_counts, shared_data)
    image, text = tokens_of(mixture, collator, list(mixture.sampler))
    total = image.total() + text.total()
    assert text["text"] / total == pytest.approx(0.1, abs=0.02)
    loader = DataLoader(mixture.dataset, batch_size=16, sampler=mixture.sampler, num_workers=1, collate_fn=collator)
    for batch in islice(loader, 10):
        assert batch["pixel_values"].isfinite().all() and "losses_of_data" not in batch


def test_streamed_parquet_is_read_as_needed(tmp_path, collator):
    """A parquet folder of several files streams without being indexed; its files are shards for workers."""
    from alignvlm.data import scenes

    for shard in range(4):
        scenes.make_scenes(20, seed=shard).to_parquet(tmp_path / f"train-{shard:05d}-of-00004.parquet")
    mixture = load_mixture([{"name": "local", "data": "."}], collator.token_counts, tmp_path, streaming=True)
    once = mixture.parts[0].source.rows  # the mixture has no end
    assert once.num_shards == 4
    loader = DataLoader(once, batch_size=4, num_workers=2, collate_fn=lambda records: records)
    records = [record for batch in loader for record in batch]
    plain = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert sorted(map(responses_of, records)) == sorted(map(responses_of, plain))
