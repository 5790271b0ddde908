"""Schedules, alone and as a stage uses them."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignvlm.stages.schedules import check_phases, infinite_factor
from alignvlm.stages.stage import main
from tests.running import arguments_for


def test_the_four_phases():
    factors = [infinite_factor(step, 1000, 100) for step in range(1001)]
    assert factors[0] == 0 and factors[50] == pytest.approx(0.5) and factors[100] == 1  # warm-up
    assert factors[100 + 112] == pytest.approx(0.75, abs=0.01)  # half of the cooldown of 225 steps
    assert set(factors[326:865]) == {0.5}  # constant
    assert factors[1000] == pytest.approx(0.01)  # annealed
    anneal = factors[866:1001]
    ratios = [b / a for a, b in itertools.pairwise(anneal)]
    assert max(ratios) == pytest.approx(min(ratios)) and max(ratios) < 1  # exponentially


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 50),
    cooldown=st.floats(0.01, 0.5),
    anneal=st.floats(0.01, 0.5),
    constant=st.floats(0.05, 1),
    final=st.floats(0.001, 0.05),
)
def test_after_the_warmup_it_only_falls(total, warmup, **phases):
    check_phases(**phases)
    factors = [
        infinite_factor(step, total, min(warmup, total), **phases) for step in range(min(warmup, total), total + 1)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(factors))
    assert 0 < factors[-1] <= factors[0] <= 1 + 1e-12


@pytest.mark.parametrize(
    "phases, message",
    [
        ({"cooldwn": 0.1}, r"does not know \['cooldwn'\]"),
        ({"cooldown": 0.9}, "sum to at most 1"),
        ({"final": 0}, "final=0 must be above 0"),
    ],
)
def test_bad_phases_are_named(phases, message):
    with pytest.raises(ValueError, match=message):
        check_phases(**phases)


def rates(folder) -> list[float]:
    state = json.loads((folder / "checkpoint-8/trainer_state.json").read_text())
    return [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]


def test_every_stage_warms_up_again_and_module_rates_keep_their_ratio(checkpoint, tmp_path):
    previous = checkpoint
    for stage in (3, 4):
        fields = {"projector_learning_rate": 1e-3, "language_learning_rate": 1e-4, "stage": stage, "max_steps": 8}
        fields |= {"warmup_steps": 2, "save_strategy": "steps", "save_steps": 8}
        given_ = arguments_for(previous, tmp_path / str(stage), infinite_schedule='{"final": 0.1}', **fields)
        entry = main(given_)
        assert entry["infinite_schedule"] == {"final": 0.1}
        previous = tmp_path / str(stage)
        expected = [1e-3 * infinite_factor(step, 8, 2, final=0.1) for step in range(8)]
        assert rates(previous) == pytest.approx(expected)
