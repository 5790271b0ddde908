"""BLEU-1 to BLEU-4 of captions for the `evaluate` library, as coco-caption computes them, without Java."""

from collections import Counter

import numpy as np

from alignvlm.evaluation import text_metric
from alignvlm.evaluation.metrics.cider.ptb_tokenizer import tokenize


LONGEST = 4
# coco-caption adds these to counts so that nothing is divided by zero.
SMALL, TINY = 1e-9, 1e-15


class Bleu(text_metric.TextMetric):
    about = """
BLEU-1 to BLEU-4 (Papineni et al., 2002) as coco-caption computes them (pycocoevalcap): captions are tokenized as by its Java program, the
reference length is that of the reference closest in length (of two, the shorter), and counts are summed over all images before anything is
divided: a number of the corpus, not a mean over images. Papers print them times 100.
"""
    numbers = """
Args:
    predictions (list of str): one caption per image.
    references (list of list of str): all captions that people wrote for each image.

Returns:
    bleu_1 ... bleu_4 (float): the geometric mean of the n-gram precisions up to n, times the brevity penalty.
    per_item (list of dict): for each image, its own `bleu_1` ... `bleu_4`; `length` and `reference_length` in tokens; `matches`, the clipped
        number of n-grams of 1 ... 4 tokens that a reference has too.
"""
    citation = """
@inproceedings{papineni2002bleu,
  title={{BLEU}: a method for automatic evaluation of machine translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={ACL},
  year={2002}
}
"""
    sources = ("https://aclanthology.org/P02-1040", "https://github.com/tylin/coco-caption")

    headlines = ("bleu_4",)

    def normal_form(self, reference, kind):
        return " ".join(tokenize([reference])[0])

    def _compute(self, predictions, references):
        tokens = iter(tokenize([text for group in references for text in group]))
        groups = [[next(tokens) for _ in group] for group in references]
        items = [_counts(prediction, group) for prediction, group in zip(tokenize(predictions), groups)]
        columns = np.array([_columns(item) for item in items], dtype=float)
        total = columns.sum(0)
        own = {f"bleu_{n}": _bleu(columns, n) for n in range(1, LONGEST + 1)}
        for index, item in enumerate(items):
            item |= {name: float(values[index]) for name, values in own.items()}
        return {**{f"bleu_{n}": float(_bleu(total, n)) for n in range(1, LONGEST + 1)}, "per_item": items}


def _counts(prediction: list[str], references: list[list[str]]) -> dict:
    """Returns what one caption adds to the counts of the corpus."""
    most: Counter = Counter()  # of each n-gram, as often as the reference that has it most often
    for reference in references:
        most |= _ngrams(reference)
    shared = _ngrams(prediction) & most
    matches = [0] * LONGEST
    for ngram, count in shared.items():
        matches[len(ngram) - 1] += count
    closest = min((abs(len(reference) - len(prediction)), len(reference)) for reference in references)[1]
    return {"length": len(prediction), "reference_length": closest, "matches": matches}


def _ngrams(tokens: list[str]) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1))


def _columns(scores: dict) -> list[float]:
    """Returns what is summed: length, reference length, numbers of n-grams, matches."""
    ngrams = [max(scores["length"] - n, 0) for n in range(LONGEST)]
    return [scores["length"], scores["reference_length"], *ngrams, *scores["matches"]]


def _bleu(sums: np.ndarray, n: int) -> np.ndarray:
    """Returns BLEU-n of sums `(..., 2 + 8)`: `(...)`."""
    ngrams, matches = sums[..., 2 : 2 + n], sums[..., 2 + LONGEST : 2 + LONGEST + n]
    precision = np.prod((matches + TINY) / (ngrams + SMALL), axis=-1) ** (1 / n)
    ratio = (sums[..., 0] + TINY) / (sums[..., 1] + SMALL)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


Bleu.of_sums = {f"bleu_{n}": (_columns, lambda sums, n=n: _bleu(sums, n)) for n in range(1, LONGEST + 1)}
