"""What options of alignment bring and cost on drawn scenes: several mask types in one training, `embedding_loss`, `projector_start`.

    python benchmarks/alignment_options.py --seeds 3                          # an hour of one core
    python benchmarks/alignment_options.py --seeds 3 --output out/findings  # goes on from what benchmarks/findings.py trained there

The arms go through stages 1 to 3 as the arms of the finding about masks in `benchmarks/findings.py` do, and two of them are those: all steps
under `image`, or under `causal`. The others draw each step's mask type, half `image` and half `causal`; add `embedding_loss: 0.1` to all stages; or begin
stage 1 with `projector_start: least_squares`. Every checkpoint answers the questions about held-out scenes under both masks. A seed is as there.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/alignment_options.py`

from benchmarks.findings import Finding, Scenes, run_arm, summarise
from benchmarks.stage_runs import machine, update_results
from hub_upload.run_record import write_json


ASKED = ("image", "causal")
SIZES = (1536, 1536, 4000)  # scenes of stages 1, 2 and 3


def findings_of(world: Scenes, seed: int) -> dict[str, tuple[str, Finding]]:
    """The arms, each with the name of its folder and the finding that it is an arm of; the first is the baseline."""
    masks = world.findings(seed)["masks"]
    options = {
        "image and causal": {"attention_mask_type": json.dumps({"image": 0.5, "causal": 0.5})},
        "embedding_loss": {"embedding_loss": 0.1},
    }
    arms = {arm: world.stages(*SIZES, **changes) for arm, changes in options.items()}
    (_, first), *later = world.stages(*SIZES)
    arms["least squares"] = [(1, {**first, "projector_start": "least_squares"}), *later]
    own = Finding(arms, masks.tasks)
    return {"image": ("masks", masks), "causal": ("masks", masks)} | dict.fromkeys(arms, ("options", own))


def under(mask: str, checkpoint: Path, folder: Path) -> Path:
    """A checkpoint with another mask type, as a folder of links and a configuration of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(folder / "config.json", {**config, "attention_mask_type": mask})
    return folder


def values_of(world: Scenes, name: str, finding: Finding, arm: str, seed: int) -> dict[str, float]:
    """Runs an arm and asks its checkpoint under both masks; accuracy and CIDEr."""
    run_arm(world, name, finding, arm, seed)
    folder = world.output / f"seed{seed}" / name / arm.replace(" ", "_")
    values = {}
    for mask in ASKED:
        checkpoint = under(mask, folder / "stage3", folder / f"under_{mask}")
        found = world.evaluate("scenes", seed, checkpoint, folder / f"asked_under_{mask}")
        values[f"accuracy under {mask}"] = found["accuracy"]
        values[f"CIDEr under {mask}"] = found["CIDEr"]
    return values


def table(summary: dict) -> str:
    """The means of all seeds as Markdown, with the paired differences to the first arm and their 95% intervals."""
    metrics = list(next(iter(summary.values())))
    lines = [f"| training | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for arm, values in summary.items():
        cells = []
        for value in (values[metric] for metric in metrics):
            cells.append(f"{value['mean']:.3f}")
            if value.get("interval"):
                low, high = value["interval"]
                cells[-1] += f" ({value['difference']:+.3f}: {low:+.3f} to {high:+.3f})"
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("out/alignment_options"))
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    arguments = parser.parse_args()
    world = Scenes(arguments.output.resolve() / "scenes")
    runs: dict[str, dict[int, dict]] = {}
    found = {}
    for seed in range(arguments.seeds):
        for arm, (name, finding) in findings_of(world, seed).items():
            runs.setdefault(arm, {})[seed] = {"values": values_of(world, name, finding, arm, seed)}
            found = {"machine": machine(), "summary": summarise(runs), "runs": runs}
            update_results(arguments.results or arguments.output / "results.json", "options", found)
    print(table(found["summary"]))


if __name__ == "__main__":
    main()
