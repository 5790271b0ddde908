"""Plans stages before they run: data, steps, memory, FLOPs, hours, and what is wrong with their recipes.

    alignvlm plan --config training/recipes/alignvlm_900m/stage*.yaml --data_dir data --processes 8 --gpu H100

Opens everything that a stage reads: checkpoints, sources, fields. A stage may start from the `output_dir` of an earlier one in the list,
which need not exist yet.
"""

import argparse
import glob
import math
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from alignvlm.data.mixture import MEASURED_RECORDS, Mixture, Part, TokenCounts, load_mixture
from alignvlm.evaluation.load import check_checkpoint
from alignvlm.export.homes import describe_homes
from alignvlm.rows.collator import AlignVLMCollator, LeftOut
from alignvlm.rows.filling import WINDOW
from alignvlm.rows.packing import IGNORED, Row, best_fit, fuller_row_length, joined
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.embedding_loss import layer_of
from alignvlm.stages.features import check_room, features_folder
from alignvlm.stages.loading import as_the_stage_merges, check_row_length, make_collator, make_mixture
from alignvlm.stages.mask_types import described
from alignvlm.stages.projector_start import check_new_projector
from alignvlm.stages.prompts import preferences, prompts
from alignvlm.stages.reward_arguments import WHOLE_IMAGES, GRPOArguments, RewardArguments, parse_any_stage
from alignvlm.stages.tiles import check_not_cut, check_not_native, cut_images
from alignvlm.stages.trainer import MODULES, freeze_all_but
from alignvlm.stages.weights import LoRA
from hub_upload.command_line import positive, run
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


# Dense 16-bit FLOP/s with float32 accumulation and bytes of memory, from the makers' data sheets.
GPUS = {
    "H200": (989e12, 141e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "RTX4090": (165e12, 24e9),
    "RTX3090": (71e12, 24e9),
}
FULL = 0.95  # the share of filled rows below which the plan names another `row_length`
READ_WHOLE = 200  # records of a source that are encoded as a stage does
PROCESS_BYTES = 0.5e9  # libraries and their state
TOKENS_OF_HEAD, WORDS_OF_HEAD = 4096, 8192  # of a tile of TRL's fused head


@dataclass
class ImageCost:
    """The cost of one image: the encoder's forward FLOPs, the number of values its layers output, and the projector's tokens."""

    flops: float
    values: int
    tokens: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ImageCost":
        """Counts the cost for a model of this config with PyTorch, on an encoder without weights. Of images in native shape it is that of the
        most patches: others are padded to as many."""
        vision, channels = config.vision_config, getattr(config.vision_config, "num_channels", 3)
        if config.native_shapes:
            patches = torch.empty(1, config.max_num_patches, channels * vision.patch_size**2, device="meta")
            inputs = {
                "pixel_values": patches,
                "spatial_shapes": torch.tensor([[1, config.max_num_patches]]),
                "pixel_attention_mask": None,
            }
        else:
            inputs = {"pixel_values": torch.empty(1, channels, *config.input_size, device="meta")}
        return cls.of_encoder(vision, inputs, config.image_seq_length)

    @classmethod
    def of_encoder(cls, vision: PreTrainedConfig, inputs: dict[str, Any], tokens: int) -> "ImageCost":
        """Counts the cost of an encoder without weights, with inputs on the meta device."""
        values = 0

        def count(module, inputs, output):
            nonlocal values
            values += output.numel() if isinstance(output, torch.Tensor) else 0

        with torch.device("meta"):
            encoder = AutoModel.from_config(vision, attn_implementation="eager").eval()
            for module in encoder.modules():
                if not list(module.children()):
                    module.register_forward_hook(count)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                encoder(**inputs)
        return cls(float(counter.get_total_flops()), values, tokens)


def step_flops(
    modules: tuple[nn.Module, nn.Module, nn.Module],
    trains: set[str],
    images: int,
    rows: int,
    length: int,
    head_tokens: int,
    recompute: bool = False,
    image: "ImageCost | None" = None,
    pairs: float | None = None,
) -> float:
    """Returns the FLOPs of a training step, two per multiply-add.

    The encoder costs what PyTorch counts, and twice that backward. Elsewhere a matrix of P weights costs 2 P per token forward, 2 P for the
    gradient of its weights if they train, and 2 P for the gradient of its input if anything before it trains. Attention costs 4 H per pair
    of tokens and layer forward (H hidden size; T^2 pairs in a row of length T, where masked positions are computed too), and twice that
    backward if anything at or before it trains. The head costs only at the tokens that it is applied to.

    Args:
        modules: vision encoder, projector, language model; on any device.
        trains: which of `MODULES`.
        images, rows, length, head_tokens: of a step; `length` is that of the padded rows.
        recompute: with gradient checkpointing, layers with a backward pass go forward twice.
        image: the cost of one image; by default that of the square in the vision config.
        pairs: of tokens, for which attention is computed; by default those of complete rows.
    """
    projector_weights, language_weights = (
        sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d, Conv1D)))
        for module in modules[1:]
    )
    vision, text = modules[0].config, modules[2].config
    if image is None:
        square = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size, device="meta")
        image = ImageCost.of_encoder(vision, {"pixel_values": square}, (vision.image_size // vision.patch_size) ** 2)
    trained = "vision" in trains
    total = images * image.flops * (3 + recompute if trained else 1)
    total += images * image.tokens * 2 * projector_weights * (3 if "projector" in trains else 1 + trained)
    trained = "language" in trains
    total += rows * length * 2 * language_weights * (2 + trained + recompute)
    pairs = rows * length**2 if pairs is None else pairs
    total += pairs * text.num_hidden_layers * 4 * text.hidden_size * (3 + recompute)
    total += head_tokens * 2 * text.hidden_size * text.vocab_size * (2 + trained)
    return float(total)


@dataclass
class Batch:
    """The shape of one batch of a process, and its tokens without padding.

    `pairs` counts the pairs of tokens for which attention computes something: all of the padded rows, or with `flex_attention` those of
    one record.
    """

    images: int  # that the encoder encodes: of images that are cut, the tiles
    rows: int
    length: int
    labels: int
    tokens: int
    whole_images: int
    pairs: float

    @classmethod
    def of(cls, rows: list[Row], collator: AlignVLMCollator, skips_masked: bool = False) -> "Batch":
        """Describes a batch of rows; `skips_masked` for a kernel that skips blocks of masked pairs."""
        length = max(map(len, rows))
        records = (count for row in rows for count in Counter(row.record_ids).values())
        return cls(
            images=sum(map(collator.tile_count, rows)),
            whole_images=sum(len(row.images) for row in rows),
            rows=len(rows),
            length=length,
            labels=sum(label != IGNORED for row in rows for label in row.labels),
            tokens=sum(map(len, rows)),
            pairs=float(sum(count**2 for count in records) if skips_masked else len(rows) * length**2),
        )


@dataclass
class Filling:
    """How rows of at most `row_length` tokens hold records."""

    records: float  # a row
    share: float  # of their positions that hold tokens
    fuller: int | None  # the closest `row_length` that fills rows to `FULL`


@dataclass
class KeptSize:
    """How large the features kept by `cache_features` can become, and the FLOPs of making them all."""

    images: int  # at most: equal images are kept once
    positions: int
    values: int
    bytes_each: int  # of a value
    flops: float

    @property
    def bytes(self) -> float:
        return float(self.images * self.positions * self.values * self.bytes_each)

    @classmethod
    def of(
        cls, arguments: StageArguments, config: PreTrainedConfig, mixture: Mixture, image: ImageCost
    ) -> "KeptSize | None":
        """Estimates it from the sources; None without `cache_features`.

        Raises:
            ValueError: if the features have no room.
        """
        if not arguments.cache_features:
            return None
        images = 0.0
        for part, draws in zip(mixture.parts, mixture.draws):
            counts = [len(record["images"]) for record in part.sample(MEASURED_RECORDS)]
            records = min(draws * arguments.num_train_epochs, len(part.source))
            if arguments.max_steps > 0:
                records = len(part.source)
            images += records * sum(counts) / len(counts)
        bytes_each = 2 if arguments.frozen_16_bit else 4
        size = cls(round(images), config.positions, config.feature_size, bytes_each, round(images) * image.flops)
        folder = features_folder(arguments)
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        check_room(folder, size.bytes - there)
        return size

    def __str__(self) -> str:
        return (
            f"at most {self.images:,} images x {self.positions} positions x {self.values} values x {self.bytes_each} bytes = "
            f"{self.bytes / 1e9:,.3g} GB"
        )


@dataclass
class Plan:
    """The plan of a stage. Bytes are those of one process."""

    arguments: StageArguments
    mixture: Mixture
    parameters: dict[str, tuple[int, int]]  # of each module: trainable, total
    batches: list[Batch]
    records: int
    rows: int | None  # with `row_length`: filled ones
    steps: int
    processes: int
    memory: dict[str, float]
    step_flops: float  # of all processes
    other_turns: list[tuple[str, float] | None]  # of each source: see `other_turns`
    max_tiles: int  # 1: images are not cut
    homes: list[str]  # what the stage's checkpoint can become: see `describe_homes`
    filling: "Filling | None"  # with `row_length`
    features: "KeptSize | None" = None  # with `cache_features`
    start_records: int = 0  # that `projector_start` reads
    start_flops: float = 0.0
    left_out: list[str] = field(default_factory=list)  # of each source: see `LeftOut`

    @property
    def flops(self) -> float:
        """FLOPs of the complete stage."""
        examples = self.records if self.rows is None else self.rows
        full_steps = examples / self.arguments.records_per_step(self.processes)  # the last of an epoch may be smaller
        return full_steps * self.step_flops + self.start_flops + (self.features.flops if self.features else 0)


def batches_of(
    mixture: Mixture,
    collator: AlignVLMCollator,
    batch_size: int,
    count: int,
    seed: int = 0,
    row_length: int | None = None,
    skips_masked: bool = False,
) -> tuple[list[Batch], Filling | None]:
    """Makes random batches of the mixture's records, without decoding images.

    Returns:
        the shapes of `count` batches (of filled rows: at most), and how rows are filled with `row_length`: those of the first epoch if it
        fits into one window, else those of a window of records drawn at random.
    """
    rng = np.random.default_rng(seed)
    per_part = 1000 if row_length else max(1, min(2 * batch_size * count, 1000))
    samples = [list(part.sample(per_part)) for part in mixture.parts]
    if mixture.draws is None:
        weights = np.array([(part.share or 1.0) / part.tokens for part in mixture.parts])
    else:
        weights = np.array(mixture.draws, dtype=float)

    def rows_of(records: int) -> list[Row]:
        parts = rng.choice(len(samples), records, p=weights / weights.sum())
        return [r for p in parts for r in collator.rows(samples[p][rng.integers(len(samples[p]))])]

    if row_length is None:
        drawn = (collator.packer.arranged(rows_of(batch_size)) for _ in range(count))
        return [Batch.of(rows, collator, skips_masked) for rows in drawn], None
    if mixture.draws is not None and sum(mixture.draws) <= WINDOW:
        order, texts = list(mixture.sampler), mixture.sampler.texts_first
        records, parts = len(order), (order[:texts], order[texts:])  # filled apart
        windows = [[row for index in part for row in collator.rows(mixture.dataset[index])] for part in parts]
    else:
        records, windows = WINDOW, [rows_of(WINDOW)]
    lengths = [len(row) for own in windows for row in own]
    filled = [joined([own[i] for i in row]) for own in windows for row in best_fit(list(map(len, own)), row_length)]
    filling = Filling(
        records / len(filled), sum(lengths) / len(filled) / row_length, fuller_row_length(lengths, row_length, FULL)
    )
    rows = [filled[row] for row in rng.permutation(len(filled))]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    complete = [rows for rows in batches[:count] if len(rows) == batch_size] or batches[:1]
    return [Batch.of(rows, collator, skips_masked) for rows in complete], filling


def start_of(arguments: StageArguments, mixture: Mixture, batches: list[Batch], image: ImageCost) -> tuple[int, float]:
    """Estimates how many records `projector_start` reads, the first of an epoch that have an image, and the FLOPs of encoding them."""
    records, images = 0.0, 0.0
    for part, draws in zip(mixture.parts, mixture.draws):
        counts = [len(record["images"]) for record in part.sample(MEASURED_RECORDS)]
        records += draws * sum(count > 0 for count in counts) / len(counts)
        images += draws * sum(counts) / len(counts)
    read = min(arguments.projector_start_records, round(records))
    encoded, whole = (sum(getattr(batch, name) for batch in batches) for name in ("images", "whole_images"))
    return read, read * images / max(records, 1) * encoded / max(whole, 1) * image.flops


def memory_of(
    model: AlignVLMForConditionalGeneration,
    arguments: StageArguments,
    batch: Batch,
    processes: int,
    image: ImageCost,
) -> dict[str, float]:
    """Estimates the bytes of a process at the peak of a step, by what takes them.

    Weights are 4 bytes each (frozen ones 2 with `frozen_16_bit`), gradients of trained ones 4, AdamW's states 8, DDP's buckets 4, and the
    16-bit copies that autocast keeps of trained matrices 2. For the backward pass a layer holds its input (4 bytes a value) and what
    its operations need: 14 values of hidden and 3 of intermediate size per token (16 bits under autocast, else 32), and with eager
    attention its probabilities (10 bytes each). With gradient checkpointing only one layer at a time holds what its operations need. An
    encoder that is not a stack of equal layers keeps the output of its modules. TRL's head works in tiles of 4,096 tokens and 8,192 words,
    and sums its weights' gradient in float32.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    every = sum(p.numel() for p in model.parameters())
    half = 2 if arguments.dtype_16_bit is not None else 4
    vision, text = model.config.vision_config, model.config.text_config
    positions, trains_vision = model.config.positions, "vision" in arguments.learning_rates
    activations, largest = 0.0, 0.0
    towers = [(text, batch.rows * batch.length, batch.rows, batch.length, True)]
    sizes = (getattr(vision, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if all(isinstance(size, int) for size in sizes):
        towers.append((vision, batch.images * positions, batch.images, positions, trains_vision))
    else:
        activations += batch.images * image.values * half * trains_vision
    for config, tokens, rows, length, backward in towers:
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        of_layer = tokens * half * (14 * config.hidden_size + 3 * intermediate)
        if arguments.attn_implementation == "eager":
            of_layer += rows * config.num_attention_heads * length**2 * 10
        inputs = tokens * config.hidden_size * 4
        if not backward:
            largest = max(largest, of_layer / 2)  # nothing is kept
        elif arguments.activation_checkpointing:
            activations += config.num_hidden_layers * inputs
            largest = max(largest, 2 * of_layer)  # recomputed, and its gradients
        else:
            activations += config.num_hidden_layers * (inputs + of_layer)
            largest = max(largest, of_layer)
    head = min(batch.labels, TOKENS_OF_HEAD) * min(text.vocab_size, WORDS_OF_HEAD) * (half + 12)
    if "language" in arguments.learning_rates and not arguments.lora_r:
        head += text.vocab_size * text.hidden_size * 4
    copies = sum(p.numel() for name, p in trained.items() if p.ndim > 1 and "embed" not in name)
    return {
        "weights": 4 * count + (2 if arguments.frozen_16_bit else 4) * (every - count),
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "DDP buckets": 4 * count if processes > 1 else 0,
        "16-bit copies": 2 * copies if arguments.dtype_16_bit is not None else 0,
        "activations": activations + max(largest, head),
        "process": PROCESS_BYTES,
    }


def empty_model(config: PreTrainedConfig, attn_implementation: str) -> AlignVLMForConditionalGeneration:
    """Makes a model without weights that has the attention kernel of its stage, so that it refuses what it would refuse there. Without it
    if the kernel is not installed here: the stage may run elsewhere."""
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        try:
            return AlignVLMForConditionalGeneration(config)
        except (ImportError, OSError):
            config._attn_implementation = None
            return AlignVLMForConditionalGeneration(config)


def steps_of(arguments: StageArguments, per_epoch: float, processes: int) -> int:
    """Counts the steps of a stage as the trainer does: every epoch ends with a step, also of fewer examples than the others."""
    batches = per_epoch / (arguments.per_device_train_batch_size * processes)
    whole = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(whole / arguments.gradient_accumulation_steps)))


def plan_stage(
    arguments: StageArguments,
    config: PreTrainedConfig,
    processor: AlignVLMProcessor,
    record: dict[str, Any],
    processes: int,
    sample: int = 30,
) -> Plan:
    """Plans one stage: opens every source and measures `sample` random batches. Makes `config` and `processor` those of its checkpoint.

    Args:
        record: the run record of the checkpoint that it starts from.
    """
    check_new_projector(arguments, record)
    for mask_type in reversed(arguments.mask_type_shares):  # the first stays
        config.attention_mask_type = mask_type
        config.check_mask_type()
    cut_images(arguments, config, processor)
    if arguments.embedding_loss:
        layer_of(config, arguments.embedding_loss_layer)
    if arguments.cache_features:
        check_not_cut(processor, "cache_features keeps one feature map an image")
    if arguments.projector_start:
        check_not_native(processor, "projector_start takes images of as many tokens each")
    with torch.device("meta"):
        model = empty_model(config, arguments.attn_implementation)
        check_row_length(arguments, model)
        if lora := LoRA.of(arguments):
            lora.before(model)
    parameters = freeze_all_but(model, arguments.learning_rates)
    collator = make_collator(arguments, processor, config)
    mixture = make_mixture(arguments, collator, record["stages"], processes)
    for sources in (arguments.eval_sources, arguments.text_sources):
        if sources:
            load_mixture(sources, collator.token_counts, arguments.data_dir)
    for part in mixture.parts:
        if part.image_tokens is None:
            part.measure(collator.token_counts)
    skips_masked = arguments.attn_implementation == "flex_attention"
    batches, filling = batches_of(
        *(mixture, collator, arguments.per_device_train_batch_size, sample, arguments.seed),
        *(arguments.row_length, skips_masked),
    )
    records_per_example = 1.0 if filling is None else filling.records
    steps = arguments.max_steps
    examples = steps * arguments.records_per_step(processes)
    if steps <= 0:
        per_epoch = sum(mixture.draws) / records_per_example
        examples = per_epoch * arguments.num_train_epochs
        steps = steps_of(arguments, per_epoch, processes)
    modules = (model.model.vision_tower, model.model.projector, model.model.language_model)
    image = ImageCost.of(config)
    start = start_of(arguments, mixture, batches, image) if arguments.projector_start else (0, 0.0)
    features = KeptSize.of(arguments, config, mixture, image)
    if features:
        image = replace(image, flops=0.0)  # in a step
    flops = [
        step_flops(
            *(modules, set(arguments.learning_rates), batch.images, batch.rows, batch.length, batch.labels),
            recompute=bool(arguments.activation_checkpointing),
            image=image,
            pairs=batch.pairs,
        )
        for batch in batches
    ]
    largest = max(batches, key=lambda batch: batch.rows * batch.length)
    return Plan(
        arguments,
        mixture,
        parameters,
        batches,
        round(examples * records_per_example),
        None if arguments.row_length is None else round(examples),
        steps,
        processes,
        memory_of(model, arguments, largest, processes, image),
        float(np.mean(flops)) * arguments.gradient_accumulation_steps * processes,
        [other_turns(part, collator.token_counts) for part in mixture.parts],
        processor.max_tiles,
        describe_homes(config, processor=processor),
        filling,
        features,
        *start,
        [left_out_of(part, collator) for part in mixture.parts],
    )


@dataclass
class RewardPlan:
    """The plan of stage 5: how many prompts or pairs it reads. What it costs depends on the answers that the model will sample."""

    arguments: RewardArguments
    examples: int
    per_step: int
    steps: int
    homes: list[str]
    flops = 0.0

    def describe(self) -> str:
        """Returns the plan as text."""
        arguments = self.arguments
        what, answers = "pairs", ""
        if isinstance(arguments, GRPOArguments):
            what = "prompts"
            answers = f" with {arguments.num_generations} answers each, rewarded by {', '.join(arguments.rewards)}"
        return (
            f"Stage {arguments.stage}: {arguments.model} -> {arguments.output_dir}\n"
            f"  {arguments.method}: {self.examples:,} {what}, {self.steps:,} steps of {self.per_step} {what}{answers}\n"
            "  what it costs is not estimated: that depends on how long the answers are"
        )


def plan_rewards(
    arguments: RewardArguments,
    config: PreTrainedConfig,
    processor: AlignVLMProcessor,
    record: dict[str, Any],
    processes: int,
) -> RewardPlan:
    """Plans stage 5, as `plan_stage`, but measures no batches. Makes `config` and `processor` those of its checkpoint."""
    config.attention_mask_type = arguments.attention_mask_type
    config.check_mask_type()
    empty_model(config, arguments.attn_implementation)
    cut_images(arguments, config, processor)
    check_not_cut(processor, WHOLE_IMAGES)
    collator = make_collator(arguments, processor, config)
    mixture = make_mixture(arguments, collator, record["stages"], processes)
    for sources in (arguments.eval_sources, arguments.text_sources):
        if sources:
            load_mixture(sources, collator.token_counts, arguments.data_dir)
    samples = isinstance(arguments, GRPOArguments)
    examples = len(prompts(mixture.parts) if samples else preferences(mixture.parts))
    per_step = arguments.records_per_step(processes) // (arguments.num_generations if samples else 1)
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    elif samples:  # an epoch holds whole batches of prompts alone
        steps = int(arguments.num_train_epochs * examples / per_step)
    else:
        steps = steps_of(arguments, examples, processes)
    return RewardPlan(arguments, examples, per_step, steps, describe_homes(config, processor=processor))


def plan_stages(
    stages: list[StageArguments | RewardArguments], processes: int, sample: int = 30
) -> list[Plan | RewardPlan]:
    """Plans stages, each of which may start from the output of an earlier one.

    Raises:
        ValueError: for an error that would stop a run; the message names the stage.
    """
    known: dict[Path, tuple] = {}
    plans = []
    for arguments in stages:
        folder = Path(arguments.model).resolve()
        try:
            if folder not in known:
                check_checkpoint(arguments.model, arguments.model_revision)
                options = {"revision": arguments.model_revision}
                known[folder] = (
                    AlignVLMConfig.from_pretrained(arguments.model, **options),
                    AlignVLMProcessor.from_pretrained(arguments.model, **options),
                    read_run_record(arguments.model, arguments.model_revision),
                )
            kept = arguments.keep_language_from
            if kept is not None and Path(kept).resolve() not in known:
                check_checkpoint(kept, weights_only=True)
            config, processor, record = known[folder]
            config, processor = as_the_stage_merges(arguments, config, processor)
            if isinstance(arguments, RewardArguments):
                plans.append(plan_rewards(arguments, config, processor, record, processes))
            else:
                plans.append(plan_stage(arguments, config, processor, record, processes, sample))
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {arguments.stage} (model {arguments.model!r}): {error}") from error
        names = ("stage", "sources", "learning_rates")
        entry = {name: getattr(arguments, name) for name in names}
        record = {**record, "stages": [*record["stages"], entry]}
        known[Path(arguments.output_dir).resolve()] = (config, processor, record)
    return plans


def left_out_of(part: Part, collator: AlignVLMCollator, records: int = READ_WHOLE) -> str:
    """Says what `max_length` leaves out of a source's records; nothing if it leaves out nothing."""
    found = LeftOut(collator.packer.max_length)
    for record in part.sample(records):
        collator.token_counts(record, found)
    return str(found)


def other_turns(part: Part, token_counts: TokenCounts, records: int = READ_WHOLE) -> tuple[str, float] | None:
    """Returns the other way to take turns (`whole` or `independent`) and the tokens that a record would have with it.

    Returns None if both ways give the same number of tokens, or if the source has no such choice.
    """
    found = part.source.with_other_turns()
    if found is None:
        return None
    other = replace(part, source=found[1])
    here, there = (sum(map(sum, map(token_counts, this.sample(records)))) for this in (part, other))
    return None if here == there else (found[0], part.tokens * there / here)


def describe(plan: Plan, gpu: str, utilisation: float) -> str:
    """Returns the plan of a stage as text."""
    arguments = plan.arguments
    rate, capacity = GPUS[gpu]
    trained, total = (sum(counts[i] for counts in plan.parameters.values()) for i in (0, 1))
    lines = [
        f"Stage {arguments.stage}: {arguments.model} -> {arguments.output_dir}",
        f"  {total / 1e6:,.4g}M parameters, {trained / 1e6:,.4g}M train: "
        + ", ".join(
            f"{module} {plan.parameters[module][0] / 1e6:,.4g}M at {arguments.learning_rates[module]:g}"
            for module in MODULES
            if module in arguments.learning_rates
        ),
    ]
    for index, part in enumerate(plan.mixture.parts):
        drawn = "a stream"
        if plan.mixture.draws is not None:
            draws = plan.mixture.draws[index]
            drawn = f"{draws:,} of {len(part.source):,} records, {draws * part.tokens / 1e6:,.4g}M tokens"
        lines.append(
            f"  {part.name:<20} {drawn} ({part.image_tokens:.0f} image + {part.text_tokens:.0f} text tokens a record)"
        )
        if plan.left_out[index]:
            lines.append(f"  {'':<20} {plan.left_out[index]}")
        if plan.other_turns[index] is not None:
            turns, tokens = plan.other_turns[index]
            lines.append(f"  {'':<20} with `turns: {turns}`: {tokens:.0f} tokens a record")
    if plan.max_tiles > 1:
        encoded, images = (sum(getattr(batch, name) for batch in plan.batches) for name in ("images", "whole_images"))
        lines.append(
            f"  max_tiles {plan.max_tiles}: {encoded / max(images, 1):.2f} encoded for each image, its overview and its tiles"
        )
    if len(arguments.mask_type_shares) > 1:
        lines.append(f"  {described(arguments.mask_type_shares)}")
    if arguments.projector_start:
        lines.append(
            f"  projector_start: {plan.start_records:,} records with an image, {plan.start_flops / 1e12:,.4g} TFLOP"
        )
    if arguments.embedding_loss:
        lines.append(f"  embedding_loss: {arguments.embedding_loss:g} x the error of a head that is thrown away")
    if arguments.keep_language:
        lines.append(
            f"  keep_language: {1 - arguments.keep_language:g} of the trained language model, {arguments.keep_language:g} of that of "
            f"{arguments.keep_language_from or arguments.model}"
        )
    if plan.features:
        lines.append(f"  cache_features: {plan.features} below {features_folder(arguments)}")
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * plan.processes
    positions = np.mean([batch.rows * batch.length for batch in plan.batches])
    padding = 1 - np.mean([batch.tokens for batch in plan.batches]) / positions
    longest = max(batch.length for batch in plan.batches)
    hours = plan.flops / (rate * utilisation * plan.processes) / 3600
    read, unit = f"{plan.records:,} records", "records"
    if plan.filling is not None:
        filling, unit = plan.filling, "rows"
        read += f" in about {plan.rows:,} rows of {arguments.row_length:,} tokens, {filling.share:.0%} filled"
        if filling.share < FULL and filling.fuller not in (None, arguments.row_length):
            read += f" (row_length {filling.fuller}: {FULL:.0%} or more)"
    lines += [
        f"  {read}, {plan.steps:,} steps of {per_step} {unit}; rows up to {longest} tokens, {padding:.0%} padding",
        f"  {plan.step_flops / 1e12:,.4g} TFLOP a step, {plan.flops / 1e18:,.3g} EFLOP in all: {hours:,.2g} hours on {plan.processes} x {gpu} "
        f"at {utilisation:.0%} of {rate / 1e12:,.0f} TFLOP/s",
    ]
    needed = sum(plan.memory.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.memory.items() if size)
    verdict = "fits" if needed < 0.95 * capacity else "DOES NOT FIT: take smaller batches, frozen_16_bit or FSDP2"
    lines.append(f"  {needed / 1e9:.1f} GB a process ({parts}): {verdict} into {capacity / 1e9:.0f} GB of one {gpu}")
    return "\n".join(lines)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: a number above 0, at most 1.")
    return share


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Plans stages before they run: what they will cost, and what is wrong with their recipes.",
        epilog="Any field of a stage may follow; it then holds for all stages.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", required=True, help="Recipes, in the order of the stages.")
    parser.add_argument("--processes", type=positive, default=1, help="Number of GPUs.")
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument(
        "--utilisation",
        type=_share,
        default=0.4,
        help="The share of the GPU's peak rate that steps are assumed to reach.",
    )
    parser.add_argument(
        "--sample", type=positive, default=30, help="Measure the shapes of this number of random batches."
    )
    options, fields = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    paths = [path for pattern in options.config for path in (sorted(glob.glob(pattern)) or [pattern])]
    stages = [parse_any_stage(["--config", path, *fields], also=vars(options))[0] for path in paths]
    plans = plan_stages(stages, options.processes, options.sample)
    for plan in plans:
        text = plan.describe() if isinstance(plan, RewardPlan) else describe(plan, options.gpu, options.utilisation)
        print(text + "\n")
    if flops := sum(plan.flops for plan in plans):
        hours = flops / (GPUS[options.gpu][0] * options.utilisation * options.processes) / 3600
        without = " without stage 5" if any(isinstance(plan, RewardPlan) for plan in plans) else ""
        print(f"In all{without} {flops / 1e18:,.3g} EFLOP, {hours:,.2g} hours on {options.processes} x {options.gpu}.")
    print("\nWhat `alignvlm export` can make of the last stage (docs/export.md):")
    print("\n".join(f"  {line}" for line in plans[-1].homes))


if __name__ == "__main__":
    run(main)
