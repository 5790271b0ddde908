"""What of a score needs the image: results beside those of controls, and several tasks in one table."""

import math
from collections import Counter

from evaluate import Metric

from alignvlm.evaluation.judge import compare, direction_of, headlines_of, judge, load_metric, right_answers
from alignvlm.evaluation.one_task import name_of


MOST_FREQUENT = "most_frequent_answer"
COLUMNS = {
    "blank_image": "grey image",
    "shuffle_images": "another image",
    "question_only": "no image",
    MOST_FREQUENT: "most frequent answer",
}


def most_frequent(result: dict) -> dict:
    """Returns the result of always giving the answer that is most often right in this very set, to questions of the same kind.

    References count as one answer where their metric compares them as one, and the answer is written as most of these are. A metric that counts
    its own majority apart for some questions (yes/no) does so here. Of answers that are right equally often it is the first.
    """
    metrics = {item["metric"]: load_metric(item["metric"]) for item in result["predictions"]}
    kinds = [_kind(item, metrics[item["metric"]]) for item in result["predictions"]]
    scores: dict[tuple, Counter] = {kind: Counter() for kind in kinds}
    spellings: dict[tuple, Counter] = {}
    for kind, item in zip(kinds, result["predictions"]):
        for form, reference, score in right_answers(metrics[item["metric"]], item):
            scores[kind][form] += score
            spellings.setdefault((kind, form), Counter())[reference] += 1
    answers = {}
    for kind, counts in scores.items():
        form = counts.most_common(1)[0][0] if counts else ""
        is_answer = not counts or form in getattr(metrics[kind[0]], "all_answers", ())
        answers[kind] = form if is_answer else spellings[kind, form].most_common(1)[0][0]
    given = [
        {name: value for name, value in item.items() if name not in ("scores", "likelihoods", "letters")}
        | {"prediction": answers[kind]}
        for kind, item in zip(kinds, result["predictions"])
    ]
    judged = judge(given, result["bootstrap_samples"], result["seed"])
    return {**result, "control": MOST_FREQUENT, **judged}


def _kind(item: dict, metric: Metric) -> tuple:
    return item["metric"], item.get("kind"), *(item["scores"][name] for name in getattr(metric, "majority_by", ()))


def needed(result: dict, controls: dict[str, dict]) -> dict[str, dict]:
    """Tells for each number how much of it needs the image: how much higher it is than under the control that does best without it (lower,
    so below zero, where lower is better).

    Args:
        result: with the images.
        controls: results of the same questions by the names of `COLUMNS`.

    Returns:
        For each number `control`, and the `difference` to it with its 95% `interval` and `p` (see `judge.compare`).
    """
    differences = {
        name: compare(other, result, result["bootstrap_samples"], result["seed"]) for name, other in controls.items()
    }
    found = {}
    for metric, name in _headlines(result):
        values = {control: other["metrics"][metric].get(name) for control, other in controls.items()}
        known = {control: value for control, value in values.items() if value is not None}
        if result["metrics"][metric].get(name) is None or not known:
            continue
        sign = direction_of(load_metric(metric), name) or 1
        best = max(known, key=lambda control: sign * known[control])
        if name in differences[best]:
            found[name] = {"control": best, **differences[best][name]}
    return found


def _headlines(result: dict) -> list[tuple[str, str]]:
    """Returns the numbers of a result that stand in a table, with the metric of each."""
    names = {
        metric: ("perplexity",) if metric == "text" else headlines_of(load_metric(metric))
        for metric in result["metrics"]
    }
    return [(metric, name) for metric, numbers in names.items() for name in numbers]


def table(results: list[tuple[dict, dict[str, dict]]]) -> str:
    """Returns a Markdown table of results: their headlines, and beside them those of their controls.

    Args:
        results: each result with the results of its controls by the names of `COLUMNS`; without controls there are no such columns.
    """
    with_controls = any(controls for _, controls in results)
    head = ["task", "number", "value", "95% interval"]
    head += [*COLUMNS.values(), "needs the image", "95% interval"] if with_controls else []
    rows = [head]
    for result, controls in results:
        of_image = needed(result, controls) if controls else {}
        for metric, name in _headlines(result):
            numbers = result["metrics"][metric]
            row = [name_of(result), name, _shown(numbers.get(name)), _range(numbers["intervals"].get(name))]
            if with_controls:
                others = [
                    controls[control]["metrics"][metric].get(name) if control in controls else None
                    for control in COLUMNS
                ]
                own = of_image.get(name, {})
                row += [*map(_shown, others), _shown(own.get("difference"), "+"), _range(own.get("interval"), "+")]
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.4f}"


def _range(interval: list[float] | None, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"
