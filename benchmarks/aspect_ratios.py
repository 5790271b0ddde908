"""What squashing costs photos that are not square, and what tiles give back: answers by a question's words and pooled features of its image.

    python benchmarks/aspect_ratios.py --data FOLDER --vision MOBILENET
    python docs/write_results_page.py                   # the table of docs/tiles.md, from docs/results.json

A view is a way of showing an image to the frozen encoder: squashed into a square, in its own shape with as many pixels, or cut into tiles as `max_tiles`
cuts it, behind an overview. An image's vector is the mean of all its tokens' features; the network of `questions_and_images.py` learns the answers to questions
from it and the words, anew for each view, and answers the held-out questions about images at least 1.25 times as long as wide (or the other way round).
Of two views the same questions are compared, by the paired bootstrap over images.

FOLDER is that of `questions_alone.py`, MOBILENET a folder of transformers (or Hub name) whose encoder takes images of any size. Half an hour of one core.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/aspect_ratios.py`

from alignvlm.evaluation.questions import EvaluationSet
from benchmarks.questions_alone import NUMBERS
from benchmarks.questions_and_images import Questions, best_classifier, gains, numbers_of, sets_of
from benchmarks.stage_runs import machine, update_results
from modeling_alignvlm.processing_alignvlm import best_grid


RESULTS = Path(__file__).resolve().parents[1] / "docs/results.json"
LONG = 1.25  # the longer side, divided by the shorter
SIDE = 224  # pixels of a square, and of one whose area an own shape has
STRIDE = 32  # pixels of one feature, whose multiples the sides of an own shape are
TASKS = ("pathvqa", "daquar")

# Makes the views of an image: sizes, height and width, each with the rows and columns into which it is cut.
Shape = tuple[tuple[int, int], tuple[int, int]]


def squashed(side: int, image: Image.Image) -> list[Shape]:
    return [((side, side), (1, 1))]


def own_shape(side: int, image: Image.Image) -> list[Shape]:
    scale = side / (image.height * image.width) ** 0.5
    height, width = (max(1, round(length * scale / STRIDE)) * STRIDE for length in (image.height, image.width))
    return [((height, width), (1, 1))]


def tiles(side: int, most: int, image: Image.Image) -> list[Shape]:
    grid = best_grid((image.height, image.width), (side, side), most)
    overview = squashed(side, image)
    return overview if grid == (1, 1) else [*overview, ((side * grid[0], side * grid[1]), grid)]


# The views that come after a view in `COMPARED` are compared with it.
VIEWS: dict[str, Callable[[Image.Image], list[Shape]]] = {
    "squashed, 112 pixels": partial(squashed, SIDE // 2),
    "squashed, 224 pixels": partial(squashed, SIDE),
    "own shape, as many pixels as 224 x 224": partial(own_shape, SIDE),
    "overview and at most 6 tiles of 112 pixels": partial(tiles, SIDE // 2, 6),
}
COMPARED = ("squashed, 112 pixels", "squashed, 224 pixels")


@torch.no_grad()
def tokens_of_view(model: PreTrainedModel, processor, image: Image.Image, shapes: list[Shape]) -> Tensor:
    """Returns the features of all tokens of an image shown in these shapes (`(tokens, features)`, float32)."""
    found = []
    for (height, width), (rows, columns) in shapes:
        pixels = processor(image, size={"height": height, "width": width}, return_tensors="pt")["pixel_values"]
        parts = [part for row in pixels.chunk(rows, dim=2) for part in row.chunk(columns, dim=3)]
        output = model(torch.cat(parts).contiguous(memory_format=torch.channels_last)).last_hidden_state
        found.append(output.movedim(1, -1).flatten(0, 2))
    return torch.cat(found)


def features_by_view(data: EvaluationSet, vision: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns the mean of the tokens of each record's first image by view (`(records, features)`), and the mean number of tokens."""
    model, processor = AutoModel.from_pretrained(vision), AutoImageProcessor.from_pretrained(vision)
    model = model.eval().to(memory_format=torch.channels_last)
    means: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    counts = dict.fromkeys(VIEWS, 0)
    for one in data.asked:
        image = data.images([one])[0][0]
        for view, shapes_of in VIEWS.items():
            tokens = tokens_of_view(model, processor, image, shapes_of(image))
            means[view].append(tokens.mean(0))
            counts[view] += len(tokens)
    return (
        {view: torch.stack(each) for view, each in means.items()},
        {view: count / len(data.asked) for view, count in counts.items()},
    )


def long_ones(questions: Questions) -> list[int]:
    """The positions of the questions about images at least `LONG` times as long as wide, or the other way round."""
    sizes = {}
    for one in questions.data.asked:
        image = questions.data.images([one])[0][0]
        sizes[one.index] = max(image.size) / min(image.size)
    return [at for at, index in enumerate(questions.images.tolist()) if sizes[index] >= LONG]


def measure(training: Questions, held_out: Questions, vision: str) -> dict:
    """Trains and asks a classifier of each view; returns for each its tokens per image, the numbers of the metric, and their differences to those
    of `COMPARED`, with intervals."""
    features, _ = features_by_view(training.data, vision)
    features_held_out, tokens = features_by_view(held_out.data, vision)
    asked = long_ones(held_out)
    results, views = {}, {}
    for view in VIEWS:
        classifier, passes = best_classifier(training, features[view], sees=True)
        results[view] = classifier(held_out, features_held_out[view], asked)
        views[view] = {
            "tokens": tokens[view],
            "passes": passes,
            "numbers": numbers_of(results[view]),
            "over": {
                other: gains(results[other], results[view]) for other in COMPARED if other in results and other != view
            },
        }
        print(view, views[view], flush=True)
    images = len(set(held_out.images[asked].tolist()))
    return {"questions": len(asked), "images": images, "views": views}


def table(found: dict) -> str:
    """The table of docs/tiles.md."""
    heads = " | ".join(f"over {other} (95% interval)" for other in COMPARED)
    lines = [f"| task | view | tokens | metric | value | {heads} |", "|---" * (5 + len(COMPARED)) + "|"]
    for task, result in found["tasks"].items():
        for view, values in result["views"].items():
            for number, each in values["numbers"].items():
                cells = [task, view, f"{values['tokens']:.0f}", NUMBERS[number], f"{each['value']:.3f}"]
                for other in COMPARED:
                    gain = values["over"].get(other, {}).get(number)
                    cells.append(
                        ""
                        if gain is None
                        else "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["difference"], *gain["interval"])
                    )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--vision", required=True)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    p.add_argument("--results", default=str(RESULTS), help="JSON file of the results.")
    arguments = p.parse_args()
    tasks = {}
    for task, sets in sets_of(arguments.tasks, arguments.data):
        tasks[task] = measure(*map(Questions, sets), arguments.vision)
        update_results(Path(arguments.results), "aspect_ratios", {"machine": machine(), "tasks": tasks})
    print(table({"tasks": tasks}))


if __name__ == "__main__":
    main()
