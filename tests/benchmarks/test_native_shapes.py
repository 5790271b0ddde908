"""The scenes of `benchmarks/native_shapes.py`, and a run of it with almost no training."""

import json
from dataclasses import replace

import numpy as np
import pytest

from alignvlm.data.images import read_image
from alignvlm.data.scenes import COLOURS
from benchmarks import native_shapes
from benchmarks.native_shapes import ARMS, ASPECTS, PROPORTIONS, SIDE, Scene, Sizes, draw, make_records, patch_labels


SCENES = [
    Scene(aspect, (("red", one), ("blue", other)))
    for aspect in ASPECTS
    for one in PROPORTIONS
    for other in PROPORTIONS
]


@pytest.mark.parametrize("scene", SCENES[::4], ids=lambda scene: f"{scene.aspect:.2f}")
def test_shapes_have_their_proportions_and_do_not_touch(scene):
    image, places = draw(scene, np.random.default_rng(0))
    assert image.width / image.height == pytest.approx(scene.aspect, rel=0.05)
    assert image.width * image.height == pytest.approx(SIDE**2, rel=0.03)
    seen = np.zeros((image.height, image.width), dtype=int)
    for (_, proportion), (left, top, right, bottom) in zip(scene.shapes, places):
        assert (right - left) / (bottom - top) == pytest.approx(PROPORTIONS[proportion], rel=0.1)
        seen[top:bottom, left:right] += 1
    assert seen.max() == 1 and 0 < seen.mean() < 0.3


@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (9, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_a_patch_is_labelled_by_the_shape_that_covers_most_of_it(grid, seed):
    """Compared with counting the pixels of each shape in each patch, on an image of whole pixels per patch."""
    rng = np.random.default_rng(seed)
    rows, columns = grid
    size = (columns * 8, rows * 8)
    boxes = [(0, 0, 7, 9), (size[0] - 13, size[1] - 11, size[0], size[1])]
    places = [boxes[index] for index in rng.permutation(2)]
    scene = Scene(1.0, (("red", "even"), ("blue", "tall")))
    found = patch_labels(scene, places, size, grid)
    for row in range(rows):
        for column in range(columns):
            patch = {(x, y) for x in range(column * 8, column * 8 + 8) for y in range(row * 8, row * 8 + 8)}
            areas = [sum(a <= x < c and b <= y < d for x, y in patch) for a, b, c, d in places]
            colour, proportion = scene.shapes[int(np.argmax(areas))]
            expected = [1 + list(COLOURS).index(colour), 1 + list(PROPORTIONS).index(proportion)]
            assert found[row, column].tolist() == (expected if max(areas) else [0, 0])


def test_arms_see_the_same_scenes_squashed_or_as_they_are():
    squashed, native = (make_records(12, "test", 1, arm) for arm in ARMS)
    assert squashed["conversations"] == native["conversations"]
    assert {read_image(row["images"][0]).size for row in squashed} == {(SIDE, SIDE)}
    assert len({read_image(row["images"][0]).size for row in native}) > 2
    train = make_records(12, "train", 1, "native")
    assert train["conversations"] != native["conversations"]


@pytest.mark.slow
def test_every_arm_runs_once(tmp_path, monkeypatch):
    sizes = Sizes(encoder_scenes=16, encoder_steps=2, language_steps=2, first=8, third=8, held_out=8)
    found = native_shapes.run(tmp_path / "work", 1, tmp_path / "results.json", sizes, in_process=True)
    assert set(found["runs"]) == set(ARMS) and "| native | proportion |" in native_shapes.table(found)
    written = json.loads((tmp_path / "results.json").read_text())["native_shapes"]
    assert written["runs"]["native"]["0"]["values"].keys() == {"proportion", "colour", "count"}
    monkeypatch.setattr(native_shapes, "train_encoder", None)  # nothing is trained again
    monkeypatch.setattr(native_shapes, "train_language_model", None)
    again = native_shapes.run(tmp_path / "work", 1, tmp_path / "results.json", replace(sizes), in_process=True)
    assert again["runs"] == found["runs"]
