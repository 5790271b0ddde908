"""What squashing costs and native shapes keep: drawn scenes of many aspect ratios, whose questions are about proportions.

    python benchmarks/native_shapes.py --seeds 3
    python docs/write_results_page.py              # the table of docs/native_shapes.md, from docs/results.json

An image of 1:3 to 3:1 shows two or three shapes of different colours, each as wide as tall, twice as wide, or twice as tall. The arms have the
same encoder (a nano SigLIP 2 NaFlex of at most 36 patches), language model, steps and scenes; under `squashed` every image, in the training of the encoder
too, has been resized to the square of 6 x 6 patches. Then stages 1 and 3 of the recipe `nano` run, and questions about held-out scenes are asked. A seed
sets all weights, scenes and orders. What is there is not done again.
"""

import argparse
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from transformers import Siglip2VisionConfig, Siglip2VisionModel, set_seed
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/native_shapes.py`

from alignvlm.data.record import Record, one_turn
from alignvlm.data.scenes import COLOURS, RECORD_FEATURES, Split, split_of_key
from alignvlm.quickstart.nano import ATTENTION, train_language_model, train_loop
from alignvlm.stages.backbones import BackboneArguments, assemble
from benchmarks.findings import UNMEASURED, summarise, summary_table
from benchmarks.stage_runs import ROOT, evaluate, machine, stage_values, train, update_results
from hub_upload.run_record import RUN_RECORD


RECIPE = ROOT / "training/recipes/nano"
ARMS = ("squashed", "native")
PATCH, MOST, SIDE = 16, 36, 96  # pixels of a patch's side; patches of an image; pixels of a square image's side
ASPECTS = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)  # width to height
PROPORTIONS = {"even": 1.0, "wide": 2.0, "tall": 1 / 2}  # width to height
COUNTS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    encoder_scenes: int = 4000
    encoder_steps: int = 500
    language_steps: int = 80
    first: int = 1024  # scenes of stage 1
    third: int = 3000  # of stage 3
    held_out: int = 200


@dataclass(frozen=True)
class Scene:
    """The aspect ratio of an image, and its shapes: pairs of a colour and a proportion."""

    aspect: float
    shapes: tuple[tuple[str, str], ...]

    @property
    def split(self) -> Split:
        return split_of_key(f"{self.aspect:.2f}|" + "|".join(sorted(map(" ".join, self.shapes))))


def random_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draws an aspect ratio and two or three shapes, again until the composition belongs to `split`."""
    while True:
        colours = rng.permutation(list(COLOURS))[: rng.integers(2, 4)]
        shapes = tuple((str(colour), str(rng.choice(list(PROPORTIONS)))) for colour in colours)
        scene = Scene(float(rng.choice(ASPECTS)), shapes)
        if scene.split == split:
            return scene


def draw(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Draws boxes and ellipses on a noisy ground; returns the image and where each is, `(left, top, right, bottom)` in pixels."""
    width, height = round(SIDE * scene.aspect**0.5), round(SIDE / scene.aspect**0.5)
    places: list[tuple[int, int, int, int]] = []
    while len(places) < len(scene.shapes):
        ratio = PROPORTIONS[scene.shapes[len(places)][1]]
        side = rng.uniform(22, 28)
        across, down = round(side * ratio**0.5), round(side / ratio**0.5)
        left, top = int(rng.integers(1, width - across)), int(rng.integers(1, height - down))
        box = (left, top, left + across, top + down)
        if all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in places):
            places.append(box)
        elif rng.random() < 0.02:  # no room is left: begin anew
            places.clear()
    image = Image.new("RGB", (width, height), (int(rng.integers(90, 170)),) * 3)
    canvas = ImageDraw.Draw(image)
    for (colour, _), (left, top, right, bottom) in zip(scene.shapes, places):
        shape = canvas.ellipse if rng.random() < 0.5 else canvas.rectangle
        shape((left, top, right - 1, bottom - 1), fill=COLOURS[colour])
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), places


def shown(image: Image.Image, arm: str) -> Image.Image:
    """The image as an arm's encoder is given it."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if arm == "squashed" else image


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Asks for each shape's proportion, for the colour of each that no other shares its proportion with, and how many there are."""
    found = [proportion for _, proportion in scene.shapes]
    asked = [(f"What form has the {colour} shape?", proportion, "proportion") for colour, proportion in scene.shapes]
    asked += [
        (f"What colour is the {proportion} shape?", colour, "colour")
        for colour, proportion in scene.shapes
        if found.count(proportion) == 1
    ]
    return [*asked, ("How many shapes are there?", COUNTS[len(scene.shapes)], "count")]


def dialogue(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prompts and responses about a scene that is not drawn; the first prompt describes it."""
    scene = random_scene(rng, "train")
    asked = questions(scene)
    turns = [asked[index][:2] for index in rng.permutation(len(asked))]
    described = " ".join(f"The {colour} shape is {proportion}." for colour, proportion in scene.shapes)
    first, response = turns[0]
    return [(f"{described} {first}", response), *turns[1:]]


def make_records(count: int, split: Split, seed: int, arm: str) -> Dataset:
    """Makes records of scenes with their questions; the scenes of a seed are the same for both arms."""
    rng = np.random.default_rng([seed, 31, split == "test"])
    records = []
    for _ in range(count):
        scene = random_scene(rng, split)
        file = io.BytesIO()
        shown(draw(scene, rng)[0], arm).save(file, "BMP")
        turns = [one_turn(question, [answer], 1, kind) for question, answer, kind in questions(scene)]
        records.append(Record([{"bytes": file.getvalue()}], turns).to_row())
    return Dataset.from_list(records, features=RECORD_FEATURES)


def patch_labels(scene: Scene, places: list, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """For each patch of `grid` (rows, columns), the colour and the proportion of the shape that covers most of it, counted from 1; 0 for none."""
    labels, covered = np.zeros((*grid, 2), dtype=np.int64), np.zeros(grid)
    for (colour, proportion), (left, top, right, bottom) in zip(scene.shapes, places):
        edges = [np.linspace(0, length, count + 1) for length, count in zip(size[::-1], grid)]
        down = np.clip(np.minimum(edges[0][1:], bottom) - np.maximum(edges[0][:-1], top), 0, None)
        across = np.clip(np.minimum(edges[1][1:], right) - np.maximum(edges[1][:-1], left), 0, None)
        area = np.outer(down, across)
        labels[area > covered] = 1 + list(COLOURS).index(colour), 1 + list(PROPORTIONS).index(proportion)
        covered = np.maximum(area, covered)
    return labels


def train_encoder(folder: Path, seed: int, arm: str, count: int, steps: int, batch_size: int = 96) -> None:
    """Trains the encoder to tell of every patch the colour and the proportion of the shape there, if any."""
    set_seed(seed)
    rng = np.random.default_rng([seed, 30])
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=MOST)
    pixels = torch.zeros(count, MOST, PATCH**2 * 3, dtype=torch.float16)
    masks, shapes = torch.zeros(count, MOST, dtype=torch.long), torch.zeros(count, 2, dtype=torch.long)
    labels = torch.zeros(count, MOST, 2, dtype=torch.long)
    for index in range(count):
        scene = random_scene(rng, "train")
        image, places = draw(scene, rng)
        inputs = processor(shown(image, arm), return_tensors="pt")
        grid = tuple(inputs["spatial_shapes"][0].tolist())
        pixels[index], masks[index] = inputs["pixel_values"][0].half(), inputs["pixel_attention_mask"][0]
        shapes[index] = inputs["spatial_shapes"][0]
        own = torch.from_numpy(patch_labels(scene, places, image.size, grid)).flatten(0, 1)
        labels[index, : len(own)] = own
    config = Siglip2VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=PATCH,
        num_patches=MOST,
        vision_use_head=False,
    )
    encoder = Siglip2VisionModel._from_config(config, attn_implementation=ATTENTION)
    classes = [1 + len(COLOURS), 1 + len(PROPORTIONS)]
    head = nn.Linear(config.hidden_size, sum(classes))

    def loss_of_step(step: int) -> torch.Tensor:
        chosen = torch.from_numpy(rng.choice(count, min(batch_size, count), replace=False))
        mask = masks[chosen]
        features = encoder(pixels[chosen].float(), mask, shapes[chosen]).last_hidden_state[mask.bool()]
        wanted = labels[chosen][mask.bool()]
        predictions = head(features).float().split(classes, dim=-1)
        return sum(F.cross_entropy(prediction, wanted[:, i]) for i, prediction in enumerate(predictions))

    train_loop("encoder", [encoder.train(), head], 5e-3, steps, loss_of_step)
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)


def run_arm(output: Path, arm: str, seed: int, sizes: Sizes, in_process: bool = False) -> dict:
    """Trains an arm's backbones and stages, and asks it; returns shares of right answers by kind of question, and seconds of the stages."""
    folder = output / f"seed{seed}" / arm
    if not (folder / "vision/config.json").is_file():
        train_encoder(folder / "vision", seed, arm, sizes.encoder_scenes, sizes.encoder_steps)
    language = output / f"seed{seed}/language"
    if not (language / "README.md").is_file():
        train_language_model(language, seed, sizes.language_steps, draw_dialogue=dialogue)
    if not (folder / "stage0" / RUN_RECORD).is_file():
        assemble(BackboneArguments(str(folder / "vision"), str(language), str(folder / "stage0"), seed=seed))
        make_records(sizes.first, "train", seed, arm).to_parquet(folder / "first.parquet")
        make_records(sizes.third, "train", 100 + seed, arm).to_parquet(folder / "third.parquet")
        make_records(sizes.held_out, "test", seed, arm).to_parquet(folder / "test.parquet")
    start, seconds = folder / "stage0", 0.0
    for number, file in ((1, "first"), (3, "third")):
        changes = {**UNMEASURED, "data_dir": str(folder), "sources": [{"data": f"{file}.parquet"}], "seed": seed}
        changes |= {"per_device_train_batch_size": 32}
        entry = train(stage_values(RECIPE, number, start, folder / f"stage{number}", **changes), in_process)
        start, seconds = folder / f"stage{number}", seconds + entry["seconds"]
    options = ["--task", "local", "--data", str(folder / "test.parquet"), "--split", "test", "--batch_size", "50"]
    found = evaluate(start, [*options, "--bootstrap_samples", "10"], folder / "results")
    kinds = found["metrics"]["pathvqa_accuracy"]["by_kind"]
    return {
        "values": {kind: kinds[kind]["accuracy"] for kind in ("proportion", "colour", "count")},
        "seconds": seconds,
    }


def table(found: dict) -> str:
    """The results as Markdown."""
    return summary_table(found["summary"])


def run(output: Path, seeds: int, results: Path, sizes: Sizes, in_process: bool = False) -> dict:
    """Runs all arms seed by seed; writes what is known after each into `results`."""
    runs: dict[str, dict[str, dict]] = {arm: {} for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            runs[arm][str(seed)] = run_arm(output, arm, seed, sizes, in_process)
            known = {name: each for name, each in runs.items() if each}
            found = {"machine": machine(), "summary": summarise(known), "runs": runs}
            update_results(results, "native_shapes", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("out/native_shapes"))
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    arguments = parser.parse_args()
    output, started = arguments.output.resolve(), time.perf_counter()
    found = run(output, arguments.seeds, arguments.results or output / "results.json", Sizes())
    print(f"\n{table(found)}\n\n{(time.perf_counter() - started) / 60:.1f} minutes in this start.")


if __name__ == "__main__":
    main()
