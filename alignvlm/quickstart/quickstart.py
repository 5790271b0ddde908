"""Runs everything once, small, on a CPU: nano backbones, the four stages through their own scripts, evaluation, reload, report.

    make quickstart

Leaves `stage0` ... `stage4`, `summary.json` and `report.html` in the output folder. Stage 4 is a complete Hub repository.
"""

import json
import math
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from transformers.utils import logging

from alignvlm.data import scenes
from alignvlm.data.formats import CAPTION_PROMPT, DETAILED_PROMPT
from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, parser
from alignvlm.evaluation.precision import choose_precision, matrix_rate
from alignvlm.quickstart.nano import ATTENTION, train_nano_backbones
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.command_line import parse_fields, read_yaml
from alignvlm.stages.flops import FlopCounter
from alignvlm.stages.log_lines import bars_in_a_terminal_only
from alignvlm.tools.report.report import report_if_possible
from hub_upload import command_line
from hub_upload.run_record import read_run_record
from hub_upload.shared_files import shared_folder


TRAINING = shared_folder() / "training"  # the stage scripts and recipes
# For the forecast: counted or measured in runs of the default settings.
VISION_STEP_FLOPS, LANGUAGE_STEP_FLOPS = 10.1e9, 46.5e9
STAGE_RECORD_FLOPS = {1: 0.19e9, 2: 0.39e9, 3: 0.93e9, 4: 0.97e9}
FIXED_SECONDS = 130  # what is not arithmetic: drawing scenes, files, Python
EFFICIENCY = 0.3  # share of the machine's rate that training reaches
# Runs in a process of its own that cannot import this package: it knows only transformers and the checkpoint.
RELOAD = """
import sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, picture, *prompts = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for prompt in prompts:
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    print(f"{prompt}  ->  {processor.decode(tokens, skip_special_tokens=True).strip()}")
"""


@dataclass
class QuickstartArguments:
    """The quickstart's few settings; everything else stands in the recipe's YAML files."""

    output_dir: str = field(default="out/quickstart", metadata={"help": "Where stages, images and the summary go."})
    recipe: str = field(
        default=str(TRAINING / "recipes/nano"), metadata={"help": "Folder with stage1.yaml ... stage4.yaml."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of backbones, scenes and stages."})
    test_scenes: int = field(
        default=250, metadata={"help": "Held-out scenes; each is asked eight questions and captioned twice."}
    )
    vision_steps: int = field(default=350, metadata={"help": "Training steps of the vision encoder."})
    language_steps: int = field(default=60, metadata={"help": "Training steps of the language model."})
    report: bool = field(default=True, metadata={"help": "Write report.html, a page about the run, in the end."})
    projector_type: str = field(default="mlp", metadata={"help": "The projector: linear, mlp or pool."})


def evaluate_on_scenes(folder: Path, data: Path, *options: str) -> dict:
    """Evaluates a checkpoint with `alignvlm/evaluation/evaluate_model.py --task scenes`: CIDEr of captions, accuracy of answers."""
    command = [str(folder), "--task", "scenes", "--data", str(data), "--use_cpu", "--attn_implementation", ATTENTION]
    return evaluate_checkpoint(parser().parse_args([*command, "--batch_size", "250", *options]))


def cider_by_prompt(result: dict) -> dict[str, float]:
    """Returns CIDEr of the `short` and of the `detailed` captions."""
    names = {CAPTION_PROMPT: "short", DETAILED_PROMPT: "detailed"}
    found = result["metrics"]["cider"]["by_prompt"]
    return {name: found[prompt]["cider"] for prompt, name in names.items()}


def accuracy_by_kind(result: dict, kinds: list[str]) -> dict[str, float]:
    """Returns the share of questions answered exactly, by kind of question; `kinds` holds the kind of each prediction."""
    hits: dict[str, list[bool]] = {}
    for prediction, kind in zip(result["predictions"], kinds):
        if kind in scenes.QUESTION_KINDS:
            hits.setdefault(kind, []).append(prediction["scores"]["correct"])
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


def run_stage_script(number: int, arguments: QuickstartArguments, output: Path) -> dict:
    """Runs `stage<number>.py` as the command line would, and returns the stage's entry in the run record."""
    command = [
        str(TRAINING / f"stage{number}.py"),
        *("--config", str(Path(arguments.recipe) / f"stage{number}.yaml")),
        *("--model", str(output / f"stage{number - 1}"), "--output_dir", str(output / f"stage{number}")),
        *("--seed", str(arguments.seed)),
        *("--save_on_signal", "false"),  # interrupted, the quickstart begins anew
    ]
    shutil.rmtree(output / f"stage{number}", ignore_errors=True)  # of an earlier quickstart
    print(f"\n== accelerate launch {' '.join(command)}", flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a fresh process
    with mock.patch.object(sys, "argv", command):
        runpy.run_path(command[0], run_name="__main__")
    return read_run_record(output / f"stage{number}")["stages"][-1]


def describe_in_a_fresh_process(folder: Path, picture: Path) -> str:
    """Loads the checkpoint in a process that cannot import this package, and lets it describe an image."""
    prompts = (CAPTION_PROMPT, DETAILED_PROMPT, "How many shapes are there?")
    command = [sys.executable, "-I", "-c", RELOAD, str(folder.resolve()), str(picture.resolve()), *prompts]
    result = subprocess.run(command, cwd=picture.parent, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"The checkpoint {folder} does not load in a fresh process:\n{result.stderr}")
    return result.stdout.strip()


def forecast(arguments: QuickstartArguments) -> str:
    """Estimates how long the quickstart will take here, from half a second of matrix products in its precision."""
    precision = choose_precision()
    flops = expected_flops(arguments)
    if flops is None:
        return "How long it takes is not known beforehand: the recipe has sources without a count."
    rate = matrix_rate(precision.dtype, seconds=0.5)
    minutes = round((FIXED_SECONDS + flops / (EFFICIENCY * rate)) / 60)
    return (
        f"About {minutes} minutes at the speed this machine has now: an estimate from {rate / 1e9:.0f} GFLOP/s in "
        f"{precision.name} ({precision.reason})."
    )


def expected_flops(arguments: QuickstartArguments) -> float | None:
    """Returns the FLOPs of the training steps: those of a step or record, as earlier runs counted them, times their number; None for a recipe
    with a source that states no `count`."""
    flops = arguments.vision_steps * VISION_STEP_FLOPS + arguments.language_steps * LANGUAGE_STEP_FLOPS
    for number, record_flops in STAGE_RECORD_FLOPS.items():
        recipe = read_yaml(Path(arguments.recipe) / f"stage{number}.yaml")
        counts = [source.get("count") for source in recipe["sources"]]
        if None in counts:
            return None
        flops += record_flops * sum(counts)
    return flops


def table(stages: list[dict], last: dict[str, float], blank: dict[str, float]) -> str:
    """Returns the report: a row per stage, then the metrics of the last stage, with the images and with blank ones."""
    lines = [
        f"{'stage':<6} {'trained':<30} {'seconds':>8} {'loss before':>12} {'loss after':>11} {'accuracy':>9} {'CIDEr short':>12} {'detailed':>9} "
        f"{'text perplexity':>15} {'MIR':>6}"
    ]
    for stage in stages:
        trained = ", ".join(stage["learning_rates"])
        lines.append(
            f"{stage['stage']:<6} {trained:<30} {stage['seconds']:>8.1f} {stage['eval_loss_before']:>12.3f} "
            f"{stage['eval_loss_after']:>11.3f} {stage['accuracy']:>9.3f} {stage['cider_by_prompt']['short']:>12.3f} {stage['cider_by_prompt']['detailed']:>9.3f} "
            f"{stage.get('text_perplexity_after', math.nan):>15.2f} {stage.get('mir_after', math.nan):>6.2f}"
        )
    lines.append(f"\n{'held-out scenes':<20} {'':>9} {'image blanked':>14}")
    for kind, value in last.items():
        lines.append(f"{kind:<20} {value:>9.3f} {blank[kind]:>14.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Runs the quickstart and returns what it writes to `summary.json`."""
    (arguments,) = parse_fields(sys.argv[1:] if argv is None else argv, QuickstartArguments)
    logging.set_verbosity_error()
    bars_in_a_terminal_only()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(forecast(arguments), flush=True)
    with FlopCounter() as counter:
        summary = run(arguments, output)
    summary["flops"] = counter.total
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"\n{summary['seconds']:.0f} seconds, {summary['flops'] / 1e12:.1f} TFLOP in {summary['precision']}. Checkpoints: {output}/stage0 ... stage4. "
        f"Summary: {output / 'summary.json'}"
    )
    if arguments.report and (report := report_if_possible(output)):
        print(f"To look at: {report}")
    return summary


def run(arguments: QuickstartArguments, output: Path) -> dict:
    """Runs backbones, stages, evaluation and reload, prints the report and returns the summary."""
    started = time.perf_counter()
    print("== Backbones", flush=True)
    vision, language = train_nano_backbones(
        output / "backbones", arguments.seed, arguments.vision_steps, arguments.language_steps
    )
    assemble(
        BackboneArguments(
            vision=str(vision),
            language=str(language),
            output_dir=str(output / "stage0"),
            projector_type=arguments.projector_type,
            # As llama.cpp resizes, for photos; a scene has the encoder's size.
            image_resample="bilinear" if arguments.projector_type == "pool" else None,
            seed=arguments.seed,
        )
    )
    backbone_seconds = time.perf_counter() - started

    test = scenes.make_scenes(arguments.test_scenes, "test", seed=arguments.seed)
    test_data = output / "scenes"
    test_data.mkdir(exist_ok=True)
    test.to_parquet(test_data / "test.parquet")
    stages = []
    for number in (1, 2, 3, 4):
        stage = run_stage_script(number, arguments, output)
        limit = [] if number == 4 else ["--limit", str(max(len(test) // 5, 1))]
        result = evaluate_on_scenes(output / f"stage{number}", test_data, *limit)
        metrics = result["metrics"]
        accuracy, cider = metrics["pathvqa_accuracy"]["accuracy"], metrics["cider"]["cider"]
        stages.append({**stage, "accuracy": accuracy, "cider": cider, "cider_by_prompt": cider_by_prompt(result)})
    kinds = [conversation["kind"] for record in test for conversation in record["conversations"]]
    blank_result = evaluate_on_scenes(output / "stage4", test_data, "--blank_image")
    last, blank = (
        {
            "CIDEr": found["metrics"]["cider"]["cider"],
            **{f"CIDEr, {name}": value for name, value in cider_by_prompt(found).items()},
            "accuracy": found["metrics"]["pathvqa_accuracy"]["accuracy"],
            **accuracy_by_kind(found, kinds),
        }
        for found in (result, blank_result)
    )

    picture = output / "picture.png"
    test[0]["images"][0].save(picture)
    description = describe_in_a_fresh_process(output / "stage4", picture)
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "backbone_seconds": round(backbone_seconds, 1),
        "accuracy": last["accuracy"],
        "accuracy_blank_image": blank["accuracy"],
        "accuracy_by_kind": {kind: last[kind] for kind in scenes.QUESTION_KINDS},
        "cider": last["CIDEr"],
        "cider_blank_image": blank["CIDEr"],
        "cider_by_prompt": cider_by_prompt(result),
        "questions": result["metrics"]["pathvqa_accuracy"]["count"],
        "captions": len(kinds) - result["metrics"]["pathvqa_accuracy"]["count"],
        "stages": stages,
        "description": description,
        "precision": stages[-1]["precision"],
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
    }
    print(f"\n{table(stages, last, blank)}")
    print(f"\nIn a process that cannot import this package, {output / 'stage4'} says of {picture}:\n{description}")
    return summary


if __name__ == "__main__":
    command_line.run(main)
