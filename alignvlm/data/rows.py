"""What a row of a data set must hold, and where it stands: training and evaluation read rows by the same rules.

A row that cannot be used raises `BadRow`, which names the column and its value; whoever reads the rows adds the file and the row.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id


IMAGE_TOKEN = "<image>"
CAPTION_COLUMNS = ("captions", "sentences", "original_alt_text", "alt_text", "caption")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FILE_TYPES = (".json", ".jsonl", ".parquet", ".txt")
ON_BAD_ROW = ("raise", "skip")


class BadRow(ValueError):
    """A row that cannot be used."""

    def at(self, place: str) -> "BadRow":
        """The same with the row's place before it."""
        return BadRow(f"{place}: {self}")


def shown(value: Any, length: int = 80) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def text(value: Any, column: str, may_be_empty: bool = False) -> str:
    """The text of a column, stripped.

    Raises:
        BadRow: if the value is not a string, is empty, or holds the image placeholder.
    """
    if not isinstance(value, str):
        raise BadRow(
            f"`{column}` is {shown(value)} ({type(value).__name__}), not a text. Write it as the text that is meant, in quotes."
        )
    if not may_be_empty and not value.strip():
        raise BadRow(f"`{column}` is empty. Fill it in, or remove the row.")
    if IMAGE_TOKEN in value:
        raise BadRow(
            f"`{column}` holds the image placeholder {IMAGE_TOKEN}: {shown(value)}. Remove it: images stand before the prompt."
        )
    return value.strip()


def items(value: Any, column: str) -> list:
    """The items of a column that holds a list.

    Raises:
        BadRow: if it holds none.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{column}` is {shown(value)}; expected a list with at least one item.")
    return value


def entry(value: Any, key: str, column: str) -> Any:
    """`value[key]` of an item of a list; None if there is no such key.

    Raises:
        BadRow: if the item is not a mapping.
    """
    if not isinstance(value, dict):
        raise BadRow(f"`{column}` is {shown(value)}; expected a mapping with `{key}`.")
    return value.get(key)


def captions(row: dict, columns: tuple[str, ...] = CAPTION_COLUMNS) -> list[str]:
    """The captions of a row, from the first column that holds some: one text, or a list of texts or of Karpathy's `{"raw": text}`.

    Raises:
        BadRow: if there are none, or one is not a text or empty.
    """
    present = [name for name in columns if row.get(name) is not None]
    name = next((name for name in present if row[name]), next(iter(present), None))
    if name is None:
        raise BadRow(f"No caption: none of the columns {', '.join(columns)} is filled.")
    if not isinstance(row[name], list):
        return [text(row[name], name)]
    return [
        text(caption["raw"] if isinstance(caption, dict) and "raw" in caption else caption, f"{name}[{index}]")
        for index, caption in enumerate(items(row[name], name))
    ]


def exchanges(
    turns: Any, column: str, role: str = "role", content: str = "content", drop_image_token: bool = False
) -> list[tuple[str, str]]:
    """The (prompt, response) pairs of a conversation, by who speaks.

    Turns of one speaker in a row are one, joined by line breaks. A system message stands before the next prompt. What the assistant
    says before it was asked anything is left out, and so is a prompt without a response.

    Args:
        turns: mappings of `role` (one of `ROLES`) and `content`.
        column: what messages call the turns.
        drop_image_token: remove the image placeholder from prompts, where it only says that there is an image.

    Raises:
        BadRow: for another role, a turn that is not a text, or a conversation without a response to a prompt.
    """
    pairs: list[tuple[str, str]] = []
    asked: list[str] = []
    answered: list[str] = []
    by_user = False

    def finish() -> None:
        nonlocal by_user
        if answered:
            pairs.append(("\n".join(filter(None, asked)), "\n".join(answered)))
            asked.clear()
            answered.clear()
            by_user = False

    for index, turn in enumerate(items(turns, column)):
        place = f"{column}[{index}]"
        speaker, said = entry(turn, role, place), entry(turn, content, place)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRow(f"`{place}.{role}` is {shown(speaker)}. Valid values: {', '.join(ROLES)}.")
        if ROLES[speaker] == "assistant":
            if by_user:
                answered.append(text(said, f"{place}.{content}"))
            continue
        finish()
        by_user |= ROLES[speaker] == "user"
        if drop_image_token and isinstance(said, str):
            said = said.replace(IMAGE_TOKEN, "")
        asked.append(text(said, f"{place}.{content}", may_be_empty=True))
    finish()
    if not pairs:
        raise BadRow(f"`{column}` holds no prompt of the user with a response of the assistant.")
    return pairs


def is_hub_id(name: str) -> bool:
    """Whether a name of data that is not on disk can be that of a data set on the Hub, `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and Path(name).suffix not in FILE_TYPES


def hub_commit(data: str, revision: str | None = None) -> str:
    """The commit that a branch or tag of a data set on the Hub stands for now.

    Raises:
        FileNotFoundError: if the Hub gives none; the name may have been meant as that of a folder.
    """
    try:
        return HfApi().dataset_info(data, revision=revision).sha
    except OSError as error:
        raise FileNotFoundError(
            f"No such file or folder: {data}, and the Hub gives no data set of that name: {error}"
        ) from error


def is_karpathy(file: Path) -> bool:
    """Whether a json file is Karpathy's `{"images": [...], "dataset": ...}` rather than a list of rows."""
    with file.open() as stream:
        return stream.read(64).lstrip().startswith("{") and file.name.startswith("dataset_")


def read_file(file: Path) -> Iterator[tuple[str, dict]]:
    """The rows of one file as they are written, each with its place.

    Raises:
        BadRow: for a line that is not JSON.
    """
    if file.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield f"{file.name}, row {number} (counted from 0)", row
                number += 1
    elif file.suffix == ".txt":
        for number, paragraph in enumerate(_paragraphs(file), 1):
            yield f"{file.name}, paragraph {number}", {"text": paragraph}
    elif _is_one_value(file):
        content = json.loads(file.read_text())
        for number, row in enumerate(content["images"] if isinstance(content, dict) else content, 1):
            yield f"{file.name}, entry {number}", _mapping(row, f"{file.name}, entry {number}")
    else:
        with file.open() as stream:
            for number, line in enumerate(stream, 1):
                place = f"{file.name}, line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise BadRow(f"{place}: not JSON ({error}): {shown(line.strip())}") from error
                yield place, _mapping(row, place)


def _mapping(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise BadRow(f"{place}: {shown(row)} is no row; expected a mapping of column names to values.")
    return row


def _is_one_value(file: Path) -> bool:
    """Whether a file is one JSON list (or Karpathy's mapping) rather than a mapping on each line."""
    with file.open() as stream:
        return stream.read(64).lstrip().startswith("[") or (file.suffix == ".json" and is_karpathy(file))


def _paragraphs(file: Path) -> list[str]:
    return [part for part in (part.strip("\n") for part in file.read_text().split("\n\n")) if part]


def load_files(files: list[Path]) -> Dataset:
    """The rows of files of one type as one table.

    Raises:
        ValueError: for another type, or files that do not fit into a table; the message says which file and line it is, if it is one.
    """
    suffix = files[0].suffix
    if suffix not in FILE_TYPES:
        raise ValueError(f"{files[0]}: expected a file of json, jsonl, parquet or txt.")
    options = {"sample_by": "paragraph"} if suffix == ".txt" else {}
    if suffix == ".json" and is_karpathy(files[0]):
        options["field"] = "images"
    kind = {".parquet": "parquet", ".txt": "text"}.get(suffix, "json")
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        for file in files:
            for _ in read_file(file):  # finds the line that is not JSON
                pass
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{names} cannot be read as one table: {error.__cause__ or error}. Remove empty lines, and write every column as one type."
        ) from error


def place_in_files(files: list[Path]) -> Callable[[int], str]:
    """Where the row of an index stands in files that were read one behind the other; they are looked at when it is asked."""

    places: list[str] = []

    def place(index: int) -> str:
        if not places:
            for file in files:
                if file.suffix == ".parquet":  # not read for this: it may hold images
                    count = pq.read_metadata(file).num_rows
                    places.extend(f"{file.name}, row {number} (counted from 0)" for number in range(count))
                else:
                    places.extend(place for place, _ in read_file(file))
        return places[index]

    return place
