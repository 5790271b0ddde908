"""Mixes a checkpoint's language model with an untouched one, share by share, and measures what is kept and what is lost.

    alignvlm blend out/stage3 --untouched out/stage0 --task scenes --data out/scenes --text novel.txt --output_dir out/line
    alignvlm blend out/stage3 --untouched out/stage0 --shares 0.3 --output_dir out/mixed    # writes out/mixed/keep_0.3

Every share gets a complete checkpoint, `keep_<share>`, with its results; a table holds all of them, and `line.json` those of earlier calls on
the same weights, too. What a stage with `keep_language` would have written is the same (WiSE-FT, arXiv 2109.01903).
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState

from alignvlm.evaluation.controls import table
from alignvlm.evaluation.evaluate_model import parser as evaluation_parser
from alignvlm.evaluation.load import check_checkpoint, load_weights, model_identity
from alignvlm.evaluation.one_task import evaluate_checkpoint
from alignvlm.stages.checkpoint import check_writable, save_checkpoint
from alignvlm.stages.lora import merge_saved_lora
from alignvlm.stages.weights import check_same_language_model, keep_language
from hub_upload.command_line import run
from hub_upload.repository import commit_of
from hub_upload.run_record import RUN_RECORD, read_json, read_run_record, write_json
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


# Options of `alignvlm evaluate` that ask something else than one task of each checkpoint.
NOT_HERE = ("server", "server_model", "server_requests", "compare", "tasks", "data_dir", "controls", "name")
# Options that are read without an evaluation, too.
OF_BLENDING = ("checkpoint", "untouched", "shares", "output_dir", "revision", "use_cpu", "task", "text")
LINE = "line.json"
SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def parser() -> argparse.ArgumentParser:
    p = evaluation_parser()
    p.description, p.usage = __doc__.split("\n")[0], "%(prog)s CHECKPOINT --untouched CHECKPOINT [options]"
    for action in p._actions:
        if action.dest in NOT_HERE:
            action.help = argparse.SUPPRESS
    p.epilog = "All other options are those of `alignvlm evaluate` for one task."
    p.add_argument("--untouched", help="The checkpoint whose language model gets the share, such as that of stage 0.")
    p.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="Of the untouched one. Default: 0 0.1 ... 1."
    )
    p.add_argument("--text", help="A text file, or a data set with a column `text`, to measure the perplexity on.")
    return p


def blend(
    checkpoint: str, untouched: str, shares: list[float], folder: Path, revision: str | None = None
) -> list[Path]:
    """Writes `keep_<share>` into `folder` for every share; complete ones of the same weights are left as they are. Returns the folders.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for a share outside [0, 1], two shares of one folder's name, another language model, a checkpoint without a stage
            that trained it, and a folder that holds another mixture.
    """
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"--shares {share:g} is the share of the untouched language model: from 0 to 1.")
    names = [f"keep_{share:g}" for share in shares]
    if same := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--shares: {same[0]} would be the folder of two of them. Leave one out; six digits count.")
    check_checkpoint(checkpoint, revision)
    check_checkpoint(untouched, weights_only=True)
    record = read_run_record(checkpoint, revision)
    if not any("language" in stage.get("learning_rates", {}) for stage in record["stages"]):
        raise ValueError(f"No stage of {checkpoint!r} has trained its language model: there is nothing to mix.")
    if "keep_language" in record["stages"][-1]:
        raise ValueError(
            f"{checkpoint!r} is mixed already, with the share {record['stages'][-1]['keep_language']['share']:g}: name the checkpoint "
            "without."
        )
    check_same_language_model(checkpoint, revision, untouched)
    folders = [folder / name for name in names]
    weights = {"trained": model_identity(checkpoint, revision), "untouched": model_identity(untouched)}
    for share, each in zip(shares, folders):
        _check_same_mixture(each, share, weights)
    check_writable(folder)
    if all((each / RUN_RECORD).is_file() for each in folders):
        return folders
    source = {"model": untouched, "revision": commit_of(untouched)}
    model, kept = _load(checkpoint, revision), _load(untouched).state_dict()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    processor = AlignVLMProcessor.from_pretrained(checkpoint, revision=revision)
    *before, last = record["stages"]
    for share, each in zip(shares, folders):
        if (each / RUN_RECORD).is_file():
            continue
        model.load_state_dict(trained)
        keep_language(model, kept, share)
        mixture = {"share": share, "untouched": source, "weights": weights, "after_measuring": True}
        mixed = {**last, "keep_language": mixture}
        save_checkpoint(model, processor, each, {**record, "stages": [*before, mixed]})
    return folders


def _check_same_mixture(folder: Path, share: float, weights: dict[str, dict]) -> None:
    """Raises a `ValueError` for a complete checkpoint that is not this share of these weights."""
    there = _mixture(folder)
    if there is not None and (there.get("share"), there.get("weights")) != (share, weights):
        raise ValueError(
            f"{folder} holds another mixture than {share:g} of these two checkpoints. Remove the folder, or name another --output_dir."
        )


def _mixture(folder: Path) -> dict | None:
    """Returns what the run record of a complete checkpoint says of its mixture; None if there is no such checkpoint."""
    if not (folder / RUN_RECORD).is_file():
        return None
    stages = read_run_record(str(folder))["stages"]
    return stages[-1].get("keep_language", {}) if stages else {}


def _read_line(folder: Path, weights: dict[str, dict]) -> dict[float, dict]:
    """Returns the rows of `line.json` by their shares: those whose checkpoints are still there and mix these weights."""
    rows = read_json(folder / LINE) if (folder / LINE).is_file() else []
    found = {}
    for row in rows:
        there = _mixture(folder / row["checkpoint"]) or {}
        if (there.get("share"), there.get("weights")) == (row["share"], weights):
            found[row["share"]] = row
    return found


def _check_options(arguments: argparse.Namespace, defaults: argparse.ArgumentParser) -> None:
    """Ends the program for options that nothing would read."""
    given = [name for name, value in vars(arguments).items() if value != defaults.get_default(name)]
    if others := [name for name in given if name in NOT_HERE]:
        raise SystemExit(
            f"error: --{others[0]} is of `alignvlm evaluate` alone. Leave it out, or give it that and the new checkpoints."
        )
    needed = {
        "a checkpoint": "checkpoint",
        "--untouched (another checkpoint)": "untouched",
        "--output_dir": "output_dir",
    }
    if missing := [what for what, name in needed.items() if not getattr(arguments, name)]:
        raise SystemExit(f"error: Give {' and '.join(missing)}.")
    unread = [name for name in given if name not in OF_BLENDING]
    if unread and not (arguments.task or arguments.text):
        raise SystemExit(
            f"error: --{unread[0]} is of an evaluation, and there is none: give --task or --text, too, or leave it out."
        )
    if arguments.data and not arguments.task:
        raise SystemExit("error: --data is of a --task, and there is none: give one, or leave it out.")


def _load(checkpoint: str, revision: str | None = None) -> AlignVLMForConditionalGeneration:
    model = load_weights(AlignVLMForConditionalGeneration, checkpoint, revision=revision, dtype=torch.float32)
    merge_saved_lora(model, checkpoint, revision)
    return model


def main(argv: list[str] | None = None) -> None:
    """Writes the checkpoints, measures them where the command line says on what, and prints a table."""
    options = parser()
    arguments = options.parse_args(argv)
    _check_options(arguments, options)
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise SystemExit(
            f"error: `alignvlm blend` runs on one process, and there are {state.num_processes}. Start it without `accelerate launch`."
        )
    folder = Path(arguments.output_dir)
    asked = [(arguments.task, arguments.data)] if arguments.task else []
    asked += [("text_perplexity", arguments.text)] if arguments.text else []
    folders = blend(arguments.checkpoint, arguments.untouched, arguments.shares, folder, arguments.revision)
    line, lines = _read_line(folder, _mixture(folders[0])["weights"]), []
    for share, each in zip(arguments.shares, folders):
        own = {"checkpoint": str(each), "revision": None, "output_dir": None}
        results = [
            evaluate_checkpoint(
                argparse.Namespace(**vars(arguments) | own | {"task": task, "data": data}), keep_finished=True
            )
            for task, data in asked
        ]
        measured = {"share": share, "checkpoint": each.name, **{r["task"]: r["metrics"] for r in results}}
        line[share] = line.get(share, {}) | measured
        head, rule, *rows = table([(result, {}) for result in results]).split("\n")
        lines += [] if lines else [f"| share {head}", f"| ----- {rule}"]
        lines += [f"| {share:<5g} {row}" for row in rows]
    write_json(folder / LINE, [line[share] for share in sorted(line)])
    print("\n".join(lines if asked else map(str, folders)))


if __name__ == "__main__":
    run(main)
