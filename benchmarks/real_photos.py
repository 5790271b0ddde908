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
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/real_photos.py`

from alignvlm.evaluation.evaluate_model import evaluate_checkpoint
from alignvlm.evaluation.evaluate_model import parser as evaluation_parser
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.evaluation.precision import choose_precision, matrix_rate
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.checkpoint import last_complete_checkpoint
from alignvlm.stages.command_line import parse_fields
from alignvlm.tools.plan import plan_stages
from hub_upload.run_record import RUN_RECORD, read_run_record, write_json


ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "training/recipes/smollm2_mobilenet"
STAGES = (1, 2, 3, 4)
HELD_OUT = 10  # every tenth image of DAQUAR and VQA-RAD
EFFICIENCY = 0.35  # share of the machine's rate that training reaches
# name: (file, split, further options of `alignvlm evaluate`)
TASKS = {
    "captions": ("flickr8k/captions.jsonl", "val", ["--prompt", "Write a short caption.", "--max_new_tokens", "24"]),
    "daquar": ("daquar/test.jsonl", "test", ["--max_new_tokens", "8"]),
    "pathvqa": ("pathvqa/dev.jsonl", "dev", ["--max_new_tokens", "16"]),
    "vqa_rad": ("vqa_rad/test.jsonl", "test", ["--max_new_tokens", "16"]),
}
TASKS_OF_STAGE = {0: (), 1: ("captions",), 2: ("captions",), 3: ("captions", "daquar"), 4: tuple(TASKS)}
CONTROLS = (None, "blank_image", "shuffle_images")
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


def prepare(data: Path, folder: Path) -> None:
    """Writes the files that the recipe reads: the data's own, and DAQUAR and VQA-RAD divided by image."""
    for name in ("flickr8k", "pathvqa", "text"):
        if not (data / name).is_dir():
            raise FileNotFoundError(f"{data} holds no folder {name!r}; see the docstring for what it must hold.")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to((data / name).resolve())
    for name, file in (("daquar", "qa.jsonl"), ("vqa_rad", "train.jsonl")):
        rows = [json.loads(line) for line in (data / name / file).read_text().splitlines()]
        held = set(sorted({row["image"] for row in rows})[::HELD_OUT])
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "images").exists():
            (folder / name / "images").symlink_to((data / name / "images").resolve())
        for split in ("train", "test"):
            lines = [
                json.dumps({**row, "split": split}) for row in rows if (row["image"] in held) == (split == "test")
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def plan(output: Path, budget_minutes: float | None) -> dict:
    """The share of the recipe's images that fits into the budget, by the FLOPs that `alignvlm plan` counts and this machine's rate."""
    file, precision = output / "plan.json", choose_precision()
    if not file.is_file():
        rate = EFFICIENCY * matrix_rate(precision.dtype, seconds=0.5)
        stages = [parse_fields(stage_options(number, output, 1), StageArguments)[0] for number in STAGES]
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


def stage_options(number: int, output: Path, share: float) -> list[str]:
    """The options of a stage script that trains on a share of the recipe's images."""
    options = ["--config", str(RECIPE / f"stage{number}.yaml"), "--data_dir", str(output / "data")]
    options += ["--model", str(output / f"stage{number - 1}"), "--output_dir", str(output / f"stage{number}")]
    if share < 1:
        sources = yaml.safe_load((RECIPE / f"stage{number}.yaml").read_text())["sources"]
        for source in sources:
            if "share" not in source:
                rows = (output / "data" / source["data"]).read_text().splitlines()
                images = {row["image"] for row in map(json.loads, rows) if row.get("split", "train") == "train"}
                source["limit"] = max(int(share * len(images)), 16)
        options += ["--sources", json.dumps(sources)]
    return options


def run_stage(number: int, output: Path, share: float) -> dict:
    """Runs a stage by its script, or goes on with it; returns its entry in the run record."""
    folder = output / f"stage{number}"
    if not (folder / RUN_RECORD).is_file():
        command = [sys.executable, str(ROOT / f"training/stage{number}.py"), *stage_options(number, output, share)]
        if last_complete_checkpoint(folder) is not None:
            command.append("--resume_from_checkpoint")
        print(f"== {' '.join(command[1:])}", flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment)
    return read_run_record(folder)["stages"][-1]


def evaluate(number: int, output: Path, task: str, control: str | None, limit: int | None) -> dict:
    """Evaluates a stage's checkpoint, unless its result is there; returns the result without the predictions."""
    folder = output / f"results/stage{number}/{task}{'-' + control if control else ''}"
    found = list(folder.glob("*.json"))
    if found:
        result = json.loads(found[0].read_text())
    else:
        if task == "text":
            options = ["--task", "text_perplexity", "--data", str(output / "data/text/wikitext2.valid.txt")]
            options += ["--limit", str(min(limit or 64, 64))]
        else:
            file, split, more = TASKS[task]
            data = output / "data" / file
            options = ["--task", "local", "--data", str(data), "--split", split, "--image_dir", str(data.parent)]
            options += [*more, *([f"--{control}"] if control else []), *(["--limit", str(limit)] if limit else [])]
        options += [
            "--use_cpu",
            "--dtype",
            choose_precision().name,
            "--attn_implementation",
            "eager",
            "--batch_size",
            "32",
        ]
        command = [str(output / f"stage{number}"), *options, "--output_dir", str(folder)]
        result = evaluate_checkpoint(evaluation_parser().parse_args(command))
    return {name: value for name, value in result.items() if name != "predictions"}


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
    """All results of a stage's checkpoint."""
    found = {"text": evaluate(number, output, "text", None, limit), "questions": answers_without_image(number, output)}
    for task in TASKS_OF_STAGE[number]:
        for control in CONTROLS if number > 2 else CONTROLS[:1]:
            found[f"{task} {control or ''}".strip()] = evaluate(number, output, task, control, limit)
    return found


def rows_of(results: dict[int, dict]) -> list[tuple]:
    """The table: stage, task, control, metric, value, interval and the most frequent answer's value."""
    rows = []
    for number, found in results.items():
        perplexity = found["text"]["metrics"]["text"]["perplexity"]
        interval = found["text"]["metrics"]["text"]["intervals"]["perplexity"]
        rows.append((number, "text", "", "perplexity", perplexity, interval, None))
        for name, result in found.items():
            if name in ("text", "questions"):
                continue
            task, _, control = name.partition(" ")
            for metrics in result["metrics"].values():
                for metric in ("cider", "accuracy", "yes_no_accuracy", "free_form_accuracy", "free_form_f1"):
                    if metrics.get(metric) is not None:  # there may be no question of the kind
                        interval, majority = metrics["intervals"].get(metric), metrics.get(f"majority_{metric}")
                        rows.append((number, task, control, metric, metrics[metric], interval, majority))
    return rows


def table(rows: list[tuple]) -> str:
    """The rows as Markdown."""
    lines = [
        "| stage | task | control | metric | value | 95% interval | most frequent answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, task, control, metric, value, interval, majority in rows:
        low_high = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        usual = "" if majority is None else f"{majority:.3f}"
        lines.append(f"| {stage} | {task} | {control} | {metric} | {value:.3f} | {low_high} | {usual} |")
    return "\n".join(lines)


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
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data names the folder of photos and questions (or ALIGNVLM_TEST_DATA does).")
    output, started = arguments.output.resolve(), time.perf_counter()
    prepare(Path(arguments.data), output / "data")
    if not (output / "stage0" / RUN_RECORD).is_file():
        assemble(BackboneArguments(arguments.vision, arguments.language, str(output / "stage0")))

    planned = plan(output, arguments.budget_minutes)
    print(
        f"{planned['share']:.0%} of the recipe's images, about {sum(planned['minutes']):.0f} minutes of training steps: {planned['minutes']}",
        flush=True,
    )

    results, stages = {0: measure(0, output, arguments.limit)}, {}
    for number in STAGES:
        stages[number] = run_stage(number, output, planned["share"])
        results[number] = measure(number, output, arguments.limit)
    rows = rows_of(results)
    write_json(
        output / "real_photos.json",
        {"plan": planned, "stages": stages, "results": results, "rows": rows},
    )
    print(table(rows))
    print(f"\n{(time.perf_counter() - started) / 60:.0f} minutes in this start.")


if __name__ == "__main__":
    main()
