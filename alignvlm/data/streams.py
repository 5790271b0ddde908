"""Makes a stream of records from rows as they come, for data that is too large to index."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from datasets import Features, Image, IterableDataset, List

from alignvlm.data.files import Rows, sample_name
from alignvlm.data.images import BadImage, inside
from alignvlm.data.reader import Reader, group_key
from alignvlm.data.record import BadRow
from alignvlm.data.scenes import RECORD_FEATURES


UNDECODED_RECORD = Features({**RECORD_FEATURES, "images": List(Image(decode=False))})
OPEN_FILES = 10  # of a source, that a reader reads in turns


def stream(
    found: Rows, reader: Reader, group_by: str | None, limit: int | None, skip_bad_rows: bool
) -> IterableDataset:
    """Returns a stream of records, whose shards are the files. Consecutive rows of one image become one record, as data sets list them
    together."""
    rows = found.rows
    if rows.column_names is not None:  # not rows of files
        rows = rows.map(partial(_unnumbered, found.identity["data"]), remove_columns=rows.column_names)
    given = {"files": list(range(rows.num_shards)), "rows": rows}
    given |= {"reader": reader, "group_by": group_by, "skip_bad_rows": skip_bad_rows}
    records = IterableDataset.from_generator(_records, gen_kwargs=given)
    if limit is None:
        return records
    # Not `take`, of which every reader of some of the files would read a part.
    given = {"records": records, "limit": limit}
    return IterableDataset.from_generator(_first, gen_kwargs=given)


def read_without_end(
    records: IterableDataset, readers: list[int], count: int, seed: tuple[int, ...], prepare: Callable[[dict], dict]
) -> Iterator[dict]:
    """Yields what readers read of the records of a source, `count` readers of all its files: each file as often as any other.

    The files, or where there are fewer than readers equal parts of them, come in a random order, then in another one, and so on; the
    readers take turns at taking the next of this endless list. So a reader of short files reads more of them, and no record comes more
    often than others, however the records are divided among files.

    Args:
        readers: the numbers of the readers, from 0 to `count` - 1; a stream's shards, of which a data worker gets one.
        seed: of the orders.
        prepare: makes what is yielded of a record.
    """
    for found in zip(*(_read_by(reader, records, count, seed) for reader in readers)):
        yield from map(prepare, found)


def _read_by(reader: int, records: IterableDataset, count: int, seed: tuple[int, ...]) -> Iterator[dict]:
    """Yields what one of `count` readers reads; ends only if there is no record at all."""
    parts = -(-count // records.num_shards)  # of each file
    units = [(file, part) for file in range(records.num_shards) for part in range(parts)]
    empty: set[tuple[int, int]] = set()
    for turn in itertools.count():
        order = np.random.default_rng([*seed, turn]).permutation(len(units))
        own = [units[k] for place, k in enumerate(order, turn * len(units)) if place % count == reader]
        found = False
        for record in _alternating(islice(rows_of(records, file), part, None, parts) for file, part in own):
            found = True
            yield record
        if not found and len(empty := empty | set(own)) == len(units):
            return


def _alternating(files: Iterator[Iterator[dict]]) -> Iterator[dict]:
    """Yields all of the files, up to `OPEN_FILES` of them in turns, a record each."""
    opened = deque(islice(files, OPEN_FILES))
    while opened:
        file = opened.popleft()
        for record in islice(file, 1):
            yield record
            opened.append(file)
        opened.extend(islice(files, OPEN_FILES - len(opened)))


def rows_of(stream: IterableDataset, file: int | None = None) -> Iterator[dict]:
    """Yields the rows of a stream, or of one of its files, in a data worker, too: by itself `datasets` would divide its files among the workers,
    though only one of them reads it."""
    # Made here: each of them holds an open file as long as it lives.
    chosen = stream if file is None else stream.shard(stream.num_shards, file)
    for batch in chosen.iter(batch_size=16):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _first(records: IterableDataset, limit: int) -> Iterator[dict]:
    """Yields that many good records, and the bad rows before the last of them."""
    for record in rows_of(records):
        yield record
        limit -= record["bad_row"] is None
        if not limit:
            return


def _unnumbered(name: str, row: dict) -> dict:
    """Adds the place to a row of a stream, without a number: several readers take turns at the stream."""
    return {"row": row, "place": sample_name(row) if "__key__" in row else name}


def _records(
    files: list[int], rows: IterableDataset, reader: Reader, group_by: str | None, skip_bad_rows: bool
) -> Iterator[dict]:
    """Yields the records of the rows of files, and behind the record in whose rows it stands one that says what is wrong with a bad row."""
    for file in files:
        key, group, bad = "", [], []
        for found in rows_of(rows, file):
            row, place = found["row"], found["place"]
            try:
                if reader.of_row(row) is None:
                    continue
            except BadRow as error:
                if not skip_bad_rows:
                    raise error.at(place) from error
                bad.append({"images": [], "conversations": [], "id": "", "bad_row": str(error.at(place))})
                continue
            own = "" if group_by is None else group_key(row, group_by)
            if not own or own != key:
                yield from _group(reader, key, group, bad)
                key, group, bad = own, [], []
            group.append(row)
        yield from _group(reader, key, group, bad)


def _group(reader: Reader, key: str, rows: list[dict], bad: list[dict]) -> Iterator[dict]:
    """Yields the record of some rows, if there are any, and the bad ones."""
    if rows:
        record = reader(rows, key)
        yield {**record, "images": [_joined(image) for image in record["images"]], "bad_row": None}
    yield from bad


def _joined(image: Any) -> Any:
    """Returns `{"bytes", "path"}`, the path joined to its folder. One that leads out of it becomes an image that cannot be read, so that the
    collator finds it as it finds other bad images."""
    if not isinstance(image, dict):
        return image
    path = image.get("path")
    if image.get("folder") is not None:
        try:
            path = inside(image["folder"], path)
        except BadImage:
            return {"bytes": b"", "path": f"{path}, which leads out of the folder {image['folder']}"}
    return {"bytes": image.get("bytes"), "path": path}
