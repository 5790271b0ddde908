"""The four stages on real weights, real photos and PathVQA, small, in one resumable command.

    python benchmarks/real_photos.py --data FOLDER --language SMOLLM2 --vision MOBILENET --budget_minutes 60

MobileNetV2 before SmolLM2-135M-Instruct, by the recipe `training/recipes/smollm2_mobilenet` and the stage scripts. FOLDER holds
`flickr8k/captions.jsonl`, `daquar/qa.jsonl`, `pathvqa/{train,dev}.jsonl` and `vqa_rad/train.jsonl` with their images, and `text/` with
`gutenberg17.txt` and `wikitext2.valid.txt`. SMOLLM2 and MOBILENET are folders of transformers (or Hub names).

Of DAQUAR and VQA-RAD every tenth image, with all its questions, is held out. After each stage the checkpoint captions validation photos
and its text perplexity is measured; after the last two it answers held-out questions too. Captions and questions are asked again with a
grey image and with another image. `--budget_minutes` scales the number of images a stage trains on to the time the training steps
may take here, by the counted FLOPs and the rate measured at the start. What is there is not done again: start the same command to go on.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/real_photos.py`

from alignvlm.evaluation.judge import compare
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.evaluation.precision import choose_precision, matrix_rate
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.tools.plan import plan_stages
from benchmarks.stage_runs import ROOT, evaluate, machine, prepare_photos, stage_values, train, update_results
from hub_upload.package import package
from hub_upload.run_record import RUN_RECORD, write_json


RECIPE = ROOT / "training/recipes/smollm2_mobilenet"
STAGES = (1, 2, 3, 4)
EFFICIENCY = 0.35  # share of the machine's rate that training reaches
CAPTIONS = ["--prompt", "Write a short caption.", "--max_new_tokens", "24"]
# name: (file, split, further options of `alignvlm evaluate`)
TASKS = {
    "captions": ("flickr8k/captions.jsonl", "val", CAPTIONS),
    "captions_beams": ("flickr8k/captions.jsonl", "val", [*CAPTIONS, "--num_beams", "3"]),
    "daquar": ("daquar/test.jsonl", "test", ["--max_new_tokens", "8"]),
    "pathvqa": ("pathvqa/dev.jsonl", "dev", ["--max_new_tokens", "16"]),
    "vqa_rad": ("vqa_rad/test.jsonl", "test", ["--max_new_tokens", "16"]),
}
TASKS_OF_STAGE = {
    0: (),
    1: ("captions",),
    2: ("captions",),
    3: ("captions", "captions_beams", "daquar"),
    4: (*sorted(set(TASKS) - {"captions_beams"}),),
}
CONTROLS = ("blank_image", "shuffle_images")
METRICS = {
    "cider": "CIDEr",
    "accuracy": "accuracy",
    "yes_no_accuracy": "yes/no accuracy",
    "free_form_accuracy": "open, exact",
    "free_form_f1": "open, token F1",
}
EXAMPLES = 8  # the first answers of a task, which docs/results.md shows beside those of people
QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a week?",
    "What colour is the sky on a clear day?",
    "Name an animal that can fly.",
    "What is 3 plus 4?",
    "What do bees make?",
    "Is ice hot or cold?",
    "Write a sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of big?",
)


def plan(output: Path, budget_minutes: float | None) -> dict:
    """The share of the recipe's images that fits into the budget, by the FLOPs that `alignvlm plan` counts and this machine's rate."""
    file, precision = output / "plan.json", choose_precision()
    if not file.is_file():
        rate = EFFICIENCY * matrix_rate(precision.dtype, seconds=0.5)
        stages = [StageArguments(**values_of(number, output, 1)) for number in STAGES]
        plans = plan_stages(stages, processes=1, sample=8)
        minutes = [each.flops / rate / 60 for each in plans]
        share = 1 if budget_minutes is None else min(1, budget_minutes / sum(minutes))
        found = {
            "share": share,
            "minutes": [round(share * each, 1) for each in minutes],
            "records": [round(share * each.records) for each in plans],
            "tflop": [round(share * each.flops / 1e12, 1) for each in plans],
            "precision": str(precision),
        }
        write_json(file, found)
    return json.loads(file.read_text())


def values_of(number: int, output: Path, share: float) -> dict:
    """The fields of a stage that trains on a share of the recipe's images."""
    values = stage_values(
        RECIPE, number, output / f"stage{number - 1}", output / f"stage{number}", data_dir=str(output / "data")
    )
    for source in values["sources"] if share < 1 else ():
        if "share" not in source:
            rows = (output / "data" / source["data"]).read_text().splitlines()
            images = {row["image"] for row in map(json.loads, rows) if row.get("split", "train") == "train"}
            source["limit"] = max(int(share * len(images)), 16)
    return values


def ask(number: int, output: Path, task: str, control: str | None, limit: int | None) -> dict:
    """The result of a stage's checkpoint on a task."""
    if task == "text":
        options = ["--task", "text_perplexity", "--data", str(output / "data/text/wikitext2.valid.txt")]
        options += ["--limit", str(min(limit or 64, 64))]
    else:
        file, split, more = TASKS[task]
        data = output / "data" / file
        options = ["--task", "local", "--data", str(data), "--split", split, "--image_dir", str(data.parent)]
        options += [*more, *([f"--{control}"] if control else []), *(["--limit", str(limit)] if limit else [])]
    folder = output / f"results/stage{number}/{task}{'-' + control if control else ''}"
    return evaluate(output / f"stage{number}", [*options, "--name", task, "--batch_size", "32"], folder)


def answers_without_image(number: int, output: Path) -> list[str]:
    """What a checkpoint answers to ten fixed questions about no image, greedily."""
    file = output / f"results/stage{number}/questions.json"
    if not file.is_file():
        model, processor, _ = load_checkpoint(str(output / f"stage{number}"), torch.device("cpu"))
        answers = []
        for question in QUESTIONS:
            messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(tokens, skip_special_tokens=True).strip())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, answers)
    return json.loads(file.read_text())


def measure(number: int, output: Path, limit: int | None) -> dict:
    """All that is measured of a stage's checkpoint.

    Returns:
        `perplexity` of the text; `questions`, the answers to the ten questions; `tasks`: for each its `metrics` (by control, `image` being
        none), the `differences` that the own image makes to each control, with intervals, and as `examples` the first answers.
    """
    perplexity = ask(number, output, "text", None, limit)["metrics"]["text"]["perplexity"]
    found = {"perplexity": perplexity, "questions": answers_without_image(number, output), "tasks": {}}
    for task in TASKS_OF_STAGE[number]:
        controls = CONTROLS if number > 2 and task != "captions_beams" else ()
        result = ask(number, output, task, None, limit)
        others = {control: ask(number, output, task, control, limit) for control in controls}
        found["tasks"][task] = {
            "metrics": {name: numbers_of(each) for name, each in {"image": result, **others}.items()},
            "differences": {control: compare(other, result) for control, other in others.items()},
            "examples": [
                {name: item[name] for name in ("prompt", "prediction", "references")}
                for item in result["predictions"][:EXAMPLES]
            ],
        }
    return found


def numbers_of(result: dict) -> dict[str, dict]:
    """The numbers of a result that the table shows: value, interval and the most frequent answer's value."""
    return {
        name: {
            "value": metrics[name],
            "interval": metrics["intervals"].get(name),
            "majority": metrics.get(f"majority_{name}"),
        }
        for metrics in result["metrics"].values()
        for name in METRICS
        if metrics.get(name) is not None  # there may be no question of the kind
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| stage | task | metric | value (95% interval) | grey image | another image | most frequent answer | gain over another image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, found in results.items():
        lines.append(f"| {number} | text | perplexity | {found['perplexity']:.2f} | | | | |")
        for task, measured in found["tasks"].items():
            for name, number_found in measured["metrics"]["image"].items():
                cells = [f"{number_found['value']:.3f} {_interval(number_found['interval'])}"]
                for control in CONTROLS:
                    other = measured["metrics"].get(control, {}).get(name)
                    cells.append(f"{other['value']:.3f}" if other else "")
                cells.append("" if number_found["majority"] is None else f"{number_found['majority']:.3f}")
                gain = measured["differences"].get("shuffle_images", {}).get(name)
                cells.append(f"{gain['difference']:+.3f} {_interval(gain['interval'])}" if gain else "")
                lines.append(f"| {number} | {task} | {METRICS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_card(output: Path, number: int, license: str | None) -> Path:
    """Packages a stage's checkpoint as a push would, its card with what was measured of it on all records; returns the folder.

    Raises:
        ValueError: if a backbone states no licence, and `license` is None.
    """
    folder, packed = output / f"stage{number}", output / "package"
    (folder / "results").mkdir(exist_ok=True)
    for task in ("text", *TASKS_OF_STAGE[number]):
        for file in (output / f"results/stage{number}" / task).glob("*.json"):
            shutil.copy(file, folder / "results" / f"{task}.json")
    return package(folder, packed, license=license)


def _interval(values: list[float] | None) -> str:
    return f"({values[0]:.3f} to {values[1]:.3f})" if values else ""


def cost(entry: dict) -> dict:
    """What a stage's entry in the run record says of its cost and its losses."""
    names = ("records", "steps", "seconds", "train_loss", "eval_loss_before", "eval_loss_after", "precision")
    names += ("text_perplexity_before", "text_perplexity_after", "mir_before", "mir_after", "losses_of_data")
    return {name: entry[name] for name in names if name in entry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ALIGNVLM_TEST_DATA"), help="See the docstring.")
    parser.add_argument("--language", required=True, help="SmolLM2-135M-Instruct: a folder or Hub repository.")
    parser.add_argument("--vision", required=True, help="MobileNetV2: a folder or Hub repository.")
    parser.add_argument("--output", type=Path, default=Path("out/real_photos"))
    parser.add_argument("--budget_minutes", type=float, help="For the training steps. Left out: all records once.")
    parser.add_argument(
        "--limit", type=int, help="At most this number of images (and windows of text) an evaluation asks about."
    )
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    parser.add_argument("--license", help="Of the weights, for the card, where a backbone states none.")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data names the folder of photos and questions (or ALIGNVLM_TEST_DATA does).")
    output, started = arguments.output.resolve(), time.perf_counter()
    prepare_photos(Path(arguments.data), output / "data")
    if not (output / "stage0" / RUN_RECORD).is_file():
        assemble(BackboneArguments(arguments.vision, arguments.language, str(output / "stage0")))

    planned = plan(output, arguments.budget_minutes)
    print(
        f"{planned['share']:.0%} of the recipe's images, about {sum(planned['minutes']):.0f} minutes of training steps: {planned['minutes']}",
        flush=True,
    )

    results, stages = {0: measure(0, output, arguments.limit)}, {}
    for number in STAGES:
        stages[number] = cost(train(values_of(number, output, planned["share"])))
        results[number] = measure(number, output, arguments.limit)
        found = {"machine": machine(), "plan": planned, "stages": stages, "results": results}
        update_results(arguments.results or output / "results.json", "real_photos", found)
    print(table(results))
    print(f"\n{(time.perf_counter() - started) / 60:.0f} minutes in this start.")
    print(f"The last checkpoint as a push would send it: {with_card(output, STAGES[-1], arguments.license)}")


if __name__ == "__main__":
    main()
