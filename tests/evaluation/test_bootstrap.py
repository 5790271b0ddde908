"""Bootstrap intervals equal a plain resampling loop, and cover what they should."""

import numpy as np
import pytest

from alignvlm.evaluation.bootstrap import interval, paired_difference


def test_interval_equals_a_plain_loop_over_resampled_images():
    rng = np.random.default_rng(0)
    clusters = [f"image{n}" for n in rng.integers(0, 40, 200)]
    values = rng.random(200)
    low, high = interval(clusters, values, samples=4000, seed=1)
    names = sorted(set(clusters))
    groups = [values[[i for i, c in enumerate(clusters) if c == name]] for name in names]
    means = []
    for _ in range(4000):
        drawn = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(np.concatenate(drawn).mean())
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.004)


def test_questions_of_one_image_are_drawn_together():
    """Ten copies of a question tell no more than one: the interval must not shrink."""
    values = np.random.default_rng(0).random(50) < 0.5
    once = interval(range(50), values, samples=4000)
    often = interval(np.repeat(np.arange(50), 10), np.repeat(values, 10), samples=4000)
    np.testing.assert_allclose(once, often, atol=0.02)


def test_about_95_percent_of_intervals_hold_the_true_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        low, high = interval(range(150), rng.normal(1.0, 1.0, 150), samples=400, seed=trial)
        inside += low <= 1.0 <= high
    assert 0.91 <= inside / 300 <= 0.98


def test_paired_difference_finds_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    first = rng.random(300)
    second = first + 0.02 + rng.normal(0, 0.01, 300)
    found = paired_difference(range(300), first, second)
    assert found["difference"] == pytest.approx((second - first).mean())
    assert found["interval"][0] > 0 and found["p"] == pytest.approx(0.001)
    low, high = interval(range(300), first)
    assert low < second.mean() < high
    back = paired_difference(range(300), second, first)
    assert back["interval"] == pytest.approx([-found["interval"][1], -found["interval"][0]])


def test_no_difference_has_p_one():
    found = paired_difference(range(20), [1.0] * 20, [1.0] * 20)
    assert found == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
