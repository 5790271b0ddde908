"""What the tasks of this folder ask lmms-eval's models, and how it judges them: by this package's `pathvqa_accuracy`.

lmms-eval finds a task's functions in a file beside it that is called `utils.py`.
"""

import math

from alignvlm.evaluation.judge import load_metric


METRIC = "pathvqa_accuracy"
NUMBERS = ("accuracy", "yes_no_accuracy", "free_form_accuracy")


def images(row: dict) -> list:
    """The image of a row."""
    return [row["image"].convert("RGB")]


def question(row: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The prompt: the question, and what the model is told about the form of its answer."""
    return row["question"].strip() + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def target(row: dict) -> str:
    """The right answer."""
    return row["answer"]


def judged(row: dict, results: list[str]) -> dict[str, tuple[str, str]]:
    """What each number is made of: the answer and the right one."""
    return dict.fromkeys(NUMBERS, (results[0], row["answer"]))


def accuracy(pairs: list[tuple[str, str]]) -> float:
    """The share of right answers."""
    return _number("accuracy", pairs)


def yes_no_accuracy(pairs: list[tuple[str, str]]) -> float:
    """That of questions whose answer is yes or no; nan without any."""
    return _number("yes_no_accuracy", pairs)


def free_form_accuracy(pairs: list[tuple[str, str]]) -> float:
    """That of all others; nan without any."""
    return _number("free_form_accuracy", pairs)


def _number(name: str, pairs: list[tuple[str, str]]) -> float:
    predictions, references = map(list, zip(*pairs))
    value = load_metric(METRIC).compute(predictions=predictions, references=references)[name]
    return math.nan if value is None else value
