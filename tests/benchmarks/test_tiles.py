"""`benchmarks/tiles.py`: what its encoder learns from is where it is said to be, arms differ in what they are named after, and real arms."""

import json

import numpy as np
import pytest

from alignvlm.data import scenes, signs
from alignvlm.data.record import Record
from alignvlm.stages.backbones import BackboneArguments
from benchmarks import tokens
from benchmarks.sign_backbones import (
    GRID,
    LETTERS,
    MOST,
    SIDE,
    UNREADABLE,
    sign_dialogue,
    view_record,
    view_records,
    views,
)
from benchmarks.tiles import ARMS, METRICS, Signs
from benchmarks.tokens import folder_name, run, table


def label(sign: signs.Sign) -> list[int]:
    letters = [1 + LETTERS.index(letter) for letter in sign.text]
    return [1 + list(scenes.COLOURS).index(sign.colour), *letters, *[0] * (MOST - len(letters))]


@pytest.mark.parametrize("grid", signs.GRIDS)
def test_the_reader_learns_what_stands_where_it_is_visible(grid):
    """Of a scene with a sign in each of two cells: complete in the tile of its cell and in the overview, of which the tiles are enlarged."""
    rows, columns = grid
    last = (rows - 1, columns - 1)
    scene = signs.SignScene(grid, (signs.Sign("red", "42", (0, 0)), signs.Sign("blue", "taxi", last)))
    wanted = [label(sign) for sign in scene.signs]
    for seed in range(5):
        image, places = signs.draw_signs_at(scene, np.random.default_rng(seed), SIDE)
        shown = views(scene, np.random.default_rng(seed))
        seen = [np.unique(labels.reshape(-1, 1 + MOST), axis=0).tolist() for _, labels in shown]
        overview = shown[0]
        assert sorted(seen[0]) == sorted([[0] * (1 + MOST), *wanted])
        for (left, top, right, bottom), expected in zip(places, wanted):
            across, down = ((left + right) / 2 / columns / SIDE, (top + bottom) / 2 / rows / SIDE)
            assert overview[1][int(down * GRID), int(across * GRID)].tolist() == expected
        whole = {tile.tobytes(): found for (tile, _), found in zip(shown, seen)}
        for sign, expected in zip(scene.signs, wanted):
            row, column = sign.cell
            tile = image.crop((column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE))
            assert sorted(whole[np.asarray(tile).tobytes()]) == sorted([[0] * (1 + MOST), expected])


def test_letters_of_a_sign_that_is_cut_are_not_asked_for():
    rng, found = np.random.default_rng(0), 0
    for _ in range(30):
        for _, labels in views(signs.random_signs(rng, "train"), rng):
            cut = (labels[..., 1:] == UNREADABLE).any(-1)
            assert (labels[cut][:, 0] > 0).all() and (labels[cut][:, 1:] == UNREADABLE).all()
            found += int(cut.any())
    assert found


def test_questions_of_a_view_are_about_the_complete_signs_in_it():
    """Every answer can be read in the labels of the same view; how many signs there are is asked where none is cut."""
    rng, kinds = np.random.default_rng(1), set()
    for _ in range(30):
        for tile, labels in views(signs.random_signs(rng, "train"), rng):
            there = {tuple(found) for found in labels.reshape(-1, 1 + MOST).tolist() if found[0]}
            whole = [found for found in there if UNREADABLE not in found]
            row = next(iter(view_record(tile, labels)), None)
            assert (row is None) == (not whole)
            for conversation in Record.from_row(row).conversations if row else []:
                words, answer = conversation.messages[-1]["content"][-1]["text"].split(), conversation.responses[0]
                kinds.add(conversation.kind)
                if conversation.kind == "count":
                    assert answer == signs.COUNTS[len(there)] and len(there) == len(whole)
                else:
                    colour, text = (answer, words[-1][:-1]) if conversation.kind == "find" else (words[-2], answer)
                    assert tuple(label(signs.Sign(colour, text, (0, 0)))) in whole
    assert kinds == {"read_number", "read_word", "find", "count"}
    assert len(view_records(7, 0)) == 7


def test_a_dialogue_describes_what_it_asks_for():
    rng = np.random.default_rng(0)
    for _ in range(20):
        (described, first), *more = sign_dialogue(rng)
        for _, answer in [(described, first), *more]:
            assert answer in described.split("?")[0] or answer in signs.COUNTS


def test_every_arm_of_signs_can_be_assembled_or_has_another_s_checkpoint():
    assert len({folder_name(name) for name in ARMS}) == len(ARMS)
    for name, arm in ARMS.items():
        assert (arm.trained is None) == (arm.max_tiles is None) and not (arm.assembly and arm.trained), name
        assert arm.trained is None or list(ARMS).index(arm.trained) < list(ARMS).index(name)
        BackboneArguments("vision", "language", "out", **arm.assembly, **arm.stage)


def test_reading_is_the_share_of_all_numbers_and_words():
    found = {"read_number": (0.25, 8), "read_word": (1.0, 2), "find": (0.5, 10), "count": (0.0, 4)}
    by_kind = {kind: {"accuracy": accuracy, "count": count} for kind, (accuracy, count) in found.items()}
    values = Signs.values(None, {"pathvqa_accuracy": {"by_kind": by_kind}})
    assert values == {"reading": 0.4, "numbers": 0.25, "words": 1.0, "finding": 0.5, "counting": 0.0}


class FewSigns(Signs):
    """A checkpoint that has seen next to nothing."""

    sizes, view_count = (4,), 4
    backbone_sizes = {"scene_count": 2, "vision_steps": 1, "language_steps": 1}


@pytest.mark.slow
def test_arms_with_and_without_tiles_run_and_tell_their_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "ANSWERED", 4)
    monkeypatch.setattr("benchmarks.tiles.HELD_OUT", 4)
    world, results = FewSigns(tmp_path), tmp_path / "results.json"
    names = (
        "whole, 64 pixels",
        "whole, 128 pixels",
        "6 tiles, merged to 4",
        "6 tiles",
        "6 tiles, the overview alone",
    )
    arms = {name: ARMS[name] for name in names}
    run(world, arms, seeds=1, results=results)
    found = json.loads(results.read_text())["tiles"]
    counts = list(found["tokens"].values())
    assert counts[:2] == [16, 64] and counts[4] == 16
    assert counts[3] == 4 * counts[2] and 16 * 5 <= counts[3] <= 16 * 7  # grids of 4 and of 6 cells, and the overview
    values = {name: runs["0"]["values"] for name, runs in found["runs"].items()}
    pixels = [values[name]["kilopixels"] for name in names]
    assert pixels[0] == pixels[4] == SIDE**2 / 1000 and pixels[1] == 4 * pixels[0]
    assert pixels[2] == pixels[3] == pytest.approx(pixels[0] * counts[3] / 16, rel=0.01)
    assert values["6 tiles"]["step_mb"] > values["6 tiles, merged to 4"]["step_mb"] > values[names[0]]["step_mb"]
    assert set(METRICS) <= values["6 tiles"].keys()
    lines = table(found, world.metrics).splitlines()
    assert lines[2].startswith("| whole, 64 pixels | 16 | ") and len({line.count("|") for line in lines}) == 1
