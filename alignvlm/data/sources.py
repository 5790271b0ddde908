"""Makes records of the sources that a recipe or an evaluation names.

Rows come from `files`; `formats` reads each by its schema; rows of one image become one record. `CATALOGUE` holds what is known of a data
set. A record is a row as `Record.to_row` writes it; its images stay undecoded until the collator reads them.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from datasets import Dataset, Image, IterableDataset, List, Value

from alignvlm.data.catalogue import CATALOGUE, DataSet
from alignvlm.data.files import FOLDER, Rows, read_rows
from alignvlm.data.formats import CAPTION_COLUMNS, FORMATS, is_image_column, options_of, text_only, webdataset
from alignvlm.data.reader import TURNS, ImageTable, Reader, RowsWithoutImages, group_key, rows_without_images
from alignvlm.data.record import TRAIN_ON, BadRow, Conversation, Record
from alignvlm.data.streams import UNDECODED_RECORD, stream


MAX_BAD_ROWS_OF = 1000  # among fewer rows the share of bad ones says little


@dataclass
class Source:
    """The records of one source, made on demand: `len(source)`, `source[i]`, or, when streaming, iteration.

    Args:
        rows: as read, images undecoded.
        to_record: makes a record of the rows of one group and the record's name.
        groups: the rows of each record; None: one each.
        ids: the records' names; None: their indices.
        identity: what was read: the Hub's id and commit, or the files; goes into the run record.
        place: returns where the row of an index stands.
        bad_rows: what is wrong with the rows that were left out, each with its place.
        left_out: how many rows the recipe's options left out, or have a column `split` without a value.
        metric_of: returns the metric that judges answers to a conversation; None if none does.
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
        """Returns the rows of a record."""
        return [index] if self.groups is None else self.groups[index]

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def without_images(self) -> "Source":
        """Returns the source with `STAND_IN` in place of each image; its rows are read without them."""
        reader = self.to_record
        if isinstance(reader, Reader):
            reader = reader.without_images()
        return replace(self, rows=RowsWithoutImages(self.rows), to_record=reader)

    def with_other_turns(self) -> tuple[str, "Source"] | None:
        """Returns the other way to take turns (`whole` or `independent`), and this source with it; None for a source without that choice."""
        if not isinstance(self.to_record, Reader):
            return None
        (other,) = set(TURNS) - {self.to_record.turns}
        return other, replace(self, to_record=replace(self.to_record, turns=other))

    def conversations(self, keep_duplicates: bool = False) -> Iterator[list[Conversation]]:
        """Yields the conversations of each record, read without its images."""
        reader = self.to_record
        if not isinstance(reader, Reader):  # rows are records
            for row in self.rows.select_columns(["conversations"]):
                yield [Conversation(**fields) for fields in row["conversations"]]
            return
        reader = replace(reader.without_images(), keep_duplicates=keep_duplicates)
        rows = list(rows_without_images(self.rows))
        for index in range(len(self)):
            yield reader.merged([reader.of_row(rows[row]) for row in self.rows_of(index)]).conversations


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


OF_MIXTURES = ("share", "tag")  # arguments of a recipe's sources, which `load_mixture` reads
TEXTS = {
    "data": "a path or the id of a data set on the Hub, a number in quotes; of several, each is a source of its own",
    "split": "`train+val` joins two splits",
    "config": "a number stands in quotes; of several, each is a source of its own",
    "revision": "a number stands in quotes",
    "image_dir": "one folder, a number in quotes",
}  # the arguments that are texts, and what to write instead of another value


def read_source(
    arguments: dict,
    data_dir: str | Path = ".",
    streaming: bool = False,
    max_bad_rows: float | None = None,
    hash_all: bool = False,
) -> Source:
    """Reads one entry of a recipe's `sources`, and checks the texts of all its rows (of a stream: as they come).

    Args:
        arguments: `name` (of `CATALOGUE`; `local` if it is left out) and any of

            - `data`: a Hub id, or a local file or folder (from `data_dir`, unless absolute) of the same form;
            - `split` (default `train`; `a+b` joins two), `config` and `revision` of a Hub data set;
            - `image_dir`: where image paths start; by default the folder of the file that names them;
            - `limit`: at most this number of records, from the first;
            - `format`: the schema of the rows (of `FORMATS`), if their columns do not tell it;
            - `turns`: `whole` conversations (the default), or `independent`: each trained exchange a conversation of its own;
            - `train_on`: `last` or `all` turns of the assistant; by default all of a conversation's;
            - `keep_duplicates`: keep conversations that repeat for an image;
            - the options of the schema's function.
        streaming: read rows as they are needed (`datasets` streaming) instead of indexing them first.
        max_bad_rows: the share of rows that may be bad and are left out, of at least `MAX_BAD_ROWS_OF` rows; None: no row may be bad.
            A stream turns a bad row into a record without conversations whose `bad_row` says what is wrong.
        hash_all: put the SHA-256 of every local file into the identity.

    Raises:
        ValueError: for an unknown name or argument, missing columns or an empty split; the message lists what is valid. A row that
            cannot be used raises `BadRow`, which names its file, its number, the column and the value.
        FileNotFoundError: for data that is not on disk and has not the form of a Hub id.
    """
    options = dict(arguments)
    name = options.pop("name", "local")
    if not isinstance(name, str) or name not in CATALOGUE:
        raise ValueError(f"Unknown source {name!r}. Valid names: {', '.join(CATALOGUE)}.")
    kind = CATALOGUE[name]
    if kind.generate is not None:
        return _generated(name, kind, options, streaming)
    common = {key: options.pop(key, None) for key in COMMON}
    read = _schema(name, kind, common, options)
    data = common["data"] or kind.data
    if data is None:
        raise ValueError(f"Source {name!r} needs `data`: a local file or folder, or a data set of the Hub.")
    is_file = (Path(data_dir).expanduser() / Path(data).expanduser()).is_file()
    config = common["config"] or (None if is_file else kind.config)
    given = {"revision": common["revision"], "data_dir": data_dir}
    found = read_rows(
        data,
        common["split"] or "train",
        config,
        file=kind.file,
        folder_of_images=kind.image_folder,
        only_tars=kind.read is webdataset,
        text_alone=read is text_only,
        image_dir=common["image_dir"],
        streaming=streaming,
        hash_all=hash_all,
        keep_bad_lines=max_bad_rows is not None,
        **given,
    )
    # Columns tell a copy of the data set; texts of no certain form may be anybody's.
    if kind.licence != DataSet.licence and (kind.columns or data == kind.data):
        found.identity["licence"] = kind.licence
    images = None
    if kind.images is not None and "image" not in found.columns:
        if streaming:
            raise ValueError(
                f"Source {name!r} has its images in a config of their own, which a stream cannot look up."
            )
        before, after, column, key = kind.images
        table = read_rows(data, common["split"] or "train", config and config.replace(before, after), **given)
        index = {value: number for number, value in enumerate(table.rows[key])}
        images = ImageTable(table.rows.cast_column("image", Image(decode=False)), column, index)
    _check_columns(found, kind, name, data)
    found.rows = undecoded(found, data, kind.note)
    if kind.image_folder and not {"text", *CAPTION_COLUMNS} & set(found.columns):
        if "label" not in found.columns:
            raise ValueError(
                f"{data} is a folder of images that says nothing about them. Give each image a caption in a file metadata.jsonl beside "
                'the images, as {"file_name": "a.jpg", "text": "A cat."}, or put the images into one folder per label. '
                f"Columns found: {sorted(found.columns)}."
            )
        options["names"] = found.rows.features["label"].names
    reader = Reader(
        partial(read, **options),
        common["turns"] or "whole",
        common["train_on"],
        bool(common["keep_duplicates"]),
        found.folder,
        images,
        read is text_only,
    )
    if streaming:
        records = stream(found, reader, kind.group_by, common["limit"], max_bad_rows is not None)
        source = Source(records, _first, identity=found.identity)
    else:
        source = _indexed(found, reader, kind.group_by, common["limit"], max_bad_rows)
    source.metric_of = kind.metric_of
    return source


def _schema(name: str, kind: DataSet, common: dict, options: dict) -> Callable[..., Record | None]:
    """Checks all arguments and returns the function that reads a row.

    Raises:
        ValueError: for an argument that is not valid.
    """
    for key, remedy in TEXTS.items():
        if common[key] is not None and not isinstance(common[key], str | os.PathLike):
            raise ValueError(f"Source {name!r}: {key}={common[key]!r}. Expected a text: {remedy}.")
    keep = common["keep_duplicates"]
    if keep is not None and not isinstance(keep, bool):
        raise ValueError(f"Source {name!r}: keep_duplicates={keep!r}. Write true or false, without quotes.")
    for key, valid in (("format", tuple(FORMATS)), ("turns", TURNS), ("train_on", TRAIN_ON)):
        if common[key] is not None and common[key] not in valid:
            raise ValueError(f"Source {name!r}: {key}={common[key]!r}. Valid values: {', '.join(valid)}.")
    limit = common["limit"]
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"Source {name!r}: limit={limit!r}. Expected a number of records, 1 or more.")
    read = kind.read if common["format"] is None else FORMATS[common["format"]].read
    valid = options_of(read)
    _check_known(name, options, [*COMMON, *valid], given=valid)
    return read


def _check_known(name: str, options: dict, names: Iterable[str], given: Iterable[str]) -> None:
    """Raises a `ValueError` for options that are not `given`; `names` are all arguments that may stand beside them."""
    if not (unknown := sorted(set(options) - set(given))):
        return
    names = [*names, *OF_MIXTURES]
    nearest = [match for key in unknown for match in get_close_matches(str(key).replace("-", "_"), names, 1)]
    meant = f" Did you mean {' and '.join(nearest)}?" if nearest else ""
    raise ValueError(f"Source {name!r} does not know {unknown}.{meant} Its arguments: {', '.join(names)}.")


def _generated(name: str, kind: DataSet, options: dict, streaming: bool) -> Source:
    valid = inspect.signature(kind.generate).parameters
    _check_known(name, options, valid, given=valid)
    if missing := [key for key, p in valid.items() if p.default is p.empty and key not in options]:
        raise ValueError(f"Source {name!r} needs {', '.join(missing)}.")
    for key, value in options.items():
        lowest = 0 if key == "seed" else 1
        if valid[key].annotation is int and (type(value) is not int or value < lowest):
            raise ValueError(f"Source {name!r}: {key}={value!r}. Expected a whole number, {lowest} or more.")
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


def undecoded(found: Rows, data: str, note: str = "") -> Dataset | IterableDataset:
    """Returns the rows with images undecoded.

    Raises:
        ValueError: if there are only paths of images and no folder where they start.
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
    found: Rows, reader: Reader, group_by: str | None, limit: int | None, max_bad_rows: float | None
) -> Source:
    """Returns a source of records by index. Checks all texts without reading images that lie in the rows.

    Raises:
        BadRow: for a bad row, or for too many of them.
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
    source = Source(found.rows, reader, identity=found.identity, place=found.place)
    source.left_out = len(left_out) + found.left_out
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
    source[0]  # an image column that cannot be read fails now, not after an hour
    return source


def _unusable(rows: Dataset, reader: Reader) -> tuple[dict[int, str], set[int]]:
    """Returns, by row index, what is wrong with each bad row, and the rows that the options leave out."""
    reader = reader.without_images()
    bad: dict[int, str] = {}
    left_out: set[int] = set()
    for index, row in enumerate(rows_without_images(rows)):
        try:
            if reader.of_row(row) is None:
                left_out.add(index)
        except BadRow as error:
            bad[index] = str(error)
    return bad, left_out


def _groups(rows: Dataset, group_by: str, left_out: set[int]) -> dict[str, list[int]]:
    """Returns the rows of each record by its name, in the order of their first rows; rows without an image stay apart."""
    found: dict[str, list[int]] = {}
    columns = [name for name in rows.column_names if name in (group_by, "filepath", FOLDER) or is_image_column(name)]
    keyed = rows.select_columns(columns) if columns else [{}] * len(rows)
    for index, row in enumerate(keyed):
        if index not in left_out:
            key = group_key(row, group_by)
            found.setdefault(key or f"row {index}", []).append(index)
    return found
