"""Whether a model learns from whole conversations: a second question that only the first exchange makes clear.

    alignvlm quickstart                                              # a model to start from
    python benchmarks/two_turns.py out/quickstart/stage4

Drawn scenes of two shapes with different colours, as LLaVA's `conversations`, one of each shape: "What shape is at the top left?",
"circle", "And its colour?", "red". The stage trains on them whole (`turns: whole`, all answers). Held-out scenes are then asked the
second question with the first exchange before it, and, as a control, without it: both shapes then have the same question, so at most
half of the answers can be right.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/two_turns.py`

from alignvlm.data import scenes
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.evaluation.questions import EvaluationSet, blank, load_task
from hub_upload.run_record import read_run_record, write_json


ROOT = Path(__file__).resolve().parents[1]


def write_conversations(folder: Path, split: scenes.Split, count: int, seed: int) -> Path:
    """Writes `count` scenes as PNG files and their conversations in LLaVA's form; returns the jsonl file."""
    rng = np.random.default_rng([seed, split == "test"])
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene: scenes.Scene = ()
        while len({shape.colour for shape in scene}) < 2:
            scene = scenes.random_scene(rng, split)
        scenes.draw(scene, rng).save(folder / split / f"{index}.png")
        for shape in scene:
            said = (f"<image>\nWhat shape is at the {shape.position}?", shape.kind, "And its colour?", shape.colour)
            turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(said)]
            lines.append(json.dumps({"image": f"{split}/{index}.png", "conversations": turns}))
    file = folder / f"{split}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def train(model: Path, data: Path, output: Path, epochs: int, seed: int) -> dict:
    """A stage 4 of the nano recipe on the conversations, through its script; returns its entry in the run record."""
    sources = [
        {"data": str(data.resolve())},
        {"name": "scenes", "annotations": ["questions"], "count": 500, "seed": 7},
    ]
    command = [
        *(sys.executable, str(ROOT / "training/stage4.py")),
        *("--config", str(ROOT / "training/recipes/nano/stage4.yaml")),
        *("--model", str(model), "--output_dir", str(output), "--seed", str(seed)),
        *("--sources", json.dumps(sources), "--num_train_epochs", str(epochs)),
    ]
    subprocess.run(command, check=True)
    return read_run_record(output)["stages"][-1]


def accuracy(model, processor, found: EvaluationSet, withheld: bool = False, without_image: bool = False) -> float:
    """Share of second questions answered exactly; `withheld` leaves out the first exchange."""
    images = found.images(found.asked)
    if without_image:
        images = blank(images)
    asked = [[c.exchanges()[-1] if withheld else c for c in one.conversations] for one in found.asked]
    prompts = [[conversation.messages for conversation in group] for group in asked]
    written = answer(model, processor, images, prompts, max_new_tokens=4)
    right = [text == c.responses[0] for texts, group in zip(written, asked) for text, c in zip(texts, group)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="A checkpoint of the quickstart.")
    parser.add_argument("--folder", type=Path, default=Path("out/two_turns"))
    parser.add_argument("--scenes", type=int, default=3000, help="Scenes to train on, with two conversations each.")
    parser.add_argument("--test_scenes", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = write_conversations(arguments.folder / "data", "train", arguments.scenes, arguments.seed)
    test = write_conversations(arguments.folder / "data", "test", arguments.test_scenes, arguments.seed)
    started = time.perf_counter()
    stage = train(arguments.model, data, arguments.folder / "stage", arguments.epochs, arguments.seed)
    found = load_task("local", "test", str(test))
    numbers = {}
    for name, folder in (("before", arguments.model), ("after", arguments.folder / "stage")):
        model, processor, precision = load_checkpoint(str(folder), torch.device("cpu"))
        numbers[name] = {
            "with the first exchange": accuracy(model, processor, found),
            "first exchange withheld": accuracy(model, processor, found, withheld=True),
            "image withheld": accuracy(model, processor, found, without_image=True),
        }
    for name in numbers["after"]:
        print(f"{name:<28} {numbers['before'][name]:>8.4f} before {numbers['after'][name]:>8.4f} after")
    questions = sum(len(one.conversations) for one in found.asked)
    print(
        f"{questions} questions about {len(found.asked)} held-out scenes; {stage['steps']} steps; computes in {precision}"
    )
    result = {**numbers, "questions": questions, "stage": stage, "seconds": time.perf_counter() - started}
    write_json(arguments.folder / "two_turns.json", result)


if __name__ == "__main__":
    main()
