"""Evaluates a checkpoint on one task: from its data to the result file."""

import argparse
import json
import platform
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from alignvlm.evaluation.batches import progress_folder, run_batches
from alignvlm.evaluation.load import load_checkpoint, model_identity
from alignvlm.evaluation.task_work import control_of, question_work, text_work
from hub_upload.run_record import library_versions, read_json, write_json


def load_model(arguments: argparse.Namespace) -> tuple:
    """Loads the checkpoint that the command line names, in all processes.

    Returns:
        The model, its processor, and what it computes in.
    """
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    with state.main_process_first():  # fetches and converts remote code once
        return load_checkpoint(
            arguments.checkpoint,
            state.device,
            arguments.revision,
            arguments.trust_remote_code,
            arguments.dtype,
            arguments.attn_implementation,
            arguments.merge_image_tokens,
        )


def evaluate_checkpoint(
    arguments: argparse.Namespace, loaded: tuple | None = None, keep_finished: bool = False
) -> dict | None:
    """Evaluates as the command line asks and writes `<task>.json`, or `<name>.json`.

    Args:
        loaded: what `load_model` returned; None: load it.
        keep_finished: return the content of the file that is there already if it has the same settings.

    Returns:
        The content of the file, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, data that does not fit the task, or a file of that name with a result of other data.
    """
    if arguments.checkpoint is None or arguments.task is None:
        raise ValueError("Give a checkpoint and a --task, or two results to --compare.")
    if arguments.data_dir is not None and not (arguments.tasks or arguments.controls):
        raise ValueError("--data_dir holds the data of several --tasks; the data of one --task is --data.")
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    model, processor, precision = loaded or load_model(arguments)
    with state.main_process_first():  # fetches data once
        print(f"Computes in {precision}")
        bind = text_work if arguments.task == "text_perplexity" else question_work
        work = bind(arguments, model, processor)
    settings = {
        "task": arguments.task,
        **({"name": arguments.name} if arguments.name else {}),
        "model": model_identity(arguments.checkpoint, arguments.revision),
        **work.settings,
        "control": control_of(arguments),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        **({} if arguments.merge_image_tokens is None else {"merge_image_tokens": arguments.merge_image_tokens}),
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "seed": arguments.seed,
        "bootstrap_samples": arguments.bootstrap_samples,
        "versions": {"python": platform.python_version()} | library_versions(),
    }
    name = file_name(settings, settings["control"])
    output_dir = output_folder(arguments)
    target = output_dir / f"{name}.json"
    if keep_finished and (found := finished(target, settings)) is not None:
        print(f"{target} is there already.")
        return found if state.is_main_process else None
    _check_other_data(target, settings)
    progress = progress_folder(output_dir, name, settings)
    outputs = run_batches(work, arguments.batch_size, progress, state, name)
    if outputs is None:
        return None
    result = {**settings, **work.summarise(outputs)}
    write_json(target, result)
    shutil.rmtree(progress)
    print(f"{report(result)}\n{target}")
    return result


def file_name(result: dict, control: str | None) -> str:
    """Returns the name of a result's file, without its ending."""
    return name_of(result) + (f"-{control}" if control else "")


def name_of(result: dict) -> str:
    """Returns what a result is called: by its `--name`, else by its task."""
    return result.get("name") or result["task"]


def _check_other_data(file: Path, settings: dict) -> None:
    """Refuses to write a result over one of another data set or split."""
    if not file.is_file():
        return
    there, new = (
        " ".join(str(data[name]) for name in ("data", "split") if data.get(name))
        for data in (read_json(file).get("data", {}), settings["data"])
    )
    if there != new:
        raise ValueError(
            f"{file} holds the result of {there}, not of {new}. Give this one a --name, or remove the file."
        )


def finished(file: Path, settings: dict) -> dict | None:
    """Returns the content of a result file of these settings; None if there is none."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    same = json.loads(json.dumps(settings))
    return found if all(found.get(name) == value for name, value in same.items()) else None


def report(result: dict) -> str:
    """Returns the metrics of a result, one per line."""
    lines = [name_of(result) + (f" ({result['control']})" if result["control"] else "")]
    if left_out := result["data"].get("bad_rows"):
        lines.append(f"  {'bad rows, left out':<28} {left_out:>9}")
    for numbers in result["metrics"].values():
        for name, value in numbers.items():
            if name in ("intervals", "by_prompt", "by_kind"):
                continue
            interval = numbers["intervals"].get(name)
            text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"  {name:<28} {text:>9}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
        for value, own in (*numbers.get("by_prompt", {}).items(), *numbers.get("by_kind", {}).items()):
            for name, (low, high) in own["intervals"].items():
                lines.append(f"  {f'{name} of {value!r}':<28} {own[name]:>9.4f}  [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)


def output_folder(arguments: argparse.Namespace) -> Path:
    """Returns where results are written."""
    return Path(arguments.output_dir or _default_output(arguments.checkpoint))


def _default_output(checkpoint: str) -> Path:
    return Path(checkpoint) / "results" if Path(checkpoint).is_dir() else Path("results") / checkpoint.split("/")[-1]
