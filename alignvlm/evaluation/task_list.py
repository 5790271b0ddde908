"""Evaluates a checkpoint on several tasks, and under all controls, and writes one table."""

import argparse
from pathlib import Path

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.evaluation.controls import MOST_FREQUENT, most_frequent, table
from alignvlm.evaluation.one_task import check_place, evaluate_checkpoint, file_name, load_model, output_folder
from alignvlm.evaluation.task_work import ALL_TASKS, CONTROLS, control_of
from hub_upload.run_record import write_json


def evaluate_several(arguments: argparse.Namespace) -> str | None:
    """Evaluates all `--tasks`, with `--controls` under every control too, and writes one table, `tasks.md`.

    What is there already, of the same settings, is not asked again.

    Returns:
        The table, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, data that does not fit a task, or a result that may not be replaced. All tasks' data
            are found, and such results too, before any is asked.
    """
    if (arguments.checkpoint is None and arguments.server is None) or bool(arguments.tasks) == bool(arguments.task):
        raise ValueError("Give a checkpoint or a --server, and either a --task or several --tasks.")
    if arguments.controls and control_of(arguments):
        raise ValueError(f"--controls includes --{control_of(arguments)}: leave it out.")
    if arguments.name and len(arguments.tasks or [arguments.task]) > 1:
        raise ValueError(f"--name {arguments.name} is for the result of one task: leave it out.")
    listed = arguments.tasks or [(None, arguments.task)]
    names = [name or task for name, task in listed]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"--tasks has {twice!r} twice. Give each a name of its own, NAME=TASK, which its data have, too."
        )
    given = [(name, task, _data_of(name, task, arguments)) for name, task in listed]
    loaded = load_model(arguments)
    results, output_dir = [], output_folder(arguments, loaded)
    runs = [_runs_of(name, task, data, arguments) for name, task, data in given]
    for one in (one for its in runs for one in its.values()):
        check_place(one, loaded)
    for its in runs:
        found = {control: evaluate_checkpoint(one, loaded, keep_finished=True) for control, one in its.items()}
        if found[None] is None:
            continue  # not the main process
        result = found.pop(None)
        if arguments.controls and result["task"] != "text_perplexity":
            found[MOST_FREQUENT] = most_frequent(result)
            write_json(output_dir / f"{file_name(result, MOST_FREQUENT)}.json", found[MOST_FREQUENT])
        results.append((result, found))
    if not results:
        return None
    text = table(results)
    (output_dir / "tasks.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n{output_dir / 'tasks.md'}")
    return text


def _runs_of(
    name: str | None, task: str, data: str | None, arguments: argparse.Namespace
) -> dict[str | None, argparse.Namespace]:
    """Returns the command line of a task alone, and with `--controls` of each of its controls, by the control's name."""
    given = vars(arguments) | {"task": task, "name": name or arguments.name, "data": data}
    controls = CONTROLS if arguments.controls and task != "text_perplexity" else ()
    return {
        control: argparse.Namespace(**given | ({control: True} if control else {})) for control in (None, *controls)
    }


def _data_of(name: str | None, task: str, arguments: argparse.Namespace) -> str | None:
    """Returns where the data of a task lie, of several: in `--data_dir`; None: on the Hub."""
    if task not in ALL_TASKS:
        raise ValueError(f"Unknown task {task!r}. Valid tasks: {', '.join(ALL_TASKS)}.")
    if arguments.data is not None:
        if arguments.tasks and len(arguments.tasks) > 1:
            raise ValueError(
                "--data is the data of one task: put those of several into a folder, and name it as --data_dir."
            )
        return arguments.data
    called = name or task
    if arguments.data_dir is None:
        if called != task:
            raise ValueError(
                f"--tasks {name}={task} takes the data called {name!r} in --data_dir, which is not given."
            )
        if task == "text_perplexity" or CATALOGUE[task].data is None:
            raise ValueError(
                f"The task {task!r} has no data by default: give --data_dir, with a folder or file {task!r} in it."
            )
        return None
    folder = Path(arguments.data_dir)
    fitting = [folder / called] if (folder / called).exists() else sorted(folder.glob(f"{called}.*"))
    if len(fitting) != 1:
        raise ValueError(
            f"{folder} holds {len(fitting)} folders or files called {called!r}; expected one, such as {called}/ or {called}.jsonl."
        )
    return str(fitting[0])
