"""What `cache_features` saves: seconds a step with and without it, and that the losses are the same.

    python benchmarks/cache_features.py [--steps 6] [--batch_size 8] [--rounds 2] [--precision auto]
    python benchmarks/cache_features.py --rounds 0      # counts the work of a step, and times nothing

SigLIP-B/16-224 and a language model of SmolLM2-135M's dimensions, random weights; JPEGs of noise with one caption of 20 tokens each, another
image at every step. Each round trains without, then from kept features; the first time they are encoded before training, which is timed
apart. A step is the whole step, with decoding and collation.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/cache_features.py`

from alignvlm.evaluation.precision import PRECISIONS
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.stage import run_stage
from alignvlm.tools.plan import plan_stages
from benchmarks import models
from hub_upload.run_record import write_json


STAGES = {
    "projector": {"projector_learning_rate": 1e-4},
    "projector, language model": {"projector_learning_rate": 1e-4, "language_learning_rate": 1e-5},
}


def write_photos(folder: Path, count: int) -> Path:
    """Writes `count` JPEGs of noise, 320 x 240, and a jsonl file with a caption of each."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)).save(folder / f"{index}.jpg", quality=85)
        caption = " ".join(f"w{word}" for word in rng.integers(8, 1000, 19))
        messages = [{"role": "user", "content": "w9 w10 w11 w12"}, {"role": "assistant", "content": caption}]
        lines.append(json.dumps({"images": [f"{index}.jpg"], "messages": messages}))
    (folder / "photos.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "photos.jsonl"


def arguments_of(folder: Path, options: argparse.Namespace, rates: dict[str, float], cache: bool) -> StageArguments:
    """Makes the arguments of a stage with or without kept features."""
    AcceleratorState._reset_state(reset_partial_state=True)
    fields = {
        "model": folder / "model",
        "output_dir": folder / ("with" if cache else "without"),
        "sources": json.dumps([{"data": str(folder / "photos.jsonl")}]),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "precision": options.precision,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        **({"cache_features": True, "features_dir": folder / "features"} if cache else {}),
        **rates,
    }
    argv = [item for name, value in fields.items() for item in (f"--{name}", str(value))]
    return parse_fields(argv, StageArguments)[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--text_layers", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder, options.steps * options.batch_size)
        model, processor = models.alignvlm(
            *models.configs("b16-224+135m", options.vision_layers, options.text_layers), attn_implementation="sdpa"
        )
        save_checkpoint(model, processor, folder / "model", {"stages": []})
        del model
        print("| trains | without, TFLOP a step | with | ratio |\n|---|---|---|---|")
        for name, rates in STAGES.items():
            without, kept_work = (
                plan_stages([arguments_of(folder, options, rates, cache)], 1)[0].step_flops / 1e12
                for cache in (False, True)
            )
            print(f"| {name} | {without:.2f} | {kept_work:.2f} | {without / kept_work:.2f} |", flush=True)
        if not options.rounds:
            return
        for name, rates in STAGES.items():
            plain, kept = [], []
            for _ in range(options.rounds):
                plain.append(run_stage(arguments_of(folder, options, rates, cache=False)))
                kept.append(run_stage(arguments_of(folder, options, rates, cache=True)))
            steps = {
                key: statistics.median(entry["seconds"] / entry["steps"] for entry in runs)
                for key, runs in (("without", plain), ("with", kept))
            }
            first = kept[0]["cache_features"]
            results.append(
                {
                    "trains": name,
                    "precision": plain[0]["precision"],
                    "seconds_a_step": steps,
                    "ratio": steps["without"] / steps["with"],
                    "encoded": first["encoded"],
                    "seconds_to_encode": first["seconds"],
                    "seconds_to_find": kept[-1]["cache_features"]["seconds"],
                    "gigabytes": first["gigabytes"],
                    "same_losses": all(run["logged_losses"] == plain[0]["logged_losses"] for run in (*plain, *kept)),
                }
            )
    print("\n| trains | without, s a step | with | ratio | images encoded, s | features found, s | GB | same losses |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        step = row["seconds_a_step"]
        print(
            f"| {row['trains']} ({row['precision']}) | {step['without']:.2f} | {step['with']:.2f} | {row['ratio']:.2f} | {row['encoded']}, "
            f"{row['seconds_to_encode']:.1f} | {row['seconds_to_find']:.1f} | {row['gigabytes']} | {row['same_losses']} |"
        )
    if options.json:
        write_json(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "results": results})


if __name__ == "__main__":
    main()
