"""Streams: every record comes as often as any other, whatever the files, data workers and processes that read them."""

import json
import os
import resource
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as Picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from alignvlm.data import mixture as mixtures
from alignvlm.data.mixture import Mixture, load_mixture
from alignvlm.data.sources import read_source
from alignvlm.data.streams import read_without_end
from tests import examples


@pytest.fixture(autouse=True)
def short_buffer(monkeypatch):
    """So that what has been read is soon yielded."""
    monkeypatch.setattr(mixtures, "SHUFFLE_BUFFER", 8)


def write(folder: Path, sizes: list[int], **more) -> None:
    """Writes files of so many rows, each with a response of its own."""
    folder.mkdir(exist_ok=True)
    for file, size in enumerate(sizes):
        rows = [{"prompt": "p", "completion": f"{file}/{row}", **more} for row in range(size)]
        (folder / f"train-{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def of(folder: Path, readers: int, **options) -> Mixture:
    return load_mixture([{"data": str(folder), **options}], lambda record: (0, 3), streaming=True, readers=readers)


def said(record: dict) -> str:
    return record["conversations"][0]["responses"][0]


def read(mixture: Mixture, processes: int, workers: int, records: int) -> Counter:
    """How often each response comes among so many records, as the processes of a stage read them, in batches of one."""
    found: Counter = Counter()
    for rank in range(processes):
        loader = prepare_data_loader(
            DataLoader(mixture.dataset, batch_size=1, collate_fn=list, num_workers=workers),
            num_processes=processes,
            process_index=rank,
            dispatch_batches=False,
            put_on_device=False,
        )
        found.update(said(record) for batch in islice(loader, records // processes) for record in batch)
    return found


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
def test_readers_of_equal_files_divide_every_pass(files, readers, rows, seed):
    """Each record comes once before any comes again, where the files, or equal parts of them, can be divided evenly."""
    parts = -(-readers // files)
    readers = readers if files * parts % readers == 0 else 1
    parts = -(-readers // files)
    names = [[f"{file}/{row}" for row in range(rows * parts)] for file in range(files)]
    records = IterableDataset.from_generator(
        lambda shards: ({"name": name} for shard in shards for name in shard), gen_kwargs={"shards": names}
    )
    streams = [read_without_end(records, [r], readers, (seed,), lambda row: row["name"]) for r in range(readers)]
    for _ in range(3):
        found = [name for stream in streams for name in islice(stream, files * rows * parts // readers)]
        assert sorted(found) == sorted(name for shard in names for name in shard)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("sizes", [[48, 2], [10, 10, 10], [0, 20, 5], [20]], ids=str)
def test_a_record_of_a_short_file_comes_as_often_as_one_of_a_long_file(tmp_path, sizes, processes, workers):
    """After twenty passes, however the files are divided."""
    write(tmp_path, sizes)
    passes = 20
    found = read(of(tmp_path, processes * max(workers, 1)), processes, workers, passes * sum(sizes))
    assert len(found) == sum(sizes)
    for file, size in enumerate(sizes):
        of_file = sum(count for name, count in found.items() if name.startswith(f"{file}/"))
        assert of_file == pytest.approx(passes * size, rel=0.3, abs=1e-9), file


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 0), (2, 2)])
def test_a_process_whose_files_have_no_row_of_the_split_reads_others(tmp_path, processes, workers):
    """By itself it would end at once, while the others wait for it in their first step."""
    write(tmp_path, [6], split="train")
    (tmp_path / "train-1.jsonl").write_text(json.dumps({"prompt": "p", "completion": "other", "split": "val"}) + "\n")
    (tmp_path / "train-2.jsonl").touch()
    found = read(of(tmp_path, processes * max(workers, 1)), processes, workers, 60)
    assert found.total() == 60 and set(found) == {f"0/{row}" for row in range(6)}


@pytest.mark.parametrize("more", [{}, {"max_bad_rows": 0.5}], ids=["raise", "skip"])
@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_limit_takes_the_first_records_for_any_workers_and_processes(tmp_path, processes, workers, more):
    write(tmp_path, [4, 4, 4])
    mixture = load_mixture(
        [{"data": str(tmp_path), "limit": 6}],
        lambda record: (0, 3),
        streaming=True,
        readers=processes * max(workers, 1),
        **more,
    )
    found = read(mixture, processes, workers, 60)
    assert set(found) == {said(record) for record in read_source({"data": str(tmp_path), "limit": 6})}


def test_hundreds_of_files_hold_few_open(tmp_path):
    """A data set of `datasets` holds an open file for as long as it lives."""
    write(tmp_path, [1] * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 100, hard))
    try:
        found = [said(record) for record in islice(of(tmp_path, readers=2).dataset, 300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(set(found)) >= 290


def test_a_stream_that_begins_with_texts_goes_on_where_they_ended(tmp_path):
    """By itself each of the two parts would begin at the same text."""
    write(tmp_path, [100, 100, 100])
    sources = [{"data": str(tmp_path), "share": 0.5}, {"name": "scenes", "count": 8, "share": 0.5}]
    counts = lambda record: (len(record["images"]), 1)  # noqa: E731
    options = {"streaming": True, "image_start_fraction": 0.5, "records": 300}
    records = list(islice(load_mixture(sources, counts, **options).dataset, 300))
    assert not any(record["images"] for record in records[:150])
    texts = Counter(said(record) for record in records if not record["images"])
    assert set(texts.values()) == {1} and texts.total() < 300


@pytest.mark.parametrize("saved", [False, True])
def test_no_part_of_a_file_is_cut_through_the_rows_of_an_image(tmp_path, saved):
    rows = [
        {"image": Image.new("RGB", (4, 4), (image, 0, 0)), "question": f"q{number}?", "answer": "a"}
        for image in range(6)
        for number in range(5)
    ]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data") if saved else data.to_parquet(tmp_path / "train.parquet")
    given = {"name": "pathvqa", "data": str(tmp_path / "data" if saved else tmp_path)}
    mixture = load_mixture([given], lambda record: (1, 3), streaming=True, readers=4)
    records = list(islice(mixture.dataset, 24))
    assert [len(record["conversations"]) for record in records] == [5] * 24


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_value_to_group_by_stay_apart(tmp_path, streaming):
    text, columns = Value("string"), ("question_id", "question", "answer", "category")
    rows = [
        {"question_id": None, "question": f"q{n}", "answer": "Yes", "category": "color", "image": picture}
        for n, picture in enumerate(Image.new("RGB", (4, 4), colour) for colour in ("red", "navy"))
    ]
    features = Features({"image": Picture(), **dict.fromkeys(columns, text)})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test.parquet")
    source = read_source({"name": "mme", "data": str(tmp_path), "split": "test"}, streaming=streaming)
    records = list(source.rows if streaming else source)
    assert [len(record["conversations"]) for record in records] == [1, 1]


def test_the_first_row_does_not_decide_what_a_stream_has(tmp_path):
    """It may show no image, or be no row at all."""
    first = {"id": "0", "conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "a"}]}
    seen = {**first, "conversations": [{"from": "human", "value": "<image>\nSay"}, first["conversations"][1]]}
    lines = [first, {**seen, "image": "a.png"}]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "llava_instruct", "data": str(tmp_path / "mix.jsonl")}
    assert [len(record["images"]) for record in read_source(source, streaming=True).rows] == [0, 1]
    of_splits = [{"prompt": "p", "completion": split, "split": split} for split in ("train", "val")]
    text = "not JSON\n" + "".join(json.dumps(row) + "\n" for row in of_splits)
    (tmp_path / "rows.jsonl").write_text(text)
    source = {"data": str(tmp_path / "rows.jsonl"), "split": "val"}
    bad, good = read_source(source, streaming=True, max_bad_rows=0.9).rows
    assert "rows.jsonl, line 1" in bad["bad_row"] and said(good) == "val"


def test_rows_of_one_image_stay_together_however_many_rows_a_file_has(tmp_path):
    rows = [{"image": f"{image}.png", "caption": f"c {number}"} for image in range(70) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed = list(read_source({"data": "rows.jsonl"}, tmp_path, streaming=True).rows)
    assert [len(record["conversations"][0]["responses"]) for record in streamed] == [5] * 70
