"""Options of a stage: objects with `before` and `after`, nested like brackets around training."""

from typing import Any

from torch import nn

from alignvlm.stages.trainer import StageTrainer


class StageOption:
    """What a stage does before and after training; a subclass overrides what it needs."""

    def check(self, trainer: StageTrainer) -> None:
        """Raises a `ValueError` if the option cannot be had under this trainer."""

    def before(self, model: nn.Module) -> None:
        """Prepares the model for training, in place."""

    def after(self, model: nn.Module) -> None:
        """Undoes or completes in place, after training and in every process, what `before` has prepared."""

    def record(self) -> dict[str, Any]:
        """What the run record says of the option, asked for after `after`."""
        return {}


class Measurement(StageOption):
    """Measures before and after what is entered inside it; the run record has each metric twice, as `NAME_before` and `NAME_after`.

    A subclass has `measure`.
    """

    def __init__(self):
        self.measured: dict[str, float | None] = {}

    def measure(self) -> dict[str, float | None]:
        """Returns the metrics by name; None for one that there is not."""
        raise NotImplementedError

    def before(self, model: nn.Module) -> None:
        self._note("before")

    def after(self, model: nn.Module) -> None:
        self._note("after")

    def record(self) -> dict[str, float | None]:
        return self.measured

    def _note(self, when: str) -> None:
        self.measured |= {f"{name}_{when}": value for name, value in self.measure().items()}


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
