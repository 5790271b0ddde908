"""The embedded sample data: drawn scenes with captions and questions, so that everything runs without a download.

A scene is one or two shapes, each with a colour, a kind, a size and a quadrant of a noisy image. The image, a short human-like
caption, a detailed caption and questions with exact answers all come from the same list of shapes. A hash of the composition
decides whether a scene is for training or held out, so no held-out combination is ever trained on, whatever the seed.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from alignvlm.data.formats import CAPTION_PROMPT, DETAILED_PROMPT
from alignvlm.data.record import Record, one_turn


COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 217), "yellow": (241, 196, 15)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.2, "large": 0.4}  # side of the bounding box, as a share of the image's side
POSITIONS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
QUESTION_KINDS = ("yes_no", "colour", "count", "position")
NUMBER_WORDS = ("zero", "one", "two")
HELD_OUT_SHARE = 0.1

Split = Literal["train", "test"]
AnnotationType = Literal["short_caption", "detailed_caption", "questions"]


@dataclass(frozen=True)
class Shape:
    """One drawn shape: its colour, kind, size and quadrant, each in the words of the captions."""

    colour: str
    kind: str
    size: str
    position: str

    def matches(self, **attributes: str) -> bool:
        return all(getattr(self, name) == value for name, value in attributes.items())


Scene = tuple[Shape, ...]


def split_of(scene: Scene) -> Split:
    """Returns the split of a composition, whatever the seed: 10% of all compositions are held out.

    The hash ignores the order of the shapes, so two drawings of one composition always share a split.
    """
    return split_of_key("|".join(sorted(f"{s.colour} {s.kind} {s.size} {s.position}" for s in scene)))


def split_of_key(key: str) -> Split:
    """Returns the split of a composition that is written as `key`, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "test" if bucket < HELD_OUT_SHARE else "train"


def random_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draws one or two shapes in different quadrants, again until the composition belongs to `split`."""
    while True:
        positions = rng.permutation(list(POSITIONS))[: rng.integers(1, 3)]
        scene = tuple(
            Shape(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(list(SIZES))), str(position))
            for position in sorted(positions, key=list(POSITIONS).index)
        )
        if split_of(scene) == split:
            return scene


def draw(scene: Scene, rng: np.random.Generator, image_size: int = 64) -> PILImage.Image:
    """Draws a scene with jittered positions, a random grey background and pixel noise: an RGB image of `image_size` squared."""
    scale = 4  # drawn large and reduced, for smooth edges
    side = image_size * scale
    background = int(rng.integers(90, 170))
    image = PILImage.new("RGB", (side, side), (background,) * 3)
    canvas = ImageDraw.Draw(image)
    for shape in scene:
        cx, cy = ((c + rng.uniform(-0.06, 0.06)) * side for c in POSITIONS[shape.position])
        r = SIZES[shape.size] * side / 2 * rng.uniform(0.92, 1.08)
        colour = tuple(int(np.clip(c + rng.integers(-20, 21), 0, 255)) for c in COLOURS[shape.colour])
        if shape.kind == "circle":
            canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)
        elif shape.kind == "square":
            canvas.rectangle((cx - r, cy - r, cx + r, cy + r), fill=colour)
        elif shape.kind == "triangle":
            canvas.polygon([(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)], fill=colour)
        else:
            arm = r / 3
            canvas.rectangle((cx - arm, cy - r, cx + arm, cy + r), fill=colour)
            canvas.rectangle((cx - r, cy - arm, cx + r, cy + arm), fill=colour)
    pixels = np.asarray(image.reduce(scale), dtype=np.float32)
    pixels = pixels + rng.normal(0, 8, pixels.shape)
    return PILImage.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def short_caption(scene: Scene) -> str:
    """Returns what a person in a hurry would write: colours and shapes only."""
    return "A " + " and a ".join(f"{s.colour} {s.kind}" for s in scene) + "."


def detailed_caption(scene: Scene) -> str:
    """Returns every attribute of every shape, in reading order."""
    return " ".join(f"A {s.size} {s.colour} {s.kind} is at the {s.position}." for s in scene)


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Asks eight questions with one right answer each, two of each kind. Returns question, answer and kind."""
    return [(*ask(scene, rng, index), kind) for kind, ask in _ASK.items() for index in range(2)]


def _pick(rng: np.random.Generator, choices):
    choices = list(choices)
    return choices[rng.integers(len(choices))]


def _ask_yes_no(scene: Scene, rng: np.random.Generator, index: int) -> tuple[str, str]:
    """Asks for a yes about half of the time; for a no, changes attributes of a real shape until no shape fits."""
    names = (("colour", "kind"), ("kind", "position"))[index]
    target = _pick(rng, scene)
    wanted = {name: getattr(target, name) for name in names}
    if rng.random() < 0.5:
        while any(shape.matches(**wanted) for shape in scene):
            name = _pick(rng, names)
            wanted[name] = _pick(rng, {"colour": COLOURS, "kind": SHAPES, "position": POSITIONS}[name])
    found = any(shape.matches(**wanted) for shape in scene)
    if "colour" in wanted:
        return f"Is there a {wanted['colour']} {wanted['kind']}?", "yes" if found else "no"
    return f"Is there a {wanted['kind']} at the {wanted['position']}?", "yes" if found else "no"


def _ask_colour(scene: Scene, rng: np.random.Generator, index: int) -> tuple[str, str]:
    target = _pick(rng, scene)
    if index == 0:
        return f"What colour is the shape at the {target.position}?", target.colour
    alone = sum(shape.kind == target.kind for shape in scene) == 1
    return f"What colour is the {target.kind}{'' if alone else f' at the {target.position}'}?", target.colour


def _ask_count(scene: Scene, rng: np.random.Generator, index: int) -> tuple[str, str]:
    if index == 0:
        return "How many shapes are there?", NUMBER_WORDS[len(scene)]
    name = _pick(rng, ("colour", "kind"))
    if rng.random() < 0.7:
        value = getattr(_pick(rng, scene), name)
    else:
        value = _pick(rng, COLOURS if name == "colour" else SHAPES)
    plural = f"{value} shapes" if name == "colour" else "crosses" if value == "cross" else f"{value}s"
    return f"How many {plural} are there?", NUMBER_WORDS[sum(shape.matches(**{name: value}) for shape in scene)]


def _ask_position(scene: Scene, rng: np.random.Generator, index: int) -> tuple[str, str]:
    """Asks about each shape in turn; of twins, about the first or the second in reading order."""
    target = scene[index % len(scene)]
    twins = sum(shape.matches(colour=target.colour, kind=target.kind) for shape in scene) > 1
    order = ("first " if target is scene[0] else "second ") if twins else ""
    return f"Where is the {order}{target.colour} {target.kind}?", target.position


_ASK = dict(zip(QUESTION_KINDS, (_ask_yes_no, _ask_colour, _ask_count, _ask_position)))


RECORD_FEATURES = Features(
    {
        "images": List(Image()),
        "conversations": List(
            {
                "messages": List(
                    {
                        "role": Value("string"),
                        "content": List({"type": Value("string"), "text": Value("string")}),
                    }
                ),
                "responses": List(Value("string")),
                "train_on": Value("string"),
                "kind": Value("string"),
                "choices": List(Value("string")),
                "rejected": List(Value("string")),
            }
        ),
        "id": Value("string"),
    }
)


def make_scenes(
    count: int,
    split: Split = "train",
    annotations: tuple[AnnotationType, ...] = ("short_caption", "detailed_caption", "questions"),
    seed: int = 0,
    image_size: int = 64,
) -> Dataset:
    """Makes records of drawn scenes: the same for the same arguments, whatever ran before.

    Args:
        count: number of scenes.
        split: `train` or `test`; their compositions never overlap.
        annotations: the annotations of each record, any of `short_caption`, `detailed_caption` and `questions`.
        image_size: side of the square images in pixels.

    Returns:
        `datasets.Dataset` of records as `Record.to_row` writes them, with one image; a conversation's `kind` is the caption's type or the
        question's kind from `QUESTION_KINDS`.
    """
    if not annotations or isinstance(annotations, str) or not set(annotations) <= set(get_args(AnnotationType)):
        raise ValueError(
            f"annotations={annotations!r}. Expected a list of any of {', '.join(get_args(AnnotationType))}."
        )
    if split not in get_args(Split):
        raise ValueError(f"split={split!r}. Valid values: {', '.join(get_args(Split))}.")
    rng = np.random.default_rng([seed, split == "test"])
    records = []
    for _ in range(count):
        scene = random_scene(rng, split)
        image = io.BytesIO()
        draw(scene, rng, image_size).save(image, "BMP")  # lossless, and quick to write and read
        asked = [one_turn(prompt, [response], 1, kind) for prompt, response, kind in annotate(scene, annotations, rng)]
        records.append(Record([{"bytes": image.getvalue()}], asked).to_row())
    return Dataset.from_list(records, features=RECORD_FEATURES)


def annotate(
    scene: Scene, annotations: tuple[AnnotationType, ...], rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """Returns prompt, response and kind of a scene's annotations of the given types."""
    made = []
    if "short_caption" in annotations:
        made.append((CAPTION_PROMPT, short_caption(scene), "short_caption"))
    if "detailed_caption" in annotations:
        made.append((DETAILED_PROMPT, detailed_caption(scene), "detailed_caption"))
    if "questions" in annotations:
        made += questions(scene, rng)
    return made


def make_texts(count: int, split: Split = "train", seed: int = 0) -> Dataset:
    """Makes text-only records about scenes that are not drawn: a detailed caption and a question about it, with the answer."""
    rng = np.random.default_rng([seed, 2, split == "test"])
    records = []
    for _ in range(count):
        scene = random_scene(rng, split)
        asked = questions(scene, rng)
        question, answer, kind = asked[rng.integers(len(asked))]
        records.append(Record([], [one_turn(f"{detailed_caption(scene)} {question}", [answer], kind=kind)]).to_row())
    return Dataset.from_list(records, features=RECORD_FEATURES)
