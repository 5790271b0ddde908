"""What tiles bring and cost where there is something small to read: drawn scenes of signs, accuracy against image tokens per image.

    python benchmarks/tiles.py --seeds 3                                        # every arm
    python benchmarks/tiles.py --only "whole, 64 pixels" "6 tiles"              # some arms
    python docs/write_results_page.py                                           # the table and the plot of docs/tiles.md, from docs/results.json

The arms are those of `benchmarks/tokens.py` for images larger than the encoder's input: an image squashed into one square, with few or many
tokens and of a tile's or twice its size, or cut into at most 2, 4 or 6 tiles. Backbones that have learned to read
(`benchmarks/sign_backbones.py`) are the same for all arms and seeds. A seed sets the projector's first weights, the order of the
training scenes and which scenes are held out. Each arm trains one stage, the recipe's third (projector and language model), on questions about signs.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/tiles.py`

from alignvlm.data import signs
from benchmarks import tokens
from benchmarks.findings import UNMEASURED
from benchmarks.sign_backbones import SIDE, train_sign_backbones
from benchmarks.tokens import Arm, Frontier, run_from_command_line


METRICS = {
    "reading": "reading",
    "finding": "finding",
    "counting": "counting",
    "kilopixels": "thousand pixels encoded",
    "step_mb": "step, MB",
}
HELD_OUT = 250


def _tiles(most: int, **assembly: Any) -> Arm:
    return Arm({"pixel_shuffle_factor": 2, "max_tiles": most, **assembly})


# The encoder makes 8 x 8 features of a tile. The first arm is the baseline.
ARMS = {
    "whole, 64 pixels": Arm({"pixel_shuffle_factor": 2}),
    "whole, 64 pixels, all features": Arm({"pixel_shuffle_factor": 1}),
    "whole, 128 pixels": Arm({"pixel_shuffle_factor": 2, "image_size": 2 * SIDE}),
    "whole, 128 pixels, pixel shuffle 4": Arm({"pixel_shuffle_factor": 4, "image_size": 2 * SIDE}),
    "2 tiles": _tiles(2),
    "4 tiles": _tiles(4),
    "6 tiles": _tiles(6),
    "6 tiles, marks": _tiles(6, tile_marks=True),
    "6 tiles, image_block: tile": _tiles(6, image_block="tile"),
    "6 tiles, pixel shuffle 4": _tiles(6, pixel_shuffle_factor=4),
    "6 tiles, the overview alone": Arm(trained="6 tiles", max_tiles=1),
}


class Signs(Frontier):
    """Drawn scenes of signs, and backbones that can read."""

    sizes = (1600,)
    results, task, batch_size = "tiles", "scene_signs", 125
    turns, in_process = 0, True
    metrics = METRICS
    backbone_sizes = {"scene_count": 2000, "vision_steps": 700, "language_steps": 150}

    def start(self, seed: int, name: str, arm: Arm) -> Path:
        backbones = self.output / "backbones"
        if not (backbones / "language").is_dir():
            train_sign_backbones(backbones, 0, **self.backbone_sizes)
        held_out = self.output / f"seed{seed}/test.parquet"
        if not held_out.is_file():
            signs.make_signs(HELD_OUT, "test", seed, SIDE).to_parquet(held_out)
        return self.assemble_arm(seed, name, arm, backbones)

    def stages(self, count: int, **changes: Any) -> list[tuple[int, dict]]:
        source = {"name": "scene_signs", "count": count, "seed": 1, "image_size": SIDE}
        return [
            (3, {**UNMEASURED, "sources": [source], "per_device_train_batch_size": 16, "logging_steps": 10, **changes})
        ]

    def held_out(self, seed: int) -> Dataset:
        return signs.make_signs(tokens.ANSWERED, "test", seed, SIDE)

    def values(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Shares of right answers to what a sign says, which sign says it, and how many signs there are."""
        of_kind = metrics["pathvqa_accuracy"]["by_kind"]
        read = [of_kind[kind] for kind in ("read_number", "read_word")]
        right = sum(found["accuracy"] * found["count"] for found in read) / sum(found["count"] for found in read)
        return {"reading": right, "finding": of_kind["find"]["accuracy"], "counting": of_kind["count"]["accuracy"]}


if __name__ == "__main__":
    run_from_command_line(Signs, ARMS, __doc__.split("\n")[0])
