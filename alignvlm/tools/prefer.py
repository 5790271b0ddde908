"""Samples answers of a checkpoint and pairs the best with the worst by a reward: preferences for stage 5 by DPO.

    alignvlm prefer out/stage4 --sources '[{"name": "scenes", "annotations": ["short_caption"], "count": 200}]' --reward cider --output_dir out/pairs

Writes `pairs.parquet` in TRL's form (`images`, `prompt`, `chosen`, `rejected`), which a recipe reads as `{data: out/pairs/pairs.parquet}`. Empty
answers are left out, and a prompt whose other answers are all equally good makes no pair. The same command goes on where it stopped; several processes (`accelerate launch`) share the work.
"""

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from transformers import set_seed
from transformers.utils import logging

from alignvlm.data.mixture import read_parts
from alignvlm.data.record import shown
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.batches import Work, progress_folder, run_batches
from alignvlm.evaluation.load import add_loading_options, model_identity
from alignvlm.evaluation.rewards import CIDER, REWARDS, make_rewards
from alignvlm.stages.checkpoint import check_writable
from alignvlm.stages.prompts import conversations_of, prompts
from alignvlm.tools.ask import load
from hub_upload.command_line import ArgumentParser, positive, run
from hub_upload.run_record import write_json


PAIRS, SUMMARY = "pairs.parquet", "pairs.json"
# As stage 5 and `recaption` sample, whatever the checkpoint's `generation_config` says; transformers' own default is the 50 likeliest.
FROM_ALL_TOKENS = {"top_k": 0, "top_p": 1.0}
SEEDS = 2**32  # numpy's
# Options of which the parser checks only the type: what is valid, and how a refusal says it.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "samples": (lambda value: value >= 2, "a whole number of 2 or more, of which a pair is made"),
    "temperature": (lambda value: 0 < value < math.inf, "a number above 0"),
    "seed": (lambda value: 0 <= value < SEEDS, f"a whole number from 0 to {SEEDS - 1}"),
}
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
PREFERENCES = Features({"images": List(Image()), "prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s CHECKPOINT --sources JSON [options]")
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument(
        "--sources", required=True, help="Prompts with references: a list of sources as in a recipe, as JSON."
    )
    p.add_argument("--data_dir", default=".", help="Folder at which relative paths of sources start.")
    p.add_argument("--reward", choices=REWARDS, default=CIDER, help="What ranks the answers. Default: cider.")
    p.add_argument("--samples", type=int, default=8, help="Answers to each prompt, 2 or more. Default: 8.")
    p.add_argument("--temperature", type=float, default=1.0, help="Of the sampling. Default: 1.")
    p.add_argument("--max_new_tokens", type=positive, default=64, help="Where an answer is cut off. Default: 64.")
    p.add_argument("--batch_size", type=positive, default=64, help="Answers sampled at once. Default: 64.")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output_dir", required=True, help=f"Gets {PAIRS} and {SUMMARY}.")
    add_loading_options(p)
    return p


def prefer(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Samples, ranks and writes the pairs; returns what `pairs.json` says, on the main process.

    Raises:
        ValueError: for sources that are not valid, a reward that judges none of their answers, and options out of range.
    """
    for name, (is_valid, valid) in RANGES.items():
        value = getattr(arguments, name)
        if not is_valid(value):
            raise ValueError(f"--{name} {value} is out of range: give {valid}.")
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())  # before anything asks for one
    logging.disable_progress_bar()
    check_writable(arguments.output_dir)
    try:
        sources = json.loads(arguments.sources)
    except json.JSONDecodeError as error:
        raise ValueError(f"--sources is not valid JSON: {error}.") from error
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f'--sources is {shown(sources)}; expected a list of sources: [{{"data": ...}}, ...].')
    for source in sources:
        if "share" in source:
            raise ValueError(
                f"share={source['share']} of a source: every prompt is answered once. Set its `limit` (of scenes: `count`)."
            )
    parts = read_parts(sources, lambda record: (0, 0), arguments.data_dir)
    found = [(parts[place["part"]].source.metric_of(said), said) for place, said in conversations_of(parts)]
    (reward,) = make_rewards([arguments.reward], [said.responses for metric, said in found if metric == CIDER])
    judged = [index for index, (metric, _) in enumerate(found) if reward.judges(metric)]
    if not judged:
        raise ValueError(
            f"The reward {reward.name!r} judges no answer of these sources. Name others, or another reward."
        )
    asked = prompts(parts).select(judged)

    loaded: list = []

    def prepare() -> None:
        loaded[:] = load(arguments)

    def sample(indices: range) -> list[dict[str, Any]]:
        """Returns the answers to each prompt and their rewards."""
        model, processor, _ = loaded
        set_seed((arguments.seed + indices.start) % SEEDS)
        examples = [asked[index] for index in indices]
        answers = answer(
            model,
            processor,
            [example["images"] for example in examples],
            [[example["prompt"]] * arguments.samples for example in examples],
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            refuse_long_prompts=False,  # their answers are empty, so they make no pair
            do_sample=True,
            temperature=arguments.temperature,
            **FROM_ALL_TOKENS,
        )
        outputs = []
        for example, given in zip(examples, answers):
            columns = {name: [example[name]] * len(given) for name in ("references", "metric", "kinds", "choices")}
            outputs.append({"answers": given, "rewards": reward([None] * len(given), given, **columns)})
        return outputs

    names = ("reward", "samples", "temperature", "max_new_tokens", "batch_size", "seed", "dtype")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {
        **FROM_ALL_TOKENS,
        "model": model_identity(arguments.checkpoint, arguments.revision),
        "sources": sources,
        "data": [part.source.identity for part in parts],
    }
    work = Work(len(asked), settings, sample, prepare=prepare)
    folder = progress_folder(Path(arguments.output_dir), "pairs", settings)
    size = max(arguments.batch_size // arguments.samples, 1)
    outputs = run_batches(work, size, folder, state, "prompts")
    if outputs is None:
        return None
    rows = [row for index, output in enumerate(outputs) if (row := pair_of(asked, index, **output)) is not None]
    if not rows:
        empty = [not text for output in outputs for text in output["answers"]]
        raise ValueError(
            f"None of {len(asked)} prompts has two answers of which one is better; {sum(empty)} of {len(empty)} answers are empty. Raise "
            "--samples or --temperature, or take another reward."
        )
    Dataset.from_list(rows, features=PREFERENCES).to_parquet(str(Path(arguments.output_dir) / PAIRS))
    summary = {
        **settings,
        "prompts": len(asked),
        "pairs": len(rows),
        "mean_reward": float(torch.tensor([output["rewards"] for output in outputs]).mean()),
    }
    write_json(Path(arguments.output_dir) / SUMMARY, summary)
    return summary


def pair_of(asked: Dataset, index: int, answers: list[str], rewards: list[float]) -> dict[str, Any] | None:
    """Makes a row of the best and the worst answer to a prompt, of those that are not empty; None if they are equally good."""
    said = [k for k, text in enumerate(answers) if text]
    best, worst = (choose(said, key=lambda k: rewards[k], default=None) for choose in (max, min))
    if best is None or rewards[best] == rewards[worst]:
        return None
    example = asked[index]
    said = {
        name: [{"role": "assistant", "content": [{"type": "text", "text": answers[k]}]}]
        for name, k in (("chosen", best), ("rejected", worst))
    }
    return {
        "images": [{"bytes": _png(image), "path": None} for image in example["images"]],
        "prompt": example["prompt"],
        **said,
    }


def _png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Writes the pairs and says how many there are."""
    arguments = parser().parse_args(argv)
    summary = prefer(arguments)
    if summary is not None:
        print(
            f"{summary['pairs']} pairs of {summary['prompts']} prompts in {Path(arguments.output_dir) / PAIRS}; mean reward of all answers: "
            f"{summary['mean_reward']:.3f}"
        )
    PartialState().destroy_process_group()  # its threads can abort the process if they outlive the interpreter


if __name__ == "__main__":
    run(main)
