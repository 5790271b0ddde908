"""Reads the rows of one file as they are written, each with its place, and says what is wrong with those that cannot be read."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq
from pyarrow import ArrowException

from alignvlm.data.record import BadRow, shown
from alignvlm.data.tars import read_samples


NOT_A_ROW = "__not_a_row__"  # the column of kept bad lines: it says what is wrong with the line
csv.field_size_limit(1 << 30)  # of a text; by default 128 KiB


def type_of(file: Path) -> str:
    """Returns the ending of a file's name, as `.jsonl`, in small letters."""
    return file.suffix.lower()


def open_parquet(file: Path) -> pq.ParquetFile:
    """Opens a file of parquet.

    Raises:
        ValueError: for one that is damaged or something else.
    """
    try:
        return pq.ParquetFile(file)
    except ArrowException as error:
        raise ValueError(f"{file} cannot be read as parquet: {error} Replace the file.") from error


def read_file(file: Path, keep_bad_lines: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields the rows of one file as they are written, each with its place.

    Raises:
        BadRow: for a line that is not JSON, an entry that is no mapping, or a row of CSV whose quotes do not close or that has more values
            than columns, unless `keep_bad_lines` keeps it as a row that says so. Also for a file of columns in place of rows.
        ValueError: for a file that is not UTF-8, or a damaged one of parquet.
    """
    if type_of(file) == ".parquet":
        number = 0
        for batch in open_parquet(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield f"{file.name}, row {number} (counted from 0)", row
                number += 1
    elif type_of(file) == ".txt":
        for number, paragraph in enumerate(_paragraphs(file), 1):
            yield f"{file.name}, paragraph {number}", {"text": paragraph}
    else:
        for place, row in _rows_or_problems(file):
            if not isinstance(row, BadRow):
                yield place, row
            elif keep_bad_lines:
                yield place, {NOT_A_ROW: str(row)}
            else:
                raise row.at(place) from row.__cause__


def rows_of_karpathy(file: Path) -> list | None:
    """Returns the rows of a json file of Karpathy's form, `{"images": [{"sentences": ...}, ...], "dataset": ...}`; None of another."""
    if not _is_one_value(file):
        return None
    content = _one_value(file)
    return content["images"] if _is_karpathy(content) else None


def _is_karpathy(content: Any) -> bool:
    """Tells whether a json file's content is a mapping whose `images` are rows with `sentences`."""
    images = content.get("images") if isinstance(content, dict) else None
    return (
        bool(images)
        and isinstance(images, list)
        and all(isinstance(row, dict) and "sentences" in row for row in images)
    )


def _rows_of_coco(content: dict, file: Path) -> list[dict] | None:
    """Returns a row for each image of a file of captions in COCO's own form, in the form of Karpathy's rows; None of another.

    Raises:
        BadRow: for a caption of an image that is not listed.
    """
    images, annotations = content.get("images"), content.get("annotations")
    for entries, names in ((images, {"id", "file_name"}), (annotations, {"image_id", "caption"})):
        if not (
            isinstance(entries, list) and entries and all(isinstance(e, dict) and names <= e.keys() for e in entries)
        ):
            return None
    captions: dict[Any, list] = {image["id"]: [] for image in images}
    for number, annotation in enumerate(annotations, 1):
        if (image := annotation["image_id"]) not in captions:
            raise BadRow(f"{file}, entry {number} of `annotations`: image_id={shown(image)} is no `id` of `images`.")
        captions[image].append(annotation["caption"])
    return [{"filename": image["file_name"], "sentences": captions[image["id"]]} for image in images]


def _rows_or_problems(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    """Yields each row of a tar, csv, json or jsonl file, or what is wrong with it, with its place."""
    if type_of(file) == ".tar":
        for key, sample in read_samples(file):
            yield f"{file.name}, sample {key}", sample
    elif type_of(file) in (".csv", ".tsv"):
        with opened(file, newline="") as stream:
            for number, row in enumerate(_rows_of_csv(file, stream), 1):
                if isinstance(row, dict) and None in row:
                    row = BadRow(
                        f"more values than columns: {shown(row[None])} is left over. Put texts with commas in quotes."
                    )
                yield f"{file.name}, row {number}", row
    elif _is_one_value(file):
        content = _one_value(file)
        if isinstance(content, dict):
            _check_is_row(content, file)
            content = content["images"] if _is_karpathy(content) else _rows_of_coco(content, file) or [content]
        for number, row in enumerate(content, 1):
            yield f"{file.name}, entry {number}", _mapping(row)
    else:
        with opened(file) as stream:
            for number, line in enumerate(stream, 1):
                line = line.strip()
                if not line:
                    continue
                try:
                    row = _mapping(json.loads(line))
                except json.JSONDecodeError as error:
                    row = BadRow(f"not JSON ({error.msg} at column {error.colno}): {shown(line)}")
                    row.__cause__ = error
                yield f"{file.name}, line {number}", row


class _LinesOfRow:
    """The lines of a CSV file, which keeps those of the row that is being read, so that they can be read anew.

    Args:
        stream: the file.
        number: of the last line read, from 1.
        taken: the lines read since `taken` was emptied.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.number = stream, 0
        self.taken: list[str] = []
        self.again: list[str] = []  # the next one last

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else next(self.stream)
        self.number += 1
        self.taken.append(line)
        return line

    def put_back(self) -> None:
        """Goes back before the last line read, if there was one."""
        if self.taken:
            self.again.append(self.taken.pop())
            self.number -= 1

    def back_to_the_second(self) -> tuple[int, str]:
        """Goes back behind the first line of the row; returns its number and the line."""
        first, *rest = self.taken
        self.again += reversed(rest)
        self.number -= len(rest)
        return self.number, first


def _rows_of_csv(file: Path, stream: TextIO) -> Iterator[dict | BadRow]:
    """Yields the rows of a CSV file. A row that cannot be read is its first line alone: an open quote does not take the lines after it.

    Raises:
        BadRow: for column names that cannot be read.
    """
    lines = _LinesOfRow(stream)
    rows = csv.DictReader(lines, strict=True, delimiter=_delimiter(file, lines))
    try:
        columns = rows.fieldnames
    except csv.Error as error:
        raise _not_csv(lines, error).at(file.name) from error
    while columns is not None:
        lines.taken.clear()
        try:
            row = next(rows)
            if any(row.values()):  # a row of separators alone is as an empty line
                yield row
        except StopIteration:
            return
        except csv.Error as error:
            while len(lines.taken) > 1 and not lines.taken[0].strip():  # of empty lines before the row
                lines.taken.pop(0)
            yield _not_csv(lines, error)


def _delimiter(file: Path, lines: _LinesOfRow) -> str:
    """Returns what stands between the columns: in a .csv a comma or, where its first line has none, the semicolon or the tab that is there."""
    if type_of(file) == ".tsv":
        return "\t"
    first = next(lines, "")
    lines.put_back()
    return next((each for each in ",;\t" if each in first), ",")


def _not_csv(lines: _LinesOfRow, error: csv.Error) -> BadRow:
    number, line = lines.back_to_the_second()
    problem = BadRow(
        f"line {number} is not CSV ({error}): {shown(line.rstrip())}. Close the quotation mark, or write the value in quotes with each quotation "
        'mark in it doubled, "".'
    )
    problem.__cause__ = error
    return problem


@contextmanager
def opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a file of UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: for text of another encoding, when it is read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _one_value(file: Path) -> Any:
    with opened(file) as stream:
        try:
            return json.load(stream)
        except json.JSONDecodeError as error:
            raise BadRow(f"{file}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error


def _mapping(row: Any) -> dict | BadRow:
    return row if isinstance(row, dict) else BadRow(f"{shown(row)} is no row; expected a mapping of names to values.")


def _check_is_row(content: dict, file: Path) -> None:
    """Checks that the only mapping of a file is not a table by columns, as `to_json` of a table may write it.

    Raises:
        BadRow: if it is.
    """
    values = list(content.values())
    if not all(isinstance(value, list) and not any(isinstance(each, dict) for each in value) for value in values):
        return
    if len({len(value) for value in values}) == 1 and len(values[0]) > 1:
        columns = ", ".join(f"`{name}`" for name in content)
        raise BadRow(
            f"{file} is one mapping, whose columns {columns} are lists of {len(values[0])} values, where a list of rows is expected. Write "
            '[{"image": "0.jpg", "caption": "A cat."}, ...], as `to_json(orient="records")` of pandas does.'
        )


def _is_one_value(file: Path) -> bool:
    """Tells whether a file is one JSON list or, if it is called .json, one mapping, rather than a mapping on each of several lines."""
    with opened(file) as stream:
        begin = stream.read(64).lstrip()
    if begin.startswith("[") or type_of(file) != ".json":
        return begin.startswith("[")
    with opened(
        file
    ) as stream:  # read to its end only if the first line is no row, be it a bad one of many or the begin of one
        first = next(filter(None, map(str.strip, stream)), "")
        if _is_json(first):
            return first.startswith("{") and not any(map(str.strip, stream))
        return first.startswith("{") and _is_json(first + stream.read())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _paragraphs(file: Path) -> list[str]:
    with opened(file) as stream:
        return [part for part in (part.strip("\n") for part in stream.read().split("\n\n")) if part]
