"""Checkpoints on all tasks whose data are at hand, with all controls, by one command each, and one table each.

    python benchmarks/all_tasks.py out/real_photos/stage3 out/real_photos/stage4 --data FOLDER

FOLDER is laid out as for `benchmarks/real_photos.py`, and what it holds out is asked here too: Flickr8k's validation photos, every tenth image
of DAQUAR and VQA-RAD, 300 images of PathVQA's training split, and the perplexity of WikiText-2's validation text. What is there is not
asked again: start the same command to go on, with any number of `--processes`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/all_tasks.py`

from alignvlm.evaluation.precision import choose_precision
from benchmarks.stage_runs import ROOT, machine, prepare_photos, update_results


# name: (the file below FOLDER, its split)
SETS = {
    "flickr8k": ("flickr8k/captions.jsonl", "val"),
    "daquar": ("daquar/test.jsonl", "test"),
    "pathvqa_dev": ("pathvqa/dev.jsonl", None),
    "vqa_rad_images": ("vqa_rad/test.jsonl", "test"),
}
TASKS = ",".join([*(f"{name}=local" for name in SETS), "wikitext2=text_perplexity"])


def prepare(data: Path, folder: Path) -> None:
    """Writes a folder for each task, as `--data_dir` wants them: `test.jsonl`, and a link to the images."""
    prepare_photos(data, folder / "photos")
    for name, (file, split) in SETS.items():
        source = folder / "photos" / file
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        chosen = [{**row, "split": "test"} for row in rows if split is None or row["split"] == split]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        if not (folder / name / "images").exists():
            (folder / name / "images").symlink_to((source.parent / "images").resolve())
    if not (folder / "wikitext2.txt").exists():
        (folder / "wikitext2.txt").symlink_to((data / "text/wikitext2.valid.txt").resolve())


def evaluate(checkpoint: Path, folder: Path, output: Path, processes: int, limit: int | None) -> str:
    """Runs `alignvlm evaluate` on all tasks, or goes on with it; returns its table."""
    module = ["-m", "alignvlm.evaluation.evaluate_model"]
    if processes > 1:
        config = str(ROOT / "training/accelerate/cpu_2_processes.yaml")
        launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
        module = [*launch, *module]
    options = ["--tasks", TASKS, "--data_dir", str(folder), "--controls", "--output_dir", str(output)]
    options += ["--prompt", "Write a short caption.", "--max_new_tokens", "24", "--use_cpu"]
    options += ["--dtype", choose_precision().name, "--attn_implementation", "eager"]
    options += ["--limit", str(limit)] if limit else []
    command = [sys.executable, *module, str(checkpoint), *options]
    print(f"== {' '.join(command[1:])}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return (output / "tasks.md").read_text()


def tables(found: dict) -> str:
    """Returns the results as Markdown: a table for each checkpoint."""
    limit = f"At most {found['limit']} images of each task. " if found["limit"] else ""
    return limit + "\n\n".join(f"`{name}`:\n\n{text.strip()}" for name, text in found["tables"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="Checkpoints' folders.")
    parser.add_argument("--data", type=Path, default=os.environ.get("ALIGNVLM_TEST_DATA"), help="See the docstring.")
    parser.add_argument("--output", type=Path, default=Path("out/all_tasks"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=int, help="At most this number of images and windows of text per task.")
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data names the folder of photos and questions (or ALIGNVLM_TEST_DATA does).")
    output, texts = arguments.output.resolve(), {}
    prepare(Path(arguments.data), output / "data")
    for checkpoint in arguments.checkpoints:
        started, name = time.perf_counter(), checkpoint.resolve().name
        texts[name] = evaluate(checkpoint, output / "data", output / name, arguments.processes, arguments.limit)
        found = {"machine": machine(), "limit": arguments.limit, "tables": texts}
        update_results(arguments.results or output / "results.json", "all_tasks", found)
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes in this start.", flush=True)


if __name__ == "__main__":
    main()
