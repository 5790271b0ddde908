"""The stage option `projector_start: least_squares`: the last linear layer of a new projector in closed form, before training.

For some records, each image token is regressed to the mean embedding of the tokens that the record's responses train, once, however many
rows and branches hold the image: with x the input of the projector's last linear layer and t that mean, the layer becomes the W, b that
minimise

    mean over image tokens of |W x + b - t|^2  +  ridge * mean(x^2) * |W|^2

What is before that layer (of an MLP its first layer) stays as it was drawn: fixed random features with a linear fit on top, as in extreme
learning machines (Huang et al., 2006, doi 10.1016/j.neucom.2005.12.126). The target, the place of a caption in the language model's
embedding space, is ours; a linear map from image features into that space as all the alignment there is has been learned by
LiMBeR (arXiv 2209.15162). One pass over the records sums the normal equations in float64; processes add theirs up. The loss of the first
records tells whether the start is a better one than the projector as it was drawn; it need not be.
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from alignvlm.data.mixture import Mixture
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import IGNORED
from alignvlm.rows.tiles import grids_of, tokens_of
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.options import StageOption
from alignvlm.stages.tiles import check_not_native
from alignvlm.stages.trainer import AlignVLMTrainer


logger = logging.get_logger(__name__)

TRIED = 32  # records of each process whose loss is computed before and after


class NormalEquations:
    """Sums what the least-squares problem needs of any number of pairs (x, t): the pairs themselves are not kept.

    Args:
        inputs, outputs: the widths of x and t.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        # Of x with a 1 behind it: sums of products with itself, and with t.
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Adds pairs x `(pairs, inputs)` and t `(pairs, outputs)`."""
        x, t = (each.to(self.gram.device).double() for each in (x, t))
        x = nn.functional.pad(x, (0, 1), value=1.0)
        self.gram += x.T @ x
        self.cross += x.T @ t

    def solve(self, ridge: float, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the weight `(outputs, inputs)` and the bias `(outputs,)` that minimise the sum above; without `bias`, W x alone.

        The bias is not penalised. Where columns of x depend on each other, `ridge` must be positive.
        """
        count, size = self.gram[-1, -1], len(self.gram) - 1
        solution = torch.linalg.solve(self._penalised(ridge, bias), self.cross[: size + bias] / count)
        return solution[:size].T, solution[size] if bias else None

    def leverages(self, x: Tensor, ridge: float, bias: bool) -> Tensor:
        """Returns of each input `(pairs, inputs)` how much its own target weighs in what is predicted for it, `(pairs,)`: the error of a
        solution without the pair is its error in `solve`'s, divided by 1 minus that (Allen, 1974, doi 10.1080/00401706.1974.10489157)."""
        x = x.to(self.gram.device).double()
        x = nn.functional.pad(x, (0, 1), value=1.0) if bias else x
        return (torch.linalg.solve(self._penalised(ridge, bias), x.T).T * x).sum(-1) / self.gram[-1, -1]

    def _penalised(self, ridge: float, bias: bool) -> Tensor:
        """Returns the matrix of the normal equations, a mean over the pairs."""
        count, size = self.gram[-1, -1], len(self.gram) - 1
        penalty = torch.zeros(size + bias, dtype=torch.float64, device=self.gram.device)
        penalty[:size] = ridge * self.gram.diagonal()[:size].mean() / count
        return self.gram[: size + bias, : size + bias] / count + penalty.diag()


class ProjectorStart(StageOption):
    """Solves for the projector's last linear layer before training, from the first records of the stage that have an image."""

    def __init__(
        self, arguments: StageArguments, trainer: AlignVLMTrainer, collator: AlignVLMCollator, mixture: Mixture
    ):
        self.arguments, self.trainer, self.collator, self.mixture = arguments, trainer, collator, mixture
        self.recorded: dict[str, Any] = {}
        self.tried: list[dict[str, Tensor]] = []

    @classmethod
    def of(
        cls, arguments: StageArguments, trainer: AlignVLMTrainer, collator: AlignVLMCollator, mixture: Mixture
    ) -> "list[ProjectorStart]":
        """Makes the option if the arguments ask for it."""
        return [cls(arguments, trainer, collator, mixture)] if arguments.projector_start else []

    def check(self, trainer: AlignVLMTrainer) -> None:
        check_not_native(self.collator.processor, "projector_start takes images of as many tokens each")
        trainer.check_complete_weights("projector_start")

    @torch.no_grad()
    def before(self, model: nn.Module) -> None:
        began = time.perf_counter()
        layer = last_linear_layer(model.model.projector)
        device = "cpu" if model.device.type == "mps" else model.device  # which has no float64
        images, equations = 0, NormalEquations(layer.in_features, layer.out_features, device)
        was_training = model.training
        model.eval()
        for pixel_values, targets, count in self._batches(model):
            equations.add(*self._pairs(model, layer, pixel_values, targets))
            images += count
        accelerator = self.trainer.accelerator
        equations.gram, equations.cross = (
            accelerator.reduce(each, "sum") for each in (equations.gram, equations.cross)
        )
        images = int(accelerator.reduce(torch.tensor(images, device=model.device), "sum"))
        if not images:
            raise ValueError("projector_start: none of the stage's records has an image to start from. Leave it out.")
        weight, bias = equations.solve(self.arguments.projector_start_ridge, layer.bias is not None)
        loss_before = self._loss(model)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        loss_after = self._loss(model)
        self.tried.clear()
        model.train(was_training)
        self.recorded = {
            "method": self.arguments.projector_start,
            "images": images,
            "ridge": self.arguments.projector_start_ridge,
            "loss_before": round(loss_before, 4),
            "loss_after": round(loss_after, 4),
            "seconds": round(time.perf_counter() - began, 1),
        }
        if self.trainer.is_world_process_zero():
            print(f"projector_start: {self.recorded}", flush=True)
            if loss_after > loss_before:
                logger.warning(
                    f"projector_start={self.arguments.projector_start!r} raised the loss of the first records from {loss_before:.2f} to "
                    f"{loss_after:.2f}. Training is likely to go better without it: leave it out."
                )

    def record(self) -> dict[str, Any]:
        return {"projector_start": self.recorded}

    def _records(self) -> Iterator[dict]:
        """This process's share of the first records with an image, in the mixture's order: that of training, where rows hold one record."""
        dataset = self.mixture.dataset
        chosen = (record for index in self.mixture.sampler if (record := dataset[index])["images"])
        first = islice(chosen, self.arguments.projector_start_records)
        yield from islice(first, self.arguments.process_index, None, self.arguments.world_size)

    def _batches(self, model: nn.Module, size: int = 32) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yields pixel values; for each image or tile of them, `(images, hidden)`, the mean embedding of the tokens with labels in its
        record; and the number of images."""
        embed, records = model.get_input_embeddings(), self._records()
        while chunk := list(islice(records, size)):
            pixels, targets, count = [], [], 0
            for record in chunk:
                batch = self.collator([record])
                trained = batch["labels"] != IGNORED
                if "pixel_values" not in batch or not trained.any():
                    continue
                ids = batch["input_ids"][trained].to(model.device)
                if len(self.tried) < TRIED:
                    self.tried.append({name: value for name, value in batch.items() if isinstance(value, Tensor)})
                images = self._each_once(record, batch["pixel_values"])
                pixels += images
                count += len(images)
                targets.append(embed(ids).double().mean(0).expand(sum(map(len, images)), -1))
            if pixels:
                yield torch.cat(pixels).to(model.device), torch.cat(targets), count

    def _each_once(self, record: dict, pixel_values: Tensor) -> list[Tensor]:
        """Returns for each image of a record its pixel values `(1 or tiles, channels, height, width)`, which the batch of the record holds
        for every row and branch with the image."""
        processor = self.collator.processor
        images = [image for row in self.collator.rows(record) for image in row.images]
        sizes = [tokens_of(processor, grid) // processor.image_seq_length for grid in grids_of(processor, images)]
        return list({id(image): own for image, own in zip(images, pixel_values.split(sizes), strict=True)}.values())

    def _loss(self, model: nn.Module) -> float:
        """The mean loss of the labels of the first records of all processes, in the precision of training."""
        total, count = torch.zeros(2, device=model.device)
        for batch in self.tried:
            labels = int((batch["labels"] != IGNORED).sum())
            with self.trainer.accelerator.autocast():
                loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
            total, count = total + labels * loss.float(), count + labels
        total, count = (self.trainer.accelerator.reduce(each, "sum") for each in (total, count))
        return (total / count).item()

    def _pairs(
        self, model: nn.Module, layer: nn.Linear, pixel_values: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns what reaches the layer, a row for each image token, and the target of each."""
        found: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        try:
            with self.trainer.accelerator.autocast():  # in the precision of training
                tokens = model.model.get_image_features(pixel_values).pooler_output
        finally:
            handle.remove()
        (inputs,) = found
        return inputs.flatten(0, -2), targets.repeat_interleave(tokens.shape[1], dim=0)


def last_linear_layer(projector: nn.Module) -> nn.Linear:
    """Returns the linear layer whose output is the projector's."""
    return [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]


def check_new_projector(arguments: StageArguments, record: dict[str, Any]) -> None:
    """Raises a `ValueError` if `projector_start` would throw away a projector that was trained before, as the run record tells."""
    trained = [stage["stage"] for stage in record["stages"] if "projector" in stage.get("learning_rates", {})]
    whose = f"that stage {trained[-1]} has trained" if trained else "that it was assembled with (--projector)"
    if arguments.projector_start and (trained or record.get("projector")):
        raise ValueError(
            f"projector_start={arguments.projector_start!r} would replace the projector of {arguments.model!r} {whose}. Leave it out, or "
            "start from a checkpoint with a new one."
        )
