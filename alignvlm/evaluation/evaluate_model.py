"""Evaluates a checkpoint on a task and writes one JSON file of metrics, settings and predictions.

    alignvlm evaluate out/stage4 --task pathvqa --split test
    accelerate launch -m alignvlm.evaluation.evaluate_model out/stage4 --task pathvqa    # several processes
    alignvlm evaluate out/stage4 --tasks pathvqa,pope,chartqa --data_dir sets --controls    # several tasks, one table
    alignvlm evaluate --server http://localhost:8000/v1 --tasks pathvqa,pope --data_dir sets    # what somebody serves
    alignvlm evaluate --compare a.json b.json

Any number of processes share the work. An interrupted evaluation continues where it stopped, with the same result (`batches.py`).
`judge.py` judges the answers; `controls.py` says what of a score needs the image.
"""

import argparse
import re
from pathlib import Path

from accelerate import PartialState

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.data.record import ON_BAD_ROW
from alignvlm.evaluation.judge import compare
from alignvlm.evaluation.load import add_loading_options
from alignvlm.evaluation.one_task import asked_otherwise, evaluate_checkpoint
from alignvlm.evaluation.task_list import evaluate_several
from alignvlm.evaluation.task_work import ALL_TASKS
from hub_upload.command_line import ArgumentParser, positive, run
from hub_upload.run_record import read_json


def parser() -> argparse.ArgumentParser:
    without = [task for task in ALL_TASKS if task not in CATALOGUE or CATALOGUE[task].data is None]
    p = ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", nargs="?", help="A checkpoint's folder or Hub repository.")
    p.add_argument("--server", metavar="URL", help="Ask a server that speaks the OpenAI protocol, not a checkpoint.")
    p.add_argument("--server_model", metavar="NAME", help="Its model. Default: the only one that it lists.")
    p.add_argument("--server_requests", type=int, default=8, help="Requests to it at once. Default: 8.")
    p.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="Compare two results of one task: B against A."
    )
    p.add_argument("--task", choices=ALL_TASKS, help="What to ask the model.")
    p.add_argument(
        "--tasks",
        type=_tasks,
        metavar="A,B,...",
        help="Several tasks in one go, and one table of them. NAME=TASK is a task on data called NAME.",
    )
    p.add_argument(
        "--data_dir",
        help="Where the data of --tasks lie: a folder, or one file, called like each task or its NAME. Default: the Hub's.",
    )
    p.add_argument(
        "--name",
        type=_name,
        help="What the result is called: its file, and in tables and on the card. Default: the task's name.",
    )
    p.add_argument("--split", help="Default: the split that the task is usually asked of, for most `test`.")
    p.add_argument(
        "--data",
        help=f"Hub data set, local folder or file. Most tasks have a default; {', '.join(without)} have none.",
    )
    p.add_argument("--data_revision", help="Revision of a Hub data set.")
    p.add_argument("--image_dir", help="Where image paths in the data start.")
    p.add_argument("--keep_duplicates", action="store_true", help="Ask exact duplicates again.")
    p.add_argument("--limit", type=positive, help="At most this number of images (or windows of text).")
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
        "--max_tiles",
        type=positive,
        help="Cut images into at most this number of tiles; default: as the checkpoint says.",
    )
    p.add_argument("--batch_size", type=positive, default=32, help="Images (or windows of text) at once.")
    p.add_argument("--num_beams", type=positive, default=1, help="1 is greedy decoding.")
    p.add_argument("--max_new_tokens", type=positive, default=40)
    p.add_argument("--window", type=int, default=512, help="Tokens per window of text, for text_perplexity.")
    add_loading_options(p)
    p.add_argument(
        "--merge_image_tokens",
        type=int,
        metavar="N",
        help="Merge similar tokens of an image until N are left, also of a checkpoint trained without; 0: none.",
    )
    p.add_argument("--seed", type=int, default=0, help="Seed of --shuffle_images and the bootstrap.")
    p.add_argument("--bootstrap_samples", type=positive, default=1000)
    p.add_argument(
        "--output_dir", help="Default: `results` in the checkpoint's folder; results/<name> for a Hub repository."
    )
    return p


def _name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a file: letters, digits, '_', '-' and '.' only.")
    return text


def _tasks(text: str) -> list[tuple[str | None, str]]:
    """Returns the name, if it has one of its own, and the task of each word between commas."""
    pairs = [word.strip().rpartition("=") for word in text.split(",") if word.strip()]
    return [(_name(name) if equals else None, task) for name, equals, task in pairs]


def _result(path: str) -> dict:
    """Reads a result file.

    Raises:
        ValueError: for another JSON file.
    """
    result = read_json(Path(path))
    fields = ("task", "metrics", "predictions")
    missing = [name for name in fields if name not in result] if isinstance(result, dict) else list(fields)
    if missing:
        raise ValueError(
            f"{path} is no result of an evaluation: it lacks {', '.join(missing)}. Compare two files that `alignvlm evaluate` wrote."
        )
    return result


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.compare:
            first, second = map(_result, arguments.compare)
            differences = compare(first, second, arguments.bootstrap_samples, arguments.seed)
            if other := asked_otherwise(first, second):
                print(f"B differs from A in how it was asked: {'; '.join(other)}")
            for name, found in differences.items():
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
