"""Trains a few steps whose batches are all text on every second rank."""

import os

from datasets import concatenate_datasets
from torch.utils.data import SequentialSampler
from trl import TrlParser

from alignvlm.data import scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.trainer import AlignVLMTrainer
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.running import arguments_for


def main(checkpoint: str, output: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rates = {f"{module}_learning_rate": 1e-2 for module in ("vision", "projector", "language")}
    fields = {"per_device_train_batch_size": 4 // processes, "max_steps": 6, "optim": "sgd", **rates}
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(arguments_for(checkpoint, output, **fields))
    images, texts = scenes.make_scenes(12, annotations=("questions",)), scenes.make_texts(12)
    dataset = concatenate_datasets([images, texts.cast(images.features)])
    # Two of each in turn: with two processes, all images go to the first and all texts to the second.
    order = [i for k in range(0, 12, 2) for i in (k, k + 1, 12 + k, 13 + k)]
    dataset = dataset.select(order)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    trainer = AlignVLMTrainer(
        model,
        arguments.learning_rates,
        sampler=SequentialSampler(dataset),
        args=arguments,
        train_dataset=dataset,
        data_collator=AlignVLMCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
    trainer.accelerator.wait_for_everyone()  # as a stage does: a thread of gloo may still hold what the last step gathered
