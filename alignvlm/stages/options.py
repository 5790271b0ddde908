"""Options of a stage: objects with `before` and `after`, nested like brackets around training."""

from typing import Any

from torch import nn

from alignvlm.stages.trainer import AlignVLMTrainer


class StageOption:
    """What a stage does before and after training; a subclass overrides what it needs."""

    def check(self, trainer: AlignVLMTrainer) -> None:
        """Raises a `ValueError` if the option cannot be had under this trainer."""

    def before(self, model: nn.Module) -> None:
        """Prepares the model for training, in place."""

    def after(self, model: nn.Module) -> None:
        """Undoes or completes in place, after training and in every process, what `before` has prepared."""

    def record(self) -> dict[str, Any]:
        """What the run record says of the option, asked for after `after`."""
        return {}


class Nested:
    """Options of one model, nested like brackets: each is entered inside those before it, and left before them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.options: list[StageOption] = []

    def enter(self, *options: StageOption) -> None:
        """Prepares the model by each option in turn."""
        for option in options:
            option.before(self.model)
            self.options.append(option)

    def leave(self) -> dict[str, Any]:
        """Finishes all options, the last entered first; returns what the run record says of them."""
        for option in reversed(self.options):
            option.after(self.model)
        return {name: value for option in self.options for name, value in option.record().items()}
