"""The best of the frontier of image tokens on real photos: loss and CIDEr of captions against tokens per image.

    python benchmarks/tokens_photos.py --photos FOLDER --language SMOLLM2 --vision MOBILENET --seeds 3    # hours
    python benchmarks/tokens_photos.py --photos FOLDER --language STORIES260K --vision MOBILENET --small
    python docs/write_results_page.py                                      # the tables of docs/performance.md, from docs/results.json

The arms are those of `benchmarks/tokens.py` that kept the most with the fewest tokens on drawn scenes, for MobileNetV2 before SmolLM2-135M:
7 x 7 features of 224 pixels are merged by likeness, 8 x 8 features of 256 pixels averaged or stacked in squares of 2 x 2. Each trains stages 1 and 3 of
the recipe `smollm2_mobilenet` on 320 and 480 photos, each once, and captions 300 others; with `--small`, on 500 and 2,500 before a language model of some hundred thousand parameters. FOLDER is laid out as `benchmarks/real_photos.py`
says. A seed sets the projector's first weights and the order of the photos. What is there is not done again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/tokens_photos.py`

from alignvlm.data.sources import read_source
from alignvlm.stages.backbones import BackboneArguments, assemble
from benchmarks.findings import Photos, SmallPhotos
from benchmarks.tokens import Arm, Frontier, folder_name, run_from_command_line
from hub_upload.run_record import RUN_RECORD


METRICS = {"loss": "loss", "CIDEr": "CIDEr", "training_seconds": "training, s", "answering_seconds": "answering, s", "step_mb": "step, MB"}  # fmt: skip
TIMED = 32  # photos

# The first arm is the baseline.
ARMS = {
    "mlp, 224 pixels": Arm(),
    "merged to 12": Arm({"merge_image_tokens": 12}),
    "pool, 2 x 2, 256 pixels": Arm(
        {
            "projector_type": "pool",
            "pixel_shuffle_factor": 2,
            "image_size": 256,
            "image_begin": "",
            "image_end": "",
        }
    ),
    "pixel shuffle, 2 x 2, 256 pixels": Arm({"pixel_shuffle_factor": 2, "image_size": 256}),
}


class FrontierOnPhotos(Photos, Frontier):
    """Photos of Flickr8k, MobileNetV2 and SmolLM2-135M, assembled as each arm asks."""

    results = "tokens_photos"
    turns = 1
    metrics = METRICS

    def start(self, seed: int, name: str, arm: Arm) -> Path:
        folder = self.output / f"seed{seed}" / folder_name(name) / "stage0"
        if not (folder / RUN_RECORD).is_file():
            assemble(BackboneArguments(*self.backbones, str(folder), seed=seed, **arm.assembly))
        return folder

    def stages(self, first: int, second: int, third: int, **changes: Any) -> list[tuple[int, dict]]:
        return self.divided(first, second, third, **changes)

    def options(self, seed: int) -> list[str]:
        return self.options_of("captions")

    def held_out(self, seed: int) -> list[dict]:
        source = read_source(self.captions("test", limit=TIMED), self.output / "data")
        return [source[number] for number in range(len(source))]

    def values(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {"CIDEr": metrics["cider"]["cider"]}


class FrontierOnSmallPhotos(SmallPhotos, FrontierOnPhotos):
    """The same before a language model of some hundred thousand parameters, on more photos."""

    results = "tokens_small_photos"


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument(
        "--photos", required=True, help="A folder of photos and questions: see benchmarks/real_photos.py."
    )
    options.add_argument("--language", required=True, help="SmolLM2-135M-Instruct: a folder or Hub repository.")
    options.add_argument("--vision", required=True, help="MobileNetV2: a folder or Hub repository.")
    options.add_argument("--small", dest="world", action="store_const", const=FrontierOnSmallPhotos, default=FrontierOnPhotos, help="The language model has some hundred thousand parameters: take more photos.")  # fmt: skip
    run_from_command_line(FrontierOnPhotos, ARMS, __doc__.split("\n")[0], options)
