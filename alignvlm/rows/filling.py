"""Fills rows of at most `row_length` tokens with records of different images: which records share a row is fixed before training.

The tokens and images of every record are counted from its texts alone. Then, among `WINDOW` records at a time in the mixture's order, rows
are chosen by best fit, and the data set that the trainer reads holds rows: `{"records": [...]}`, where each record has a `piece`: which of
the rows that it makes by itself is meant. So an epoch has a known number of rows, a run resumes like any other, and the rows are the same
for any number of data workers and processes. A stream cannot be counted beforehand: it is filled window by window, as it comes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler, Subset

from alignvlm.data.mixture import RECORD_COLUMNS, Mixture, MixtureSampler, Part, tagged
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import best_fit
from alignvlm.rows.tiles import has_grids


# Records among which rows are chosen. Four times as many fill rows by about 1% more (benchmarks/rows.py), and of a stream so many images
# are held undecoded in memory.
WINDOW = 1024


@dataclass
class TrainingRows:
    """What a trainer reads: the records of a mixture, or rows that are filled with them.

    Args:
        dataset, sampler: as those of `Mixture`.
        description: what decides the filled rows, for the run record and for resuming; {} if each record has a row of its own.
    """

    dataset: Dataset | IterableDataset
    sampler: Sampler | None
    description: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        known = self.description
        if "rows_per_epoch" not in known:
            return f"rows of {known['row_length']:,} tokens, filled as the stream comes"
        return (
            f"{known['rows_per_epoch']:,} rows of {known['row_length']:,} tokens an epoch, {known['records_per_row']:.1f} records each, "
            f"{known['fill']:.1%} filled"
        )


@dataclass
class Pieces:
    """The rows that records make by themselves: one each, more where a record is longer than `max_length`, or one per branch where the trunk
    cannot be shared; `(pieces,)` each.

    Args:
        record, number: the record's index in the mixture, and which of its rows it is.
        tokens, images: how many it has; both 0 for a record that is dropped.
    """

    record: np.ndarray
    number: np.ndarray
    tokens: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, sizes: dict[int, list[tuple[int, int]]]) -> "Pieces":
        """Joins what `sizes_of` returns for records."""
        rows = [(record, k, *size) for record, own in sorted(sizes.items()) for k, size in enumerate(own)]
        return cls(*np.array(rows, dtype=np.int64).T)

    def of_records(self, records: list[int]) -> list[int]:
        """Returns the pieces of records, in the records' order."""
        first, last = (np.searchsorted(self.record, records, side) for side in ("left", "right"))
        return [piece for start, end in zip(first.tolist(), last.tolist()) for piece in range(start, end)]


def sizes_of(record: dict, collator: AlignVLMCollator) -> list[tuple[int, int]]:
    """Counts the tokens and images of each row that a record makes by itself; (0, 0) for one that makes none."""
    return [(len(row), collator.tile_count(row)) for row in collator.rows(record)] or [(0, 0)]


class _Sizes(torch.utils.data.Dataset):
    """The sizes of a mixture's records, which are read without their images, but where a record's tokens depend on their shapes."""

    def __init__(self, parts: list[Part], collator: AlignVLMCollator):
        if not has_grids(collator.processor):
            parts = [replace(part, source=part.source.without_images()) for part in parts]
        self.parts = parts
        self.ends = np.cumsum([len(part.source) for part in parts])
        self.collator = collator

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        p, record = _place(self.ends, index)
        part = self.parts[p]
        return sizes_of(tagged(part.source[record], part.name, part.tag), self.collator)


def _place(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Returns the part of a record of the mixture, and its index there."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, int(index - (ends[part - 1] if part else 0))


def measure(
    mixture: Mixture,
    collator: AlignVLMCollator,
    records: list[int],
    workers: int = 0,
    context: str | None = None,
) -> Pieces:
    """Counts tokens and images of records of a mixture; several processes, which must all call this, divide the work."""
    state = PartialState()
    own = records[state.process_index :: state.num_processes]
    loader = DataLoader(
        Subset(_Sizes(mixture.parts, collator), own),
        batch_size=64,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=context,
        generator=torch.Generator().manual_seed(0),  # leaves the random numbers of training alone
    )
    found = dict(zip(own, (sizes for batch in loader for sizes in batch), strict=True))
    return Pieces.of({record: sizes for part in gather_object([found]) for record, sizes in part.items()})


def fill(order: list[int], pieces: Pieces, row_length: int, seed: list[int]) -> list[list[int]]:
    """Chooses the rows of records that come in this order, window by window; the rows of a window come in random order, since best fit
    leaves the shortest records to its last rows.

    Returns:
        for each row its pieces.
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        own = pieces.of_records(order[start : start + WINDOW])
        chosen = best_fit(pieces.tokens[own].tolist(), row_length)
        shuffled = np.random.default_rng([*seed, start]).permutation(len(chosen))
        rows += ([own[item] for item in chosen[row]] for row in shuffled)
    return rows


def with_rows(rows: list[list[int]], count: int) -> list[list[int]]:
    """Returns `count` rows, at least as many as there are, by taking pieces out of those that hold most: all epochs have as many rows,
    because trainers take the steps of all epochs from the first."""
    rows = [list(row) for row in rows]
    while len(rows) < count:
        most = max(rows, key=len)
        rows.append([most.pop()] if len(most) > 1 else [])
    return rows


def rows_of_epochs(
    sampler: MixtureSampler, pieces: Pieces, row_length: int, epochs: int, needed: int | None = None
) -> list[list[list[int]]]:
    """Chooses the rows of each epoch, as many in all: of `epochs` epochs, or of as many as it takes for `needed` rows."""
    found: list[list[list[int]]] = []
    while len(found) < epochs if needed is None else sum(map(len, found)) < needed:
        epoch = len(found)
        sampler.set_epoch(epoch)
        order = list(sampler)
        texts = sampler.texts_first
        seed = [sampler.seed, epoch, 2]
        found.append(
            [
                row
                for number, part in enumerate((order[:texts], order[texts:]))  # no image among the first texts
                for row in fill(part, pieces, row_length, [*seed, number])
            ]
        )
    sampler.set_epoch(0)
    return [with_rows(rows, max(map(len, found))) for rows in found]


def level(images: list[int], batch_size: int) -> list[int]:
    """Orders the rows of a step so that its micro-batches of `batch_size` rows hold about as many images each: the row with the most images
    goes to the micro-batch that has the fewest. (Processes wait for the one with the most images.)

    Args:
        images: of each row; as many rows as fill micro-batches.

    Returns:
        indices of the rows, micro-batch after micro-batch.
    """
    batches: list[list[int]] = [[] for _ in range(len(images) // batch_size)]
    for row in sorted(range(len(images)), key=lambda row: -images[row]):
        free = (batch for batch in batches if len(batch) < batch_size)
        min(free, key=lambda batch: sum(images[other] for other in batch)).append(row)
    return [row for batch in batches for row in sorted(batch)]


class RowSampler(Sampler):
    """The order of an epoch's rows. The rows of an optimizer step are fixed; their micro-batches are levelled by images.

    Args:
        images: of each row, `(epochs, rows)`; as many rows as fill steps.
        batch_size: rows of a micro-batch of one process.
        rows_per_step: of all processes and micro-batches.
    """

    def __init__(self, images: np.ndarray, batch_size: int, rows_per_step: int):
        self.images, self.batch_size, self.rows_per_step = images, batch_size, rows_per_step
        self.epoch = 0

    def __len__(self) -> int:
        return self.images.shape[1]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        images = self.images[self.epoch]
        for start in range(0, len(self), self.rows_per_step):
            levelled = level(images[start : start + self.rows_per_step].tolist(), self.batch_size)
            yield from (self.epoch * len(self) + start + row for row in levelled)


def fill_rows(
    mixture: Mixture,
    collator: AlignVLMCollator,
    row_length: int,
    batch_size: int,
    rows_per_step: int,
    epochs: float = 1,
    steps: int | None = None,
    workers: int = 0,
    context: str | None = None,
) -> TrainingRows:
    """Fills the rows of a mixture that is no stream.

    Args:
        row_length: the most tokens of a row; a record that makes a longer one has it to itself.
        batch_size, rows_per_step: see `RowSampler`.
        epochs: of the stage.
        steps: of the stage, if they end it instead.
        workers, context: of the data loader that counts tokens, and how it starts them (`fork`, `spawn` or `forkserver`).
    """
    sampler, parts = mixture.sampler, mixture.parts
    read = np.arange(sum(sampler.sizes))
    if steps is None:
        drawn = (np.fromiter(_epoch(sampler, epoch), np.int64) for epoch in range(int(np.ceil(epochs))))
        read = np.unique(np.concatenate(list(drawn)))
        sampler.set_epoch(0)
    pieces = measure(mixture, collator, read.tolist(), workers, context)
    needed = None if steps is None else steps * rows_per_step
    of_epochs = rows_of_epochs(sampler, pieces, row_length, int(np.ceil(epochs)), needed)
    count = len(of_epochs[0])
    # Empty rows complete an epoch's last step: data loaders of several processes would read others twice.
    empty = [[] for _ in range(-count % rows_per_step)]
    rows = [row for epoch in of_epochs for row in (*epoch, *empty)]

    ends = np.cumsum(sampler.sizes)
    places = [_place(ends, record) for record in pieces.record]
    pointers = Dataset.from_dict(
        {
            "part": [[places[piece][0] for piece in row] for row in rows],
            "record": [[places[piece][1] for piece in row] for row in rows],
            "piece": [[int(pieces.number[piece]) for piece in row] for row in rows],
        }
    )
    images = np.array([pieces.images[row].sum() for row in rows]).reshape(len(of_epochs), -1)
    described = {
        "row_length": row_length,
        "window": WINDOW,
        "rows_per_epoch": count,
        "records_per_row": round(sum(int((pieces.number[row] == 0).sum()) for row in of_epochs[0]) / count, 3),
        "fill": round(float(sum(pieces.tokens[row].sum() for row in of_epochs[0])) / count / row_length, 4),
        # Of the first epoch: that of a run which is made longer stays what it was.
        "sha256": hashlib.sha256(json.dumps([_named(pieces, row) for row in of_epochs[0]]).encode()).hexdigest(),
    }
    dataset = pointers.with_transform(partial(_resolve, parts))
    return TrainingRows(dataset, RowSampler(images, batch_size, rows_per_step), described)


def _epoch(sampler: MixtureSampler, epoch: int) -> Iterator[int]:
    sampler.set_epoch(epoch)
    return iter(sampler)


def _named(pieces: Pieces, row: list[int]) -> list[list[int]]:
    return np.stack([pieces.record[row], pieces.number[row], pieces.tokens[row]], axis=1).tolist()


def _resolve(parts: list[Part], pointers: dict[str, list[list[int]]]) -> dict[str, list]:
    """Returns the filled rows that lists of (part, record, piece) numbers point to."""
    rows = [
        [
            {**tagged(parts[p].source[r], parts[p].name, parts[p].tag), "number": f"[{r}]", "piece": piece}
            for p, r, piece in zip(*row)
        ]
        for row in zip(pointers["part"], pointers["record"], pointers["piece"])
    ]
    return {"records": rows}


def fill_stream(mixture: Mixture, collator: AlignVLMCollator, row_length: int, seed: int) -> TrainingRows:
    """Fills the rows of a stream, window by window."""
    dataset = mixture.dataset.map(
        partial(_fill_window, collator, row_length, seed),
        with_indices=True,
        batched=True,
        batch_size=WINDOW,
        remove_columns=[*RECORD_COLUMNS, "source", "bad_row"],
    )
    return TrainingRows(dataset, mixture.sampler, {"row_length": row_length, "window": WINDOW})


def _fill_window(
    collator: AlignVLMCollator, row_length: int, seed: int, columns: dict[str, list], indices: list[int]
) -> dict[str, list]:
    records = [dict(zip(columns, values)) for values in zip(*columns.values())]
    sizes = {k: [(0, 0)] if record["bad_row"] else sizes_of(record, collator) for k, record in enumerate(records)}
    pieces = Pieces.of(sizes)
    rows = fill(list(range(len(records))), pieces, row_length, [seed, indices[0]])
    return {
        "records": [
            [{**records[pieces.record[piece]], "piece": int(pieces.number[piece])} for piece in row] for row in rows
        ]
    }
