"""Reads what a run left on disk: the entries of its stages and the results of its evaluations.

What is missing or damaged becomes a note that the page shows; only a path that holds nothing of a run is an error.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm.stages.checkpoint import last_complete_checkpoint
from hub_upload.run_record import RUN_RECORD


@dataclass
class Result:
    """A result of `alignvlm evaluate`: its content, the file, and the folder of the checkpoint if that is here.

    `stage` is the number of the checkpoint's last stage, 0 before the first; None if it is not known.
    """

    content: dict[str, Any]
    path: Path
    checkpoint: Path | None = None
    stage: int | None = None

    @property
    def task(self) -> str:
        return str(self.content.get("task"))

    @property
    def title(self) -> str:
        """What a person calls the task: by its `--name`; of data of one's own without one, the folder that holds the result, or the data's name."""
        if self.content.get("name") or self.task != "local":
            return str(self.content.get("name") or self.task)
        folder = self.path.resolve().parent.name.removesuffix(f"-{self.control}")
        data = str((self.content.get("data") or {}).get("data", self.task))
        return data if folder == "results" or self.checkpoint is None or folder == self.checkpoint.name else folder

    @property
    def control(self) -> str | None:
        return self.content.get("control")

    @property
    def model_name(self) -> str:
        """What a person calls the model: its stage, else its name."""
        if self.stage is not None:
            return f"Stage {self.stage}" if self.stage else "Before training"
        return str((self.content.get("model") or {}).get("name") or self.path.stem)


@dataclass
class Run:
    """What a report is about.

    Args:
        name: of the folder or file.
        stages: the run record's entry of each stage, the first first.
        results: of all checkpoints, in the order of the stages.
        checkpoint: the folder of the last stage, if it is here.
        backbones: what stage 0 was assembled from.
        notes: sentences about what could not be read, and what was left out.
    """

    name: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    checkpoint: Path | None = None
    backbones: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def last_results(self) -> list[Result]:
        """The results of the last checkpoint that has any, controls left out."""
        plain = [result for result in self.results if result.control is None]
        return [result for result in plain if result.checkpoint == plain[-1].checkpoint]


def read_run(path: str | Path) -> Run:
    """Reads a run; of several in one folder that with the most stages, of equals the last by name.

    Args:
        path: a folder with a folder for each stage, a stage's folder, a folder of results, or the JSON file of one result.

    Raises:
        ValueError: if it is none of these.
        FileNotFoundError: if there is nothing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    run = Run(path.resolve().name)
    if path.is_file():
        return _read_result_file(run, path)
    folders = [path] if _is_stage(path) else sorted(filter(_is_stage, path.iterdir()), key=lambda each: each.name)
    own_notes: dict[Path, list[str]] = {folder: [] for folder in folders}
    read = [(folder, *_read_stages(folder, own_notes[folder])) for folder in folders]
    read.sort(key=lambda each: (len(each[1]), each[0].name))
    for folder, stages, backbones in read:
        if stages:
            run.stages, run.checkpoint, run.backbones = stages, folder, backbones
    left_out = [folder.name for folder, stages, _ in read if not _is_part(folder, stages, run.stages)]
    for folder, stages, _ in read:
        if folder.name in left_out:
            run.notes += own_notes[folder] if not stages else []  # what could not be read
            continue
        run.notes += own_notes[folder]
        run.results += [
            Result(content, file, folder, _number(stages)) for file, content in _results(folder / "results", run.notes)
        ]
    if left_out:
        run.notes.append(
            f"{run.name} holds stages of several runs: that of {run.checkpoint.name} is shown; {_listed(left_out)} left out, and so are their "
            "results. Name such a folder to see it."
        )
    if folders != [path]:  # results beside the stages, or alone, name the folder of their checkpoint
        named = {folder.name: (folder, _number(stages)) for folder, stages, _ in read}
        for file, content in _results(path / "results" if folders else path, run.notes):
            name = (content.get("model") or {}).get("name")
            if name not in left_out:
                run.results.append(Result(content, file, *named.get(name, (None, None))))
    order = [folder for folder, _, _ in read]
    run.results.sort(key=lambda each: order.index(each.checkpoint) if each.checkpoint in order else len(order))
    if not run.stages and not run.results:
        why = "".join(f" {note}" for note in run.notes)
        raise ValueError(
            f"{str(path)!r} holds no run: no {RUN_RECORD} of a stage, in it or in a folder of it, and no result of `alignvlm evaluate`.{why}"
        )
    return run


def _is_stage(folder: Path) -> bool:
    return folder.is_dir() and ((folder / RUN_RECORD).is_file() or last_complete_checkpoint(folder) is not None)


def _is_part(folder: Path, stages: list[dict], of: list[dict]) -> bool:
    """Tells whether a folder's stages are the first ones of a run; of a folder before the first, whether that started from it."""
    if not stages:
        return not of or Path(str(of[0].get("model", folder))).name == folder.name
    return all(map(_is_same, stages, of))


def _is_same(first: dict, second: dict) -> bool:
    """Tells whether two entries are of one training, as far as both say it, mixed alike with an untouched language model."""
    names = [name for name in ("stage", "seconds", "train_loss", "logged_losses") if name in first and name in second]
    alike = all(first[name] == second[name] for name in names)
    return alike and first.get("keep_language") == second.get("keep_language")


def _listed(names: list[str], most: int = 10) -> str:
    """Lists the first names, as the beginning of a sentence on what they are."""
    shown = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]} are" if shown[1:] else f"{shown[0]} is"


def _number(stages: list[dict]) -> int | None:
    return stages[-1].get("stage") if stages else 0


def _read_stages(folder: Path, notes: list[str]) -> tuple[list[dict], dict]:
    """Returns the entries of a stage and those before it, and the backbones. A stage that has not finished has its last checkpoint's log."""
    record = _read_json(folder / RUN_RECORD, notes) if (folder / RUN_RECORD).is_file() else None
    if record is not None:
        stages = [entry for entry in record.get("stages") or [] if isinstance(entry, dict)]
        backbones = record.get("backbones")
        return stages, backbones if isinstance(backbones, dict) else {}
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return [], {}
    state = _read_json(checkpoint / "trainer_state.json", notes) or {}
    notes.append(
        f"{folder.name} has not finished: what is shown of it is its {checkpoint.name}, of {state.get('max_steps')} steps."
    )
    return _read_stages(checkpoint, notes)


def _results(folder: Path, notes: list[str]) -> list[tuple[Path, dict]]:
    """Returns the results in a folder and those below it."""
    read = [(path, _read_json(path, notes)) for path in sorted(folder.rglob("*.json"))]
    return [(path, content) for path, content in read if content is not None and _is_result(content)]


def _read_result_file(run: Run, path: Path) -> Run:
    content = _read_json(path, run.notes)
    if content is None or not _is_result(content):
        why = "".join(f" {note}" for note in run.notes)
        raise ValueError(f"{str(path)!r} is no result of `alignvlm evaluate`: it has no task with metrics.{why}")
    folder = path.resolve().parent.parent
    if path.resolve().parent.name == "results" and (folder / RUN_RECORD).is_file():
        run.stages, run.backbones = _read_stages(folder, run.notes)
        run.checkpoint = folder
    run.results = [Result(content, path, run.checkpoint, _number(run.stages) if run.checkpoint else None)]
    return run


def _is_result(content: dict) -> bool:
    parts = (("task", str), ("metrics", dict), ("predictions", list))
    return all(isinstance(content.get(name), kind) for name, kind in parts)


def _read_json(path: Path, notes: list[str]) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return None
    return content if isinstance(content, dict) else None
