"""Relaxed accuracy of answers about charts, for the `evaluate` library: numbers may be off by 5%."""

import math

from alignvlm.evaluation import text_metric


TOLERANCE = 0.05


class RelaxedAccuracy(text_metric.TextMetric):
    about = """
Relaxed accuracy (Methani et al., 2020; ChartQA: Masry et al., 2022, arXiv 2203.10244, section 5.1) as the evaluation code of Pix2Struct and
Qwen-VL computes it, which papers on ChartQA use. Where prediction and reference are both numbers, and the reference is not 0, the prediction may
be off by 5% of the reference. Otherwise the texts must be equal but for case. "12%" is 0.12; "$12" and "1,200" are texts.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of list of str): the right answers of each question; any of them may be given.

Returns:
    relaxed_accuracy (float): the share of right answers. ChartQA's two halves, questions of people and of a program, are kinds.
    relaxed_accuracy_per_item (list of bool): for each answer, whether it is right.
"""
    citation = """
@inproceedings{masry2022chartqa,
  title={{ChartQA}: A benchmark for question answering about charts with visual and logical reasoning},
  author={Masry, Ahmed and Long, Do Xuan and Tan, Jia Qing and Joty, Shafiq and Hoque, Enamul},
  booktitle={Findings of ACL},
  year={2022}
}
"""
    sources = ("https://arxiv.org/abs/2203.10244", "https://github.com/google-research/pix2struct")
    means = {"relaxed_accuracy": ("relaxed_accuracy", {})}
    per_kind = ("relaxed_accuracy",)

    def normal_form(self, reference, kind):
        number = _number(reference)
        if not number:
            return reference.lower()
        return str(number) if math.isfinite(number) else None

    def _compute(self, predictions, references):
        right = [
            any(is_right(prediction, reference) for reference in group)
            for prediction, group in zip(predictions, references)
        ]
        return {"relaxed_accuracy": sum(right) / len(right), "relaxed_accuracy_per_item": right}


def is_right(prediction: str, reference: str) -> bool:
    """Tells whether an answer is within the tolerance of a number, or the same text."""
    given, right = _number(prediction), _number(reference)
    if given is not None and right:
        return abs(given - right) / abs(right) <= TOLERANCE
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    """Returns the number that a text is, as Python reads it; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
