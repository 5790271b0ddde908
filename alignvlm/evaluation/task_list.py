"""Evaluates a checkpoint on several tasks, and under all controls, and writes one table."""

import argparse
from pathlib import Path

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.evaluation.controls import MOST_FREQUENT, most_frequent, table
from alignvlm.evaluation.one_task import evaluate_checkpoint, file_name, load_model, output_folder
from alignvlm.evaluation.task_work import ALL_TASKS, CONTROLS, control_of
from hub_upload.run_record import write_json


def evaluate_several(arguments: argparse.Namespace) -> str | None:
    """Evaluates all `--tasks`, with `--controls` under every control too, and writes one table, `tasks.md`.

    What is there already, of the same settings, is not asked again.

    Returns:
        The table, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, or data that does not fit a task. All tasks' data are found before any is asked.
    """
    if (arguments.checkpoint is None and arguments.server is None) or bool(arguments.tasks) == bool(arguments.task):
        raise ValueError("Give a checkpoint or a --server, and either a --task or several --tasks.")
    if arguments.controls and control_of(arguments):
        raise ValueError(f"--controls includes --{control_of(arguments)}: leave it out.")
    if arguments.name and len(arguments.tasks or [arguments.task]) > 1:
        raise ValueError(f"--name {arguments.name} is for the result of one task: leave it out.")
    given = [(task, _data_of(task, arguments)) for task in arguments.tasks or [arguments.task]]
    loaded = load_model(arguments)
    results, output_dir = [], output_folder(arguments, loaded)
    for task, data in given:
        found = {}
        has_controls = arguments.controls and task != "text_perplexity"
        for control in (None, *(CONTROLS if has_controls else ())):
            one = argparse.Namespace(**vars(arguments) | {"task": task, "data": data})
            if control is not None:
                setattr(one, control, True)
            found[control] = evaluate_checkpoint(one, loaded, keep_finished=True)
        if found[None] is None:
            continue  # not the main process
        result = found.pop(None)
        if has_controls:
            found[MOST_FREQUENT] = most_frequent(result)
            write_json(output_dir / f"{file_name(result, MOST_FREQUENT)}.json", found[MOST_FREQUENT])
        results.append((result, found))
    if not results:
        return None
    text = table(results)
    (output_dir / "tasks.md").write_text(text + "\n")
    print(f"\n{text}\n{output_dir / 'tasks.md'}")
    return text


def _data_of(task: str, arguments: argparse.Namespace) -> str | None:
    """Returns where the data of a task lie, of several: in `--data_dir`; None: on the Hub."""
    if task not in ALL_TASKS:
        raise ValueError(f"Unknown task {task!r}. Valid tasks: {', '.join(ALL_TASKS)}.")
    if arguments.data is not None:
        if arguments.tasks and len(arguments.tasks) > 1:
            raise ValueError(
                "--data is the data of one task: put those of several into a folder, and name it as --data_dir."
            )
        return arguments.data
    if arguments.data_dir is None:
        if task == "text_perplexity" or CATALOGUE[task].data is None:
            raise ValueError(
                f"The task {task!r} has no data by default: give --data_dir, with a folder or file {task!r} in it."
            )
        return None
    folder = Path(arguments.data_dir)
    fitting = [folder / task] if (folder / task).exists() else sorted(folder.glob(f"{task}.*"))
    if len(fitting) != 1:
        raise ValueError(
            f"{folder} holds {len(fitting)} folders or files called {task!r}; expected one, such as {task}/ or {task}.jsonl."
        )
    return str(fitting[0])
