"""Reads the rows of a split from the Hub or from disk, and tells what was read and where each row stands."""

import glob
import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

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

from alignvlm.data.file_rows import NOT_A_ROW, open_parquet, read_file, type_of
from alignvlm.data.formats import is_image_column
from alignvlm.data.record import BadRow, shown
from alignvlm.data.tars import columns_of_samples
from alignvlm.data.which_files import (
    FILE_TYPES,
    IMAGE_SUFFIXES,
    SPLIT_WORDS,
    check_no_table,
    files_of_split,
    is_named,
    names_of_split,
    refuse_compressed,
    visible_files,
)
from hub_upload.repository import HTTPError
from hub_upload.run_record import sha256_of


FOLDER = "__folder__"  # the column of the folder where a row's image paths start, below `Rows.folder`, if files stand in several
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder of images


@dataclass
class Rows:
    """Rows as read.

    Args:
        rows: the rows; a stream of local files has the columns `row` and `place`.
        identity: what was read: the Hub's id and commit, or the files; goes into run records and results.
        place: returns where the row of an index stands.
        folder: where image paths start; None for a data set of the Hub.
        left_out: how many rows were left out because their column `split` is empty.
        splits_there: describes the values of the column `split`, for messages; empty without that column.
    """

    rows: Dataset | IterableDataset
    identity: dict
    place: Callable[[int], str]
    folder: Path | None
    left_out: int = 0
    splits_there: Callable[[], str] = str

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the rows (of a stream of files: those of its first hundred); none if there is no row."""
        if isinstance(self.rows, Dataset):
            return self.rows.column_names if len(self.rows) else []
        if self.rows.column_names is not None:
            return self.rows.column_names
        first = [each.get("row", each) for each in islice(self.rows, 100)]
        return [name for name in dict.fromkeys(chain(*first)) if name != NOT_A_ROW]


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
    only_tars: bool = False,
    text_alone: bool = False,
    image_dir: str | Path | None = None,
    data_dir: str | Path = ".",
    streaming: bool = False,
    hash_all: bool = False,
    keep_bad_lines: bool = False,
) -> Rows:
    """Reads the rows of one split.

    Args:
        data: a local file or folder (from `data_dir`, unless absolute), or a data set on the Hub.
        split: `a+b` joins two. A slice, `train[:10]`, only of a data set on the Hub.
        config, revision: of a Hub data set; locally, `config` is a folder in it.
        file: the file to read of a Hub repository of files, and of a local folder that holds it.
        folder_of_images: read images with a metadata file, or in one folder per label.
        only_tars: read no other files of a folder.
        text_alone: read texts of a folder of images too, which are otherwise refused if they would be read without the images.
        image_dir: where image paths start (from `data_dir`, unless absolute); by default beside the file that names them.
        streaming: read rows as they are needed.
        hash_all: put the SHA-256 of every file into the identity, also of large files that hold images.
        keep_bad_lines: turn a line that is not JSON into a row that says so in `NOT_A_ROW`, instead of raising.

    Raises:
        FileNotFoundError: for data that is not on disk and has not the form of a Hub id, or an `image_dir` that is not there.
        ValueError: for a split that is not found, files that cannot be read, a revision of local data, and a config of a local file.
    """
    data_dir = Path(data_dir).expanduser()
    local = data_dir / Path(data).expanduser()
    if local.exists():
        if revision is not None:
            raise ValueError(
                f"The revision {revision!r} would be of a data set on the Hub, but {local} is here, read as it is. Leave the revision out."
            )
        if config and local.is_file():
            raise ValueError(
                f"The config {config!r} would be a folder of local data, or a part of a data set on the Hub, but {local} is a file. Leave "
                "the config out."
            )
        reading = (folder_of_images, only_tars, image_dir is None, streaming, hash_all, keep_bad_lines)
        if file and split == "train" and (local / file).is_file():
            local = local / file
        found = _local(local, split, config, text_alone, *reading)
    elif is_hub_id(data):
        found = _hub(data, split, config, revision, file, streaming)
    else:
        raise FileNotFoundError(
            f"No such file or folder: {local}, and {data!r} is no Hub id, user/name. Paths start at {str(data_dir.resolve())!r}."
        )
    if not found.columns:
        raise ValueError(f"{data} has no rows of split {split!r}.{found.splits_there()}")
    if image_dir is not None:
        found.folder = data_dir / Path(image_dir).expanduser()
        if not found.folder.is_dir():
            raise FileNotFoundError(f"No such image_dir: {found.folder}. Paths start at {str(data_dir.resolve())!r}.")
    return found


def is_hub_id(name: str) -> bool:
    """Tells whether a name can be that of a data set on the Hub, `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and type_of(Path(name))[1:] not in FILE_TYPES


def _hub(data: str, split: str, config: str | None, revision: str | None, file: str | None, streaming: bool) -> Rows:
    """Reads the rows of a Hub data set at a commit that the identity states, so that a run can be repeated.

    Raises:
        ValueError: for a split other than `train` of a data set that is one file.
    """
    if file and {re.sub(r"\[[^]]*\]", "", part) for part in split.split("+")} != {"train"}:
        raise ValueError(
            f"{data} is the file {file}, which has no splits, so there is no {split!r}: all of it is `train`. Take a part of it as "
            "`train[:1000]`."
        )
    if not huggingface_hub.constants.is_offline_mode():
        revision = _hub_commit(data, revision)
    options = {"data_files": file, "split": split, "revision": revision, "streaming": streaming}
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
    text_alone: bool,
    folder_of_images: bool,
    only_tars: bool,
    beside_files: bool,
    streaming: bool,
    hash_all: bool,
    keep_bad_lines: bool,
) -> Rows:
    """Reads the rows of local files in any of the forms that the Hub has.

    Raises:
        ValueError: for a split that is not there or is sliced.
    """
    if "[" in split:
        whole = re.sub(r"\[[^]]*\]?", "", split)
        raise ValueError(
            f"split {split!r} of {path}: only a data set on the Hub can be sliced. Write {whole!r}, and take its "
            "first records by `limit`."
        )
    folder = path if path.is_dir() else path.parent
    within = path / config if config else path
    if folder_of_images:
        return _folder_of_images(within, split, streaming, hash_all)
    if any((within / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(within, split, streaming, hash_all)
    files = [path] if path.is_file() else files_of_split(within, split, only_tars, text_alone)
    if not files and only_tars:
        raise ValueError(f"{within} holds no tar files. Leave out `name: webdataset` to read files of other types.")
    if not files:
        alone = any(type_of(file) in IMAGE_SUFFIXES for file in visible_files(within))
        captioned = " For captions of the images there: `alignvlm recaption MODEL FOLDER OUT.jsonl`." if alone else ""
        raise ValueError(
            f"{within} holds no {split}-*.parquet, {split}.jsonl, nor any file whose rows say their split ({', '.join(FILE_TYPES)})."
            f"{captioned}"
        )
    if path.is_dir():
        refuse_compressed(files, within, split)
    if type_of(files[0])[1:] not in FILE_TYPES:
        raise ValueError(f"{files[0]}: expected a file of {', '.join(FILE_TYPES)}.")
    if type_of(files[0]) == ".txt" and not text_alone:
        check_no_table(files)
    parents = sorted({file.parent for file in files})
    starts, folders = parents[0], None
    if len(parents) > 1:
        starts, folders = folder, [file.parent.relative_to(folder).as_posix() for file in files]
    unnamed = [part for part in split.split("+") if path.is_file() or not is_named(files, part, folder)]
    place: Callable[[int], str] = _PlaceInFiles(files, keep_bad_lines, folders)
    if not beside_files:
        folders = None
    empty, splits_there = 0, str
    if streaming:
        good = ((row for _, row in read_file(file, keep_bad_lines) if NOT_A_ROW not in row) for file in files)
        has_splits = any("split" in next(rows, {}) for rows in good)
        given = {"files": files, "folders": folders or [None] * len(files), "splits": names_of_split(split)}
        given |= {"has_splits": has_splits, "keep_bad_lines": keep_bad_lines}
        rows = IterableDataset.from_generator(_stream_files, gen_kwargs=given)
        if has_splits:
            splits_there = partial(_splits_of_files, files, keep_bad_lines)
            if len(unnamed) > 1:
                _check_each_is_there(path.name, unnamed, _split_values(files, keep_bad_lines), splits_there)
    else:
        rows = load_files(files, keep_bad_lines, folders)
        if has_splits := "split" in rows.column_names:
            values = _column(rows, "split")
            bad = {index for index, problem in enumerate(_column(rows, NOT_A_ROW)) if problem is not None}
            splits_there = partial(_described, Counter(shown(v) for index, v in enumerate(values) if index not in bad))
            if len(bad) < len(values):
                _check_each_is_there(path.name, unnamed, values, splits_there)
            chosen = [index for index, v in enumerate(values) if index in bad or _is_of(v, names_of_split(split))]
            empty = sum(index not in bad and _is_empty(value) for index, value in enumerate(values))
            rows, place = rows.select(chosen), partial(_place_of_chosen, place, chosen)
    if path.is_dir() and unnamed and not has_splits and split != "train":
        raise ValueError(
            f"No file in {path} is named after the split {unnamed[0]!r} ({unnamed[0]}-*.parquet, {unnamed[0]}.jsonl), and its rows have no "
            "column `split` to choose by. Name the file itself to take all of its rows."
        )
    identity = {"data": path.name, "split": split, "files": [_file_identity(file, hash_all) for file in files]}
    return Rows(rows, identity, place, starts, empty, splits_there)


def _folder_of_images(folder: Path, split: str, streaming: bool, hash_all: bool) -> Rows:
    """Reads the images of a folder, or of its folders that are named after the splits.

    Raises:
        ValueError: for a split that is not there, in a folder that has others, and for a file name that is not UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name the folder that holds the images.")
    of_part = {
        part: [folder / name for name in names_of_split(part) if (folder / name).is_dir()] for part in split.split("+")
    }
    named = list(dict.fromkeys(each for found in of_part.values() for each in found))
    splits = {each.name for each in named} | {each.name for each in folder.iterdir() if each.is_dir()} & SPLIT_WORDS
    absent = [part for part, found in of_part.items() if not found]
    if absent and splits:
        raise ValueError(
            f"{folder} has no folder of the split {absent[0]!r}; it has {', '.join(sorted(splits))}. Name a split that is there, or its folder as "
            "`data`, to take all of the folder's images."
        )
    files = sorted(file for each in named or [folder] for file in visible_files(each) if file.is_file())
    below = {parent for file in files for parent in file.parents if folder in parent.parents}
    read = sorted({*(named or [folder]), *filter(Path.is_symlink, below)})  # `datasets` does not follow links
    patterns = [f"{glob.escape(os.path.abspath(each))}/**" for each in read]  # it takes names for patterns
    names = [file.relative_to(folder).as_posix() for file in files]
    if bad := [name for name in names if not is_utf_8(name)]:
        raise ValueError(NOT_UTF_8.format(name=ascii(bad[0]), folder=folder))
    rows = load_dataset("imagefolder", data_files=patterns, split="train", streaming=streaming)
    identity: dict = {"data": folder.name, "split": split}
    if metadata := [folder / name for name in names if posixpath.basename(name) in METADATA]:
        identity["files"] = [_file_identity(file, True) for file in metadata]
    identity["listing_sha256"] = listing_hash(folder, names)
    if hash_all:
        identity["content_sha256"] = sha256_of([folder / name for name in names])
    return Rows(rows, identity, partial(_numbered, folder.name), folder)


NOT_UTF_8 = "The file name {name} in {folder} is not UTF-8. Rename the file."


def is_utf_8(name: str) -> bool:
    """Tells whether a file's name is UTF-8 text; Python reads other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def listing_hash(folder: Path, names: list[str]) -> str:
    """Returns the SHA-256 of the files' names and sizes; a broken link has no size.

    Run records state it, so it is quick and stays the same when a folder is copied. It does not tell that a file was replaced by another of
    its size: who must know that also hashes the contents.
    """
    files = [folder / name for name in names]
    sizes = [file.stat().st_size if file.exists() else None for file in files]
    listing = "".join(f"{name} {size}\n" for name, size in zip(names, sizes))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def _saved(folder: Path, split: str, streaming: bool, hash_all: bool) -> Rows:
    """Reads what `save_to_disk` of `datasets` wrote: all rows of a `Dataset`, or a split of a `DatasetDict`.

    Raises:
        ValueError: for a split that is not there.
    """
    saved = load_from_disk(folder)
    if isinstance(saved, DatasetDict):
        for part in split.split("+"):
            if not set(names_of_split(part)) & set(saved):
                raise ValueError(f"{folder} has no split {part!r}; its splits: {', '.join(saved)}.")
        chosen = [name for name in saved if name in names_of_split(split)]
        rows = concatenate_datasets([saved[name] for name in chosen])
    else:
        rows, chosen = saved, ["."]
    files = sorted(file for name in chosen for file in (folder / name).glob("*.arrow"))
    identity = {"data": folder.name, "split": split, "files": [_file_identity(file, hash_all) for file in files]}
    rows = rows.to_iterable_dataset() if streaming else rows
    return Rows(rows, identity, partial(_numbered, f"{folder.name}, split {split}"), folder)


def _column(rows: Dataset, name: str) -> list:
    """Returns the values of a column; none if there is no such column."""
    return rows.select_columns([name])[:][name] if name in rows.column_names else []


def _place_of_chosen(place: Callable[[int], str], chosen: list[int], index: int) -> str:
    return place(chosen[index])


def sample_name(row: dict) -> str:
    """Returns the name of a sample of a webdataset in messages."""
    return f"{Path(row['__url__']).name}, sample {row['__key__']}"


def _stream_files(
    files: list[Path], folders: list[str | None], splits: tuple[str, ...], has_splits: bool, keep_bad_lines: bool
) -> Iterator[dict]:
    """Yields each row of the split with its place; `files`, with their `folders`, are the shards."""
    for file, folder in zip(files, folders):
        for place, row in read_file(file, keep_bad_lines):
            if NOT_A_ROW in row or _is_of(row.get("split"), splits) or not (has_splits or "split" in row):
                row = row if folder is None else {**row, FOLDER: folder}
                yield {"row": row, "place": _below(folder, place)}


def _below(folder: str | None, place: str) -> str:
    return place if folder in (None, ".") else f"{folder}/{place}"


def _is_of(value: Any, splits: tuple[str, ...]) -> bool:
    """Tells whether a value of the column `split` names one of the splits, in capitals or not."""
    return isinstance(value, str) and (value in splits or value.lower() in splits)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _check_each_is_there(data: str, parts: list[str], values: Iterable[Any], splits_there: Callable[[], str]) -> None:
    """Reads values of the column `split` until each part of the split asked for has been among them.

    Raises:
        ValueError: for a part that is none of them.
    """
    absent = list(parts)
    for value in values:
        absent = [part for part in absent if not _is_of(value, names_of_split(part))]
        if not absent:
            return
    if absent:
        raise ValueError(f"{data} has no rows of split {absent[0]!r}.{splits_there()}")


def _split_values(files: list[Path], keep_bad_lines: bool) -> Iterator[Any]:
    for file in files:
        if type_of(file) != ".parquet":
            yield from (row.get("split") for _, row in read_file(file, keep_bad_lines) if NOT_A_ROW not in row)
        elif "split" in pq.read_schema(file).names:  # read without the images
            yield from pq.ParquetFile(file).read(columns=["split"])["split"].to_pylist()


def _splits_of_files(files: list[Path], keep_bad_lines: bool) -> str:
    return _described(Counter(map(shown, _split_values(files, keep_bad_lines))))


def _described(splits: Counter) -> str:
    """Returns a sentence with the most frequent values of the column `split` and their numbers of rows."""
    counted = ", ".join(f"{value}: {count}" for value, count in splits.most_common(8))
    return f" Rows by their column `split`: {counted}. Name a value that is there."


def _file_identity(file: Path, hashed: bool) -> dict:
    """Returns the name, the bytes and the SHA-256; the SHA-256 of parquet, arrow and tar files, which hold the images, only if `hashed`."""
    identity = {"name": file.name, "bytes": file.stat().st_size}
    return (
        {**identity, "sha256": sha256_of([file])}
        if hashed or type_of(file) not in (".parquet", ".arrow", ".tar")
        else identity
    )


def load_files(files: list[Path], keep_bad_lines: bool = False, folders: list[str] | None = None) -> Dataset:
    """Reads files of one type as one table. With `keep_bad_lines`, a line that is not JSON becomes a row that says so. `folders`, one for each
    file, become the column `FOLDER`.

    Raises:
        ValueError: for files that do not fit into one table, are not UTF-8, or have a bad line; the message names them.
    """
    if type_of(files[0]) != ".parquet":
        return _load_as_written(files, keep_bad_lines, folders)
    try:
        rows = load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:
        for file in files:
            open_parquet(file)
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{names} cannot be read as one table: {error.__cause__ or error}. Give all files the same columns, each of one type."
        ) from error
    if folders is None:
        return rows
    counts = [pq.read_metadata(file).num_rows for file in files]
    return rows.add_column(FOLDER, [folder for folder, count in zip(folders, counts) for _ in range(count)])


def _load_as_written(files: list[Path], keep_bad_lines: bool, folders: list[str] | None) -> Dataset:
    """Reads files other than parquet as one table whose values are those of `read_file`. A column may hold texts here and lists there, as
    `content` does; `datasets` would fit all values to the first megabytes or samples, and take texts like "2020-01-01" for times.
    """
    columns: dict[str, None] = {}
    for file in files:
        if type_of(file) == ".tar":  # its images are read once, below
            columns |= dict.fromkeys(chain(*columns_of_samples(file).values()))
        else:
            for _, row in read_file(file, keep_bad_lines):
                columns |= dict.fromkeys(row)
    if not columns:
        return Dataset.from_dict({})
    if in_tar := type_of(files[0]) == ".tar":
        columns |= dict.fromkeys(["__key__", "__url__", *([NOT_A_ROW] if keep_bad_lines else [])])
    if folders is not None:
        columns[FOLDER] = None
    features = {
        name: Image(decode=False) if in_tar and is_image_column(name) else Value("large_string") for name in columns
    }
    written = tuple(
        (str(file.resolve()), folder, file.stat().st_size, file.stat().st_mtime_ns)
        for file, folder in zip(files, folders or [None] * len(files))
    )
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
    """Yields rows with each value as JSON, images of a tar file excepted. `written` holds path, `FOLDER`, bytes and time of each
    file, so that a changed file is read anew."""
    for path, folder, *_ in written:
        in_tar = type_of(Path(path)) == ".tar"
        for _, row in read_file(Path(path), keep_bad_lines):
            values = {name: folder if name == FOLDER else row.get(name) for name in columns}
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

    def __init__(self, files: list[Path], keep_bad_lines: bool, folders: list[str] | None):
        self.files, self.keep_bad_lines = files, keep_bad_lines
        self.folders = folders or [None] * len(files)
        self.places: list[str] = []

    def __call__(self, index: int) -> str:
        if not self.places:
            for file, folder in zip(self.files, self.folders):
                if type_of(file) == ".parquet":  # not read for this: it may hold images
                    count = pq.read_metadata(file).num_rows
                    places = (f"{file.name}, row {number} (counted from 0)" for number in range(count))
                elif type_of(file) == ".tar":
                    places = (f"{file.name}, sample {key}" for key in columns_of_samples(file))
                else:
                    places = (place for place, _ in read_file(file, self.keep_bad_lines))
                self.places.extend(_below(folder, place) for place in places)
        return self.places[index]
