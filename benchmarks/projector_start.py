"""How many steps of stage 1 `projector_start: least_squares` saves: steps to a given training loss, with and without it.

    make quickstart
    python benchmarks/projector_start.py out/quickstart/stage0 --output_dir out/projector_start [--seeds 0 1 2] [--max_steps N]

Stage 1 of the recipe `nano`, by its script, from one checkpoint of stage 0; a seed is another order of the records. The given losses are
those that the run without the option has after a quarter, half and all of its steps, each the mean of five steps. An unfinished
measurement goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/projector_start.py`

from benchmarks.stage_runs import ROOT, machine, stage_values, train
from hub_upload.run_record import write_json


WINDOW = 5
PARTS = (0.25, 0.5, 1.0)


def smooth(losses: list[float]) -> list[float]:
    """The mean of the last `WINDOW` losses at each step (of fewer at the first ones)."""
    return [sum(losses[max(0, end - WINDOW) : end]) / min(end, WINDOW) for end in range(1, len(losses) + 1)]


def steps_to(losses: list[float], target: float) -> int | None:
    """The first step at which the smooth loss is at most `target`; None if it never is."""
    return next((step for step, loss in enumerate(smooth(losses), 1) if loss <= target), None)


def compare(plain: dict, started: dict) -> list[dict]:
    """For each given loss the steps that the two runs, entries of run records, need."""
    rows = []
    for part in PARTS:
        target = smooth(plain["logged_losses"])[max(0, round(part * len(plain["logged_losses"])) - 1)]
        rows.append(
            {
                "loss": target,
                "without": steps_to(plain["logged_losses"], target),
                "with": steps_to(started["logged_losses"], target),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage0", type=Path, help="A nano checkpoint of stage 0, as the quickstart writes it.")
    parser.add_argument("--output_dir", type=Path, default=Path("out/projector_start"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, help="For a trial.")
    options = parser.parse_args(argv)
    results = []
    print("| seed | loss | steps without | steps with | seconds of the start |\n|---|---|---|---|---|")
    for seed in options.seeds:
        runs = {}
        for name, start in (("without", None), ("with", "least_squares")):
            changes = {"seed": seed, "logging_steps": 1, "projector_start": start, "max_steps": options.max_steps}
            folder = options.output_dir / f"{name}-{seed}"
            values = stage_values(ROOT / "training/recipes/nano", 1, options.stage0, folder, report=False, **changes)
            runs[name] = train(values)
        rows = compare(runs["without"], runs["with"])
        seconds = runs["with"]["projector_start"]["seconds"]
        before = {name: run["eval_loss_before"] for name, run in runs.items()}
        results.append({"seed": seed, "targets": rows, "start_seconds": seconds, "eval_loss_before": before})
        for row in rows:
            print(f"| {seed} | {row['loss']:.3f} | {row['without']} | {row['with'] or '-'} | {seconds} |", flush=True)
    write_json(options.output_dir / "projector_start.json", {"machine": machine(), "runs": results})


if __name__ == "__main__":
    main()
