"""Sources to records: what the `sources` of a recipe name, loaded as one `datasets.Dataset` of records.

A record is `{"images": [PIL.Image, ...], "annotations": [{"prompt": str, "response": str}, ...]}`. Adding a source is one
function and one row of `SOURCES`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from training import scenes


def load_scenes(
    data_dir: Path,
    count: int,
    annotations: list[str],
    split: str = "train",
    seed: int = 0,
) -> Dataset:
    """Drawn scenes with captions and questions: see `training.scenes.make_scenes`."""
    return scenes.make_scenes(count, split, tuple(annotations), seed)


def load_scene_texts(data_dir: Path, count: int, split: str = "train", seed: int = 0) -> Dataset:
    """Text-only records: see `training.scenes.make_texts`."""
    return scenes.make_texts(count, split, seed)


def load_jsonl(
    data_dir: Path,
    path: str,
    split: str | None = None,
    prompt: str = "Write a short caption.",
    limit: int | None = None,
) -> Dataset:
    """A local jsonl file whose rows name an `image` (a path from the file's folder) and hold one of

    - `captions`: a list of texts, each answered to `prompt`;
    - `question` and `answer`: rows of one image become one record;
    - `annotations`: a list of `{"prompt", "response"}`.

    Args:
        path: from `data_dir`, unless absolute.
        split: keep the rows whose `split` is this.
        limit: keep the first so many records.
    """
    file = data_dir / path
    if not file.is_file():
        raise FileNotFoundError(
            f"No such file: {file}. Paths of sources start at `data_dir`, which is {str(data_dir)!r}."
        )
    rows = load_dataset("json", data_files=str(file), split="train")
    if split is not None:
        rows = rows.filter(lambda value: value == split, input_columns="split")
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).extend(_annotations(row, prompt, file))
    records = [
        {"images": [_inside(file.parent, image)], "annotations": [{"kind": "", **a} for a in annotations]}
        for image, annotations in by_image.items()
    ]
    if not records:
        raise ValueError(f"{file} has no rows of split {split!r}.")
    return Dataset.from_list(records[:limit], features=scenes.RECORD_FEATURES)


def _annotations(row: dict, prompt: str, file: Path) -> list[dict[str, str]]:
    if row.get("annotations"):
        return [{"prompt": a["prompt"], "response": a["response"]} for a in row["annotations"]]
    if row.get("captions"):
        return [{"prompt": prompt, "response": caption.strip()} for caption in row["captions"]]
    if row.get("question") and row.get("answer") is not None:
        return [{"prompt": row["question"].strip(), "response": row["answer"].strip()}]
    raise ValueError(
        f"A row of {file} has none of `captions`, `question` and `answer`, `annotations`; it has {sorted(row)}."
    )


def _inside(folder: Path, path: str) -> str:
    """The path of an image below `folder`; one that leads out of it is refused."""
    full = os.path.normpath(folder / path)
    if not full.startswith(os.path.normpath(folder) + os.sep):
        raise ValueError(f"The image path {path!r} leads out of the folder {folder}.")
    return full


SOURCES: dict[str, Callable[..., Dataset]] = {
    "scenes": load_scenes,
    "scene_texts": load_scene_texts,
    "jsonl": load_jsonl,
}


def load_sources(sources: list[dict], data_dir: str | os.PathLike = ".") -> Dataset:
    """All sources of a recipe, one behind the other; the trainer shuffles.

    Args:
        sources: each `{"name": one of SOURCES, **arguments of its function}`.
        data_dir: where relative paths of sources start.

    Raises:
        ValueError: for an unknown source name or argument (the message lists the valid ones).
    """
    loaded = []
    for source in sources:
        arguments = dict(source)
        name = arguments.pop("name", None)
        if name not in SOURCES:
            raise ValueError(f"Unknown source {name!r}. Valid names: {', '.join(SOURCES)}.")
        function = SOURCES[name]
        valid = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        unknown = set(arguments) - set(valid)
        if unknown:
            raise ValueError(f"Source {name!r} does not know {sorted(unknown)}. Its arguments: {', '.join(valid)}.")
        loaded.append(function(Path(data_dir), **arguments))
    return concatenate_datasets(loaded)
