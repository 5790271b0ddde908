"""Judges each answer by its metric, with confidence intervals, and compares two results.

A metric is a folder of `metrics/` that `evaluate.load` takes. Its class tells the judge two things beyond its numbers:

- `means`: the numbers that are means over items, and so get an interval. It maps each number to the score of an item and to a condition:
  an item counts if its other scores have the given values.
- `per_prompt`: the means that are reported for each prompt too.

The metric returns the scores of the items with its numbers: as `per_item`, a dict for each item, or as a list `<score>_per_item`.
"""

from collections.abc import Iterable
from pathlib import Path

import datasets
import evaluate

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


def judge(predictions: list[dict], samples: int = 1000, seed: int = 0) -> dict:
    """Scores each answer by its metric.

    Args:
        predictions: `{"id", "prompt", "prediction", "references", "metric"}` each. The bootstrap draws predictions of one `id` together.
            A metric with one reference per item takes the first.
        samples, seed: of the bootstrap.

    Returns:
        `metrics`: the numbers of each metric, with the 95% intervals of its means under `intervals` and its numbers per prompt under
        `by_prompt`; `definitions`; `predictions`: the given ones, each with its `scores`.

    Raises:
        ValueError: for an unknown metric, and for predictions that a metric refuses.
    """
    predictions = [dict(prediction) for prediction in predictions]
    metrics, definitions = {}, {}
    for name in sorted({prediction["metric"] for prediction in predictions}):
        items = [prediction for prediction in predictions if prediction["metric"] == name]
        metric = load_metric(name)
        definitions[name] = " ".join(metric.info.description.split("\nArgs:")[0].split())
        takes_one = isinstance(metric.features["references"], datasets.Value)
        references = [item["references"][0] if takes_one else item["references"] for item in items]
        numbers = metric.compute(predictions=[item["prediction"] for item in items], references=references)
        for item, scores in zip(items, _taken_scores(numbers, len(items)), strict=True):
            item["scores"] = scores
        metrics[name] = {**numbers, "intervals": _intervals(items, metric, metric.means, samples, seed)}
        if metric.per_prompt:
            metrics[name]["by_prompt"] = by_prompt(items, metric, samples, seed)
    return {"metrics": metrics, "definitions": definitions, "predictions": predictions}


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
    """Returns the 95% intervals of these means of a metric, except those for which no item counts."""
    intervals = {}
    for number in numbers:
        chosen, values = scores_of(items, metric, number)
        if values:
            intervals[number] = bootstrap.interval([item["id"] for item in chosen], values, samples, seed)
    return intervals


def by_prompt(items: list[dict], metric: evaluate.Metric, samples: int, seed: int) -> dict[str, dict]:
    """Returns a metric's `per_prompt` numbers for each prompt: the mean of its answers' scores, `count` and `intervals`."""
    groups: dict[str, list[dict]] = {}
    for item in items:
        groups.setdefault(item["prompt"], []).append(item)
    found = {}
    for prompt, group in groups.items():
        numbers = {}
        for number in metric.per_prompt:
            _, values = scores_of(group, metric, number)
            numbers[number] = sum(values) / len(values) if values else None
        intervals = _intervals(group, metric, metric.per_prompt, samples, seed)
        found[prompt] = {**numbers, "count": len(group), "intervals": intervals}
    return found


def scores_of(items: list[dict], metric: evaluate.Metric, number: str) -> tuple[list[dict], list[float]]:
    """Returns the predictions that count for a metric's number, and the scores whose mean it is."""
    score, where = metric.means[number]
    chosen = [item for item in items if all(item["scores"][name] == value for name, value in where.items())]
    return chosen, [float(item["scores"][score]) for item in chosen]


def compare(first: dict, second: dict, samples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Compares two results by the paired bootstrap: for each mean, how much higher `second` is (see `bootstrap.paired_difference`).

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
    for name in first["metrics"]:
        metric = load_metric(name)
        items = [[p for p in result["predictions"] if p["metric"] == name] for result in (first, second)]
        for number in metric.means:
            chosen, before = scores_of(items[0], metric, number)
            _, after = scores_of(items[1], metric, number)
            if chosen:
                ids = [item["id"] for item in chosen]
                differences[number] = bootstrap.paired_difference(ids, before, after, samples, seed)
    return differences
