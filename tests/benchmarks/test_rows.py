"""The script that measures filled rows times the same records packed and unpacked, and leaves the window as it was."""

from argparse import Namespace

import pytest

from alignvlm.rows import filling
from benchmarks import models
from benchmarks import rows as benchmark
from tests.benchmarks.test_throughput import SHAPE


def test_the_same_records_are_timed_packed_and_unpacked(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", SHAPE)
    options = Namespace(model="tiny", shape="pathvqa", device="cpu", dtype="fp32", kernels=["eager", "sdpa"], rounds=1)
    options.vision_layers = options.text_layers = options.pad_to_multiple_of = None
    options.records, options.batch, options.row_length, options.forward_only = 6, 3, 400, False
    found = benchmark.timed(options)
    assert [(row["kernel"], row["rows"]) for row in found] == [
        (kernel, rows) for kernel in options.kernels for rows in ("unpacked", "packed")
    ]
    tokens = [row["tokens_per_s"] * row["seconds"] for row in found]
    assert tokens == pytest.approx([tokens[0]] * 4)
    assert found[0]["batches"] == 2 and found[1]["longest"] <= 400
    assert len(benchmark.table(found).split("\n")) == 5


def test_fuller_rows_are_less_work_where_lengths_differ_and_masked_pairs_are_skipped():
    found = benchmark.how_full(2000, [64, 1024], "b16-224+135m")
    assert filling.WINDOW == 1024
    for narrow, wide in zip(found[::2], found[1::2]):
        assert narrow["fill"] < wide["fill"] and wide["skipping"] < wide["dense"]
        assert wide["skipping"] == pytest.approx((1 - wide["unpacked"]) / (1 - wide["padding"]), rel=0.15)
