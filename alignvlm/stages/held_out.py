"""Held-out losses that do not depend on batches and processes: every label counts once, and as much as any other."""

from typing import Any

import torch
from torch.utils.data import Dataset


class RepeatedToFill(Dataset):
    """Records, and the first ones once more until all processes have the same number of full batches.

    What is repeated has `"repeated": True`, and so no labels in its rows (see `AlignVLMCollator`): it keeps a process busy while others measure.
    accelerate repeats records, too, but these would count twice.

    Args:
        records: a data set of mappings.
        multiple (`int`): the length becomes a multiple of this; batch size times processes.
    """

    def __init__(self, records: Any, multiple: int):
        self.records, self.multiple = records, multiple

    def __len__(self) -> int:
        return len(self.records) + -len(self.records) % self.multiple

    def __getitem__(self, index: int) -> dict:
        record = self.records[index % len(self.records)]
        return record if index < len(self.records) else {**record, "repeated": True}


class LabelWeighted:
    """Collects the means of batches, and averages them over all labels of all processes."""

    def __init__(self):
        self._batches: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch of this process: its mean loss, and the number of its labels. Of a batch without labels the loss is left out."""
        total = torch.where(labels > 0, loss.detach().float() * labels, torch.zeros_like(loss, dtype=torch.float))
        self._batches.append(torch.stack((labels.float(), total)))

    def average(self, accelerator, means: dict[str, list[float]]) -> tuple[float, dict[str, list[float]]]:
        """Averages losses and other means; all processes must call this, after the same number of batches.

        Args:
            means: by name, a value of each batch, over the labels of all processes. Lists of another length are left as they are.

        Returns:
            the mean loss of all labels, NaN without any, and `means` with the average of each as a list of one.
        """
        batches = accelerator.reduce(torch.stack(self._batches), "sum").cpu().double()
        labels, losses = batches.unbind(1)
        shares = labels / labels.sum()
        averages = {
            name: [float((shares * torch.tensor(values).double()).sum())] if len(values) == len(labels) else values
            for name, values in means.items()
        }
        return float(losses.sum() / labels.sum()), averages
