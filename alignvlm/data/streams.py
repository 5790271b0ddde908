"""Makes a stream of records from rows as they come, for data that is too large to index."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from datasets import Features, Image, IterableDataset, List, Value

from alignvlm.data.files import Rows, sample_name
from alignvlm.data.images import BadImage, inside
from alignvlm.data.reader import Reader, image_key
from alignvlm.data.record import BadRow
from alignvlm.data.scenes import RECORD_FEATURES


UNDECODED_RECORD = Features({**RECORD_FEATURES, "images": List(Image(decode=False))})
STREAMED_RECORD = Features({**UNDECODED_RECORD, "bad_row": Value("string")})


def stream(
    found: Rows, reader: Reader, group_by: str | None, limit: int | None, skip_bad_rows: bool
) -> IterableDataset:
    """Returns a stream of records. Consecutive rows of one image become one record, as data sets list them together."""
    rows = found.rows
    if rows.column_names is not None:  # not rows of files
        rows = rows.map(partial(_unnumbered, found.identity["data"]), remove_columns=rows.column_names)
    mapped = rows.map(
        partial(_records_of_batch, reader, group_by, skip_bad_rows),
        batched=True,
        batch_size=256 if group_by is not None else 16,
        remove_columns=["row", "place"],
        features=STREAMED_RECORD,
    )
    if limit is None or not skip_bad_rows:
        return mapped if limit is None else mapped.take(limit)
    return IterableDataset.from_generator(
        _first_good, features=STREAMED_RECORD, gen_kwargs={"records": mapped, "limit": limit}
    )


def _first_good(records: IterableDataset, limit: int) -> Iterator[dict]:
    """Yields that many good records, and the bad rows before the last of them."""
    # Not record by record, which would divide the files among data workers although only one of them reads.
    for batch in records.iter(batch_size=1):
        record = {name: value for name, (value,) in batch.items()}
        yield record
        limit -= record["bad_row"] is None
        if not limit:
            return


def _unnumbered(name: str, row: dict) -> dict:
    """Adds the place to a row of a stream, without a number: several readers take turns at the stream."""
    return {"row": row, "place": sample_name(row) if "__key__" in row else name}


def _records_of_batch(
    reader: Reader, group_by: str | None, skip_bad_rows: bool, batch: dict[str, list]
) -> dict[str, list]:
    """Returns the records of some rows, and, in their places among them, records that say what is wrong with a bad row."""
    last: tuple[str, list[dict]] = ("", [])
    found: list[tuple[str, list[dict]] | dict] = []
    for row, place in zip(batch["row"], batch["place"]):
        try:
            if reader.of_row(row) is None:
                continue
        except BadRow as error:
            if not skip_bad_rows:
                raise error.at(place) from error
            found.append({"images": [], "conversations": [], "id": "", "bad_row": str(error.at(place))})
            continue
        key = "" if group_by is None else image_key(row) if group_by == "image" else str(row[group_by])
        if key and key == last[0]:
            last[1].append(row)
        else:
            last = (key, [row])
            found.append(last)
    records = [entry if isinstance(entry, dict) else _record(reader, *entry) for entry in found]
    return {name: [record[name] for record in records] for name in STREAMED_RECORD}


def _record(reader: Reader, key: str, rows: list[dict]) -> dict:
    record = reader(rows, key)
    return {**record, "images": [_joined(image) for image in record["images"]], "bad_row": None}


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
