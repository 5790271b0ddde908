"""Reads the samples of a webdataset: a tar file whose members of one name, up to its first dot, make a sample."""

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignvlm.data.formats import is_image_column
from alignvlm.data.record import BadRow, shown


MEMBER = re.compile(r"((?:.*/)?[^./]+)[.]([^/]+)")  # the sample's key, and the member's column


def columns_of_samples(file: Path) -> dict[str, list[str]]:
    """Returns the columns of each sample by its key, in the order of the samples' first members.

    Raises:
        ValueError: for a file that is no complete tar file.
    """
    with _opened(file) as archive:
        return {key: list(members) for key, members in _members(archive).items()}


def read_samples(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    """Yields the key and the row of each sample, wherever its members stand: `__key__`, `__url__`, images as `{"bytes", "path"}`, `txt` as
    a text, `json` as its value. In place of the row of a sample that cannot be read stands the `BadRow` that says why.

    Raises:
        ValueError: for a file that is no complete tar file.
    """
    with _opened(file) as archive:
        for key, members in _members(archive).items():
            row: dict = {"__key__": key, "__url__": file.name}
            try:
                for column, member in members.items():
                    row[column] = _value(archive.extractfile(member).read(), column, f"{key}.{column}")
            except BadRow as error:
                yield key, error
            else:
                yield key, row


def _members(archive: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Returns the members that are read, by sample and column; of two with one name the last, as `tar` does."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        name = MEMBER.fullmatch(member.name)
        if name is None or not member.isfile():
            continue
        key, column = name.groups()
        if column.lower() in ("txt", "json"):
            column = column.lower()
        elif not is_image_column(column):
            continue
        found.setdefault(key, {})[column] = member
    return found


def _value(content: bytes, column: str, name: str) -> Any:
    if is_image_column(column):
        return {"bytes": content, "path": name}
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text) if column == "json" else text
    except UnicodeDecodeError as error:
        raise BadRow(f"`{column}` is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"`{column}` is not JSON ({error.msg} at column {error.colno}): {shown(text)}") from error


@contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file) as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} is no complete tar file: {error}. Write it again.") from error
