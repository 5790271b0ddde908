"""Judges each answer by its metric, with confidence intervals, and compares two results.

A metric is a folder of `metrics/` that `evaluate.load` takes. Its class tells the judge what it must know beyond its numbers:

- `means`: the numbers that are means over items, and so get an interval. It maps each number to the score of an item and to a condition:
  an item counts if its other scores have the given values.
- `of_sums`: the numbers that are other functions of sums over items, such as BLEU or F1. It maps each number to a function from an item's
  scores to what is summed, and to the function of the sums (`bootstrap.Function`). They get an interval, too: each resample sums again.
- `per_prompt`, `per_kind`: the numbers of these that are reported for each prompt, or for each kind of question, too.
- `beside`: metrics that judge the same answers, too.
- `lower_is_better`, `neutral`: the numbers of which a lower value is better, or none; of all others a higher one is.
- `headlines`: the numbers that stand in a table of several tasks; by default the first.
- `normal_form`: returns the form in which it compares a reference to a question of a kind; None for one that no answer equals. The most frequent
  answer is counted by it; by default the reference as it is.
- `credit`: returns what an answer to a question scores by its references; the most frequent answer has the highest sum. By default 1 for each reference.
- `majority_by`: scores of an item, known from its reference alone, by whose values the most frequent answer is counted apart, too.
- `all_answers`: the normal forms, where these are answers themselves and there are no others.
- its `features`: which columns it gets, of `COLUMNS` and `references`.

The metric returns the scores of the items with its numbers: as `per_item`, a dict for each item, or as a list `<score>_per_item`.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import datasets
import evaluate
import numpy as np

from alignvlm.evaluation import bootstrap


METRICS = Path(__file__).resolve().parent / "metrics"


def load_metric(name: str) -> evaluate.Metric:
    """Loads the metric of the folder `metrics/<name>`.

    Raises:
        ValueError: if there is none.
    """
    if not (METRICS / name / f"{name}.py").is_file():
        valid = sorted(folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file())
        raise ValueError(f"There is no metric {name!r}. Valid values: {', '.join(valid)}.")
    return evaluate.load(str(METRICS / name))


# What a metric may ask for, by the names of its features, and what of a prediction it gets.
COLUMNS = {
    "predictions": "prediction",
    "ids": "id",
    "kinds": "kind",
    "choices": "choices",
    "likelihoods": "likelihoods",
    "letters": "letters",
}


def check_answers_suffice(name: str) -> None:
    """Refuses a metric that there is none of, and one that asks for more than answers have.

    Raises:
        ValueError: naming what it asks for.
    """
    asked = set(load_metric(name).features) - {*COLUMNS, "references"}
    if asked:
        raise ValueError(
            f"The metric {name!r} asks for {' and '.join(sorted(asked))}, which answers do not have: call it in Python, with a result's "
            "predictions (docs/evaluation.md)."
        )


def check_references_suffice(name: str, references: list[list[str]]) -> None:
    """Refuses references of questions by which a metric cannot judge.

    Raises:
        ValueError: with those of the first such question.
    """
    if check := getattr(load_metric(name), "check_references", None):
        check(references)


def headlines_of(metric: evaluate.Metric) -> tuple[str, ...]:
    """Returns the numbers of a metric that stand in a table of several tasks: its `headlines`, or the first."""
    given = getattr(metric, "headlines", None)
    return (numbers_of(metric)[0],) if given is None else given


def direction_of(metric: evaluate.Metric, number: str) -> int:
    """Returns 1 if a higher value of a metric's number is better, -1 if a lower one is, and 0 if neither."""
    if number in getattr(metric, "neutral", ()):
        return 0
    return -1 if number in getattr(metric, "lower_is_better", ()) else 1


def judges_of(name: str) -> list[str]:
    """Returns the names of the metrics that judge answers of a metric: itself, and those `beside` it."""
    return [name, *getattr(load_metric(name), "beside", ())]


def judge(predictions: list[dict], samples: int = 1000, seed: int = 0) -> dict:
    """Scores each answer by its metric.

    Args:
        predictions: `{"id", "prompt", "prediction", "references", "metric"}` each, and what else the metric asks for. The bootstrap draws
            predictions of one `id` together. A metric with one reference per item takes the first.
        samples, seed: of the bootstrap.

    Returns:
        `metrics`: the numbers of each metric, with their 95% intervals under `intervals` and its numbers per prompt and per kind under
        `by_prompt` and (of several kinds) `by_kind`; `definitions`; `predictions`: the given ones, each with its `scores`.

    Raises:
        ValueError: for an unknown metric, and for predictions that a metric refuses.
    """
    predictions = [{**prediction, "scores": {}} for prediction in predictions]
    judged: dict[str, list[dict]] = {}
    for first in sorted({prediction["metric"] for prediction in predictions}):
        items = [prediction for prediction in predictions if prediction["metric"] == first]
        for name in judges_of(first):
            judged.setdefault(name, []).extend(items)
    metrics, definitions = {}, {}
    for name, items in judged.items():
        metric = load_metric(name)
        definitions[name] = " ".join(metric.info.description.split("\nArgs:")[0].split())
        numbers, scores = computed(metric, items)
        for item, found in zip(items, scores, strict=True):
            item["scores"] |= found
        metrics[name] = {**numbers, "intervals": _intervals(items, metric, numbers_of(metric), samples, seed)}
        if metric.per_prompt:
            metrics[name]["by_prompt"] = numbers_by("prompt", items, metric, metric.per_prompt, samples, seed)
        per_kind = getattr(metric, "per_kind", ())
        if per_kind and len({item.get("kind") for item in items}) > 1:
            metrics[name]["by_kind"] = numbers_by("kind", items, metric, per_kind, samples, seed)
    return {"metrics": metrics, "definitions": definitions, "predictions": predictions}


def computed(metric: evaluate.Metric, items: list[dict], **options) -> tuple[dict, list[dict]]:
    """Returns a metric's numbers for predictions as `judge` takes them, and the scores of each; `options` are the metric's own."""
    numbers = metric.compute(**_columns(items, metric), **options)
    return numbers, _taken_scores(numbers, len(items))


def _columns(items: list[dict], metric: evaluate.Metric) -> dict[str, list]:
    """Returns the columns that a metric asks for by its features."""
    takes_one = _takes_one(metric)
    columns = {"references": [item["references"][0] if takes_one else item["references"] for item in items]}
    for name, feature in metric.features.items():
        if name != "references":
            missing = "" if isinstance(feature, datasets.Value) else []
            columns[name] = [missing if (value := item.get(COLUMNS[name])) is None else value for item in items]
    return columns


def _takes_one(metric: evaluate.Metric) -> bool:
    return isinstance(metric.features["references"], datasets.Value)


def right_answers(metric: evaluate.Metric, item: dict) -> list[tuple[str, str, float]]:
    """Returns each right answer to a question once: its normal form, the first reference of that form, and what it scores."""
    form_of = getattr(metric, "normal_form", lambda reference, kind: reference)
    credit = getattr(metric, "credit", lambda reference, references: 1.0)
    references, found = item["references"], {}
    for reference in references[:1] if _takes_one(metric) else references:
        form = form_of(reference, item.get("kind") or "")
        if form is not None and form not in found:
            found[form] = form, reference, credit(reference, references)
    return list(found.values())


def numbers_of(metric: evaluate.Metric) -> list[str]:
    """Returns the names of a metric's numbers that get an interval."""
    return [*metric.means, *getattr(metric, "of_sums", {})]


def _taken_scores(numbers: dict, count: int) -> list[dict]:
    """Takes the scores of each item out of a metric's numbers."""
    scores: list[dict] = numbers.pop("per_item", None) or [{} for _ in range(count)]
    for name in [name for name in numbers if name.endswith("_per_item")]:
        for item, value in zip(scores, numbers.pop(name), strict=True):
            item[name.removesuffix("_per_item")] = value
    return scores


def _intervals(
    items: list[dict], metric: evaluate.Metric, numbers: Iterable[str], samples: int, seed: int
) -> dict[str, list[float]]:
    """Returns the 95% intervals of these numbers of a metric, except those for which no item counts."""
    intervals = {}
    for number in numbers:
        ids, columns, function = _summands(items, metric, number)
        if len(ids) and not np.isnan(function(columns.sum(0))):
            intervals[number] = bootstrap.interval_of(ids, columns, function, samples, seed)
    return intervals


def numbers_by(
    key: str, items: list[dict], metric: evaluate.Metric, numbers: Iterable[str], samples: int, seed: int
) -> dict[str, dict]:
    """Returns numbers of a metric for the answers with each value of `key`: their values, `count` and `intervals`."""
    groups: dict[str, list[dict]] = {}
    for item in items:
        groups.setdefault(item.get(key) or "", []).append(item)
    found = {}
    for value, group in groups.items():
        own = {number: value_of(group, metric, number) for number in numbers}
        found[value] = {**own, "count": len(group), "intervals": _intervals(group, metric, numbers, samples, seed)}
    return found


def value_of(items: list[dict], metric: evaluate.Metric, number: str) -> float | None:
    """Returns a number of a metric over judged predictions; None if none of them counts."""
    ids, columns, function = _summands(items, metric, number)
    value = function(columns.sum(0)) if len(ids) else math.nan
    return None if math.isnan(value) else float(value)


def _summands(items: list[dict], metric: evaluate.Metric, number: str) -> tuple[list, np.ndarray, bootstrap.Function]:
    """Returns what a number is made of: the ids of the predictions that count, what they add to the sums `(items, columns)`, and the
    function of the sums."""
    if number in metric.means:
        chosen, values = scores_of(items, metric, number)
        return [item["id"] for item in chosen], bootstrap.counted(values), bootstrap.mean
    summed, function = metric.of_sums[number]
    return [item["id"] for item in items], np.array([summed(item["scores"]) for item in items], dtype=float), function


def scores_of(items: list[dict], metric: evaluate.Metric, number: str) -> tuple[list[dict], list[float]]:
    """Returns the predictions that count for a metric's number, and the scores whose mean it is."""
    score, where = metric.means[number]
    chosen = [item for item in items if all(item["scores"][name] == value for name, value in where.items())]
    return chosen, [float(item["scores"][score]) for item in chosen]


def compare(first: dict, second: dict, samples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Compares two results by the paired bootstrap: for each number with an interval that both have, how much higher `second` is (see
    `bootstrap.paired_difference_of`), and `direction`, whether higher is better (see `direction_of`).

    Raises:
        ValueError: if the results do not answer the same questions.
    """
    questions = [
        [(item.get("id"), item.get("prompt"), item.get("references")) for item in result["predictions"]]
        for result in (first, second)
    ]
    if first["task"] != second["task"] or questions[0] != questions[1] or "text" in first["metrics"]:
        raise ValueError(
            f"The results do not answer the same questions about images: task {first['task']!r} with {len(questions[0])} "
            f"answers and task {second['task']!r} with {len(questions[1])}. Evaluate both on the same data and split."
        )
    differences = {}
    for name in [name for name in first["metrics"] if name in second["metrics"]]:
        metric = load_metric(name)
        judged = {own for own in {p["metric"] for p in first["predictions"]} if name in judges_of(own)}
        items = [[p for p in result["predictions"] if p["metric"] in judged] for result in (first, second)]
        for number in numbers_of(metric):
            (ids, before, function), (others, after, _) = (_summands(each, metric, number) for each in items)
            if not ids or ids != others:  # such as likelihoods, which only one of them has
                continue
            found = bootstrap.paired_difference_of(ids, before, after, function, samples, seed)
            if found is not None:
                differences[number] = {**found, "direction": direction_of(metric, number)}
    return differences
