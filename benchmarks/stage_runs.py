"""Runs of stages and evaluations that a measurement consists of, each once: what is there is read, not done again."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from alignvlm.evaluation.evaluate_model import evaluate_checkpoint
from alignvlm.evaluation.evaluate_model import parser as evaluation_parser
from alignvlm.evaluation.precision import choose_precision
from alignvlm.stages.checkpoint import last_complete_checkpoint
from alignvlm.stages.stage import main as run_stage_of
from hub_upload.run_record import RUN_RECORD, read_run_record, write_json


ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 10  # every tenth image of DAQUAR and VQA-RAD


def prepare_photos(data: Path, folder: Path) -> None:
    """Writes the files that the recipe `smollm2_mobilenet` reads: the data's own, and DAQUAR and VQA-RAD divided by image.

    Raises:
        FileNotFoundError: if the data lack a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("flickr8k", "pathvqa", "text"):
        if not (data / name).is_dir():
            raise FileNotFoundError(f"{data} holds no folder {name!r}; see the docstring for what it must hold.")
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


def stage_values(recipe: Path, number: int, start: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The fields of a recipe's stage, from one checkpoint folder to another; a change to None leaves the field out."""
    values = yaml.safe_load((recipe / f"stage{number}.yaml").read_text())
    values |= {"model": str(start), "output_dir": str(folder), **changes}
    return {name: value for name, value in values.items() if value is not None}


def train(values: dict[str, Any], in_process: bool = False) -> dict[str, Any]:
    """Runs a stage of these fields by its script, or goes on with it; returns its entry in the run record.

    Args:
        in_process: without a process of its own, whose start takes longer than a small stage, and without a report.
    """
    folder = Path(values["output_dir"])
    if not (folder / RUN_RECORD).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = folder.with_name(folder.name + ".yaml")
        config.write_text(yaml.safe_dump(values, sort_keys=False))
        options = ["--config", str(config)]
        if last_complete_checkpoint(folder) is not None:
            options.append("--resume_from_checkpoint")
        script = str(ROOT / f"training/stage{values['stage']}.py")
        print(f"== {' '.join([script, *options])}", flush=True)
        if in_process:
            run_stage_of(options)
        else:
            subprocess.run([sys.executable, script, *options], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return read_run_record(folder)["stages"][-1]


def evaluate(checkpoint: Path, options: list[str], folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on the CPU in what it computes natively; `options` are those of `alignvlm evaluate`."""
    found = list(folder.glob("*.json"))
    if found:
        return json.loads(found[0].read_text())
    command = [str(checkpoint), *options, "--use_cpu", "--dtype", choose_precision().name]
    return evaluate_checkpoint(
        evaluation_parser().parse_args([*command, "--attn_implementation", "eager", "--output_dir", str(folder)])
    )


def machine() -> dict[str, str]:
    """The processor, where the system tells it, what it computes in, and the day."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{names[0]}, {len(names)} cores" if names else platform.processor(),
        "precision": str(choose_precision()),
        "date": f"{date.today()}",
    }


def update_results(file: Path, name: str, found: dict) -> None:
    """Writes the results of a script into a file of several scripts' results."""
    results = json.loads(file.read_text()) if file.is_file() else {}
    write_json(file, {**results, name: found})
