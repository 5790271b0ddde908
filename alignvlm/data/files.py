"""Reads the rows of a split from the Hub or from disk, and tells what was read and where each row stands."""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import huggingface_hub
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from alignvlm.data.formats import is_image_column
from alignvlm.data.record import BadRow, shown
from alignvlm.data.tars import columns_of_samples, read_samples
from hub_upload.repository import HTTPError
from hub_upload.run_record import sha256_of


FILE_TYPES = ("json", "jsonl", "csv", "parquet", "txt", "tar")
NOT_A_ROW = "__not_a_row__"  # the column of kept bad lines: it says what is wrong with the line
csv.field_size_limit(1 << 30)  # of a text; by default 128 KiB
SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}  # names of the same split
SPLIT_WORDS = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "dev",
    "test",
    "testing",
    "eval",
}  # in names of files


@dataclass
class Rows:
    """Rows as read.

    Args:
        rows: the rows; a stream of local files has the columns `row` and `place`.
        identity: what was read: the Hub's id and commit, or the files; goes into run records and results.
        place: returns where the row of an index stands.
        folder: where image paths start; None for a data set of the Hub.
    """

    rows: Dataset | IterableDataset
    identity: dict
    place: Callable[[int], str]
    folder: Path | None

    @property
    def columns(self) -> list[str]:
        """The columns of the rows (of a stream of files: those of its first row); none if there is no row."""
        if isinstance(self.rows, Dataset):
            return self.rows.column_names if len(self.rows) else []
        if self.rows.column_names is not None:
            return self.rows.column_names
        first = next(iter(self.rows), {})
        return list(first.get("row", first))


@contextmanager
def _naming_the_cache() -> Iterator[None]:
    """Says of a cache of `datasets` that cannot be written to that it is one, and how to have another."""
    try:
        yield
    except OSError as error:
        cache, there = Path(datasets.config.HF_DATASETS_CACHE), Path(error.filename or ".")
        if not (there.is_absolute() and (cache.is_relative_to(there) or there.is_relative_to(cache))):
            raise
        raise OSError(
            f"The cache of data sets, {cache}, cannot be written to: {error}. Set HF_HOME in the environment to a folder that can."
        ) from error


@_naming_the_cache()
def read_rows(
    data: str,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    *,
    file: str | None = None,
    folder_of_images: bool = False,
    data_dir: str | Path = ".",
    streaming: bool = False,
    hash_all: bool = False,
    keep_bad_lines: bool = False,
) -> Rows:
    """Reads the rows of one split.

    Args:
        data: a local file or folder (from `data_dir`, unless absolute), or a data set on the Hub.
        split: `a+b` joins two.
        config, revision: of a Hub data set; locally, `config` is a folder in it.
        file: the file to read of a Hub repository of files.
        folder_of_images: read images with a metadata file, or in one folder per label.
        streaming: read rows as they are needed.
        hash_all: put the SHA-256 of every file into the identity, also of large files that hold images.
        keep_bad_lines: turn a line that is not JSON into a row that says so in `NOT_A_ROW`, instead of raising.

    Raises:
        FileNotFoundError: for data that is not on disk and has not the form of a Hub id.
        ValueError: for a split that is not found, or files that cannot be read.
    """
    local = Path(data_dir) / data
    if local.exists():
        found = _local(local, split, config, folder_of_images, streaming, hash_all, keep_bad_lines)
    elif is_hub_id(data):
        found = _hub(data, split, config, revision, file, streaming)
    else:
        raise FileNotFoundError(
            f"No such file or folder: {local}, and {data!r} is no Hub id, user/name. Paths start at {str(Path(data_dir).resolve())!r}."
        )
    if not found.columns:
        raise ValueError(f"{data} has no rows of split {split!r}.")
    return found


def is_hub_id(name: str) -> bool:
    """Tells whether a name can be that of a data set on the Hub, `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and Path(name).suffix[1:] not in FILE_TYPES


def _hub(data: str, split: str, config: str | None, revision: str | None, file: str | None, streaming: bool) -> Rows:
    """Reads the rows of a Hub data set at a commit that the identity states, so that a run can be repeated."""
    if not huggingface_hub.constants.is_offline_mode():
        revision = _hub_commit(data, revision)
    options = {"data_files": file, "split": "train" if file else split, "revision": revision, "streaming": streaming}
    try:
        rows = load_dataset(data, config, **options)
    except ConnectionError as error:  # offline, and never read before
        raise FileNotFoundError(_NOT_FOUND.format(data=data, error=error)) from error
    identity = {"data": data, "config": config, "split": split, "revision": revision, "file": file}
    return Rows(rows, identity, partial(_numbered, f"{data}, split {split}"), None)


def _hub_commit(data: str, revision: str | None) -> str:
    """Returns the commit that a branch or tag of a data set on the Hub points to now.

    Raises:
        FileNotFoundError: if the Hub gives none; the name may have been meant as a folder.
    """
    try:
        return HfApi().dataset_info(data, revision=revision).sha
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(_NOT_FOUND.format(data=data, error=error)) from error


_NOT_FOUND = "No such file or folder: {data}, and the Hub gives no data set of that name: {error}"


def _numbered(name: str, index: int) -> str:
    return f"{name}, row {index} (counted from 0)"


def _local(
    path: Path,
    split: str,
    config: str | None,
    folder_of_images: bool,
    streaming: bool,
    hash_all: bool,
    keep_bad_lines: bool,
) -> Rows:
    """Reads the rows of local files in any of the forms that the Hub has."""
    folder = path if path.is_dir() else path.parent
    if folder_of_images:
        named = [path / name for name in _names(split) if (path / name).is_dir()]
        data_dir = glob.escape(str((named or [path])[0]))  # `datasets` takes names for patterns
        rows = load_dataset("imagefolder", data_dir=data_dir, split="train", streaming=streaming)
        return Rows(rows, {"data": path.name, "split": split}, partial(_numbered, path.name), folder)
    within = path / config if config else path
    if any((within / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(within, split, streaming, hash_all)
    files = [path] if path.is_file() else _files(within, split)
    if not files:
        raise ValueError(
            f"{path} holds no {split}-*.parquet, {split}.jsonl, nor any file whose rows say their split ({', '.join(FILE_TYPES)})."
        )
    if files[0].suffix[1:] not in FILE_TYPES:
        raise ValueError(f"{files[0]}: expected a file of {', '.join(FILE_TYPES)}.")
    has_splits = False
    if streaming:
        place: Callable[[int], str] = _PlaceInFiles(files, keep_bad_lines)
        given = {"files": files, "splits": _names(split), "keep_bad_lines": keep_bad_lines}
        rows = IterableDataset.from_generator(_stream_files, gen_kwargs=given)
        has_splits = any("split" in row for file in files for _, row in islice(read_file(file, keep_bad_lines), 1))
    else:
        place = _PlaceInFiles(files, keep_bad_lines)
        rows = load_files(files, keep_bad_lines)
        if has_splits := "split" in rows.column_names:
            wanted = (*_names(split), None) if NOT_A_ROW in rows.column_names else _names(split)
            values = rows.select_columns(["split"])[:]["split"]
            chosen = [index for index, value in enumerate(values) if value in wanted]
            rows, place = rows.select(chosen), partial(_place_of_chosen, place, chosen)
    named = files[0].name.startswith(_names(split)) or _words(files[0], folder) & set(_names(split))
    if path.is_dir() and not named and not has_splits and split != "train":
        raise ValueError(
            f"No file in {path} is named after the split {split!r} ({split}-*.parquet, {split}.jsonl), and its rows have no column "
            "`split` to choose by. Name the file itself to take all of its rows."
        )
    identity = {"data": path.name, "split": split, "files": [_file_identity(file, hash_all) for file in files]}
    return Rows(rows, identity, place, folder)


def _saved(folder: Path, split: str, streaming: bool, hash_all: bool) -> Rows:
    """Reads what `save_to_disk` of `datasets` wrote: all rows of a `Dataset`, or a split of a `DatasetDict`.

    Raises:
        ValueError: for a split that is not there.
    """
    saved = load_from_disk(folder)
    if isinstance(saved, DatasetDict):
        chosen = [name for name in saved if name in _names(split)]
        if not chosen:
            raise ValueError(f"{folder} has no split {split!r}; its splits: {', '.join(saved)}.")
        rows = concatenate_datasets([saved[name] for name in chosen])
    else:
        rows, chosen = saved, ["."]
    files = sorted(file for name in chosen for file in (folder / name).glob("*.arrow"))
    identity = {"data": folder.name, "split": split, "files": [_file_identity(file, hash_all) for file in files]}
    rows = rows.to_iterable_dataset() if streaming else rows
    return Rows(rows, identity, partial(_numbered, f"{folder.name}, split {split}"), folder)


def _place_of_chosen(place: Callable[[int], str], chosen: list[int], index: int) -> str:
    return place(chosen[index])


def sample_name(row: dict) -> str:
    """Returns the name of a sample of a webdataset in messages."""
    return f"{Path(row['__url__']).name}, sample {row['__key__']}"


def _stream_files(files: list[Path], splits: tuple[str, ...], keep_bad_lines: bool) -> Iterator[dict]:
    """Yields each row of the split with its place; `files` are the shards."""
    for file in files:
        for place, row in read_file(file, keep_bad_lines):
            if "split" not in row or row["split"] in splits:
                yield {"row": row, "place": place}


def _names(split: str) -> tuple[str, ...]:
    return tuple(name for part in split.split("+") for name in SPLIT_NAMES.get(part, (part,)))


def _files(folder: Path, split: str) -> list[Path]:
    endings = (".parquet", "-*.parquet", ".jsonl", ".json", ".csv", ".tar", "-*.tar")
    named = sorted(file for name in _names(split) for end in endings for file in folder.glob(f"**/{name}{end}"))
    if named:
        return [file for file in named if file.suffix == named[0].suffix]
    for pattern in ("dataset_*.json", "**/*.parquet", "*.jsonl", "*.json", "*.csv", "*.tar", "*.txt"):
        if files := sorted(folder.glob(pattern)):
            return _of_split(files, folder, split)
    return []


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Returns the files whose names, or whose folders' names, hold the split's (`my_train.jsonl`, `train/0.parquet`); without any, those that
    are named after no split.

    Raises:
        ValueError: if all are named after other splits.
    """
    found = [file for file in files if _words(file, folder) & set(_names(split))]
    found = found or [file for file in files if not _words(file, folder) & SPLIT_WORDS]
    if not found:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise ValueError(
            f"The files in {folder} are named after other splits than {split!r}: {names}. Name the split, or the file itself to take all of its "
            "rows."
        )
    return found


def _words(file: Path, folder: Path) -> set[str]:
    """Returns the words of a file's path below a folder."""
    return set(re.findall("[a-z]+", str(file.relative_to(folder)).lower()))


def _file_identity(file: Path, hashed: bool) -> dict:
    """Returns the name, the bytes and the SHA-256; the SHA-256 of parquet, arrow and tar files, which hold the images, only if `hashed`."""
    identity = {"name": file.name, "bytes": file.stat().st_size}
    return (
        {**identity, "sha256": sha256_of([file])}
        if hashed or file.suffix not in (".parquet", ".arrow", ".tar")
        else identity
    )


def _is_karpathy(file: Path) -> bool:
    """Tells whether a json file is Karpathy's `{"images": [...], "dataset": ...}` rather than a list of rows."""
    with _opened(file) as stream:
        return stream.read(64).lstrip().startswith("{") and file.name.startswith("dataset_")


def read_file(file: Path, keep_bad_lines: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields the rows of one file as they are written, each with its place.

    Raises:
        BadRow: for a line that is not JSON, or has more values than the CSV file columns, unless `keep_bad_lines` keeps it as a row that
            says so.
        ValueError: for a file that is not UTF-8.
    """
    if file.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield f"{file.name}, row {number} (counted from 0)", row
                number += 1
    elif file.suffix == ".tar":
        for key, sample in read_samples(file):
            place = f"{file.name}, sample {key}"
            if isinstance(sample, BadRow) and not keep_bad_lines:
                raise sample.at(place)
            yield place, {NOT_A_ROW: str(sample)} if isinstance(sample, BadRow) else sample
    elif file.suffix == ".txt":
        for number, paragraph in enumerate(_paragraphs(file), 1):
            yield f"{file.name}, paragraph {number}", {"text": paragraph}
    elif file.suffix == ".csv":
        with _opened(file, newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), 1):
                place = f"{file.name}, row {number}"
                if None in row:
                    problem = BadRow(
                        f"more values than columns: {shown(row[None])} is left over. Put texts with commas in quotes."
                    )
                    if not keep_bad_lines:
                        raise problem.at(place)
                    row = {NOT_A_ROW: str(problem)}
                yield place, row
    elif _is_one_value(file):
        content = _one_value(file)
        if isinstance(content, dict):
            content = content["images"] if _is_karpathy(file) else [content]
        for number, row in enumerate(content, 1):
            yield f"{file.name}, entry {number}", _mapping(row, f"{file.name}, entry {number}")
    else:
        with _opened(file) as stream:
            for number, line in enumerate(stream, 1):
                place = f"{file.name}, line {number}"
                line = line.strip()
                if not line:
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = BadRow(f"not JSON ({error.msg} at column {error.colno}): {shown(line)}")
                    if not keep_bad_lines:
                        raise problem.at(place) from error
                    row = {NOT_A_ROW: str(problem)}
                yield place, _mapping(row, place)


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
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
    with _opened(file) as stream:
        try:
            return json.load(stream)
        except json.JSONDecodeError as error:
            raise BadRow(f"{file}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error


def _mapping(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise BadRow(f"{place}: {shown(row)} is no row; expected a mapping of column names to values.")
    return row


def _is_one_value(file: Path) -> bool:
    """Tells whether a file is one JSON list, or one mapping over several lines (or Karpathy's), rather than a mapping on each line."""
    with _opened(file) as stream:
        begin = stream.read(64).lstrip()
    if begin.startswith("[") or file.suffix != ".json":
        return begin.startswith("[")
    if _is_karpathy(file):
        return True
    with _opened(
        file
    ) as stream:  # read to its end only if the first line is no row, be it a bad one of many or the begin of one
        first = next(filter(None, map(str.strip, stream)), "")
        return first.startswith("{") and not _is_json(first) and _is_json(first + stream.read())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _paragraphs(file: Path) -> list[str]:
    with _opened(file) as stream:
        return [part for part in (part.strip("\n") for part in stream.read().split("\n\n")) if part]


def load_files(files: list[Path], keep_bad_lines: bool = False) -> Dataset:
    """Reads files of one type as one table. With `keep_bad_lines`, a line that is not JSON becomes a row that says so.

    Raises:
        ValueError: for files that do not fit into one table, are not UTF-8, or have a bad line; the message names them.
    """
    if files[0].suffix != ".parquet":
        return _load_as_written(files, keep_bad_lines)
    try:
        return load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{names} cannot be read as one table: {error.__cause__ or error}. Give all files the same columns, each of one type."
        ) from error


def _load_as_written(files: list[Path], keep_bad_lines: bool) -> Dataset:
    """Reads files other than parquet as one table whose values are those of `read_file`. A column may hold texts here and lists there, as
    `content` does; `datasets` would fit all values to the first megabytes or samples, and take texts like "2020-01-01" for times.
    """
    columns: dict[str, None] = {}
    for file in files:
        if file.suffix == ".tar":  # its images are read once, below
            columns |= dict.fromkeys(chain(*columns_of_samples(file).values()))
        else:
            for _, row in read_file(file, keep_bad_lines):
                columns |= dict.fromkeys(row)
    if not columns:
        return Dataset.from_dict({})
    if in_tar := files[0].suffix == ".tar":
        columns |= dict.fromkeys(["__key__", "__url__", *([NOT_A_ROW] if keep_bad_lines else [])])
    features = {
        name: Image(decode=False) if in_tar and is_image_column(name) else Value("large_string") for name in columns
    }
    written = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    try:
        rows = Dataset.from_generator(
            _rows_as_json,
            features=Features(features),
            gen_kwargs={"written": written, "columns": tuple(columns), "keep_bad_lines": keep_bad_lines},
            writer_batch_size=100,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, BadRow):
            raise error.__cause__ from error
        raise
    return rows.with_transform(_values_of_json)


def _rows_as_json(written: tuple, columns: tuple[str, ...], keep_bad_lines: bool) -> Iterator[dict]:
    """Yields rows with each value as JSON, images of a tar file excepted. `written` holds path, bytes and time of each file, so that a
    changed file is read anew."""
    for path, *_ in written:
        in_tar = Path(path).suffix == ".tar"
        for _, row in read_file(Path(path), keep_bad_lines):
            values = {name: row.get(name) for name in columns}
            yield {
                name: value if value is None or (in_tar and is_image_column(name)) else json.dumps(value)
                for name, value in values.items()
            }


def _values_of_json(columns: dict[str, list]) -> dict[str, list]:
    return {
        name: [json.loads(value) if isinstance(value, str) else value for value in values]
        for name, values in columns.items()
    }


class _PlaceInFiles:
    """Tells where the row of an index stands in files read one after the other. It reads the files at its first call, in each process."""

    def __init__(self, files: list[Path], keep_bad_lines: bool):
        self.files, self.keep_bad_lines = files, keep_bad_lines
        self.places: list[str] = []

    def __call__(self, index: int) -> str:
        if not self.places:
            for file in self.files:
                if file.suffix == ".parquet":  # not read for this: it may hold images
                    count = pq.read_metadata(file).num_rows
                    self.places.extend(f"{file.name}, row {number} (counted from 0)" for number in range(count))
                elif file.suffix == ".tar":
                    self.places.extend(f"{file.name}, sample {key}" for key in columns_of_samples(file))
                else:
                    self.places.extend(place for place, _ in read_file(file, self.keep_bad_lines))
        return self.places[index]
