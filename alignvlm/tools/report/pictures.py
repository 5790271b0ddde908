"""Finds the images that an evaluation asked about, and writes images into the page.

A result names its data and their hashes, not where they lie. They are looked for beside the run; `--data` names another place. Data that
changed since are not shown.
"""

import base64
import glob
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from alignvlm.data.images import read_image
from alignvlm.data.record import Conversation
from alignvlm.data.sources import Source
from alignvlm.evaluation.questions import load_source
from alignvlm.tools.contact_sheet import after_processing
from alignvlm.tools.report.read import Result
from modeling_alignvlm import AlignVLMProcessor


LONGEST_SIDE = 320
QUALITY = 80  # of WebP


@dataclass
class Pictures:
    """The images and conversations behind a result's answers; `note` says in a sentence why there are none.

    `source` holds the records, `places` the index of each by its id.
    """

    source: Source | None = None
    places: dict[str, int] = field(default_factory=dict)
    keep_duplicates: bool = False
    note: str = ""
    _conversations: list[list[Conversation]] | None = None

    def images(self, prediction: dict) -> list[Image.Image]:
        """Decodes the images of an answer's record; none if they are not at hand."""
        place = self.places.get(str(prediction.get("id")))
        if place is None:
            return []
        try:
            return [read_image(image) for image in self.source[place]["images"]]
        except (ValueError, OSError):  # one damaged image does not take the report with it
            return []

    def conversation(self, prediction: dict) -> Conversation | None:
        """Returns the conversation that an answer answers."""
        place = self.places.get(str(prediction.get("id")))
        if place is None:
            return None
        if self._conversations is None:
            self._conversations = list(self.source.conversations(self.keep_duplicates))
        asked = (prediction.get("prompt"), prediction.get("references"))
        return next((c for c in self._conversations[place] if (c.prompt, c.responses) == asked), None)


def pictures_of(result: Result, data: str | None, near: list[Path]) -> Pictures:
    """Looks for the data of a result: in `data`, else by their name in the folders `near`."""
    identity = result.content.get("data") or {}
    name = str(identity.get("data", ""))
    found = [Path(data)] if data else _places(name, near)
    found = [place for place in found if place.exists()]
    if not found:
        where = data or name or "unknown"
        return Pictures(
            note=f"The images are not shown: the data ({where}) were not found. Name their folder with --data."
        )
    keep = identity.get("exact_duplicates_are") == "kept"
    for place in found:
        try:
            source = load_source(
                result.task, str(identity.get("split", "test")), str(place), keep_duplicates=keep, on_bad_row="skip"
            )
        except (ValueError, OSError) as error:
            note = f"The images are not shown: {place.name} could not be read. {error}"
            continue
        if _hashes(source.identity) != _hashes(identity):
            note = f"The images are not shown: {place.name} has changed since the evaluation, or is other data of that name."
            continue
        ids = source.ids or map(str, range(len(source)))
        return Pictures(source, {str(each): index for index, each in enumerate(ids)}, keep)
    return Pictures(note=note)


def _places(name: str, near: list[Path]) -> list[Path]:
    """Returns where data of a name may be: in the folders, and up to two below the first."""
    if not name or name in (".", "..") or "/" in name or glob.has_magic(name):
        return []
    below = [place for pattern in (f"*/{name}", f"*/*/{name}") for place in sorted(near[0].glob(pattern))]
    return [*(folder / name for folder in near), *below]


def _hashes(identity: dict) -> list:
    files = identity.get("files")
    return sorted(str(file.get("sha256")) for file in files) if isinstance(files, list) else [identity.get("data")]


def data_uri(image: Image.Image, longest_side: int = LONGEST_SIDE) -> str:
    """Returns an image as WebP in a `data:` address, made smaller where it is larger."""
    image = image.convert("RGB")
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY if max(image.size) > 128 else 95)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def as_seen(image: Image.Image, processor: AlignVLMProcessor) -> Image.Image:
    """Returns what the model sees of an image: all of it, stretched to the encoder's input, or what cropping and padding make of it."""
    image_processor = processor.image_processor
    if not getattr(image_processor, "do_center_crop", False) and not getattr(image_processor, "do_pad", False):
        return image
    return after_processing(image, processor)
