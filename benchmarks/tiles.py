"""What tiles bring and cost where there is something small to read: drawn scenes of signs, accuracy against image tokens per image.

    python benchmarks/tiles.py --seeds 3                                        # every arm
    python benchmarks/tiles.py --only "whole, 64 pixels" "6 tiles"              # some arms
    python docs/write_results_page.py                                           # the table and the plot of docs/tiles.md, from docs/results.json

The arms are ways of showing images larger than the encoder's input: squashed into one square, of a tile's size or twice that, or cut into
at most 2, 4 or 6 tiles. All start from one checkpoint that has learned to read signs in single views of 64 pixels, squashed scenes and tiles
alike (`benchmarks/sign_backbones.py`). Each trains a short third stage of the recipe (projector and language model) on complete scenes, shown its way, and is
asked about held-out ones. A seed sets the order of the training scenes and which scenes are held out; it does not vary the checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/tiles.py`

from alignvlm.data import signs
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.encoder_measure import measure_encoder, set_image_size
from benchmarks import tokens
from benchmarks.findings import UNMEASURED
from benchmarks.sign_backbones import SIDE, train_sign_backbones, view_records
from benchmarks.stage_runs import stage_values, train
from benchmarks.tokens import Arm, Frontier, run_from_command_line
from hub_upload.run_record import RUN_RECORD, read_run_record


METRICS = {
    "reading": "reading",
    "numbers": "numbers",
    "words": "words",
    "finding": "finding",
    "counting": "counting",
    "kilopixels": "thousand pixels encoded",
    "step_mb": "step, MB",
}
HELD_OUT = 100


def _tiles(most: int, **changes: Any) -> Arm:
    return Arm(stage={"max_tiles": most, **changes})


# An image, or a tile of it, of 64 pixels takes 16 tokens: 8 x 8 features, pixel shuffle 2. The first arm is the baseline.
ARMS = {
    "whole, 64 pixels": Arm(),
    "whole, 128 pixels": Arm({"image_size": 2 * SIDE}),
    "6 tiles": _tiles(6),
    "6 tiles, the overview alone": Arm(trained="6 tiles", max_tiles=1),
    "6 tiles, merged to 4": _tiles(6, merge_image_tokens=4),
    "4 tiles": _tiles(4),
    "2 tiles": _tiles(2),
    "6 tiles, marks": _tiles(6, tile_marks=True),
    "6 tiles, image_block: tile": _tiles(6, image_block="tile"),
}


class Signs(Frontier):
    """Drawn scenes of signs, and a checkpoint that can read them in single views."""

    sizes = (640,)
    results, task, batch_size = "tiles", "scene_signs", 50
    turns, in_process = 0, True
    metrics = METRICS
    backbone_sizes = {"scene_count": 2000, "vision_steps": 700, "language_steps": 150}
    view_count = 4800

    def start(self, seed: int, name: str, arm: Arm) -> Path:
        held_out = self.output / f"seed{seed}/test.parquet"
        if not held_out.is_file():
            held_out.parent.mkdir(parents=True, exist_ok=True)
            signs.make_signs(HELD_OUT, "test", seed, SIDE).to_parquet(held_out)
        return self.with_image_size(**arm.assembly) if arm.assembly else self.reading()

    def reading(self) -> Path:
        """The checkpoint of all arms: backbones trained on signs, joined by a stage on single views."""
        backbones, base = self.output / "backbones", self.output / "base"
        if not (backbones / "language").is_dir():
            train_sign_backbones(backbones, 0, **self.backbone_sizes)
        if not (base / RUN_RECORD).is_file():
            vision, language = (str(backbones / part) for part in ("vision", "language"))
            assemble(BackboneArguments(vision, language, str(base), pixel_shuffle_factor=2))
            view_records(self.view_count, 0).to_parquet(self.output / "views.parquet")
        changes = {
            **UNMEASURED,
            "data_dir": str(self.output),
            "sources": [{"data": "views.parquet"}],
            "logging_steps": 10,
        }
        train(stage_values(self.recipe, 3, base, self.output / "reading", **changes), self.in_process)
        return self.output / "reading"

    def with_image_size(self, image_size: int) -> Path:
        """The same checkpoint for images squashed into a square of another size, which a ResNet takes as it is."""
        folder = self.output / f"reading{image_size}"
        if not (folder / RUN_RECORD).is_file():
            model, processor, _ = load_checkpoint(str(self.reading()), torch.device("cpu"), dtype="fp32")
            set_image_size(processor.image_processor, image_size)
            measure = measure_encoder("ResNet", model.model.vision_tower, processor.image_processor)
            model.config.image_size, model.config.image_grid = list(measure.input_size), list(measure.grid)
            processor.image_seq_length = model.config.image_seq_length
            save_checkpoint(model, processor, folder, read_run_record(self.reading()))
        return folder

    def stages(self, count: int, **changes: Any) -> list[tuple[int, dict]]:
        source = {"name": "scene_signs", "count": count, "seed": 1, "image_size": SIDE}
        return [
            (3, {**UNMEASURED, "sources": [source], "per_device_train_batch_size": 16, "logging_steps": 10, **changes})
        ]

    def held_out(self, seed: int) -> Dataset:
        return signs.make_signs(tokens.ANSWERED, "test", seed, SIDE)

    def values(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Shares of right answers to what a sign says (`reading`; of it `numbers` and `words`), which sign says it, and how many there are."""
        kinds = metrics["pathvqa_accuracy"]["by_kind"]
        names = {"numbers": "read_number", "words": "read_word", "finding": "find", "counting": "count"}
        of_kind = {name: kinds[kind]["accuracy"] for name, kind in names.items()}
        asked = {name: kinds[kind]["count"] for name, kind in names.items()}
        right = sum(of_kind[name] * asked[name] for name in ("numbers", "words"))
        return {"reading": right / (asked["numbers"] + asked["words"]), **of_kind}


if __name__ == "__main__":
    run_from_command_line(Signs, ARMS, __doc__.split("\n")[0])
