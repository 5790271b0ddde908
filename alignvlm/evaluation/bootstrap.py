"""Confidence intervals by the bootstrap (Efron, 1979): draws images with replacement, and their questions with them."""

from collections.abc import Sequence

import numpy as np


def _resampled_means(clusters: Sequence, values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Returns the mean of `values` `(items, columns)` in every resample of complete clusters: `(samples, columns)`."""
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, cluster_of, values)
    sizes = np.bincount(cluster_of)
    rng = np.random.default_rng(seed)
    # How often each cluster is drawn: (samples, clusters).
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return (drawn @ sums) / (drawn @ sizes)[:, None]


def interval(clusters: Sequence, values: Sequence[float], samples: int = 1000, seed: int = 0) -> list[float]:
    """Returns the 95% percentile interval of the mean of `values`, one per item; `clusters` names each item's image."""
    means = _resampled_means(clusters, np.asarray(values, dtype=float)[:, None], samples, seed)
    return np.percentile(means[:, 0], [2.5, 97.5]).tolist()


def paired_difference(
    clusters: Sequence, first: Sequence[float], second: Sequence[float], samples: int = 1000, seed: int = 0
) -> dict:
    """Returns how much higher the mean of `second` is than the mean of `first` on the same items.

    Returns:
        `difference`, its 95% `interval`, and `p`: twice the smaller share of resamples in which the difference is on one side of
        zero, at least `1 / samples`.
    """
    values = np.stack([np.asarray(first, dtype=float), np.asarray(second, dtype=float)], axis=1)
    means = _resampled_means(clusters, values, samples, seed)
    differences = means[:, 1] - means[:, 0]
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    return {
        "difference": float(values[:, 1].mean() - values[:, 0].mean()),
        "interval": np.percentile(differences, [2.5, 97.5]).tolist(),
        "p": float(min(1.0, max(2 * tail, 1 / samples))),
    }
