"""What a recipe or an evaluation names, to records: rows (`files`), each read by its schema (`formats`), those of one image together.

`CATALOGUE` has what is known of a data set. A record is a row as `Record.to_row` writes it; its images stay undecoded until the collator
reads them.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from alignvlm.data import scenes
from alignvlm.data.catalogue import CATALOGUE, DataSet
from alignvlm.data.files import Rows, read_rows, sample_name
from alignvlm.data.formats import CAPTION_COLUMNS, FORMATS, images_of, is_image_column, options_of
from alignvlm.data.images import inside
from alignvlm.data.record import TRAIN_ON, BadRow, Conversation, Record, shown


UNDECODED_RECORD = Features({**scenes.RECORD_FEATURES, "images": List(Image(decode=False))})
STREAMED_RECORD = Features({**UNDECODED_RECORD, "bad_row": Value("string")})
MAX_BAD_ROWS_OF = 1000  # below so many rows the share of bad ones says little
TURNS = ("whole", "independent")


@dataclass
class Source:
    """The records of one source, made when they are asked for: `len(source)`, `source[i]`, or, when streaming, iteration.

    Args:
        rows: as read, images undecoded.
        to_record: makes a record of the rows of one group, and what it is called.
        groups: the rows of each record; None: one each.
        ids: what the records are called; None: by their index.
        identity: what was read: the Hub's id and commit, or the files; goes into the run record.
        place: where the row of an index stands.
        bad_rows: what is wrong with the rows that were left out, each with its place.
        left_out: how many rows the recipe's options left out.
        metric_of: the metric that judges answers to a conversation; None: none does.
    """

    rows: Dataset | IterableDataset
    to_record: Callable[[list[dict], str], dict]
    groups: list[list[int]] | None = None
    ids: list[str] | None = None
    identity: dict = field(default_factory=dict)
    place: Callable[[int], str] = str
    bad_rows: list[str] = field(default_factory=list)
    left_out: int = 0
    metric_of: Callable[[Conversation], str | None] = DataSet().metric_of

    def __len__(self) -> int:
        return len(self.rows) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> dict:
        name = str(index) if self.ids is None else self.ids[index]
        return self.to_record([self.rows[i] for i in self.rows_of(index)], name)

    def rows_of(self, index: int) -> list[int]:
        """The rows a record is made of."""
        return [index] if self.groups is None else self.groups[index]

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def with_other_turns(self) -> tuple[str, "Source"] | None:
        """The same with conversations whole that are independent here, or the other way round, and what that is called; None for a
        source that has no such choice."""
        if not isinstance(self.to_record, _Reader):
            return None
        (other,) = set(TURNS) - {self.to_record.turns}
        return other, replace(self, to_record=replace(self.to_record, turns=other))

    def conversations(self, keep_duplicates: bool = False) -> Iterator[list[Conversation]]:
        """Those of each record, read without its images."""
        reader = self.to_record
        if not isinstance(reader, _Reader):  # rows are records
            for row in self.rows.select_columns(["conversations"]):
                yield [Conversation(**fields) for fields in row["conversations"]]
            return
        reader = replace(reader.without_images(), keep_duplicates=keep_duplicates)
        rows = list(_without_images(self.rows))
        for index in range(len(self)):
            yield reader.merged([reader.of_row(rows[row]) for row in self.rows_of(index)]).conversations


@dataclass(frozen=True)
class _Reader:
    """Makes a record of the rows of one image.

    Args:
        read: a row's schema (of `formats`), with its options.
        turns: `whole` keeps conversations; `independent` makes each exchange a conversation of its own.
        train_on: replaces what each conversation says; None: as it is.
        keep_duplicates: keep what occurs twice: the same messages with the same responses.
        folder: where image paths start.
        images: the images of a config of their own.
    """

    read: Callable[[dict], Record | None]
    turns: str = "whole"
    train_on: str | None = None
    keep_duplicates: bool = False
    folder: Path | None = None
    images: "_Images | None" = None

    def __call__(self, rows: list[dict], name: str) -> dict:
        record = self.merged([found for row in rows if (found := self.of_row(row)) is not None])
        return {**record.to_row(), "images": [self._placed(image) for image in record.images], "id": name}

    def of_row(self, row: dict) -> Record | None:
        """The record of one row; None if the options leave it out.

        Raises:
            BadRow: if it makes none.
        """
        try:
            record = self.read(row if self.images is None else self.images.joined(row))
        except BadRow:
            raise
        except ValueError as error:  # a conversation nobody can train
            raise BadRow(str(error)) from error
        if record is None:
            return None
        conversations = record.conversations
        if self.turns == "independent":
            conversations = [exchange for conversation in conversations for exchange in conversation.exchanges()]
        if self.train_on is not None:
            conversations = [replace(conversation, train_on=self.train_on) for conversation in conversations]
        return replace(record, conversations=conversations)

    def merged(self, records: list[Record]) -> Record:
        """The records of one image as one: captions that answer one prompt are responses of one conversation, and what an earlier row
        has is not there again."""
        found: dict[Any, Conversation] = {}
        for row, record in enumerate(records):
            before = set() if self.keep_duplicates else {_said(conversation) for conversation in found.values()}
            for number, conversation in enumerate(record.conversations):
                key: Any = (row, number)
                if "caption" in conversation.kind:
                    key = (json.dumps(conversation.messages), conversation.kind)
                    if key in found:
                        conversation = replace(
                            conversation, responses=[*found[key].responses, *conversation.responses]
                        )
                elif _said(conversation) in before:
                    continue
                found[key] = conversation
        return replace(records[0], conversations=list(found.values()))

    def without_images(self) -> "_Reader":
        """The same for rows that hold an empty mapping in place of each image."""
        return self if self.images is None else replace(self, images=replace(self.images, loads=False))

    def _placed(self, image: Any) -> Any:
        if not isinstance(image, str):
            return image
        return {"bytes": None, "path": image, "folder": None if self.folder is None else str(self.folder)}


def _said(conversation: Conversation) -> tuple:
    """The same for conversations of the same messages and responses."""
    return (json.dumps(conversation.messages), *conversation.responses)


@dataclass(frozen=True)
class _Images:
    """Images that stand in a table of their own, found by a column of the rows.

    Args:
        rows: the table.
        column: of the rows, whose value names an image.
        index: the table's row of each name.
        loads: False puts an empty mapping in place of an image.
    """

    rows: Dataset
    column: str
    index: dict[str, int]
    loads: bool = True

    def joined(self, row: dict) -> dict:
        """The row with its image."""
        if row[self.column] not in self.index:
            raise BadRow(f"`{self.column}` is {shown(row[self.column])}, of which there is no image.")
        return {**row, "image": self.rows[self.index[row[self.column]]]["image"] if self.loads else {}}


COMMON = (
    "data",
    "split",
    "config",
    "revision",
    "image_dir",
    "limit",
    "format",
    "turns",
    "train_on",
    "keep_duplicates",
)


def read_source(
    arguments: dict,
    data_dir: str | Path = ".",
    streaming: bool = False,
    max_bad_rows: float | None = None,
    hash_all: bool = False,
) -> Source:
    """Reads what one entry of a recipe's `sources` names, and checks the texts of all its rows (of a stream: as they come).

    Args:
        arguments: `name` (of `CATALOGUE`; `local` if it is left out) and any of

            - `data`: a Hub id, or a local file or folder (from `data_dir`, unless absolute) of the same form;
            - `split` (default `train`; `a+b` joins two), `config` and `revision` of a Hub data set;
            - `image_dir`: where image paths start; by default the folder of the file that names them;
            - `limit`: only the first so many records;
            - `format`: the schema of the rows (of `FORMATS`), where their columns do not tell;
            - `turns`: `whole` conversations (the default), or `independent`: each exchange a conversation of its own;
            - `train_on`: `last` or `all` turns of the assistant; by default all of a conversation's;
            - `keep_duplicates`: keep what is said twice about an image;
            - the options of the schema's function.
        streaming: read rows as they are needed (`datasets` streaming) instead of indexing them first.
        max_bad_rows: the share of rows that may be bad and are left out, of at least `MAX_BAD_ROWS_OF` rows; None: none may be.
            Those of a stream become records without conversations that say in `bad_row` what is wrong.
        hash_all: put the SHA-256 of every local file into the identity.

    Raises:
        ValueError: for an unknown name or argument, missing columns or an empty split; the message lists what is valid. A row that
            cannot be used is a `BadRow`, which names its file, its number, the column and the value.
        FileNotFoundError: for data that is neither on disk nor of the form of a Hub id.
    """
    options = dict(arguments)
    name = options.pop("name", "local")
    if name not in CATALOGUE:
        raise ValueError(f"Unknown source {name!r}. Valid names: {', '.join(CATALOGUE)}.")
    kind = CATALOGUE[name]
    if kind.generate is not None:
        return _generated(name, kind, options, streaming)
    common = {key: options.pop(key, None) for key in COMMON}
    read = _schema(name, kind, common, options)
    data = common["data"] or kind.data
    if data is None:
        raise ValueError(f"Source {name!r} needs `data`: a local file or folder, or a data set of the Hub.")
    config = common["config"] or kind.config
    given = {"revision": common["revision"], "data_dir": data_dir}
    found = read_rows(
        data,
        common["split"] or "train",
        config,
        file=kind.file,
        folder_of_images=kind.image_folder,
        streaming=streaming,
        hash_all=hash_all,
        **given,
    )
    if kind.licence != DataSet.licence:
        found.identity["licence"] = kind.licence
    if common["image_dir"] is not None:
        found.folder = Path(data_dir) / common["image_dir"]
        if not found.folder.is_dir():
            raise FileNotFoundError(f"No such image_dir: {found.folder}. Paths start at data_dir={str(data_dir)!r}.")
    images = None
    if kind.images is not None and "image" not in found.columns:
        if streaming:
            raise ValueError(
                f"Source {name!r} has its images in a config of their own, which a stream cannot look up."
            )
        before, after, column, key = kind.images
        table = read_rows(data, common["split"] or "train", config and config.replace(before, after), **given)
        index = {value: number for number, value in enumerate(table.rows[key])}
        images = _Images(table.rows.cast_column("image", Image(decode=False)), column, index)
    _check_columns(found, kind, name, data)
    found.rows = _undecoded(found, data, kind.note)
    if kind.image_folder and not {"text", *CAPTION_COLUMNS} & set(found.columns):
        if "label" not in found.columns:
            raise ValueError(
                f"{data} is a folder of images that says nothing about them. Give each image a caption in a file metadata.jsonl beside "
                'the images, as {"file_name": "a.jpg", "text": "A cat."}, or put the images into one folder per label. '
                f"Columns found: {sorted(found.columns)}."
            )
        options["names"] = found.rows.features["label"].names
    reader = _Reader(
        partial(read, **options),
        common["turns"] or "whole",
        common["train_on"],
        bool(common["keep_duplicates"]),
        found.folder,
        images,
    )
    if streaming:
        source = _streamed(found, reader, kind.group_by, common["limit"], max_bad_rows is not None)
    else:
        source = _indexed(found, reader, kind.group_by, common["limit"], max_bad_rows)
    source.metric_of = kind.metric_of
    return source


def _schema(name: str, kind: DataSet, common: dict, options: dict) -> Callable[..., Record | None]:
    """The function that reads a row, once all arguments are known to be valid.

    Raises:
        ValueError: for one that is not.
    """
    for key, valid in (("format", tuple(FORMATS)), ("turns", TURNS), ("train_on", TRAIN_ON)):
        if common[key] is not None and common[key] not in valid:
            raise ValueError(f"Source {name!r}: {key}={common[key]!r}. Valid values: {', '.join(valid)}.")
    read = kind.read if common["format"] is None else FORMATS[common["format"]].read
    valid = options_of(read)
    if unknown := set(options) - set(valid):
        raise ValueError(
            f"Source {name!r} does not know {sorted(unknown)}. Its arguments: {', '.join([*COMMON, *valid])}."
        )
    return read


def _generated(name: str, kind: DataSet, options: dict, streaming: bool) -> Source:
    valid = inspect.signature(kind.generate).parameters
    if unknown := set(options) - set(valid):
        raise ValueError(f"Source {name!r} does not know {sorted(unknown)}. Its arguments: {', '.join(valid)}.")
    if missing := [key for key, p in valid.items() if p.default is p.empty and key not in options]:
        raise ValueError(f"Source {name!r} needs {', '.join(missing)}.")
    rows = kind.generate(**options).cast(UNDECODED_RECORD)
    identity = {"generated": name, **options}
    source = Source(rows.to_iterable_dataset() if streaming else rows, _first, identity=identity)
    source.metric_of = kind.metric_of
    return source


def _first(rows: list[dict], name: str) -> dict:
    return {**rows[0], "id": name}


def _check_columns(found: Rows, kind: DataSet, name: str, data: str) -> None:
    for needed in kind.columns:
        alternatives = needed if isinstance(needed, tuple) else (needed,)
        if not set(alternatives) & set(found.columns):
            raise ValueError(
                f"Source {name!r} needs a column {' or '.join(alternatives)}; {data} has {sorted(found.columns)}. For rows of another "
                "schema leave out the name: {data: ...} tells the schema by the columns."
            )


def _undecoded(found: Rows, data: str, note: str) -> Dataset | IterableDataset:
    """The rows with images as bytes.

    Raises:
        ValueError: if there are only paths of images, and no folder where they start.
    """
    rows, paths = found.rows, []
    for column, feature in (rows.features or {}).items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, Image):
            undecoded = Image(decode=False)
            rows = rows.cast_column(column, List(undecoded) if isinstance(feature, List) else undecoded)
        elif isinstance(inner, Value) and inner.dtype == "string" and is_image_column(column):
            paths.append(column)
    if paths and found.folder is None:
        raise ValueError(
            f"{data} holds no images, only their paths (column {paths[0]}): download them and name their folder as `image_dir`. {note}"
        )
    return rows


def _indexed(
    found: Rows, reader: _Reader, group_by: str | None, limit: int | None, max_bad_rows: float | None
) -> Source:
    """Records by their index. All texts are checked here; images that lie in the rows are not read for this.

    Raises:
        BadRow: for a bad row, or too many of them.
    """
    bad, left_out = _unusable(found.rows, reader)
    total = len(found.rows)
    if bad:
        message = found.place(next(iter(bad))) + ": " + next(iter(bad.values()))
        if max_bad_rows is None:
            raise BadRow(f"{message} (one of {len(bad)} bad rows of {total}; `on_bad_row: skip` leaves them out.)")
        if len(bad) > max_bad_rows * max(total, MAX_BAD_ROWS_OF) or len(bad) == total:
            raise BadRow(
                f"{len(bad)} of {total} rows of {found.identity['data']} cannot be used, more than max_bad_rows={max_bad_rows:g}. The "
                f"first: {message}"
            )
    if len(bad) + len(left_out) == total:
        raise ValueError(f"The options given leave out all {total} rows of {found.identity['data']}.")
    source = Source(found.rows, reader, identity=found.identity, place=found.place, left_out=len(left_out))
    source.bad_rows = [f"{found.place(index)}: {problem}" for index, problem in bad.items()]
    skipped = bad.keys() | left_out
    if group_by is not None:
        groups = _groups(found.rows, group_by, skipped)
        source.ids, source.groups = list(groups), list(groups.values())
    elif skipped or limit is not None:
        source.groups = [[index] for index in range(total) if index not in skipped]
        source.ids = [str(index) for (index,) in source.groups]
    if limit is not None:
        source.groups, source.ids = source.groups[:limit], source.ids[:limit]
    source[0]  # an image column nobody can read is found here, not after an hour
    return source


def _unusable(rows: Dataset, reader: _Reader) -> tuple[dict[int, str], set[int]]:
    """What is wrong with each row that makes no record, by its index; and the rows that the options leave out."""
    reader = reader.without_images()
    bad: dict[int, str] = {}
    left_out: set[int] = set()
    for index, row in enumerate(_without_images(rows)):
        try:
            if reader.of_row(row) is None:
                left_out.add(index)
        except BadRow as error:
            bad[index] = str(error)
    return bad, left_out


def _without_images(rows: Dataset) -> Iterator[dict]:
    """The rows, an empty mapping in place of each image that lies in them."""
    embedded = [name for name, feature in rows.features.items() if _holds_images(feature)]
    texts = rows.select_columns([name for name in rows.column_names if name not in embedded])
    images = rows.select_columns(embedded).with_format("arrow")
    for start in range(0, len(rows), 1000):
        chosen = slice(start, start + 1000)
        columns = texts[chosen] if texts.column_names else {}
        if embedded:
            batch = images[chosen]
            columns |= {name: _stand_ins(batch.column(name)) for name in embedded}
        for values in zip(*columns.values()):
            yield dict(zip(columns, values))


def _stand_ins(column: pa.ChunkedArray) -> list[Any]:
    """An empty mapping for each image of a column, or a list of as many as there are."""
    present = column.is_valid().to_pylist()
    if pa.types.is_struct(column.type):
        return [{} if there else None for there in present]
    return [[{}] * count if there else None for there, count in zip(present, pc.list_value_length(column).to_pylist())]


def _holds_images(feature: Any) -> bool:
    """Whether the values of a column are the bytes of images, or lists of such."""
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def _groups(rows: Dataset, group_by: str, left_out: set[int]) -> dict[str, list[int]]:
    """The rows of each record by its name, records in the order they first appear; rows without an image stay apart."""
    found: dict[str, list[int]] = {}
    columns = [name for name in rows.column_names if name in (group_by, "filepath") or is_image_column(name)]
    keyed = rows.select_columns(columns) if columns else [{}] * len(rows)
    for index, row in enumerate(keyed):
        if index not in left_out:
            key = _image_key(row) if group_by == "image" else str(row[group_by])
            found.setdefault(key or f"row {index}", []).append(index)
    return found


def _image_key(row: dict) -> str:
    """The same for rows of the same images: their paths, or the beginning of the hash of their bytes; empty without an image."""
    keys = []
    for image in images_of(row):
        if isinstance(image, PILImage.Image):
            image = {"bytes": image.tobytes()}
        content = None if isinstance(image, str) else image.get("bytes")
        if content is not None:
            keys.append(hashlib.sha256(content).hexdigest()[:16])
        else:
            keys.append(str(image if isinstance(image, str) else image.get("path")))
    return " ".join(keys)


def _streamed(found: Rows, reader: _Reader, group_by: str | None, limit: int | None, skip_bad_rows: bool) -> Source:
    """Records as a stream; rows of one image become one record where they follow each other, as they do in these data sets."""
    rows = found.rows
    if rows.column_names is not None:  # not of files
        rows = rows.map(partial(_unnumbered, found.identity["data"]), remove_columns=rows.column_names)
    mapped = rows.map(
        partial(_records_of_batch, reader, group_by, skip_bad_rows),
        batched=True,
        batch_size=256 if group_by is not None else 16,
        remove_columns=["row", "place"],
        features=STREAMED_RECORD,
    )
    return Source(mapped if limit is None else mapped.take(limit), _first, identity=found.identity)


def _unnumbered(name: str, row: dict) -> dict:
    """A row of a stream that does not say which one it is: several readers take turns at it."""
    return {"row": row, "place": sample_name(row) if "__key__" in row else name}


def _records_of_batch(
    reader: _Reader, group_by: str | None, skip_bad_rows: bool, batch: dict[str, list]
) -> dict[str, list]:
    """The records of some rows, and in their places those that say what is wrong with a row."""
    groups: list[tuple[str, list[dict]]] = []
    records: list[dict] = []
    for row, place in zip(batch["row"], batch["place"]):
        try:
            if reader.of_row(row) is None:
                continue
        except BadRow as error:
            if not skip_bad_rows:
                raise error.at(place) from error
            records.append({"images": [], "conversations": [], "id": "", "bad_row": str(error.at(place))})
            continue
        key = "" if group_by is None else _image_key(row) if group_by == "image" else str(row[group_by])
        if key and groups and key == groups[-1][0]:
            groups[-1][1].append(row)
        else:
            groups.append((key, [row]))
    for key, group in groups:
        record = reader(group, key)
        records.append({**record, "images": [_joined(image) for image in record["images"]], "bad_row": None})
    return {name: [record[name] for record in records] for name in STREAMED_RECORD}


def _joined(image: Any) -> Any:
    """`{"bytes", "path"}`, the path joined to its folder."""
    if not isinstance(image, dict):
        return image
    path = image.get("path")
    if image.get("folder") is not None:
        path = inside(image["folder"], path)
    return {"bytes": image.get("bytes"), "path": path}
