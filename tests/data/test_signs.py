"""Drawn signs: reproducible, split by composition, right in every answer, and readable only at the size of their grid."""

import io

import numpy as np
import pytest
from PIL import Image

from alignvlm.data import scenes, signs
from alignvlm.data.record import Record
from alignvlm.data.sources import read_source


def test_same_arguments_same_records_and_other_seeds_others():
    first, again, other = (signs.make_signs(3, seed=seed) for seed in (3, 3, 4))
    assert first.to_list() == again.to_list() != other.to_list()


def test_no_held_out_composition_is_ever_trained_on():
    def compositions(split: str, count: int) -> set:
        rng = np.random.default_rng(0)
        drawn = [signs.random_signs(rng, split) for _ in range(count)]
        return {frozenset((sign.colour, sign.text) for sign in scene.signs) for scene in drawn}

    assert not compositions("train", 2000) & compositions("test", 300)


def test_every_question_has_one_right_answer():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = signs.random_signs(rng, "train")
        text_of = {sign.colour: sign.text for sign in scene.signs}
        colour_of = {text: colour for colour, text in text_of.items()}
        assert len(colour_of) == len(text_of) == len(scene.signs) == len({sign.cell for sign in scene.signs})
        for question, answer, kind in signs.sign_questions(scene):
            words = question.rstrip("?").split()
            if kind == "count":
                assert signs.COUNTS.index(answer) == len(scene.signs)
            elif kind == "find":
                assert answer == colour_of[words[-1]]
            else:
                assert answer == text_of[words[-2]] and answer.isdigit() == (kind == "read_number") == (
                    "number" in words
                )


def read(picture: np.ndarray) -> set[str]:
    """Finds the texts in a picture by the shapes of their letters, as whoever sees two by two pixels could."""
    white = (picture.min(-1) > 200).astype(int)
    found = {}
    for letter, rows in signs._DOTS.items():
        dots = np.array([[int(row, 8) >> (2 - x) & 1 for x in range(3)] for row in rows])
        pattern = np.pad(np.kron(dots, np.ones((2, 2), int)), 2)
        windows = np.lib.stride_tricks.sliding_window_view(white, pattern.shape)
        for y, x in zip(*np.nonzero((windows == pattern).all((-2, -1)))):
            found[int(y), int(x)] = letter
    texts = set()
    for y, x in found:
        if (y, x - 8) not in found:
            text = ""
            while (y, x) in found:
                text, x = text + found[y, x], x + 8
            texts.add(text)
    return texts


def test_signs_can_be_read_at_the_size_of_their_grid():
    """The font has one shape for 0 and o."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = signs.random_signs(rng, "test")
        picture = signs.draw_signs(scene, rng)
        assert picture.size == (scene.grid[1] * 64, scene.grid[0] * 64)
        texts = {text.replace("0", "o") for text in read(np.asarray(picture))}
        assert texts == {sign.text.replace("0", "o") for sign in scene.signs}


def test_the_catalogue_draws_them():
    source = read_source({"name": "scene_signs", "count": 2, "split": "test", "seed": 5})
    record = Record.from_row(source[0])
    expected = Record.from_row(signs.make_signs(2, "test", seed=5)[0])
    assert record.conversations == expected.conversations
    image = Image.open(io.BytesIO(record.images[0]["bytes"]))
    assert min(image.size) >= 64 and image.size[0] * image.size[1] >= 4 * 64**2


@pytest.mark.parametrize("options", [{"split": "dev"}, {"image_size": 30}])
def test_other_options_are_refused(options):
    with pytest.raises(ValueError, match="expected train or test, and at least 40 pixels"):
        signs.make_signs(1, **options)


def test_signs_and_scenes_have_the_same_columns():
    assert signs.make_signs(1).features == scenes.make_scenes(1).features
