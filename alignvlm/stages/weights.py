"""Options for a model's weights: LoRA, frozen modules in 16 bits, the mean of the last checkpoints, a share of the untouched language model.

docs/extend.md adds one: a `WeightsOption`, its fields in `WeightsArguments` (`alignvlm/stages/arguments.py`), its name in `HELD` or `WRITTEN`.
"""

import copy
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from alignvlm.evaluation.load import check_checkpoint
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import complete_checkpoints
from alignvlm.stages.embedding_loss import HEAD, EmbeddingHead, layer_of
from alignvlm.stages.loading import load_model
from alignvlm.stages.lora import LORA_FOLDER, LORA_PREFIX, add_lora, language_linear_layers, remove_lora, save_lora
from alignvlm.stages.options import StageOption
from alignvlm.stages.trainer import AlignVLMTrainer, freeze_all_but, module_of
from hub_upload.repository import commit_of
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration


logger = logging.get_logger(__name__)


class WeightsOption(StageOption, ABC):
    """An option that reads or changes weights, and so needs all of them in every process."""

    name: str  # of the field that turns it on

    @classmethod
    @abstractmethod
    def of(cls, arguments: StageArguments) -> "WeightsOption | None":
        """Makes the option that the arguments ask for; None if they do not."""

    def check(self, trainer: AlignVLMTrainer) -> None:
        trainer.check_complete_weights(self.name)


@dataclass
class LoRA(WeightsOption):
    """Adds LoRA layers to the language model; after training merges them, or writes them into `folder` and takes them off."""

    name = "lora_r"

    r: int
    alpha: float
    dropout: float
    target_modules: list[str] | None  # None: all linear layers but the head
    merge: bool
    folder: Path

    @classmethod
    def of(cls, arguments: StageArguments) -> "LoRA | None":
        if not arguments.lora_r:
            return None
        given = (getattr(arguments, f"lora_{name}") for name in ("r", "alpha", "dropout", "target_modules", "merge"))
        return cls(*given, folder=Path(arguments.output_dir) / LORA_FOLDER)

    def before(self, model: nn.Module) -> None:
        add_lora(model, self.r, self.alpha, self.dropout, self.target_modules or language_linear_layers(model))

    def after(self, model: nn.Module) -> None:
        if PartialState().is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier run
            if not self.merge:
                save_lora(model, self.folder)
        remove_lora(model, merge=self.merge)

    def record(self) -> dict[str, Any]:
        names = ("r", "alpha", "dropout", "target_modules", "merge")
        return {"lora": {name: getattr(self, name) for name in names}}


@dataclass
class WithoutLoRA(StageOption):
    """Removes the LoRA weights that an earlier run left in `folder`, where this one writes none."""

    folder: Path

    @classmethod
    def of(cls, arguments: StageArguments) -> "WithoutLoRA | None":
        return None if arguments.lora_r else cls(Path(arguments.output_dir) / LORA_FOLDER)

    def after(self, model: nn.Module) -> None:
        if PartialState().is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Frozen16Bit(WeightsOption):
    """Rounds frozen parameters to 16 bits; after training restores what `read` returns, in the process that writes the checkpoint."""

    name = "frozen_16_bit"

    dtype: torch.dtype
    learning_rates: dict[str, float]
    read: Callable[[], dict[str, torch.Tensor]]
    rounded: set[str] = field(default_factory=set, init=False)

    @classmethod
    def of(cls, arguments: StageArguments) -> "Frozen16Bit | None":
        if not arguments.frozen_16_bit:
            return None
        return cls(arguments.dtype_16_bit, arguments.learning_rates, lambda: load_model(arguments).state_dict())

    def before(self, model: nn.Module) -> None:
        freeze_all_but(model, self.learning_rates)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                self.rounded.add(name)
                parameter.data = parameter.data.to(self.dtype)

    @torch.no_grad()
    def after(self, model: nn.Module) -> None:
        if not self.rounded or not PartialState().is_main_process:
            return
        model.float()
        read = self.read()
        for name, parameter in model.named_parameters():
            if name in self.rounded:
                parameter.copy_(read[name.replace(".base_layer.", ".")])  # where LoRA puts the layer it is added to

    def record(self) -> dict[str, Any]:
        return {"frozen_16_bit": True}


@dataclass
class Average(WeightsOption):
    """Loads the mean of the weights of the last `count` checkpoints after training."""

    name = "average_last"

    count: int
    output_dir: str
    averaged: list[Path] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, arguments: StageArguments) -> "Average | None":
        return cls(arguments.average_last, arguments.output_dir) if arguments.average_last else None

    def after(self, model: nn.Module) -> None:
        self.averaged = complete_checkpoints(self.output_dir)[-self.count :]
        if len(self.averaged) < self.count:
            logger.warning(
                f"average_last={self.count}: {self.output_dir} holds {len(self.averaged)} checkpoints, of which the mean is taken. Set a smaller "
                "save_steps for more."
            )
        if self.averaged:
            unknown = model.load_state_dict(average_weights(self.averaged), strict=False).unexpected_keys
            if unknown:  # what is missing is tied to what is there
                raise ValueError(
                    f"{self.averaged[-1]} holds {unknown[0]!r}, which the model does not know: it is not averaged."
                )

    def record(self) -> dict[str, Any]:
        return {"averaged": [path.name for path in self.averaged]} if self.averaged else {}


@dataclass
class KeepLanguage(WeightsOption):
    """Mixes the trained language model with the untouched one: (1 - share) x trained + share x untouched, weight by weight.

    On the line between the two, much of what is learned and of what is known is kept at once, where averaging their answers would cost
    two models (WiSE-FT, "Robust fine-tuning of zero-shot models", arXiv 2109.01903). The untouched language model is that of the
    checkpoint `model`, from which the stage starts: it is always there, also as a folder without the Hub, and where the stages before
    froze the language model it is the backbone, bit for bit. After a stage that trained it, `keep_language_from` names an earlier
    checkpoint, such as that of stage 0. Of LoRA layers the products are scaled by 1 - share, which is the same.

    Read again from the disk after training, in every process: nothing is held meanwhile.
    """

    name = "keep_language"

    share: float
    source: str
    revision: str | None
    read: Callable[[], dict[str, torch.Tensor]]

    @classmethod
    def of(cls, arguments: StageArguments) -> "KeepLanguage | None":
        if not arguments.keep_language:
            return None
        source = copy.copy(arguments)
        if arguments.keep_language_from is not None:
            source.model, source.model_revision = arguments.keep_language_from, None
            check_checkpoint(source.model, weights_only=True)
            check_same_language_model(arguments.model, arguments.model_revision, source.model)
        share, read = arguments.keep_language, lambda: load_model(source).state_dict()
        return cls(share, source.model, source.model_revision, read)

    def after(self, model: nn.Module) -> None:
        keep_language(model, self.read(), self.share)

    def record(self) -> dict[str, Any]:
        untouched = {"model": self.source, "revision": commit_of(self.source, self.revision)}
        return {"keep_language": {"share": self.share, "untouched": untouched}}


@torch.no_grad()
def keep_language(model: nn.Module, untouched: dict[str, torch.Tensor], share: float) -> None:
    """Moves the language model's trained weights the way `share` towards the untouched ones, in place; see `KeepLanguage`.

    Args:
        model: its LoRA layers, if it has some, are what was trained of its language model.
        untouched: a state dict that has the language model's weights, by the same names.
        share: of the untouched weights, in [0, 1].
    """
    language = [(name, p) for name, p in model.named_parameters() if module_of(name) == "language"]
    products = [p for name, p in language if f"{LORA_PREFIX}B" in name]  # of A and B, which are zero before training
    for parameter in products:
        parameter.mul_(1 - share)
    for name, parameter in language if not products else []:
        parameter.lerp_(untouched[name].to(parameter.device, parameter.dtype), share)


def check_same_language_model(checkpoint: str, revision: str | None, other: str) -> None:
    """Raises a `ValueError` if the language models of two checkpoints have other weights, by name or shape; no weights are read."""
    found = []
    for name, commit in ((checkpoint, revision), (other, None)):
        with torch.device("meta"):
            model = AlignVLMForConditionalGeneration(AlignVLMConfig.from_pretrained(name, revision=commit))
        found.append({n: tuple(p.shape) for n, p in model.named_parameters() if module_of(n) == "language"})
    ours, theirs = found
    if ours != theirs:
        differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        first = differing[0]
        raise ValueError(
            f"The language model of {other!r} is another one than that of {checkpoint!r}: {first} is {theirs.get(first, 'missing')} there and "
            f"{ours.get(first, 'missing')} here. Name a checkpoint of the same language model, or leave out keep_language_from."
        )


@dataclass
class EmbeddingLoss(WeightsOption):
    """Gives the model the head that `embedding_loss` trains beside it, and takes it off again."""

    name = "embedding_loss"

    weight: float
    layer: int
    seed: int

    @classmethod
    def of(cls, arguments: StageArguments) -> "EmbeddingLoss | None":
        if not arguments.embedding_loss:
            return None
        config = AlignVLMConfig.from_pretrained(arguments.model, revision=arguments.model_revision)
        return cls(arguments.embedding_loss, layer_of(config, arguments.embedding_loss_layer), arguments.seed)

    def before(self, model: nn.Module) -> None:
        setattr(model, HEAD, EmbeddingHead(model.config, self.layer, self.seed))

    def after(self, model: nn.Module) -> None:
        delattr(model, HEAD)

    def record(self) -> dict[str, Any]:
        return {"embedding_loss": {"weight": self.weight, "layer": self.layer}}


# How the model holds its weights in training: prepared before the trainer sees it, undone when all is measured.
HELD = (LoRA, WithoutLoRA, Frozen16Bit, EmbeddingLoss)
# Which weights come out of training: what is measured after the stage, and written.
WRITTEN = (KeepLanguage, Average)


def asked_for(arguments: StageArguments, kinds: Iterable[type]) -> list[StageOption]:
    """Makes the options of these kinds that a stage's arguments turn on, the outermost first."""
    return [option for kind in kinds if (option := kind.of(arguments)) is not None]


def average_weights(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    """Averages the weights of several checkpoint folders, summed in float64; dtypes are those of the first."""
    files = [sorted(folder.glob("*.safetensors")) for folder in checkpoints]
    mean = {}
    for parts in zip(*files, strict=True):
        opened = [safe_open(part, framework="pt") for part in parts]
        for name in opened[0].keys():  # noqa: SIM118 - not a dictionary
            first = opened[0].get_tensor(name)
            total = first.double() if first.is_floating_point() else None
            if total is None:
                mean[name] = first
                continue
            for other in opened[1:]:
                total += other.get_tensor(name).double()
            mean[name] = (total / len(opened)).to(first.dtype)
    return mean
