"""What tiles bring for real photos that squashing hurts: loss and CIDEr of captions of one half of a wide image, against tokens per image.

    python benchmarks/wide_photos.py --photos FOLDER --language STORIES260K --vision MOBILENET --seeds 3
    python docs/write_results_page.py                      # the table of docs/tiles.md, from docs/results.json

An image is two photos of Flickr8k side by side, 288 x 144 pixels: nothing is drawn, and squashed into a square each photo has half its width. The
model is asked for a caption of the left photo and for one of the right photo. The arms show it: squashed into 144 x 144 pixels, or into 288 x 288,
where no pixel is lost but each photo is twice as tall as wide; or as an overview and two tiles of 144 x 144, each of 5 x 5 features or of those merged to 9.
Each arm trains stages 1 and 3 of the recipe `smollm2_mobilenet` on 240 and 1,200 pairs, each once and with two captions of each photo, before a language
model of some hundred thousand parameters, and is asked about 150 pairs of others, with all five as references. FOLDER is laid out as `benchmarks/real_photos.py` says. A seed sets the projector's first
weights and the order of the pairs. What is there is not done again.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/wide_photos.py`

from alignvlm.data.record import Record, one_turn
from alignvlm.data.scenes import RECORD_FEATURES
from alignvlm.data.sources import read_source
from benchmarks.tokens import Arm, run_from_command_line
from benchmarks.tokens_photos import FrontierOnSmallPhotos


SIDE = 144  # pixels of a photo's side, and of a tile's
SIDES = ("left", "right")
CAPTIONS = 2  # of a photo's five, which train
METRICS = {"loss": "loss", "CIDEr": "CIDEr", "kilopixels": "thousand pixels encoded", "step_mb": "step, MB"}

# The first arm is the baseline.
ARMS = {
    "squashed, 144 pixels": Arm({"image_size": SIDE}),
    "squashed, 288 pixels": Arm({"image_size": 2 * SIDE}),
    "2 tiles": Arm({"image_size": SIDE, "max_tiles": 2}),
    "2 tiles, merged to 9": Arm({"image_size": SIDE, "max_tiles": 2, "merge_image_tokens": 9}),
}


def pair(rows: list[dict[str, Any]], photos: Path) -> Record:
    """Makes the record of two photos side by side, with the captions of each.

    Args:
        rows: two rows with `image`, a path in the folder `photos`, and `captions`.
    """
    wide = Image.new("RGB", (2 * SIDE, SIDE))
    for place, row in enumerate(rows):
        photo = (
            Image.open(photos / row["image"]).convert("RGB").resize((SIDE, SIDE))
        )  # which they have: nothing is resampled
        wide.paste(photo, (place * SIDE, 0))
    file = io.BytesIO()
    wide.save(file, "PNG")
    asked = [
        one_turn(f"Write a short caption of the {side} photo.", row["captions"], 1, "short_caption")
        for side, row in zip(SIDES, rows)
    ]
    return Record([{"bytes": file.getvalue()}], asked)


class WidePhotos(FrontierOnSmallPhotos):
    """Pairs of photos of Flickr8k side by side, MobileNetV2 and a language model of some hundred thousand parameters."""

    sizes = (240, 0, 1200)  # pairs of stages 1, 2 and 3
    results = "wide_photos"
    turns = 0
    metrics = METRICS

    def pairs(self, file: str, first: int, last: int) -> str:
        """Pairs of these positions, of the photos of a file: the name of theirs, written if it is missing."""
        data = self.output / "data"
        name = f"pairs-{file}-{first}-{last}.parquet"
        if not (data / name).is_file():
            rows = [json.loads(line) for line in (data / f"{file}.jsonl").read_text().splitlines()]
            if file == "train":
                rows = [{**row, "captions": row["captions"][:CAPTIONS]} for row in rows]
            chosen = [rows[2 * number : 2 * number + 2] for number in range(first, last)]
            records = [pair(two, data / "flickr8k").to_row() for two in chosen]
            Dataset.from_list(records, features=RECORD_FEATURES).to_parquet(data / name)
        return name

    def held_out_pairs(self) -> dict[str, str]:
        return {"data": self.pairs("test", 0, self.HELD_OUT // 2)}

    def fields(self, number: int) -> dict:
        """The encoder's features are not kept: of tiles they cannot be."""
        return {
            name: value
            for name, value in super().fields(number).items()
            if name not in ("cache_features", "features_dir")
        }

    def stages(self, first: int, second: int, third: int, **changes: Any) -> list[tuple[int, dict]]:
        ends = (0, first, first + third)
        sources = [{"data": self.pairs("train", *ends[i : i + 2])} for i in (0, 1)]
        held_out = {"eval_sources": [self.held_out_pairs()]}
        return [self.stage(1, sources[0], **changes), self.stage(3, sources[1], **held_out, **changes)]

    def options(self, seed: int) -> list[str]:
        data = self.output / "data" / self.held_out_pairs()["data"]
        return [
            "--task",
            "local",
            "--batch_size",
            "32",
            "--data",
            str(data),
            "--max_new_tokens",
            str(self.caption_tokens),
        ]

    def held_out(self, seed: int) -> list[dict]:
        source = read_source(self.held_out_pairs(), self.output / "data")
        return [source[number] for number in range(len(source))]


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument(
        "--photos", required=True, help="A folder of photos and questions: see benchmarks/real_photos.py."
    )
    options.add_argument("--language", required=True, help="stories260K: a folder or Hub repository.")
    options.add_argument("--vision", required=True, help="MobileNetV2: a folder or Hub repository.")
    run_from_command_line(WidePhotos, ARMS, __doc__.split("\n")[0], options)
