"""The arguments of a stage: the fields of TRL's `SFTConfig` and those of AlignVLM, in parts that each check their own fields.

A recipe is one flat YAML file: `StageArguments` joins the parts and the config of TRL's trainer, and TRL's parser reads them as one
dataclass. A part inherits from those whose fields it reads, and checks its own in `__post_init__` after them; the trainer's config stands last.
Stage 5 joins the same parts to the configs of other trainers (`alignvlm/stages/reward_arguments.py`).
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from multiprocessing import get_all_start_methods
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from alignvlm.data.record import ON_BAD_ROW, shown
from alignvlm.evaluation.precision import Precision, choose_precision
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.losses import TOKEN_WEIGHTINGS
from alignvlm.stages.mask_types import mask_type_shares
from alignvlm.stages.schedules import check_phases
from alignvlm.stages.tiles import TileArguments
from alignvlm.stages.trainer import MODULES
from hub_upload.commit import check_name
from modeling_alignvlm.masking_alignvlm import describe_mask_types


KERNELS = ("sdpa", "flex_attention", "eager")
# Fields of TRL that stages 1 to 4 do not read, or that would change a checkpoint behind its back, and what there is instead.
REFUSED = {
    "packing": "row_length fills rows with several records",
    "padding_free": "row_length fills rows with several records",
    "eval_packing": "held-out records have rows of their own",
    "assistant_only_loss": "the loss is that of responses; `turns` and `train_on` of a source say of which",
    "completion_only_loss": "the loss is that of responses; `turns` and `train_on` of a source say of which",
    "dataset_text_field": "the schema of a source says which columns are read",
    "dataset_num_proc": "dataloader_num_workers read the records",
    "truncation_mode": "where max_length is too short, an answer is cut at its end",
    "packing_strategy": "row_length fills rows with several records",
    "use_liger_kernel": "Liger has no kernels for models of this type",
    "chat_template_path": "the chat template is the checkpoint's",
    "eos_token": "the special tokens are the checkpoint's",
    "pad_token": "the special tokens are the checkpoint's",
    "model_init_kwargs": "the model is the checkpoint's; see precision and attn_implementation",
    "group_by_length": "the order of records is that of the mixture",
    "train_sampling_strategy": "the order of records is that of the mixture",
    "optim_target_modules": "each module has its own learning rate",
    "bf16_full_eval": "held-out records are measured in the stage's precision, and this would round the weights that are trained",
    "fp16_full_eval": "held-out records are measured in the stage's precision, and this would round the weights that are trained",
}
# Values of these that ask for what happens anyway.
GRANTED = {"completion_only_loss": True, "eval_packing": False}
# Beginnings of the names of fields that say where things lie, what is measured, shown and kept, and on how many devices.
CHANGE_NOTHING = tuple(
    """
    model sources eval_ text_sources alignment_records metric_for greater_is do_ per_device_eval data_dir
    features_dir output_dir resume_ allow_other restore_ run_name project trackio report log_ logging_ show_
    disable_tqdm save_ push_ hub_ use_cpu local_rank deepspeed fsdp ddp_ dataset_kwargs accelerator_config
    dataloader_num dataloader_p stage skip_memory debug remove_unused bf16 fp16 tf32 learning_rate
    gradient_checkpointing activation_checkpointing pad_to_multiple_of
    """.split()
)
BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
HELD_OUT_METRICS = ("loss", "entropy", "mean_token_accuracy")  # of TRL, on eval_sources
NEEDED = "A stage needs `model` (a checkpoint to start from), `sources` (what to train on) and `output_dir` (where its checkpoint goes)."


@dataclass
class ActivationCheckpointing:
    """Gives a config of TRL, the next of a class's bases, `activation_checkpointing`, its name since transformers 5.24, under every release."""

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass instead of keeping them: less memory, a third more work. On by default.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "How: see transformers' `activation_checkpointing_enable`; on the command line as JSON."},
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
class TrainerArguments(ActivationCheckpointing, SFTConfig):
    """TRL's `SFTConfig` with `activation_checkpointing`."""


@dataclass
class ModelArguments(TileArguments):
    """The checkpoint a stage starts from, which of its modules train, and who may attend to whom."""

    model: str = field(
        default="", metadata={"help": "Checkpoint to start from: the folder the stage before wrote, or a Hub id."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a model on the Hub."})
    attention_mask_type: dict[str, float] | str | None = field(
        default="image",
        metadata={
            "help": f"Which later tokens a token sees. {describe_mask_types()}. Or several with shares, of which every step draws one and the "
            "first is the checkpoint's: {image: 0.5, causal: 0.5}; on the command line as JSON."
        },
    )
    merge_image_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Merge similar tokens of an image until this number is left; 0: none. Left out: as in the checkpoint it starts from."
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "`sdpa`, `flex_attention` or `eager`."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector. Left out: frozen."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision encoder. Left out: frozen."}
    )
    language_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the language model and its head. Left out: frozen."}
    )

    def __post_init__(self):
        super().__post_init__()
        for module in MODULES:
            rate = getattr(self, f"{module}_learning_rate")
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(
                    f"{module}_learning_rate={rate} must be a positive number. To freeze the module, leave the field out."
                )
        if not self.learning_rates:
            raise ValueError(
                f"Nothing trains: set at least one of {', '.join(f'{m}_learning_rate' for m in MODULES)}."
            )
        if not self.model:
            raise ValueError(NEEDED)
        _expand_home(self, "model")
        self.check_tiles()
        self.mask_type_shares = mask_type_shares(self.attention_mask_type)
        self.attention_mask_type = next(iter(self.mask_type_shares))
        if self.attn_implementation not in KERNELS and "flash" not in self.attn_implementation:
            raise ValueError(
                f"Unknown attn_implementation {self.attn_implementation!r}. Valid values: {', '.join(KERNELS)}; for causal masks also "
                "those of transformers with `flash` in their names."
            )
        if self.attn_implementation == "flex_attention" and self._device_type() == "cpu":
            raise ValueError("attn_implementation='flex_attention' trains on GPUs only. Take sdpa or eager on a CPU.")
        if len(self.mask_type_shares) > 1 and "flash" in self.attn_implementation:
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} knows the mask type 'causal' alone. Take sdpa, flex_attention or eager."
            )
        highest = max(self.learning_rates.values())
        own_default = next(given.default for given in fields(self) if given.name == "learning_rate")
        if self.learning_rate not in (own_default, highest):
            raise ValueError(
                f"learning_rate={self.learning_rate:g} is not read: each module has its own. Set projector_learning_rate, "
                "vision_learning_rate and language_learning_rate, and leave it out."
            )
        self.learning_rate = highest  # what the log shows first

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module that trains."""
        rates = {module: getattr(self, f"{module}_learning_rate") for module in MODULES}
        return {module: rate for module, rate in rates.items() if rate is not None}


@dataclass
class OptimizationArguments:
    """What a stage computes in, its optimizer, its schedule and its loss."""

    precision: str = field(
        default="auto",
        metadata={
            "help": "What the stage computes in, with float32 master weights: `fp32`, `bf16`, `fp16`, or `auto`: what the device does "
            "natively. `bf16` and `fp16` of TRL are the same choice by flag."
        },
    )
    num_train_epochs: float = field(
        default=1.0,
        metadata={"help": "How often the stage reads its records: once, as in the paper. (TRL's default is 3.)"},
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
            "defaults; on the command line as JSON. See alignvlm/stages/schedules.py."
        },
    )
    token_weighting: str = field(
        default="none", metadata={"help": f"Weights of response tokens: one of {', '.join(TOKEN_WEIGHTINGS)}."}
    )
    embedding_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a loss that keeps the encoder's features readable in the language model's hidden states. 0: none."
        },
    )
    embedding_loss_layer: int | None = field(
        default=None,
        metadata={"help": "After how many of the language model's layers embedding_loss reads. Left out: half."},
    )

    def __post_init__(self):
        self.chosen_precision = self._choose_precision()
        self.bf16, self.fp16 = (self.chosen_precision.name == name for name in ("bf16", "fp16"))
        super().__post_init__()
        _check_numbers(self, "num_train_epochs", above=True)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps={self.max_steps} is no number of steps: give 1 or more, or -1, the default, to train for num_train_epochs."
            )
        if self.save_strategy == "steps":
            _check_numbers(self, "save_steps", above=True)
        _check_numbers(self, "gradient_accumulation_steps", lowest=1)
        _check_numbers(self, "weight_decay", "max_grad_norm")
        _check_numbers(self, "adam_epsilon", above=True)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be a number from 0 to {2**32 - 1}.")
        self._check_schedule()
        _read_json(self, "infinite_schedule", like={"cooldown": 0.25})
        _check_choice(self, "token_weighting", TOKEN_WEIGHTINGS)
        if self.label_smoothing_factor > 0:
            raise ValueError(
                "label_smoothing_factor needs the logits of all words at once, which stages do not compute. Leave it out."
            )
        if self.token_weighting != "none" and self.loss_type != "nll":
            raise ValueError("token_weighting weighs the plain loss: leave out loss_type.")
        if not 0 <= self.embedding_loss < float("inf"):
            raise ValueError(
                f"embedding_loss={self.embedding_loss} is a weight: give 0 (off) or a positive number, such as 0.1."
            )
        if self.embedding_loss_layer is not None and not self.embedding_loss:
            raise ValueError(
                f"embedding_loss_layer={self.embedding_loss_layer} is read by embedding_loss only: set it, too."
            )
        if self.infinite_schedule is not None:
            check_phases(**self.infinite_schedule)

    def _check_schedule(self) -> None:
        """Makes the schedule once, so that one that `lr_scheduler_kwargs` does not fit is told of before anything is read."""
        if self.infinite_schedule is not None:
            return
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        name = SchedulerType(self.lr_scheduler_type).value
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, self.get_warmup_steps(100), 100, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type={name!r} cannot be made with lr_scheduler_kwargs={self.lr_scheduler_kwargs}: {error}"
            ) from error

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

    @property
    def dtype_16_bit(self) -> torch.dtype | None:
        """What autocast computes in; None in float32."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None

    def settings(self) -> dict[str, Any]:
        """The sizes of batches and the fields that are not at their defaults, by name and as JSON holds them, but for learning rates, which are
        recorded apart, and those that change nothing that is trained."""
        names = []
        for given in fields(self):
            if given.name.startswith(CHANGE_NOTHING) or given.name.endswith(("_learning_rate", "_token")):
                continue
            default = given.default if given.default_factory is MISSING else given.default_factory()
            if getattr(self, given.name) != default or given.name in BATCH_SIZES:
                names.append(given.name)
        values = self.to_dict()
        return {name: values[name] for name in sorted(names)}

    def optimization_record(self) -> dict[str, Any]:
        """The options of this part that are on, for the run record."""
        options = {
            "muon": self.muon or None,
            "infinite_schedule": self.infinite_schedule,
            "token_weighting": self.token_weighting if self.token_weighting != "none" else None,
        }
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class WeightsArguments(OptimizationArguments, ModelArguments):
    """How the model holds its weights in training, and which weights the stage writes: see `alignvlm/stages/weights.py`."""

    lora_r: int = field(
        default=0,
        metadata={"help": "Train LoRA layers of this rank instead of all of the language model. 0: no LoRA."},
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "LoRA's products are multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA layers."})
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the language model's linear layers that get LoRA; on the command line as JSON. Left out: all but the head."
        },
    )
    lora_merge: bool = field(
        default=True,
        metadata={"help": "Add LoRA's products to the weights in the end. False: write them apart, into lora/."},
    )
    frozen_16_bit: bool = field(
        default=False,
        metadata={"help": "Hold frozen modules in the 16 bits of `bf16` or `fp16`; they are saved as read."},
    )
    average_last: int = field(
        default=0,
        metadata={"help": "Write the mean of the weights of the last N checkpoints. 0: the last weights."},
    )
    keep_language: float = field(
        default=0.0,
        metadata={
            "help": "Mix the trained language model with the untouched one, which gets this share: less is forgotten. 0: no mixing."
        },
    )
    keep_language_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint whose language model is the untouched one for keep_language, such as that of stage 0. Left out: `model`."
        },
    )
    projector_start: str | None = field(
        default=None,
        metadata={
            "help": "`least_squares`: begin with the projector's last linear layer solved for, so that image tokens lie near the embeddings of "
            "their captions. Left out: begin with the weights of `model`."
        },
    )
    projector_start_records: int = field(
        default=2000, metadata={"help": "How many records with an image projector_start reads."}
    )
    projector_start_ridge: float = field(
        default=1e-4,
        metadata={
            "help": "Penalty of projector_start on the weights, as a share of the mean square of the layer's input."
        },
    )
    cache_features: bool = field(
        default=False,
        metadata={
            "help": "Encode each image once, keep the features of the frozen vision encoder on disk, and train from them: the same loss, bit "
            "for bit."
        },
    )
    features_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the features, for several stages with the same encoder. Left out: features/ in output_dir."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        _check_numbers(self, "lora_r", "average_last")
        _check_numbers(self, "lora_alpha", above=True)
        _expand_home(self, "keep_language_from", "features_dir")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} is a probability: give a number from 0 to below 1.")
        _read_json(self, "lora_target_modules", like=["q_proj", "v_proj"])
        if self.cache_features and self.vision_learning_rate is not None:
            raise ValueError(
                f"cache_features keeps features of a frozen encoder, and vision_learning_rate={self.vision_learning_rate} trains it: leave "
                "one of them out."
            )
        if self.features_dir is not None and not self.cache_features:
            raise ValueError(f"features_dir={self.features_dir!r} is read by cache_features only: set it, too.")
        if self.lora_r and self.language_learning_rate is None:
            raise ValueError("lora_r trains the language model: set language_learning_rate.")
        if self.frozen_16_bit and self.dtype_16_bit is None:
            raise ValueError(
                f"frozen_16_bit needs bf16 or fp16, which say in which 16 bits; the stage computes in {self.chosen_precision}."
            )
        self._refuse_options_of("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_merge")
        self._refuse_options_of("projector_start", "projector_start_records", "projector_start_ridge")
        self._check_keep_language()
        self._check_projector_start()
        if self.average_last and self.save_strategy == "no":
            raise ValueError(f"average_last={self.average_last} needs checkpoints: set save_strategy and save_steps.")
        if self.average_last and self.load_best_model_at_end:
            raise ValueError(
                f"average_last={self.average_last} writes the mean of the last checkpoints, load_best_model_at_end the best one: leave out one."
            )
        if self.average_last and self.save_total_limit is not None and self.save_total_limit < self.average_last:
            raise ValueError(
                f"save_total_limit={self.save_total_limit} keeps less checkpoints than average_last={self.average_last}."
            )

    def _refuse_options_of(self, owner: str, *names: str) -> None:
        """Refuses options that only `owner` reads, where it is off."""
        if getattr(self, owner):
            return
        defaults = {given.name: given.default for given in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} is read by {owner} only: set it, too.")

    def _check_keep_language(self) -> None:
        if not 0 <= self.keep_language < 1:
            raise ValueError(
                f"keep_language={self.keep_language} is the share of the untouched language model: give a number from 0 (off) to below 1, "
                "such as 0.3."
            )
        if self.keep_language and self.language_learning_rate is None:
            raise ValueError(
                f"keep_language={self.keep_language} mixes a trained language model with the untouched one, and this stage freezes it: set "
                "language_learning_rate, or leave keep_language out."
            )
        if self.keep_language_from is not None and not self.keep_language:
            raise ValueError(
                f"keep_language_from={self.keep_language_from!r} is read by keep_language only: set it, too."
            )
        if self.keep_language_from is not None and self.lora_r:
            raise ValueError(
                "With lora_r the untouched language model is the one that LoRA is added to: leave out keep_language_from."
            )

    def _check_projector_start(self) -> None:
        if self.projector_start is None:
            return
        _check_choice(self, "projector_start", ("least_squares",))
        if self.projector_learning_rate is None:
            raise ValueError(
                f"projector_start={self.projector_start!r} is where the training of the projector begins, and this stage freezes it: set "
                "projector_learning_rate, or leave projector_start out."
            )
        if self.projector_start_records < 1:
            raise ValueError(f"projector_start_records={self.projector_start_records} must be at least 1.")
        if not 0 <= self.projector_start_ridge < float("inf"):
            raise ValueError(
                f"projector_start_ridge={self.projector_start_ridge} must be 0 or a positive number, such as 1e-4."
            )


@dataclass
class DataArguments:
    """What a stage trains on, how it is mixed and packed, what may be dropped, and what the stage is measured on."""

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
            "help": "On the first N records of eval_sources with an image, record the modality integration rate and the norms of image "
            "and text embeddings before and after the stage."
        },
    )
    data_dir: str = field(default=".", metadata={"help": "Folder at which relative paths of sources start."})
    row_length: int | None = field(
        default=None,
        metadata={
            "help": "Fill rows of up to N tokens with records of different images. Batch sizes then count rows, not records."
        },
    )
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
        default="raise", metadata={"help": "For an image that cannot be read: `raise`, or `skip` its record."}
    )
    max_bad_images: float = field(
        default=0.01,
        metadata={"help": "With on_bad_image: skip, the share of records at which the run stops after all."},
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "For a row with texts that cannot be used (null, a number, empty, ...): `raise`, or `skip` it."
        },
    )
    max_bad_rows: float = field(
        default=0.01, metadata={"help": "With on_bad_row: skip, the share of rows at which the run stops after all."}
    )

    def __post_init__(self):
        super().__post_init__()
        _read_json(self, "sources", "eval_sources", "text_sources", like=[{"name": "scenes", "count": 16}])
        if not self.sources:
            raise ValueError(NEEDED)
        _check_numbers(
            self, "per_device_train_batch_size", "per_device_eval_batch_size", "max_length", "row_length", lowest=1
        )
        _check_numbers(self, "alignment_records", "data_seed", "image_start_fraction", "dataloader_num_workers")
        _check_numbers(self, "dataloader_prefetch_factor", lowest=1)
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers keeps workers: set dataloader_num_workers, too.")
        if self.dataloader_multiprocessing_context is not None:
            _check_choice(self, "dataloader_multiprocessing_context", get_all_start_methods())
        _check_choice(self, "on_bad_image", ("raise", "skip"))
        _check_choice(self, "on_bad_row", ON_BAD_ROW)
        for name in ("max_bad_images", "max_bad_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a share of what is read: give a number from 0 to 1, such as 0.01 for one in a hundred."
                )
        if self.streaming and self.max_steps <= 0:
            raise ValueError("A stream has no length: streaming needs max_steps.")
        if self.alignment_records and not self.eval_sources:
            raise ValueError("alignment_records are taken from eval_sources: name some.")
        self.remove_unused_columns = False  # the collator reads records
        self.dataset_kwargs = {"skip_prepare_dataset": True}

    @property
    def bad_rows_allowed(self) -> float | None:
        """The share of rows that may be bad; None: none."""
        return self.max_bad_rows if self.on_bad_row == "skip" else None

    @property
    def order_seed(self) -> int:
        """The seed of the order of records."""
        return self.seed if self.data_seed is None else self.data_seed

    def records_per_step(self, processes: int | None = None) -> int:
        """The global batch size, of `processes` or else of those that run."""
        per_process = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return per_process * (self.world_size if processes is None else processes)


@dataclass
class RecordArguments:
    """Which stage it is, what it goes on from, and what becomes of its checkpoint."""

    stage: int = field(default=0, metadata={"help": "Number of the stage, 1 to 4; names it in logs and records."})
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
            "help": "Go on from a checkpoint although the data, their order or the global batch size differ from before; some records "
            "are then skipped or read twice."
        },
    )
    save_on_signal: bool = field(
        default=True,
        metadata={"help": "On Ctrl-C and SIGTERM, finish the step, write a checkpoint, and say how to go on."},
    )
    show_every: int = field(
        default=0,
        metadata={
            "help": "Every N steps, before the first and after the last, show what the model answers to a few prompts of eval_sources (of "
            "sources, where there are none): in the log, and with the images in `report_to`. 0: never."
        },
    )
    evaluation_tag: str = field(
        default="", metadata={"help": "The source tag to put before prompts at evaluation; goes into the run record."}
    )
    report: bool = field(
        default=True,
        metadata={"help": "Write report.html, a page about the stage and those before it, when it is finished."},
    )
    push_to: str | None = field(
        default=None,
        metadata={
            "help": "Repository of the Hub, user/name, that gets the checkpoint of the stage, tagged stage<N>, or stage<N>-2 where that is "
            "taken. Private if new."
        },
    )
    push_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, for the card that push_to writes. Left out: the strictest of the backbones'."
        },
    )

    def __post_init__(self):
        if not self.output_dir:  # transformers would write into trainer_output
            raise ValueError(NEEDED)
        super().__post_init__()
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint: leave it out. save_on_signal, which is on by default, writes the checkpoint, for Ctrl-C too."
            )
        if self.save_only_model:
            raise ValueError(
                "save_only_model: leave it out. A checkpoint without its optimizer cannot be gone on from; the finished stage holds the model "
                "alone."
            )
        _expand_home(self, "resume_from_checkpoint")
        if self.show_every < 0:
            raise ValueError(f"show_every={self.show_every} must be a number of steps; 0 shows nothing.")
        self.report_to = [name for name in self.report_to if name not in (None, "none")]
        for name in self.report_to:
            if name not in (installed := get_available_reporting_integrations()):
                raise ValueError(
                    f"report_to: {name!r} is not installed, or is none of transformers' trackers. Valid here: "
                    f"{', '.join(['none', *installed])}; several as a list."
                )
        if self.push_to:
            check_name(self.push_to)
        elif self.push_license:
            raise ValueError(f"push_license={self.push_license!r} is read by push_to only: set it, too.")
        if self.push_to_hub or (self.hub_model_id and not self.push_to):
            raise ValueError(
                "push_to_hub and hub_model_id would upload everything in output_dir, optimizer states too: leave them out. push_to: user/name "
                "pushes the finished stage."
            )


@dataclass
class StageArguments(RecordArguments, DataArguments, WeightsArguments, TrainerArguments):
    """The fields of TRL's `SFTConfig`, and what makes a stage of AlignVLM."""

    def __post_init__(self):
        self._refuse_what_nothing_reads()
        super().__post_init__()
        self._check_evaluation()
        _check_numbers(self, "pad_to_multiple_of")
        if self.cache_features and self.streaming:
            raise ValueError("cache_features must know the images beforehand, and a stream does not: leave out one.")
        if self.row_length is not None:
            self._check_rows()
        if self.projector_start and self.streaming:
            raise ValueError(
                "projector_start reads records before training, and a stream has none yet: leave out one."
            )
        if self.cache_features and self.torch_compile:
            raise ValueError(
                "cache_features: a compiled encoder rounds otherwise. Leave out torch_compile, or cache_features."
            )

    def _refuse_what_nothing_reads(self) -> None:
        defaults = {given.name: given.default for given in fields(self)}
        for name, instead in REFUSED.items():
            if name in defaults and getattr(self, name) not in (defaults[name], GRANTED.get(name, defaults[name])):
                raise ValueError(f"{name}: leave it out; {instead}.")

    def _check_evaluation(self) -> None:
        """Refuses evaluations on the way that would have nothing to measure, or not what is asked for."""
        if not self.eval_sources and (self.eval_strategy != "no" or self.eval_on_start):
            name = "eval_strategy" if self.eval_strategy != "no" else "eval_on_start"
            raise ValueError(f"{name} measures on eval_sources: name some, or leave {name} out.")
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in HELD_OUT_METRICS:
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r} is not measured while a stage trains. Valid values: "
                f"{', '.join(HELD_OUT_METRICS)}."
            )

    def _check_rows(self) -> None:
        if self.max_length is None or self.max_length > self.row_length:
            raise ValueError(
                f"max_length={self.max_length} allows records that are longer than rows of row_length={self.row_length} tokens. Set "
                f"max_length: {self.row_length} or less; what of a record is longer makes further rows."
            )
        if self.max_steps > 0 and self.image_start_fraction:
            raise ValueError(
                f"image_start_fraction counts records, and how many of them the rows of max_steps={self.max_steps} hold is not known: leave "
                "out row_length or image_start_fraction, or say num_train_epochs in place of max_steps."
            )


class ForAGPU:
    """Makes arguments those of a recipe that is only looked at where there is no GPU; the first of a class's bases."""

    def _device_type(self) -> str:
        return "cuda"


class ArgumentsForAGPU(ForAGPU, StageArguments):
    """Arguments of stages 1 to 4, only looked at."""


def parse_anywhere(argv: list[str], *more: type, also: Iterable[str] = ()) -> tuple:
    """Parses `StageArguments` and `more` dataclasses for looking only: a recipe for a GPU is read without one too. See `parse_fields`."""
    if torch.accelerator.is_available():
        return parse_fields(argv, StageArguments, *more, also=also)
    return parse_fields(["--use_cpu", "true", *argv], ArgumentsForAGPU, *more, also=also)


def _read_json(arguments: Any, *names: str, like: list | dict) -> None:
    """Decodes fields that came from the command line as JSON, and checks that they hold what `like`, an example, holds.

    Raises:
        ValueError: for what is not JSON, no such list or mapping, or holds something else.
    """
    example = f"Expected {'a list' if isinstance(like, list) else 'a mapping'} such as {json.dumps(like)}."
    item = type((like if isinstance(like, list) else list(like.values()))[0])
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                rest = value[error.pos : error.pos + 30]
                where = f"at {rest!r}" if rest else "at the end"
                raise ValueError(
                    f"{name} is not valid JSON: {error.msg} {where}, character {error.pos + 1}. {example}"
                ) from error
            setattr(arguments, name, value)
        if value is None:
            continue
        items = list(value.values()) if isinstance(value, dict) else value
        kinds = (int, float) if item is float else item
        fits = isinstance(value, type(like)) and all(isinstance(each, kinds) for each in items)
        if not fits or any(isinstance(each, bool) for each in items):
            raise ValueError(f"{name}={shown(value)}. {example}")


def _check_numbers(arguments: Any, *names: str, lowest: float = 0, above: bool = False) -> None:
    """Refuses numbers below `lowest`, or with `above` also this one, and what is no finite number; None is left alone."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not (lowest < value < math.inf if above else lowest <= value < math.inf):
            finite = " and finite" if value == math.inf else ""
            raise ValueError(f"{name}={value} must be {'above' if above else 'at least'} {lowest}{finite}.")


def _expand_home(arguments: Any, *names: str) -> None:
    """Writes out `~` in paths, as transformers does in `output_dir`."""
    for name in names:
        if isinstance(getattr(arguments, name), str):
            setattr(arguments, name, os.path.expanduser(getattr(arguments, name)))


def _check_choice(arguments: Any, name: str, valid: Iterable[str]) -> None:
    if getattr(arguments, name) not in valid:
        raise ValueError(f"Unknown {name} {getattr(arguments, name)!r}. Valid values: {', '.join(valid)}.")
