"""Chooses the files of a folder that hold the rows of a split: all of them, of one type, and nothing else in their place."""

import os
import re
from pathlib import Path

from alignvlm.data.file_rows import opened, rows_of_karpathy, type_of
from alignvlm.data.formats import IMAGE_EXTENSIONS, is_image_column
from alignvlm.data.record import shown


FILE_TYPES = ("json", "jsonl", "csv", "tsv", "parquet", "txt", "tar")
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
ROW_TYPES = (".parquet", ".jsonl", ".csv", ".tsv", ".tar")  # a .json or .txt beside them may be about the data
ABOUT_DATA = (
    *("dataset_info.json", "dataset_infos.json"),  # of `datasets` and LLaMA-Factory: they describe data sets
    *("dataset_dict.json", "state.json"),  # of `save_to_disk`
    *("readme.txt", "license.txt", "licence.txt", "copying.txt", "notice.txt", "requirements.txt"),
)  # in small letters
IMAGE_SUFFIXES = tuple(f".{name}" for name in IMAGE_EXTENSIONS)


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


def files_of_split(folder: Path, split: str, only_tars: bool, text_alone: bool) -> list[Path]:
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
        if file.parent == folder and file.match("dataset_*.json") and rows_of_karpathy(file) is not None
    ]:
        return _of_split(karpathy, folder, split)
    images = [file for file in visible if type_of(file) in IMAGE_SUFFIXES]
    of_images = {file.with_suffix("") for file in images} | set(images)
    beside = [file for file in there if type_of(file) == ".json" and file.with_suffix("") in of_images]
    if tables := [file for file in there if type_of(file) in ROW_TYPES]:
        found = _of_split(tables, folder, split)
        folders = {file.parent for file in found if type_of(file) in (".jsonl", ".csv", ".tsv")}
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


def names_of_split(split: str) -> tuple[str, ...]:
    """Returns what a split may be called: `val` also `validation`, and `a+b` as either."""
    return tuple(name for part in split.split("+") for name in SPLIT_NAMES.get(part, (part,)))


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


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


def check_no_table(files: list[Path]) -> None:
    """Checks that texts do not begin as a table of images, as the `captions.txt` of Flickr8k.

    Raises:
        ValueError: if one does.
    """
    for file in files:
        with opened(file) as stream:
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


def refuse_compressed(files: list[Path], folder: Path, split: str) -> None:
    """Raises a `ValueError` if compressed files stand beside the chosen ones and are named as if they belonged to them: nothing reads them, and
    a part of the data would be left out. One that has been unpacked beside itself does no harm."""
    ending = type_of(files[0])
    packed = [
        file
        for file in visible_files(folder)
        if re.search(rf"{re.escape(ending)}\.(gz|bz2|xz|zst|zip)$", file.name.lower())
        and file.with_suffix("") not in files
    ]
    if left := set(_of_split([*files, *packed], folder, split, may_be_none=True)) & set(packed):
        raise ValueError(
            f"{_some(sorted(left), folder)} in {folder} would be left out: unpack compressed files, or move them away."
        )


def _is_named_exactly(file: Path, split: str, numbered: bool = False) -> bool:
    """Tells whether a file is called as a split, as `train.jsonl` or `train-00000.parquet`; or, if `numbered`, also `train_2.jsonl`."""
    shard = "(-.*)?" if type_of(file) in (".parquet", ".tar") else ""
    number = r"([-_.]?\d+([-_.]?of[-_.]?\d+)?)?" if numbered else ""
    return any(re.fullmatch(re.escape(name) + shard + number, file.stem) for name in names_of_split(split))


def is_named(files: list[Path], part: str, folder: Path) -> bool:
    """Tells whether a file's path below the folder holds a split as a word, or a longer word for it (`training`, not `valuable` for `val`)."""
    names = names_of_split(part)
    return any(
        word in names or (word in SPLIT_WORDS and word.startswith(names))
        for file in files
        for word in _words(file, folder)
    )


def _of_split(files: list[Path], folder: Path, split: str, may_be_none: bool = False) -> list[Path]:
    """Returns the files whose names, or whose folders' names, hold the split's (`my_train.jsonl`, `train/0.parquet`); without any, those that
    are named after no split.

    Raises:
        ValueError: if all are named after other splits, unless `may_be_none`.
    """
    found = [file for file in files if _words(file, folder) & set(names_of_split(split))]
    found = found or [file for file in files if not _words(file, folder) & SPLIT_WORDS]
    if not found and not may_be_none:
        raise ValueError(
            f"The files in {folder} are named after other splits than {split!r}: {_some(files, folder)}. Name the split, or the file itself to take all of its "
            "rows."
        )
    return found


def _words(file: Path, folder: Path) -> set[str]:
    """Returns the words of a file's path below a folder, in small letters; of `TestData` or `testset` the split."""
    words = {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", str(file.relative_to(folder)))}
    return words | {split for word in words if (split := re.sub("(set|data)$", "", word)) in SPLIT_WORDS}
