"""Chooses the answers that a report shows: of every kind some of the best, of the worst, and some drawn by chance."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from alignvlm.tools.report.pictures import Pictures, as_seen, data_uri, pictures_of
from alignvlm.tools.report.read import Result, Run


EACH = 8  # answers of a kind in each group
SCORES = {"cider": "cider", "pathvqa_accuracy": "correct"}  # the score of an answer that its group goes by
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


def score_of(prediction: dict) -> float | None:
    """Returns an answer's score by its metric; None if it has none."""
    scores = prediction.get("scores") or {}
    value = scores.get(SCORES.get(str(prediction.get("metric")), ""))
    if value is None:
        value = next((number for number in scores.values() if isinstance(number, (int, float))), None)
    return None if value is None else float(value)


def score_text(prediction: dict) -> str:
    """Says an answer's score in words."""
    score = score_of(prediction)
    if score is None:
        return "not scored"
    if SCORES.get(str(prediction.get("metric"))) == "correct":
        return "right" if score else "wrong"
    return f"{prediction['metric'].replace('cider', 'CIDEr')} {score:.2f}"


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
            notes.append(f"{result.task}: {pictures.note}")
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
        scored = [each for each in shuffled if score_of(each) is not None]
        by_score = sorted(scored, key=score_of)
        groups = {"best": by_score[-EACH:][::-1], "worst": by_score[:EACH], "random": shuffled[-EACH:]}
        if len(scored) < 2 * EACH:  # the two halves of a few
            groups |= {"best": by_score[len(scored) // 2 :][::-1], "worst": by_score[: len(scored) // 2]}
        chosen: dict[int, tuple[dict, list[str]]] = {}
        for group, members in groups.items():
            for prediction in members:
                chosen.setdefault(id(prediction), (prediction, []))[1].append(group)
        found += [make_answer(result.task, kind, prediction, pictures, its) for prediction, its in chosen.values()]
    return found


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


__all__ = ["Answer", "as_seen", "choose_answers", "kind_of", "make_answer", "score_of", "score_text"]
