"""The stage option `show_every`: what the model answers to a few fixed prompts, shown while it trains.

Answers go into the log as text and to each tracker of `report_to` with their images. Training does not notice: it takes the same steps, bit
for bit, as without them.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from alignvlm.data.images import BadImage, read_image
from alignvlm.data.mixture import Mixture
from alignvlm.data.record import Conversation, Record
from alignvlm.evaluation.answer import answer
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import grids_of
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.language_trial import last_position
from alignvlm.stages.log_lines import position, say
from alignvlm.stages.options import StageOption
from alignvlm.stages.trainer import AlignVLMTrainer


RECORDS, PROMPTS = 3, 2  # how many are shown, and how many prompts of each
NEW_TOKENS = 48
SHOWN = 300  # characters of a text in the log
WIDTH = 480  # pixels of an image with its answers


@dataclass
class Sample:
    """A record that is shown: its images, and the conversations that are answered."""

    source: str
    images: list[Image.Image]
    conversations: list[Conversation]

    def lines(self, answers: list[str]) -> list[str]:
        """Returns each prompt, and under it the answer and a response of the record."""
        pairs = zip(self.conversations, answers)
        texts = [text for c, given in pairs for text in (c.prompt, f"{given}  (expected: {c.responses[0]})")]
        return [_short(text) for text in texts]

    def image(self) -> Image.Image:
        """Returns its images side by side, `WIDTH` pixels wide and at most four times as high."""
        height = min(image.height for image in self.images)
        parts = [image.resize((max(round(image.width * height / image.height), 1), height)) for image in self.images]
        joined = Image.new("RGB", (sum(part.width for part in parts), height))
        for index, part in enumerate(parts):
            joined.paste(part, (sum(before.width for before in parts[:index]), 0))
        return joined.resize((WIDTH, min(max(round(height * WIDTH / joined.width), 1), 4 * WIDTH)))


class SampleAnswers(StageOption, TrainerCallback):
    """Lets process 0 answer before training, every `every` steps and after the last; the others go on meanwhile."""

    def __init__(self, every: int, trainer: AlignVLMTrainer, collator: AlignVLMCollator, data: Mixture):
        self.every, self.trainer, self.processor, self.data = every, trainer, collator.processor, data
        self.samples: list[Sample] = []

    @classmethod
    def of(
        cls,
        arguments: StageArguments,
        trainer: AlignVLMTrainer,
        collator: AlignVLMCollator,
        mixture: Mixture,
        held_out: Mixture | None,
    ) -> "list[SampleAnswers]":
        """Makes the option if the arguments ask for it."""
        return [cls(arguments.show_every, trainer, collator, held_out or mixture)] if arguments.show_every else []

    def check(self, trainer: AlignVLMTrainer) -> None:
        trainer.check_complete_weights("show_every")

    def before(self, model: nn.Module) -> None:
        positions = last_position(model.model.language_model)
        self.samples = choose(self.data, Encoder(self.processor), positions)
        self.trainer.add_callback(self)

    def after(self, model: nn.Module) -> None:
        self.trainer.remove_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            self._show(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._show(args, state)

    def _show(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.uncounted(), undisturbed(model), self.trainer.accelerator.autocast():
            images = [sample.images for sample in self.samples]
            prompts = [[conversation.messages for conversation in sample.conversations] for sample in self.samples]
            answers = answer(model, self.processor, images, prompts, max_new_tokens=NEW_TOKENS)
        shown = [(sample, sample.lines(given)) for sample, given in zip(self.samples, answers)]
        say("\n".join([f"{position(args.stage, state.global_step, state.max_steps)}  answers:", *_listed(shown)]))
        for callback in self.trainer.callback_handler.callbacks:
            for kind, send in TRACKERS.items():
                if isinstance(callback, kind):
                    send(callback, state.global_step, shown)


def choose(data: Mixture, encoder: Encoder, positions: int | None) -> list[Sample]:
    """Returns records of all sources in turn: those with a readable image and a prompt that leaves room for an answer.

    Args:
        positions: of the language model; None: as many as you like.

    Raises:
        ValueError: if there is none.
    """
    found: list[list[Sample]] = []
    for part in data.parts:
        samples = (_sample(Record.from_row(row), part.name, encoder, positions) for row in part.sample(4 * RECORDS))
        found.append([sample for sample in samples if sample is not None][:RECORDS])
    chosen = [samples[k] for k in range(RECORDS) for samples in found if k < len(samples)][:RECORDS]
    if not chosen:
        raise ValueError("show_every: the sources hold no record with an image and a prompt. Leave it out.")
    return chosen


def _sample(record: Record, source: str, encoder: Encoder, positions: int | None) -> Sample | None:
    grids = grids_of(encoder.processor, record.images)
    conversations = [
        conversation
        for conversation in record.conversations
        if conversation.image_count
        and (positions is None or len(encoder.prompt(conversation.messages, grids)) + NEW_TOKENS <= positions)
    ][:PROMPTS]
    if not conversations:
        return None
    try:
        return Sample(source, [read_image(image) for image in record.images], conversations)
    except BadImage:  # the collator will say so, in its turn
        return None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs a block in evaluation mode; each module's mode and the random numbers are afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    others = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng([] if device.type == "cpu" else [device], **others):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _listed(shown: list[tuple[Sample, list[str]]]) -> Iterator[str]:
    for number, (sample, lines) in enumerate(shown, 1):
        name = f"  {number} {sample.source}  "
        for index, text in enumerate(lines):
            yield (name if index == 0 else " " * len(name)) + ("  " if index % 2 else "") + text


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _to_tensorboard(callback: TensorBoardCallback, step: int, shown: list[tuple[Sample, list[str]]]) -> None:
    for number, (sample, lines) in enumerate(shown, 1):
        pixels = np.asarray(with_text(sample.image(), lines))
        callback.tb_writer.add_image(f"answers/{number}", pixels, step, dataformats="HWC")
        callback.tb_writer.add_text(f"answers/{number}", "\n\n".join(lines), step)
    callback.tb_writer.flush()


def _to_wandb(callback: WandbCallback | TrackioCallback, step: int, shown: list[tuple[Sample, list[str]]]) -> None:
    """Logs images with captions to wandb, or to trackio, which has the same interface."""
    tracker = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
    images = {
        f"answers/{number}": tracker.Image(sample.image(), caption="\n".join(lines))
        for number, (sample, lines) in enumerate(shown, 1)
    }
    tracker.log({**images, "train/global_step": step})


TRACKERS = {TensorBoardCallback: _to_tensorboard, WandbCallback: _to_wandb, TrackioCallback: _to_wandb}


def with_text(image: Image.Image, lines: list[str]) -> Image.Image:
    """Returns the image with the lines written below it, for trackers whose images have no captions."""
    font = ImageFont.load_default(14)
    pen = ImageDraw.Draw(image)
    text = "\n".join(wrapped for line in lines for wrapped in _wrapped(line, pen, font))
    _, _, _, height = pen.multiline_textbbox((0, 0), text, font=font)
    page = Image.new("RGB", (image.width, image.height + round(height) + 12), "white")
    page.paste(image)
    ImageDraw.Draw(page).multiline_text((6, image.height + 4), text, "black", font=font)
    return page


def _wrapped(line: str, pen: ImageDraw.ImageDraw, font) -> list[str]:
    """Breaks a line at spaces where it would be wider than the page."""
    rows = [""]
    for word in line.split(" "):
        longer = f"{rows[-1]} {word}".lstrip()
        if rows[-1] and pen.textlength(longer, font=font) > WIDTH - 12:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows
