"""Training speed and memory: shared-image packing, the same without it, and transformers' LLaVA under TRL, in one run.

    python benchmarks/throughput.py [--device cuda] [--quick | --count_only]

The systems: `packed` rows, whose trunk holds all that prompts share; `image trunk`, the same with the trunk of old, which ended with
the image; `unpacked`, one annotation per row; `llava`. `--count_only` counts their work, in a minute or two, and times nothing.

Every system trains through its own trainer (`AlignVLMTrainer`; TRL's `SFTTrainer` with TRL's own collator for LLaVA) on the same
pictures and words, with the same backbones of random weights, the same precision (`--dtype`, by default what the device does
natively) and AdamW; a step is the whole step, collation and optimizer included. Each runs in a process of its own, in turns (`--rounds`); the median step counts.

FLOPs of a step are counted by `alignvlm.tools.plan.step_flops`, the head where it is applied: at labels, or, for LLaVA on a CPU, everywhere.
`bare` counts images and responses alone, without prompts and template: rows of that many tokens would be the least that any trunk leaves.
`flops_share` is the step's rate over the machine's: that of products of 4096 x 4096 matrices in that dtype on the same threads,
measured before and after every step, because the speed of a shared machine changes from minute to minute.

Memory is the highest resident (on CUDA: allocated) memory during a step beyond what is held at its beginning (weights and optimizer
states): activations, gradients and temporaries.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/throughput.py`

from alignvlm.evaluation.precision import DTYPES, PRECISIONS, choose_precision, is_native, warn_if_emulated


SYSTEMS = ("packed", "image trunk", "unpacked", "llava")
STAGES = {
    "all": {"vision": 1e-5, "projector": 1e-5, "language": 1e-5},
    "stage1": {"projector": 1e-5},
    "stage2": {"projector": 1e-5, "vision": 1e-5},
}


class MatrixProducts:
    """The machine's rate: products of square matrices in a dtype, which are kept from one measurement to the next."""

    def __init__(self, device: str, dtype: torch.dtype, size: int = 4096):
        self.device, self.flops = device, 2 * size**3
        self.a, self.b, self.out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def rate(self) -> float:
        """FLOP/s, the best of three products."""
        best = float("inf")
        for _ in range(3):
            _synchronize(self.device)
            started = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            _synchronize(self.device)
            best = min(best, time.perf_counter() - started)
        return self.flops / best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class MemoryPeak(threading.Thread):
    """Samples the resident memory of this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.process = 0, psutil.Process()

    def run(self):
        while True:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)


@dataclass
class System:
    """One system ready to train, and what a step of it is."""

    trainer: Any  # AlignVLMTrainer, or TRL's SFTTrainer
    modules: tuple[nn.Module, nn.Module, nn.Module]  # vision encoder, projector, language model
    annotations: int  # of a step
    options: dict

    def work(self, batch: dict) -> dict:
        """What a batch holds, and its counted work."""
        from alignvlm.rows.packing import IGNORED
        from alignvlm.tools.plan import step_flops
        from benchmarks.models import IMAGE_TOKEN_ID

        images = len(batch["pixel_values"])
        rows, length = batch["input_ids"].shape
        labels = int((batch["labels"][:, 1:] != IGNORED).sum())
        everywhere = self.options["system"] == "llava" and self.options["device"] == "cpu"
        head_tokens = batch["input_ids"].numel() if everywhere else labels
        trains = set(STAGES[self.options["stage"]])
        bare_length = (int((batch["input_ids"] == IMAGE_TOKEN_ID).sum()) + labels) / rows
        return {
            "annotations": self.annotations,
            "rows": rows,
            "length": length,
            "tokens": int(batch["attention_mask"].sum()),
            "flops": step_flops(self.modules, trains, images, rows, length, head_tokens),
            "bare_flops": step_flops(self.modules, trains, images, rows, bare_length, labels),
        }


def make_system(options: dict, folder: str) -> System:
    """Model, data and trainer of one system."""
    from datasets import Dataset, Features, Image, List, Value
    from trl import SFTTrainer

    from alignvlm.data.formats import annotations
    from alignvlm.data.scenes import RECORD_FEATURES
    from alignvlm.rows.collator import AlignVLMCollator
    from alignvlm.stages.arguments import TrainerArguments
    from alignvlm.stages.trainer import AlignVLMTrainer
    from benchmarks import models

    vision, text = models.configs(options["shape"], options["vision_layers"], options["text_layers"])
    made = models.records(
        *(options["workload"], options["images"], vision["image_size"], text["vocab_size"]),
        *(options["annotations"], options["prompt_tokens"], options["response_tokens"]),
    )
    rates = STAGES[options["stage"]]
    total = sum(len(r["annotations"]) for r in made)
    arguments = TrainerArguments(
        output_dir=folder,
        per_device_train_batch_size=total if options["system"] == "llava" else len(made),
        max_steps=options["steps"],
        bf16=options["dtype"] == "bf16",
        fp16=options["dtype"] == "fp16",
        activation_checkpointing=False,
        use_cpu=options["device"] == "cpu",
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=1e-5,
    )
    if options["system"] == "llava":
        attention = options["attn_implementation"]
        model, processor = models.llava(vision, text, "sdpa" if attention == "flex_attention" else attention)
        freeze = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
        for name, parameter in model.named_parameters():
            module = next((module for part, module in freeze.items() if part in name), "language")
            parameter.requires_grad_(module in rates)
        rows = [
            {
                "images": r["images"],
                "prompt": [{"role": "user", "content": a["prompt"]}],
                "completion": [{"role": "assistant", "content": a["response"]}],
            }
            for r in made
            for a in r["annotations"]
        ]
        message = List({"role": Value("string"), "content": Value("string")})
        features = Features({"images": List(Image()), "prompt": message, "completion": message})
        data = Dataset.from_list(rows, features=features)
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=processor)
    else:
        model, processor = models.alignvlm(vision, text, options["attn_implementation"])
        collator = models.ImageTrunkCollator if options["system"] == "image trunk" else AlignVLMCollator
        trainer = AlignVLMTrainer(
            model,
            learning_rates=rates,
            args=arguments,
            data_collator=collator(
                processor, shared_image=options["system"] != "unpacked", row_length=options["row_length"]
            ),
            train_dataset=Dataset.from_list(
                [annotations(record).to_row() for record in made], features=RECORD_FEATURES
            ),
            processing_class=processor,
        )
    return System(trainer, modules_of(model), total, options)


def modules_of(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Vision encoder, projector and language model of this package's model or LLaVA's."""
    projector = "multi_modal_projector" if hasattr(model.model, "multi_modal_projector") else "projector"
    return model.model.vision_tower, getattr(model.model, projector), model.model.language_model


def count(options: dict) -> dict:
    """The work of a step of one system, which is collated and not taken: the weights that count are never made."""
    from benchmarks import models

    with torch.device("meta"):
        make = models.llava if options["system"] == "llava" else models.alignvlm
        modules = modules_of(
            make(*models.configs(*(options[n] for n in ("shape", "vision_layers", "text_layers"))))[0]
        )
    with tempfile.TemporaryDirectory() as folder:
        system = make_system({**options, "vision_layers": 1, "text_layers": 1}, folder)
        batch = system.trainer.data_collator(list(system.trainer.train_dataset))
    return replace(system, modules=modules).work(batch)


def child(options: dict) -> dict:
    """Trains one system for a few steps; returns their seconds, work and peak memory."""
    from transformers import TrainerCallback

    device, peak, work = options["device"], MemoryPeak(), {}
    dtype = options["dtype"]
    machine = MatrixProducts(device, DTYPES[dtype], size=4096 if is_native(dtype, device)[0] else 256)
    seconds, rates_of_machine, memory = [], [], []

    class Clock(TrainerCallback):
        """Steps from the end of the one before, so that collation, which lies between two, counts."""

        def on_train_begin(self, *args, **kwargs):
            self.start()

        def on_step_begin(self, *args, **kwargs):
            _synchronize(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                self.held = torch.cuda.memory_allocated()
            else:
                peak.peak = self.held = peak.process.memory_info().rss

        def on_step_end(self, *args, **kwargs):
            _synchronize(device)
            seconds.append(time.perf_counter() - self.started)
            memory.append((torch.cuda.max_memory_allocated() if device == "cuda" else peak.peak) - self.held)
            self.start()

        def start(self):
            rates_of_machine.append(machine.rate())
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        system = make_system(options, folder)
        trainer = system.trainer
        collate = trainer.data_collator

        def recording(examples):
            batch = collate(examples)
            if not work:  # every step's batch is this one
                work.update(system.work(batch))
            return batch

        trainer.data_collator = recording
        trainer.add_callback(Clock())
        if device == "cpu":
            peak.start()
        trainer.train()
    return {
        "seconds": seconds,
        "machine_flops": [(before + after) / 2 for before, after in pairwise(rates_of_machine)],
        "peak_memory_bytes": max(memory[1:]),
        **work,
    }


def measure(options: dict, memory: bool = False) -> dict:
    """Runs `child` in a process of its own; for memory with an allocator that gives back what it frees."""
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    if memory and options["device"] == "cpu":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    elif options["device"] == "cpu":  # keeping freed memory spares every system the page faults of asking again
        environment |= {
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
            "MALLOC_TOP_PAD_": str(1 << 28),
        }
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{options} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().split("\n")[-1])


def mask_seconds(rows: int, length: int, device: str, image_tokens: int) -> float:
    """Seconds for the mask of a batch of packed rows: the median of ten."""
    from modeling_alignvlm import TokenLayout, dense_mask

    places = torch.arange(length, device=device).expand(rows, -1)
    layout = TokenLayout(
        image_ids=torch.where(places < image_tokens, 0, -1),
        record_ids=torch.zeros_like(places),
        branch_ids=torch.where(places < image_tokens, 0, 1 + (places - image_tokens) // 24),
        prompt_mask=places < image_tokens,
    )
    seconds = []
    for _ in range(10):
        _synchronize(device)
        started = time.perf_counter()
        dense_mask(layout, "image").contiguous()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# Title, key, and how a column is written; `machine` is its rate in GFLOP/s. A column that no row has is left out.
COLUMNS = (
    ("shape", "shape", "{:<15}"),
    ("workload", "workload", "{:<9}"),
    ("images", "images", "{}"),
    ("per image", "annotations_per_image", "{:.1f}"),
    ("prompt", "prompt_tokens", "{}"),
    ("response", "response_tokens", "{}"),
    ("trains", "stage", "{:<6}"),
    ("system", "system", "{:<11}"),
    ("rows", "rows", "{}"),
    ("length", "length", "{}"),
    ("tokens", "tokens", "{}"),
    ("s/step", "step_seconds", "{:.2f}"),
    ("annot./s", "annotations_per_s", "{:.2f}"),
    ("/ LLaVA's", "ratio_to_llava", "{:.2f}"),
    ("peak GB", "peak_memory_gb", "{:.2f}"),
    ("/ LLaVA's", "memory_to_llava", "{:.2f}"),
    ("machine", "machine_gflops", "{:.0f}"),
    ("share", "flops_share", "{:.1%}"),
    ("bare TFLOP", "bare_tflop", "{:.2f}"),
    ("TFLOP", "tflop", "{:.2f}"),
    ("/ image trunk's", "flops_to_image_trunk", "{:.3f}"),
    ("LLaVA's /", "llava_flops_to", "{:.2f}"),
)


def table(rows: list[dict]) -> str:
    """The measurements, a line each."""
    columns = [
        [title, *("-" if row.get(key) is None else form.format(row[key]) for row in rows)]
        for title, key, form in COLUMNS
        if any(row.get(key) is not None for row in rows)
    ]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in zip(*columns))


def described(options: dict, found: dict) -> dict:
    """What a comparison is of, and the counted work of one of its systems."""
    from benchmarks.models import WORKLOADS

    _, prompt_tokens, response_tokens = WORKLOADS[options["workload"]]
    names = ("shape", "workload", "stage", "vision_layers", "text_layers", "dtype", "images", "system")
    return {
        **{name: options[name] for name in names},
        "prompt_tokens": options["prompt_tokens"] or prompt_tokens,
        "response_tokens": options["response_tokens"] or response_tokens,
        "annotations_per_image": found["annotations"] / options["images"],
        **{name: found[name] for name in ("rows", "length", "tokens", "flops")},
        "tflop": found["flops"] / 1e12,
        "bare_tflop": found["bare_flops"] / 1e12,
    }


def add_ratios(rows: list[dict]) -> list[dict]:
    """Work, speed and memory of each system against those of the old trunk and of LLaVA, where these were compared."""
    by_system = {row["system"]: row for row in rows}
    old, llava = by_system.get("image trunk"), by_system.get("llava")
    for row in rows:
        row["flops_to_image_trunk"] = old and row["flops"] / old["flops"]
        row["llava_flops_to"] = llava and llava["flops"] / row["flops"]
        timed = llava and "step_seconds" in llava
        row["ratio_to_llava"] = row["annotations_per_s"] / llava["annotations_per_s"] if timed else None
        row["memory_to_llava"] = row["peak_memory_bytes"] / llava["peak_memory_bytes"] if timed else None
    return rows


def compare(options: dict, systems: tuple[str, ...], rounds: int) -> list[dict]:
    """The rows of one comparison: the systems take turns, and each one's median step counts."""
    steps: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
    found = {}
    for _ in range(rounds):
        for system in systems:
            found[system] = measure({**options, "system": system})
            steps[system] += zip(found[system]["seconds"][2:], found[system]["machine_flops"][2:])  # two warm up
    rows = []
    for system in systems:
        step = statistics.median(seconds for seconds, _ in steps[system])
        memory = measure({**options, "system": system, "steps": 2}, memory=True)["peak_memory_bytes"]
        machine = statistics.median(rate for _, rate in steps[system])
        rows.append(
            {
                **described({**options, "system": system}, found[system]),
                "annotations_per_s": found[system]["annotations"] / step,
                "tokens_per_s": found[system]["tokens"] / step,
                "step_seconds": step,
                "peak_memory_bytes": memory,
                "peak_memory_gb": memory / 1e9,
                "flops_share": statistics.median(found[system]["flops"] / (s * rate) for s, rate in steps[system]),
                "machine_gflops": machine / 1e9,
                "steps": [seconds for seconds, _ in steps[system]],
            }
        )
    return add_ratios(rows)


def compare_counts(options: dict, systems: tuple[str, ...]) -> list[dict]:
    """The rows of one comparison without timing."""
    chosen = [{**options, "system": system} for system in systems]
    return add_ratios([described(each, count(each)) for each in chosen])


def picture(rows: list[dict], systems: int, path: Path) -> None:
    """Bars of the first comparison, of so many systems; a packed step's seconds as it grows in one direction, where that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = rows[:systems]
    figure, ((speed, memory, work), growths) = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    names = [row["system"] for row in compared]
    speed.bar(names, [row["annotations_per_s"] for row in compared])
    speed.set_title("annotations per second")
    memory.bar(names, [row["peak_memory_bytes"] / 1e9 for row in compared])
    memory.set_title("peak memory of a step, GB")
    work.bar(names, [row["flops"] / 1e12 / row["images"] for row in compared])
    work.set_title("TFLOP per image")
    # Each growth varies one number and holds the others at those of the first comparison.
    varied = {
        "annotations_per_image": "annotations per image",
        "images": "images a step",
        "response_tokens": "tokens a response",
    }
    fixed = ("shape", "workload", "stage", "system", "prompt_tokens", *varied)
    for axes, (name, label) in zip(growths, varied.items()):
        line = [row for row in rows if all(row[other] == rows[0][other] for other in fixed if other != name)]
        line.sort(key=lambda row: row[name])
        axes.plot([row[name] for row in line], [row["step_seconds"] for row in line], marker="o")
        axes.set(title="seconds a step, packed", xlabel=label, xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=PRECISIONS, help="auto: what the device does natively.")
    parser.add_argument(
        "--attn_implementation",
        help="By default sdpa on a GPU, and eager, the faster, on a CPU. LLaVA gets the same, but sdpa for flex_attention.",
    )
    parser.add_argument("--row_length", type=int, help="Rows of several records, for flex_attention.")
    parser.add_argument("--images", type=int, default=6, help="Pictures per step.")
    parser.add_argument("--steps", type=int, default=4, help="Per process; the first two are not counted.")
    parser.add_argument(
        "--rounds", type=int, default=3, help="How often the systems take turns, where targets are set."
    )
    parser.add_argument("--quick", action="store_true", help="Only the first comparison.")
    parser.add_argument(
        "--count_only", action="store_true", help="Count the work of a step of all systems; time nothing."
    )
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, help="Of the first comparison."
    )
    parser.add_argument("--large", action="store_true", help="The 729-token shape as well.")
    parser.add_argument("--vision_layers", type=int, default=9, help="Of the large shape, whose encoder has 27.")
    parser.add_argument("--text_layers", type=int, default=8, help="Of the large shape, whose language model has 24.")
    parser.add_argument("--output", default="out/bench/throughput.json")
    arguments = parser.parse_args()
    precision = choose_precision(arguments.dtype, arguments.device)
    warn_if_emulated(precision, arguments.device)
    print(f"Precision: {precision}")
    arguments.dtype = precision.name
    arguments.attn_implementation = arguments.attn_implementation or ("eager" if arguments.device == "cpu" else "sdpa")
    options = {
        "shape": "b16-224+135m",
        "workload": "captions",
        "stage": "all",
        "annotations": None,
        "prompt_tokens": None,
        "response_tokens": None,
        "vision_layers": None,
        "text_layers": None,
        **{
            name: getattr(arguments, name)
            for name in ("device", "dtype", "attn_implementation", "row_length", "images", "steps")
        },
    }
    systems, all_but_unpacked = tuple(arguments.systems), ("packed", "image trunk", "llava")
    both = ("packed", "llava")
    comparisons = [(options, systems, arguments.rounds)]
    if arguments.count_only:
        # 6 tokens: "Describe the picture in detail."; 11: LLaVA-1.5's "Provide a one-sentence caption for the provided image."
        comparisons += [({**options, "prompt_tokens": tokens}, all_but_unpacked, 1) for tokens in (6, 7, 11)]
    if not arguments.quick:
        comparisons += [({**options, "workload": "questions", "images": 5}, all_but_unpacked, 1)]
        comparisons += [({**options, "stage": stage}, both, 1) for stage in ("stage1", "stage2")]
    if not arguments.quick and not arguments.count_only:
        growths = {"annotations": (1, 2, 10), "images": (1, 3, 12), "response_tokens": (10, 40, 80)}
        comparisons += [
            ({**options, name: value}, ("packed",), 1) for name, values in growths.items() for value in values
        ]
    if arguments.large:
        layers = {"vision_layers": arguments.vision_layers, "text_layers": arguments.text_layers}
        among = all_but_unpacked if arguments.count_only else both
        comparisons.append(({**options, "shape": "so400m-384+0.5b", "images": 1, **layers}, among, arguments.rounds))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for chosen, among, rounds in comparisons:
        found = compare_counts(chosen, among) if arguments.count_only else compare(chosen, among, rounds)
        rows += found
        print(table(found), flush=True)
        output.write_text(json.dumps(rows, indent=2) + "\n")  # each time, so that a failure later loses nothing
    if not arguments.count_only:
        first = rows[0]
        seconds = mask_seconds(first["rows"], first["length"], arguments.device, image_tokens=196)
        print(
            f"Building the mask of a step: {seconds * 1000:.1f} ms, {seconds / first['step_seconds']:.2%} of the step"
        )
        picture(rows, len(systems), output.with_suffix(".png"))
        print(f"\n{table(rows)}\n{output.with_suffix('.png')}")
    print(output)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
