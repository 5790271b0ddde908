"""The steps that `benchmarks/projector_start.py` counts."""

import pytest

from benchmarks.projector_start import compare, smooth, steps_to


def test_steps_are_counted_on_the_mean_of_five_losses():
    losses = [10.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert smooth(losses) == [10, 9, 8, 7, 6, 4]
    assert steps_to(losses, 7.5) == 4 and steps_to(losses, 6) == 5 and steps_to(losses, 3.9) is None


def test_the_given_losses_are_those_of_the_run_without():
    plain, started = {"logged_losses": [8.0, 6.0, 4.0, 2.0]}, {"logged_losses": [6.0, 5.0, 4.0, 3.0]}
    rows = compare(plain, started)
    assert [row["loss"] for row in rows] == pytest.approx([8, 7, 5])
    assert [(row["without"], row["with"]) for row in rows] == [(1, 1), (2, 1), (4, 3)]
