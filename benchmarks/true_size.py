"""The 0.91B recipe at true size: every stage takes two steps, from what the last one wrote; its peak memory against the plan.

    python benchmarks/true_size.py --configs FOLDER --tokenizer FOLDER [--vision NAME --language NAME]

`--configs` holds folders with the configurations of the backbones, which get random weights. Recipes are those of
`training/recipes/alignvlm_900m`, but for small batches, `use_cpu`, and drawn pictures as data. Memory is the largest resident
memory of the stage's process while it trains, sampled from outside; frozen weights are mapped files there, and count.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/true_size.py`

from alignvlm.evaluation.precision import PRECISIONS
from alignvlm.stages.arguments import StageArguments
from alignvlm.tools.plan import plan_stages


ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    {"name": "scenes", "annotations": ["detailed_caption", "questions"], "count": 16, "image_size": 384},
    {"name": "scene_texts", "count": 4},
]


def make_backbone(config_folder: Path, output: Path, is_language: bool) -> Path:
    """Random weights for a configuration."""
    if output.is_dir():
        return output
    set_seed(0)
    config = AutoConfig.from_pretrained(config_folder)
    if is_language:
        model = AutoModelForCausalLM.from_config(config)
    else:
        config = getattr(config, "vision_config", config)
        config.vision_use_head = False
        model = AutoModel.from_config(config)
    model.save_pretrained(output)
    return output


def overrides(stage: int, output: Path, batch_size: int, precision: str) -> list[str]:
    """What differs from the recipe."""
    return [
        *("--model", str(output / f"stage{stage - 1}"), "--output_dir", str(output / f"stage{stage}")),
        *("--sources", json.dumps(SOURCES), "--per_device_train_batch_size", str(batch_size)),
        *("--gradient_accumulation_steps", "1", "--max_steps", "2", "--use_cpu", "true", "--save_strategy", "no"),
        *("--attn_implementation", "eager", "--dataloader_num_workers", "0", "--logging_steps", "1"),
        *("--precision", precision),
    ]


def run(stage: int, recipe: Path, options: list[str]) -> dict:
    """Runs a stage in a process of its own; its losses, seconds and peak memory while it trains."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    # An allocator that gives back what it frees, so that memory in use is what is counted.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, f"training/stage{stage}.py", "--config", str(recipe), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = {"trains": False, "bytes": 0}

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.Error:
                return
            if peak["trains"]:
                peak["bytes"] = max(peak["bytes"], memory.rss)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"Stage {stage}:"):
            peak["trains"] = True
        if "  trained for " in line:
            peak["trains"] = False
    if process.wait() != 0:
        raise RuntimeError(f"stage {stage} failed:\n{''.join(lines[-40:])}")
    output = Path(options[options.index("--output_dir") + 1])
    entry = json.loads((output / "alignvlm_run.json").read_text())["stages"][-1]
    return {
        "peak_bytes": peak["bytes"],
        "precision": entry["precision"],
        "losses": entry["logged_losses"],
        "seconds": entry["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", type=Path, required=True, help="Folder of folders with a config.json each.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vision", default="siglip2-so400m-patch14-384")
    parser.add_argument("--language", default="qwen2.5-0.5b")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=PRECISIONS, help="auto: what the processor does natively.")
    parser.add_argument("--folder", type=Path, default=Path("out/true_size"), help="Needs 20 GB.")
    parser.add_argument("--output", default="out/bench/true_size.json")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    language = make_backbone(arguments.configs / arguments.language, folder / "language", is_language=True)
    vision = make_backbone(arguments.configs / arguments.vision, folder / "vision", is_language=False)
    shutil.copy(arguments.configs / arguments.vision / "preprocessor_config.json", vision)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(language)
    assemble = ["-m", "alignvlm.stages.backbones", "--vision", vision, "--language", language]
    subprocess.run([sys.executable, *map(str, assemble), "--output_dir", str(folder / "stage0")], cwd=ROOT, check=True)

    recipes = [ROOT / f"training/recipes/alignvlm_900m/stage{stage}.yaml" for stage in (1, 2, 3, 4)]
    options = [overrides(stage, folder, arguments.batch_size, arguments.dtype) for stage in (1, 2, 3, 4)]
    stages = [
        TrlParser(StageArguments).parse_args_and_config(["--config", str(recipe), *own])[0]
        for recipe, own in zip(recipes, options)
    ]
    plans = plan_stages(stages, processes=1)
    rows = []
    print(
        f"{torch.get_num_threads()} threads\n{'stage':>5} {'trains':>9} {'planned GB':>11} {'measured GB':>12} {'plan/measured':>14} {'s a step':>9}  losses"
    )
    for stage, (recipe, own, plan) in enumerate(zip(recipes, options, plans), 1):
        found = run(stage, recipe, own)
        planned = sum(plan.memory.values())
        trained = sum(counts[0] for counts in plan.parameters.values())
        rows.append({"stage": stage, "trained_parameters": trained, "planned_bytes": planned, **found})
        rows[-1]["planned_parts"] = plan.memory
        print(
            f"{stage:>5} {trained / 1e6:>8.1f}M {planned / 1e9:>11.2f} {found['peak_bytes'] / 1e9:>12.2f} "
            f"{planned / found['peak_bytes']:>14.2f} {found['seconds'] / 2:>9.1f}  {', '.join(f'{loss:.2f}' for loss in found['losses'])}",
            flush=True,
        )
        if stage > 1:
            shutil.rmtree(folder / f"stage{stage - 1}")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")
    print(output)


if __name__ == "__main__":
    main()
