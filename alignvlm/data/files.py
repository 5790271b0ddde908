"""Reads the rows of a split from the Hub or from disk, and tells what was read and where each row stands."""

import csv
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

from alignvlm.data.formats import IMAGE_EXTENSIONS, is_image_column
from alignvlm.data.record import BadRow, shown
from alignvlm.data.tars import columns_of_samples, read_samples
from hub_upload.repository import HTTPError
from hub_upload.run_record import sha256_of


FILE_TYPES = ("json", "jsonl", "csv", "parquet", "txt", "tar")
NOT_A_ROW = "__not_a_row__"  # the column of kept bad lines: it says what is wrong with the line
FOLDER = "__folder__"  # the column of the folder where a row's image paths start, below `Rows.folder`, if files stand in several
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
ROW_TYPES = (".parquet", ".jsonl", ".csv", ".tar")  # a .json or .txt beside them may be about the data
ABOUT_DATA = (
    *("dataset_info.json", "dataset_infos.json"),  # of `datasets` and LLaMA-Factory: they describe data sets
    *("dataset_dict.json", "state.json"),  # of `save_to_disk`
    *("readme.txt", "license.txt", "licence.txt", "copying.txt", "notice.txt", "requirements.txt"),
)  # in small letters
IMAGE_SUFFIXES = tuple(f".{name}" for name in IMAGE_EXTENSIONS)
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
        ValueError: for a split that is not found, or files that cannot be read.
    """
    data_dir = Path(data_dir).expanduser()
    local = data_dir / Path(data).expanduser()
    if local.exists():
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


def type_of(file: Path) -> str:
    """Returns the ending of a file's name, as `.jsonl`, in small letters."""
    return file.suffix.lower()


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
    files = [path] if path.is_file() else _files(within, split, only_tars, text_alone)
    if not files and only_tars:
        raise ValueError(f"{within} holds no tar files. Leave out `name: webdataset` to read files of other types.")
    if not files:
        raise ValueError(
            f"{within} holds no {split}-*.parquet, {split}.jsonl, nor any file whose rows say their split ({', '.join(FILE_TYPES)})."
        )
    if type_of(files[0])[1:] not in FILE_TYPES:
        raise ValueError(f"{files[0]}: expected a file of {', '.join(FILE_TYPES)}.")
    if type_of(files[0]) == ".txt" and not text_alone:
        _check_no_table(files)
    parents = sorted({file.parent for file in files})
    starts, folders = parents[0], None
    if len(parents) > 1:
        starts, folders = folder, [file.parent.relative_to(folder).as_posix() for file in files]
    unnamed = [part for part in split.split("+") if path.is_file() or not _is_named(files, part, folder)]
    place: Callable[[int], str] = _PlaceInFiles(files, keep_bad_lines, folders)
    if not beside_files:
        folders = None
    empty, splits_there = 0, str
    if streaming:
        has_splits = any("split" in row for file in files for _, row in islice(read_file(file, keep_bad_lines), 1))
        given = {"files": files, "folders": folders or [None] * len(files), "splits": _names(split)}
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
            chosen = [index for index, v in enumerate(values) if index in bad or _is_of(v, _names(split))]
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
    of_part = {part: [folder / name for name in _names(part) if (folder / name).is_dir()] for part in split.split("+")}
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
    """Returns the SHA-256 of the files' names and sizes; a broken link has no size."""
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
            if not set(_names(part)) & set(saved):
                raise ValueError(f"{folder} has no split {part!r}; its splits: {', '.join(saved)}.")
        chosen = [name for name in saved if name in _names(split)]
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
        absent = [part for part in absent if not _is_of(value, _names(part))]
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


def _names(split: str) -> tuple[str, ...]:
    return tuple(name for part in split.split("+") for name in SPLIT_NAMES.get(part, (part,)))


def visible_files(folder: Path) -> list[Path]:
    """Returns the files below a folder, hidden ones and those of hidden folders excepted; also those of linked folders, each once."""
    files, entered, home = [], set(), folder.resolve()
    for place, folders, names in os.walk(folder, followlinks=True):
        found, place = Path(place).resolve(), Path(place)
        if found in entered or (place != folder and place.is_symlink() and _is_visible(found, home)):
            folders.clear()
            continue
        entered.add(found)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [place / name for name in names if not name.startswith(".")]
    return sorted(files)


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _files(folder: Path, split: str, only_tars: bool, text_alone: bool) -> list[Path]:
    """Returns the files of one type to read of a folder: those that are named after the split, anywhere below it; or else those of `_of_split`.

    Raises:
        ValueError: for files of several types, for texts beside images unless `text_alone`, or if all are named after other splits.
    """
    types = ("tar",) if only_tars else FILE_TYPES
    visible = visible_files(folder) if folder.is_dir() else []
    all_files = {file for file in visible if type_of(file)[1:] in types and file.is_file()}
    there = sorted(
        file
        for file in all_files
        if file.name.lower() not in ABOUT_DATA
        and not file.name.endswith("_stats.json")  # of img2dataset, whose X.parquet has no images, but X.tar
        and not (type_of(file) == ".parquet" and file.with_suffix(".tar") in all_files)
    )
    named = [file for file in there if type_of(file) != ".txt" and _is_named_exactly(file, split)]
    _check_one_type(named, folder, split)
    if named:
        return [file for file in there if type_of(file) == type_of(named[0]) and _is_named_exactly(file, split, True)]
    if karpathy := [
        file
        for file in there
        if file.parent == folder and file.match("dataset_*.json") and _karpathy(file) is not None
    ]:
        return _of_split(karpathy, folder, split)
    images = [file for file in visible if type_of(file) in IMAGE_SUFFIXES]
    of_images = {file.with_suffix("") for file in images} | set(images)
    beside = [file for file in there if type_of(file) == ".json" and file.with_suffix("") in of_images]
    if tables := [file for file in there if type_of(file) in ROW_TYPES]:
        found = _of_split(tables, folder, split)
        folders = {file.parent for file in found if type_of(file) in (".jsonl", ".csv")}
        lists = [file for file in there if type_of(file) == ".json" and file.parent in folders and file not in beside]
        lists = [file for file in lists if _is_list_of_mappings(file)]
        _check_one_type(found + _of_split(lists, folder, split, True), folder, split)
        return found
    for suffix in (".json", ".txt"):
        if files := [file for file in there if type_of(file) == suffix]:
            found = _of_split(files, folder, split)
            alone = [file for file in found if images and (suffix == ".txt" or file in beside)]
            if alone and not text_alone:
                raise ValueError(
                    f"{folder} holds {_some(alone, folder)}: texts beside images, which would be trained without them. Write one file, .jsonl or "
                    ".csv, with a column `image` of the images' paths and a column `caption` (or another schema's), and name it as `data`; or a "
                    "metadata.jsonl of `file_name` and `text` for `name: imagefolder`. For the texts alone, write `name: text`."
                )
            return found
    return []


def _check_one_type(files: list[Path], folder: Path, split: str) -> None:
    if len({type_of(file) for file in files}) > 1:
        first = {type_of(file): file for file in reversed(files)}.values()
        raise ValueError(
            f"{folder} holds files of several types for split {split!r}: {_some([*first, *files], folder)}. Name one of them as `data`, or leave one "
            "type there."
        )


def _some(files: list[Path], folder: Path) -> str:
    """Returns the names of the first files, for messages."""
    return ", ".join(sorted(str(file.relative_to(folder)) for file in list(dict.fromkeys(files))[:5]))


def _check_no_table(files: list[Path]) -> None:
    """Checks that texts do not begin as a table of images, as the `captions.txt` of Flickr8k.

    Raises:
        ValueError: if one does.
    """
    for file in files:
        with _opened(file) as stream:
            first = stream.readline().strip()
        column, *others = re.split(r"[,;|\t]", first)
        if others and is_image_column(column.partition("#")[0]):
            raise ValueError(
                f"{file}, line 1: {shown(first)} is of a table of images, and a .txt file is read as plain text. Save it as .csv, with commas between "
                "columns and a first line of their names, as `image,caption`. For the texts alone, write `name: text`."
            )


def _is_list_of_mappings(file: Path) -> bool:
    with file.open("rb") as stream:
        return re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", stream.read(256)) is not None


def _is_named_exactly(file: Path, split: str, numbered: bool = False) -> bool:
    """Tells whether a file is called as a split, as `train.jsonl` or `train-00000.parquet`; or, if `numbered`, also `train_2.jsonl`."""
    shard = "(-.*)?" if type_of(file) in (".parquet", ".tar") else ""
    number = r"([-_.]?\d+([-_.]?of[-_.]?\d+)?)?" if numbered else ""
    return any(re.fullmatch(re.escape(name) + shard + number, file.stem) for name in _names(split))


def _is_named(files: list[Path], part: str, folder: Path) -> bool:
    """Tells whether a file's name begins with a split, or its path below the folder holds it as a word."""
    return any(file.name.startswith(_names(part)) or _words(file, folder) & set(_names(part)) for file in files)


def _of_split(files: list[Path], folder: Path, split: str, may_be_none: bool = False) -> list[Path]:
    """Returns the files whose names, or whose folders' names, hold the split's (`my_train.jsonl`, `train/0.parquet`); without any, those that
    are named after no split.

    Raises:
        ValueError: if all are named after other splits, unless `may_be_none`.
    """
    found = [file for file in files if _words(file, folder) & set(_names(split))]
    found = found or [file for file in files if not _words(file, folder) & SPLIT_WORDS]
    if not found and not may_be_none:
        raise ValueError(
            f"The files in {folder} are named after other splits than {split!r}: {_some(files, folder)}. Name the split, or the file itself to take all of its "
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
        if hashed or type_of(file) not in (".parquet", ".arrow", ".tar")
        else identity
    )


def _karpathy(file: Path) -> list | None:
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


def read_file(file: Path, keep_bad_lines: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields the rows of one file as they are written, each with its place.

    Raises:
        BadRow: for a line that is not JSON, an entry that is no mapping, or a row of CSV whose quotes do not close or that has more values
            than columns, unless `keep_bad_lines` keeps it as a row that says so. Also for a file of columns in place of rows.
        ValueError: for a file that is not UTF-8.
    """
    if type_of(file) == ".parquet":
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
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


def _rows_or_problems(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    """Yields each row of a tar, csv, json or jsonl file, or what is wrong with it, with its place."""
    if type_of(file) == ".tar":
        for key, sample in read_samples(file):
            yield f"{file.name}, sample {key}", sample
    elif type_of(file) == ".csv":
        with _opened(file, newline="") as stream:
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
            content = content["images"] if _is_karpathy(content) else [content]
        for number, row in enumerate(content, 1):
            yield f"{file.name}, entry {number}", _mapping(row)
    else:
        with _opened(file) as stream:
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
    rows = csv.DictReader(lines, strict=True)
    try:
        columns = rows.fieldnames
    except csv.Error as error:
        raise _not_csv(lines, error).at(file.name) from error
    while columns is not None:
        lines.taken.clear()
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            while len(lines.taken) > 1 and not lines.taken[0].strip():  # of empty lines before the row
                lines.taken.pop(0)
            yield _not_csv(lines, error)


def _not_csv(lines: _LinesOfRow, error: csv.Error) -> BadRow:
    number, line = lines.back_to_the_second()
    problem = BadRow(
        f"line {number} is not CSV ({error}): {shown(line.rstrip())}. Close the quotation mark, or write the value in quotes with each quotation "
        'mark in it doubled, "".'
    )
    problem.__cause__ = error
    return problem


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
    with _opened(file) as stream:
        begin = stream.read(64).lstrip()
    if begin.startswith("[") or type_of(file) != ".json":
        return begin.startswith("[")
    with _opened(
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
    with _opened(file) as stream:
        return [part for part in (part.strip("\n") for part in stream.read().split("\n\n")) if part]


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
