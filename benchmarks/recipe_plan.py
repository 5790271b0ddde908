"""The plan of the 0.91B recipe at the size of its data sets, which need not be there: stand-ins of the published counts.

    python benchmarks/recipe_plan.py --model FOLDER [--processes 8] [--gpu H100]

`--model` is a stage-0 checkpoint, or a later one of the same backbones. Stand-ins are jsonl files with as many records as a data set's
page states, in words of the usual number; images are named, not read, as `alignvlm.tools.plan` does not decode them.
"""

import argparse
import json
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/recipe_plan.py`

from alignvlm.stages.arguments import parse_anywhere
from alignvlm.tools.plan import GPUS, describe, plan_stages


ROOT = Path(__file__).resolve().parents[1]
WORDS = "a the man dog street with red on in two small standing near people large is of and white playing".split()
# Of each stage's sources: records, annotations per record, words of a prompt and of a response.
STAND_INS = {
    1: {"llava_pretrain": (558_128, 1, 4, 9)},
    2: {"sharegpt4v": (102_025, 1, 6, 140)},
    3: {"coco_captions": (113_287, 5, 4, 10), "flickr30k_captions": (29_000, 5, 4, 12), "vqav2": (82_772, 5, 7, 1)},
    4: {"pathvqa": (2_599, 8, 7, 2)},
}
TEXT = (110_000, 1, 15, 180)


def stand_in(path: Path, records: int, annotations: int, prompt: int, response: int, image: bool) -> None:
    """Writes a jsonl file of records whose images do not exist."""
    if path.is_file():
        return
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(records):
            texts = [
                {
                    "prompt": " ".join(rng.choices(WORDS, k=prompt)),
                    "response": " ".join(rng.choices(WORDS, k=max(1, round(rng.gauss(response, response / 4))))),
                }
                for _ in range(annotations)
            ]
            file.write(json.dumps({**({"image": f"{index}.jpg"} if image else {}), "annotations": texts}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--folder", type=Path, default=Path("out/recipe_plan"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages = []
    for stage, sources in STAND_INS.items():
        read = []
        for name, shape in sources.items():
            stand_in(folder / f"{name}.jsonl", *shape, image=True)
            read.append({"name": "local", "data": f"{name}.jsonl"})
        if stage == 3:
            stand_in(folder / "text.jsonl", *TEXT, image=False)
            read.append({"name": "local", "data": "text.jsonl", "share": 0.1})
        if stage == 4:
            read.append({"name": "rehearsal", "stage": 3, "share": 0.25})
        recipe = ROOT / f"training/recipes/alignvlm_900m/stage{stage}.yaml"
        fields = ["--sources", json.dumps(read), "--data_dir", str(folder)]
        if stage == 1:
            fields += ["--model", arguments.model]
        stages.append(parse_anywhere(["--config", str(recipe), *fields])[0])
    plans = plan_stages(stages, arguments.processes)
    for plan in plans:
        print(describe(plan, arguments.gpu, arguments.utilisation) + "\n")
    total = sum(plan.flops for plan in plans)
    for name, (rate, _) in GPUS.items():
        hours = total / (rate * arguments.utilisation * arguments.processes) / 3600
        print(
            f"{arguments.processes} x {name} at {arguments.utilisation:.0%}: {hours:.1f} hours for {total / 1e18:.0f} EFLOP"
        )


if __name__ == "__main__":
    main()
