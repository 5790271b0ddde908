"""Drawn scenes with small signs to read, larger than an encoder's input and of many shapes: what tiles are for.

A scene is two to four signs, each of a colour of its own and with a number of two digits or a word, in the cells of a grid. Reduced to one
square, a sign's strokes are thinner than a pixel; in the tiles of the scene's grid they are two pixels wide. Questions ask for what is
written, or where. As in `scenes.py`, a hash of the composition decides whether a scene is for training or held out.
"""

import io
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

from alignvlm.data.record import Record, one_turn
from alignvlm.data.scenes import COLOURS, RECORD_FEATURES, Split, split_of_key


GRIDS = ((2, 3), (3, 2), (1, 4), (4, 1))  # rows and columns of cells
WORDS = ("bank", "cafe", "exit", "open", "sale", "stop", "taxi", "zoo")
COUNTS = ("zero", "one", "two", "three", "four")
STROKE = 2  # pixels

# Each sign in three columns and five rows of dots, a row an octal digit.
_DOTS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71122", "8": "75757",
    "9": "75717", "a": "25755", "b": "65656", "c": "34443", "e": "74647", "f": "74644", "i": "72227", "k": "55655", "l": "44447",
    "n": "65555", "o": "75557", "p": "65644", "s": "34216", "t": "72222", "x": "55255", "z": "71247",
}  # fmt: skip


@dataclass(frozen=True)
class Sign:
    """A sign: its colour, what is written on it, and its cell `(row, column)`."""

    colour: str
    text: str
    cell: tuple[int, int]

    @property
    def what(self) -> str:
        return "number" if self.text.isdigit() else "word"


@dataclass(frozen=True)
class SignScene:
    """The grid of a scene, and its signs in reading order."""

    grid: tuple[int, int]
    signs: tuple[Sign, ...]

    @property
    def split(self) -> Split:
        """The split of what is written on which colour, wherever the signs stand."""
        return split_of_key("|".join(sorted(f"{sign.colour} {sign.text}" for sign in self.signs)))


def random_signs(rng: np.random.Generator, split: Split) -> SignScene:
    """Draws two to four signs of different colours and texts in different cells, again until the composition belongs to `split`."""
    while True:
        rows, columns = GRIDS[rng.integers(len(GRIDS))]
        count = int(rng.integers(2, 5))
        cells = sorted(divmod(int(cell), columns) for cell in rng.permutation(rows * columns)[:count])
        colours = rng.permutation(list(COLOURS))[:count]
        texts: list[str] = []
        while len(texts) < count:
            text = f"{rng.integers(10, 100)}" if rng.random() < 0.6 else WORDS[rng.integers(len(WORDS))]
            texts += [text] if text not in texts else []
        scene = SignScene((rows, columns), tuple(map(Sign, map(str, colours), texts, cells)))
        if scene.split == split:
            return scene


def draw_signs(scene: SignScene, rng: np.random.Generator, image_size: int = 64) -> Image.Image:
    """Draws a scene whose cells are squares of `image_size` pixels: a grey ground with noise, and plates with white text."""
    return draw_signs_at(scene, rng, image_size)[0]


def draw_signs_at(
    scene: SignScene, rng: np.random.Generator, image_size: int = 64
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """As `draw_signs`, and where each sign is: `(left, top, right, bottom)` in pixels."""
    rows, columns = scene.grid
    places = []
    ground = (int(rng.integers(90, 170)),) * 3
    image = Image.new("RGB", (columns * image_size, rows * image_size), ground)
    canvas = ImageDraw.Draw(image)
    for sign in scene.signs:
        width, height = STROKE * (4 * len(sign.text) + 1), STROKE * 7
        row, column = sign.cell
        left = column * image_size + int(rng.integers(1, image_size - width))
        top = row * image_size + int(rng.integers(1, image_size - height))
        places.append((left, top, left + width, top + height))
        canvas.rectangle((left, top, left + width - 1, top + height - 1), fill=COLOURS[sign.colour])
        for place, letter in enumerate(sign.text):
            for y, dots in enumerate(_DOTS[letter]):
                for x in range(3):
                    if int(dots, 8) >> (2 - x) & 1:
                        corner = left + STROKE * (1 + 4 * place + x), top + STROKE * (1 + y)
                        canvas.rectangle(
                            (*corner, corner[0] + STROKE - 1, corner[1] + STROKE - 1), fill=(255, 255, 255)
                        )
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + rng.normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), places


def sign_questions(scene: SignScene) -> list[tuple[str, str, str]]:
    """Asks what each sign says, which colour says it, and how many there are. Returns question, answer and kind, each with one answer."""
    asked = []
    for sign in scene.signs:
        asked.append((f"What {sign.what} is on the {sign.colour} sign?", sign.text, f"read_{sign.what}"))
        asked.append((f"What colour is the sign with {sign.text}?", sign.colour, "find"))
    return [*asked, ("How many signs are there?", COUNTS[len(scene.signs)], "count")]


def make_signs(count: int, split: Split = "train", seed: int = 0, image_size: int = 64) -> Dataset:
    """Makes records of drawn signs with their questions: the same for the same arguments.

    Args:
        count: number of scenes.
        split: `train` or `test`; what is written on which colour never overlaps.
        image_size: side in pixels of a cell of the scene's grid, at least 40: that of the encoder's input.

    Returns:
        `datasets.Dataset` of records as `Record.to_row` writes them, with one image; a conversation's `kind` is `read_number`,
        `read_word`, `find` or `count`.
    """
    if split not in ("train", "test") or image_size < 40:
        raise ValueError(f"split={split!r}, image_size={image_size}: expected train or test, and at least 40 pixels.")
    rng = np.random.default_rng([seed, 3, split == "test"])
    records = []
    for _ in range(count):
        scene = random_signs(rng, split)
        image = io.BytesIO()
        draw_signs(scene, rng, image_size).save(image, "BMP")
        asked = [one_turn(question, [answer], 1, kind) for question, answer, kind in sign_questions(scene)]
        records.append(Record([{"bytes": image.getvalue()}], asked).to_row())
    return Dataset.from_list(records, features=RECORD_FEATURES)
