"""Rows of several records: how full they are for lengths like those of known data sets, and what they cost and save in time.

    python benchmarks/rows.py                                                  # how full: no model, seconds
    python benchmarks/rows.py --timed [--device cuda --dtype bf16 --kernels sdpa flex_attention]

How full: 16,384 records of each of `SHAPES`, filled window by window as a stage with `row_length` does. `fill` is the share of `row_length`
tokens that rows hold, `padding` what two rows a batch are padded by, `unpacked` the padding of batches of 8 records, one a row. `dense` and
`skipping` are the language model's work on filled rows (`--model`; products of weights and attention, counted) over that on unpacked ones, for
kernels that compute masked pairs of tokens (eager, SDPA) and for one that skips them (flex attention).

Timed: the same records, with one a row in batches of `--batch` and in filled rows, one at a time, through each attention kernel: seconds of
forward and backward passes (`--forward_only` where a kernel has no backward pass, as flex attention on a CPU), the best of `--rounds` in
turns, and tokens per second, padding not counted. Random weights in true dimensions.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/rows.py`

from alignvlm.data.record import Record, one_turn
from alignvlm.evaluation.precision import DTYPES, PRECISIONS, choose_precision
from alignvlm.rows import filling
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.filling import Pieces, fill
from benchmarks import models


BEFORE_IMAGE, BEHIND_PROMPT = 24, 5  # tokens of the template: see benchmarks/models.py
RECORDS = 16384
Exchange = tuple[int, int]  # tokens of a prompt, and of a response without the one that ends it


@dataclass(frozen=True)
class Shape:
    """The lengths of a data set's records.

    Args:
        draw: draws the number of images and the exchanges of a record.
        image_tokens: of one image.
        shared_prompt: whether all exchanges of a record ask with the same words.
        row_lengths: to measure.
    """

    draw: Callable[[np.random.Generator], tuple[int, list[Exchange]]]
    image_tokens: int
    shared_prompt: bool
    row_lengths: tuple[int, ...]

    def length(self, images: int, exchanges: list[Exchange]) -> int:
        """Counts the tokens of a record's row under a mask type that shares trunks."""
        before = BEFORE_IMAGE + images * self.image_tokens
        if len(exchanges) == 1 or not self.shared_prompt:
            return before + sum(prompt + BEHIND_PROMPT + response + 1 for prompt, response in exchanges)
        return before + exchanges[0][0] + BEHIND_PROMPT - 1 + sum(1 + response + 1 for _, response in exchanges)

    def lengths(self, records: int, seed: int = 0) -> list[int]:
        """Draws the lengths of records."""
        rng = np.random.default_rng(seed)
        return [self.length(*self.draw(rng)) for _ in range(records)]


def _coco(rng: np.random.Generator) -> tuple[int, list[Exchange]]:
    """Five captions of about 10.5 words, asked for with the recipes' prompt of 5 tokens."""
    return 1, [(5, int(tokens)) for tokens in np.clip(rng.normal(12, 2.6, 5).round(), 8, 40)]


def _pathvqa(rng: np.random.Generator) -> tuple[int, list[Exchange]]:
    """7.6 questions an image in the training split (variance 15.5), of 9 tokens with answers of 3."""
    count = 1 + rng.negative_binomial(4.8, 0.4225)
    prompts, responses = rng.lognormal(np.log(8.4), 0.4, count), rng.lognormal(np.log(2.4), 0.7, count)
    return 1, [(max(4, round(p)), max(1, round(r))) for p, r in zip(prompts, responses)]


def _cauldron(rng: np.random.Generator) -> tuple[int, list[Exchange]]:
    """A mixture of short answers and long texts, some about several images: a stand-in that was not measured on The Cauldron."""
    images = 1 if rng.random() < 0.92 else int(rng.integers(2, 7))
    longest = 2048 - BEFORE_IMAGE - 6 * 64 - 15 - BEHIND_PROMPT - 1
    return images, [(15, int(np.clip(rng.lognormal(np.log(75), 1.2), 1, longest)))]


SHAPES = {
    "coco": Shape(_coco, image_tokens=196, shared_prompt=True, row_lengths=(2048, 2112, 4096, 8192)),
    "pathvqa": Shape(_pathvqa, image_tokens=196, shared_prompt=False, row_lengths=(2048, 4096, 8192)),
    "cauldron": Shape(_cauldron, image_tokens=64, shared_prompt=False, row_lengths=(2048, 4096, 8192)),
}


def padding(lengths: list[int], batch_size: int) -> float:
    """The share of positions without a token, if rows of these lengths are padded batch by batch."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def filled(lengths: list[int], row_length: int) -> list[int]:
    """The tokens of each row that a stage would fill with records of these lengths."""
    pieces = Pieces.of({record: [(length, 1)] for record, length in enumerate(lengths)})
    rows = fill(list(range(len(lengths))), pieces, row_length, seed=[0])
    return [int(pieces.tokens[row].sum()) for row in rows]


def work(model: str, lengths: list[int], batch_size: int, pairs: float | None = None) -> float:
    """The multiply-adds of a language model on rows of these lengths, padded batch by batch; attention on `pairs` of tokens, or on all
    pairs of a row."""
    text = models.SHAPES[model]["text"]
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    attention = hidden * hidden * 2 * (1 + text["num_key_value_heads"] / heads)
    weights = text["num_hidden_layers"] * (attention + 3 * hidden * text["intermediate_size"])
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    positions = sum(len(batch) * max(batch) for batch in batches)
    pairs = sum(len(batch) * max(batch) ** 2 for batch in batches) if pairs is None else pairs
    return positions * weights + pairs * 2 * hidden * text["num_hidden_layers"]


def how_full(records: int, windows: list[int], model: str) -> list[dict]:
    """The measurements of all shapes, row lengths and windows."""
    usual, found = filling.WINDOW, []
    for name, shape in SHAPES.items():
        lengths = shape.lengths(records)
        for row_length in shape.row_lengths:
            for filling.WINDOW in windows:
                rows = filled(lengths, row_length)
                found.append(
                    {
                        "shape": name,
                        "mean_length": float(np.mean(lengths)),
                        "row_length": row_length,
                        "window": filling.WINDOW,
                        "records_per_row": records / len(rows),
                        "fill": sum(rows) / len(rows) / row_length,
                        "padding": padding(rows, 2),
                        "unpacked": padding(lengths, 8),
                        "dense": work(model, rows, 2) / work(model, lengths, 8),
                        "skipping": work(model, rows, 2, sum(n * n for n in lengths)) / work(model, lengths, 8),
                    }
                )
    filling.WINDOW = usual
    return found


def made_records(shape: Shape, count: int, image_size: int, vocab_size: int, seed: int = 0) -> list[dict]:
    """Records of noise pictures and random words with the lengths of a shape."""
    rng = np.random.default_rng(seed)

    def words(tokens: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(len(models.SPECIAL_WORDS), vocab_size, tokens))

    made = []
    for _ in range(count):
        images, exchanges = shape.draw(rng)
        pixels = (rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8) for _ in range(images))
        prompt = words(exchanges[0][0])
        conversations = [
            one_turn(prompt if shape.shared_prompt else words(p), [words(r)], images) for p, r in exchanges
        ]
        made.append(Record([Image.fromarray(image) for image in pixels], conversations).to_row())
    return made


def batches_of(records: list[dict], collator: AlignVLMCollator, row_length: int, batch_size: int) -> dict[str, list]:
    """The same records unpacked, `batch_size` a batch, and in filled rows, one a batch."""
    sizes = {index: filling.sizes_of(record, collator) for index, record in enumerate(records)}
    pieces = Pieces.of(sizes)
    rows = fill(list(range(len(records))), pieces, row_length, seed=[0])
    packed = [
        {"records": [{**records[pieces.record[p]], "piece": int(pieces.number[p])} for p in row]} for row in rows
    ]
    return {
        "unpacked": [collator(records[start : start + batch_size]) for start in range(0, len(records), batch_size)],
        "packed": [collator([row]) for row in packed],
    }


def seconds_of(model, batches: list[dict], dtype: torch.dtype, forward_only: bool) -> float:
    """Seconds of the passes of all batches."""
    device = model.device
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    model.zero_grad(set_to_none=True)
    _synchronize(device)
    started = time.perf_counter()
    with torch.set_grad_enabled(not forward_only):
        for batch in batches:
            with mixed:
                loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
            if not forward_only:
                loss.backward()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(options: argparse.Namespace) -> list[dict]:
    """Seconds and tokens per second of each kernel, unpacked and packed."""
    vision, text = models.configs(options.model, options.vision_layers, options.text_layers)
    shape, dtype = SHAPES[options.shape], DTYPES[choose_precision(options.dtype, options.device).name]
    model, processor = models.alignvlm(vision, text)
    model.to(options.device).train()
    collator = AlignVLMCollator(processor, pad_to_multiple_of=options.pad_to_multiple_of)
    records = made_records(shape, options.records, vision["image_size"], text["vocab_size"])
    batches = batches_of(records, collator, options.row_length, options.batch)
    found = []
    for kernel in options.kernels:
        model.set_attn_implementation({"text_config": kernel})
        seconds = {name: [] for name in batches}
        for _ in range(options.rounds + 1):  # the first warms up
            for name, own in batches.items():
                seconds[name].append(seconds_of(model, own, dtype, options.forward_only))
        for name, own in batches.items():
            tokens = sum(int(batch["attention_mask"].sum()) for batch in own)
            positions = sum(batch["attention_mask"].numel() for batch in own)
            best = min(seconds[name][1:])
            found.append(
                {
                    "kernel": kernel,
                    "rows": name,
                    "batches": len(own),
                    "longest": max(batch["input_ids"].shape[1] for batch in own),
                    "padding": 1 - tokens / positions,
                    "seconds": best,
                    "tokens_per_s": tokens / best,
                    "to_unpacked": min(seconds["unpacked"][1:]) / best,
                }
            )
    return found


def table(rows: list[dict]) -> str:
    """The measurements, a line each."""
    lines = [list(rows[0])]
    lines += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--timed", action="store_true", help="Time a model, instead of counting how full rows are.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=PRECISIONS)
    parser.add_argument("--kernels", nargs="+", default=["eager", "sdpa"])
    parser.add_argument("--forward_only", action="store_true")
    parser.add_argument("--model", default="b16-224+135m", choices=models.SHAPES)
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--text_layers", type=int)
    parser.add_argument("--shape", default="pathvqa", choices=SHAPES)
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--pad_to_multiple_of", type=int)
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="out/bench/rows.json")
    options = parser.parse_args()
    found = timed(options) if options.timed else how_full(RECORDS, options.windows, options.model)
    print(table(found))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n")
    print(output)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
