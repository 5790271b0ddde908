"""The trainers of stage 5: TRL's `GRPOTrainer` and `DPOTrainer`, with the model's own masks, positions and tokens.

TRL tokenizes, pads and describes rows in ways that suit causal models with rotary positions. Here each row says where its prompt ends, so that
every mask type is what it is in generation, and where its tokens stand, so that padding moves no position.
"""

from typing import Any

import torch
from torch import nn
from trl import DPOTrainer, GRPOTrainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from alignvlm.stages.trainer import StageTrainer


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, each epoch's by itself: TRL's own goes on with its random numbers, which a resumed run has not drawn."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GRPOStageTrainer(StageTrainer, GRPOTrainer):
    """Samples several answers to each prompt, and makes those likelier whose reward is above the mean of the others.

    Args:
        reference (`nn.Module`, *optional*): the model whose answers a `beta` above 0 holds the trained model to.
        **kwargs: as for `StageTrainer` and `GRPOTrainer`, but for `beta`, which `args` names; `train_dataset` as `prompts` makes it.
    """

    def __init__(self, model, learning_rates: dict[str, float], reference: nn.Module | None = None, **kwargs):
        arguments = kwargs["args"]
        beta, arguments.beta = arguments.beta, 0.0  # else TRL reads the reference from disk, as it was saved
        try:
            super().__init__(model, learning_rates, **kwargs)
        finally:
            arguments.beta = beta
        self.beta = beta
        if reference is not None:
            add_fused_lm_head(reference, self.temperature, arguments.cast_lm_head_to_fp32)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _get_train_sampler(self, dataset=None):
        own = super()._get_train_sampler(dataset)
        return PromptSampler(
            own.data_source, own.mini_repeat_count, own.batch_size, own.repeat_count, own.shuffle, own.seed
        )

    def _init_training_state(self, *args):
        """Lets a resumed run sample where the uninterrupted one does: an epoch holds complete generations, and TRL counts from 0."""
        epochs, micro_batches = super()._init_training_state(*args)
        self._step = micro_batches
        return epochs, micro_batches

    def _prepare_inputs(self, inputs):
        self._record_names = [example["id"] for example in inputs]
        return super()._prepare_inputs(inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, mm_token_type_ids=None, **kwargs
    ):
        """As TRL's, for rows whose last `logits_to_keep` tokens are the answer.

        The images are found by their tokens in the prompt: the types that the processor makes of the text again need not have the prompt's length.
        """

        def placed(**inputs):
            real = inputs["attention_mask"].bool()
            prompt_mask = real.clone()
            prompt_mask[:, -logits_to_keep:] = False
            position_ids = (real.cumsum(-1) - 1).clamp(min=0)
            is_image = (inputs["input_ids"] == self.model.config.image_token_id) & prompt_mask  # an answer shows none
            if inputs.get("pixel_values") is not None and not len(inputs["pixel_values"]):
                del inputs["pixel_values"]  # TRL cuts batches, and none of these prompts has an image
            return model(
                **inputs, prompt_mask=prompt_mask, position_ids=position_ids, mm_token_type_ids=is_image.long()
            )

        return super()._get_per_token_logps_and_entropies(
            placed, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            tokens = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            images = len(inputs["pixel_values"]) if inputs.get("pixel_values") is not None else 0
            self.count(images, len(tokens), tokens)
        return super().compute_loss(model, inputs, *args, **kwargs)


class DPOStageTrainer(StageTrainer, DPOTrainer):
    """Makes chosen answers likelier than rejected ones, by more than `ref_model` finds them.

    Args:
        **kwargs: as for `StageTrainer` and `DPOTrainer`; `data_collator` is a `PreferenceCollator`, `train_dataset` as `preferences` makes it.
    """

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._record_names = inputs.pop("record_names", [])
        self.note_losses(inputs.pop("losses_of_data", []))
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            images = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
            self.count(images, len(inputs["input_ids"]), inputs["attention_mask"])
        return super().compute_loss(model, inputs, *args, **kwargs)
