"""The questions of an evaluation: the conversations of a data set, with their responses as references."""

import hashlib
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.formats import options_of
from alignvlm.data.images import BadImage, image_hash, read_image
from alignvlm.data.record import ON_BAD_ROW, BadRow, Conversation
from alignvlm.data.sources import Source, read_source


TASKS = [name for name, kind in CATALOGUE.items() if kind.metric is not None]


@dataclass
class Asked:
    """The questions about the images of one record: its conversations, and the index of the source's record with the images."""

    id: str
    index: int
    conversations: list[Conversation]


@dataclass
class EvaluationSet:
    """The records of a task, in their order; images are read on demand."""

    asked: list[Asked]
    source: Source
    notes: dict = field(default_factory=dict)

    def images(self, asked: Iterable[Asked]) -> list[list[Image.Image]]:
        """Reads the images of each record, upright and in RGB."""
        return [[read_image(image) for image in self.source[one.index]["images"]] for one in asked]


# Tells what is wrong with a conversation about images, undecoded; None: nothing.
Check = Callable[[list, Conversation], str | None]


def load_task(
    task: str,
    split: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    check: Check | None = None,
    **reading,
) -> EvaluationSet:
    """Loads the questions of a task.

    Args:
        task, split, data, **reading: for `load_source`. All rows are tried here, before any answer is written; the notes list what
            `on_bad_row="skip"` leaves out.
        limit: at most this number of records, from the first.
        check: refuses questions that a model cannot be asked; their rows are as bad as those that cannot be read.

    Raises:
        ValueError: as `load_source`, and for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} asks no question. Give 1 or more, or none for all.")
    source = load_source(task, split, data, **reading)
    on_bad_row, keep_duplicates = reading.get("on_bad_row", "raise"), source.to_record.keep_duplicates
    names = source.ids or map(str, range(len(source)))
    asked = [
        Asked(name, index, found)
        for index, (name, found) in enumerate(zip(names, source.conversations(keep_duplicates), strict=True))
    ]
    if plain := next((one for one in asked if not all(c.messages for c in one.conversations)), None):
        place = source.place(source.rows_of(plain.index)[0])
        raise ValueError(f"{place}: plain text asks nothing. For its perplexity: --task text_perplexity.")
    notes: dict = {}
    if source.groups is not None:
        more, fewer = (sum(map(len, source.conversations(keep))) for keep in (True, False))
        notes = {"exact_duplicates": more - fewer, "exact_duplicates_are": "kept" if keep_duplicates else "removed"}
    readable, unreadable = _readable(asked, source, limit, on_bad_row, check)
    bad = [*source.bad_rows, *unreadable]
    if not readable:
        raise BadRow(
            f"None of the {len(source.rows)} rows of {source.identity['data']} can be used. The first: {bad[0]}"
        )
    conversations = [conversation for one in readable for conversation in one.conversations]
    if (digest := _digest_of_files([source[one.index]["images"] for one in readable])) is not None:
        notes["image_files_hash"] = digest
    notes |= {
        "images": len(readable),
        "questions": len(conversations),
        "references": sum(len(conversation.responses) for conversation in conversations),
    }
    if bad:
        notes |= {"bad_rows": len(bad), "bad_row_list": bad[:1000]}
    return EvaluationSet(readable, source, notes)


def check_task(task: str, data: str | None) -> None:
    """Checks that there is such a task, and that it has data.

    Raises:
        ValueError: naming the tasks there are, or how its data are had.
    """
    if task not in TASKS:
        unjudged = " No metric here judges it as the field does." if task in CATALOGUE else ""
        raise ValueError(f"Unknown task {task!r}.{unjudged} Valid tasks: {', '.join(TASKS)}.")
    kind = CATALOGUE[task]
    if (data or kind.data) is not None:
        return
    drawn = ""
    if (draw := kind.generate) is not None:
        call = f"from {draw.__module__} import {draw.__name__}; {draw.__name__}(100, '{kind.split}').save_to_disk('{task}')"
        drawn = f" Python draws some for --data {task}: `{call}`."
    raise ValueError(
        f"The task {task!r} needs data: give a local folder or file, or a data set of the Hub, as --data.{drawn}"
    )


def load_source(
    task: str,
    split: str | None = None,
    data: str | None = None,
    revision: str | None = None,
    image_dir: str | None = None,
    prompt: str | None = None,
    keep_duplicates: bool = False,
    on_bad_row: str = "raise",
) -> Source:
    """Loads the data of a task, undecoded.

    Args:
        task: a data set of `CATALOGUE` with a metric.
        split: the data set's split, in Karpathy's naming for captions (`test`, `val`, `train`); None: the one that `CATALOGUE` names, which
            is `test` for most.
        data: a Hub data set, or a local folder or file. Most tasks have a default; `local` and drawn data sets have none.
        revision: of a Hub data set.
        image_dir: where image paths in the data start; the data's own folder by default.
        prompt: the prompt for captions; None: as in training.
        keep_duplicates: ask exact duplicates (image, question and answer) again.
        on_bad_row: what to do with a row whose texts cannot be used or whose image cannot be read: `raise`, or `skip` it.

    Raises:
        ValueError: for an unknown task, missing columns, or a split without rows. A row that cannot be used raises `BadRow`, which names
            its file, its number and what is wrong.
    """
    check_task(task, data)
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row={on_bad_row!r}. Valid values: {', '.join(ON_BAD_ROW)}.")
    kind = CATALOGUE[task]
    given = {**kind.asked, "data": data, "split": split or kind.split, "revision": revision}
    given["keep_duplicates"] = keep_duplicates or kind.asked.get(
        "keep_duplicates", False
    )  # or where the set counts them
    if image_dir is not None:
        given["image_dir"] = image_dir
    name = task if kind.generate is None else "local"
    if prompt is not None and "prompt" in options_of(CATALOGUE[name].read):
        given["prompt"] = prompt
    try:
        source = read_source(
            {"name": name, **given}, max_bad_rows=None if on_bad_row == "raise" else 1.0, hash_all=True
        )
    except BadRow as error:
        raise BadRow(f"{error} {REMEDY}") from error
    source.metric_of = kind.metric_of
    return source


REMEDY = "Mend it, or leave such rows out with --on_bad_row skip."


def _readable(
    asked: list[Asked], source: Source, limit: int | None, on_bad_row: str, check: Check | None
) -> tuple[list[Asked], list[str]]:
    """Returns the first records, at most `limit`, whose images can be decoded, without the questions that `check` refuses, and what is wrong with
    the others up to there."""
    readable: list[Asked] = []
    unreadable: list[str] = []

    def leave_out(row: int, problem: str) -> None:
        if on_bad_row == "raise":
            raise BadRow(f"{source.place(row)}: {problem} {REMEDY}")
        unreadable.append(f"{source.place(row)}: {problem}")

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(asked), 256):
            chosen = asked[start : start + 256]
            images = [source[one.index]["images"] for one in chosen]
            for one, shown, problem in zip(chosen, images, pool.map(_problem, images)):
                if len(readable) == limit:
                    return readable, unreadable
                if problem is not None:
                    leave_out(source.rows_of(one.index)[0], problem)
                    continue
                fitting = []
                for conversation in one.conversations:
                    if check is None or (problem := check(shown, conversation)) is None:
                        fitting.append(conversation)
                    else:
                        leave_out(_row_of(conversation, one, source), problem)
                if fitting:
                    readable.append(replace(one, conversations=fitting))
    return readable, unreadable


def _digest_of_files(images: list[list]) -> str | None:
    """Returns a hash of the content of the images that are files of their own beside the data, whose own hash tells nothing of them; None where
    there are none."""
    files = [
        image for group in images for image in group if isinstance(image, dict) and image.get("folder") is not None
    ]
    if not files:
        return None
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("".join(pool.map(image_hash, files)).encode()).hexdigest()


def _row_of(conversation: Conversation, one: Asked, source: Source) -> int:
    """Returns the row of a record that asks this."""
    rows = source.rows_of(one.index)
    for row in rows if len(rows) > 1 else ():
        if any(
            own["messages"] == conversation.messages
            for own in source.to_record([source.rows[row]], one.id)["conversations"]
        ):
            return row
    return rows[0]


def _problem(images: list) -> str | None:
    for image in images:
        try:
            read_image(image)
        except BadImage as error:
            folder = image.get("folder") if isinstance(image, dict) else None
            if folder is not None and not (Path(folder) / image["path"]).exists():
                return f"{error} Image paths start at {folder} (image_dir)."
            return str(error)
    return None


def blank(images: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """Replaces every image by grey of its size, to see what a model answers without looking."""
    return [[Image.new("RGB", image.size, (128, 128, 128)) for image in group] for group in images]


def without_images(conversation: Conversation) -> Conversation:
    """Returns a conversation without its image parts, to see what the words alone tell."""
    messages = []
    for message in conversation.messages:
        said = [part for part in Conversation.parts(message) if part["type"] != "image"]
        messages.append({**message, "content": said or [{"type": "text", "text": ""}]})
    return replace(conversation, messages=messages)


def shuffled(asked: list[Asked], seed: int) -> list[Asked]:
    """Gives every record the images of another record with as many images; never its own, unless it is the only one."""
    alike: dict[int, list[int]] = {}
    for position, one in enumerate(asked):
        alike.setdefault(max(c.image_count for c in one.conversations), []).append(position)
    found = list(asked)
    for positions in alike.values():
        order = positions.copy()
        random.Random(seed).shuffle(order)
        for place, position in enumerate(order):
            found[position] = replace(asked[position], index=asked[order[(place + 1) % len(order)]].index)
    return found
