"""Tells whose text a card is, and renews its metadata without touching text that somebody wrote.

The last line of a card of ours is a comment with the hash of the text above it. A text with another hash was edited by hand.
"""

import hashlib
import re

import yaml
from huggingface_hub.utils import yaml_dump

from hub_upload.licences import FIELDS, strictest


GENERATED = "generated"  # written from the run record, and not edited since
FOLDER = "edited in the folder"  # a card edited in the checkpoint's folder, as it was pushed
HAND = "edited"  # anything else
PLACEHOLDER = "USER/REPOSITORY"  # in the card of a folder, whose repository is not known yet
_MARK = re.compile(
    r"\n*<!-- AlignVLM card: (generated|edited in the folder|edited)(?:, sha256 ([0-9a-f]{64}))?\. .*?-->\n*"
)
_METADATA = re.compile(r"\A\s*---[ \t]*\n(.*?)(?:\n|\A)---[ \t]*(?:\n|\Z)", re.DOTALL)
_HINT = "A card edited by hand keeps its text when the model is pushed again."


def split_card(text: str) -> tuple[dict, str]:
    """Splits a card into its metadata and its body.

    Raises:
        ValueError: if the metadata are not a YAML mapping.
    """
    text = text.replace("\r\n", "\n")
    match = _METADATA.match(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata are no YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its metadata are no mapping of names to values")
    return data, text[match.end() :]


def body_of(text: str) -> str:
    """The text of a card without metadata and mark."""
    return _MARK.sub("\n", split_card(text)[1]).strip()


def is_marked(text: str) -> bool:
    """Whether a card has a mark of this package, true or not."""
    return _MARK.search(text) is not None


def author_of(text: str) -> str:
    """`GENERATED`, `FOLDER` or `HAND`, by the mark; HAND if there is none or the text was changed."""
    mark = _MARK.search(text)
    digest = hashlib.sha256(body_of(text).encode()).hexdigest()
    return mark[1] if mark and mark[2] == digest else HAND


def join_card(data: dict, body: str, author: str) -> str:
    """Joins metadata, text and the mark of its author to a card."""
    body = _MARK.sub("\n", body).strip()
    digest = "" if author == HAND else f", sha256 {hashlib.sha256(body.encode()).hexdigest()}"
    return f"---\n{yaml_dump(data, sort_keys=False).strip()}\n---\n\n{body}\n\n<!-- AlignVLM card: {author}{digest}. {_HINT} -->\n"


def renewed_metadata(theirs: dict, ours: dict, license_given: bool = False) -> dict:
    """Renews the metadata of an existing card by those of a new one.

    Fields that only the existing card has stay, except results (`model-index`), which hold for the old weights. Its language and its
    `model_name` stay, but not the name of `PLACEHOLDER`; its tags stay beside ours. Its license stays if it is the stricter one, unless
    `license_given`.

    Raises:
        ValueError: if neither license is the stricter one.
    """
    if theirs.get("model_name") == PLACEHOLDER.split("/")[-1]:
        theirs = {name: value for name, value in theirs.items() if name != "model_name"}
    merged = {**ours, **{name: value for name, value in theirs.items() if name not in (*ours, "model-index")}}
    merged |= {name: theirs[name] for name in ("language", "model_name") if theirs.get(name)}
    tags = theirs.get("tags") or []
    merged["tags"] = list(dict.fromkeys([*ours.get("tags", []), *(tags if isinstance(tags, list) else [tags])]))
    old, new = ({name: data[name] for name in FIELDS if data.get(name)} for data in (theirs, ours))
    if "license" in old and "license" in new and not license_given and old != new:
        chosen = strictest([old, new])
        if chosen is None:
            raise ValueError(
                f"The card says license {old['license']!r}, and the backbones say {new['license']!r}; neither is the stricter one. "
                "Name the right one: --license LICENSE."
            )
    else:
        chosen = new or old
    return {name: value for name, value in merged.items() if name not in FIELDS or name in chosen} | chosen
