"""One training stage: load, freeze, data, train, save, record.

What a stage trains, at which learning rates, under which mask and on which sources stands in its YAML file and nowhere else:

    accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml [--any_field value]
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import SFTConfig, TrlParser

from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.configuration_alignvlm import MASK_TYPES
from training.checkpoint import library_versions, read_run_record, save_checkpoint
from training.collator import AlignVLMCollator
from training.data import Mixture, load_mixture
from training.trainer import MODULES, AlignVLMTrainer


logger = logging.get_logger(__name__)


@dataclass
class StageArguments(SFTConfig):
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
    attention_mask_type: str = field(
        default="image", metadata={"help": f"Who may look ahead: one of {', '.join(MASK_TYPES)}."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "`sdpa`, `flex_attention` or `eager`."})
    row_length: int | None = field(
        default=None,
        metadata={"help": "Fill rows of several records up to so many tokens (first fit); meant for flex_attention."},
    )
    sources: str | None = field(  # in YAML a list
        default=None, metadata={"help": "What to train on: a list of {name, arguments}; on the command line as JSON."}
    )
    eval_sources: str | None = field(
        default=None, metadata={"help": "Held-out records; their loss is recorded before and after the stage."}
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
    evaluation_tag: str = field(
        default="", metadata={"help": "The source tag to put before prompts at evaluation; goes into the run record."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the last checkpoint in output_dir, or from the one named.",
            "nargs": "?",
            "const": "last",
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("sources", "eval_sources"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, json.loads(value))
        for module in MODULES:
            rate = getattr(self, f"{module}_learning_rate")
            if rate is not None and rate <= 0:
                raise ValueError(
                    f"{module}_learning_rate={rate} must be positive. To freeze the module, leave the field out."
                )
        if not self.learning_rates:
            raise ValueError(
                f"Nothing trains: set at least one of {', '.join(f'{m}_learning_rate' for m in MODULES)}."
            )
        if not self.model or not self.sources:
            raise ValueError("A stage needs `model` (a checkpoint to start from) and `sources` (what to train on).")
        if self.attention_mask_type not in MASK_TYPES:
            raise ValueError(
                f"Unknown attention_mask_type {self.attention_mask_type!r}. Valid values: {', '.join(MASK_TYPES)}."
            )
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image={self.on_bad_image!r}: expected `raise` or `skip`.")
        if self.streaming and self.max_steps <= 0:
            raise ValueError("A stream has no length: streaming needs max_steps.")
        self.learning_rate = max(self.learning_rates.values())  # what the log shows first
        self.remove_unused_columns = False  # the collator reads records
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.push_to_hub = False  # it would upload optimizer states; see hub_upload/

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module that trains."""
        rates = {module: getattr(self, f"{module}_learning_rate") for module in MODULES}
        return {module: rate for module, rate in rates.items() if rate is not None}


def make_collator(arguments: StageArguments, processor: AlignVLMProcessor) -> AlignVLMCollator:
    """The collator of a stage."""
    return AlignVLMCollator(
        processor,
        mask_type=arguments.attention_mask_type,
        max_length=arguments.max_length,
        row_length=arguments.row_length,
        pad_to_multiple_of=arguments.pad_to_multiple_of if isinstance(arguments.pad_to_multiple_of, int) else None,
        on_bad_image=arguments.on_bad_image,
    )


def make_mixture(arguments: StageArguments, collator: AlignVLMCollator) -> Mixture:
    """What a stage trains on."""
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return load_mixture(
        arguments.sources,
        collator,
        arguments.data_dir,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        epochs=arguments.num_train_epochs,
        image_token_share=arguments.image_token_share,
        image_start_fraction=arguments.image_start_fraction,
        streaming=arguments.streaming,
        stream_records=arguments.max_steps * per_step,
        earlier_stages=read_run_record(arguments.model)["stages"],
    )


def run_stage(arguments: StageArguments) -> dict:
    """Runs one stage and writes its checkpoint to `output_dir`; returns the stage's entry in the run record."""
    set_seed(arguments.seed)
    record = read_run_record(arguments.model)
    processor = AlignVLMProcessor.from_pretrained(arguments.model, revision=arguments.model_revision)
    model = AlignVLMForConditionalGeneration.from_pretrained(
        arguments.model,
        revision=arguments.model_revision,
        attention_mask_type=arguments.attention_mask_type,
        attn_implementation=arguments.attn_implementation,
        dtype=torch.float32,  # master weights; fp16 and bf16 run under autocast
    )
    collator = make_collator(arguments, processor)
    with PartialState().main_process_first():  # datasets writes its cache once
        mixture = make_mixture(arguments, collator)
        eval_dataset = None
        if arguments.eval_sources:
            eval_dataset = load_mixture(arguments.eval_sources, collator, arguments.data_dir).dataset
    trainer = AlignVLMTrainer(
        model,
        learning_rates=arguments.learning_rates,
        sampler=mixture.sampler,
        max_bad_images=arguments.max_bad_images,
        args=arguments,
        data_collator=collator,
        train_dataset=mixture.dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        print(_describe(arguments, trainer.parameter_counts, mixture), flush=True)

    eval_loss_before = trainer.evaluate()["eval_loss"] if eval_dataset is not None else None
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=_checkpoint_to_resume(arguments))
    seconds = time.perf_counter() - started
    eval_loss_after = trainer.evaluate()["eval_loss"] if eval_dataset is not None else None

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    entry = {
        "stage": arguments.stage,
        "model": arguments.model,
        "model_revision": arguments.model_revision,
        "learning_rates": arguments.learning_rates,
        "attention_mask_type": arguments.attention_mask_type,
        "sources": arguments.sources,
        "data": mixture.record(),
        "records": None if mixture.draws is None else sum(mixture.draws),
        "losses_of_data": trainer.losses_of_data(),
        "evaluation_tag": arguments.evaluation_tag,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "seed": arguments.seed,
        "precision": "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "fp32",
        "processes": arguments.world_size,
        "seconds": round(seconds, 1),
        "train_loss": result.training_loss,
        "logged_losses": losses,
        "eval_loss_before": eval_loss_before,
        "eval_loss_after": eval_loss_after,
        "versions": library_versions(),
    }
    record["stages"].append(entry)
    if trainer.is_world_process_zero():
        save_checkpoint(trainer.accelerator.unwrap_model(trainer.model), processor, arguments.output_dir, record)
    trainer.accelerator.wait_for_everyone()
    return entry


def _checkpoint_to_resume(arguments: StageArguments) -> str | None:
    if arguments.resume_from_checkpoint != "last":
        return arguments.resume_from_checkpoint
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    if last is None:
        raise ValueError(
            f"Nothing to resume: {arguments.output_dir!r} holds no checkpoint-* folder. Start without the flag."
        )
    return last


def _describe(arguments: StageArguments, counts: dict[str, tuple[int, int]], mixture: Mixture) -> str:
    """What is frozen and what trains, for the log."""
    records = "a stream of" if mixture.draws is None else f"{sum(mixture.draws):,}"
    lines = [f"Stage {arguments.stage}: {records} records, mask type {arguments.attention_mask_type!r}"]
    for module, (trainable, total) in counts.items():
        rate = arguments.learning_rates.get(module)
        state = "frozen" if rate is None else f"trains at {rate:g}"
        lines.append(f"  {module:<10} {total:>13,} parameters, {trainable:>13,} trainable: {state}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Parses command line and YAML into `StageArguments` and runs the stage; a field nobody knows is an error."""
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(sys.argv[1:] if argv is None else argv)
    return run_stage(arguments)
