"""The arguments of stage 5: those of the other stages that it has, and the fields of TRL's `GRPOConfig` or `DPOConfig`.

The recipe's `method` chooses which; a field of the other method is unknown.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, GRPOConfig

from alignvlm.evaluation.rewards import REWARDS
from alignvlm.stages.arguments import (
    ActivationCheckpointing,
    DataArguments,
    ForAGPU,
    ModelArguments,
    OptimizationArguments,
    RecordArguments,
    WeightsArguments,
    parse_anywhere,
)
from alignvlm.stages.command_line import parse_fields, read_yaml


# Of the options of the other stages, those that stage 5 has too; those of a model's start and of the run record it has all.
KEPT = {
    *("precision", "num_train_epochs", "muon", "infinite_schedule"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_merge", "frozen_16_bit", "average_last"),
    *("keep_language", "keep_language_from"),
    *("sources", "eval_sources", "text_sources", "data_dir", "on_bad_row", "max_bad_rows"),
}
KEPT |= {given.name for part in (ModelArguments, RecordArguments) for given in fields(part)}
# Fields of TRL that would read the model from elsewhere, or answer with another program.
REFUSED = {
    "use_vllm": "answers are sampled by the model itself, under its own masks",
    "use_transformers_continuous_batching": "TRL has it for language models alone",
    "log_multimodal": "processes whose prompts have no image would wait for ever; show_every logs images with answers",
    "sync_ref_model": "the reference is the model that the stage starts from",
    "precompute_ref_log_probs": "images are read as they are needed",
    "padding_free": "rows are padded",
    "use_liger_kernel": "Liger has no kernels for models of this type",
    "bf16_full_eval": "it would round the weights that are trained",
    "fp16_full_eval": "it would round the weights that are trained",
}

# Numbers of TRL's configs that it checks only while it trains, or not at all: what is valid, and how a refusal says it.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        ("num_iterations", "max_completion_length", "generation_batch_size", "steps_per_generation"),
        (lambda value: value >= 1, "a whole number of 1 or more"),
    ),
    "num_generations": (lambda value: value >= 2, "a whole number of 2 or more, which are compared with each other"),
    "top_k": (lambda value: value >= 0, "a whole number of 1 or more, or 0 for all tokens"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    **dict.fromkeys(
        ("min_p", "top_entropy_quantile", "ld_alpha"), (lambda value: 0 <= value <= 1, "a number from 0 to 1")
    ),
    "label_smoothing": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    **dict.fromkeys(
        ("temperature", "repetition_penalty", "delta", "sapo_temperature_neg", "sapo_temperature_pos")
        + ("off_policy_mask_threshold", "discopop_tau"),
        (lambda value: 0 < value < math.inf, "a number above 0"),
    ),
    **dict.fromkeys(
        ("beta", "epsilon", "epsilon_high"), (lambda value: 0 <= value < math.inf, "a number of 0 or more")
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "f_alpha_divergence_coef")
        + ("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        (math.isfinite, "a finite number"),
    ),
}
# Values of TRL's configs that only the code of its trainers names; for others see `_values_of`.
VALUES = {
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "truncation_mode": ("keep_start",),  # images stand at the start
}
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")

WHOLE_IMAGES = "stage 5 shows complete images"


@dataclass
class RewardArguments(RecordArguments, DataArguments, WeightsArguments):
    """What both methods of stage 5 have; a subclass adds the config of a trainer of TRL."""

    stage: int = field(default=5, metadata={"help": "Number of the stage; names it in logs and records."})
    method: str = field(
        default="grpo",
        metadata={
            "help": "`grpo`: sample answers, and make those likelier that a reward finds better than the others; `dpo`: make chosen answers "
            "likelier than rejected ones."
        },
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What is a good answer: any of {', '.join(REWARDS)}. GRPO needs one; their means over greedy "
            "answers to eval_sources are recorded before and after the stage."
        },
    )

    def __post_init__(self):
        for name, default in _other_options():
            if getattr(self, name) != default:
                raise ValueError(f"{name} is an option of stages 1 to 4, which stage 5 does not have. Leave it out.")
        for given in fields(self):
            if given.name in RANGES and not (given.default is None and getattr(self, given.name) is None):
                _check_range(given.name, getattr(self, given.name))
        super().__post_init__()
        for name in ("loss_type", "f_divergence_type", *VALUES):
            self._check_values(name)
        if len(self.mask_type_shares) > 1:
            raise ValueError(
                f"attention_mask_type={self.mask_type_shares}: stage 5 does not mix mask types, because answers are compared under one. Name one."
            )
        self.rewards = self.rewards or []
        for name in self.rewards:
            if name not in REWARDS:
                raise ValueError(f"Unknown reward {name!r}. Valid values: {', '.join(REWARDS)}.")
        for name, reason in REFUSED.items():
            if getattr(self, name, False):
                raise ValueError(f"{name}: stage 5 does not have it, because {reason}. Leave it out.")
        for source in self.sources:
            if "share" in source:
                raise ValueError(
                    f"share={source['share']} of a source: stage 5 reads every prompt once an epoch. Set its `limit` (of scenes: `count`)."
                )

    def _check_values(self, name: str) -> None:
        """Refuses a word, or one of several, that TRL does not know."""
        given, valid = getattr(self, name, None), VALUES.get(name) or _values_of(self, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and valid and value not in valid:
                raise ValueError(f"Unknown {name} {value!r}. Valid values: {', '.join(valid)}.")

    def optimization_record(self) -> dict[str, Any]:
        names = (
            *("method", "rewards", "reward_weights", "beta", "loss_type", "num_generations", "temperature"),
            "max_completion_length",
        )
        own = {name: getattr(self, name, None) for name in names}
        return super().optimization_record() | {name: value for name, value in own.items() if value not in (None, [])}


def _other_options() -> Iterable[tuple[str, Any]]:
    """Yields the options of the other stages that stage 5 does not have, with their defaults."""
    for part in (OptimizationArguments, WeightsArguments, DataArguments):
        for given in fields(part):
            if given.name not in KEPT:
                yield given.name, given.default_factory() if given.default is MISSING else given.default


def _check_range(name: str, value: Any, of: str = "") -> None:
    is_valid, valid = RANGES[name]
    if not isinstance(value, int | float) or not is_valid(value):
        raise ValueError(f"{of}{name}={value} is out of range: give {valid}.")


def _values_of(config: Any, name: str) -> tuple[str, ...]:
    """Returns the values of a field that its help lists, as TRL writes them: `Supported values are 'grpo', ... and 'vespo'.`; () for none."""
    said = next((given.metadata.get("help", "") for given in fields(config) if given.name == name), "")
    listed = re.search(r"values are:? ([^.]*)\.", said)
    return tuple(re.findall(r"[`']+(\w+)[`']+", listed[1])) if listed else ()


def _check_weights(name: str, weights: list[float] | None, of: str, weighed: list[str]) -> None:
    """Refuses weights of which there are not as many as of what they weigh, or which are not finite."""
    if weights is not None and (len(weights) != len(weighed) or not all(map(math.isfinite, weights))):
        raise ValueError(
            f"{name}={weights} must be {len(weighed)} finite number(s), one for each of {of} ({', '.join(weighed)})."
        )


@dataclass
class GRPOArguments(RewardArguments, ActivationCheckpointing, GRPOConfig):
    """Stage 5 by GRPO (arXiv 2402.03300)."""

    max_length = None  # of rows: a prompt and `max_completion_length` tokens
    log_multimodal: bool = field(default=False, metadata={"help": "Refused: show_every logs images with answers."})

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise ValueError(f"GRPO needs `rewards`, which say what a good answer is: any of {', '.join(REWARDS)}.")
        _check_weights("reward_weights", self.reward_weights, "rewards", self.rewards)
        more = self.generation_kwargs or {}
        for name in RANGES.keys() & more.keys():
            _check_range(name, more[name], "generation_kwargs: ")
        for name in ("temperature", "repetition_penalty"):  # YAML's 2 is an int, which transformers refuses
            setattr(self, name, float(getattr(self, name)))
            if name in more:
                more[name] = float(more[name])


@dataclass
class DPOArguments(RewardArguments, ActivationCheckpointing, DPOConfig):
    """Stage 5 by DPO (arXiv 2305.18290)."""

    max_completion_length: int = field(
        default=64, metadata={"help": "Longest answer to eval_sources, in tokens; training reads whole answers."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_loss()
        if self.rewards and not self.eval_sources:
            raise ValueError(
                f"rewards={self.rewards}: DPO learns from pairs, and rewards judge only answers to eval_sources. Name eval_sources, or leave "
                "them out."
            )
        if self.eval_sources and not (self.rewards or self.show_every):
            raise ValueError(
                "eval_sources: under DPO only rewards and show_every read them. Name `rewards` (any of "
                f"{', '.join(REWARDS)}), or leave them out."
            )

    def _check_loss(self) -> None:
        """Refuses what TRL's losses do not have together."""
        losses, smoothing = self.loss_type, self.label_smoothing
        _check_weights("loss_weights", self.loss_weights, "loss_type", losses)
        if not self.beta:
            raise ValueError(f"beta={self.beta} leaves DPO nothing to learn: give a number above 0.")
        if "robust" in losses and smoothing >= 0.5:
            raise ValueError(f"label_smoothing={smoothing}: loss_type robust takes a number from 0 to below 0.5.")
        if "exo_pair" in losses and not smoothing:
            raise ValueError(f"label_smoothing={smoothing}: loss_type exo_pair takes a number above 0, such as 0.001.")
        if getattr(self, "use_weighting", False) and (sorting := {"aot", "aot_unpaired"} & set(losses)):
            raise ValueError(f"use_weighting: loss_type {min(sorting)} does not have it. Leave it out.")
        divergence = getattr(self, "f_divergence_type", "reverse_kl")
        if divergence != "reverse_kl" and (without := [name for name in losses if name not in WITH_DIVERGENCE]):
            raise ValueError(
                f"f_divergence_type={divergence!r}: loss_type {without[0]} does not have it. Leave it out, or take a loss_type of "
                f"{', '.join(WITH_DIVERGENCE)}."
            )


METHODS: dict[str, type[RewardArguments]] = {"grpo": GRPOArguments, "dpo": DPOArguments}


def parse_rewards(argv: list[str]) -> RewardArguments:
    """Parses the arguments of stage 5 from a command line and the YAML file that it names, by the method that they name.

    Raises:
        ValueError: for another method.
    """
    (arguments,) = parse_fields(argv, METHODS[_method_of(argv) or RewardArguments.method])
    return arguments


def parse_any_stage(argv: list[str], *more: type, also: Iterable[str] = ()) -> tuple:
    """Parses the arguments of any stage for looking only, of stage 5 if they name it or a method: see `parse_anywhere`."""
    method = _method_of(argv)
    if method is None:
        return parse_anywhere(argv, *more, also=also)
    if torch.accelerator.is_available():
        return parse_fields(argv, METHODS[method], *more, also=also)
    kind = type("RewardArgumentsForAGPU", (ForAGPU, METHODS[method]), {})
    return parse_fields(["--use_cpu", "true", *argv], kind, *more, also=also)


def _method_of(argv: list[str]) -> str | None:
    """Returns the method that a command line or its YAML file names, the default one of `stage: 5`; None for neither.

    Raises:
        ValueError: for an unknown one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--method")
    parser.add_argument("--stage", nargs="?")
    known, _ = parser.parse_known_args(argv)
    given = read_yaml(Path(known.config)) if known.config and Path(known.config).is_file() else {}
    method = known.method or given.get("method")
    if method is None and str(known.stage or given.get("stage")) == str(RewardArguments.stage):
        method = RewardArguments.method
    if method not in (None, *METHODS):
        raise ValueError(f"Unknown method {method!r}. Valid values: {', '.join(METHODS)}.")
    return method
