"""The frontier of accuracy against image tokens per image, with the seconds and the memory that they cost, on drawn scenes.

    python benchmarks/tokens.py --seeds 3                       # every arm; an hour or more on two cores
    python benchmarks/tokens.py --only mlp "merged to 8"        # some arms
    python benchmarks/tokens_photos.py --photos FOLDER --language SMOLLM2 --vision MOBILENET    # the best of them, on real photos
    python docs/write_results_page.py                           # the table and the plot of docs/performance.md, from docs/results.json

An arm is an option of `alignvlm assemble` that changes how many tokens an image takes, or what they are made of: nano backbones, the same
for all arms of a seed, go with it through stages 1 to 3 (`training/recipes/nano`, with fewer scenes), and the last checkpoint is
evaluated. Arms `at inference` train nothing: they evaluate another arm's checkpoint with other tokens. Reported are the values of all
seeds, and the paired differences to the first arm with their 95% interval, as in `benchmarks/findings.py`. What is there is not done
again: start the same command to go on.

Seconds are those of training, all stages, and of answering the held-out questions, once more and without writing. Memory is what a
step of stage 3 keeps for its backward pass, counted by PyTorch: it depends on no machine.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/tokens.py`

from alignvlm.data import scenes
from alignvlm.data.images import read_image
from alignvlm.data.record import Record
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import grids_of, set_max_tiles
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.trainer import freeze_all_but
from benchmarks.findings import Scenes, summarise
from benchmarks.stage_runs import evaluate, machine, stage_values, train, update_results
from hub_upload.run_record import RUN_RECORD, write_json


METRICS = {"accuracy": "accuracy", "CIDEr": "CIDEr", "training_seconds": "training, s", "answering_seconds": "answering, s", "step_mb": "step, MB"}  # fmt: skip
DIGITS = {
    "CIDEr": 2,
    "training_seconds": 1,
    "answering_seconds": 1,
    "step_mb": 0,
    "kilopixels": 1,
}  # of all others three
ANSWERED, STEP_RECORDS, TURNS = 100, 32, 3


@dataclass(frozen=True)
class Arm:
    """An arm: `assembly` are fields of `BackboneArguments`, `stage` of its stages; or the checkpoint of the arm `trained`, merging to
    `merged` tokens or cutting images into at most `max_tiles`."""

    assembly: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    trained: str | None = None
    merged: int | None = None
    max_tiles: int | None = None


def _pool(side: int) -> Arm:
    return Arm({"projector_type": "pool", "pixel_shuffle_factor": side, "image_begin": "", "image_end": ""})


# Of a nano encoder: 4 x 4 patches, three layers. The first arm is the baseline.
ARMS = {
    "mlp": Arm(),
    "pool, 1 x 1": _pool(1),
    "pool, 2 x 2": _pool(2),
    "pool, 4 x 4": _pool(4),
    "pixel shuffle, 2 x 2": Arm({"pixel_shuffle_factor": 2}),
    "pixel shuffle, 4 x 4": Arm({"pixel_shuffle_factor": 4}),
    **{f"merged to {count}": Arm({"merge_image_tokens": count}) for count in (12, 8, 4)},
    **{f"merged to {count} at inference": Arm(trained="mlp", merged=count) for count in (12, 8, 4)},
    "layers -3, -1": Arm({"vision_feature_layer": [-3, -1]}),
    "layers -3, -2, -1": Arm({"vision_feature_layer": [-3, -2, -1]}),
    "layers -3, -1, added up": Arm({"vision_feature_layer": [-3, -1], "vision_layer_fusion": "weighted_sum"}),
    "calibrated layers": Arm({"modality_calibration": True}),
    # Tiles are arms of benchmarks/tiles.py: these scenes are no larger than a tile.
}


class Frontier(Scenes):
    """Drawn scenes and nano backbones, assembled as each arm asks."""

    sizes = (1536, 1536, 4000)  # scenes of stages 1, 2 and 3
    results, task, batch_size = "tokens", "scenes", 250
    turns, in_process = TURNS, False
    metrics = METRICS

    def start(self, seed: int, name: str, arm: Arm) -> Path:
        """The checkpoint with the arm's untrained projector; makes backbones and held-out scenes of the seed if they are missing."""
        plain = self.assembled(seed)
        return self.assemble_arm(seed, name, arm, plain.parent / "backbones") if arm.assembly else plain

    def assemble_arm(self, seed: int, name: str, arm: Arm, backbones: Path) -> Path:
        folder = self.output / f"seed{seed}" / folder_name(name) / "stage0"
        if not (folder / RUN_RECORD).is_file():
            vision, language = (str(backbones / part) for part in ("vision", "language"))
            assemble(BackboneArguments(vision, language, str(folder), seed=seed, **arm.assembly))
        return folder

    def options(self, seed: int) -> list[str]:
        """The options of the evaluation."""
        data = self.output / f"seed{seed}"
        return ["--task", self.task, "--data", str(data), "--batch_size", str(self.batch_size)]

    def held_out(self, seed: int) -> Dataset | list[dict]:
        """The records whose answering is timed."""
        return scenes.make_scenes(ANSWERED, "test", seed=seed, annotations=("questions",))

    def values(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The values of an evaluation's metrics, the shown one first."""
        return {"accuracy": metrics["pathvqa_accuracy"]["accuracy"], "CIDEr": metrics["cider"]["cider"]}


def folder_name(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def run_arm(world: Frontier, name: str, seed: int, arms: dict[str, Arm]) -> dict[str, Any]:
    """Runs an arm's stages and its evaluation; returns its tokens per image and its values."""
    arm, folder = arms[name], world.output / f"seed{seed}" / folder_name(name)
    trained = folder if arm.trained is None else world.output / f"seed{seed}" / folder_name(arm.trained)
    start = world.start(seed, arm.trained or name, arms[arm.trained or name])
    seconds = 0.0
    changes_of_arm = arms[arm.trained or name].stage
    for number, changes in world.stages(*world.sizes, **changes_of_arm):
        values = stage_values(world.recipe, number, start, trained / f"stage{number}", seed=seed, **changes)
        entry = train(values, world.in_process)
        seconds += entry["seconds"]
        start = trained / f"stage{number}"
    options = [] if arm.merged is None else ["--merge_image_tokens", str(arm.merged)]
    options += [] if arm.max_tiles is None else ["--max_tiles", str(arm.max_tiles)]
    found = evaluate(start, [*options, *world.options(seed), "--bootstrap_samples", "10"], folder / "results")
    values = world.values(found["metrics"])
    if "loss" in world.metrics and arm.trained is None:
        values["loss"] = entry["eval_loss_after"]
    cost = costs(start, arm, world.held_out(seed), world.turns, folder / "costs.json")
    tokens = cost.pop("tokens")
    return {"tokens": tokens, "values": {**values, "training_seconds": seconds, **cost}}


def costs(checkpoint: Path, arm: Arm, rows: Dataset | list[dict], turns: int, file: Path) -> dict[str, float]:
    """Returns the tokens of an image, the mean over the images of `rows`, and what they cost: pixels encoded of
    an image, seconds of answering, the median of some turns, and megabytes of a step. Keeps it in a file."""
    if file.is_file():
        return json.loads(file.read_text())
    model, processor, _ = load_checkpoint(
        str(checkpoint), torch.device("cpu"), dtype="fp32", attn_implementation="eager", merge_image_tokens=arm.merged
    )
    if arm.max_tiles is not None:
        set_max_tiles(model.config, processor, arm.max_tiles)
    records = [Record.from_row(row) for row in rows]
    images = [[read_image(image) for image in record.images] for record in records]
    prompts = [[conversation.messages for conversation in record.conversations] for record in records]
    encoder, seconds = Encoder(processor), []
    for _ in range(turns):
        begun = time.perf_counter()
        answer(model, processor, images, prompts, max_new_tokens=8)
        seconds.append(time.perf_counter() - begun)
    records_of_step = [rows[i] for i in range(min(STEP_RECORDS, len(rows)))]
    batch = AlignVLMCollator(processor, model.config.attention_mask_type)(records_of_step)
    cost = {
        "tokens": mean(len(encoder.image_tokens(grid)) for grid in grids_of(processor, [each for (each,) in images])),
        **({"answering_seconds": median(seconds)} if turns else {}),
        "kilopixels": batch["pixel_values"][:, 0].numel() / len(records_of_step) / 1000,
        "step_mb": kept_bytes(model, batch) / 1e6,
    }
    write_json(file, cost)
    return cost


def kept_bytes(model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """Counts the bytes that a step of stage 3 keeps for its backward pass, but for weights and the head; each storage once."""
    freeze_all_but(model, {"projector": 1.0, "language": 1.0})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its graph for ever

    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model.train().model(**inputs, use_cache=False)  # holds what is kept until it is counted
    found = sum(kept.values())
    del outputs
    return found


def table(found: dict[str, Any], metrics: dict[str, str] = METRICS) -> str:
    """The arms as Markdown, with the paired difference of the first metric to the first arm.

    Args:
        metrics: the columns, with their heads.
    """
    shown, *_ = metrics
    lines = [f"| arm | tokens | {' | '.join(metrics.values())} | {metrics[shown]}, difference | 95% interval |", "|---" * (len(metrics) + 4) + "|"]  # fmt: skip
    for name, values in found["summary"].items():
        means = [f"{values[metric]['mean']:.{DIGITS.get(metric, 3)}f}" for metric in metrics]
        difference = f"{values[shown]['difference']:+.3f}" if "difference" in values[shown] else ""
        interval = "{:+.3f} to {:+.3f}".format(*values[shown]["interval"]) if values[shown].get("interval") else ""
        lines.append(f"| {name} | {found['tokens'][name]} | {' | '.join(means)} | {difference} | {interval} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path, metrics: dict[str, str] = METRICS) -> None:
    """Draws the first metric against tokens per image: a mark for each arm, its seeds as small ones."""
    from matplotlib import pyplot

    shown, *_ = metrics
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (name, values) in enumerate(found["summary"].items()):
        tokens, accuracy = found["tokens"][name], values[shown]
        (line,) = axes.plot([tokens], [accuracy["mean"]], "os^Dv"[index % 5], markersize=7, label=name)
        axes.plot([tokens] * len(accuracy["values"]), accuracy["values"], ".", markersize=3, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("image tokens per image")
    axes.set_ylabel(metrics[shown])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def run(world: Frontier, arms: dict[str, Arm], seeds: int, results: Path) -> dict[str, Any]:
    """Runs the arms seed by seed, and writes what is known after each."""
    runs: dict[str, dict[int, dict]] = {}
    found: dict[str, Any] = {}
    for seed in range(seeds):
        for name in arms:
            runs.setdefault(name, {})[seed] = run_arm(world, name, seed, arms)
            tokens = {arm: round(mean(each["tokens"] for each in of_seeds.values())) for arm, of_seeds in runs.items()}
            found = {"machine": machine(), "tokens": tokens, "summary": summarise(runs), "runs": runs}
            update_results(results, world.results, found)
    return found


def run_from_command_line(
    world: type[Frontier], arms: dict[str, Arm], description: str, parser: argparse.ArgumentParser | None = None
) -> None:
    """Runs the arms that the command line asks for, prints their table and draws their plot.

    Args:
        parser: may know options of the world, and set another as `world`.
    """
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.add_argument("--only", nargs="+", choices=arms, default=list(arms), help="These arms alone.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Default: out/ and what is measured.")
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    arguments = parser.parse_args()
    world = getattr(arguments, "world", world)
    missing = {arms[name].trained for name in arguments.only} - {None, *arguments.only}
    if missing:
        parser.error(f"--only: arms at inference evaluate the arm {', '.join(missing)}: name it, too.")
    output = (arguments.output or Path("out") / world.results).resolve()
    chosen = {name: arm for name, arm in arms.items() if name in arguments.only}
    found = run(world(output, arguments), chosen, arguments.seeds, arguments.results or output / "results.json")
    picture = output / f"{world.results}.png"
    draw(found, picture, world.metrics)
    print(f"\n{table(found, world.metrics)}\n\n{picture}")


if __name__ == "__main__":
    run_from_command_line(Frontier, ARMS, __doc__.split("\n")[0])
