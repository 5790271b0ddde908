"""ANLS of answers read from an image, for the `evaluate` library, as the evaluation of ST-VQA and DocVQA computes it."""

from alignvlm.evaluation import text_metric


THRESHOLD = 0.5


class ANLS(text_metric.TextMetric):
    about = """
Average normalised Levenshtein similarity (Biten et al., 2019, arXiv 1905.13648) as the official evaluation of ST-VQA and DocVQA computes it.
Prediction and references are lower-cased, and white space between words becomes one space. A score is 1 minus the edit distance over the
longer length, the highest of the references, and 0 where it is below 0.5; 0.5 itself counts, unlike in the paper's equation. As in the official
code, lengths are those before white space is joined, which matters only for texts with several spaces in a row.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of list of str): all right answers of each question.

Returns:
    anls (float): the mean over questions. Papers print it times 100.
    anls_per_item (list of float): the score of each answer.
"""
    citation = """
@inproceedings{biten2019scene,
  title={Scene text visual question answering},
  author={Biten, Ali Furkan and Tito, Ruben and Mafla, Andres and Gomez, Lluis and Rusi{\\~n}ol, Mar{\\c{c}}al and Valveny, Ernest and Jawahar, C. V. and
    Karatzas, Dimosthenis},
  booktitle={ICCV},
  year={2019}
}
"""
    sources = ("https://arxiv.org/abs/1905.13648", "https://rrc.cvc.uab.es/?ch=17")
    means = {"anls": ("anls", {})}
    per_kind = ("anls",)

    def normal_form(self, reference, kind):
        return _comparable(reference)

    def _compute(self, predictions, references):
        scores = [similarity(prediction, group) for prediction, group in zip(predictions, references)]
        return {"anls": sum(scores) / len(scores), "anls_per_item": scores}


def similarity(prediction: str, references: list[str]) -> float:
    """Returns the score of one answer: that of the nearest reference, or 0 below the threshold."""
    score = 1 - min(_distance_share(prediction, reference) for reference in references)
    return score if score >= THRESHOLD else 0.0


def _distance_share(prediction: str, reference: str) -> float:
    longer = max(len(prediction.upper()), len(reference.upper()))  # upper: as in the official code ("ß" counts as two)
    given, right = map(_comparable, (prediction, reference))
    return edit_distance(given, right) / longer if longer else 0.0


def _comparable(text: str) -> str:
    return " ".join(text.strip().lower().split())


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance: the least number of characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for place, character in enumerate(first, start=1):
        diagonal, row[0] = row[0], place
        for index, other in enumerate(second, start=1):
            cost = diagonal if character == other else 1 + min(diagonal, row[index], row[index - 1])
            diagonal, row[index] = row[index], cost
    return row[-1]
