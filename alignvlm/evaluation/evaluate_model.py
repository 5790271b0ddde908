"""Evaluates a checkpoint on a task and writes one JSON file of metrics, settings and predictions.

    alignvlm evaluate out/stage4 --task pathvqa --split test
    accelerate launch -m alignvlm.evaluation.evaluate_model out/stage4 --task pathvqa    # several processes
    alignvlm evaluate out/stage4 --tasks pathvqa,pope,chartqa --data_dir sets --controls    # several tasks, one table
    alignvlm evaluate --compare a.json b.json

Any number of processes share the work. An interrupted evaluation continues where it stopped, with the same result (`batches.py`).
`judge.py` judges the answers; `controls.py` says what of a score needs the image.
"""

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.files import read_rows
from alignvlm.data.formats import CAPTION_PROMPT, text
from alignvlm.data.record import ON_BAD_ROW, BadRow
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.batches import Work, progress_folder, run_batches
from alignvlm.evaluation.choices import likelihoods
from alignvlm.evaluation.controls import MOST_FREQUENT, most_frequent, table
from alignvlm.evaluation.judge import compare, judge, load_metric
from alignvlm.evaluation.load import add_loading_options, evaluation_tag, load_checkpoint, model_identity
from alignvlm.evaluation.perplexity import summarise as summarise_text
from alignvlm.evaluation.perplexity import window_loss, windows_of
from alignvlm.evaluation.questions import REMEDY, TASKS, blank, load_task, shuffled, without_images
from alignvlm.rows.tiles import describe_tiles, set_max_tiles
from hub_upload.command_line import ArgumentParser, run
from hub_upload.run_record import library_versions, read_json, write_json


def parser() -> argparse.ArgumentParser:
    tasks = (*TASKS, "text_perplexity")
    p = ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", nargs="?", help="A checkpoint's folder or Hub repository.")
    p.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="Compare two results of one task: B against A."
    )
    p.add_argument("--task", choices=tasks, help="What to ask the model.")
    p.add_argument(
        "--tasks",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        metavar="A,B,...",
        help="Several tasks in one go, and one table of them.",
    )
    p.add_argument(
        "--data_dir",
        help="Where the data of --tasks lie: a folder, or one file, called like each task. Default: the Hub's.",
    )
    p.add_argument("--split", help="Default: the split that the task is usually asked of, for most `test`.")
    p.add_argument(
        "--data", help="Hub data set, local folder or file. Most tasks have a default; scenes and local have none."
    )
    p.add_argument("--data_revision", help="Revision of a Hub data set.")
    p.add_argument("--image_dir", help="Where image paths in the data start.")
    p.add_argument("--keep_duplicates", action="store_true", help="Ask exact duplicates again.")
    p.add_argument("--limit", type=int, help="At most this number of images (or windows of text).")
    p.add_argument(
        "--on_bad_row",
        choices=ON_BAD_ROW,
        default="raise",
        help="What to do with a row whose texts cannot be used or whose image cannot be read.",
    )
    p.add_argument("--prompt", help=f"The prompt for captions. Default: as in training, {CAPTION_PROMPT!r}")
    p.add_argument(
        "--metric",
        help="Judge all answers by this metric of alignvlm/evaluation/metrics. Default: the data set's own.",
    )
    p.add_argument(
        "--tag", help="A source tag before every prompt; default: the `evaluation_tag` of the checkpoint's last stage."
    )
    p.add_argument("--blank_image", action="store_true", help="Control: replace every image by a grey square.")
    p.add_argument("--shuffle_images", action="store_true", help="Control: ask every question about another image.")
    p.add_argument("--question_only", action="store_true", help="Control: ask without any image.")
    p.add_argument(
        "--controls",
        action="store_true",
        help="All controls and the most frequent answer in one go, and what of each score needs the image.",
    )
    p.add_argument(
        "--max_tiles", type=int, help="Cut images into at most this number of tiles; default: as the checkpoint says."
    )
    p.add_argument("--batch_size", type=int, default=32, help="Images (or windows of text) at once.")
    p.add_argument("--num_beams", type=int, default=1, help="1 is greedy decoding.")
    p.add_argument("--max_new_tokens", type=int, default=40)
    p.add_argument("--window", type=int, default=512, help="Tokens per window of text, for text_perplexity.")
    add_loading_options(p)
    p.add_argument("--seed", type=int, default=0, help="Seed of --shuffle_images and the bootstrap.")
    p.add_argument("--bootstrap_samples", type=int, default=1000)
    p.add_argument(
        "--output_dir", help="Default: `results` in the checkpoint's folder; results/<name> for a Hub repository."
    )
    return p


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
        )


def evaluate_checkpoint(
    arguments: argparse.Namespace, loaded: tuple | None = None, keep_finished: bool = False
) -> dict | None:
    """Evaluates as the command line asks and writes `<task>.json`.

    Args:
        loaded: what `load_model` returned; None: load it.
        keep_finished: return the content of the file that is there already if it has the same settings.

    Returns:
        The content of the file, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, or data that does not fit the task.
    """
    if arguments.checkpoint is None or arguments.task is None:
        raise ValueError("Give a checkpoint and a --task, or two results to --compare.")
    if arguments.data_dir is not None and not (arguments.tasks or arguments.controls):
        raise ValueError("--data_dir holds the data of several --tasks; the data of one --task is --data.")
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    model, processor, precision = loaded or load_model(arguments)
    if arguments.max_tiles is not None:
        set_max_tiles(model.config, processor, arguments.max_tiles)
    with state.main_process_first():  # fetches data once
        print(f"Computes in {precision}")
        bind = _text_work if arguments.task == "text_perplexity" else _question_work
        work = bind(arguments, model, processor)
    settings = {
        "task": arguments.task,
        "model": model_identity(arguments.checkpoint, arguments.revision),
        **work.settings,
        "control": _control(arguments),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "seed": arguments.seed,
        "bootstrap_samples": arguments.bootstrap_samples,
        "versions": {"python": platform.python_version()} | library_versions(),
    }
    name = file_name(arguments.task, settings["control"])
    output_dir = output_folder(arguments)
    target = output_dir / f"{name}.json"
    if keep_finished and (found := finished(target, settings)) is not None:
        print(f"{target} is there already.")
        return found if state.is_main_process else None
    progress = progress_folder(output_dir, name, settings)
    outputs = run_batches(work, arguments.batch_size, progress, state, name)
    if outputs is None:
        return None
    result = {**settings, **work.summarise(outputs)}
    write_json(target, result)
    shutil.rmtree(progress)
    print(f"{report(result)}\n{target}")
    return result


def file_name(task: str, control: str | None) -> str:
    """Returns the name of a result file, without its ending."""
    return task + (f"-{control}" if control else "")


def finished(file: Path, settings: dict) -> dict | None:
    """Returns the content of a result file of these settings; None if there is none."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    same = json.loads(json.dumps(settings))
    return found if all(found.get(name) == value for name, value in same.items()) else None


def _question_work(arguments: argparse.Namespace, model, processor) -> Work:
    """Returns work that asks about images and judges the answers by each question's metric."""
    if arguments.metric is not None:
        load_metric(arguments.metric)  # an unknown one is refused now
    evaluation_set = load_task(
        arguments.task,
        arguments.split,
        arguments.data,
        arguments.data_revision,
        arguments.image_dir,
        arguments.prompt,
        arguments.keep_duplicates,
        arguments.limit,
        arguments.on_bad_row,
    )
    control = _control(arguments)
    asked = evaluation_set.asked
    seen = shuffled(asked, arguments.seed) if control == "shuffle_images" else asked
    tag = evaluation_tag(arguments.checkpoint, arguments.revision) if arguments.tag is None else arguments.tag
    decoding = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens, "do_sample": False}

    def run(units: range) -> list[list[dict]]:
        images = evaluation_set.images([seen[unit] for unit in units])
        groups = [[c.with_prefix(tag) for c in asked[unit].conversations] for unit in units]
        if control == "blank_image":
            images = blank(images)
        elif control == "question_only":
            images, groups = [[] for _ in images], [[without_images(c) for c in group] for group in groups]
        prompts = [[c.messages for c in group] for group in groups]
        written = answer(model, processor, images, prompts, batch_size=arguments.batch_size, **decoding)
        outputs = [[{"prediction": text} for text in texts] for texts in written]
        for own, group, found in zip(images, groups, outputs):
            if any(c.choices for c in group):
                for output, measured in zip(found, likelihoods(model, processor, own, group), strict=True):
                    output |= {"likelihoods": measured}
        return outputs

    def summarise(outputs: list[list[dict]]) -> dict:
        predictions = [
            {
                "id": one.id,
                "prompt": conversation.prompt,
                **({"messages": conversation.messages} if len(conversation.messages) > 1 else {}),
                **({"choices": conversation.choices} if conversation.choices else {}),
                **output,
                "references": conversation.responses,
                "kind": conversation.kind,
                "metric": arguments.metric or evaluation_set.source.metric_of(conversation),
            }
            for one, group in zip(asked, outputs, strict=True)
            for conversation, output in zip(one.conversations, group, strict=True)
        ]
        return judge(predictions, arguments.bootstrap_samples, arguments.seed)

    data = {**evaluation_set.source.identity, **evaluation_set.notes}
    settings = {"data": data, "tag": tag, "decoding": decoding, **describe_tiles(model.config, processor)}
    if arguments.metric is not None:
        settings["metric"] = arguments.metric
    return Work(len(asked), settings, run, summarise)


def _text_work(arguments: argparse.Namespace, model, processor) -> Work:
    """Returns work that measures the perplexity of a text in windows that do not overlap; a window's first token is context only."""
    if arguments.data is None:
        raise ValueError("text_perplexity needs --data: a text file, or a data set with a column `text`.")
    if _control(arguments):
        raise ValueError(
            "text_perplexity has no images: leave out --blank_image, --shuffle_images and --question_only."
        )
    content, source = _read_text(arguments)
    tokens = processor.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    windows = windows_of(len(ids), arguments.window, arguments.limit, name=arguments.data)

    def run(units: range) -> list[dict]:
        outputs = []
        for window in windows[units.start : units.stop]:
            first, last = offsets[window][1][0], offsets[window][-1][1]
            size = len(content[first:last].encode())
            loss = window_loss(model, ids[window])
            outputs.append({"loss": loss, "tokens": len(ids[window]) - 1, "bytes": size})
        return outputs

    def summarise(outputs: list[dict]) -> dict:
        return summarise_text(outputs, arguments.bootstrap_samples, arguments.seed)

    return Work(len(windows), {"data": source, "window": arguments.window}, run, summarise)


def _read_text(arguments: argparse.Namespace) -> tuple[str, dict]:
    path = Path(arguments.data)
    if path.suffix == ".txt":
        content = path.read_bytes()
        return content.decode(), {"data": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    found = read_rows(arguments.data, arguments.split or "test", revision=arguments.data_revision)
    if "text" not in found.columns:
        raise ValueError(f"{arguments.data} has no column `text`; its columns: {found.columns}.")
    texts, bad = [], []
    for index, value in enumerate(found.rows["text"]):
        try:
            text(value, "text", may_be_empty=True)
        except BadRow as error:
            if arguments.on_bad_row == "raise":
                raise BadRow(f"{error.at(found.place(index))} {REMEDY}") from error
            bad.append(str(error.at(found.place(index))))
        else:
            texts.append(value)  # unchanged, with surrounding white space
    notes = {"bad_rows": len(bad), "bad_row_list": bad[:1000]} if bad else {}
    return "\n\n".join(texts), {**found.identity, **notes}


def report(result: dict) -> str:
    """Returns the metrics of a result, one per line."""
    lines = [f"{result['task']}" + (f" ({result['control']})" if result["control"] else "")]
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


CONTROLS = ("blank_image", "shuffle_images", "question_only")


def _control(arguments: argparse.Namespace) -> str | None:
    chosen = [name for name in CONTROLS if getattr(arguments, name)]
    if len(chosen) > 1:
        flags, count = " and ".join(f"--{name}" for name in chosen), {2: "two", 3: "three"}[len(chosen)]
        raise ValueError(f"{flags} are {count} controls: run them one after the other, or all of them by --controls.")
    return chosen[0] if chosen else None


def output_folder(arguments: argparse.Namespace) -> Path:
    """Returns where results are written."""
    return Path(arguments.output_dir or _default_output(arguments.checkpoint))


def evaluate_several(arguments: argparse.Namespace) -> str | None:
    """Evaluates all `--tasks`, with `--controls` under every control too, and writes one table, `tasks.md`.

    What is there already, of the same settings, is not asked again.

    Returns:
        The table, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, or data that does not fit a task. All tasks' data are found before any is asked.
    """
    if arguments.checkpoint is None or bool(arguments.tasks) == bool(arguments.task):
        raise ValueError("Give a checkpoint, and either a --task or several --tasks.")
    if arguments.controls and _control(arguments):
        raise ValueError(f"--controls includes --{_control(arguments)}: leave it out.")
    given = [(task, _data_of(task, arguments)) for task in arguments.tasks or [arguments.task]]
    loaded = load_model(arguments)
    results, output_dir = [], output_folder(arguments)
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
            write_json(output_dir / f"{file_name(task, MOST_FREQUENT)}.json", found[MOST_FREQUENT])
        results.append((result, found))
    if not results:
        return None
    text = table(results)
    (output_dir / "tasks.md").write_text(text + "\n")
    print(f"\n{text}\n{output_dir / 'tasks.md'}")
    return text


def _data_of(task: str, arguments: argparse.Namespace) -> str | None:
    """Returns where the data of a task lie, of several: in `--data_dir`; None: on the Hub."""
    valid = (*TASKS, "text_perplexity")
    if task not in valid:
        raise ValueError(f"Unknown task {task!r}. Valid tasks: {', '.join(valid)}.")
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


def _default_output(checkpoint: str) -> Path:
    return Path(checkpoint) / "results" if Path(checkpoint).is_dir() else Path("results") / checkpoint.split("/")[-1]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.compare:
            first, second = (read_json(Path(path)) for path in arguments.compare)
            for name, found in compare(first, second, arguments.bootstrap_samples, arguments.seed).items():
                low, high = found["interval"]
                print(f"{name:<28} {found['difference']:+.4f}  [{low:+.4f}, {high:+.4f}]  p = {found['p']:.3f}")
        else:
            if arguments.tasks or arguments.controls:
                evaluate_several(arguments)
            else:
                evaluate_checkpoint(arguments)
            PartialState().destroy_process_group()  # its threads can abort the process if they outlive the interpreter
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run(main)
