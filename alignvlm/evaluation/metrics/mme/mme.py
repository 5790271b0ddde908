"""Pairs of yes/no questions about images, for the `evaluate` library, as MME scores them."""

import numpy as np

from alignvlm.evaluation import text_metric


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
CATEGORIES = (*PERCEPTION, *COGNITION)


class MME(text_metric.TextMetric):
    about = """
MME (Fu et al., 2023, arXiv 2306.13394) as its evaluation tool scores: each image has two questions, one to which yes is right and one to which no
is. A category's score is its accuracy in percent plus the percentage of images with both answers right ("accuracy+"); perception is the sum of ten
categories (at most 2000), cognition of four (at most 800). An answer means yes or no if it is y or n, or has "yes" or "no" in its first four
characters, lower-cased and without periods; all else is wrong.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of str): "yes" or "no".
    kinds (list of str): each question's category.
    ids (list of str): the image of each question; two questions have the same.

Returns:
    mme_perception, mme_cognition (float): sums over the categories that occur; None if none of them does.
    mme_accuracy (float): share of right answers, of all categories.
    per_item (list of dict): for each answer, `correct`; `both`: half a point if both answers about the image are right; `category`.
"""
    citation = """
@article{fu2023mme,
  title={{MME}: A comprehensive evaluation benchmark for multimodal large language models},
  author={Fu, Chaoyou and others},
  journal={arXiv preprint arXiv:2306.13394},
  year={2023}
}
"""
    sources = (
        "https://arxiv.org/abs/2306.13394",
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models",
    )
    columns = dict.fromkeys(("predictions", "references", "kinds", "ids"), text_metric.TEXT)
    headlines = ("mme_perception", "mme_cognition")
    means = {"mme_accuracy": ("correct", {})}
    per_kind = ("mme_accuracy",)
    all_answers = ("yes", "no")

    def normal_form(self, reference, kind):
        return reference.strip().lower().strip(".")

    def _compute(self, predictions, references, kinds, ids):
        rights = [self.normal_form(reference, kind) for reference, kind in zip(references, kinds)]
        correct = [meaning(given) == right for given, right in zip(predictions, rights)]
        pairs: dict[tuple[str, str], list[bool]] = {}
        for place, right in zip(zip(kinds, ids), correct):
            pairs.setdefault(place, []).append(right)
        if odd := next((place for place, own in pairs.items() if len(own) != 2), None):
            raise ValueError(f"MME asks two questions about an image; {odd[1]!r} ({odd[0]}) has {len(pairs[odd])}.")
        if unknown := sorted({kind for kind in kinds if kind not in CATEGORIES}):
            raise ValueError(f"MME has no category {unknown[0]!r}. Its categories: {', '.join(CATEGORIES)}.")
        items = [
            {"correct": right, "both": all(pairs[place]) / 2, "category": place[0]}
            for place, right in zip(zip(kinds, ids), correct)
        ]
        sums = {name: np.sum([summed(item) for item in items], axis=0) for name, (summed, _) in self.of_sums.items()}
        found = {name: float(function(sums[name])) for name, (_, function) in self.of_sums.items()}
        return {
            **{name: None if np.isnan(value) else value for name, value in found.items()},
            "mme_accuracy": text_metric.mean(items, "correct"),
            "per_item": items,
        }


def meaning(answer: str) -> str:
    """Returns what an answer means: yes, no or other."""
    answer = answer.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "other")
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def _columns(scores: dict, categories: list[str]) -> list[float]:
    """Returns what is summed: for each category, questions, right answers, and images with both right (in halves)."""
    own = [scores["category"] == category for category in categories]
    return [value * weight for weight in (1, scores["correct"], scores["both"]) for value in own]


def _score(sums: np.ndarray) -> np.ndarray:
    """Returns the sum of the categories' scores: `(..., 3 * categories)` to `(...)`; nan without any question."""
    count, correct, both = np.split(sums, 3, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.where(count > 0, 100 * (correct + 2 * both) / count, 0.0)
    return np.where(count.sum(-1) > 0, scores.sum(-1), np.nan)


MME.of_sums = {
    "mme_perception": (lambda scores: _columns(scores, PERCEPTION), _score),
    "mme_cognition": (lambda scores: _columns(scores, COGNITION), _score),
}
