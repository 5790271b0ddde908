"""Evaluates a checkpoint, or what a server serves, on one task: from its data to the result file."""

import argparse
import json
import platform
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from alignvlm.evaluation.answer import answer, context_of
from alignvlm.evaluation.batches import progress_folder, run_batches
from alignvlm.evaluation.choices import measure
from alignvlm.evaluation.load import evaluation_tag, load_checkpoint, model_identity
from alignvlm.evaluation.server import Server
from alignvlm.evaluation.task_work import asking_of, check_asked, control_of, question_work, text_work
from alignvlm.rows.tiles import describe_tiles, set_max_tiles
from hub_upload.run_record import library_versions, read_json, write_json


class Checkpoint:
    """A checkpoint in this process, as an evaluation asks it. `server.Server` is the same for a model behind an address.

    Args:
        arguments: the command line, which names the checkpoint and how to load it.
    """

    at_once = 1

    def __init__(self, arguments: argparse.Namespace):
        state = _state(arguments)
        self.name, self.batch_size = arguments.checkpoint, arguments.batch_size
        with state.main_process_first():  # fetches and converts remote code once
            self.model, self.processor, precision = load_checkpoint(
                arguments.checkpoint,
                state.device,
                arguments.revision,
                arguments.trust_remote_code,
                arguments.dtype,
                arguments.attn_implementation,
                arguments.merge_image_tokens,
            )
            print(f"Computes in {precision}")
            if arguments.max_tiles is not None:
                set_max_tiles(self.model.config, self.processor, arguments.max_tiles)
            self.context = context_of(self.model)
            self.identity = model_identity(arguments.checkpoint, arguments.revision)
            self.tag = evaluation_tag(arguments.checkpoint, arguments.revision)
        self.computing = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attn_implementation": self.model.config._attn_implementation,
            **LEFT_OUT,
            "merge_image_tokens": getattr(self.model.config, "merge_image_tokens", None) or 0,
            **describe_tiles(self.model.config, self.processor),
            "batch_size": self.batch_size,
        }
        folder = Path(arguments.checkpoint)
        self.results = folder / "results" if folder.is_dir() else Path("results") / self.name.split("/")[-1]

    def answer(self, images: list, prompts: list, **decoding) -> list[list[str]]:
        """Answers prompts about images: see `alignvlm.evaluation.answer.answer`."""
        return answer(self.model, self.processor, images, prompts, batch_size=self.batch_size, **decoding)

    def measure_choices(self, images: list, conversations: list, in_all_orders: set[int]) -> list[dict]:
        """Measures how likely choices and letters are: see `alignvlm.evaluation.choices.measure`."""
        return measure(self.model, self.processor, images, conversations, in_all_orders)


# Settings that a result names only where they are on.
WHERE_ON = ("name", "metric", "prompt", "tile_marks", "image_block")
# Settings that results of older versions leave out where they are off, and their values then.
LEFT_OUT = {"merge_image_tokens": 0, "max_tiles": 1}
# Settings that decide neither what is asked nor how it is answered: a result may take the place of one with others.
OF_NO_ANSWER = ("name", "batch_size", "seed", "bootstrap_samples", "versions")
# What depends on other settings in a result's `data`.
COUNTS = (
    "exact_duplicates",
    "image_files_hash",
    "images",
    "questions",
    "references",
    "bad_rows",
    "bad_row_list",
    "answers_with_less_room",
)
# What a --server does not take, and its default.
OF_CHECKPOINTS = {
    "checkpoint": None,
    "revision": None,
    "trust_remote_code": False,
    "dtype": "auto",
    "attn_implementation": None,
    "merge_image_tokens": None,
    "max_tiles": None,
    "num_beams": 1,
    "batch_size": 32,
}


def load_model(arguments: argparse.Namespace) -> Checkpoint | Server:
    """Loads the checkpoint that the command line names, in all processes, or finds the server.

    Raises:
        ValueError: for options that do not belong together.
    """
    if arguments.server is None:
        if arguments.server_model is not None:
            raise ValueError("--server_model is the model of a --server: give its address.")
        return Checkpoint(arguments)
    given = [name for name, default in OF_CHECKPOINTS.items() if getattr(arguments, name) != default]
    if given:
        names = " and ".join("the checkpoint" if name == "checkpoint" else f"--{name}" for name in given)
        raise ValueError(
            f"A --server has loaded its model, and answers requests greedily: leave out {names}. (--server_model names the model, "
            "--server_requests says how many questions are asked at once.)"
        )
    if "text_perplexity" in (arguments.task, *(task for _, task in arguments.tasks or ())):
        raise ValueError(
            "text_perplexity needs the likelihood of a given text, which a server does not tell. Evaluate the checkpoint itself."
        )
    return Server(arguments.server, arguments.server_model, arguments.server_requests)


def evaluate_checkpoint(
    arguments: argparse.Namespace, loaded: Checkpoint | Server | None = None, keep_finished: bool = False
) -> dict | None:
    """Evaluates as the command line asks and writes `<task>.json`, or `<name>.json`.

    Args:
        loaded: what `load_model` returned; None: load it.
        keep_finished: return the content of the file that is there already if it has the same settings.

    Returns:
        The content of the file, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, data that does not fit the task, a server that does not answer, or a file of that name whose
            result this one may not replace (see `check_place`).
    """
    if (arguments.checkpoint is None and arguments.server is None) or arguments.task is None:
        raise ValueError("Give a checkpoint or a --server, and a --task; or two results to --compare.")
    if arguments.data_dir is not None and not (arguments.tasks or arguments.controls):
        raise ValueError("--data_dir holds the data of several --tasks; the data of one --task is --data.")
    state = _state(arguments)
    check_asked(arguments)
    asked = loaded or load_model(arguments)
    check_place(arguments, asked)
    with state.main_process_first():  # fetches data once
        bind = text_work if arguments.task == "text_perplexity" else question_work
        work = bind(arguments, asked)
    settings = _settings(arguments, asked, work.settings)
    name = file_name(settings, settings["control"])
    output_dir = output_folder(arguments, asked)
    target = output_dir / f"{name}.json"
    progress = progress_folder(output_dir, name, settings)
    if keep_finished and (found := finished(target, settings)) is not None:
        print(f"{target} is there already.")
        if not state.is_main_process:
            return None
        shutil.rmtree(
            progress, ignore_errors=True
        )  # is there if the program was killed right after it had written the result
        return found
    _check_data(target, settings["data"])
    outputs = run_batches(work, asked.batch_size, progress, state, name)
    if outputs is None:
        return None
    result = {**settings, **work.summarise(outputs)}
    write_json(target, result)
    shutil.rmtree(progress)
    print(f"{report(result)}\n{target}")
    return result


def _state(arguments: argparse.Namespace) -> PartialState:
    return PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())


def _settings(arguments: argparse.Namespace, asked: Checkpoint | Server, of_work: dict) -> dict:
    """Returns what a result says of its settings, those of its work among them."""
    return {
        "task": arguments.task,
        **({"name": arguments.name} if arguments.name else {}),
        "model": asked.identity,
        **of_work,
        "control": control_of(arguments),
        **asked.computing,
        "limit": arguments.limit,
        "seed": arguments.seed,
        "bootstrap_samples": arguments.bootstrap_samples,
        "versions": {"python": platform.python_version()} | library_versions(),
    }


def file_name(result: dict, control: str | None) -> str:
    """Returns the name of a result's file, without its ending."""
    return name_of(result) + (f"-{control}" if control else "")


def name_of(result: dict) -> str:
    """Returns what a result is called: by its `--name`, else by its task."""
    return result.get("name") or result["task"]


REMEDY = "Put this one elsewhere by --output_dir or --name, or remove the file."


def check_place(arguments: argparse.Namespace, asked: Checkpoint | Server) -> None:
    """Refuses to write over a result of another model, of other settings that decide its answers, or of more images, as far as is known before
    the data are read. A result of the same settings may be written again, one of a `limit` be replaced by one of more images, and one in the
    checkpoint's own folder by whatever there is of its new weights.

    Raises:
        ValueError: naming what differs, and the remedy.
    """
    settings = _settings(arguments, asked, asking_of(arguments, asked))
    file = output_folder(arguments, asked) / f"{file_name(settings, settings['control'])}.json"
    if not file.is_file():
        return
    before, now = read_json(file), json.loads(json.dumps(settings))
    if not isinstance(before, dict) or not isinstance(before.get("model"), dict):
        raise ValueError(f"{file} holds something else than a result. {REMEDY}")
    if not _same_model(before["model"], now["model"]):
        if arguments.output_dir is None and "weights_sha256" in now["model"]:
            return  # in the checkpoint's own folder: it was trained again
        other = before["model"].get("name")
        what = f"the model {other!r}" + (
            " with other weights" if other == now["model"]["name"] else f", not of {now['model']['name']!r}"
        )
        raise ValueError(f"{file} holds the result of {what}. {REMEDY}")
    ignored = {"model", "data", "limit", *OF_NO_ANSWER} - ({"seed"} if now["control"] == "shuffle_images" else set())
    different = _differences(LEFT_OUT | before, LEFT_OUT | now, {*now, *WHERE_ON} - ignored)
    if different:
        raise ValueError(f"{file} holds a result with {', '.join(different)}. {REMEDY}")
    there, new = before.get("limit"), now["limit"]
    if new is not None and (there is None or there > new):
        unit = "windows of text" if now["task"] == "text_perplexity" else "images"
        held = f"all {unit}" if there is None else f"{there} {unit}"
        raise ValueError(f"{file} holds a result of {held}, more than --limit {new} asks about. {REMEDY}")


def _same_model(before: dict, now: dict) -> bool:
    """Whether two identities are of the same weights, whatever their folders are called."""
    digests = before.get("weights_sha256"), now.get("weights_sha256")
    return digests[0] == digests[1] if any(digests) else before == now


def _differences(before: dict, now: dict, names: set[str]) -> list[str]:
    """Returns how settings differ, those inside a setting by their own names."""
    found = []
    for name in sorted(names):
        there, new = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(new, dict):
            found += _differences(there, new, {*there, *new})
        elif there != new:
            found.append(f"{name} {there!r}, not {new!r}")
    return found


def _check_data(file: Path, data: dict) -> None:
    """Refuses to write a result over one of another data set or split, or of data that were read otherwise."""
    if not file.is_file():
        return
    both = read_json(file).get("data", {}), json.loads(json.dumps(data))
    there, new = (" ".join(str(data[name]) for name in ("data", "split") if data.get(name)) for data in both)
    before, now = ([data.get("sha256"), *(each.get("sha256") for each in data.get("files") or ())] for data in both)
    if there != new or before != now:
        what = f"{there}, not of {new}" if there != new else f"a {there} of other content"
        raise ValueError(f"{file} holds the result of {what}. {REMEDY}")
    digests = [data.get("image_files_hash") for data in both]
    if all(digests) and digests[0] != digests[1] and both[0].get("images") == both[1].get("images"):
        raise ValueError(f"{file} holds the result of {there} with other image files. {REMEDY}")
    if different := _differences(*both, {*both[0], *both[1]} - {"files", *COUNTS}):
        raise ValueError(f"{file} holds a result with {', '.join(different)}. {REMEDY}")


def finished(file: Path, settings: dict) -> dict | None:
    """Returns the content of a result file of these settings; None if there is none."""
    if not file.is_file():
        return None
    found = read_json(file)
    stated, same = LEFT_OUT | found, json.loads(json.dumps(settings))
    return found if all(stated.get(name) == same.get(name) for name in {*same, *WHERE_ON}) else None


def asked_otherwise(first: dict, second: dict) -> list[str]:
    """Returns in which settings, of those that decide answers, the second of two results of the same questions differs from the first. Of a
    model behind an address only what it was sent is known."""
    if any("server" in result.get("model", {}) for result in (first, second)):
        names = {*first} & {*second} | {"metric", "prompt"}
    else:
        first, second = LEFT_OUT | first, LEFT_OUT | second
        names = {*first, *second}
    names -= {"task", "model", "data", "limit", *OF_NO_ANSWER, "metrics", "definitions", "predictions"}
    return _differences(second, first, names)


def report(result: dict) -> str:
    """Returns the metrics of a result, one per line."""
    lines = [name_of(result) + (f" ({result['control']})" if result["control"] else "")]
    if left_out := result["data"].get("bad_rows"):
        lines.append(f"  {'bad rows, left out':<28} {left_out:>9}")
    if shorter := result["data"].get("answers_with_less_room"):
        lines.append(f"  {'answers with less room':<28} {shorter:>9}")
    for numbers in result["metrics"].values():
        for name, value in numbers.items():
            if isinstance(value, dict):  # such as `intervals`
                continue
            interval = numbers["intervals"].get(name)
            text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"  {name:<28} {text:>9}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
        for value, own in (*numbers.get("by_prompt", {}).items(), *numbers.get("by_kind", {}).items()):
            for name, (low, high) in own["intervals"].items():
                lines.append(f"  {f'{name} of {value!r}':<28} {own[name]:>9.4f}  [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)


def output_folder(arguments: argparse.Namespace, asked: Checkpoint | Server) -> Path:
    """Returns where results are written."""
    return Path(arguments.output_dir or asked.results)
