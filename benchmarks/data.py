"""Whether data keep ahead of the model: records per second of a data loader's workers, and how long a training step waits.

    python benchmarks/data.py --data FOLDER/captions.jsonl

A record is a photo with its captions, decoded, resized, tokenised and laid out as a row by the collator. The waiting is that of
`AlignVLMTrainer` on the nano model (eager, all modules, 16 records a step) with one worker: the seconds its loop spends asking
for the next batch, as a share of all its seconds after the first step. Without `--data`, drawn pictures of 500 x 375 pixels saved as
JPEG stand in for photos.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/data.py`

from alignvlm.data import scenes
from alignvlm.data.mixture import load_mixture
from alignvlm.evaluation.precision import PRECISIONS, Precision, choose_precision, warn_if_emulated
from alignvlm.quickstart.nano import train_nano_backbones
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import TrainerArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.trainer import AlignVLMTrainer


def drawn_photos(folder: Path, count: int) -> Path:
    """`count` drawn pictures as JPEG files with five captions each, and the jsonl file that names them."""
    lines = []
    for index, record in enumerate(scenes.make_scenes(count, annotations=("detailed_caption",), image_size=500)):
        record["images"][0].crop((0, 0, 500, 375)).save(folder / f"{index}.jpg", quality=90)
        captions = [record["conversations"][0]["responses"][0]] * 5
        lines.append(json.dumps({"image": f"{index}.jpg", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def records_per_second(mixture, collator: AlignVLMCollator, workers: int, batches: int, batch_size: int = 16) -> float:
    """Of all workers together, their start not counted."""
    loader = DataLoader(
        mixture.dataset, batch_size=batch_size, sampler=mixture.sampler, num_workers=workers, collate_fn=collator
    )
    iterator = iter(loader)
    next(iterator)
    started = time.perf_counter()
    count = sum(1 for _ in islice(iterator, batches))
    return count * batch_size / (time.perf_counter() - started)


class WaitingTrainer(AlignVLMTrainer):
    """Adds up the seconds spent asking for batches and all seconds, from the second step on."""

    waited = 0.0
    began = None

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        result = super().get_batch_samples(*args, **kwargs)
        if self.state.global_step >= 1:
            self.began = self.began or started
            self.waited += time.perf_counter() - started
        return result


def waiting_share(
    model, processor, mixture, collator: AlignVLMCollator, workers: int, steps: int, precision: Precision
) -> tuple[float, float]:
    """The share of a training step spent waiting, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainerArguments(
            output_dir=folder,
            per_device_train_batch_size=16,
            max_steps=steps,
            bf16=precision.name == "bf16",
            fp16=precision.name == "fp16",
            activation_checkpointing=False,
            use_cpu=True,
            max_length=None,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_num_workers=workers,
        )
        trainer = WaitingTrainer(
            model,
            learning_rates=dict.fromkeys(("vision", "projector", "language"), 1e-4),
            sampler=mixture.sampler,
            args=arguments,
            data_collator=collator,
            train_dataset=mixture.dataset,
            processing_class=processor,
        )
        trainer.train()
        seconds = time.perf_counter() - trainer.began
    return trainer.waited / seconds, seconds / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="A jsonl file of photos and captions.")
    parser.add_argument("--batches", type=int, default=30, help="Of 16 records, for each number of workers.")
    parser.add_argument("--steps", type=int, default=40, help="Of training.")
    parser.add_argument(
        "--dtype", default="auto", choices=PRECISIONS, help="Of training; auto: what the processor does natively."
    )
    parser.add_argument("--output", default="out/bench/data.json")
    arguments = parser.parse_args()
    precision = choose_precision(arguments.dtype)
    warn_if_emulated(precision)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = Path(arguments.data) if arguments.data else drawn_photos(folder, 16 * (arguments.batches + 2))
        vision, language = train_nano_backbones(folder / "backbones", seed=0, vision_steps=1, language_steps=1)
        model, processor = assemble(
            BackboneArguments(vision=str(vision), language=str(language), output_dir=str(folder / "model"))
        )
        model.set_attn_implementation("eager")
        rows = []
        source = [{"name": "local", "data": str(data.resolve())}]
        print(
            f"{data.name}: {torch.get_num_threads()} threads\n{'picture':>8} {'workers':>8} {'records/s':>10} {'per worker':>10}"
        )
        for side in (model.config.vision_config.image_size, 224, 384):
            processor.image_processor = SiglipImageProcessorPil(size={"height": side, "width": side})
            mixture = load_mixture(source, AlignVLMCollator(processor).token_counts)
            for workers in (1, 2):
                rate = records_per_second(mixture, AlignVLMCollator(processor), workers, arguments.batches)
                rows.append({"image_size": side, "workers": workers, "records_per_s": rate})
                print(f"{side:>8} {workers:>8} {rate:>10.1f} {rate / workers:>10.1f}")
        side = model.config.vision_config.image_size
        processor.image_processor = SiglipImageProcessorPil(size={"height": side, "width": side})
        collator = AlignVLMCollator(processor)
        for workers in (0, 1):
            waited, seconds = waiting_share(
                model,
                processor,
                load_mixture(source, collator.token_counts),
                collator,
                workers,
                arguments.steps,
                precision,
            )
            rows.append(
                {"workers": workers, "dtype": precision.name, "waiting_share": waited, "step_seconds": seconds}
            )
            print(
                f"A nano step in {precision.name} with {workers} workers: {seconds:.3f} s, {waited:.2%} of it spent waiting for data"
            )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")
    print(output)


if __name__ == "__main__":
    main()
