"""The report of two runs beside each other: paired differences, and the answers that changed."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from alignvlm.evaluation.judge import compare
from alignvlm.tools.report.answers import Answer, kind_of, make_answer, score_of, score_text
from alignvlm.tools.report.charts import number
from alignvlm.tools.report.heat import data_folders
from alignvlm.tools.report.metrics import TITLES, task_views
from alignvlm.tools.report.page import render
from alignvlm.tools.report.pictures import pictures_of
from alignvlm.tools.report.read import Result, Run, read_run


MOST_CHANGED = 60  # answers shown of a task


@dataclass
class Difference:
    """How much higher the second run is in a metric: percent from the left of an axis whose middle is no difference."""

    title: str
    explanation: str
    text: str
    verdict: str
    place: float
    low: float
    high: float
    most: str


@dataclass
class Changed:
    """A question that the runs answered differently; `change` is `better`, `worse` or `other words`, from the first to the second."""

    first: Answer
    second_text: str
    second_score: str
    change: str


@dataclass
class Comparison:
    """A task that both runs answered; `note` says why it cannot be compared, if so."""

    task: str
    differences: list[Difference]
    changed: list[Changed]
    counts: dict[str, int]
    total: int
    note: str = ""


def report_of_two(first: Path, second: Path, data: str | None = None) -> str:
    """Returns the page about two runs; arguments and errors as of `report_of_run`."""
    runs = [read_run(first), read_run(second)]
    names = [run.name for run in runs]
    if names[0] == names[1]:
        names = [str(path) for path in (first, second)]
    comparisons, notes = compare_runs(
        runs[0], runs[1], data, [*data_folders(runs[0], first), *data_folders(runs[1], second)]
    )
    return render(
        "comparison.html",
        title=f"{names[0]} and {names[1]}",
        names=names,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        runs=runs,
        comparisons=comparisons,
        notes=notes,
        tasks=[task_views(run.results) for run in runs],
        settings=_settings(*runs),
    )


def compare_runs(first: Run, second: Run, data: str | None, near: list[Path]) -> tuple[list[Comparison], list[str]]:
    """Compares the last results of each task that both runs have; returns notes about the others, too."""
    own = [{result.title: result for result in run.last_results()} if run.results else {} for run in (first, second)]
    notes = [
        _without_partner(run, task, other)
        for run, other, mine, others in ((first, second, *own), (second, first, *reversed(own)))
        for task in mine
        if task not in others
    ]
    if not any(own):
        but = " but of controls" if first.results or second.results else ""
        notes.append(f"Neither run has results{but} of `alignvlm evaluate`, so there are no answers to compare.")
    return [_compared(own[0][task], own[1][task], data, near) for task in own[0] if task in own[1]], notes


def _without_partner(run: Run, task: str, other: Run) -> str:
    """Says why a result of the last checkpoint that was asked is compared with none."""
    plain = [result for result in other.results if result.control is None]
    earlier = [result for result in plain if result.title == task]
    if not earlier:
        return f"Only {run.name} has a result of the task {task!r}, so there is nothing to compare it with."
    names = [result.checkpoint.name if result.checkpoint else str(result.path) for result in (plain[-1], earlier[-1])]
    return (
        f"{other.name} has a result of the task {task!r} of {names[1]}, but none of {names[0]}, the last checkpoint with results: that of "
        f"{run.name} is compared with none. Evaluate {names[0]}, or compare the folders of two stages."
    )


def _compared(first: Result, second: Result, data: str | None, near: list[Path]) -> Comparison:
    try:
        found = compare(first.content, second.content)
    except (ValueError, KeyError, TypeError) as error:
        return Comparison(first.title, [], [], {}, 0, note=str(error))
    pictures = pictures_of(first, data, near)
    changed = []
    counts = dict.fromkeys(("better", "worse", "other words"), 0)
    pairs = list(zip(first.content["predictions"], second.content["predictions"]))
    for before, after in pairs:
        if before["prediction"] == after["prediction"]:
            continue
        gain = (score_of(after) or 0) - (score_of(before) or 0)
        change = "better" if gain > 0 else "worse" if gain < 0 else "other words"
        counts[change] += 1
        changed.append((abs(gain), change, before, after))
    shown: list[Changed] = []
    for change in counts:
        of_kind = sorted((each for each in changed if each[1] == change), key=lambda each: -each[0])
        for _, _, before, after in of_kind[: MOST_CHANGED // len(counts)]:
            answer = make_answer(first.title, kind_of(before, pictures), before, pictures, [change])
            shown.append(Changed(answer, str(after["prediction"]), score_text(after), change))
    note = pictures.note if changed else ""
    return Comparison(first.title, _differences(found), shown, counts, len(pairs), note)


# By the direction of a number: what a second value above the first means, and one below it.
VERDICTS = {
    1: ("the second is better", "the first is better"),
    -1: ("the first is better", "the second is better"),
    0: ("the second is higher", "the first is higher"),
}


def _differences(found: dict[str, dict]) -> list[Difference]:
    views = []
    for metric, difference in found.items():
        low, high = difference["interval"]
        most = max(abs(low), abs(high), abs(difference["difference"])) * 1.1 or 1.0
        title, explanation = TITLES.get(metric, (metric.replace("_", " "), ""))
        above, below = VERDICTS[difference.get("direction", 1)]
        verdict = "no clear difference" if low <= 0 <= high else above if low > 0 else below
        signed = [f"{'+' if value > 0 else ''}{number(value)}" for value in (difference["difference"], low, high)]
        places = [50 + 50 * value / most for value in (difference["difference"], low, high)]
        text = f"{signed[0]} ({signed[1]} to {signed[2]})"
        views.append(Difference(title, explanation, text, verdict, *places, most=number(most)))
    return views


def _settings(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """Returns the settings of the stages that differ: what, in the first, in the second."""
    names = (
        "learning_rates",
        "attention_mask_type",
        "attention_mask_type_shares",
        "keep_language",
        "projector_start",
        "steps",
        "records",
        "seed",
        "precision",
        "processes",
        "seconds",
        "train_loss",
    )
    found = []
    runs = [_by_title(run.stages) for run in (first, second)]
    for title in sorted({**runs[0], **runs[1]}):
        stages = [run.get(title, {}) for run in runs]
        for name in names:
            values = [_shown(stage.get(name)) for stage in stages]
            if values[0] != values[1]:
                found.append((f"{title}, {name.replace('_', ' ')}", values[0], values[1]))
    return found


def _by_title(stages: list[dict]) -> dict[str, dict]:
    """Returns the stages by their own numbers; of several with one number, the later ones are counted."""
    found: dict[str, dict] = {}
    numbers = [stage.get("stage", "?") for stage in stages]
    for index, stage in enumerate(stages):
        time = numbers[: index + 1].count(numbers[index])
        found[f"Stage {numbers[index]}" + (f" (time {time})" if time > 1 else "")] = stage
    return found


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return number(value) if isinstance(value, (int, float)) else "none" if value is None else str(value)
