"""The trainer of all stages: TRL's `SFTTrainer` with learning rates per module, our collator, and throughput in the log."""

import time
from collections import Counter

import torch
from accelerate.utils import gather_object
from transformers.utils import logging
from trl import SFTTrainer

from modeling_alignvlm import AlignVLMForConditionalGeneration
from training.collator import IGNORED


logger = logging.get_logger(__name__)

MODULES = ("vision", "projector", "language")


def module_of(parameter_name: str) -> str:
    """The module, one of `MODULES`, that a parameter of `AlignVLMForConditionalGeneration` belongs to, by its name."""
    if "vision_tower." in parameter_name:
        return "vision"
    return "projector" if "projector." in parameter_name else "language"


def freeze_all_but(
    model: AlignVLMForConditionalGeneration, learning_rates: dict[str, float]
) -> dict[str, tuple[int, int]]:
    """Lets the named modules train and freezes the others; returns each module's (trainable, total) parameter counts."""
    counts = dict.fromkeys(MODULES, (0, 0))
    for name, parameter in model.named_parameters():
        module = module_of(name)
        parameter.requires_grad_(module in learning_rates)
        trainable, total = counts[module]
        counts[module] = (trainable + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return counts


class AlignVLMTrainer(SFTTrainer):
    """Trains a stage.

    Args:
        learning_rates (`dict[str, float]`): the peak learning rate of each module that trains; a module not named is frozen.
        sampler (`MixtureSampler`, *optional*): the order of the training records; by default the trainer's own.
        max_bad_images (`float`): the run stops when more than this share of the records read had an image that cannot be.
        **kwargs: as for `SFTTrainer`; `data_collator` must be an `AlignVLMCollator`.

    The log gains `images_per_second`, `annotations_per_second` and `tokens_per_second` (of all processes, padding not
    counted), each over the time since the last log, and `padding_share`, the share of the rows' places that hold no token.
    """

    def __init__(
        self,
        model,
        learning_rates: dict[str, float],
        sampler: torch.utils.data.Sampler | None = None,
        max_bad_images: float = 0.0,
        **kwargs,
    ):
        self.sampler, self.max_bad_images = sampler, max_bad_images
        self.learning_rates = learning_rates
        self.parameter_counts = freeze_all_but(model, learning_rates)
        super().__init__(model=model, **kwargs)
        self._counts = torch.zeros(4, dtype=torch.float64)  # images, annotations, tokens, places since the last log
        self._counted_since = time.perf_counter()

        self._records_read = 0
        self._losses_of_data = Counter()
        self._bad_images: list[str] = []

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def _prepare_inputs(self, inputs):
        """Takes what the collator had to leave out from the batch, and stops the run when too many images cannot be read."""
        losses = inputs.pop("losses_of_data", [])
        if self.model.training:
            for loss in losses:
                self._losses_of_data[loss["kind"]] += 1
                if loss["kind"] == "bad_image":
                    self._bad_images.append(f"{loss['source']}: {loss['what']}")
                elif self._losses_of_data[loss["kind"]] == 1:
                    logger.warning(
                        f"{loss['source']}: {loss['kind']}: {loss['what']}. More of the kind are only counted."
                    )
            bad = self._losses_of_data["bad_image"]
            self._records_read += self.args.per_device_train_batch_size
            # Below a thousand records the share says little: a few bad ones may come early.
            if bad > self.max_bad_images * max(self._records_read, 1000):
                raise RuntimeError(
                    f"{bad} of {self._records_read} records had an image that cannot be read, more than max_bad_images="
                    f"{self.max_bad_images:g}. The last: {self._bad_images[-1]}"
                )
        return super()._prepare_inputs(inputs)

    def losses_of_data(self) -> dict:
        """What training left out, of all processes: how many of each kind, and up to a thousand images that cannot be read."""
        gathered = gather_object([(dict(self._losses_of_data), self._bad_images)])
        counts = sum((Counter(found) for found, _ in gathered), Counter())
        return {**counts, "bad_image_list": [image for _, images in gathered for image in images][:1000]}

    def create_optimizer(self, model=None):
        """One group per module and weight decay, each with its module's learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((module_of(name), name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options.pop("lr", None)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.learning_rates[module],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (module, decay), parameters in groups.items()
                ],
                lr=max(self.learning_rates.values()),
                **options,
            )
        return self.optimizer

    def train(self, *args, **kwargs):
        self._counted_since = time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        starts = (labels[:, 1:] != IGNORED) & (labels[:, :-1] == IGNORED)
        images = inputs["pixel_values"].shape[0] if "pixel_values" in inputs else 0
        self._counts += torch.tensor([images, int(starts.sum()), int(inputs["attention_mask"].sum()), labels.numel()])
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, with the head applied only where there is a label, on every device (by itself TRL does so on CUDA)."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        labels = torch.nn.functional.pad(
            labels[:, 1:], (0, 1), value=IGNORED
        )  # at each place, the token that comes next
        keep = labels != IGNORED
        keep[0, 0] |= ~keep.any()  # a batch without labels still needs a graph to go backward through
        return super().compute_loss(
            model,
            {**inputs, "shift_labels": labels[keep].unsqueeze(0), "positions_to_keep": keep},
            num_items_in_batch=num_items_in_batch,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            seconds = time.perf_counter() - self._counted_since
            counts = self.accelerator.reduce(self._counts.float().to(self.accelerator.device), "sum").tolist()
            for name, count in zip(("images", "annotations", "tokens"), counts):
                logs[f"{name}_per_second"] = round(count / seconds, 2)
            logs["padding_share"] = round(1 - counts[2] / max(counts[3], 1), 4)
            self._counts.zero_()
            self._counted_since = time.perf_counter()
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Left to the stage, which writes the folder's card from its run record."""
