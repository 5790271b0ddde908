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
from training.data import load_sources
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
        self.learning_rate = max(self.learning_rates.values())  # what the log shows first
        self.remove_unused_columns = False  # the collator reads records
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.push_to_hub = False  # it would upload optimizer states; see hub_upload/

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module that trains."""
        rates = {module: getattr(self, f"{module}_learning_rate") for module in MODULES}
        return {module: rate for module, rate in rates.items() if rate is not None}


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
    with PartialState().main_process_first():  # datasets writes its cache once
        train_dataset = load_sources(arguments.sources, arguments.data_dir)
        eval_dataset = load_sources(arguments.eval_sources, arguments.data_dir) if arguments.eval_sources else None
    trainer = AlignVLMTrainer(
        model,
        learning_rates=arguments.learning_rates,
        args=arguments,
        data_collator=AlignVLMCollator(
            processor,
            mask_type=arguments.attention_mask_type,
            max_length=arguments.max_length,
            row_length=arguments.row_length,
            pad_to_multiple_of=arguments.pad_to_multiple_of if isinstance(arguments.pad_to_multiple_of, int) else None,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        print(_describe(arguments, trainer.parameter_counts, len(train_dataset)), flush=True)

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
        "records": len(train_dataset),
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


def _describe(arguments: StageArguments, counts: dict[str, tuple[int, int]], records: int) -> str:
    """What is frozen and what trains, for the log."""
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
