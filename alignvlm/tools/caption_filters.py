"""Measures captions and says which to keep: by length, repetition, agreement between samples, and a scorer."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import mean

from alignvlm.data.formats import IMAGE_TOKEN
from alignvlm.tools.captioner import Caption


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())


def repetition(text: str) -> float:
    """Returns the share of word pairs that repeat an earlier one: 0 without repetition, towards 1 in a loop."""
    words = words_of(text)
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def similarity(first: str, second: str) -> float:
    """Returns the F1 of the words that two texts share, each as often as both have it."""
    ours, theirs = Counter(words_of(first)), Counter(words_of(second))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def most_agreed(texts: Sequence[str]) -> tuple[int, float]:
    """Returns the index of the text that is most similar to the others (the first of equals), and the mean similarity of all pairs.

    The first is the choice of minimum Bayes risk (Kumar and Byrne, 2004) with this similarity; of a single text the mean is 1.
    """
    sums = [0.0] * len(texts)
    pairs = {(i, j): similarity(texts[i], texts[j]) for i, j in combinations(range(len(texts)), 2)}
    for (i, j), value in pairs.items():
        sums[i] += value
        sums[j] += value
    return max(range(len(texts)), key=sums.__getitem__), mean(pairs.values()) if pairs else 1.0


@dataclass(frozen=True)
class Limits:
    """What is kept: bounds that are part of what is kept; None: no bound."""

    min_words: int | None = 1
    max_words: int | None = None
    max_repetition: float | None = None
    min_agreement: float | None = None
    min_score: float | None = None
    keep_unfinished: bool = False


def measure(text: str, agreement: float | None = None, score: float | None = None) -> dict[str, float]:
    """Returns the measures of a caption; agreement and score only if they are known."""
    measures = {"words": len(words_of(text)), "repetition": repetition(text), "agreement": agreement, "score": score}
    return {name: round(value, 4) for name, value in measures.items() if value is not None}


def rejection(caption: Caption, measures: dict[str, float], limits: Limits) -> dict | None:
    """Returns why a caption is rejected, the first reason of several: `reason`, and for a bound its `value` and `limit`. None: keep it."""
    if not caption.text:
        return {"reason": "empty"}
    if IMAGE_TOKEN in caption.text:  # the reader of a source refuses it
        return {"reason": f"holds {IMAGE_TOKEN}"}
    if not caption.finished and not limits.keep_unfinished:
        return {"reason": "unfinished"}
    for name in ("min_words", "max_words", "max_repetition", "min_agreement", "min_score"):
        limit, value = getattr(limits, name), measures.get(name[4:])
        if limit is None or value is None:
            continue
        if value < limit if name.startswith("min") else value > limit:
            return {"reason": name, "value": value, "limit": limit}
    return None


@dataclass(frozen=True)
class Judged:
    """What became of an image.

    Args:
        caption: the text chosen; None for an image that cannot be read.
        measures: of `measure`.
        samples: all texts, if several were sampled.
        rejected: why it is not kept, as `rejection` says; None: it is kept.
    """

    caption: str | None = None
    measures: dict[str, float] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    rejected: dict | None = None
