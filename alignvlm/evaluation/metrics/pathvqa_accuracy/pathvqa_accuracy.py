"""Accuracy of short answers for the `evaluate` library: PathVQA's metrics by their names, and any other set of short answers."""

from collections import Counter

import datasets
import evaluate

from .vqa_normalisation import comparable


_DESCRIPTION = """
Accuracy of short answers to questions about images, as PathVQA (He et al., 2020, arXiv 2003.10286) is evaluated. A question is yes/no
if its reference, stripped and lower-cased, is "yes" or "no", and free-form otherwise. Prediction and reference are both normalised
as in the official VQA evaluation (Antol et al., 2015, arXiv 1505.00468; `vqaEval.py`) and then compared.
"""

_CITATION = """
@article{he2020pathvqa,
  title={{PathVQA}: 30000+ Questions for Medical Visual Question Answering},
  author={He, Xuehai and Zhang, Yichen and Mou, Luntian and Xing, Eric and Xie, Pengtao},
  journal={arXiv preprint arXiv:2003.10286},
  year={2020}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (list of str): one answer per question.
    references (list of str): the right answers.

Returns, each None where there is no question of its kind:
    accuracy, yes_no_accuracy, free_form_accuracy (float): share of answers that equal the reference after normalisation. M2I2
        (arXiv 2211.13594) compares like this; MUMC (arXiv 2307.05314) lower-cases and strips punctuation only.
    free_form_recall, free_form_f1 (float): means over questions. Recall is the share of the reference's words that the answer has; F1
        is its harmonic mean with the share of the answer's words that the reference has. Words count as often as they occur.
        LLaVA-Med (arXiv 2306.00890) prints such a recall for "open" questions.
    majority_accuracy, majority_yes_no_accuracy, majority_free_form_accuracy (float): the accuracy of always giving the most frequent
        answer, which a model reaches without looking.
    count, yes_no_count, free_form_count (int): numbers of questions.
    llava_med_closed (float): for comparison only, over yes/no questions: the reference occurs anywhere in the lower-cased answer, so
        "normal" counts as "no". LLaVA-Med prints this for "closed" questions.
    yes_no_strict (float): for comparison only, over yes/no questions: the answer, stripped and lower-cased, is the reference and
        nothing else; "yes." is wrong. VILA-M3 (arXiv 2411.12915) prints accuracy on the yes/no questions alone.
    per_item (list of dict): for each question, `yes_no` and `correct` (bool), `recall` and `f1` (float).

Normalisation, after `vqaEval.py` of GT-Vision-Lab/VQA:
    1. new lines and tabs become spaces, surrounding white space goes (`evaluate`);
    2. each of ; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? ! is deleted if it stands next to a space anywhere in the text or the text has
       a comma between digits, and becomes a space otherwise; a period goes unless a digit follows (`processPunctuation`);
    3. lower case; "none", "zero" ... "ten" become digits; a, an, the go; contractions regain a lost apostrophe
       (`processDigitArticle`).

Raises:
    ValueError: for no questions, or something that is not text. An empty prediction is a wrong answer.
"""

KINDS = ("", "yes_no_", "free_form_")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class PathVQAAccuracy(evaluate.Metric):
    # For `alignvlm/evaluation/judge.py`.
    means = {
        "accuracy": ("correct", {}),
        "yes_no_accuracy": ("correct", {"yes_no": True}),
        "free_form_accuracy": ("correct", {"yes_no": False}),
        "free_form_recall": ("recall", {"yes_no": False}),
        "free_form_f1": ("f1", {"yes_no": False}),
    }
    per_prompt = ()
    per_kind = ("accuracy",)
    headlines = ("accuracy", "yes_no_accuracy", "free_form_accuracy")
    majority_by = ("yes_no",)

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
            codebase_urls=["https://github.com/GT-Vision-Lab/VQA"],
            reference_urls=["https://arxiv.org/abs/2003.10286", "https://arxiv.org/abs/1505.00468"],
        )

    def normal_form(self, reference, kind):
        return comparable(reference, reference)[1] or None

    def add(self, *, prediction=None, reference=None, **options):
        """Adds one question. See `compute`."""
        self.add_batch(predictions=[prediction], references=[reference], **options)

    def add_batch(self, *, predictions=None, references=None, **options):
        """Adds questions after checking them: a refused batch leaves earlier ones as they were. See `compute`."""
        if not predictions:
            raise ValueError("The accuracy needs at least one prediction; got none.")
        for name, texts in (("Prediction", predictions), ("Reference", references or [])):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"{name} {index} is {text!r}, not a string. Use '' for an empty answer.")
        super().add_batch(predictions=predictions, references=references, **options)

    def _compute(self, predictions, references):
        items = [_judge(prediction, reference) for prediction, reference in zip(predictions, references)]
        yes_no = [item for item in items if item["yes_no"]]
        free_form = [item for item in items if not item["yes_no"]]
        result = {}
        for kind, group in zip(KINDS, (items, yes_no, free_form)):
            answers = Counter(item["reference"] for item in group if item["reference"])
            result[f"{kind}accuracy"] = _mean(group, "correct")
            result[f"majority_{kind}accuracy"] = max(answers.values(), default=0) / len(group) if group else None
            result[f"{kind}count"] = len(group)
        result["free_form_recall"] = _mean(free_form, "recall")
        result["free_form_f1"] = _mean(free_form, "f1")
        result["llava_med_closed"] = _mean(yes_no, "contained")
        result["yes_no_strict"] = _mean(yes_no, "strict")
        result["per_item"] = [{name: item[name] for name in ("yes_no", "correct", "recall", "f1")} for item in items]
        return result


def _judge(prediction: str, reference: str) -> dict:
    """Returns all scores of one answer."""
    plain_prediction, plain_reference = prediction.strip().lower(), reference.strip().lower()
    given, right = comparable(prediction, reference)
    given_words, right_words = given.split(), right.split()
    shared = sum((Counter(given_words) & Counter(right_words)).values())
    return {
        "reference": right,
        "yes_no": plain_reference in ("yes", "no"),
        "correct": bool(right) and given == right,
        "recall": shared / len(right_words) if right_words else 0.0,
        "f1": 2 * shared / (len(given_words) + len(right_words)) if right_words else 0.0,
        "contained": plain_reference in plain_prediction,
        "strict": plain_reference == plain_prediction,
    }


def _mean(items: list[dict], name: str) -> float | None:
    return sum(item[name] for item in items) / len(items) if items else None
