"""Measures a stage before and after training: held-out loss, perplexity of a text, alignment of the modalities."""

from itertools import islice

from alignvlm.data.mixture import Part, read_parts
from alignvlm.data.record import Record
from alignvlm.evaluation.perplexity import text_perplexity
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.alignment import (
    alignment_metrics,
)
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.options import Measurement
from alignvlm.stages.trainer import StageTrainer
from modeling_alignvlm import AlignVLMProcessor


class StageMetrics(Measurement):
    """What a stage measures of itself: see `measure`."""

    def __init__(self, arguments: StageArguments, trainer: StageTrainer, collator: AlignVLMCollator):
        super().__init__()
        self.arguments, self.trainer, self.collator = arguments, trainer, collator

    def measure(self) -> dict[str, float | None]:
        return measure(self.arguments, self.trainer, self.collator)


def measure(arguments: StageArguments, trainer: StageTrainer, collator: AlignVLMCollator) -> dict[str, float | None]:
    """Measures the loss on held-out records, the perplexity of a text, and the alignment, as far as the recipe asks for them."""
    metrics: dict[str, float | None] = {"eval_loss": None}
    # DeepSpeed and FSDP evaluate only what they have begun to train.
    if trainer.eval_dataset is not None and (trainer.accelerator._models or not trainer.is_sharded):
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    with trainer.compute_loss_context_manager():
        if arguments.text_sources:
            allowed = arguments.bad_rows_allowed
            parts = read_parts(arguments.text_sources, collator.token_counts, arguments.data_dir, max_bad_rows=allowed)
            text = _text_of(parts, collator.processor)
            metrics["text_perplexity"] = text_perplexity(model, collator.tokenizer, text)
        if arguments.alignment_records:
            records = (trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset)))
            with_image = list(islice((r for r in records if r["images"]), arguments.alignment_records))
            if not with_image:
                raise ValueError(
                    "alignment_records: eval_sources hold no record with an image. Name some, or leave it out."
                )
            metrics |= alignment_metrics(model, collator, with_image)
    if logged := {name: value for name, value in metrics.items() if name != "eval_loss"}:
        trainer.log(logged)
    return metrics


def _text_of(parts: list[Part], processor: AlignVLMProcessor, records: int = 5000) -> str:
    """Joins the first records: exchanges as the chat template writes them, plain text as it is.

    Raises:
        ValueError: for a record with an image.
    """
    texts = []
    for name, row in ((part.name, row) for part in parts for row in islice(iter(part.source), records)):
        for conversation in Record.from_row(row).conversations:
            if conversation.image_count:
                raise ValueError(
                    f"text_sources: a record of {name!r} has an image, and perplexity is measured on text alone. Name a source without "
                    "images, or name this one in eval_sources."
                )
            for response in conversation.responses:
                answered = [*conversation.messages, {"role": "assistant", "content": response}]
                texts.append(processor.apply_chat_template(answered) if conversation.messages else response)
    return "\n".join(text.strip() for text in texts)
