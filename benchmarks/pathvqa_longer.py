"""PathVQA at greater length: stage 4 that passes over it several times, at a higher rate of the projector, and what its images then bring.

    python benchmarks/pathvqa_longer.py --data FOLDER --start out/findings/photos/seed0/downstream/from_stage_3/stage3

The recipe's stage 4 (`training/recipes/smollm2_mobilenet`) reads PathVQA once, beside records of stage 3. This one differs by the fields in
`CHANGES`. The checkpoint is asked about the held-out images, about other images and about grey ones. FOLDER is that of `real_photos.py`; START
is a checkpoint of stage 3, as `findings.py --only downstream` or `real_photos.py` leaves it. What is there is not done again: start the same
command to go on.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/pathvqa_longer.py`

from alignvlm.evaluation.judge import compare
from benchmarks.real_photos import CONTROLS, METRICS, RECIPE, numbers_of
from benchmarks.stage_runs import ROOT, evaluate, machine, prepare_photos, stage_values, train, update_results


CHANGES = {
    "num_train_epochs": 2,
    "projector_learning_rate": 1.0e-3,
    "vision_learning_rate": None,  # frozen, so that its features are kept
    "cache_features": True,
    "row_length": 512,  # four rows hold nine or ten images
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "sources": [{"data": "pathvqa/train.jsonl", "split": "train", "image_dir": "pathvqa"}],
    "eval_sources": None,
    "text_sources": None,
    "alignment_records": None,
    "seed": 0,
}


def measure(checkpoint: Path, data: Path, results: Path) -> dict:
    """Asks a checkpoint about the held-out images of PathVQA, about none (grey) and about others.

    Returns:
        `metrics`, the numbers by control (`image`: none), and `differences`, what the own image makes to each control, with intervals.
    """
    options = ["--task", "local", "--data", str(data / "dev.jsonl"), "--split", "dev", "--image_dir", str(data)]
    options += ["--max_new_tokens", "16", "--name", "pathvqa", "--batch_size", "32"]
    found = {
        name: evaluate(checkpoint, [*options, *([] if name == "image" else [f"--{name}"])], results / name)
        for name in ("image", *CONTROLS)
    }
    differences = {control: compare(found[control], found["image"]) for control in CONTROLS}
    return {
        "metrics": {name: numbers_of(result) for name, result in found.items()},
        "differences": {
            control: {number: gain for number, gain in gains.items() if number in METRICS}
            for control, gains in differences.items()
        },
    }


def table(found: dict) -> str:
    """The table of docs/results.md."""
    lines = [
        "| metric | value (95% interval) | grey image | another image | gain over a grey image | gain over another image |",
        "|---|---|---|---|---|---|",
    ]
    for name, number in found["metrics"]["image"].items():
        cells = [f"{number['value']:.3f} ({number['interval'][0]:.3f} to {number['interval'][1]:.3f})"]
        cells += [f"{found['metrics'][control][name]['value']:.3f}" for control in CONTROLS]
        for control in CONTROLS:
            gain = found["differences"][control][name]
            cells.append(f"{gain['difference']:+.3f} ({gain['interval'][0]:+.3f} to {gain['interval'][1]:+.3f})")
        lines.append(f"| {METRICS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--start", type=Path, required=True, help="A checkpoint of stage 3.")
    p.add_argument("--output", type=Path, default=Path("out/pathvqa_longer"))
    p.add_argument("--results", type=Path, default=ROOT / "docs/results.json", help="JSON file of the results.")
    arguments = p.parse_args()
    output = arguments.output.resolve()
    prepare_photos(arguments.data, output / "data")
    values = stage_values(
        RECIPE, 4, arguments.start, output / "stage4", data_dir=str(output / "data"), features_dir=str(output / "features"), **CHANGES
    )  # fmt: skip
    entry = train(values)
    found = {
        "machine": machine(),
        "stage": {name: entry[name] for name in ("records", "steps", "seconds", "train_loss", "precision")},
        **measure(output / "stage4", arguments.data / "pathvqa", output / "results"),
    }
    update_results(arguments.results, "pathvqa_longer", found)
    print(table(found))


if __name__ == "__main__":
    main()
