"""Puts the numbers of a run in the order in which a page shows them: what each stage changed, and how well the answers are."""

from dataclasses import dataclass, field
from functools import cache

from markupsafe import Markup

from alignvlm.evaluation.judge import headlines_of, load_metric
from alignvlm.stages.trainer import MODULES
from alignvlm.tools.report.charts import Scale, Series, duration, number, plot, round_end
from alignvlm.tools.report.read import Result


# What stages measure before and after: (name in the run record, title, what it means).
MEASURED = (
    (
        "eval_loss",
        "Loss on held-out examples",
        "How surprised the model is by answers it has not been trained on. Lower is better.",
    ),
    (
        "text_perplexity",
        "Perplexity of plain text",
        "How many words the model wavers between when it reads text without images. If it rises, the language model forgets.",
    ),
    (
        "mir",
        "Distance between image and text (MIR)",
        "How differently image tokens and text tokens are distributed inside the language model. Lower: better aligned.",
    ),
    (
        "image_embedding_norm",
        "Length of image tokens",
        "The mean length of the vectors that the projector makes of an image.",
    ),
    ("text_embedding_norm", "Length of text tokens", "The same of words. Far apart, one drowns out the other."),
    # of stage 5: the rewards of answers to held-out prompts
    (
        "eval_cider",
        "Held-out captions (CIDEr)",
        "The mean reward of captions that the stage has not been trained on. Higher is better.",
    ),
    (
        "eval_accuracy",
        "Held-out answers that are right",
        "The mean reward of other answers, by their own metric. Higher is better.",
    ),
    (
        "eval_chair",
        "Objects named that are not there",
        "Minus their share in held-out captions. Higher, that is nearer to 0, is better.",
    ),
)
TITLES = {
    "accuracy": ("Right answers", "The share of all questions answered exactly as the reference."),
    "yes_no_accuracy": ("Right answers to yes/no questions", "Guessing would reach about a half."),
    "free_form_accuracy": ("Right answers to open questions", "The share answered exactly as the reference."),
    "free_form_recall": (
        "Words of the reference found",
        "Over open questions: the share of the reference's words in the answer.",
    ),
    "free_form_f1": (
        "Overlap of words (F1)",
        "Over open questions: words in common with the reference, against words in all.",
    ),
    "cider": (
        "Captions (CIDEr)",
        "How much captions have in common with the references, rare words counting more: 0 is nothing, 10 the same. Papers print it times 100.",
    ),
    "perplexity": ("Perplexity of a text", "How many words the model wavers between at each. Lower is better."),
}
MAIN = ("accuracy", "yes_no_accuracy", "free_form_accuracy", "cider", "perplexity")
CONTROLS = {
    "blank_image": "every image replaced by grey",
    "shuffle_images": "asked about another image",
    "question_only": "asked without the image",
    "most_frequent_answer": "always the most frequent answer",
}
DROPPED = {
    "bad_image": "records left out because an image could not be read",
    "bad_row": "rows left out because their texts could not be used",
    "cut_response": "answers cut because their row was too long",
    "dropped_annotation": "annotations left out because they did not fit into a row",
    "dropped_record": "records left out because nothing of them fitted into a row",
}


@dataclass
class StagePanel:
    """A stage's column of the time line; `facts` are further values by their names."""

    title: str
    trains: dict[str, float | None]
    loss: Markup | None
    rates: Markup | None
    facts: dict[str, str]


@dataclass
class TimeLine:
    """All stages; `fact_names` are the names of all their facts, `loss_ticks` and `rate_ticks` the axes' `(percent, text)`."""

    panels: list[StagePanel]
    fact_names: list[str]
    loss_ticks: list
    rate_ticks: list
    log_loss: bool
    estimated: bool  # an old record holds losses without their steps


def time_line(stages: list[dict]) -> TimeLine:
    """Draws the loss and the learning rates of each stage, on the same axes."""
    logs = [_log(stage) for stage in stages]
    losses = [entry["loss"] for log in logs for entry in log]
    held_out = [stage.get(f"eval_loss_{when}") for stage in stages for when in ("before", "after")]
    loss_scale = Scale.of([*losses, *held_out])
    curves = [_rates(stage, log) for stage, log in zip(stages, logs)]
    peaks = [rate for stage in stages for rate in (stage.get("learning_rates") or {}).values()]
    rates = [value for lines in curves for points in lines.values() for _, value in points]
    rate_scale = Scale.of(
        [value for value in (*peaks, *rates) if value], log=True, floor=max([*peaks, *rates, 0]) / 1000
    )
    panels = []
    for stage, log, lines in zip(stages, logs, curves):
        title = f"Stage {stage.get('stage', '?')}"
        before, after = stage.get("eval_loss_before"), stage.get("eval_loss_after")
        series = [Series("training", [(entry["x"], entry["loss"]) for entry in log])]
        series += [Series("held-out", [(0, before), (100, after)], marks=True)] if None not in (before, after) else []
        drawn = loss_scale is not None and any(each.points for each in series)
        said = f"{title}: loss"
        if log:
            said += f" in training from {number(log[0]['loss'])} to {number(log[-1]['loss'])}"
        if None not in (before, after):
            said += f", on held-out examples from {number(before)} to {number(after)}"
        rate_words = ", ".join(
            f"{module} at most {number(rate)}" for module, rate in (stage.get("learning_rates") or {}).items()
        )
        rate_series = [Series(module, points) for module, points in lines.items() if points]
        panels.append(
            StagePanel(
                title=title + (" (not finished)" if stage.get("unfinished") else ""),
                trains={module: (stage.get("learning_rates") or {}).get(module) for module in MODULES},
                loss=plot(series, loss_scale, said) if drawn else None,
                rates=plot(rate_series, rate_scale, f"{title}: learning rates, {rate_words}")
                if rate_scale is not None and rate_series
                else None,
                facts=_facts(stage, log),
            )
        )
    return TimeLine(
        panels,
        list(dict.fromkeys(name for panel in panels for name in panel.facts)),
        loss_scale.ticks() if loss_scale else [],
        rate_scale.ticks() if rate_scale else [],
        bool(loss_scale and loss_scale.log),
        any(not stage.get("log") and stage.get("logged_losses") for stage in stages),
    )


def _log(stage: dict) -> list[dict]:
    """Returns the lines of a stage's log that hold a loss, each with its place `x` in percent of the stage."""
    steps = stage.get("steps") or 0
    log = [entry for entry in stage.get("log") or [] if isinstance(entry, dict) and entry.get("loss") is not None]
    if not log:  # a record of before 0.2 holds the losses alone
        losses = stage.get("logged_losses") or []
        return [{"loss": loss, "x": 100 * (index + 1) / len(losses)} for index, loss in enumerate(losses)]
    last = max([steps, *(entry.get("step") or 0 for entry in log)]) or 1
    return [{**entry, "x": 100 * (entry.get("step") or 0) / last} for entry in log]


def _rates(stage: dict, log: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Returns the learning rate of each module over the stage; where the record has none, the peak as a level line."""
    peaks = {module: rate for module, rate in (stage.get("learning_rates") or {}).items() if rate}
    found: dict[str, list[tuple[float, float]]] = {}
    for module in sorted(peaks, key=lambda name: MODULES.index(name) if name in MODULES else 9):
        points = [(e["x"], e[f"learning_rate/{module}"]) for e in log if e.get(f"learning_rate/{module}") is not None]
        if not points:  # the log names the first module's; all follow one schedule
            first = next(name for name in MODULES if name in peaks)
            share = peaks[module] / peaks[first]
            points = [(e["x"], e["learning_rate"] * share) for e in log if e.get("learning_rate") is not None]
        found[module] = points or [(0, peaks[module]), (100, peaks[module])]
    return found


def _facts(stage: dict, log: list[dict]) -> dict[str, str]:
    seconds, records = stage.get("seconds"), stage.get("records")
    facts = {"time": duration(seconds), "steps": number(stage.get("steps"))}
    if records and seconds:
        facts["examples a second"] = number(records * (stage.get("epochs") or 1) / seconds)
    for name, title in (("tokens_per_second", "tokens a second"), ("images_per_second", "images a second")):
        values = [entry[name] for entry in log if entry.get(name)]
        if values:
            facts[title] = number(sorted(values)[len(values) // 2])
    memory = [entry["memory_gb"] for entry in log if entry.get("memory_gb")]
    if memory:
        facts["most memory"] = f"{number(max(memory))} GB"
    shares = stage.get("attention_mask_type_shares", {})
    mixed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    facts["mask"] = mixed or str(stage.get("attention_mask_type", "unknown"))
    if stage.get("precision"):
        facts["computed in"] = str(stage["precision"])
    if (stage.get("processes") or 1) > 1:
        facts["processes"] = number(stage["processes"])
    if stage.get("resumed_at"):
        facts["resumed at step"] = ", ".join(map(str, stage["resumed_at"]))
    return facts


@dataclass
class Change:
    """What a stage changed of one metric: `(text before, text after, drawing)` per stage, None where it was not measured."""

    title: str
    explanation: str
    cells: list[tuple[str, str, Markup] | None]


def changes(stages: list[dict]) -> list[Change]:
    """Returns each metric that stages measured before and after."""
    found = []
    for name, title, explanation in MEASURED:
        pairs = [(stage.get(f"{name}_before"), stage.get(f"{name}_after")) for stage in stages]
        scale = Scale.of([value for pair in pairs for value in pair])
        if scale is None:
            continue
        cells = []
        for stage, (before, after) in zip(stages, pairs):
            if before is None or after is None:
                cells.append(None)
                continue
            label = f"{title}, stage {stage.get('stage')}: from {number(before)} to {number(after)}"
            drawing = plot([Series("held-out", [(8, before), (92, after)], marks=True)], scale, label)
            cells.append((number(before), number(after), drawing))
        found.append(Change(title, explanation, cells))
    return found


def dropped(stages: list[dict]) -> list[tuple[str, list[tuple[str, int]], list[str]]]:
    """Returns per stage that dropped data: its title, the numbers of each kind, and some by name."""
    found = []
    for stage in stages:
        losses = stage.get("losses_of_data") or {}
        counts = [
            (DROPPED.get(kind, kind.replace("_", " ")), count)
            for kind, count in losses.items()
            if isinstance(count, (int, float)) and count
        ]
        names = [str(name) for kind in ("bad_image", "bad_row") for name in losses.get(f"{kind}_list") or []]
        for kind in ("bad_image", "bad_row"):  # images are listed, not counted
            listed = losses.get(f"{kind}_list") or []
            if listed and not losses.get(kind):
                counts.append((DROPPED[kind], len(listed)))
        if counts:
            found.append((f"Stage {stage.get('stage')}", counts, names[:20]))
    return found


@dataclass
class Row:
    """A line of a metric: its value with interval as places on the axis in percent; `kind` is `model`, `control` or `baseline`."""

    label: str
    value: float
    text: str
    kind: str
    place: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass
class MetricView:
    """A metric of a task over all results."""

    title: str
    explanation: str
    rows: list[Row]
    most: str  # the end of the axis


@dataclass
class TaskView:
    """A task with its metrics, those for which a reader has to ask, and all numbers of its last result as pairs."""

    task: str
    metrics: list[MetricView]
    further: list[MetricView]
    others: list[tuple[str, str]]
    definitions: dict[str, str] = field(default_factory=dict)


@cache
def _headlines(metric: str) -> tuple[str, ...]:
    """Returns the numbers of a metric that stand for it; none for one of another release."""
    try:
        return headlines_of(load_metric(metric))
    except ValueError:
        return ()


def task_views(results: list[Result]) -> list[TaskView]:
    """Puts the results of each task beside each other: stages in their order, then controls, then what guessing reaches."""
    views = []
    for task in dict.fromkeys(result.title for result in results):
        own = [result for result in results if result.title == task]
        own.sort(key=lambda result: result.control is not None)
        last = next((result for result in reversed(own) if result.control is None), own[-1])
        metrics, further, others = [], [], []
        for name, numbers in last.content["metrics"].items():
            if not isinstance(numbers, dict):
                continue
            for metric in numbers.get("intervals") or {}:
                view = _metric_view(name, metric, own, numbers)
                (metrics if metric in MAIN or metric in _headlines(name) else further).append(view)
            prompts = numbers.get("by_prompt") or {}
            for prompt in prompts if len(prompts) > 1 else ():
                own_metrics = prompts[prompt].get("intervals") or {}
                further += [_metric_view(name, metric, own, {}, prompt) for metric in own_metrics]
            others += [
                (f"{metric}", number(value) if isinstance(value, (int, float)) else str(value))
                for metric, value in numbers.items()
                if metric not in ("intervals", "by_prompt") and not isinstance(value, (dict, list))
            ]
        views.append(TaskView(task, metrics, further, others, last.content.get("definitions") or {}))
    return views


def _metric_view(name: str, metric: str, results: list[Result], last: dict, prompt: str | None = None) -> MetricView:
    title, explanation = TITLES.get(metric, (metric.replace("_", " "), ""))
    if prompt is not None:
        title, explanation = f"{title}: “{prompt}”", "The answers to this prompt alone."
    found = []
    for result in results:
        numbers = result.content["metrics"].get(name) or {}
        if prompt is not None:
            numbers = (numbers.get("by_prompt") or {}).get(prompt) or {}
        if isinstance(numbers.get(metric), (int, float)):
            found.append((result, float(numbers[metric]), (numbers.get("intervals") or {}).get(metric)))
    baseline = last.get(f"majority_{metric}")
    ends = [end for _, value, interval in found for end in (value, *(interval or ()))]
    most = max([*ends, baseline or 0])
    high = 1.0 if metric.endswith(("accuracy", "recall", "f1")) and most <= 1 else round_end(most)
    scale = Scale(0.0, high)
    rows = []
    for result, value, interval in found:
        text = number(value)
        if interval:
            text += f" ({number(interval[0])} to {number(interval[1])})"
        control = result.control
        label = result.model_name + (f", {CONTROLS.get(control, control)}" if control else "")
        limit = result.content.get("limit")
        unit = "pieces of text" if result.task == "text_perplexity" else "images"
        rows.append(
            Row(
                label=label,
                value=value,
                text=text,
                kind="control" if control else "model",
                place=scale.place(value),
                low=scale.place(interval[0]) if interval else None,
                high=scale.place(interval[1]) if interval else None,
                note=f"the first {limit:,} {unit} only" if isinstance(limit, int) else "",
            )
        )
    if isinstance(baseline, (int, float)):
        label = "Always the commonest answer"
        rows.append(Row(label, float(baseline), number(baseline), "baseline", scale.place(baseline)))
    return MetricView(title, explanation, rows, number(high))
