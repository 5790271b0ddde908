"""What a model is asked: data sets on the Hub, or files of the same form on disk, as questions with reference answers.

A task is one function that turns the rows of a data set into records (an image and its questions); adding one is that function and
a row of `TASKS`.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Image, Value, load_dataset
from huggingface_hub import HfApi
from PIL import Image as PILImage


CAPTION_PROMPT = "Write a short caption."
CAPTION_COLUMNS = ("captions", "caption", "sentences", "original_alt_text", "alt_text")
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
    """The records of a task, the rows that hold their images (column `image`), and where it all comes from."""

    records: list[Record]
    rows: Dataset
    source: dict
    notes: dict = field(default_factory=dict)

    def images(self, records: list[Record]) -> list[PILImage.Image]:
        return [self.rows[record.row]["image"] for record in records]


def load_task(
    task: str,
    split: str,
    data: str | None = None,
    revision: str | None = None,
    image_dir: str | None = None,
    prompt: str = CAPTION_PROMPT,
    keep_duplicates: bool = False,
    limit: int | None = None,
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

    Raises:
        ValueError: for an unknown task, missing columns, or a split with no rows.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. Valid tasks: {', '.join(TASKS)}.")
    to_records, default_data = TASKS[task]
    data = data or default_data
    if data is None:
        raise ValueError(f"The task {task!r} needs data: a local folder or file, or a data set of the Hub.")
    rows, source, folder = read_rows(data, split, revision)
    rows = _with_images(rows, Path(image_dir) if image_dir else folder, data)
    records, notes = to_records(rows, prompt, keep_duplicates)
    notes["images"] = len(records[:limit])
    notes["questions"] = sum(len(record.questions) for record in records[:limit])
    notes["references"] = sum(len(q.references) for record in records[:limit] for q in record.questions)
    return EvaluationSet(records[:limit], rows, source, notes)


def read_rows(data: str, split: str, revision: str | None = None) -> tuple[Dataset, dict, Path | None]:
    """The rows of one split, the data's identity (its Hub commit, or the hash of its files), and its folder if it is local."""
    if Path(data).exists():
        rows, files = _read_files(Path(data), split)
        folder = Path(data) if Path(data).is_dir() else Path(data).parent
        source = {"data": Path(data).name, "split": split, "sha256": file_hash(files)}
    else:
        commit = HfApi().dataset_info(data, revision=revision).sha
        rows = load_dataset(data, split=split, revision=commit)
        folder = None
        source = {"data": data, "split": split, "revision": commit}
    if "split" in rows.column_names:
        names = _names(split)
        rows = rows.filter(lambda value: value in names, input_columns="split")
    if len(rows) == 0:
        raise ValueError(f"{data} has no rows of split {split!r}.")
    return rows, source, folder


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
    if files[0].suffix == ".json":
        images = json.loads(files[0].read_text())["images"]
        columns = ("filepath", "filename", "split")
        rows = [
            {name: image.get(name, "") for name in columns} | {"captions": [s["raw"] for s in image["sentences"]]}
            for image in images
        ]
        return Dataset.from_list(rows), files[:1]
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    rows = load_dataset(kind, data_files=[str(file) for file in files], split="train")
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
        rows = rows.map(lambda images: {"image": images[0]}, input_columns="images", remove_columns="images")
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
        rows = rows.map(lambda path: {"image": str((folder or Path()) / path)}, input_columns="image")
    if isinstance(rows.features["image"], Value):
        missing = next((path for path in rows["image"] if not Path(path).is_file()), None)
        if missing is not None:
            raise ValueError(f"No such image: {missing}. Image paths of {data} start at {folder} (image_dir).")
    return rows.cast_column("image", Image())


def caption_records(rows: Dataset, prompt: str, keep_duplicates: bool) -> tuple[list[Record], dict]:
    """One question per image, with all its captions as references, however many there are."""
    name = next((name for name in CAPTION_COLUMNS if name in rows.column_names), None)
    if name is None:
        raise ValueError(f"No column of captions ({', '.join(CAPTION_COLUMNS)}) among {rows.column_names}.")
    records = []
    for index, captions in enumerate(rows[name]):
        captions = [captions] if isinstance(captions, str) else captions
        references = [caption["raw"] if isinstance(caption, dict) else caption for caption in captions]
        records.append(Record(str(index), index, [Question(prompt, references, "cider")]))
    return records, {}


def question_records(rows: Dataset, prompt: str, keep_duplicates: bool) -> tuple[list[Record], dict]:
    """The questions of one image together; what occurs twice (same image, question and answer) once, unless kept."""
    records: dict[str, Record] = {}
    seen, duplicates = set(), 0
    images = rows.cast_column("image", Image(decode=False))["image"]
    for index, (image, question, answer) in enumerate(zip(images, rows["question"], rows["answer"])):
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        key = hashlib.sha256(content).hexdigest()[:16]
        duplicates += (key, question, answer) in seen
        if keep_duplicates or (key, question, answer) not in seen:
            record = records.setdefault(key, Record(key, index, []))
            record.questions.append(Question(question.strip(), [answer], "pathvqa_accuracy"))
        seen.add((key, question, answer))
    notes = {"exact_duplicates": duplicates, "exact_duplicates_are": "kept" if keep_duplicates else "removed"}
    return list(records.values()), notes


def annotation_records(rows: Dataset, prompt: str, keep_duplicates: bool) -> tuple[list[Record], dict]:
    """Records in the form of `training`: annotations whose `kind` names a caption are judged as captions, others as answers."""
    records = []
    for index, annotations in enumerate(rows["annotations"]):
        questions = [
            Question(
                annotation["prompt"],
                [annotation["response"]],
                "cider" if "caption" in (annotation.get("kind") or "") else "pathvqa_accuracy",
            )
            for annotation in annotations
        ]
        records.append(Record(str(index), index, questions))
    return records, {}


def local_records(rows: Dataset, prompt: str, keep_duplicates: bool) -> tuple[list[Record], dict]:
    """Whatever the rows hold: annotations, questions with answers, or captions."""
    if "annotations" in rows.column_names:
        return annotation_records(rows, prompt, keep_duplicates)
    if {"question", "answer"} <= set(rows.column_names):
        return question_records(rows, prompt, keep_duplicates)
    return caption_records(rows, prompt, keep_duplicates)


# Each with its default data. PathVQA on the Hub is already without exact duplicates: 6,719 of 6,761 test questions.
TASKS: dict[str, tuple[Callable[[Dataset, str, bool], tuple[list[Record], dict]], str | None]] = {
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


def file_hash(files: list[Path]) -> str:
    """The SHA-256 of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
