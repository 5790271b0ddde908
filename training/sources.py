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
from pathlib import Path

import huggingface_hub
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset

from evaluation.tasks import file_hash
from training import scenes


CAPTION_PROMPT = "Write a short caption."
DETAILED_PROMPT = "Describe the picture in detail."
CAPTION_COLUMNS = ("captions", "sentences", "original_alt_text", "alt_text", "caption", "text")
SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}  # what data sets call the same split
UNDECODED_RECORD = Features({**scenes.RECORD_FEATURES, "images": List(Image(decode=False))})


def _annotation(prompt: str, response: str, kind: str = "") -> dict[str, str]:
    return {"prompt": prompt.strip(), "response": response.strip(), "kind": kind}


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
        found.append(image)
    return found


# Each of the following makes one record of `rows`: all rows of one image where the table names a column to group by, else one.


def caption_record(rows: list[dict], folder: Path | None, *, prompt: str = CAPTION_PROMPT) -> dict:
    """Captions of an image, each answered to `prompt`: a list (of texts, or Karpathy's `{"raw": text}`), or one text."""
    row = rows[0]
    captions = next(row[name] for name in CAPTION_COLUMNS if row.get(name))
    captions = [captions] if isinstance(captions, str) else captions
    texts = [caption["raw"] if isinstance(caption, dict) else caption for caption in captions]
    return {
        "images": _images(row, folder),
        "annotations": [_annotation(prompt, text, "short_caption") for text in texts],
    }


def conversation_record(rows: list[dict], folder: Path | None, *, prompt: str | None = None) -> dict:
    """LLaVA's form, `conversations` of `{"from": "human" or "gpt", "value"}`: each exchange an annotation of its own.

    `prompt` replaces the human's words, which in LLaVA-Pretrain are one of eleven ways to ask for a caption.
    """
    annotations = []
    for asked, answered in zip(rows[0]["conversations"][::2], rows[0]["conversations"][1::2]):
        question = prompt or asked["value"].replace("<image>", "")
        annotations.append(_annotation(question, answered["value"]))
    return {"images": _images(rows[0], folder), "annotations": annotations}


def turns_record(rows: list[dict], folder: Path | None) -> dict:
    """The Cauldron's form, `texts` of `{"user", "assistant", "source"}`: each turn an annotation of its own."""
    annotations = [_annotation(turn["user"], turn["assistant"], turn.get("source") or "") for turn in rows[0]["texts"]]
    return {"images": _images(rows[0], folder), "annotations": annotations}


def question_record(rows: list[dict], folder: Path | None, *, instruction: str = "") -> dict:
    """One question and answer per row; an exact repetition is taken once. `instruction` is put behind each question.

    The answer is `answer`, or VQAv2's `multiple_choice_answer`, the one most of its ten people gave.
    """
    pairs = dict.fromkeys(
        (
            f"{row['question'].strip()} {instruction}",
            row["multiple_choice_answer"] if "multiple_choice_answer" in row else row["answer"],
        )
        for row in rows
    )
    return {"images": _images(rows[0], folder), "annotations": [_annotation(*pair) for pair in pairs]}


def text_record(rows: list[dict], folder: Path | None) -> dict:
    """No image: a conversation (`messages`, of which the first exchange is taken, a system message before it), a `prompt` or
    `question` and a `completion`, `response` or `answer`, or plain `text`, which is trained without a chat template."""
    row = rows[0]
    if row.get("messages"):
        said = {
            role: [m["content"] for m in row["messages"] if m["role"] == role][:1]
            for role in ("system", "user", "assistant")
        }
        if not said["user"] or not said["assistant"]:
            raise ValueError(f"A conversation without a user's and an assistant's message: {row['messages']}")
        return {
            "images": [],
            "annotations": [_annotation("\n".join(said["system"] + said["user"]), said["assistant"][0])],
        }
    response = next((row[name] for name in ("completion", "response", "answer", "text") if row.get(name)), None)
    if response is None:
        raise ValueError(
            f"A text row has none of `messages`, `completion`, `response`, `answer`, `text`: {sorted(row)}."
        )
    prompt = next((row[name] for name in ("prompt", "question") if row.get(name)), "")
    return {"images": [], "annotations": [_annotation(prompt, response)]}


def local_record(rows: list[dict], folder: Path | None, *, prompt: str = CAPTION_PROMPT) -> dict:
    """One's own data: `annotations` (`prompt`, `response`), `question` and `answer`, `texts`, `conversations`, or captions."""
    row = rows[0]
    if row.get("annotations"):
        annotations = [
            _annotation(a["prompt"], a["response"], a.get("kind") or "") for r in rows for a in r["annotations"]
        ]
        return {"images": _images(row, folder), "annotations": annotations}
    if row.get("question") and (row.get("answer") is not None or row.get("multiple_choice_answer") is not None):
        return question_record(rows, folder)
    if row.get("texts"):
        return turns_record(rows, folder)
    if row.get("conversations"):
        return conversation_record(rows, folder)
    if any(row.get(name) for name in CAPTION_COLUMNS) and _images(row, folder):
        records = [caption_record([r], folder, prompt=prompt) for r in rows]
        return {"images": records[0]["images"], "annotations": [a for r in records for a in r["annotations"]]}
    raise ValueError(
        "A row has none of `annotations`, `question` and `answer`, `texts`, `conversations`, or an image with captions "
        f"({', '.join(CAPTION_COLUMNS)}); it has {sorted(name for name, value in row.items() if value is not None)}."
    )


def label_record(rows: list[dict], folder: Path | None, *, prompt: str = "", names: list[str] | None = None) -> dict:
    """An `imagefolder`: captions from its metadata file (`text`, `caption`), else the name of each image's folder."""
    if names is None:
        return caption_record(rows, folder, prompt=prompt or CAPTION_PROMPT)
    label = names[rows[0]["label"]].replace("_", " ")
    return {
        "images": _images(rows[0], folder),
        "annotations": [_annotation(prompt or "What does the picture show?", label, "label")],
    }


@dataclass(frozen=True)
class SourceType:
    """A row of the table: how to read a kind of data, and what it is.

    Args:
        record: makes a record of rows; its keyword arguments may stand in a recipe.
        columns: what the rows must have (any of a tuple's names).
        data: the data set on the Hub; None: the recipe must name `data`.
        file: the file to read, where the Hub's repository is files rather than a data set of rows.
        group_by: the column whose equal values are one record.
        licence: as its page states it. The images often have terms of their own.
        note: what a user must know.
    """

    record: Callable[..., dict]
    columns: tuple[str | tuple[str, ...], ...] = ()
    data: str | None = None
    file: str | None = None
    group_by: str | None = None
    licence: str = "unknown"
    note: str = ""


IMAGE = ("image", "images", "filename")
SOURCES: dict[str, SourceType] = {
    "llava_pretrain": SourceType(
        conversation_record,
        ("image", "conversations"),
        data="liuhaotian/LLaVA-Pretrain",
        file="blip_laion_cc_sbu_558k.json",
        licence="other: those of CC-3M and of BLIP",
        note="558k short BLIP captions. Download the repository, unpack images.zip, and name the folder as `image_dir`.",
    ),
    "sharegpt4v": SourceType(
        partial(conversation_record, prompt=DETAILED_PROMPT),
        ("image", "conversations"),
        data="Lin-Chen/ShareGPT4V",
        file="share-captioner_coco_lcs_sam_1246k_1107.json",
        licence="CC BY-NC 4.0",
        note="1.2M detailed captions by Share-Captioner; images of COCO, LLaVA-Pretrain and SAM below `image_dir`.",
    ),
    "coco_captions": SourceType(
        caption_record,
        ("filename", "sentences"),
        data="yerevann/coco-karpathy",
        licence="CC BY 4.0",
        note="Captions only; COCO's images below `image_dir`. Karpathy's training split is usually `train+restval`.",
    ),
    "flickr30k_captions": SourceType(
        caption_record,
        (IMAGE, ("original_alt_text", "alt_text", "sentences", "captions", "caption")),
        data="AnyModal/flickr30k",
        licence="non-commercial research",
    ),
    "cauldron": SourceType(
        turns_record,
        ("images", "texts"),
        data="HuggingFaceM4/the_cauldron",
        licence="by subset; prompts CC BY 4.0",
        note="Fifty data sets of one form; `config` names one, as vqav2 or ai2d.",
    ),
    "vqav2": SourceType(
        question_record,
        (IMAGE, "question", "multiple_choice_answer"),
        data="lmms-lab/VQAv2",
        group_by="image",
        licence="CC BY 4.0",
        note="Its labelled split on the Hub is `validation`; the training split is the_cauldron's `vqav2`.",
    ),
    "pathvqa": SourceType(
        question_record,
        (IMAGE, "question", "answer"),
        data="flaviagiammarino/path-vqa",
        group_by="image",
        licence="MIT",
        note="19,654 training questions about 2,599 images, without exact duplicates.",
    ),
    "text": SourceType(
        text_record,
        data="HuggingFaceTB/smol-smoltalk",
        licence="Apache-2.0",
        note="Also any other instructions or plain text.",
    ),
    "local": SourceType(
        local_record, group_by="image", note="A file or folder of jsonl, json or parquet with images beside it."
    ),
    "imagefolder": SourceType(
        label_record, ("image",), note="A folder of images with a metadata file, or one folder per label."
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
    """

    rows: Dataset | IterableDataset
    to_record: Callable[[list[dict]], dict]
    groups: list[list[int]] | None = None
    identity: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> dict:
        chosen = [index] if self.groups is None else self.groups[index]
        return self.to_record([self.rows[i] for i in chosen])

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def read_source(arguments: dict, data_dir: str | Path = ".", streaming: bool = False) -> Source:
    """Reads what one entry of a recipe's `sources` names.

    Args:
        arguments: `name` (of `SOURCES` or `GENERATED`) and any of

            - `data`: a Hub id, or a local file or folder (from `data_dir`, unless absolute) of the same form;
            - `split` (default `train`; `a+b` joins two), `config` and `revision` of a Hub data set;
            - `image_dir`: where image paths start; by default the folder of the file that names them;
            - `limit`: only the first so many records;
            - the keyword arguments of the source's function.
        streaming: read rows as they are needed (`datasets` streaming) instead of indexing them first.

    Raises:
        ValueError: for an unknown name or argument, missing columns or an empty split; the message lists what is valid.
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
        for key, p in inspect.signature(kind.record).parameters.items()
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
        rows, identity = _local(local, split, common["config"], name == "imagefolder", streaming)
        folder = local if local.is_dir() else local.parent
    elif data.count("/") == 1 and not Path(data).suffix and not str(data).startswith((".", "/")):
        rows, identity = _hub(data, split, common["config"], common["revision"], kind.file, streaming)
        folder = None
    else:
        raise FileNotFoundError(
            f"No such file or folder: {local}, and {data!r} is no Hub id. Paths start at data_dir={str(data_dir)!r}."
        )
    if kind.licence != SourceType.licence:
        identity["licence"] = kind.licence
    if common["image_dir"] is not None:
        folder = Path(data_dir) / common["image_dir"]
        if not folder.is_dir():
            raise FileNotFoundError(f"No such image_dir: {folder}. Paths start at data_dir={str(data_dir)!r}.")
    rows = _checked(rows, kind, name, data, folder)
    if name == "imagefolder" and not any(column in rows.features for column in CAPTION_COLUMNS):
        options["names"] = rows.features["label"].names
    source = Source(rows, partial(kind.record, folder=folder, **options), identity=identity)
    if streaming:
        return _streamed(source, kind.group_by, common["limit"])
    if len(rows) == 0:
        raise ValueError(f"{data} has no rows of split {split!r}.")
    if kind.group_by is not None and any(column in rows.column_names for column in IMAGE):
        source.groups = _groups(rows)
    if common["limit"] is not None:
        source.groups = [[i] for i in range(len(rows))] if source.groups is None else source.groups
        source.groups = source.groups[: common["limit"]]
    source[0]  # a schema nobody can read is found here, not after an hour
    return source


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


def _hub(data: str, split: str, config: str | None, revision: str | None, file: str | None, streaming: bool):
    """Rows of a Hub data set at a commit that is stated, so that a run can be repeated."""
    if not huggingface_hub.constants.is_offline_mode():
        revision = huggingface_hub.HfApi().dataset_info(data, revision=revision).sha
    rows = load_dataset(
        data, config, data_files=file, split="train" if file else split, revision=revision, streaming=streaming
    )
    return rows, {"data": data, "config": config, "split": split, "revision": revision, "file": file}


def _local(path: Path, split: str, config: str | None, is_image_folder: bool, streaming: bool):
    """Rows of local files in any of the forms the Hub has them in."""
    if is_image_folder:
        named = [path / name for name in _names(split) if (path / name).is_dir()]
        rows = load_dataset("imagefolder", data_dir=str((named or [path])[0]), split="train", streaming=streaming)
        return rows, {"data": path.name, "split": split}
    files = [path] if path.is_file() else _files(path / config if config else path, split)
    if not files:
        raise ValueError(f"{path} holds no {split}-*.parquet, {split}.jsonl, *.json, *.jsonl, *.parquet or *.txt.")
    suffix = files[0].suffix
    if suffix not in (".json", ".jsonl", ".parquet", ".txt"):
        raise ValueError(f"{files[0]}: expected a file of json, jsonl, parquet or txt.")
    options = {"sample_by": "paragraph"} if suffix == ".txt" else {}
    if suffix == ".json" and _is_karpathy(files[0]):
        options["field"] = "images"
    rows = load_dataset(
        {".parquet": "parquet", ".txt": "text"}.get(suffix, "json"),
        data_files=[str(file) for file in files],
        split="train",
        streaming=streaming,
        **options,
    )
    named = files[0].name.startswith(tuple(name for part in split.split("+") for name in _names(part)))
    if "split" in _columns(rows):
        rows = rows.filter(partial(_is_in, _names(split)), input_columns="split")
    elif path.is_dir() and not named and split != "train":
        raise ValueError(
            f"No file in {path} is named after the split {split!r} ({split}-*.parquet, {split}.jsonl), and its rows have no column "
            "`split` to choose by. Name the file itself to take all of its rows."
        )
    return rows, {"data": path.name, "split": split, "files": [_file_identity(file) for file in files]}


def _columns(rows: Dataset | IterableDataset) -> list[str]:
    return rows.column_names if rows.column_names is not None else list(next(iter(rows)))


def _is_in(names: tuple[str, ...], value: str) -> bool:
    return value in names


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


def _is_karpathy(file: Path) -> bool:
    """Whether a json file is Karpathy's `{"images": [...], "dataset": ...}` rather than a list of rows."""
    with file.open() as stream:
        return stream.read(64).lstrip().startswith("{") and file.name.startswith("dataset_")


def _file_identity(file: Path) -> dict:
    """Name and bytes, and the SHA-256 but of parquet files, which hold the images."""
    identity = {"name": file.name, "bytes": file.stat().st_size}
    return identity if file.suffix == ".parquet" else {**identity, "sha256": file_hash([file])}


def _checked(rows, kind: SourceType, name: str, data: str, folder: Path | None):
    """Rows with the columns the source needs, images undecoded, and a folder where their paths start."""
    columns = _columns(rows)
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


def _image_key(row: dict) -> str:
    """The same for rows of the same image: its path, or the hash of its bytes."""
    keys = []
    for image in _images(row, None):
        content = image.get("bytes")
        keys.append(image["path"] if content is None else hashlib.sha256(content).hexdigest())
    return json.dumps(keys)


def _groups(rows: Dataset) -> list[list[int]]:
    """The rows of each image, images in the order they first appear; rows without one stay apart."""
    found: dict[str, list[int]] = {}
    columns = [column for column in (*IMAGE, "filepath") if column in rows.column_names]
    for index, row in enumerate(rows.select_columns(columns)):
        key = _image_key(row)
        found.setdefault(key if key != "[]" else f"row {index}", []).append(index)
    return list(found.values())


def _streamed(source: Source, group_by: str | None, limit: int | None) -> Source:
    """Records as a stream; rows of one image become one record where they follow each other, as they do in these data sets."""
    mapped = source.rows.map(
        partial(_records_of_batch, source.to_record, group_by is not None),
        batched=True,
        batch_size=256 if group_by else 16,
        remove_columns=_columns(source.rows),
        features=UNDECODED_RECORD,
    )
    return Source(mapped if limit is None else mapped.take(limit), _first, identity=source.identity)


def _records_of_batch(
    to_record: Callable[[list[dict]], dict], grouped: bool, batch: dict[str, list]
) -> dict[str, list]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    groups: list[list[dict]] = []
    previous = None
    for row in rows:
        key = _image_key(row) if grouped else None
        if key is not None and key != "[]" and key == previous:
            groups[-1].append(row)
        else:
            groups.append([row])
        previous = key
    records = [to_record(group) for group in groups]
    for record in records:
        record["images"] = [_joined(image) for image in record["images"]]
    return {name: [record[name] for record in records] for name in ("images", "annotations")}


def _joined(image: dict) -> dict:
    """`{"bytes", "path"}`, the path joined to its folder."""
    from training.images import inside

    path = image.get("path")
    if image.get("folder") is not None:
        path = inside(image["folder"], path)
    return {"bytes": image.get("bytes"), "path": path}
