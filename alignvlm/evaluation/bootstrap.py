"""Confidence intervals by the bootstrap (Efron, 1979): draws images with replacement, and their questions with them.

A number is a function of sums over items: a mean of the sum of scores and the count, F1 of three counts, BLEU of its n-gram counts. Each
resample sums again, and the function turns its sums into the number.
"""

from collections.abc import Callable, Sequence

import numpy as np


Function = Callable[[np.ndarray], np.ndarray]  # sums (..., columns) to numbers (...)


def mean(sums: np.ndarray) -> np.ndarray:
    """Returns the mean, of the sum of values and their count: `(..., 2)` to `(...)`; nan without any."""
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _resampled(clusters: Sequence, columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Returns the sums of `columns` `(items, columns)` in every resample of complete clusters: `(samples, columns)`."""
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, cluster_of, columns)
    rng = np.random.default_rng(seed)
    # How often each cluster is drawn: (samples, clusters).
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return drawn @ sums


def _middle(values: np.ndarray) -> list[float]:
    """Returns the middle 95% of the values of resamples. A resample without anything to count has no value."""
    return np.percentile(values[~np.isnan(values)], [2.5, 97.5]).tolist()


def interval_of(clusters: Sequence, columns: np.ndarray, function: Function, samples: int, seed: int) -> list[float]:
    """Returns the 95% percentile interval of a function of the sums of `columns` `(items, columns)`."""
    return _middle(function(_resampled(clusters, np.asarray(columns, dtype=float), samples, seed)))


def interval(clusters: Sequence, values: Sequence[float], samples: int = 1000, seed: int = 0) -> list[float]:
    """Returns the 95% percentile interval of the mean of `values`, one per item; `clusters` names each item's image."""
    return interval_of(clusters, counted(values), mean, samples, seed)


def counted(values: Sequence[float]) -> np.ndarray:
    """Returns the values with a 1 beside each: the columns of a mean."""
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def paired_difference_of(
    clusters: Sequence, first: np.ndarray, second: np.ndarray, function: Function, samples: int, seed: int
) -> dict | None:
    """Returns how much higher a function of the sums of `second` `(items, columns)` is than that of `first`, on the same items.

    Returns:
        `difference`, its 95% `interval`, and `p`: twice the smaller share of resamples in which the difference is on one side of
        zero, at least `1 / samples`. None if the function has no value for one of them, or in no resample for both.
    """
    both = np.concatenate([np.asarray(first, dtype=float), np.asarray(second, dtype=float)], axis=1)
    resampled, own = _resampled(clusters, both, samples, seed), both.sum(0)
    width = both.shape[1] // 2
    differences = function(resampled[:, width:]) - function(resampled[:, :width])
    difference = float(function(own[width:]) - function(own[:width]))
    known = differences[~np.isnan(differences)]
    if np.isnan(difference) or not len(known):
        return None
    tail = min((known <= 0).mean(), (known >= 0).mean())
    return {
        "difference": difference,
        "interval": _middle(differences),
        "p": float(min(1.0, max(2 * tail, 1 / samples))),
    }


def paired_difference(
    clusters: Sequence, first: Sequence[float], second: Sequence[float], samples: int = 1000, seed: int = 0
) -> dict:
    """Returns how much higher the mean of `second` is than the mean of `first` on the same items: see `paired_difference_of`."""
    return paired_difference_of(clusters, counted(first), counted(second), mean, samples, seed)
