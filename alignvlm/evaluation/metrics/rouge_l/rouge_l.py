"""ROUGE-L of captions for the `evaluate` library, as coco-caption computes it, without Java."""

from alignvlm.evaluation import text_metric
from alignvlm.evaluation.metrics.cider.ptb_tokenizer import tokenize


BETA = 1.2


class RougeL(text_metric.TextMetric):
    about = """
ROUGE-L (Lin, 2004) as coco-caption computes it (pycocoevalcap): captions are tokenized as by its Java program; precision and recall are the
length of the longest common subsequence over that of the caption and of the reference, each the highest over the references, and weighed
with beta 1.2. Other programs of this name stem words or take beta 1. Papers print it times 100.
"""
    numbers = """
Args:
    predictions (list of str): one caption per image.
    references (list of list of str): all captions that people wrote for each image.

Returns:
    rouge_l (float): the mean over images.
    rouge_l_per_item (list of float): the score of each image.
"""
    citation = """
@inproceedings{lin2004rouge,
  title={{ROUGE}: A package for automatic evaluation of summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}
"""
    sources = ("https://aclanthology.org/W04-1013", "https://github.com/tylin/coco-caption")
    means = {"rouge_l": ("rouge_l", {})}

    def normal_form(self, reference, kind):
        return " ".join(tokenize([reference])[0])

    def _compute(self, predictions, references):
        tokens = iter(tokenize([text for group in references for text in group]))
        groups = [[next(tokens) for _ in group] for group in references]
        scores = [_rouge_l(prediction, group) for prediction, group in zip(tokenize(predictions), groups)]
        return {"rouge_l": sum(scores) / len(scores), "rouge_l_per_item": scores}


def _rouge_l(prediction: list[str], references: list[list[str]]) -> float:
    """Returns the score of one caption. A caption without tokens counts as one empty token, as in the official code."""
    prediction = prediction or [""]
    shared = [(longest_common(prediction, reference or [""]), len(reference) or 1) for reference in references]
    precision = max(length for length, _ in shared) / len(prediction)
    recall = max(length / size for length, size in shared)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: list[str], second: list[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = 0  # the entry above and to the left
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = before + 1 if token == other else max(above, row[index - 1])
            before = above
    return row[-1]
