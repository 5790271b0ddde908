"""Training speed and memory: shared-image packing, the same without it, and transformers' LLaVA under TRL, in one run.

    python benchmarks/throughput.py [--device cuda] [--quick]

Every system trains through its own trainer (`AlignVLMTrainer`; TRL's `SFTTrainer` with TRL's own collator for LLaVA) on the same
pictures and words, with the same backbones of random weights, the same precision (`--dtype`, by default what the device does
natively) and AdamW; a step is the whole step, collation and optimizer included. Each runs in a process of its own, in turns (`--rounds`); the median step counts.

FLOPs are counted by `alignvlm.tools.plan.step_flops`, the head where it is applied: at labels, or, for LLaVA on a CPU, everywhere.
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
from itertools import pairwise
from pathlib import Path

import psutil
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/throughput.py`

from alignvlm.evaluation.precision import DTYPES, PRECISIONS, choose_precision, is_native, warn_if_emulated


SYSTEMS = ("packed", "unpacked", "llava")
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


def child(options: dict) -> dict:
    """Trains one system for a few steps; returns their seconds, shapes and peak memory."""
    from datasets import Dataset, Features, Image, List, Value
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import SFTTrainer

    from alignvlm.data.formats import annotations
    from alignvlm.data.scenes import RECORD_FEATURES
    from alignvlm.rows.collator import AlignVLMCollator
    from alignvlm.rows.packing import IGNORED
    from alignvlm.stages.arguments import TrainerArguments
    from alignvlm.stages.trainer import AlignVLMTrainer
    from alignvlm.tools.plan import step_flops
    from benchmarks import models

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vision, text = models.configs(options["shape"], options["vision_layers"], options["text_layers"])
    made = models.records(
        *(options["workload"], options["images"], vision["image_size"], text["vocab_size"]),
        *(options["annotations"], options["response_tokens"]),
    )
    rates = STAGES[options["stage"]]
    device, peak, shapes = options["device"], MemoryPeak(), {}
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
        per_step = len(made) if options["system"] != "llava" else sum(len(r["annotations"]) for r in made)
        arguments = TrainerArguments(
            output_dir=folder,
            per_device_train_batch_size=per_step,
            max_steps=options["steps"],
            bf16=options["dtype"] == "bf16",
            fp16=options["dtype"] == "fp16",
            activation_checkpointing=False,
            use_cpu=device == "cpu",
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
            trainer = SFTTrainer(
                model, arguments, train_dataset=Dataset.from_list(rows, features=features), processing_class=processor
            )
        else:
            model, processor = models.alignvlm(vision, text, options["attn_implementation"])
            rows = [annotations(record).to_row() for record in made]
            trainer = AlignVLMTrainer(
                model,
                learning_rates=rates,
                args=arguments,
                data_collator=AlignVLMCollator(
                    processor, shared_image=options["system"] == "packed", row_length=options["row_length"]
                ),
                train_dataset=Dataset.from_list(rows, features=RECORD_FEATURES),
                processing_class=processor,
            )
        projector = model.model.multi_modal_projector if options["system"] == "llava" else model.model.projector
        modules = (model.model.vision_tower, projector, model.model.language_model)
        collate = trainer.data_collator

        def recording(examples):
            batch = collate(examples)
            shapes["rows"], shapes["length"] = batch["input_ids"].shape
            shapes["images"] = len(batch["pixel_values"])
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            everywhere = options["system"] == "llava" and device == "cpu"
            shapes["head_tokens"] = batch["input_ids"].numel() if everywhere else labels
            shapes["tokens"] = int(batch["attention_mask"].sum())
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
        "annotations": sum(len(r["annotations"]) for r in made),
        "response_tokens": options["response_tokens"] or models.WORKLOADS[options["workload"]][2],
        "flops": step_flops(modules, set(rates), *(shapes[n] for n in ("images", "rows", "length", "head_tokens"))),
        **shapes,
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


def table(rows: list[dict]) -> str:
    """The measurements, a line each; `machine` is its rate in GFLOP/s."""
    lines = [
        f"{'shape':<16} {'workload':<10} {'per image':>9} {'trains':<7} {'system':<9} {'annot./s':>9} {'tokens/s':>9} "
        f"{'peak GB':>8} {'TFLOP':>7} {'machine':>7} {'share':>6} {'x LLaVA':>8} {'memory':>7}"
    ]
    for row in rows:
        ratio, memory = (f"{row[name]:.2f}" if row[name] else "-" for name in ("ratio_to_llava", "memory_to_llava"))
        lines.append(
            f"{row['shape']:<16} {row['workload']:<10} {row['annotations_per_image']:>9.1f} {row['stage']:<7} {row['system']:<9} "
            f"{row['annotations_per_s']:>9.2f} {row['tokens_per_s']:>9.0f} {row['peak_memory_bytes'] / 1e9:>8.2f} "
            f"{row['flops'] / 1e12:>7.2f} {row['machine_flops_per_s'] / 1e9:>7.0f} {row['flops_share']:>6.1%} {ratio:>8} {memory:>7}"
        )
    return "\n".join(lines)


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
        rows.append(
            {
                **{
                    name: options[name]
                    for name in ("shape", "workload", "stage", "vision_layers", "text_layers", "dtype", "images")
                },
                "system": system,
                "response_tokens": found[system]["response_tokens"],
                "annotations_per_image": found[system]["annotations"] / options["images"],
                "annotations_per_s": found[system]["annotations"] / step,
                "tokens_per_s": found[system]["tokens"] / step,
                "step_seconds": step,
                "peak_memory_bytes": memory,
                "flops": found[system]["flops"],
                "flops_share": statistics.median(found[system]["flops"] / (s * rate) for s, rate in steps[system]),
                "machine_flops_per_s": statistics.median(rate for _, rate in steps[system]),
                "steps": [seconds for seconds, _ in steps[system]],
                "rows": found[system]["rows"],
                "length": found[system]["length"],
            }
        )
    llava = next((row for row in rows if row["system"] == "llava"), None)
    for row in rows:
        row["ratio_to_llava"] = llava and row["annotations_per_s"] / llava["annotations_per_s"]
        row["memory_to_llava"] = llava and row["peak_memory_bytes"] / llava["peak_memory_bytes"]
    return rows


def picture(rows: list[dict], path: Path) -> None:
    """Bars of the first comparison; a packed step's seconds as it grows in one direction, where that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = rows[: len(SYSTEMS)]
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
    fixed = ("shape", "workload", "stage", "system", *varied)
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
        "response_tokens": None,
        "vision_layers": None,
        "text_layers": None,
        **{
            name: getattr(arguments, name)
            for name in ("device", "dtype", "attn_implementation", "row_length", "images", "steps")
        },
    }
    both = ("packed", "llava")
    comparisons = [(options, SYSTEMS, arguments.rounds)]
    if not arguments.quick:
        comparisons += [({**options, "workload": "questions", "images": 5}, both, 1)]
        comparisons += [({**options, "stage": stage}, both, 1) for stage in ("stage1", "stage2")]
        growths = {"annotations": (1, 2, 10), "images": (1, 3, 12), "response_tokens": (10, 40, 80)}
        comparisons += [
            ({**options, name: value}, ("packed",), 1) for name, values in growths.items() for value in values
        ]
    if arguments.large:
        layers = {"vision_layers": arguments.vision_layers, "text_layers": arguments.text_layers}
        comparisons.append(({**options, "shape": "so400m-384+0.5b", "images": 1, **layers}, both, arguments.rounds))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for chosen, systems, rounds in comparisons:
        rows += compare(chosen, systems, rounds)
        print(table(rows[-len(systems) :]), flush=True)
        output.write_text(json.dumps(rows, indent=2) + "\n")  # each time, so that a failure later loses nothing
    first = rows[0]
    seconds = mask_seconds(first["rows"], first["length"], arguments.device, image_tokens=196)
    print(f"Building the mask of a step: {seconds * 1000:.1f} ms, {seconds / first['step_seconds']:.2%} of the step")
    picture(rows, output.with_suffix(".png"))
    print(f"\n{table(rows)}\n{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
