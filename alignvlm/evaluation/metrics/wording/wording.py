"""Lengths, repetition and sameness of answers for the `evaluate` library: counts that need no model and no references."""

from alignvlm.evaluation import text_metric


NGRAM = 4


class Wording(text_metric.TextMetric):
    about = """
Counts of words, without regard to the references. Words are what white space separates, in lower case. Repetition is seq-rep-4 of Welleck et
al. (2020, arXiv 1908.04319): the share of an answer's four-word sequences that the answer had before. It is this package's choice to count
answers of fewer than four words as 0.
"""
    numbers = """
Args:
    predictions (list of str): the answers.
    references (list of list of str): not read.

Returns:
    words (float): mean number of words.
    empty (float): share of answers without a word.
    repetition (float): mean of seq-rep-4.
    loops (float): share of answers that end in the same one to eight words three times in a row, or more often.
    distinct (float): how many different answers there are, over their number.
    vocabulary (int): how many different words there are.
    per_item (list of dict): for each answer, `words`, `empty`, `repetition` and `loops`.
"""
    citation = """
@inproceedings{welleck2020neural,
  title={Neural text generation with unlikelihood training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle={ICLR},
  year={2020}
}
"""
    sources = ("https://arxiv.org/abs/1908.04319",)
    headlines = ()
    lower_is_better = ("empty", "repetition", "loops")
    neutral = ("words",)
    means = {name: (name, {}) for name in ("words", "empty", "repetition", "loops")}

    def _compute(self, predictions, references):
        answers = [prediction.lower().split() for prediction in predictions]
        items = [
            {"words": len(words), "empty": not words, "repetition": _repetition(words), "loops": _loops(words)}
            for words in answers
        ]
        return {
            **{name: text_metric.mean(items, name) for name in self.means},
            "distinct": len(set(map(tuple, answers))) / len(answers),
            "vocabulary": len({word for words in answers for word in words}),
            "per_item": items,
        }


def _repetition(words: list[str]) -> float:
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _loops(words: list[str]) -> bool:
    return any(
        len(words) >= 3 * size and words[-size:] == words[-2 * size : -size] == words[-3 * size : -2 * size]
        for size in range(1, 9)
    )
