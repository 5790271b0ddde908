"""What a model is asked: data sets on the Hub, or files of the same form on disk, as questions with reference answers.

A task is one function that turns the rows of a data set into records (an image and its questions); adding one is that function and
a row of `TASKS`.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, Value, load_dataset
from PIL import Image as PILImage

from alignvlm.data.images import BadImage, read_image
from alignvlm.data.rows import (
    CAPTION_COLUMNS,
    ON_BAD_ROW,
    BadRow,
    captions,
    entry,
    hub_commit,
    is_hub_id,
    items,
    load_files,
    place_in_files,
    text,
)
from hub_upload.run_record import sha256_of


CAPTION_PROMPT = "Write a short caption."
# What data sets call the same split.
SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}


@dataclass
class Question:
    """One prompt about an image, its reference answers, and the metric that judges: `cider` or `pathvqa_accuracy`."""

    prompt: str
    references: list[str]
    metric: str


@dataclass
class Record:
    """One image, by its row in `EvaluationSet.rows`, and all that is asked about it."""

    id: str
    row: int
    questions: list[Question]


@dataclass
class EvaluationSet:
    """The records of a task, the rows that hold their images (column `image`, undecoded), and where it all comes from."""

    records: list[Record]
    rows: Dataset
    source: dict
    notes: dict = field(default_factory=dict)

    def images(self, records: list[Record]) -> list[PILImage.Image]:
        """The records' images in RGB, upright."""
        return [read_image(self.rows[record.row]["image"]) for record in records]


@dataclass
class BadRows:
    """What is done with rows that cannot be used: the first raises, or each is left out and noted.

    Args:
        on_bad_row: `raise` or `skip`.
        place: where the row of an index stands.
    """

    on_bad_row: str
    place: Callable[[int], str]
    found: dict[int, str] = field(default_factory=dict)

    def use(self, index: int, make: Callable[[], Any]) -> Any:
        """What `make` makes of the row; None if it has to be left out.

        Raises:
            BadRow: with the row's place, if that is asked for.
        """
        try:
            return make()
        except (BadRow, BadImage) as error:
            if self.on_bad_row == "raise":
                raise BadRow(
                    f"{self.place(index)}: {error} Mend it, or leave such rows out with --on_bad_row skip."
                ) from error
            self.found[index] = f"{self.place(index)}: {error}"
            return None

    def notes(self) -> dict:
        """How many were left out, and up to a thousand of them by name."""
        if not self.found:
            return {}
        return {
            "bad_rows": len(self.found),
            "bad_row_list": [self.found[index] for index in sorted(self.found)][:1000],
        }


def load_task(
    task: str,
    split: str,
    data: str | None = None,
    revision: str | None = None,
    image_dir: str | None = None,
    prompt: str = CAPTION_PROMPT,
    keep_duplicates: bool = False,
    limit: int | None = None,
    on_bad_row: str = "raise",
) -> EvaluationSet:
    """Loads a task's records.

    Args:
        task: one of `TASKS`.
        split: the data set's split, in Karpathy's naming for captions (`test`, `val`, `train`).
        data: a Hub data set, or a local folder or file of parquet, jsonl or Karpathy's `dataset_*.json`. Each task has a default.
        revision: of a Hub data set.
        image_dir: where image paths in the data start; the data's own folder by default.
        prompt: what captions are asked for with.
        keep_duplicates: whether exact duplicates (image, question and answer) are asked again.
        limit: the first so many images.
        on_bad_row: what a row does whose texts cannot be used or whose image cannot be read: `raise`, or `skip` it. All are tried here, so
            that none is found when most answers are written; what is skipped stands in the notes.

    Raises:
        ValueError: for an unknown task, missing columns, or a split with no rows. A row that cannot be used is a `BadRow`, which names
            its file, its number, and what is wrong.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. Valid tasks: {', '.join(TASKS)}.")
    to_records, default_data = TASKS[task]
    data = data or default_data
    if data is None:
        raise ValueError(f"The task {task!r} needs data: a local folder or file, or a data set of the Hub.")
    rows, source, folder, place = read_rows(data, split, revision)
    rows = _with_images(rows, Path(image_dir) if image_dir else folder, data)
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row={on_bad_row!r}. Valid values: {', '.join(ON_BAD_ROW)}.")
    bad = BadRows(on_bad_row, place)
    records, notes = to_records(rows, prompt, keep_duplicates, bad)
    records = _readable(records, rows, bad, limit)
    if not records:
        raise BadRow(
            f"None of the {len(rows)} rows of {data} can be used. The first: {bad.notes()['bad_row_list'][0]}"
        )
    notes["images"] = len(records)
    notes["questions"] = sum(len(record.questions) for record in records)
    notes["references"] = sum(len(q.references) for record in records for q in record.questions)
    return EvaluationSet(records, rows, source, {**notes, **bad.notes()})


def _readable(records: list[Record], rows: Dataset, bad: BadRows, limit: int | None) -> list[Record]:
    """The first records, at most `limit`, whose images can be decoded."""
    readable: list[Record] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(records), 256):
            chosen = records[start : start + 256]
            images = [rows[record.row]["image"] for record in chosen]
            for record, problem in zip(chosen, pool.map(_problem, images)):
                if len(readable) == limit:
                    return readable
                if bad.use(record.row, partial(_raise_or_pass, problem)):
                    readable.append(record)
    return readable


def _problem(image: dict) -> BadImage | None:
    try:
        read_image(image)
    except BadImage as error:
        return error
    return None


def _raise_or_pass(problem: BadImage | None) -> bool:
    if problem is not None:
        raise problem
    return True


def read_rows(
    data: str, split: str, revision: str | None = None
) -> tuple[Dataset, dict, Path | None, Callable[[int], str]]:
    """The rows of one split, the data's identity (its Hub commit, or the hash of its files), its folder if it is local, and a function
    that tells where the row of an index stands.

    Raises:
        FileNotFoundError: for data that is neither on disk nor of the form of a Hub id.
    """
    if Path(data).exists():
        rows, files = _read_files(Path(data), split)
        folder = Path(data) if Path(data).is_dir() else Path(data).parent
        source = {"data": Path(data).name, "split": split, "sha256": sha256_of(files)}
        place = place_in_files(files)
    elif not is_hub_id(data):
        raise FileNotFoundError(
            f"No such file or folder: {data} (looked for in {Path.cwd()}), and it is no data set of the Hub, user/name."
        )
    else:
        commit = hub_commit(data, revision)
        rows = load_dataset(data, split=split, revision=commit)
        folder = None
        source = {"data": data, "split": split, "revision": commit}
        place = partial(_place_on_hub, data, split)
    if "split" in rows.column_names:
        chosen = [i for i, value in enumerate(rows.data.column("split").to_pylist()) if value in _names(split)]
        rows, place = rows.select(chosen), partial(_place_of_chosen, place, chosen)
    if len(rows) == 0:
        raise ValueError(f"{data} has no rows of split {split!r}.")
    return rows, source, folder, place


def _place_on_hub(data: str, split: str, index: int) -> str:
    return f"{data}, split {split}, row {index} (counted from 0)"


def _place_of_chosen(place: Callable[[int], str], chosen: list[int], index: int) -> str:
    return place(chosen[index])


def _read_files(path: Path, split: str) -> tuple[Dataset, list[Path]]:
    if path.is_file():
        files = [path]
    else:
        patterns = [f"**/{name}{rest}" for name in _names(split) for rest in (".parquet", "-*.parquet", ".jsonl")]
        files = [file for pattern in patterns for file in sorted(path.glob(pattern))]
        for pattern in ("dataset_*.json", "**/*.parquet", "*.jsonl"):  # of all splits: told apart by their column
            files = files or sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"{path} holds no {split}-*.parquet, {split}.jsonl or Karpathy's dataset_*.json.")
    files = [file for file in files if file.suffix == files[0].suffix]
    rows = load_files(files)
    if path.is_dir() and not files[0].name.startswith(_names(split)) and "split" not in rows.column_names:
        raise ValueError(
            f"No file in {path} is named after the split {split!r} ({split}-*.parquet, {split}.jsonl), and its rows have no column "
            "`split` to choose by. Name the file itself to take all of its rows."
        )
    return rows, files


def _names(split: str) -> tuple[str, ...]:
    return SPLIT_NAMES.get(split, (split,))


def _with_images(rows: Dataset, folder: Path | None, data: str) -> Dataset:
    """Makes `image` an image column: from paths, from Karpathy's file names, or from a list of one image."""
    if "images" in rows.column_names and "image" not in rows.column_names:
        rows = rows.cast_column("images", [Image(decode=False)])
        rows = rows.map(
            lambda images: {"image": images[0] if images else None}, input_columns="images", remove_columns="images"
        )
    elif "image" not in rows.column_names and "filename" in rows.column_names:
        if folder is None:
            raise ValueError(
                f"{data} holds no images, only their file names: give the folder that has them (image_dir)."
            )
        paths = [
            str(folder / (subfolder or "") / name)
            for subfolder, name in zip(
                rows["filepath"] if "filepath" in rows.column_names else [""] * len(rows), rows["filename"]
            )
        ]
        rows = rows.add_column("image", paths)
    elif "image" not in rows.column_names:
        raise ValueError(f"{data} has no column `image`, `images` or `filename`; its columns: {rows.column_names}.")
    elif isinstance(rows.features["image"], Value):  # a path
        rows = rows.map(
            lambda path: {"image": None if path is None else str((folder or Path()) / str(path))},
            input_columns="image",
        )
    if isinstance(rows.features["image"], Value):
        paths = [path for path in rows["image"] if path is not None]
        if paths and not any(Path(path).is_file() for path in paths):
            raise ValueError(f"No such image: {paths[0]}. Image paths of {data} start at {folder} (image_dir).")
    return rows.cast_column("image", Image(decode=False))


# Each of the following makes records of rows; those that cannot be used are left out by `bad`. Images are not decoded.


def caption_records(rows: Dataset, prompt: str, keep_duplicates: bool, bad: BadRows) -> tuple[list[Record], dict]:
    """One question per image, with all its captions as references, however many there are."""
    if not set(CAPTION_COLUMNS) & set(rows.column_names):
        raise ValueError(f"No column of captions ({', '.join(CAPTION_COLUMNS)}) among {rows.column_names}.")
    records = []
    for index, row in enumerate(_texts(rows)):
        if (references := bad.use(index, partial(captions, row))) is not None:
            records.append(Record(str(index), index, [Question(prompt, references, "cider")]))
    return records, {}


def question_records(rows: Dataset, prompt: str, keep_duplicates: bool, bad: BadRows) -> tuple[list[Record], dict]:
    """The questions of one image together; what occurs twice (same image, question and answer) once, unless kept."""
    records: dict[str, Record] = {}
    seen, duplicates = set(), 0
    images = rows.cast_column("image", Image(decode=False))["image"]
    for index, (image, row) in enumerate(zip(images, _texts(rows))):
        found = bad.use(index, partial(_question_and_key, image, row))
        if found is None:
            continue
        duplicates += found in seen
        if keep_duplicates or found not in seen:
            key, question, answer = found
            record = records.setdefault(key, Record(key, index, []))
            record.questions.append(Question(question, [answer], "pathvqa_accuracy"))
        seen.add(found)
    notes = {"exact_duplicates": duplicates, "exact_duplicates_are": "kept" if keep_duplicates else "removed"}
    return list(records.values()), notes


def _question_and_key(image: dict | None, row: dict) -> tuple[str, str, str]:
    """The hash of a row's image, its question and its answer."""
    question, answer = text(row.get("question"), "question"), text(row.get("answer"), "answer")
    if image is None:
        raise BadRow("`image` is empty.")
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except OSError as error:
        raise BadImage(f"Cannot read the image {image['path']}: {error}") from error
    return hashlib.sha256(content).hexdigest()[:16], question, answer


def annotation_records(rows: Dataset, prompt: str, keep_duplicates: bool, bad: BadRows) -> tuple[list[Record], dict]:
    """Records in the form of `training`: annotations whose `kind` names a caption are judged as captions, others as answers."""
    records = []
    for index, row in enumerate(_texts(rows)):
        if (questions := bad.use(index, partial(_annotated, row))) is not None:
            records.append(Record(str(index), index, questions))
    return records, {}


def _annotated(row: dict) -> list[Question]:
    return [
        Question(
            text(entry(annotation, "prompt", f"annotations[{index}]"), f"annotations[{index}].prompt"),
            [text(annotation.get("response"), f"annotations[{index}].response")],
            "cider" if "caption" in (annotation.get("kind") or "") else "pathvqa_accuracy",
        )
        for index, annotation in enumerate(items(row["annotations"], "annotations"))
    ]


def local_records(rows: Dataset, prompt: str, keep_duplicates: bool, bad: BadRows) -> tuple[list[Record], dict]:
    """Whatever the rows hold: annotations, questions with answers, or captions."""
    if "annotations" in rows.column_names:
        return annotation_records(rows, prompt, keep_duplicates, bad)
    if {"question", "answer"} <= set(rows.column_names):
        return question_records(rows, prompt, keep_duplicates, bad)
    return caption_records(rows, prompt, keep_duplicates, bad)


def plain_texts(rows: Dataset, bad: BadRows) -> list[str]:
    """The column `text` as it is, without rows that hold none or the image placeholder."""
    values = rows["text"]
    return [
        value
        for index, value in enumerate(values)
        if bad.use(index, partial(text, value, "text", may_be_empty=True)) is not None
    ]


def _texts(rows: Dataset) -> Iterable[dict]:
    """The rows without their images, which are not read for this."""
    return rows.remove_columns("image")


# Each with its default data. PathVQA on the Hub is already without exact duplicates: 6,719 of 6,761 test questions.
TASKS: dict[str, tuple[Callable[[Dataset, str, bool, BadRows], tuple[list[Record], dict]], str | None]] = {
    "coco_captions": (caption_records, "yerevann/coco-karpathy"),
    "flickr30k_captions": (caption_records, "AnyModal/flickr30k"),
    "pathvqa": (question_records, "flaviagiammarino/path-vqa"),
    "scenes": (annotation_records, None),
    "local": (local_records, None),
}


def blank(images: list[PILImage.Image]) -> list[PILImage.Image]:
    """Every image a grey square of its size: what a model answers without looking."""
    return [PILImage.new("RGB", image.size, (128, 128, 128)) for image in images]


def shuffled_rows(records: list[Record], seed: int) -> list[Record]:
    """Every record with another record's image, none with its own (for more than one record)."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    rows = {order[i]: records[order[(i + 1) % len(order)]].row for i in range(len(order))}
    return [Record(record.id, rows[index], record.questions) for index, record in enumerate(records)]
