"""The steps that `benchmarks/projector_start.py` counts."""

import pytest

from benchmarks.projector_start import compare, smooth, steps_to, table


def test_steps_are_counted_on_the_mean_of_five_losses():
    losses = [10.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert smooth(losses) == [10, 9, 8, 7, 6, 4]
    assert steps_to(losses, 7.5) == 4 and steps_to(losses, 6) == 5 and steps_to(losses, 3.9) is None


def test_the_given_losses_are_those_of_the_new_projector():
    runs = {"new": {"logged_losses": [8.0, 6.0, 4.0, 2.0]}, "another": {"logged_losses": [6.0, 5.0, 4.0, 3.0]}}
    rows = compare(runs)
    assert [row["loss"] for row in rows] == pytest.approx([8, 7, 5])
    assert [row["steps"] for row in rows] == [{"new": 1, "another": 1}, {"new": 2, "another": 1}, {"new": 4, "another": 3}]  # fmt: skip
    runs["another"]["logged_losses"] = [9.0, 9.0, 9.0, 9.0]
    held_out = {"new": [8.0, 3.0], "another": [9.0, 9.0]}
    result = {"targets": compare(runs), "held_out": held_out}
    assert table([result, result]).splitlines()[2:] == [
        "| new | 1, 1 | 2, 2 | 4, 4 | 8.000 | 3.000 |",
        "| another | -, - | -, - | -, - | 9.000 | 9.000 |",
    ]
