"""Makes records of the rows of common data sets: one function per row schema.

A function takes a row, and options that a recipe may set. It returns a record whose images are as the row holds them: bytes, or a path
that is not opened yet. It returns None for a row that the options leave out, and raises `BadRow` for a row that cannot be used.
`FORMATS` names the functions; `record_of` chooses one by a row's columns.
"""

import ast
import base64
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, get_args

from PIL import Image

from alignvlm.data.record import BadRow, Conversation, Record, one_turn, shown


CAPTION_PROMPT = "Write a short caption."
DETAILED_PROMPT = "Describe the picture in detail."
IMAGE_TOKEN = "<image>"
CAPTION_COLUMNS = (
    *("captions", "sentences", "original_alt_text", "alt_text", "caption"),
    *("annotations_captions", "caption_str"),  # NoCaps, TextCaps
)
IMAGE_COLUMNS = ("images", "image", "filename", "file_name", "img_name")  # `file_name`: an imagefolder's
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    *("avif", "jfif", "heic", "heif", "jp2"),
)  # columns of a webdataset
IMAGE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\x00", b"MM\x00*")  # of the bytes of an image file
IMAGE_BRANDS = (b"WEBP", b"avif", b"heic")  # of such bytes from the ninth on
VIDEO_COLUMNS = ("video", "videos")
VIDEO_TOKEN = "<video>"
VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "mov", "webm")
LONGEST_PATH = 4096  # characters, on Linux
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def text(value: Any, column: str, may_be_empty: bool = False, may_hold_images: bool = False) -> str:
    """Returns the text of a column, stripped.

    Raises:
        BadRow: if the value is not a string, is empty, holds half of a surrogate pair, or the image placeholder.
    """
    if not isinstance(value, str):
        raise BadRow(
            f"`{column}` is {shown(value)} ({type(value).__name__}), not a text. Write it as the text that is meant, in quotes."
        )
    if not may_be_empty and not value.strip():
        raise BadRow(f"`{column}` is empty. Fill it in, or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"`{column}` holds {value[error.start]!r}, half of a character that was cut in two, which is no text: "
            f"{shown(value[max(error.start - 20, 0) :])}. Write the complete character, or remove the half."
        ) from error
    if not may_hold_images and IMAGE_TOKEN in value:
        raise BadRow(
            f"`{column}` holds the image placeholder {IMAGE_TOKEN}: {shown(value)}. Remove it; only what a user says can hold an image."
        )
    return value.strip()


def items(value: Any, column: str) -> list:
    """Returns the items of a column that holds a list.

    Raises:
        BadRow: if it holds none.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{column}` is {shown(value)}; expected a list with at least one item.")
    return value


def column_of(row: dict, column: str) -> Any:
    """Returns the value of a column that a schema needs.

    Raises:
        BadRow: if the row does not have the column, as where `format` names another schema than that of the row.
    """
    if column not in row:
        raise BadRow(
            f"The row has no `{column}`, which this schema needs: it has {sorted(row)}. Without `format` the columns tell the schema."
        )
    return row[column]


def entry(value: Any, key: str, column: str) -> Any:
    """Returns `value[key]` of an item of a list; None if there is no such key.

    Raises:
        BadRow: if the item is not a mapping.
    """
    if not isinstance(value, dict):
        raise BadRow(f"`{column}` is {shown(value)}; expected a mapping with `{key}`.")
    return value.get(key)


def is_image_column(name: str) -> bool:
    """Tells whether a column of this name holds images or their paths."""
    return name in IMAGE_COLUMNS or _has_image_extension(name)


def _has_image_extension(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _as_counted(name: str) -> list:
    """Returns a key that sorts names as people count: `2.jpg` before `10.jpg`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def images_of(row: dict) -> list[Any]:
    """Returns the images of a row, whatever its columns call them: bytes as `{"bytes", "path"}`, or paths.

    Raises:
        BadRow: for something else.
    """
    if _filled(row.get("images")):
        found = row["images"]
    elif _filled(row.get("image")):
        found = row["image"]
    elif row.get("images") is not None:
        found = []
    elif row.get("filename") is not None:  # Karpathy's split files
        found = "/".join(filter(None, [row.get("filepath"), row["filename"]]))
    elif row.get("file_name") is not None:
        found = row["file_name"]
    elif row.get("img_name") is not None:
        found = row["img_name"]
    else:
        names = sorted((name for name in row if _has_image_extension(name)), key=_as_counted)
        found = [row[name] for name in names if row[name] is not None]
    found = found if isinstance(found, list) else [found]
    return [_image(image) for image in found]


def _filled(value: Any) -> bool:
    return value is not None and value != [] and value != ""


def _image(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str) and value.startswith("data:"):
        return {"bytes": _of_data_url(value), "path": None}
    if isinstance(value, str) and len(value) > LONGEST_PATH:
        raise BadRow(
            f"An image is a text of {len(value):,} characters, {shown(value)}, too long for a path. Write base64 as data:image/jpeg;base64,..."
        )
    if isinstance(value, str) and _ADDRESS.match(value):
        raise BadRow(
            f"An image is at {shown(value)}. Images are not fetched while training: download them first, and write their paths."
        )
    if isinstance(value, dict) and not _is_image_mapping(value):
        raise BadRow(
            f"An image is {shown(value)}, a mapping without the bytes or the path of an image. Write the path itself, or "
            '{"path": ...}.'
        )
    if not isinstance(value, (str, dict, Image.Image)) or value == "":
        raise BadRow(
            f"An image is {shown(value)} ({type(value).__name__}), neither a path nor the bytes of a picture."
        )
    return value


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _is_image_mapping(value: dict) -> bool:
    """Tells whether a mapping has bytes or a path; also if it has neither, but is what `reader` (`bytes` alone) or `datasets` writes for an
    image that is not there, which `images.read_image` names."""
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is None:
        return value.keys() in ({"bytes"}, {"bytes", "path"})
    return isinstance(content, bytes) or (content is None and isinstance(path, str) and path != "")


def check_all_is_seen(row: dict, record: Record, texts_alone: bool = False) -> None:
    """Refuses a row with something to see that its record does not hold: a video that `<video>` shows, and, if the record has no images, a
    video in one of `VIDEO_COLUMNS`, or an image or the path of one in a column that no schema reads.

    Args:
        texts_alone: the record is made without images on purpose.

    Raises:
        BadRow: naming the column.
    """
    is_blind = not record.images and not texts_alone
    for name in VIDEO_COLUMNS:
        found = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        if _filled(row.get(name)) and (_shows_a_video(record) or (is_blind and any(map(_looks_like_a_video, found)))):
            raise BadRow(
                f"`{name}` is {shown(row[name])}, a video, which is not seen: only images are. Remove the row, or give its frames as "
                f"`images` and remove {VIDEO_TOKEN}."
            )
    if is_blind:
        _check_no_image_is_left_out(row)


def _shows_a_video(record: Record) -> bool:
    messages = (message for conversation in record.conversations for message in conversation.messages)
    return any(VIDEO_TOKEN in (part.get("text") or "") for message in messages for part in Conversation.parts(message))


def _looks_like_a_video(value: Any) -> bool:
    """Tells whether a value is the path of a video file, or a mapping, as `datasets` writes a video."""
    if isinstance(value, str):
        return "://" not in value and value.rpartition(".")[2].lower() in VIDEO_EXTENSIONS
    return isinstance(value, dict)


def _check_no_image_is_left_out(row: dict) -> None:
    """Refuses a row if a column that no schema reads holds an image or the path of one."""
    known = {name for form in FORMATS.values() for needed in form.needs for name in needed}
    known.remove("A")  # a choice may be an image
    for name, value in row.items():
        if name not in known and any(map(_looks_like_an_image, value if isinstance(value, list) else [value])):
            raise BadRow(
                f"`{name}` is {shown(value)}, an image that is not seen: name the column `image`. For its texts alone, write `name: text`."
            )


def _looks_like_an_image(value: Any) -> bool:
    """Tells whether a value is an image, the mapping that holds or stands for one, or the path of an image file; an address is not."""
    if isinstance(value, str):  # texts of the web come with addresses
        return "://" not in value and _has_image_extension(value)
    if isinstance(value, bytes):
        return value.startswith(IMAGE_BEGINNINGS) or value[8:12] in IMAGE_BRANDS
    return isinstance(value, Image.Image) or (isinstance(value, dict) and "bytes" in value)


def _of_data_url(value: str) -> bytes:
    """Returns the bytes of an image that stands in its address, as in messages for OpenAI's API."""
    head, _, content = value.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError(f"it begins with {shown(head)}")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise BadRow(
            f"An image is a data URL that is not base64: {error}. Write data:image/jpeg;base64,..."
        ) from error


# Conversations: what is said, by whom, and where its images stand.

Turn = tuple[str, list[dict]]  # who speaks, and the parts of what is said


def parts_of(value: Any, column: str, speaker: str, images: list[Any]) -> list[dict]:
    """Returns the parts of what somebody says: a text, or transformers' list of parts.

    In a text of the user `<image>` stands for an image. Images that a part holds itself are appended to `images`.

    Raises:
        BadRow: for something else.
    """
    if not isinstance(value, list):
        said = text(value, column, may_be_empty=speaker != "assistant", may_hold_images=speaker == "user")
        pieces = [piece.strip() for piece in said.split(IMAGE_TOKEN)]
        parts = [part for piece in pieces for part in (_IMAGE, {"type": "text", "text": piece})][1:]
        return [part for part in parts if part["type"] == "image" or part["text"]]
    parts: list[dict] = []
    for index, part in enumerate(value):
        place = f"{column}[{index}]"
        kind = entry(part, "type", place)
        if kind == "text":
            _check_text_part(part, f"{place}.text", speaker)
            if parts and parts[-1]["type"] == "text":  # as a chat template writes them: nothing between them
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            if speaker != "user":
                raise BadRow(f"`{place}` is an image of the {speaker}; only the user shows images.")
            own = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
            if kind == "image_url" and isinstance(own, dict) and "url" in own:
                own = own["url"]
            images += [] if own is None else [_image(own)]
            parts.append(_IMAGE)
        else:
            raise BadRow(f"`{place}.type` is {shown(kind)}. Valid types: text, image.")
    parts = [part if part["type"] == "image" else {**part, "text": part["text"].strip()} for part in parts]
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    if speaker == "assistant" and not parts:
        raise BadRow(f"`{column}` is empty. Fill it in, or remove the row.")
    return parts


_IMAGE = {"type": "image", "text": None}


def _check_text_part(part: dict, place: str, speaker: str) -> None:
    text(part.get("text"), place, may_be_empty=True, may_hold_images=speaker == "user")
    if IMAGE_TOKEN in part["text"]:
        raise BadRow(
            f"`{place}` holds the image placeholder {IMAGE_TOKEN}: {shown(part['text'])}. In a list of parts an image is a part of its own: "
            'write {"type": "image"} in its place, or the content as one text.'
        )


def turns_of(value: Any, column: str, role: str, content: str, images: list[Any]) -> list[Turn]:
    """Returns the turns of a list of mappings that say who speaks (`role`, one of `SPEAKERS`) and what (`content`)."""
    turns = []
    for index, turn in enumerate(items(value, column)):
        place = f"{column}[{index}]"
        speaker = entry(turn, role, place)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise BadRow(f"`{place}.{role}` is {shown(speaker)}. Valid values: {', '.join(SPEAKERS)}.")
        speaker = SPEAKERS[speaker]
        turns.append((speaker, parts_of(turn.get(content), f"{place}.{content}", speaker, images)))
    return turns


def _check_all_are_trained(value: Any, column: str) -> None:
    """Refuses turns of the assistant that are marked as not to be trained: by OpenAI's `"weight": 0` or axolotl's `"train": false`.

    Raises:
        BadRow: naming the turn.
    """
    for index, turn in enumerate(value if isinstance(value, list) else []):
        if not isinstance(turn, dict) or SPEAKERS.get(str(turn.get("role", turn.get("from")))) != "assistant":
            continue
        for mark in ("weight", "train"):
            if turn.get(mark) == 0 or _is_false(turn.get(mark)):
                raise BadRow(
                    f"`{column}[{index}].{mark}` is {shown(turn[mark])}: an answer that must not be trained, and all of `{column}` would "
                    "be. Write the turns up to the next user's as `prompt` and the answer to learn as `completion`, which alone is trained."
                )


def conversation(turns: list[Turn], images: list[Any], column: str, kind: str = "") -> Record:
    """Makes the record of a conversation: its last answer is the response, and all answers are trained.

    Consecutive turns of one speaker become one, joined by line breaks. A system message after the first turn moves before the next
    prompt. Leaves out what the assistant says before the first prompt, and a prompt without an answer. Images without a part of their
    own stand before the first prompt, as in TRL.

    Raises:
        BadRow: if the user's prompts get no answer, or there are not as many image parts as images.
    """
    messages: list[dict] = []
    waiting: list[dict] = []  # parts of a system message after the first turn
    for speaker, parts in turns:
        if speaker == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
        if speaker == "system" and any(message["role"] != "system" for message in messages):
            waiting = _joined(waiting, parts)
            continue
        if speaker == "user" and waiting:
            parts, waiting = _joined(waiting, parts), []
        if messages and messages[-1]["role"] == speaker:
            messages[-1]["content"] = _joined(messages[-1]["content"], parts)
        else:
            messages.append({"role": speaker, "content": parts})
    left_out = messages.pop() if messages and messages[-1]["role"] == "user" else {"content": []}
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow(f"`{column}` holds no prompt of the user with a response of the assistant.")
    kept = sum(part["type"] == "image" for message in messages for part in message["content"])
    unused = sum(part["type"] == "image" for part in left_out["content"])
    image_parts = kept + unused
    if image_parts not in (0, len(images)):
        raise BadRow(
            f"`{column}` has {image_parts} image part(s) or {IMAGE_TOKEN}, and the row {len(images)} image(s). Give one image per "
            "part, or no part at all: images then stand before the first prompt."
        )
    if not image_parts:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*([_IMAGE] * len(images)), *first["content"]]
    for message in messages:
        message["content"] = message["content"] or [{"type": "text", "text": ""}]
    response = "\n".join(part["text"] for part in messages.pop()["content"])
    train_on = "all" if any(message["role"] == "assistant" for message in messages) else "last"
    return Record(images[: len(images) - unused], [Conversation(messages, [response], train_on, kind)])


def _joined(first: list[dict], second: list[dict]) -> list[dict]:
    """Joins the parts of two turns of one speaker; texts that meet become one, joined by a line break."""
    if first and second and first[-1]["type"] == second[0]["type"] == "text":
        return [*first[:-1], {"type": "text", "text": f"{first[-1]['text']}\n{second[0]['text']}"}, *second[1:]]
    return [*first, *second]


# One function per row schema.


def messages(row: dict) -> Record:
    """Reads TRL's conversational form: `messages` of `{"role", "content"}`, with `images` or `image` if there are any."""
    images = images_of(row)
    turns = turns_of(column_of(row, "messages"), "messages", "role", "content", images)
    _check_all_are_trained(row["messages"], "messages")
    _check_one_place(row, images)
    return conversation([*_system(row, turns), *turns], images, "messages")


def _system(row: dict, turns: list[Turn]) -> list[Turn]:
    """Returns the turn of a column `system`; none if it is empty, or if the turns have a system message of their own."""
    if not _filled(row.get("system")) or any(speaker == "system" for speaker, _ in turns):
        return []
    return [("system", parts_of(row["system"], "system", "system", []))]


def _check_one_place(row: dict, images: list[Any]) -> None:
    """Refuses a row with some images in a column and others in the parts of its messages: nothing says which part shows which."""
    if (count := len(images_of(row))) not in (0, len(images)):
        raise BadRow(
            f"The row has {count} image(s) in a column, and {len(images) - count} in parts of its messages. Put all of them into the "
            "column, in their order, or all into the parts."
        )


def prompt_completion(row: dict) -> Record:
    """Reads TRL's `prompt` and `completion`, as texts (one exchange) or as lists of messages.

    The prompt may also be called `instruction`, and the completion `response`, `answer` or `output`. Only the completion is trained. Alpaca's
    `input` stands below its `instruction`, and so does Dolly's `context`; `system` and `history` (earlier prompts with their answers) stand
    before. Refuses what TRL's unpaired preferences label as a bad answer.
    """
    images = images_of(row)
    if _is_false(row.get("label")):
        raise BadRow(
            f"`label` is {shown(row['label'])}: a bad answer, which would be trained as a good one. Keep only rows whose label is true, or "
            "make pairs of `chosen` and `rejected` for DPO. If the label says something else, remove its column."
        )
    asked = next((name for name in PROMPTS if row.get(name) is not None), None)
    if asked is None:
        asked = next((name for name in PROMPTS if name in row), None)
        column_of(row, asked or PROMPTS[0])
        raise BadRow(
            f'`{asked}` is None, no prompt. Write what is asked; "" for a text that is trained without a prompt.'
        )
    answered = next((name for name in COMPLETIONS if row.get(name) is not None), COMPLETIONS[0])
    for name in ("input", "context") if asked == "instruction" and isinstance(row[asked], str) else ():
        if _filled(row.get(name)):
            below = text(row[name], name, may_be_empty=True, may_hold_images=True)
            row = {**row, asked: f"{row[asked].strip()}\n{below}".strip()}
    if row[asked] == "" and not images:
        return Record([], [one_turn("", [text(row.get(answered), answered)])])
    turns: list[Turn] = []
    history = row.get("history") or []
    for index, pair in enumerate(items(history, "history") if history else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(
                f"`history[{index}]` is {shown(pair)}; expected a list of two, an earlier prompt and its answer."
            )
        for speaker, said in zip(("user", "assistant"), pair, strict=True):
            turns.append((speaker, parts_of(said, f"history[{index}]", speaker, images)))
    for name, speaker in ((asked, "user"), (answered, "assistant")):
        if isinstance(row.get(name), list):
            turns += turns_of(row[name], name, "role", "content", images)
        else:
            turns.append((speaker, parts_of(row.get(name), name, speaker, images)))
    _check_all_are_trained(row.get(answered), answered)
    _check_one_place(row, images)
    earlier, trained = (
        sum(turn["role"] == "assistant" for turn in row[name]) if isinstance(row[name], list) else 0
        for name in (asked, answered)
    )
    if earlier and trained > 1:
        raise BadRow(
            f"`{asked}` and `{answered}` both hold turns of the assistant, the latter several. Write the row as `messages`, which trains "
            "all answers, or as one row per answer."
        )
    found = conversation([*_system(row, turns), *turns], images, f"{asked}` and `{answered}")
    (said,) = found.conversations
    return Record(found.images, [replace(said, train_on="all" if trained > 1 else "last")])


def _is_false(value: Any) -> bool:
    """Tells whether a value is false, also as a csv holds it; the number 0 may be one of several labels."""
    return value is False or (isinstance(value, str) and value.strip().lower() in ("false", "0", "0.0"))


PROMPTS = ("prompt", "instruction")
COMPLETIONS = ("completion", "response", "answer", "output")


def llava(row: dict, *, prompt: str | None = None) -> Record:
    """Reads LLaVA's and ShareGPT's form: `conversations` of `{"from": "human", "gpt" or "system", "value"}` (or `role` and `content`).

    `<image>` may stand anywhere in what the human says; a column `system` is optional. `prompt` replaces the human's words, which in
    LLaVA-Pretrain are one of eleven ways to ask for a caption.
    """
    images = images_of(row)
    said = items(column_of(row, "conversations"), "conversations")
    keys = ("role", "content") if isinstance(said[0], dict) and "role" in said[0] else ("from", "value")
    turns = turns_of(said, "conversations", *keys, images)
    _check_all_are_trained(said, "conversations")
    turns = [*_system(row, turns), *turns]
    if prompt is not None:
        asked = {"type": "text", "text": prompt.strip()}
        turns = [
            (speaker, [*(part for part in parts if part["type"] == "image"), asked] if speaker == "user" else parts)
            for speaker, parts in turns
        ]
    return conversation(turns, images, "conversations")


def preference(row: dict) -> Record:
    """Reads TRL's preferences: `prompt` (or `question`), the better answer `chosen` and the worse one `rejected`, as texts or as lists of
    messages; without a prompt `chosen` and `rejected` are whole conversations that differ in the last answer.

    Stages other than 5 train the chosen answer.
    """
    asked = next((name for name in (*PROMPTS, "question") if row.get(name) is not None), None)
    found = {}
    for name in ("chosen", "rejected"):
        images = images_of(row)
        turns: list[Turn] = []
        for column, speaker in ((asked, "user"), (name, "assistant")):
            if column is None:
                continue
            if isinstance(row.get(column), list):
                turns += turns_of(row[column], column, "role", "content", images)
            else:
                turns.append((speaker, parts_of(row.get(column), column, speaker, images)))
        _check_one_place(row, images)
        turns = [*_system(row, turns), *turns]
        found[name] = conversation(turns, images, f"{asked}` and `{name}" if asked else name, "preference")
    better, worse = (found[name].conversations[0] for name in ("chosen", "rejected"))
    if better.messages != worse.messages:
        raise BadRow(
            "`chosen` and `rejected` answer different prompts. Give both the same messages before the last answer."
        )
    if better.responses == worse.responses:
        raise BadRow(
            f"`chosen` and `rejected` are both {shown(better.responses[0])}. Remove the row: it prefers nothing."
        )
    said = replace(better, train_on="last", rejected=worse.responses)
    return Record(found["chosen"].images, [said])


RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


def texts(
    row: dict,
    *,
    min_relevance: int | None = None,
    min_image_correspondence: int | None = None,
    min_visual_dependency: int | None = None,
    min_formatting: int | None = None,
) -> Record | None:
    """Reads The Cauldron's and FineVision's form: `texts` of `{"user", "assistant"}`, one conversation.

    Leaves out turns that FineVision rates (1 to 5) below the minimum; a turn without a rating stays. Leaves out a row without any turn
    left.
    """
    wanted = dict(
        zip(RATINGS, (min_relevance, min_image_correspondence, min_visual_dependency, min_formatting), strict=True)
    )
    images = images_of(row)
    turns: list[Turn] = []
    kinds = set()
    for index, turn in enumerate(items(column_of(row, "texts"), "texts")):
        if any(_rated_lower(row, name, index, least) for name, least in wanted.items() if least is not None):
            continue
        asked, answered = (entry(turn, key, f"texts[{index}]") for key in ("user", "assistant"))
        turns.append(("user", parts_of(asked, f"texts[{index}].user", "user", images)))
        turns.append(("assistant", parts_of(answered, f"texts[{index}].assistant", "assistant", images)))
        kinds.add(_kind(turn.get("source"), f"texts[{index}].source"))
    if not turns:
        return None
    return conversation(turns, images, "texts", kinds.pop() if len(kinds) == 1 else "")


def _rated_lower(row: dict, name: str, index: int, least: int) -> bool:
    column = f"{name}_ratings"
    if row.get(column) is None:
        raise BadRow(f"min_{name}={least} needs the column `{column}`, which the row does not have.")
    ratings = row[column]
    return index < len(ratings) and ratings[index] is not None and ratings[index] < least


def question(
    row: dict,
    *,
    instruction: str = "",
    language: str | None = None,
    kind_column: str | None = None,
    all_answers: bool = False,
) -> Record | None:
    """Reads a `question` about the image with its answer.

    The answer is `answer`, VQAv2's `multiple_choice_answer` (the most frequent of its ten people's), or the most frequent of `answers`, the
    first among equals. A `hint` or `context` stands before the question.

    Args:
        instruction: a text after each question.
        language: reads only rows with this `q_lang` (SLAKE).
        kind_column: the column that says what kind of question it is; None: `answer_type` or `type`.
        all_answers: take everyone's answers, for a metric that judges by all of them.
    """
    if language is not None and row.get("q_lang") != language:
        return None
    images = images_of(row)
    if not images and (columns := [name for name in row if is_image_column(name)]):
        raise BadRow(f"`{columns[0]}` is empty. Name the image the question is about, or remove the row.")
    asked = text(row.get("question"), "question")
    name = next((name for name in ANSWERS if row.get(name) is not None), "answer")
    if all_answers and row.get("answers") is not None:
        name = "answers"
    if name == "answers" or (all_answers and isinstance(row.get(name), list)):
        answers = _given(row[name], name, may_be_empty=all_answers)
        answers = answers if all_answers else [Counter(answers).most_common(1)[0][0]]
    else:
        if all_answers and name == "multiple_choice_answer":
            raise BadRow(
                f"The row has no `answers`: `{name}` is only the most frequent of them, and people's agreement is judged by all. Add them, or "
                "judge by this one answer: --task local."
            )
        answers = [_single(row.get(name), name)]
    asked = with_context(row, f"{asked} {instruction}".strip())
    columns = ("answer_type", "type") if kind_column is None else (kind_column,)
    kinds = (text(row[name], name, may_be_empty=True) for name in columns if isinstance(row.get(name), str))
    kind = next(kinds, "question")
    return Record(images, [one_turn(asked, answers, len(images), kind)])


def with_context(row: dict, asked: str) -> str:
    """Returns a question with what its `hint` and its `context` say before it."""
    found = [text(row[name], name, may_be_empty=True) for name in ("hint", "context") if _filled(row.get(name))]
    return "\n".join([*(f"Context: {said}" for said in found if said), asked])


ANSWERS = ("multiple_choice_answer", "answer", "answers")


def _given(answers: Any, column: str, may_be_empty: bool) -> list[str]:
    """Returns the answers of several people: texts, or mappings with `answer`."""
    return [
        text(
            answer["answer"] if isinstance(answer, dict) and "answer" in answer else answer,
            f"{column}[{index}]",
            may_be_empty,
        )
        for index, answer in enumerate(items(answers, column))
    ]


def _single(value: Any, column: str) -> str:
    """Returns one caption or answer.

    Raises:
        BadRow: also for a list of them that is written as a text, as a csv holds it. A list of other values may be what is asked for.
    """
    said = text(value, column)
    if said.startswith("[") and said.endswith("]"):
        try:
            found = ast.literal_eval(said)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return said
        if found and all(
            isinstance(item, str) or (isinstance(item, dict) and {"raw", "answer"} & {*item}) for item in found
        ):
            raise BadRow(
                f"`{column}` is {shown(value)}, a list written as a text, which would be learned with its brackets. Write a row for each "
                f"item, or JSON lines with the list in `{'answers' if column in ANSWERS else 'captions'}`."
            )
    return said


BY_LETTER = "Answer with the option's letter from the given choices directly."


def multiple_choice(row: dict, *, instruction: str = BY_LETTER, kind_column: str | None = None) -> Record:
    """Reads a `question` with `choices` (or `options`), which is answered by a letter; a `hint` or `context` stands before it, as in ScienceQA.

    The `answer` is the letter, or the right choice's index from 0. A question without a column of choices lists them itself, as A to D (MMStar).

    Args:
        instruction: a text after the choices.
        kind_column: the column that says what kind of question it is.
    """
    images = images_of(row)
    asked = text(row.get("question"), "question")
    column = next((name for name in ("choices", "options") if row.get(name) is not None), None)
    if column is None:
        choices, listed = list("ABCD"), asked
    else:
        choices = [text(choice, f"{column}[{index}]") for index, choice in enumerate(items(row[column], column))]
        listed = f"{asked}\n{lettered(choices)}"
    letters = letters_of(len(choices))
    answer = str(row.get("answer")).strip()
    answer = letters[int(answer)] if answer.isdecimal() and int(answer) < len(letters) else answer
    if answer not in letters:
        raise BadRow(
            f"`answer` is {shown(row.get('answer'))}; expected one of {', '.join(letters)}, or an index from 0."
        )
    prompt = with_context(row, listed)
    kind = row.get(kind_column) if kind_column is not None else None
    turn = one_turn(f"{prompt}\n{instruction}".strip(), [answer], len(images), kind or "multiple_choice")
    return Record(images, [replace(turn, choices=choices)])


def own_choices(row: dict, *, instruction: str = BY_LETTER) -> Record:
    """Reads `multiple_choice` of anybody's data: the choices may also stand in columns `A`, `B` and so on, as in MMBench, and the `answer` may
    also be the right choice itself.

    Raises:
        BadRow: also for an answer that is a choice, and the index of another.
    """
    name = "options" if _filled(row.get("options")) and not _filled(row.get("choices")) else "choices"
    if not _filled(row.get(name)) and _filled(row.get("A")):
        row = {**row, name: _choices_in_columns(row)}
    choices = [text(choice, f"{name}[{index}]") for index, choice in enumerate(items(row.get(name), name))]
    answer = row.get("answer")
    if isinstance(answer, str) and answer.strip() in choices:
        answer = answer.strip()
        index = choices.index(answer)
        others = [int(answer)] if answer.isdecimal() else []
        others += [letters_of(len(choices)).index(answer)] if answer in letters_of(len(choices)) else []
        if any(other != index and other < len(choices) for other in others):
            raise BadRow(
                f"`answer` is {shown(answer)}, which is one of `{name}` and the index or letter of another. Write the index as a number."
            )
        answer = index
    return multiple_choice({**row, name: choices, "answer": answer}, instruction=instruction)


def _choices_in_columns(row: dict) -> list[str]:
    """Returns the choices of the columns `A`, `B` and so on, without those that are empty at the end."""
    letters = [letter for letter in letters_of(26) if _filled(row.get(letter))]
    if len(letters) < 2 or letters != letters_of(len(letters)):
        raise BadRow(
            f"Choices stand in {', '.join(f'`{letter}`' for letter in letters)}; expected at least `A` and `B`, and none left out."
        )
    return [text(row[letter], letter) for letter in letters]


def letters_of(count: int) -> list[str]:
    """Returns the letters of that number of choices.

    Raises:
        BadRow: for more choices than letters.
    """
    if count > 26:
        raise BadRow(
            f"A question has {count} choices, and there are 26 letters to answer by. Remove choices, or ask without them."
        )
    return [chr(ord("A") + index) for index in range(count)]


def lettered(choices: list[str]) -> str:
    """Returns the lines of a prompt that list choices."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters_of(len(choices)), choices))


def questions(row: dict, *, instruction: str = "") -> Record:
    """Reads all questions of an image in one row: `questions` of `{"question", "answer", "type"}`."""
    images = images_of(row)
    found = []
    for index, asked in enumerate(items(column_of(row, "questions"), "questions")):
        place = f"questions[{index}]"
        entry(asked, "question", place)
        try:
            found += question({**asked, "images": images}, instruction=instruction).conversations
        except BadRow as error:
            raise BadRow(f"{place}: {error}") from error
    return Record(images, found)


def captions(row: dict, *, prompt: str = CAPTION_PROMPT) -> Record:
    """Reads an image with captions, all answers to one `prompt`: a list (of texts, or Karpathy's `{"raw": text}`), or one text."""
    images = images_of(row)
    if not images:
        raise BadRow("A caption without an image: `image` is empty.")
    return Record(images, [one_turn(prompt.strip(), _captions(row), len(images), "short_caption")])


def _captions(row: dict) -> list[str]:
    """Returns the captions of the first column that holds any."""
    present = [name for name in (*CAPTION_COLUMNS, "text") if row.get(name) is not None]
    name = next((name for name in present if row[name]), next(iter(present), None))
    if name is None:
        raise BadRow(f"No caption: none of the columns {', '.join(CAPTION_COLUMNS)} is filled.")
    if not isinstance(row[name], list):
        return [_single(row[name], name)]
    return [
        text(caption["raw"] if isinstance(caption, dict) and "raw" in caption else caption, f"{name}[{index}]")
        for index, caption in enumerate(items(row[name], name))
    ]


def annotations(row: dict) -> Record:
    """Reads exchanges about the images: `annotations` of `{"prompt", "response", "kind"}`."""
    images = images_of(row)
    found = []
    for index, annotation in enumerate(items(column_of(row, "annotations"), "annotations")):
        place = f"annotations[{index}]"
        asked = text(entry(annotation, "prompt", place), f"{place}.prompt", may_be_empty=True)
        answered = text(annotation.get("response"), f"{place}.response")
        found.append(one_turn(asked, [answered], len(images), _kind(annotation.get("kind"), f"{place}.kind")))
    return Record(images, found)


def _kind(value: Any, column: str) -> str:
    return "" if value is None else text(value, column, may_be_empty=True)


def record(row: dict) -> Record:
    """Reads a record as `Record.to_row` writes it: `images` and `conversations` of `{"messages", "responses", "train_on", "kind"}`."""
    try:
        found = Record.from_row({**row, "images": images_of(row), "conversations": column_of(row, "conversations")})
    except BadRow:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise BadRow(f"`conversations` is no list of conversations: {error}") from error
    for index, conversation in enumerate(found.conversations):
        for number, message in enumerate(conversation.messages):
            for part in Conversation.parts(message):
                if part["type"] == "text":
                    _check_text_part(part, f"conversations[{index}].messages[{number}]", message["role"])
        for number, response in enumerate(conversation.responses):
            text(response, f"conversations[{index}].responses[{number}]")
    return found


def plain_text(row: dict) -> Record:
    """Reads a `text` without an image, which is trained without a chat template."""
    return Record([], [one_turn("", [text(column_of(row, "text"), "text")])])


def label(row: dict, *, prompt: str = "", names: list[str] | None = None) -> Record:
    """Reads an `imagefolder`: captions from its metadata file (`text`, `caption`), else the name of each image's folder."""
    _check_no_question_is_left_out(row, "imagefolder")
    if names is None:
        return captions(row, prompt=prompt or CAPTION_PROMPT)
    images = images_of(row)
    named = names[row["label"]].replace("_", " ")
    return Record(images, [one_turn(prompt or "What does the picture show?", [named], len(images), "label")])


def webdataset(row: dict, *, prompt: str = CAPTION_PROMPT) -> Record | None:
    """Reads a sample of a webdataset: images, and a caption in `.txt`, or a `.json` whose keys are the columns of any other schema.

    Raises:
        BadRow: also for a sample without an image that would be trained as plain text.
    """
    sample = _columns_of(row)
    if not sample["images"] and format_of(sample) == "plain_text":
        raise BadRow(
            f"The sample has no image, only texts: `text` is {shown(sample['text'])}. Put the image beside it, named after the sample with "
            f"one of the extensions {', '.join(IMAGE_EXTENSIONS)}; remove the sample; or write `name: text` to train texts alone."
        )
    found = record_of(sample, prompt=prompt)
    if found is not None:
        check_all_is_seen(sample, found)
    return found


def _columns_of(sample: dict) -> dict:
    """Returns what the members of a webdataset's sample hold as the columns of a row, with `images`."""
    content = {} if sample.get("json") is None else sample["json"]
    if not isinstance(content, dict):
        raise BadRow(f"`json` is {shown(content)}; expected a mapping of column names to values.")
    caption = {} if sample.get("txt") is None else {"text": sample["txt"]}
    return {**content, **caption, "images": images_of(sample)}


def text_only(row: dict) -> Record | None:
    """Reads any schema of `FORMATS` without its images, the parts of messages that show them, and `<image>` in what the user says."""
    row = _columns_of(row) if "__key__" in row else row
    return record_of({name: _bare(value, name in ASKED) for name, value in row.items() if not is_image_column(name)})


ASKED = (*PROMPTS, "question", "input", "user")  # columns and keys of what a user says


def _bare(value: Any, is_asked: bool) -> Any:
    """Returns a value without the parts of lists that are images, and without `<image>` in what the user says."""
    if isinstance(value, str) and is_asked and IMAGE_TOKEN in value:
        return _PLACEHOLDER.sub(lambda found: "\n" if "\n" in found[0] else " ", value).strip()
    if isinstance(value, list):
        return [_bare(item, is_asked) for item in value if not _is_image_part(item)]
    if isinstance(value, dict):
        of_user = SPEAKERS.get(str(value.get("role", value.get("from")))) == "user"
        said = ("content", "value") if of_user else ASKED
        return {key: _bare(item, key in said) for key, item in value.items()}
    return value


_PLACEHOLDER = re.compile(rf"\s*{IMAGE_TOKEN}\s*")


def _is_image_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in ("image", "image_url")


@dataclass(frozen=True)
class Format:
    """A row schema: its function, and the columns a row needs: at least one of each tuple."""

    read: Callable[..., Record | None]
    needs: tuple[tuple[str, ...], ...]


# The first whose columns a row has is taken.
FORMATS: dict[str, Format] = {
    "webdataset": Format(webdataset, (("__key__",),)),
    "annotations": Format(annotations, (("annotations",),)),
    "messages": Format(messages, (("messages",),)),
    "questions": Format(questions, (("questions",),)),
    "texts": Format(texts, (("texts",),)),
    "record": Format(record, (("conversations",),)),
    "preference": Format(preference, (("chosen",), ("rejected",))),
    "llava": Format(llava, (("conversations",),)),
    "multiple_choice": Format(own_choices, (("question",), ("choices", "options", "A"), ("answer",))),
    "question": Format(question, (("question",), ANSWERS)),
    "prompt_completion": Format(prompt_completion, (PROMPTS, COMPLETIONS)),
    "captions": Format(captions, (IMAGE_COLUMNS, (*CAPTION_COLUMNS, "text"))),
    "plain_text": Format(plain_text, (("text",),)),
}


def record_of(row: dict, *, prompt: str | None = None) -> Record | None:
    """Makes the record of a row of any schema of `FORMATS`, chosen by its columns. Captions answer to `prompt`.

    Raises:
        BadRow: for a row that matches no schema; the message shows its columns, and what it lacks of the nearest schemas.
    """
    name = format_of(row)
    _check_no_question_is_left_out(row, name)
    options = {"prompt": prompt} if prompt is not None and name == "captions" else {}
    return FORMATS[name].read(row, **options)


def _check_no_question_is_left_out(row: dict, name: str) -> None:
    """Refuses a row with a filled column that belongs to the question and that the schema told by its columns does not read.

    Raises:
        BadRow: naming the column.
    """
    if name in ("captions", "plain_text", "imagefolder"):
        left_out = [column for column in (*PROMPTS, "question") if _filled(row.get(column))]
        remedy = "name the caption `completion`, remove the column, or write `format: captions` to ask by one prompt."
        if name == "plain_text":
            remedy = "name the answer `completion`, remove the column, or write `format: plain_text` to train the text alone."
        if name == "imagefolder":
            remedy = "name the caption `completion` and leave out `name: imagefolder`, or remove the column to ask by one prompt."
    elif name == "question":
        left_out = [column for column in row if _CHOICE_COLUMN.fullmatch(column) and _filled(row[column])]
        left_out = left_out if len(left_out) > 1 else []
        remedy = "name the choices `A`, `B` and so on, or write `format: question` to ask without them."
    elif name == "preference" or (name == "prompt_completion" and row.get("prompt") is not None):
        left_out = (
            ["context"] if _filled(row.get("context")) and str(row["context"]) not in str(row.get("prompt")) else []
        )
        remedy = f"put it into the prompt, remove the column, or write `format: {name}` to ask without it."
    else:
        return
    if left_out:
        raise BadRow(f"`{left_out[0]}` is {shown(row[left_out[0]])}, which `{name}` does not ask: {remedy}")


_CHOICE_COLUMN = re.compile(r"[a-f]|(?:option|choice)s?[ _]?(?:[a-f]|[1-6])", re.IGNORECASE)


def format_of(row: dict) -> str:
    """Returns the name of the schema that fits a row's columns.

    Prefers a schema all of whose columns are filled. Otherwise takes the one with the most columns filled and the others there but empty,
    so that its function can say what is missing.

    Raises:
        BadRow: if there is none.
    """
    filled = {name for name, value in row.items() if _filled(value)}
    found: dict[str, int] = {}
    for name, form in FORMATS.items():
        if name == "record" and not _is_record(row.get("conversations")):
            continue
        if all(needed & row.keys() for needed in map(set, form.needs)):
            found[name] = sum(bool(needed & filled) for needed in map(set, form.needs))
    complete = [name for name, count in found.items() if count == len(FORMATS[name].needs)]
    begun = sorted((name for name, count in found.items() if count), key=lambda name: -found[name])
    if not complete and not begun:
        raise BadRow(_no_format(row))
    return [*complete, *begun][0]


def _is_record(conversations: Any) -> bool:
    first = conversations[0] if isinstance(conversations, list) and conversations else None
    return isinstance(first, dict) and "responses" in first


def _no_format(row: dict) -> str:
    """Returns the message for a row that matches no schema: its columns, and what it lacks of the nearest schemas."""
    there = sorted(name for name, value in row.items() if value is not None)
    filled = {name for name in there if _filled(row[name])}
    known = {name for form in FORMATS.values() for needed in form.needs for name in needed}
    hints = []
    for name, form in FORMATS.items():
        missing = [needed for needed in form.needs if not filled & set(needed)]
        if len(missing) < len(form.needs):
            hints.append(f"`{name}` lacks {' and '.join(' or '.join(needed) for needed in missing)}")
    for name in there:
        if name not in known and (match := get_close_matches(name, known, n=1, cutoff=0.75)):
            hints.append(f"`{name}` may be meant as `{match[0]}`")
        elif name not in known and isinstance(value := row[name], list) and value and isinstance(value[0], dict):
            hints.append(f"`{name}` holds {len(value)} mappings: if these are the rows, save this list alone")
    if not filled and not hints:
        return f"The row is empty: none of its columns {sorted(row)} has a value. Remove it."
    return (
        f"The row matches no schema: it has {there}; {'; '.join(hints) or 'none comes near'}. Schemas: {', '.join(FORMATS)} "
        "(docs/data.md)."
    )


def options_of(read: Callable[..., Any]) -> list[str]:
    """Returns the options of a schema's function that a recipe may set."""
    parameters = inspect.signature(read).parameters.items()
    return [name for name, p in parameters if p.kind is p.KEYWORD_ONLY and name != "names"]


def check_options(read: Callable[..., Any]) -> None:
    """Checks the types of the options that a schema's function is given as a `functools.partial`.

    Raises:
        ValueError: also for a text that holds the image placeholder, which no option can give an image.
    """
    if not isinstance(read, partial):
        return
    parameters = inspect.signature(read.func).parameters
    for name in read.keywords.keys() & set(options_of(read.func)):
        value, kind = read.keywords[name], parameters[name].annotation
        kinds = get_args(kind) or (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name}={shown(value)}. Expected {EXPECTED[kinds[0]]}; or leave it out.")
        if isinstance(value, str) and IMAGE_TOKEN in value:
            raise ValueError(f"{name}={shown(value)} holds the image placeholder {IMAGE_TOKEN}. Remove it.")


EXPECTED = {str: "a text, in quotes", int: "a whole number, without quotes", bool: "true or false, without quotes"}
