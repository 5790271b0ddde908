"""Makes one record of the rows of one image: reads each row by its schema, splits conversations if asked, drops duplicates."""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, List
from PIL import Image as PILImage

from alignvlm.data.file_rows import NOT_A_ROW
from alignvlm.data.files import FOLDER
from alignvlm.data.formats import check_all_is_seen, check_options, images_of
from alignvlm.data.record import BadRow, Conversation, Record, shown


TURNS = ("whole", "independent")
STAND_IN = {"bytes": None}  # for an image that is not read while texts are checked


@dataclass(frozen=True)
class Reader:
    """Makes a record of the rows of one image.

    Args:
        read: a function of `formats` with its options, which reads a row.
        turns: `whole` keeps conversations; `independent` makes each exchange a conversation of its own.
        train_on: replaces each conversation's own value; None: keeps it.
        keep_duplicates: keep conversations that repeat: the same messages with the same responses.
        folder: where image paths start.
        images: the images of a config of their own.
        texts_alone: rows may have images that `read` leaves aside.

    Raises:
        ValueError: for an option of `read` of another type.
    """

    read: Callable[[dict], Record | None]
    turns: str = "whole"
    train_on: str | None = None
    keep_duplicates: bool = False
    folder: Path | None = None
    images: "ImageTable | None" = None
    texts_alone: bool = False

    def __post_init__(self):
        check_options(self.read)

    def __call__(self, rows: list[dict], name: str) -> dict:
        record = self.merged([found for row in rows if (found := self.of_row(row)) is not None])
        return {**record.to_row(), "images": [self._placed(image) for image in record.images], "id": name}

    def of_row(self, row: dict) -> Record | None:
        """Returns the record of one row; None if the options leave the row out.

        Raises:
            BadRow: if the row makes no record.
        """
        if row.get(NOT_A_ROW):
            raise BadRow(row[NOT_A_ROW])
        try:
            record = self.read(row if self.images is None else self.images.joined(row))
            if record is not None:
                check_all_is_seen(row, record, self.texts_alone)
        except BadRow:
            raise
        except ValueError as error:  # a conversation that cannot be trained
            raise BadRow(str(error)) from error
        if record is None:
            return None
        if row.get(FOLDER):
            record = replace(record, images=[below(row[FOLDER], image) for image in record.images])
        conversations = record.conversations
        if self.turns == "independent":
            if self.train_on == "all":
                conversations = [replace(conversation, train_on="all") for conversation in conversations]
            conversations = [exchange for conversation in conversations for exchange in conversation.exchanges()]
        if self.train_on is not None:
            conversations = [replace(conversation, train_on=self.train_on) for conversation in conversations]
        return record if conversations is record.conversations else replace(record, conversations=conversations)

    def merged(self, records: list[Record]) -> Record:
        """Merges the records of one image. Captions that answer one prompt become responses of one conversation; what an earlier row has is
        left out. A record may lack the last of its row's images, so those of the record with most of them are taken."""
        found: dict[Any, Conversation] = {}
        for row, record in enumerate(records):
            earlier = {} if self.keep_duplicates else dict(found)
            before = {_said(conversation) for conversation in earlier.values()}
            for number, conversation in enumerate(record.conversations):
                key: Any = (row, number)
                if "caption" in conversation.kind:
                    key = (json.dumps(conversation.messages), conversation.kind)
                    known = earlier[key].responses if key in earlier else []
                    new = [response for response in conversation.responses if response not in known]
                    if key in found:
                        conversation = replace(conversation, responses=[*found[key].responses, *new])
                elif _said(conversation) in before:
                    continue
                found[key] = conversation
        fullest = max(records, key=lambda record: len(record.images))
        return replace(fullest, conversations=list(found.values()))

    def without_images(self) -> "Reader":
        """Returns the same reader for rows that hold `STAND_IN` in place of each image."""
        return self if self.images is None else replace(self, images=replace(self.images, loads=False))

    def _placed(self, image: Any) -> Any:
        """Returns an image with the folder where its path starts."""
        path = path_of(image)
        if path is None:
            return image
        return {"bytes": None, "path": path, "folder": None if self.folder is None else str(self.folder)}


def path_of(image: Any) -> str | None:
    """Returns the path of an image that starts at a folder of the data, as a text or in a mapping; None for others. An absolute path in a
    mapping was made by `datasets`."""
    if isinstance(image, dict) and image.get("bytes") is None and not os.path.isabs(image.get("path") or os.sep):
        return image["path"]
    return image if isinstance(image, str) else None


def below(folder: str | None, image: Any) -> Any:
    """Returns an image whose path starts at `folder` with the folder in its path; without a folder or such a path, the image."""
    path = path_of(image)
    return image if not folder or path is None else posixpath.normpath(posixpath.join(folder, path))


def _said(conversation: Conversation) -> tuple:
    """Returns a key that conversations of the same messages, responses and rejected answers share."""
    return (json.dumps(conversation.messages), *conversation.responses, tuple(conversation.rejected or ()))


@dataclass(frozen=True)
class ImageTable:
    """Images that stand in a table of their own, found by a column of the rows.

    Args:
        rows: the table.
        column: the column of the rows whose value names an image.
        index: the table's row of each name.
        loads: False puts `STAND_IN` in place of an image.
    """

    rows: Dataset
    column: str
    index: dict[str, int]
    loads: bool = True

    def joined(self, row: dict) -> dict:
        """Returns the row with its image."""
        if row[self.column] not in self.index:
            raise BadRow(f"`{self.column}` is {shown(row[self.column])}, of which there is no image.")
        return {**row, "image": self.rows[self.index[row[self.column]]]["image"] if self.loads else STAND_IN}


class RowsWithoutImages:
    """Rows by index, with `STAND_IN` in place of each image that lies in them, and none of them read."""

    def __init__(self, rows: Dataset):
        self.embedded = [name for name, feature in rows.features.items() if _holds_images(feature)]
        self.texts = rows.select_columns([name for name in rows.column_names if name not in self.embedded])
        self.images = rows.select_columns(self.embedded).with_format("arrow")
        self.count = len(rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        (row,) = self.between(index, index + 1)
        return row

    def between(self, start: int, end: int) -> Iterator[dict]:
        """Yields the rows from `start` to `end`."""
        columns = self.texts[start:end] if self.texts.column_names else {}
        if self.embedded:
            batch = self.images[start:end]
            columns |= {name: _stand_ins(batch.column(name)) for name in self.embedded}
        for values in zip(*columns.values()):
            yield dict(zip(columns, values))


def rows_without_images(rows: Dataset) -> Iterator[dict]:
    """Yields all rows of `RowsWithoutImages`."""
    without = RowsWithoutImages(rows)
    for start in range(0, len(rows), 1000):
        yield from without.between(start, start + 1000)


def _stand_ins(column: pa.ChunkedArray) -> list[Any]:
    """Returns `STAND_IN` for each image of a column, None where there is none; for a list of images, such a list."""
    present = [STAND_IN if there else None for there in _flat(column).is_valid().to_pylist()]
    if pa.types.is_struct(column.type):
        return present
    found = iter(present)
    return [
        None if count is None else list(islice(found, count)) for count in pc.list_value_length(column).to_pylist()
    ]


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_struct(column.type) else pc.list_flatten(column)


def _holds_images(feature: Any) -> bool:
    """Tells whether a column holds the bytes of images, or lists of them."""
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def image_key(row: dict) -> str:
    """Returns a key that rows of the same images share: their paths, or the first digits of their bytes' hash; empty without an image, also where
    one is named that has neither bytes nor path."""
    keys = []
    for image in images_of(row):
        image = below(row.get(FOLDER), image)
        if isinstance(image, PILImage.Image):
            image = {"bytes": image.tobytes()}
        content, path = (None, image) if isinstance(image, str) else (image.get("bytes"), image.get("path"))
        if content is None and path is None:
            return ""
        keys.append(posixpath.normpath(path) if content is None else hashlib.sha256(content).hexdigest()[:16])
    return "\n".join(keys)


def group_key(row: dict, group_by: str) -> str:
    """Returns a key that the rows of a record share: that of their images, or the value of a column; empty for a row that stays apart."""
    if group_by == "image":
        return image_key(row)
    return "" if row[group_by] is None else str(row[group_by])
