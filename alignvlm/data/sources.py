"""The data sets a recipe can name, as records.

A record is `{"images": [...], "annotations": [{"prompt": str, "response": str, "kind": str}, ...]}`; its images stay undecoded
(`{"bytes", "path"}`) until the collator reads them. A source is a row of `SOURCES` and one function from rows of that schema to a
record; what is common to all (Hub or disk, splits, revisions, grouping, limits) is `read_source`.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import huggingface_hub
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset

from alignvlm.data import scenes
from alignvlm.data.rows import (
    CAPTION_COLUMNS,
    FILE_TYPES,
    BadRow,
    captions,
    entry,
    exchanges,
    hub_commit,
    is_hub_id,
    items,
    load_files,
    place_in_files,
    read_file,
    shown,
    text,
)
from hub_upload.run_record import sha256_of


CAPTION_PROMPT = "Write a short caption."
DETAILED_PROMPT = "Describe the picture in detail."
SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}  # what data sets call the same split
UNDECODED_RECORD = Features({**scenes.RECORD_FEATURES, "images": List(Image(decode=False))})
STREAMED_RECORD = Features({**UNDECODED_RECORD, "bad_row": Value("string")})
MAX_BAD_ROWS_OF = 1000  # below so many rows the share of bad ones says little


def _annotation(prompt: str, response: str, kind: str = "") -> dict[str, str]:
    return {"prompt": prompt, "response": response, "kind": kind}


def _images(row: dict, folder: Path | None) -> list[dict]:
    """The images of a row, whatever its columns call them; a path starts at `folder` and must stay below it."""
    if row.get("images") is not None:
        images = row["images"]
    elif row.get("image") is not None:
        images = [row["image"]]
    elif row.get("filename") is not None:  # Karpathy's split files
        images = [str(Path(row.get("filepath") or "") / row["filename"])]
    else:
        images = []
    found = []
    for image in images:
        if isinstance(image, str):
            image = {"bytes": None, "path": image, "folder": None if folder is None else str(folder)}
        if not isinstance(image, dict):
            raise BadRow(
                f"An image is {shown(image)} ({type(image).__name__}), neither a path nor the bytes of a picture."
            )
        found.append(image)
    return found


# Each of the following makes the annotations of one record of `rows`: all rows of one image where the table names a column to group
# by, else one. What it cannot use raises `BadRow`.


def caption_annotations(rows: list[dict], *, prompt: str = CAPTION_PROMPT) -> list[dict]:
    """Captions of an image, each answered to `prompt`: a list (of texts, or Karpathy's `{"raw": text}`), or one text."""
    if all(row.get(name) is None for row in rows for name in IMAGE):
        raise BadRow("A caption without an image: `image` is empty.")
    return [
        _annotation(prompt.strip(), caption, "short_caption")
        for row in rows
        for caption in captions(row, (*CAPTION_COLUMNS, "text"))
    ]


def conversation_annotations(rows: list[dict], *, prompt: str | None = None) -> list[dict]:
    """LLaVA's form, `conversations` of `{"from": "human", "gpt" or "system", "value"}`: each exchange an annotation of its own.

    `prompt` replaces the human's words, which in LLaVA-Pretrain are one of eleven ways to ask for a caption.
    """
    return [
        _annotation(prompt or asked.strip(), answered)
        for row in rows
        for asked, answered in exchanges(row["conversations"], "conversations", "from", "value", drop_image_token=True)
    ]


def turns_annotations(rows: list[dict]) -> list[dict]:
    """The Cauldron's form, `texts` of `{"user", "assistant", "source"}`: each turn an annotation of its own."""
    return [
        _annotation(
            text(entry(turn, "user", f"texts[{index}]"), f"texts[{index}].user", may_be_empty=True),
            text(entry(turn, "assistant", f"texts[{index}]"), f"texts[{index}].assistant"),
            _kind(turn.get("source"), f"texts[{index}].source"),
        )
        for row in rows
        for index, turn in enumerate(items(row["texts"], "texts"))
    ]


def question_annotations(rows: list[dict], *, instruction: str = "") -> list[dict]:
    """One question and answer per row; an exact repetition is taken once. `instruction` is put behind each question.

    The answer is `answer`, or VQAv2's `multiple_choice_answer`, the one most of its ten people gave.
    """
    pairs = {}
    for row in rows:
        answer = "multiple_choice_answer" if row.get("multiple_choice_answer") is not None else "answer"
        question = text(row.get("question"), "question")
        pairs[(f"{question} {instruction}".strip(), text(row.get(answer), answer))] = None
    return [_annotation(*pair) for pair in pairs]


def text_annotations(rows: list[dict]) -> list[dict]:
    """No image: a conversation (`messages`, of which the first exchange is taken, a system message before it), a `prompt` or
    `question` and a `completion`, `response` or `answer`, or plain `text`, which is trained without a chat template."""
    row = rows[0]
    if row.get("messages"):
        return [_annotation(*exchanges(row["messages"], "messages")[0])]
    columns = ("completion", "response", "answer", "text")
    present = [name for name in columns if row.get(name) is not None]
    name = next((name for name in present if row[name] != ""), next(iter(present), None))
    if name is None:
        raise BadRow(f"None of `messages`, {', '.join(f'`{name}`' for name in columns)} is filled.")
    asked = next((key for key in ("prompt", "question") if row.get(key) is not None), None)
    prompt = "" if asked is None else text(row[asked], asked, may_be_empty=True)
    return [_annotation(prompt, text(row[name], name))]


def local_annotations(rows: list[dict], *, prompt: str = CAPTION_PROMPT) -> list[dict]:
    """One's own data: `annotations` (`prompt`, `response`), `question` and `answer`, `texts`, `conversations`, or captions."""
    found = []
    for form, group in groupby(rows, key=_form):
        options = {"prompt": prompt} if form is caption_annotations else {}
        found += form(list(group), **options)
    return found


def _form(row: dict) -> Callable[..., list[dict]]:
    """How a row of one's own data is read, by its columns."""
    if row.get("annotations"):
        return record_annotations
    if row.get("question") is not None:
        return question_annotations
    if row.get("texts"):
        return turns_annotations
    if row.get("conversations"):
        return conversation_annotations
    if all(any(row.get(name) is not None for name in names) for names in (IMAGE, (*CAPTION_COLUMNS, "text"))):
        return caption_annotations
    raise BadRow(
        "The row has none of `annotations`, `question` and `answer`, `texts`, `conversations`, or an image with captions "
        f"({', '.join((*CAPTION_COLUMNS, 'text'))}); it has {sorted(name for name, value in row.items() if value is not None)}."
    )


def record_annotations(rows: list[dict]) -> list[dict]:
    """Rows that are records already: `annotations` of `{"prompt", "response", "kind"}`."""
    return [
        _annotation(
            text(entry(a, "prompt", f"annotations[{index}]"), f"annotations[{index}].prompt", may_be_empty=True),
            text(entry(a, "response", f"annotations[{index}]"), f"annotations[{index}].response"),
            _kind(a.get("kind"), f"annotations[{index}].kind"),
        )
        for row in rows
        for index, a in enumerate(items(row["annotations"], "annotations"))
    ]


def _kind(value: Any, column: str) -> str:
    return "" if value is None else text(value, column, may_be_empty=True)


def label_annotations(rows: list[dict], *, prompt: str = "", names: list[str] | None = None) -> list[dict]:
    """An `imagefolder`: captions from its metadata file (`text`, `caption`), else the name of each image's folder."""
    if names is None:
        return caption_annotations(rows, prompt=prompt or CAPTION_PROMPT)
    label = names[rows[0]["label"]].replace("_", " ")
    return [_annotation(prompt or "What does the picture show?", label, "label")]


@dataclass(frozen=True)
class SourceType:
    """A row of the table: how to read a kind of data, and what it is.

    Args:
        annotate: makes the annotations of a record from its rows; its keyword arguments may stand in a recipe.
        columns: what the rows must have (any of a tuple's names).
        data: the data set on the Hub; None: the recipe must name `data`.
        file: the file to read, where the Hub's repository is files rather than a data set of rows.
        group_by: the column whose equal values are one record.
        licence: as its page states it. The images often have terms of their own.
        note: what a user must know.
    """

    annotate: Callable[..., list[dict]]
    columns: tuple[str | tuple[str, ...], ...] = ()
    data: str | None = None
    file: str | None = None
    group_by: str | None = None
    licence: str = "unknown"
    note: str = ""


IMAGE = ("image", "images", "filename")
SOURCES: dict[str, SourceType] = {
    "llava_pretrain": SourceType(
        conversation_annotations,
        ("image", "conversations"),
        data="liuhaotian/LLaVA-Pretrain",
        file="blip_laion_cc_sbu_558k.json",
        licence="other: those of CC-3M and of BLIP",
        note="558k short BLIP captions. Download the repository, unpack images.zip, and name the folder as `image_dir`.",
    ),
    "sharegpt4v": SourceType(
        partial(conversation_annotations, prompt=DETAILED_PROMPT),
        ("image", "conversations"),
        data="Lin-Chen/ShareGPT4V",
        file="share-captioner_coco_lcs_sam_1246k_1107.json",
        licence="CC BY-NC 4.0",
        note="1.2M detailed captions by Share-Captioner; images of COCO, LLaVA-Pretrain and SAM below `image_dir`.",
    ),
    "coco_captions": SourceType(
        caption_annotations,
        ("filename", "sentences"),
        data="yerevann/coco-karpathy",
        licence="CC BY 4.0",
        note="Captions only; COCO's images below `image_dir`. Karpathy's training split is usually `train+restval`.",
    ),
    "flickr30k_captions": SourceType(
        caption_annotations,
        (IMAGE, ("original_alt_text", "alt_text", "sentences", "captions", "caption")),
        data="AnyModal/flickr30k",
        licence="non-commercial research",
    ),
    "cauldron": SourceType(
        turns_annotations,
        ("images", "texts"),
        data="HuggingFaceM4/the_cauldron",
        licence="by subset; prompts CC BY 4.0",
        note="Fifty data sets of one form; `config` names one, as vqav2 or ai2d.",
    ),
    "vqav2": SourceType(
        question_annotations,
        (IMAGE, "question", "multiple_choice_answer"),
        data="lmms-lab/VQAv2",
        group_by="image",
        licence="CC BY 4.0",
        note="Its labelled split on the Hub is `validation`; the training split is the_cauldron's `vqav2`.",
    ),
    "pathvqa": SourceType(
        question_annotations,
        (IMAGE, "question", "answer"),
        data="flaviagiammarino/path-vqa",
        group_by="image",
        licence="MIT",
        note="19,654 training questions about 2,599 images, without exact duplicates.",
    ),
    "text": SourceType(
        text_annotations,
        data="HuggingFaceTB/smol-smoltalk",
        licence="Apache-2.0",
        note="Also any other instructions or plain text.",
    ),
    "local": SourceType(
        local_annotations, group_by="image", note="A file or folder of jsonl, json or parquet with images beside it."
    ),
    "imagefolder": SourceType(
        label_annotations, ("image",), note="A folder of images with a metadata file, or one folder per label."
    ),
}
GENERATED: dict[str, Callable[..., Dataset]] = {"scenes": scenes.make_scenes, "scene_texts": scenes.make_texts}


@dataclass
class Source:
    """The records of one source, made when they are asked for: `len(source)`, `source[i]`, or, when streaming, iteration.

    Args:
        rows: as read, images undecoded.
        to_record: makes a record of the rows of one group.
        groups: the rows of each record; None: one each.
        identity: what was read: the Hub's id and commit, or the files; goes into the run record.
        bad_rows: what is wrong with the rows that were left out, each with its place.
    """

    rows: Dataset | IterableDataset
    to_record: Callable[[list[dict]], dict]
    groups: list[list[int]] | None = None
    identity: dict = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> dict:
        chosen = [index] if self.groups is None else self.groups[index]
        return self.to_record([self.rows[i] for i in chosen])

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def read_source(
    arguments: dict, data_dir: str | Path = ".", streaming: bool = False, max_bad_rows: float | None = None
) -> Source:
    """Reads what one entry of a recipe's `sources` names, and checks the texts of all its rows (of a stream: as they come).

    Args:
        arguments: `name` (of `SOURCES` or `GENERATED`) and any of

            - `data`: a Hub id, or a local file or folder (from `data_dir`, unless absolute) of the same form;
            - `split` (default `train`; `a+b` joins two), `config` and `revision` of a Hub data set;
            - `image_dir`: where image paths start; by default the folder of the file that names them;
            - `limit`: only the first so many records;
            - the keyword arguments of the source's function.
        streaming: read rows as they are needed (`datasets` streaming) instead of indexing them first.
        max_bad_rows: the share of rows that may be bad and are left out, of at least `MAX_BAD_ROWS_OF` rows; None: none may be.
            Those of a stream become records without annotations that say in `bad_row` what is wrong.

    Raises:
        ValueError: for an unknown name or argument, missing columns or an empty split; the message lists what is valid. A row that
            cannot be used is a `BadRow`, which names its file, its number, the column and the value.
        FileNotFoundError: for data that is neither on disk nor of the form of a Hub id.
    """
    options = dict(arguments)
    name = options.pop("name", None)
    if name not in SOURCES and name not in GENERATED:
        raise ValueError(f"Unknown source {name!r}. Valid names: {', '.join([*SOURCES, *GENERATED])}.")
    if name in GENERATED:
        return _generated(name, options, streaming)
    kind = SOURCES[name]
    common = {key: options.pop(key, None) for key in ("data", "split", "config", "revision", "image_dir", "limit")}
    valid = [
        key
        for key, p in inspect.signature(kind.annotate).parameters.items()
        if p.kind is p.KEYWORD_ONLY and key != "names"
    ]
    if unknown := set(options) - set(valid):
        raise ValueError(
            f"Source {name!r} does not know {sorted(unknown)}. Its arguments: {', '.join([*common, *valid])}."
        )
    data, split = common["data"] or kind.data, common["split"] or "train"
    if data is None:
        raise ValueError(f"Source {name!r} needs `data`: a local file or folder, or a data set of the Hub.")
    local = Path(data_dir) / data
    if local.exists():
        found = _local(local, split, common["config"], name == "imagefolder", streaming)
        folder = local if local.is_dir() else local.parent
    elif is_hub_id(data):
        found = _hub(data, split, common["config"], common["revision"], kind.file, streaming)
        folder = None
    else:
        raise FileNotFoundError(
            f"No such file or folder: {local}, and {data!r} is no Hub id. Paths start at data_dir={str(data_dir)!r}."
        )
    if kind.licence != SourceType.licence:
        found.identity["licence"] = kind.licence
    if common["image_dir"] is not None:
        folder = Path(data_dir) / common["image_dir"]
        if not folder.is_dir():
            raise FileNotFoundError(f"No such image_dir: {folder}. Paths start at data_dir={str(data_dir)!r}.")
    columns = _columns(found.rows)
    if not columns:
        raise ValueError(f"{data} has no rows of split {split!r}.")
    found.rows = _checked(found.rows, columns, kind, name, data, folder)
    if name == "imagefolder" and not any(column in columns for column in CAPTION_COLUMNS + ("text",)):
        if "label" not in columns:
            raise ValueError(
                f"{data} is a folder of images that says nothing about them. Give each image a caption in a file metadata.jsonl beside "
                'the images, as {"file_name": "a.jpg", "text": "A cat."}, or put the images into one folder per label. '
                f"Columns found: {sorted(columns)}."
            )
        options["names"] = found.rows.features["label"].names
    annotate = partial(kind.annotate, **options)
    to_record = partial(_record, annotate, folder)
    if streaming:
        return _streamed(found, to_record, kind.group_by is not None, common["limit"], max_bad_rows is not None)
    bad = _bad_rows(found.rows, to_record)
    if bad:
        message = found.place(next(iter(bad))) + ": " + next(iter(bad.values()))
        if max_bad_rows is None:
            raise BadRow(
                f"{message} (one of {len(bad)} bad rows of {len(found.rows)}; `on_bad_row: skip` leaves them out.)"
            )
        if len(bad) > max_bad_rows * max(len(found.rows), MAX_BAD_ROWS_OF) or len(bad) == len(found.rows):
            raise BadRow(
                f"{len(bad)} of {len(found.rows)} rows of {data} cannot be used, more than max_bad_rows={max_bad_rows:g}. The first: "
                f"{message}"
            )
    source = Source(found.rows, to_record, identity=found.identity)
    source.bad_rows = [f"{found.place(index)}: {problem}" for index, problem in bad.items()]
    if kind.group_by is not None and any(column in columns for column in IMAGE):
        source.groups = _groups(found.rows, bad)
    elif bad or common["limit"] is not None:
        source.groups = [[index] for index in range(len(found.rows)) if index not in bad]
    if common["limit"] is not None:
        source.groups = source.groups[: common["limit"]]
    source[0]  # an image column nobody can read is found here, not after an hour
    return source


def _record(annotate: Callable[[list[dict]], list[dict]], folder: Path | None, rows: list[dict]) -> dict:
    return {"images": _images(rows[0], folder), "annotations": annotate(rows)}


def _generated(name: str, options: dict, streaming: bool) -> Source:
    function = GENERATED[name]
    valid = inspect.signature(function).parameters
    if unknown := set(options) - set(valid):
        raise ValueError(f"Source {name!r} does not know {sorted(unknown)}. Its arguments: {', '.join(valid)}.")
    if missing := [key for key, p in valid.items() if p.default is p.empty and key not in options]:
        raise ValueError(f"Source {name!r} needs {', '.join(missing)}.")
    rows = function(**options).cast(UNDECODED_RECORD)
    return Source(rows.to_iterable_dataset() if streaming else rows, _first, identity={"generated": name, **options})


def _first(rows: list[dict]) -> dict:
    return rows[0]


@dataclass
class _Rows:
    """Rows as read, what they are, and where the row of an index stands."""

    rows: Dataset | IterableDataset
    identity: dict
    place: Callable[[int], str]


def _hub(data: str, split: str, config: str | None, revision: str | None, file: str | None, streaming: bool) -> _Rows:
    """Rows of a Hub data set at a commit that is stated, so that a run can be repeated."""
    if not huggingface_hub.constants.is_offline_mode():
        revision = hub_commit(data, revision)
    rows = load_dataset(
        data, config, data_files=file, split="train" if file else split, revision=revision, streaming=streaming
    )
    identity = {"data": data, "config": config, "split": split, "revision": revision, "file": file}
    return _Rows(rows, identity, partial(_numbered, f"{data}, split {split}"))


def _numbered(name: str, index: int) -> str:
    return f"{name}, row {index} (counted from 0)"


def _local(path: Path, split: str, config: str | None, is_image_folder: bool, streaming: bool) -> _Rows:
    """Rows of local files in any of the forms the Hub has them in."""
    if is_image_folder:
        named = [path / name for name in _names(split) if (path / name).is_dir()]
        rows = load_dataset("imagefolder", data_dir=str((named or [path])[0]), split="train", streaming=streaming)
        return _Rows(rows, {"data": path.name, "split": split}, partial(_numbered, path.name))
    files = [path] if path.is_file() else _files(path / config if config else path, split)
    if not files:
        raise ValueError(f"{path} holds no {split}-*.parquet, {split}.jsonl, *.json, *.jsonl, *.parquet or *.txt.")
    if files[0].suffix not in FILE_TYPES:
        raise ValueError(f"{files[0]}: expected a file of json, jsonl, parquet or txt.")
    place = place_in_files(files)
    if streaming:
        rows = IterableDataset.from_generator(_stream_files, gen_kwargs={"files": files, "splits": _names(split)})
        has_splits = any("split" in row for file in files for _, row in islice(read_file(file), 1))
    else:
        rows = load_files(files)
        if has_splits := "split" in rows.column_names:
            chosen = [i for i, value in enumerate(rows.data.column("split").to_pylist()) if value in _names(split)]
            rows, place = rows.select(chosen), partial(_place_of_chosen, place, chosen)
    named = files[0].name.startswith(tuple(name for part in split.split("+") for name in _names(part)))
    if path.is_dir() and not named and not has_splits and split != "train":
        raise ValueError(
            f"No file in {path} is named after the split {split!r} ({split}-*.parquet, {split}.jsonl), and its rows have no column "
            "`split` to choose by. Name the file itself to take all of its rows."
        )
    return _Rows(rows, {"data": path.name, "split": split, "files": [_file_identity(file) for file in files]}, place)


def _place_of_chosen(place: Callable[[int], str], chosen: list[int], index: int) -> str:
    return place(chosen[index])


def _stream_files(files: list[Path], splits: tuple[str, ...]) -> Iterator[dict]:
    """Each row of the split and its place; `files` are the shards."""
    for file in files:
        for place, row in read_file(file):
            if "split" not in row or row["split"] in splits:
                yield {"row": row, "place": place}


def _columns(rows: Dataset | IterableDataset) -> list[str]:
    """The columns of the rows (of a stream of files: those of its first row); none if there is no row."""
    if isinstance(rows, Dataset):
        return rows.column_names if len(rows) else []
    if rows.column_names is not None:
        return rows.column_names
    first = next(iter(rows), {})
    return list(first.get("row", first))


def _names(split: str) -> tuple[str, ...]:
    return tuple(name for part in split.split("+") for name in SPLIT_NAMES.get(part, (part,)))


def _files(folder: Path, split: str) -> list[Path]:
    patterns = [f"**/{name}{rest}" for name in _names(split) for rest in (".parquet", "-*.parquet", ".jsonl", ".json")]
    if named := sorted(file for pattern in patterns for file in folder.glob(pattern)):
        return [file for file in named if file.suffix == named[0].suffix]
    for pattern in ("dataset_*.json", "**/*.parquet", "*.jsonl", "*.json", "*.txt"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _file_identity(file: Path) -> dict:
    """Name and bytes, and the SHA-256 but of parquet files, which hold the images."""
    identity = {"name": file.name, "bytes": file.stat().st_size}
    return identity if file.suffix == ".parquet" else {**identity, "sha256": sha256_of([file])}


def _checked(rows, columns: list[str], kind: SourceType, name: str, data: str, folder: Path | None):
    """Rows with the columns the source needs, images undecoded, and a folder where their paths start."""
    for needed in kind.columns:
        alternatives = needed if isinstance(needed, tuple) else (needed,)
        if not set(alternatives) & set(columns):
            raise ValueError(
                f"Source {name!r} needs a column {' or '.join(alternatives)}; {data} has {sorted(columns)}."
            )
    features = rows.features or {}
    for column, feature in features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(column, List(Image(decode=False)))
    paths = [
        c
        for c in IMAGE
        if isinstance(features.get(c), Value)
        or (isinstance(features.get(c), List) and isinstance(features[c].feature, Value))
    ]
    if paths and folder is None:
        raise ValueError(
            f"{data} holds no images, only their paths (column {paths[0]}): download them and name their folder as `image_dir`. {kind.note}"
        )
    return rows


def _bad_rows(rows: Dataset, to_record: Callable[[list[dict]], dict]) -> dict[int, str]:
    """What is wrong with each row that makes no record, by its index. Images that lie in the rows are not read for this."""
    embedded = [name for name in IMAGE if _holds_images(rows.features.get(name))]
    empty = [name for name in embedded if rows.data.column(name).null_count]
    checked = rows.select_columns([name for name in rows.features if name not in embedded or name in empty])
    bad: dict[int, str] = {}
    index = 0
    for batch in checked.iter(batch_size=1000):
        for values in zip(*batch.values()):
            row = {name: {} for name in embedded} | dict(zip(batch, values))  # an empty mapping stands for an image
            try:
                to_record([row])
            except BadRow as error:
                bad[index] = str(error)
            index += 1
    return bad


def _holds_images(feature: Any) -> bool:
    """Whether the values of a column are the bytes of images, or lists of such."""
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def _image_key(row: dict) -> str:
    """The same for rows of the same image: its path, or the hash of its bytes."""
    keys = []
    for image in _images(row, None):
        content = image.get("bytes")
        keys.append(image["path"] if content is None else hashlib.sha256(content).hexdigest())
    return json.dumps(keys)


def _groups(rows: Dataset, left_out: dict[int, str]) -> list[list[int]]:
    """The rows of each image, images in the order they first appear; rows without one stay apart."""
    found: dict[str, list[int]] = {}
    columns = [column for column in (*IMAGE, "filepath") if column in rows.column_names]
    for index, row in enumerate(rows.select_columns(columns)):
        if index not in left_out:
            key = _image_key(row)
            found.setdefault(key if key != "[]" else f"row {index}", []).append(index)
    return list(found.values())


def _streamed(
    found: _Rows, to_record: Callable[[list[dict]], dict], grouped: bool, limit: int | None, skip_bad_rows: bool
) -> Source:
    """Records as a stream; rows of one image become one record where they follow each other, as they do in these data sets."""
    rows = found.rows
    if rows.column_names is not None:  # not of files
        rows = rows.map(partial(_unnumbered, found.identity["data"]), remove_columns=rows.column_names)
    mapped = rows.map(
        partial(_records_of_batch, to_record, grouped, skip_bad_rows),
        batched=True,
        batch_size=256 if grouped else 16,
        remove_columns=["row", "place"],
        features=STREAMED_RECORD,
    )
    return Source(mapped if limit is None else mapped.take(limit), _first, identity=found.identity)


def _unnumbered(name: str, row: dict) -> dict:
    """A row of a stream that does not say which one it is: several readers take turns at it."""
    return {"row": row, "place": name}


def _records_of_batch(
    to_record: Callable[[list[dict]], dict], grouped: bool, skip_bad_rows: bool, batch: dict[str, list]
) -> dict[str, list]:
    """The records of some rows, and in their places those that say what is wrong with a row."""
    groups: list[list[dict]] = []
    records: list[dict] = []
    previous = None
    for row, place in zip(batch["row"], batch["place"]):
        try:
            to_record([row])
        except BadRow as error:
            if not skip_bad_rows:
                raise error.at(place) from error
            records.append({"images": [], "annotations": [], "bad_row": str(error.at(place))})
            continue
        key = _image_key(row) if grouped else None
        if key is not None and key != "[]" and key == previous:
            groups[-1].append(row)
        else:
            groups.append([row])
        previous = key
    for group in groups:
        record = to_record(group)
        records.append({**record, "images": [_joined(image) for image in record["images"]], "bad_row": None})
    return {name: [record[name] for record in records] for name in STREAMED_RECORD}


def _joined(image: dict) -> dict:
    """`{"bytes", "path"}`, the path joined to its folder."""
    from alignvlm.data.images import inside

    path = image.get("path")
    if image.get("folder") is not None:
        path = inside(image["folder"], path)
    return {"bytes": image.get("bytes"), "path": path}
