"""Evaluates a checkpoint on a task and writes one JSON file of numbers, settings and predictions.

    alignvlm evaluate out/stage4 --task pathvqa --split test
    accelerate launch -m alignvlm.evaluation.evaluate_model out/stage4 --task pathvqa    # several processes
    alignvlm evaluate --compare a.json b.json

Work is cut into batches that do not depend on the number of processes; each process notes its finished batches on disk, so that an
evaluation that was interrupted goes on where it stopped, with the same result.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evaluate
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from alignvlm.data.rows import ON_BAD_ROW
from alignvlm.evaluation import bootstrap
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import add_loading_options, evaluation_tag, load_checkpoint
from alignvlm.evaluation.tasks import (
    CAPTION_PROMPT,
    TASKS,
    BadRows,
    Record,
    blank,
    load_task,
    plain_texts,
    read_rows,
    shuffled_rows,
)
from hub_upload.repository import commit_of
from hub_upload.run_record import library_versions, sha256_of, write_json


METRICS = Path(__file__).resolve().parent / "metrics"
# The numbers of each metric that are means over its questions, and so get an interval: from a prediction's scores.
INTERVALS = {
    "cider": {"cider": ("cider", None)},
    "pathvqa_accuracy": {
        "accuracy": ("correct", None),
        "yes_no_accuracy": ("correct", True),
        "free_form_accuracy": ("correct", False),
        "free_form_recall": ("recall", False),
        "free_form_f1": ("f1", False),
    },
}


def parser() -> argparse.ArgumentParser:
    tasks = (*TASKS, "text_perplexity")
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", nargs="?", help="A checkpoint's folder or Hub repository.")
    p.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="Two results of one task: B against A.")
    p.add_argument("--task", choices=tasks, help="What the model is asked.")
    p.add_argument("--split", default="test")
    p.add_argument("--data", help="Hub data set, local folder or file; each task but scenes and local has a default.")
    p.add_argument("--data_revision", help="Revision of a Hub data set.")
    p.add_argument("--image_dir", help="Where image paths in the data start.")
    p.add_argument("--keep_duplicates", action="store_true", help="Ask exact duplicates again.")
    p.add_argument("--limit", type=int, help="Only the first so many images (or windows of text).")
    p.add_argument(
        "--on_bad_row",
        choices=ON_BAD_ROW,
        default="raise",
        help="What a row does whose texts cannot be used or whose image cannot be read.",
    )
    p.add_argument("--prompt", default=CAPTION_PROMPT, help="What captions are asked for with.")
    p.add_argument(
        "--tag", help="A source tag before every prompt; default: the `evaluation_tag` of the checkpoint's last stage."
    )
    p.add_argument("--blank_image", action="store_true", help="Control: every image a grey square.")
    p.add_argument("--shuffle_images", action="store_true", help="Control: every question with another image.")
    p.add_argument("--batch_size", type=int, default=32, help="Images (or windows of text) at once.")
    p.add_argument("--num_beams", type=int, default=1, help="1 is greedy decoding.")
    p.add_argument("--max_new_tokens", type=int, default=40)
    p.add_argument("--window", type=int, default=512, help="Tokens per window of text, for text_perplexity.")
    add_loading_options(p)
    p.add_argument("--seed", type=int, default=0, help="Of --shuffle_images and the bootstrap.")
    p.add_argument("--bootstrap_samples", type=int, default=1000)
    p.add_argument(
        "--output_dir", help="Default: `results` in the checkpoint's folder; results/<name> for a Hub repository."
    )
    return p


@dataclass
class Work:
    """A task bound to a model: `length` independent units, `run` on a range of them, and the summary of all outputs."""

    length: int
    settings: dict
    run: Callable[[range], list]
    summarise: Callable[[list], dict]


def evaluate_checkpoint(arguments: argparse.Namespace) -> dict | None:
    """Evaluates as the command line asks and writes `<task>.json`.

    Returns:
        What was written, on the main process; None on the others.

    Raises:
        ValueError: for settings that contradict each other, or data that does not fit the task.
    """
    if arguments.checkpoint is None or arguments.task is None:
        raise ValueError("Give a checkpoint and a --task, or two results to --compare.")
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    with state.main_process_first():  # so that remote code and data are fetched and converted once
        model, processor, precision = load_checkpoint(
            arguments.checkpoint,
            state.device,
            arguments.revision,
            arguments.trust_remote_code,
            arguments.dtype,
            arguments.attn_implementation,
        )
        print(f"Computes in {precision}")
        bind = _text_work if arguments.task == "text_perplexity" else _question_work
        work = bind(arguments, model, processor)
    settings = {
        "task": arguments.task,
        "model": _model_identity(arguments.checkpoint, arguments.revision),
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
    name = arguments.task + (f"-{settings['control']}" if settings["control"] else "")
    output_dir = Path(arguments.output_dir or _default_output(arguments.checkpoint))
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    progress = output_dir / f".{name}-{fingerprint}"  # other settings have their own
    outputs = _run_batches(work, arguments.batch_size, progress, state, name)
    if outputs is None:
        return None
    result = {**settings, **work.summarise(outputs)}
    target = output_dir / f"{name}.json"
    write_json(target, result)
    shutil.rmtree(progress)
    print(f"{report(result)}\n{target}")
    return result


def _run_batches(work: Work, batch_size: int, folder: Path, state: PartialState, title: str) -> list | None:
    """Runs what `folder` does not hold yet, each process every n-th batch, and returns all outputs in order (main process only).

    Each process appends a line per finished batch to a file of its own, so a crash costs at most the batches in flight.
    """
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_lines(folder)
    state.wait_for_everyone()
    batches = {
        start: range(start, min(start + batch_size, work.length)) for start in range(0, work.length, batch_size)
    }
    done = _finished_batches(folder)
    state.wait_for_everyone()  # everyone has read before anyone writes
    missing = [start for start in batches if start not in done]
    mine = missing[state.process_index :: state.num_processes]
    if done and state.is_main_process:
        print(f"Going on with {folder}: {len(done)} of {len(batches)} batches are done.")
    with (folder / f"{state.process_index}.jsonl").open("a") as file:
        for start in tqdm(mine, desc=title, disable=not state.is_main_process):
            file.write(json.dumps({"start": start, "outputs": work.run(batches[start])}) + "\n")
            file.flush()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _finished_batches(folder)
    return [output for start in batches for output in done[start]]


def _drop_unfinished_lines(folder: Path) -> None:
    """Takes away a last line that a crash cut short, so that the next one does not continue it."""
    for file in folder.glob("*.jsonl"):
        whole, _, rest = file.read_text().rpartition("\n")
        if rest:
            file.write_text(whole + "\n" if whole else "")


def _finished_batches(folder: Path) -> dict[int, list]:
    """The outputs of finished batches by their first unit, whichever process noted them."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {entry["start"]: entry["outputs"] for entry in map(json.loads, lines)}


def _question_work(arguments: argparse.Namespace, model, processor) -> Work:
    """Asks about images, and judges the answers by each question's metric."""
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
    records = evaluation_set.records
    seen = shuffled_rows(records, arguments.seed) if control == "shuffle_images" else records
    tag = evaluation_tag(arguments.checkpoint, arguments.revision) if arguments.tag is None else arguments.tag
    decoding = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens, "do_sample": False}

    def run(units: range) -> list[list[str]]:
        images = evaluation_set.images([seen[unit] for unit in units])
        prompts = [[f"{tag} {question.prompt}".strip() for question in records[unit].questions] for unit in units]
        if control == "blank_image":
            images = blank(images)
        return answer(model, processor, images, prompts, batch_size=arguments.batch_size, **decoding)

    def summarise(outputs: list[list[str]]) -> dict:
        return judge(records, outputs, arguments.bootstrap_samples, arguments.seed)

    settings = {"data": {**evaluation_set.source, **evaluation_set.notes}, "tag": tag, "decoding": decoding}
    return Work(len(records), settings, run, summarise)


def judge(records: list[Record], answers: list[list[str]], samples: int = 1000, seed: int = 0) -> dict:
    """Scores answers by each question's metric.

    Args:
        records: what was asked.
        answers: for each record, one answer per question.
        samples, seed: of the bootstrap.

    Returns:
        `metrics`: by metric, its numbers, each mean with its 95% interval under `intervals`, and for captions the same of each prompt
        under `by_prompt`; `definitions`; `predictions`: one entry
        per question with its scores.
    """
    predictions = [
        {"id": record.id, "prompt": q.prompt, "prediction": text, "references": q.references, "metric": q.metric}
        for record, group in zip(records, answers)
        for q, text in zip(record.questions, group, strict=True)
    ]
    metrics, definitions = {}, {}
    for name, means in INTERVALS.items():
        items = [prediction for prediction in predictions if prediction["metric"] == name]
        if not items:
            continue
        metric = evaluate.load(str(METRICS / name))
        definitions[name] = " ".join(metric.info.description.split("\nArgs:")[0].split())
        texts = [item["prediction"] for item in items]
        if name == "cider":
            numbers = metric.compute(predictions=texts, references=[item["references"] for item in items])
            per_item = [{"cider": score} for score in numbers.pop("cider_per_item")]
        else:
            numbers = metric.compute(predictions=texts, references=[item["references"][0] for item in items])
            per_item = numbers.pop("per_item")
        for item, scores in zip(items, per_item):
            item["scores"] = scores
        intervals = {}
        for number in means:
            chosen, values = scores_of(items, name, number)
            if values:
                intervals[number] = bootstrap.interval([item["id"] for item in chosen], values, samples, seed)
        metrics[name] = {**numbers, "intervals": intervals}
        if name == "cider":
            metrics[name]["by_prompt"] = by_prompt(items, samples, seed)
    return {"metrics": metrics, "definitions": definitions, "predictions": predictions}


def by_prompt(items: list[dict], samples: int, seed: int) -> dict[str, dict]:
    """CIDEr of the captions that each prompt asked for: the mean of their scores, which the overall number is the mean of."""
    groups: dict[str, list[dict]] = {}
    for item in items:
        groups.setdefault(item["prompt"], []).append(item)
    found = {}
    for prompt, group in groups.items():
        values = [item["scores"]["cider"] for item in group]
        interval = bootstrap.interval([item["id"] for item in group], values, samples, seed)
        found[prompt] = {"cider": sum(values) / len(values), "count": len(values), "intervals": {"cider": interval}}
    return found


def scores_of(items: list[dict], metric: str, number: str) -> tuple[list[dict], list[float]]:
    """The predictions whose scores a metric's number is the mean of, and those scores."""
    score, yes_no = INTERVALS[metric][number]
    chosen = [item for item in items if yes_no is None or item["scores"]["yes_no"] == yes_no]
    return chosen, [float(item["scores"][score]) for item in chosen]


def _text_work(arguments: argparse.Namespace, model, processor) -> Work:
    """Perplexity of a fixed text, in windows that do not overlap; a window's first token is context only."""
    if arguments.data is None:
        raise ValueError("text_perplexity needs --data: a text file, or a data set with a column `text`.")
    if _control(arguments):
        raise ValueError("text_perplexity has no images: leave out --blank_image and --shuffle_images.")
    text, source = _read_text(arguments)
    tokens = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    starts = [start for start in range(0, len(ids), arguments.window) if start + 1 < len(ids)][: arguments.limit]
    if not starts:
        raise ValueError(f"{arguments.data} has {len(ids)} tokens; at least two are needed.")

    @torch.inference_mode()
    def run(units: range) -> list[dict]:
        outputs = []
        for unit in units:
            window = slice(starts[unit], starts[unit] + arguments.window)
            input_ids = torch.tensor([ids[window]], device=model.device)
            logits = model(input_ids=input_ids, prompt_mask=torch.zeros_like(input_ids, dtype=torch.bool)).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:], reduction="sum")
            first, last = offsets[window][1][0], offsets[window][-1][1]
            size = len(text[first:last].encode())
            outputs.append({"loss": loss.item(), "tokens": input_ids.shape[1] - 1, "bytes": size})
        return outputs

    def summarise(outputs: list[dict]) -> dict:
        totals = {name: sum(output[name] for output in outputs) for name in ("loss", "tokens", "bytes")}
        per_token = [output["loss"] / output["tokens"] for output in outputs for _ in range(output["tokens"])]
        windows = [index for index, output in enumerate(outputs) for _ in range(output["tokens"])]
        low, high = bootstrap.interval(windows, per_token, arguments.bootstrap_samples, arguments.seed)
        numbers = {
            "perplexity": math.exp(totals["loss"] / totals["tokens"]),
            "bits_per_byte": totals["loss"] / math.log(2) / totals["bytes"],
            "tokens": totals["tokens"],
            "bytes": totals["bytes"],
            "intervals": {"perplexity": [math.exp(low), math.exp(high)]},
        }
        definition = (
            "exp of the mean loss per predicted token (nats); windows do not overlap, their first token is context"
        )
        return {"metrics": {"text": numbers}, "definitions": {"text": definition}, "predictions": outputs}

    return Work(len(starts), {"data": source, "window": arguments.window}, run, summarise)


def _read_text(arguments: argparse.Namespace) -> tuple[str, dict]:
    path = Path(arguments.data)
    if path.suffix == ".txt":
        content = path.read_bytes()
        return content.decode(), {"data": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    rows, source, _, place = read_rows(arguments.data, arguments.split, arguments.data_revision)
    if "text" not in rows.column_names:
        raise ValueError(f"{arguments.data} has no column `text`; its columns: {rows.column_names}.")
    bad = BadRows(arguments.on_bad_row, place)
    return "\n\n".join(plain_texts(rows, bad)), {**source, **bad.notes()}


def compare(first: dict, second: dict, samples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """The paired bootstrap of two results: by number, how much higher `second` is (see `bootstrap.paired_difference`).

    Raises:
        ValueError: if they do not answer the same questions.
    """
    questions = [
        [(item.get("id"), item.get("prompt"), item.get("references")) for item in result["predictions"]]
        for result in (first, second)
    ]
    if first["task"] != second["task"] or questions[0] != questions[1] or "text" in first["metrics"]:
        raise ValueError(
            f"The results do not answer the same questions about images: task {first['task']!r} with {len(questions[0])} "
            f"answers and task {second['task']!r} with {len(questions[1])}. Evaluate both on the same data and split."
        )
    differences = {}
    for metric in first["metrics"]:
        items = [[p for p in result["predictions"] if p["metric"] == metric] for result in (first, second)]
        for number in INTERVALS[metric]:
            chosen, before = scores_of(items[0], metric, number)
            _, after = scores_of(items[1], metric, number)
            if chosen:
                ids = [item["id"] for item in chosen]
                differences[number] = bootstrap.paired_difference(ids, before, after, samples, seed)
    return differences


def report(result: dict) -> str:
    """The numbers of a result, a line each."""
    lines = [f"{result['task']}" + (f" ({result['control']})" if result["control"] else "")]
    if left_out := result["data"].get("bad_rows"):
        lines.append(f"  {'bad rows, left out':<28} {left_out:>9}")
    for numbers in result["metrics"].values():
        for name, value in numbers.items():
            if name in ("intervals", "by_prompt"):
                continue
            interval = numbers["intervals"].get(name)
            text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"  {name:<28} {text:>9}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
        for prompt, own in numbers.get("by_prompt", {}).items():
            low, high = own["intervals"]["cider"]
            lines.append(f"  {f'cider of {prompt!r}':<28} {own['cider']:>9.4f}  [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)


def _control(arguments: argparse.Namespace) -> str | None:
    if arguments.blank_image and arguments.shuffle_images:
        raise ValueError("--blank_image and --shuffle_images are two controls: run them one after the other.")
    return "blank_image" if arguments.blank_image else "shuffle_images" if arguments.shuffle_images else None


def _default_output(checkpoint: str) -> Path:
    return Path(checkpoint) / "results" if Path(checkpoint).is_dir() else Path("results") / checkpoint.split("/")[-1]


def _model_identity(checkpoint: str, revision: str | None) -> dict:
    """Which weights these are: a repository's commit, or the hash of a folder's weights."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return {"name": checkpoint, "revision": commit_of(checkpoint, revision)}
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("lora/*.safetensors")])
    return {"name": folder.resolve().name, "weights_sha256": sha256_of(weights)}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.compare:
            first, second = (json.loads(Path(path).read_text()) for path in arguments.compare)
            for name, found in compare(first, second, arguments.bootstrap_samples, arguments.seed).items():
                low, high = found["interval"]
                print(f"{name:<28} {found['difference']:+.4f}  [{low:+.4f}, {high:+.4f}]  p = {found['p']:.3f}")
        else:
            evaluate_checkpoint(arguments)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
