"""One training stage: load, freeze, data, train, save, record.

What a stage trains, at which learning rates, under which mask and on which sources stands in its YAML file and nowhere else:

    accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml [--any_field value]
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, set_seed
from transformers.utils import logging
from trl import SFTConfig

from alignvlm.data.mixture import Mixture, Part, load_mixture, read_parts
from alignvlm.data.rows import ON_BAD_ROW, shown
from alignvlm.evaluation.perplexity import text_perplexity
from alignvlm.evaluation.precision import Precision, choose_precision, warn_if_emulated
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.alignment import alignment_figures
from alignvlm.stages.checkpoint import (
    average_weights,
    check_writable,
    is_whole,
    last_whole_checkpoint,
    read_progress,
    save_checkpoint,
    whole_checkpoints,
)
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.language_trial import last_position
from alignvlm.stages.lora import (
    LORA_FOLDER,
    add_lora,
    language_linear_layers,
    merge_saved_lora,
    remove_lora,
    save_lora,
)
from alignvlm.stages.losses import TOKEN_WEIGHTINGS
from alignvlm.stages.schedules import check_phases
from alignvlm.stages.trainer import MODULES, AlignVLMTrainer
from hub_upload.licences import licence_of
from hub_upload.package import RUN_RECORD
from hub_upload.push import check_name, push
from hub_upload.repository import check_model, commit_of
from hub_upload.run_record import library_versions, read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.configuration_alignvlm import MASK_TYPES


logger = logging.get_logger(__name__)


@dataclass
class TrainerArguments(SFTConfig):
    """TRL's `SFTConfig` with `activation_checkpointing`, its name since transformers 5.24, under every release."""

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass instead of keeping them: less memory, a third more work. On by default.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: str | None = field(
        default=None, metadata={"help": "How: see transformers' `activation_checkpointing_enable`."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "The name activation_checkpointing had before transformers 5.24.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self):
        # transformers 5.23 and TRL read the old names, transformers 5.24 the new ones, and warns where only an old one is set.
        for option, default in (("checkpointing", True), ("checkpointing_kwargs", None)):
            values = (getattr(self, f"{time}_{option}") for time in ("activation", "gradient"))
            value = next((value for value in values if value is not None), default)
            setattr(self, f"activation_{option}", value)
            setattr(self, f"gradient_{option}", value)
        super().__post_init__()


@dataclass
class StageArguments(TrainerArguments):
    """The fields of TRL's `SFTConfig`, and what makes a stage of AlignVLM."""

    stage: int = field(default=0, metadata={"help": "Number of the stage, 1 to 4; names it in logs and records."})
    model: str = field(
        default="", metadata={"help": "Checkpoint to start from: the folder the stage before wrote, or a Hub id."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a model on the Hub."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector. Left out: frozen."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision encoder. Left out: frozen."}
    )
    language_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the language model and its head. Left out: frozen."}
    )
    lora_r: int = field(
        default=0,
        metadata={"help": "Train LoRA layers of this rank instead of all of the language model. 0: no LoRA."},
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "LoRA's products are multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA layers."})
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the language model's linear layers that get LoRA. Left out: all but the head."},
    )
    lora_merge: bool = field(
        default=True,
        metadata={"help": "Add LoRA's products to the weights in the end. False: write them apart, into lora/."},
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "What the stage computes in, with float32 master weights: `fp32`, `bf16`, `fp16`, or `auto`: what the device does "
            "natively. `bf16` and `fp16` of TRL are the same choice by flag."
        },
    )
    frozen_16_bit: bool = field(
        default=False,
        metadata={"help": "Hold frozen modules in the 16 bits of `bf16` or `fp16`; they are saved as read."},
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Muon instead of `optim` for the matrices of hidden layers, AdamW for the rest, at the same learning rates: fewer steps."
        },
    )
    infinite_schedule: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Warm-up, cooldown, constant, anneal instead of lr_scheduler_type: {cooldown, anneal, constant, final}; {} for the "
            "defaults. See alignvlm/stages/schedules.py."
        },
    )
    average_last: int = field(
        default=0, metadata={"help": "Write the mean of the weights of so many last checkpoints. 0: the last weights."}
    )
    token_weighting: str = field(
        default="none", metadata={"help": f"Weights of response tokens: one of {', '.join(TOKEN_WEIGHTINGS)}."}
    )
    attention_mask_type: str = field(
        default="image", metadata={"help": f"Who may look ahead: one of {', '.join(MASK_TYPES)}."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "`sdpa`, `flex_attention` or `eager`."})
    row_length: int | None = field(
        default=None,
        metadata={"help": "Fill rows of several records up to so many tokens (first fit); meant for flex_attention."},
    )
    sources: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "What to train on: a list of {name, arguments}; on the command line as JSON."}
    )
    eval_sources: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Held-out records; their loss is recorded before and after the stage."}
    )
    text_sources: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": "A fixed text, as sources; the perplexity on it is recorded before and after the stage."},
    )
    alignment_records: int = field(
        default=0,
        metadata={
            "help": "On so many records of eval_sources with an image, record the modality integration rate and the norms of image and "
            "text embeddings before and after the stage."
        },
    )
    data_dir: str = field(default=".", metadata={"help": "Folder at which relative paths of sources start."})
    image_token_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of image tokens among all tokens, reached by reading more or fewer text-only records."
        },
    )
    image_start_fraction: float = field(
        default=0.0, metadata={"help": "No record with an image comes before this fraction of the stage."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read data as they are needed. Needs max_steps, and a share for every source."},
    )
    on_bad_image: str = field(
        default="raise", metadata={"help": "What an image that cannot be read does: `raise`, or `skip` its record."}
    )
    max_bad_images: float = field(
        default=0.01,
        metadata={"help": "With on_bad_image: skip, the share of records at which the run stops after all."},
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "What a row does whose texts cannot be used (null, a number, empty, ...): `raise`, or `skip` it."
        },
    )
    max_bad_rows: float = field(
        default=0.01, metadata={"help": "With on_bad_row: skip, the share of rows at which the run stops after all."}
    )
    evaluation_tag: str = field(
        default="", metadata={"help": "The source tag to put before prompts at evaluation; goes into the run record."}
    )
    push_to: str | None = field(
        default=None,
        metadata={
            "help": "Repository of the Hub, user/name, that gets the checkpoint of the stage, tagged stage<N>. Private if new."
        },
    )
    push_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, for the card that push_to writes. Left out: the strictest of the backbones'."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the last checkpoint in output_dir, or from the one named.",
            "nargs": "?",
            "const": "last",
        },
    )
    allow_other_data: bool = field(
        default=False,
        metadata={
            "help": "Go on from a checkpoint although the data, their order or the global batch size are others than before; some records "
            "are then skipped or read twice."
        },
    )

    def __post_init__(self):
        self.chosen_precision = self._choose_precision()
        self.bf16, self.fp16 = (self.chosen_precision.name == name for name in ("bf16", "fp16"))
        super().__post_init__()
        for name in ("sources", "eval_sources", "text_sources", "lora_target_modules", "infinite_schedule"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, json.loads(value))
        if self.push_to:
            check_name(self.push_to)
        for problem in self._problems():
            raise ValueError(problem)
        if self.infinite_schedule is not None:
            check_phases(**self.infinite_schedule)
        self.learning_rate = max(self.learning_rates.values())  # what the log shows first
        self.remove_unused_columns = False  # the collator reads records
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.push_to_hub = False  # it would upload optimizer states; see hub_upload/

    def _choose_precision(self) -> Precision:
        """What `precision` or the flags ask for; `bf16` is None where nobody set it."""
        asked = self.precision
        flags = {"bf16": self.bf16, "fp16": self.fp16 or None}
        by_flag = next((name for name, value in flags.items() if value), "fp32" if self.bf16 is False else None)
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other: set one of them, or `precision`.")
        if asked == "auto" and by_flag:
            asked = by_flag
        chosen = choose_precision(asked, self._device_type())
        if any(value is not None and value != (chosen.name == name) for name, value in flags.items()):
            given = ", ".join(f"{name}={value}" for name, value in flags.items() if value is not None)
            raise ValueError(f"precision={self.precision!r} and {given} contradict each other: set one of them.")
        return chosen

    def _device_type(self) -> str:
        return (
            "cpu"
            if self.use_cpu or not torch.accelerator.is_available()
            else torch.accelerator.current_accelerator().type
        )

    def _problems(self) -> Iterator[str]:
        """What is wrong, and what would be right."""
        for module in MODULES:
            rate = getattr(self, f"{module}_learning_rate")
            if rate is not None and rate <= 0:
                yield f"{module}_learning_rate={rate} must be positive. To freeze the module, leave the field out."
        if not self.learning_rates:
            yield f"Nothing trains: set at least one of {', '.join(f'{m}_learning_rate' for m in MODULES)}."
        if not self.model or not self.sources:
            yield "A stage needs `model` (a checkpoint to start from) and `sources` (what to train on)."
        for name, valid in (
            ("attention_mask_type", MASK_TYPES),
            ("token_weighting", TOKEN_WEIGHTINGS),
            ("on_bad_image", ("raise", "skip")),
            ("on_bad_row", ON_BAD_ROW),
        ):
            if getattr(self, name) not in valid:
                yield f"Unknown {name} {getattr(self, name)!r}. Valid values: {', '.join(valid)}."
        if self.label_smoothing_factor > 0:
            yield "label_smoothing_factor needs the logits of all words at once, which stages do not compute. Leave it out."
        if self.token_weighting != "none" and self.loss_type != "nll":
            yield "token_weighting weighs the plain loss: leave out loss_type."
        if self.streaming and self.max_steps <= 0:
            yield "A stream has no length: streaming needs max_steps."
        if self.lora_r and self.language_learning_rate is None:
            yield "lora_r trains the language model: set language_learning_rate."
        if self.frozen_16_bit and not (self.bf16 or self.fp16):
            yield f"frozen_16_bit needs bf16 or fp16, which say in which 16 bits; the stage computes in {self.chosen_precision}."
        if self.average_last:
            if self.save_strategy == "no":
                yield f"average_last={self.average_last} needs checkpoints: set save_strategy and save_steps."
            if self.save_total_limit is not None and self.save_total_limit < self.average_last:
                yield f"save_total_limit={self.save_total_limit} keeps less checkpoints than average_last={self.average_last}."
        if self.alignment_records and not self.eval_sources:
            yield "alignment_records are taken from eval_sources: name some."

    @property
    def bad_rows_allowed(self) -> float | None:
        """The share of rows that may be bad; None: none may be."""
        return self.max_bad_rows if self.on_bad_row == "skip" else None

    @property
    def dtype_16_bit(self) -> torch.dtype | None:
        """What autocast computes in."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module that trains."""
        rates = {module: getattr(self, f"{module}_learning_rate") for module in MODULES}
        return {module: rate for module, rate in rates.items() if rate is not None}


class ArgumentsForAGPU(StageArguments):
    """Arguments of a recipe that is only looked at where there is no GPU."""

    def _device_type(self) -> str:
        return "cuda"


def parse_anywhere(argv: list[str], *more: type, also: Iterable[str] = ()) -> tuple:
    """`StageArguments` and `more` dataclasses from a command line, for looking only: a recipe for a GPU is read without one too.
    See `parse_fields`."""
    if torch.accelerator.is_available():
        return parse_fields(argv, StageArguments, *more, also=also)
    return parse_fields(["--use_cpu", "true", *argv], ArgumentsForAGPU, *more, also=also)


def make_collator(
    arguments: StageArguments, processor: AlignVLMProcessor, config: PreTrainedConfig
) -> AlignVLMCollator:
    """The collator of a stage that starts from a model of this config.

    Raises:
        ValueError: if the language model cannot pack rows and `row_length` asks for it.
    """
    if arguments.row_length is not None and not config.packing:
        raise ValueError(
            f"row_length={arguments.row_length} packs rows, which the language model {config.text_config.model_type!r} cannot keep "
            "apart (packing is false in its config.json). Leave it out."
        )
    return AlignVLMCollator(
        processor,
        mask_type=arguments.attention_mask_type,
        max_length=arguments.max_length,
        shared_image=config.packing,
        row_length=arguments.row_length,
        pad_to_multiple_of=arguments.pad_to_multiple_of if isinstance(arguments.pad_to_multiple_of, int) else None,
        on_bad_image=arguments.on_bad_image,
        name_records=True,
    )


def check_row_length(arguments: StageArguments, model: AlignVLMForConditionalGeneration) -> None:
    """Raises a `ValueError` if rows may be longer than the language model has positions; RoPE and ALiBi have no last one."""
    positions = last_position(model.model.language_model)
    if positions is not None and (arguments.max_length is None or arguments.max_length > positions):
        raise ValueError(
            f"max_length={arguments.max_length} allows rows of more tokens than the language model "
            f"{model.config.text_config.model_type!r} has positions, {positions}. Set max_length: {positions} or less."
        )


def make_mixture(
    arguments: StageArguments, collator: AlignVLMCollator, earlier_stages: list[dict], processes: int | None = None
) -> Mixture:
    """What a stage trains on; `earlier_stages` are those of the run record of its model."""
    per_step = _records_per_step(arguments, processes)
    return load_mixture(
        arguments.sources,
        collator.token_counts,
        arguments.data_dir,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        epochs=arguments.num_train_epochs,
        image_token_share=arguments.image_token_share,
        image_start_fraction=arguments.image_start_fraction,
        streaming=arguments.streaming,
        stream_records=arguments.max_steps * per_step,
        earlier_stages=earlier_stages,
        max_bad_rows=arguments.bad_rows_allowed,
    )


def _records_per_step(arguments: StageArguments, processes: int | None = None) -> int:
    """The global batch size."""
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_process * (arguments.world_size if processes is None else processes)


def load_model(arguments: StageArguments) -> AlignVLMForConditionalGeneration:
    """The model a stage starts from, in float32, LoRA weights of an earlier stage merged."""
    model = AlignVLMForConditionalGeneration.from_pretrained(
        arguments.model,
        revision=arguments.model_revision,
        attention_mask_type=arguments.attention_mask_type,
        attn_implementation=arguments.attn_implementation,
        dtype=torch.float32,  # master weights; fp16 and bf16 run under autocast
    )
    merge_saved_lora(model, arguments.model, arguments.model_revision)
    return model


def run_stage(arguments: StageArguments) -> dict:
    """Runs one stage and writes its checkpoint to `output_dir`; returns the stage's entry in the run record."""
    set_seed(arguments.seed)
    check_model(arguments.model, arguments.model_revision)
    check_writable(arguments.output_dir)
    warn_if_emulated(arguments.chosen_precision, arguments.device)
    resume_from = _checkpoint_to_resume(arguments)
    record = read_run_record(arguments.model, arguments.model_revision)
    if arguments.push_to and not arguments.push_license:
        licence_of(record)  # asks now for one that is not known, not after the training
    processor = AlignVLMProcessor.from_pretrained(arguments.model, revision=arguments.model_revision)
    model = load_model(arguments)
    check_row_length(arguments, model)
    if arguments.lora_r:
        targets = arguments.lora_target_modules or language_linear_layers(model)
        add_lora(model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout, targets)
    collator = make_collator(arguments, processor, model.config)
    with PartialState().main_process_first():  # datasets writes its cache once
        mixture = make_mixture(arguments, collator, record["stages"])
        held_out = None
        if arguments.eval_sources:
            allowed = arguments.bad_rows_allowed
            held_out = load_mixture(
                arguments.eval_sources, collator.token_counts, arguments.data_dir, max_bad_rows=allowed
            )
    order = _order_of_records(arguments, mixture)
    trainer = AlignVLMTrainer(
        model,
        learning_rates=arguments.learning_rates,
        sampler=mixture.sampler,
        max_bad_images=arguments.max_bad_images,
        max_bad_rows=arguments.max_bad_rows,
        order=order,
        earlier=_progress_to_go_on_with(arguments, resume_from, order),
        token_weighting=arguments.token_weighting,
        infinite_schedule=arguments.infinite_schedule,
        args=arguments,
        data_collator=collator,
        train_dataset=mixture.dataset,
        eval_dataset=None if held_out is None else held_out.dataset,
        processing_class=processor,
    )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and (arguments.frozen_16_bit or arguments.average_last or arguments.lora_r or arguments.muon):
        raise ValueError(
            "frozen_16_bit, average_last, lora_r and muon need whole weights on every process: use one process or DDP."
        )
    _check_unfinished(arguments, resume_from, trainer.total_steps())
    rounded = []
    if arguments.frozen_16_bit:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                rounded.append(name)
                parameter.data = parameter.data.to(arguments.dtype_16_bit)
    if trainer.is_world_process_zero():
        print(_describe(arguments, trainer.parameter_counts, mixture), flush=True)

    before = _figures(arguments, trainer, collator)
    trainer.train(resume_from_checkpoint=resume_from)
    progress = trainer.progress()
    averaged = whole_checkpoints(arguments.output_dir)[-arguments.average_last :] if arguments.average_last else []
    if averaged:
        model.load_state_dict(average_weights(averaged), strict=False)
    after = _figures(arguments, trainer, collator)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    entry = {
        "stage": arguments.stage,
        "model": arguments.model,
        "model_revision": commit_of(arguments.model, arguments.model_revision),
        "learning_rates": arguments.learning_rates,
        "attention_mask_type": arguments.attention_mask_type,
        "sources": arguments.sources,
        "data": mixture.record(),
        "records": None if mixture.draws is None else sum(mixture.draws),
        "losses_of_data": _with_bad_rows(progress["losses_of_data"], mixture, held_out),
        "evaluation_tag": arguments.evaluation_tag,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "seed": arguments.seed,
        "precision": arguments.chosen_precision.name,
        "precision_reason": arguments.chosen_precision.reason,
        **_options(arguments, [path.name for path in averaged]),
        "processes": arguments.world_size,
        "seconds": round(progress["seconds"], 1),
        "resumed_at": progress["resumed_at"],
        "train_loss": progress["loss_sum"] / progress["steps"] if progress["steps"] else None,
        "logged_losses": losses,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "versions": library_versions(),
    }
    record["stages"].append(entry)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # of all processes
    if trainer.is_world_process_zero():
        shutil.rmtree(Path(arguments.output_dir) / LORA_FOLDER, ignore_errors=True)  # of an earlier run
        if rounded:
            _restore(model, rounded, arguments)
        if arguments.lora_r:
            if not arguments.lora_merge:
                save_lora(model, Path(arguments.output_dir) / LORA_FOLDER)
            remove_lora(model, merge=arguments.lora_merge)
        save_checkpoint(model, processor, arguments.output_dir, record, state_dict)
    trainer.accelerator.wait_for_everyone()
    if arguments.push_to and trainer.is_world_process_zero():  # nobody has to wait for it
        _push(arguments)
    return entry


def _push(arguments: StageArguments) -> None:
    """Pushes the finished stage. That it fails costs nothing that was trained, so it is told and the run goes on."""
    tag = f"stage{arguments.stage}"
    try:
        pushed = push(arguments.output_dir, arguments.push_to, private=None, tag=tag, license=arguments.push_license)
    except Exception as error:  # whatever it is
        again = f"python hub_upload/push.py {arguments.output_dir} {arguments.push_to} --tag {tag}"
        again += f" --license {arguments.push_license}" if arguments.push_license else ""
        logger.error(
            f"The push did not succeed: {error}\nThe checkpoint is whole in {arguments.output_dir}. Try again: {again}"
        )
    else:
        print("\n".join([*pushed.notes(), "Pushed. To load it:", pushed.how_to_load()]), flush=True)


def _figures(
    arguments: StageArguments, trainer: AlignVLMTrainer, collator: AlignVLMCollator
) -> dict[str, float | None]:
    """Loss on held-out records, perplexity on a text, and alignment figures, as far as the recipe asks for them."""
    figures: dict[str, float | None] = {"eval_loss": None}
    # DeepSpeed evaluates only what it has begun to train, unless it is ZeRO-3.
    if trainer.eval_dataset is not None and not (trainer.is_deepspeed_enabled and trainer.deepspeed is None):
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    with trainer.compute_loss_context_manager():
        if arguments.text_sources:
            allowed = arguments.bad_rows_allowed
            parts = read_parts(arguments.text_sources, collator.token_counts, arguments.data_dir, max_bad_rows=allowed)
            text = _text_of(parts, collator.processor)
            figures["text_perplexity"] = text_perplexity(model, collator.tokenizer, text)
        if arguments.alignment_records:
            records = (trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset)))
            with_image = list(islice((r for r in records if r["images"]), arguments.alignment_records))
            if not with_image:
                raise ValueError(
                    "alignment_records: eval_sources hold no record with an image. Name some, or leave it out."
                )
            figures |= alignment_figures(model, collator, with_image)
    if logged := {name: value for name, value in figures.items() if name != "eval_loss"}:
        trainer.log(logged)
    return figures


def _text_of(parts: list[Part], processor: AlignVLMProcessor, records: int = 5000) -> str:
    """The first records one after the other: exchanges as the chat template writes them, plain text as it is."""
    texts = []
    for part in parts:
        for annotation in (a for record in islice(iter(part.source), records) for a in record["annotations"]):
            roles = {"user": annotation["prompt"], "assistant": annotation["response"]}
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles.items()]
            texts.append(processor.apply_chat_template(messages) if annotation["prompt"] else annotation["response"])
    return "\n".join(text.strip() for text in texts)


def _options(arguments: StageArguments, averaged: list[str]) -> dict:
    """What of the options that are off by default is on, for the run record."""
    lora = {name: getattr(arguments, f"lora_{name}") for name in ("r", "alpha", "dropout", "target_modules", "merge")}
    options = {
        "lora": lora if arguments.lora_r else None,
        "frozen_16_bit": arguments.frozen_16_bit,
        "muon": arguments.muon,
        "infinite_schedule": arguments.infinite_schedule,
        "averaged": averaged,
        "token_weighting": arguments.token_weighting if arguments.token_weighting != "none" else None,
    }
    return {name: value for name, value in options.items() if value or value == {}}


def _restore(model: AlignVLMForConditionalGeneration, rounded: list[str], arguments: StageArguments) -> None:
    """Gives parameters that were rounded to 16 bits the values they were read with."""
    model.float()
    read = load_model(arguments).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in rounded:
                parameter.copy_(read[name.replace(".base_layer.", ".")])  # LoRA puts the layer it is added to there


def _checkpoint_to_resume(arguments: StageArguments) -> str | None:
    """The checkpoint the run goes on from.

    Raises:
        ValueError: if there is none, if the one named was not written to its end, or if a run that starts anew would mix its
            checkpoints with those of another.
    """
    given, last = arguments.resume_from_checkpoint, last_whole_checkpoint(arguments.output_dir)
    if given in (None, False):
        if last is not None:
            raise ValueError(
                f"{arguments.output_dir!r} holds {last.name} of an earlier run. Go on from it with --resume_from_checkpoint, or name "
                "another output_dir."
            )
        return None
    if given in ("last", True):
        if last is None:
            raise ValueError(
                f"Nothing to resume: {arguments.output_dir!r} holds no whole checkpoint-* folder. Start without the flag."
            )
        return str(last)
    if not is_whole(Path(given)):
        raise ValueError(f"Nothing to resume: {given!r} is no checkpoint-* folder that was written to its end.")
    return given


def _check_unfinished(arguments: StageArguments, resume_from: str | None, total_steps: int) -> None:
    """Refuses to go on with a run that has taken all its steps and written its checkpoint.

    Raises:
        ValueError: for such a run.
    """
    finished = Path(arguments.output_dir) / RUN_RECORD  # written last
    if resume_from is None or not finished.is_file():
        return
    steps = json.loads((Path(resume_from) / "trainer_state.json").read_text())["global_step"]
    if steps >= total_steps:
        raise ValueError(
            f"The run in {arguments.output_dir!r} is finished: {steps} of {total_steps} steps are taken, and its checkpoint is whole. "
            "To train longer, raise max_steps or num_train_epochs; to train anew, name another output_dir."
        )


def _order_of_records(arguments: StageArguments, mixture: Mixture) -> dict:
    """What decides which record is read when, as JSON gives it back. Where files lie does not matter, what is in them does."""
    order = {
        "global_batch_size": _records_per_step(arguments),
        "sources": [{k: v for k, v in entry.items() if k not in ("data", "image_dir")} for entry in arguments.sources],
        "data": mixture.record(),
        "seed": arguments.seed if arguments.data_seed is None else arguments.data_seed,
        "streaming": arguments.streaming,
        "image_token_share": arguments.image_token_share,
        "texts_first": None if mixture.sampler is None else mixture.sampler.texts_first,
    }
    return json.loads(json.dumps(order))


def _progress_to_go_on_with(arguments: StageArguments, resume_from: str | None, order: dict) -> dict:
    """How far the checkpoint had come that the run goes on from; nothing for a new run.

    Raises:
        ValueError: if its run read other data, or in another order or batch size; the message says what differs.
    """
    if resume_from is None:
        return {}
    progress = read_progress(resume_from)
    step = json.loads((Path(resume_from) / "trainer_state.json").read_text())["global_step"]
    if progress is None:
        logger.warning(
            f"{resume_from} does not say what its run read (it was written by an earlier version): that the data are the same is not "
            "checked, and seconds, train_loss and losses_of_data in the run record are those from here on."
        )
        return {"resumed_at": [step]}
    others = list(_differences(progress["order"], order))
    if others and not arguments.allow_other_data:
        raise ValueError(
            f"{resume_from} was written by a run that read other data: {'; '.join(others[:5])}. To go on from step {step} would skip "
            "some records and read others twice. Give the stage what it had (for the same global batch size: "
            "per_device_train_batch_size x gradient_accumulation_steps x processes), or go on all the same with "
            "--allow_other_data true."
        )
    return {**progress, "resumed_at": [*progress["resumed_at"], step]}


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two values that JSON can hold differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif before != now:
        yield f"{name} was {shown(before)} and is {shown(now)}"


def _with_bad_rows(losses_of_data: dict, mixture: Mixture, held_out: Mixture | None) -> dict:
    """The losses of data together with the rows that were left out when the sources were read."""
    bad = [*mixture.bad_rows, *(f"eval_sources: {row}" for row in (held_out.bad_rows if held_out else []))]
    counts = {"bad_row": losses_of_data.get("bad_row", 0) + len(bad)} if bad else {}
    return {**losses_of_data, **counts, "bad_row_list": [*bad, *losses_of_data["bad_row_list"]][:1000]}


def _describe(arguments: StageArguments, counts: dict[str, tuple[int, int]], mixture: Mixture) -> str:
    """What is frozen and what trains, for the log."""
    records = "a stream of" if mixture.draws is None else f"{sum(mixture.draws):,}"
    lines = [f"Stage {arguments.stage}: {records} records, mask type {arguments.attention_mask_type!r}"]
    lines.append(f"  precision {arguments.chosen_precision}")
    for module, (trainable, total) in counts.items():
        rate = arguments.learning_rates.get(module)
        state = "frozen" if rate is None else f"trains at {rate:g}"
        lines.append(f"  {module:<10} {total:>13,} parameters, {trainable:>13,} trainable: {state}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Parses command line and YAML into `StageArguments` and runs the stage; a field nobody knows is an error."""
    (arguments,) = parse_fields(sys.argv[1:] if argv is None else argv, StageArguments)
    return run_stage(arguments)
