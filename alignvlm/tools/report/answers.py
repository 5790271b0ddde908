"""Chooses the answers that a report shows: of every kind some of the best, of the worst, and some drawn by chance."""

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from alignvlm.evaluation.judge import direction_of, load_metric
from alignvlm.tools.report.pictures import Pictures, data_uri, pictures_of
from alignvlm.tools.report.read import Result, Run


EACH = 6  # answers of a kind in each group
KINDS = {"short_caption": "short caption", "detailed_caption": "detailed caption", "yes_no": "yes/no question"}


@dataclass
class Answer:
    """An answer as the page shows it. `groups` are among `best`, `worst` and `random`; `score` is shown as `score_text`."""

    task: str
    kind: str
    prompt: str
    text: str
    references: list[str]
    score: float | None
    score_text: str
    groups: list[str]
    prediction: dict
    pictures: Pictures
    uris: list[str] = field(default_factory=list)
    tiny: bool = False  # drawn at a few pixels, to be shown without smoothing


@cache
def _scored_by(metric: str) -> tuple[str | None, int]:
    """Returns the score of an answer that a metric's first mean is made of, and whether higher is better (1) or lower (-1)."""
    try:
        found = load_metric(metric)
    except ValueError:  # of another release
        return None, 1
    number = next(iter(found.means), None)
    return (None, 1) if number is None else (found.means[number][0], direction_of(found, number) or 1)


def score_of(prediction: dict) -> float | None:
    """Returns an answer's score by its metric, the higher the better; None if it has none."""
    scores = prediction.get("scores") or {}
    name, direction = _scored_by(str(prediction.get("metric")))
    value = scores.get(name)
    if value is None and name is None:
        value = next((number for number in scores.values() if isinstance(number, (int, float))), None)
    return None if value is None else float(value) if direction > 0 else 1 - float(value)


def score_text(prediction: dict) -> str:
    """Says an answer's score in words."""
    score = score_of(prediction)
    if score is None:
        return "not scored"
    name, _ = _scored_by(str(prediction.get("metric")))
    if isinstance((prediction.get("scores") or {}).get(name), bool):
        return "right" if score else "wrong"
    return f"{str(prediction.get('metric', 'score')).replace('cider', 'CIDEr')} {score:.2f}"


def kind_of(prediction: dict, pictures: Pictures) -> str:
    """Returns what was asked for: as the data set says it, else as far as the scores tell."""
    conversation = pictures.conversation(prediction)
    if conversation is not None and conversation.kind:
        return KINDS.get(conversation.kind, conversation.kind.replace("_", " "))
    scores = prediction.get("scores") or {}
    if "yes_no" in scores:
        return "yes/no question" if scores["yes_no"] else "open question"
    return "caption" if prediction.get("metric") == "cider" else "question"


def choose_answers(run: Run, data: str | None, near: list[Path], seed: int = 0) -> tuple[list[Answer], list[str]]:
    """Returns the answers of the last checkpoint to show, with their images, and notes on what is missing."""
    found: list[Answer] = []
    notes = []
    for result in run.last_results() if run.results else []:
        if result.task == "text_perplexity":
            continue
        pictures = pictures_of(result, data, near)
        if pictures.note:
            notes.append(f"{result.title}: {pictures.note}")
        found += _chosen(result, pictures, seed)
    return found, notes


def _chosen(result: Result, pictures: Pictures, seed: int) -> list[Answer]:
    kinds: dict[str, list[dict]] = {}
    for prediction in result.content["predictions"]:
        if isinstance(prediction, dict) and "prediction" in prediction:
            kinds.setdefault(kind_of(prediction, pictures), []).append(prediction)
    found = []
    for kind, predictions in kinds.items():
        shuffled = random.Random(seed).sample(predictions, len(predictions))  # equal scores in an order of chance
        by_score = sorted((each for each in shuffled if score_of(each) is not None), key=score_of)
        each = min(EACH, len(by_score) // 2)  # no answer is among the best and the worst
        best = [one for one in by_score[::-1][:each] if score_of(one) > 0]  # none is best among failures
        worst = [one for one in by_score[:each] if score_of(one) == 0 or score_of(one) < score_of(by_score[-1])]
        groups = {"random": shuffled[:EACH], "best": best, "worst": worst}
        chosen: dict[int, tuple[int, dict, list[str]]] = {}
        for group, members in groups.items():
            for rank, prediction in enumerate(members):
                chosen.setdefault(id(prediction), (rank, prediction, []))[2].append(group)
        found += [
            (rank, make_answer(result.title, kind, prediction, pictures, its))
            for rank, prediction, its in chosen.values()
        ]
    return [answer for _, answer in sorted(found, key=lambda each: each[0])]  # the first of every kind and group first


def make_answer(task: str, kind: str, prediction: dict, pictures: Pictures, groups: list[str]) -> Answer:
    """Makes what the page shows of a prediction, with its images if they are at hand."""
    images = pictures.images(prediction)
    return Answer(
        task=task,
        kind=kind,
        prompt=str(prediction.get("prompt", "")),
        text=str(prediction["prediction"]),
        references=[str(reference) for reference in prediction.get("references") or []],
        score=score_of(prediction),
        score_text=score_text(prediction),
        groups=groups,
        prediction=prediction,
        pictures=pictures,
        uris=[data_uri(image) for image in images],
        tiny=bool(images) and max(images[0].size) <= 128,
    )
