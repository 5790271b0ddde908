"""How many steps of stage 1 a start of the projector saves: steps to a given training loss, beside those of a new projector.

    make quickstart
    python benchmarks/projector_start.py out/quickstart [--output_dir out/projector_start] [--seeds 0 1 2] [--max_steps N]

The starts: `least squares` (`projector_start: least_squares`), and what `--projector` makes of a projector that stage 1 has trained with
another language model: a `version` of this one (the same first weights, trained half as long again), or `another`, of the same width and
other first weights. Stage 1 of the recipe `nano`, by its script, on the quickstart's backbones; a seed is another order of the records. The
given losses are those that the new projector has after a quarter, half and all of its steps, each the mean of five steps. An unfinished
measurement goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/projector_start.py`

from alignvlm.quickstart.nano import train_language_model
from alignvlm.quickstart.quickstart import QuickstartArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from benchmarks.stage_runs import ROOT, machine, stage_values, train, update_results
from hub_upload.run_record import RUN_RECORD


WINDOW = 5
PARTS = (0.25, 0.5, 1.0)


def smooth(losses: list[float]) -> list[float]:
    """The mean of the last `WINDOW` losses at each step (of fewer at the first ones)."""
    return [sum(losses[max(0, end - WINDOW) : end]) / min(end, WINDOW) for end in range(1, len(losses) + 1)]


def steps_to(losses: list[float], target: float) -> int | None:
    """The first step at which the smooth loss is at most `target`; None if it never is."""
    return next((step for step, loss in enumerate(smooth(losses), 1) if loss <= target), None)


def compare(runs: dict[str, dict]) -> list[dict]:
    """For each given loss the steps that the runs, entries of run records by their start, need; the first is that of the new projector."""
    new, *_ = (run["logged_losses"] for run in runs.values())
    targets = [smooth(new)[max(0, round(part * len(new)) - 1)] for part in PARTS]
    return [
        {"loss": target, "steps": {start: steps_to(run["logged_losses"], target) for start, run in runs.items()}}
        for target in targets
    ]


def trained_elsewhere(backbones: Path, language: Path, output: Path) -> Path:
    """Trains a projector in stage 1 with another language model; returns that checkpoint."""
    start = output / "stage0"
    if not (start / RUN_RECORD).is_file():
        assemble(BackboneArguments(str(backbones / "vision"), str(language), str(start)))
    train(stage_values(ROOT / "training/recipes/nano", 1, start, output / "stage1", report=False))
    return output / "stage1"


def starts_of(quickstart: Path, output: Path) -> dict[str, Path]:
    """The checkpoints of stage 0 by the start of their projector; makes what is missing."""
    steps, backbones = QuickstartArguments.language_steps, quickstart / "backbones"
    starts = {"new": quickstart / "stage0", "least squares": quickstart / "stage0"}
    for name, seed, more in (("version", 0, steps // 2), ("another", 100, 0)):
        language, start = output / name / "language", output / name / "start"
        if not (language / "README.md").is_file():  # written last
            train_language_model(language, seed, steps + more)
        if not (start / RUN_RECORD).is_file():
            given = {"projector": str(trained_elsewhere(backbones, language, output / name)), "output_dir": str(start)}
            assemble(BackboneArguments(str(backbones / "vision"), str(backbones / "language"), **given))
        starts[name] = start
    return starts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="What `make quickstart` wrote.")
    parser.add_argument("--output_dir", type=Path, default=Path("out/projector_start"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, help="For a trial.")
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    options = parser.parse_args(argv)
    starts = starts_of(options.quickstart, options.output_dir)
    results = []
    for seed in options.seeds:
        runs = {}
        for name, start in starts.items():
            changes = {"seed": seed, "logging_steps": 1, "max_steps": options.max_steps}
            changes["projector_start"] = "least_squares" if name == "least squares" else None
            folder = options.output_dir / f"seed{seed}" / name.replace(" ", "_")
            values = stage_values(ROOT / "training/recipes/nano", 1, start, folder, report=False, **changes)
            runs[name] = train(values)
        losses = {name: [run["eval_loss_before"], run["eval_loss_after"]] for name, run in runs.items()}
        seconds = runs["least squares"]["projector_start"]["seconds"]
        results.append({"seed": seed, "targets": compare(runs), "held_out": losses, "least_squares_seconds": seconds})
    file = options.results or options.output_dir / "results.json"
    update_results(file, "projector_start", {"machine": machine(), "runs": results})
    print(table(results))


def table(results: list[dict]) -> str:
    """The starts as Markdown: the steps of each seed to each given loss, and the mean loss of held-out captions before and after."""
    parts = " | ".join(f"steps to the loss after {part:.0%}" for part in PARTS)
    lines = [f"| start | {parts} | held-out loss before | after |", "|---" * (len(PARTS) + 3) + "|"]
    for start in results[0]["held_out"]:
        steps = [
            ", ".join(str(result["targets"][part]["steps"][start] or "-") for result in results)
            for part in range(len(PARTS))
        ]
        before, after = (mean(result["held_out"][start][moment] for result in results) for moment in (0, 1))
        lines.append(f"| {start} | {' | '.join(steps)} | {before:.3f} | {after:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
