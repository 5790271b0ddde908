"""The report of one run: gathers what its page shows."""

import datetime
from pathlib import Path

from alignvlm.data.record import Conversation, one_turn
from alignvlm.stages.trainer import MODULES
from alignvlm.tools.report.answers import Answer, choose_answers
from alignvlm.tools.report.charts import duration, number
from alignvlm.tools.report.heat import data_folders, heat_maps
from alignvlm.tools.report.masks import MaskExample, mask_example
from alignvlm.tools.report.metrics import changes, dropped, task_views, time_line
from alignvlm.tools.report.page import render
from alignvlm.tools.report.read import Run, read_run
from modeling_alignvlm import AlignVLMConfig, AlignVLMProcessor


MADE_UP = one_turn("What is it?", ["A red circle."], image_count=1)


def report_of_run(path: Path, data: str | None = None, attention: bool = True, seed: int = 0) -> str:
    """Returns the page about a run.

    Args:
        path: as for `read_run`.
        data: the folder of the data that was evaluated; None: looked for beside the run.
        attention: compute heat maps, for which the checkpoint is loaded.
        seed: of the answers drawn by chance.

    Raises:
        ValueError, FileNotFoundError: if there is no run at `path`.
    """
    run = read_run(path)
    answers, notes = choose_answers(run, data, data_folders(run, path), seed)
    maps, map_notes = heat_maps(run, answers) if attention else ([], ["Heat maps were switched off."])
    example, made_up = _mask_example(run, answers)
    stages = run.stages
    return render(
        "report.html",
        title=run.name,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        run=run,
        tiles=_tiles(run),
        modules=MODULES,
        line=time_line(stages),
        changes=changes(stages),
        dropped=dropped(stages),
        tasks=task_views(run.results),
        answers=answers,
        answer_notes=notes,
        maps=maps,
        map_notes=map_notes,
        example=example,
        example_made_up=made_up,
        sources=[(f"Stage {stage.get('stage')}", _sources(stage)) for stage in stages if stage.get("data")],
        versions=sorted((stages[-1].get("versions") or {}).items()) if stages else [],
        number=number,
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Returns the numbers at the top: value, what it is, and what to hold it against."""
    tiles = []
    finished = [stage for stage in run.stages if not stage.get("unfinished")]
    if finished:
        seconds = sum(stage.get("seconds") or 0 for stage in finished)
        steps = sum(stage.get("steps") or 0 for stage in finished)
        count = f"{len(finished)} stage" + ("s" if len(finished) > 1 else "")
        tiles.append((count, f"trained, {steps:,} steps in {duration(seconds)}", ""))
    for task in task_views(run.results):
        for metric in task.metrics:
            rows = [row for row in metric.rows if row.kind == "model"]
            if metric.title in ("Right answers", "Captions (CIDEr)", "Perplexity of a text") and rows:
                others = [
                    f"{row.label[0].lower()}{row.label[1:]}: {row.text.split(' ')[0]}"
                    for row in metric.rows
                    if row.kind != "model"
                ]
                tiles.append((number(rows[-1].value), f"{metric.title}, {task.task}", "; ".join(others)))
    return tiles


def _mask_example(run: Run, answers: list[Answer]) -> tuple[MaskExample | None, bool]:
    """Draws the masks on a short answered question of the evaluation, or on one made up; None without a checkpoint."""
    if run.checkpoint is None or not (run.checkpoint / "config.json").is_file():
        return None, False
    processor = AlignVLMProcessor.from_pretrained(run.checkpoint)
    config = AlignVLMConfig.from_pretrained(run.checkpoint)
    short = sorted(
        (
            answer
            for answer in answers
            if answer.uris and len(answer.references[:1]) and len(answer.references[0].split()) > 2
        ),
        key=lambda answer: len(answer.uris) * 1000 + len(answer.prompt) + len(answer.references[0]),
    )
    for answer in short[:1]:
        asked = answer.pictures.conversation(answer.prediction)
        asked = asked or one_turn(answer.prompt, answer.references, len(answer.uris))
        return mask_example(processor, config, Conversation(asked.messages, asked.responses), run.stages), False
    return mask_example(processor, config, MADE_UP, run.stages), True


def _sources(stage: dict) -> list[str]:
    """Says in a line per source what a stage read."""
    lines = []
    for source in stage.get("data") or []:
        parts = [str(source.get("name", "data"))]
        records = source.get("records_per_epoch", source.get("records"))
        if isinstance(records, int):
            parts.append(f"{records:,} examples")
        if isinstance(source.get("share"), float):
            parts.append(f"{source['share']:.0%} of the tokens")
        if annotations := source.get("annotations"):
            parts.append(", ".join(str(each).replace("_", " ") for each in annotations))
        if revision := source.get("revision"):
            parts.append(f"revision {revision}")
        lines.append("; ".join(parts))
    return lines
