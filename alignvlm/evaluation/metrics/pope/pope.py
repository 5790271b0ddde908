"""Answers to yes/no questions about objects, for the `evaluate` library, as POPE judges them."""

import numpy as np

from alignvlm.evaluation import text_metric


class Pope(text_metric.TextMetric):
    about = """
POPE (Li et al., 2023, arXiv 2305.10355) as its `evaluate.py` judges: of an answer the first sentence counts; without its commas, it means no if one
of its words is "No", "no" or "not", and yes otherwise, whatever it says. Precision, recall and F1 are those of "yes". The three ways to choose
absent objects (random, popular, adversarial) are kinds; papers print them apart, and the mean of the three. lmms-eval wants the bare word
instead, and its share of yes is that of the references.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of str): "yes" or "no"; everything but "no" counts as yes.

Returns:
    pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes (float): of all answers; `pope_yes` is the share of answers that mean yes.
        None where nothing is left to divide by.
    per_item (list of dict): for each answer, what it means (`said_yes`), what is right (`is_yes`), and whether both agree (`correct`).
"""
    citation = """
@inproceedings{li2023evaluating,
  title={Evaluating object hallucination in large vision-language models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle={EMNLP},
  year={2023}
}
"""
    sources = ("https://arxiv.org/abs/2305.10355", "https://github.com/RUCAIBox/POPE")
    columns = {"predictions": text_metric.TEXT, "references": text_metric.TEXT}
    headlines = ("pope_accuracy", "pope_f1")
    neutral = ("pope_yes",)
    all_answers = ("yes", "no")
    means = {
        "pope_accuracy": ("correct", {}),
        "pope_recall": ("said_yes", {"is_yes": True}),
        "pope_yes": ("said_yes", {}),
    }

    def normal_form(self, reference, kind):
        return "yes" if _is_yes(reference) else "no"

    def _compute(self, predictions, references):
        items = [judged(prediction, reference) for prediction, reference in zip(predictions, references)]
        total = np.sum([_counts(item) for item in items], axis=0)
        of_yes = [item for item in items if item["is_yes"]]
        return {
            "pope_accuracy": text_metric.mean(items, "correct"),
            "pope_precision": _known(_precision(total)),
            "pope_recall": text_metric.mean(of_yes, "said_yes"),
            "pope_f1": _known(_f1(total)),
            "pope_yes": text_metric.mean(items, "said_yes"),
            "per_item": items,
        }


def judged(prediction: str, reference: str) -> dict:
    """Returns the scores of one answer."""
    said_yes, is_yes = says_yes(prediction), _is_yes(reference)
    return {"said_yes": said_yes, "is_yes": is_yes, "correct": said_yes == is_yes}


def _is_yes(reference: str) -> bool:
    return reference.strip().lower() != "no"


def says_yes(answer: str) -> bool:
    """Tells what an answer means: no if its first sentence has the word "No", "no" or "not", else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _counts(scores: dict) -> list[float]:
    """Returns what is summed: right answers of yes, answers of yes, and questions to which yes is right."""
    return [scores["said_yes"] and scores["is_yes"], scores["said_yes"], scores["is_yes"]]


def _precision(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _f1(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2])


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


Pope.of_sums = {"pope_precision": (_counts, _precision), "pope_f1": (_counts, _f1)}
Pope.per_kind = (*Pope.means, *Pope.of_sums)
