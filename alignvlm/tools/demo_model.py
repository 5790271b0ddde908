"""A checkpoint as the demo uses it: answers that come word by word, under any mask type, and where the model looked.

One `DemoModel` serves all visitors: it works for one of them at a time, and what they said is kept in their own `Talk`. Images stay on
disk between questions, so that a visitor who has gone costs a few megabytes at most.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, TextIteratorStreamer

from alignvlm.evaluation.answer import context_of
from alignvlm.evaluation.attention import ImageAttention, attention_to_images
from alignvlm.evaluation.load import with_tag
from alignvlm.rows.tiles import grids_of, tokens_of
from modeling_alignvlm import MASK_TYPES


ATTENTION_BYTES = 2 << 30  # the most memory that the attention of one answer may take while it is made
KEPT_BYTES = 32 << 20  # and afterwards, of each visitor and model
SHOWN_SIDE = 512  # pixels of a heat map's longer side, at least and at most
HEAT = np.array([(20, 10, 60), (140, 30, 110), (245, 125, 20), (255, 245, 150)], np.float32)  # dark to bright


@dataclass(frozen=True)
class Talk:
    """A conversation: the files of its images, and messages whose image parts stand for them in order."""

    files: tuple[str, ...] = ()
    messages: tuple[dict, ...] = ()

    def with_user(self, text: str) -> "Talk":
        """Adds a message of the user; the first one shows all images."""
        images = [] if self.messages else [{"type": "image"}] * len(self.files)
        message = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        return replace(self, messages=(*self.messages, message))

    def with_answer(self, text: str) -> "Talk":
        """Adds the model's answer."""
        message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return replace(self, messages=(*self.messages, message))

    def with_images(self, images: Sequence[Image.Image]) -> list[dict]:
        """The messages as the processor takes them: each image part holds its image, of those that the files hold."""
        left = iter(images)

        def filled(part: dict) -> dict:
            return {**part, "image": next(left)} if part["type"] == "image" else part

        return [{**message, "content": [filled(part) for part in message["content"]]} for message in self.messages]


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated: greedily, by sampling with a temperature, or by beam search."""

    mask_type: str
    how: str = "greedy"
    temperature: float = 0.7
    beams: int = 4
    max_new_tokens: int = 128

    WAYS = ("greedy", "sampling", "beam search")

    def options(self) -> dict:
        """What `generate` takes."""
        options: dict = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        if self.how == "sampling":
            options |= {"do_sample": True, "temperature": self.temperature}
        elif self.how == "beam search":
            options |= {"num_beams": self.beams}
        elif self.how != "greedy":
            raise ValueError(f"There is no decoding {self.how!r}. Choose {', '.join(self.WAYS)}.")
        return options


class StopWhen(StoppingCriteria):
    """Stops an answer when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass
class DemoModel:
    """A checkpoint that answers visitors.

    Args:
        name: what visitors see.
        model, processor: the checkpoint's.
        precision: what it computes in, for people.
        tag: the source tag before each message of the user.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    precision: str
    tag: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.mask_type: str = self.model.config.attention_mask_type  # the checkpoint's own

    @property
    def mask_types(self) -> list[str]:
        """Those that the language model keeps, the checkpoint's own first."""
        kept = self.model.config.supported_mask_types or list(MASK_TYPES)
        return sorted(kept, key=lambda name: name != self.mask_type)

    def asked(self, talk: Talk, text: str) -> Talk:
        """Adds the user's message as the checkpoint's recipe wants it at evaluation: the first with its source tag."""
        return talk.with_user(text if talk.messages else with_tag(self.tag, text))

    def stream(self, talk: Talk, images: Sequence[Image.Image], decoding: Decoding) -> Iterator[str]:
        """Yields the answer to a conversation's last message, longer each time; under beam search it comes at once.

        The model stops soon after the iterator is closed.

        Raises:
            ValueError: for a typed image placeholder, a conversation that is too long, and a mask type or decoding that there is not.
        """
        options = decoding.options()
        if decoding.mask_type not in self.mask_types:
            raise ValueError(
                f"There is no mask type {decoding.mask_type!r} here. Choose {', '.join(self.mask_types)}."
            )
        inputs = self.processor.apply_chat_template(
            talk.with_images(images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        self._check_length(inputs["input_ids"].shape[1] + decoding.max_new_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, result = threading.Event(), {}

        def work() -> None:
            try:
                with self.lock, self._under(decoding.mask_type):
                    if not stop.is_set():
                        result["output"] = self.model.generate(
                            **inputs,
                            **options,
                            streamer=streamer if options["num_beams"] == 1 else None,
                            stopping_criteria=[StopWhen(stop)],
                        )
            except Exception as error:  # of another thread: raised below
                result["error"] = error
            finally:
                streamer.text_queue.put(streamer.stop_signal)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                if text.strip():
                    yield text.strip()
        finally:
            stop.set()
        worker.join()
        if "error" in result:
            raise result["error"]
        tokens = result["output"][0, inputs["input_ids"].shape[1] :]
        yield self.processor.decode(tokens, skip_special_tokens=True).strip()

    def look(self, talk: Talk, images: Sequence[Image.Image], answer: str, mask_type: str) -> ImageAttention | None:
        """Where the model looked, in the overview of images that are cut into tiles, for each word of its answer to the last message, in
        float16; None if there is nothing to see: no image in the conversation, no word in the answer, or no memory for the attention."""
        config = self.model.config.text_config
        shown = sum(part["type"] == "image" for message in talk.messages for part in message["content"])
        length = len(
            self.processor.tokenizer(str(talk.messages) + answer)["input_ids"]
        )  # at least as long as the texts
        length += sum(tokens_of(self.processor, grid) for grid in grids_of(self.processor, images[:shown]))
        needed = 4 * config.num_hidden_layers * config.num_attention_heads * length**2
        if shown == 0 or not answer.strip() or needed > ATTENTION_BYTES:
            return None
        with self.lock, self._under(mask_type):
            looked = attention_to_images(self.model, self.processor, images, list(talk.messages), answer)
        looked = replace(looked, layers=looked.layers.half(), rollout=looked.rollout.half())
        return looked if looked.layers.nbytes + looked.rollout.nbytes <= KEPT_BYTES else None

    def _check_length(self, length: int) -> None:
        most = context_of(self.model)
        if most is not None and length > most:
            raise ValueError(
                f"The conversation is too long: with room for the answer it has {length} tokens, and the model takes {most}. Start again, "
                "or allow a shorter answer."
            )

    @contextmanager
    def _under(self, mask_type: str) -> Iterator[None]:
        """Gives the model another mask type inside."""
        config, before = self.model.config, self.mask_type
        config.attention_mask_type = mask_type
        try:
            yield
        finally:
            config.attention_mask_type = before


def heat_map(
    images: list[Image.Image], values: torch.Tensor, grids: list[tuple[int, int]] | None = None
) -> Image.Image:
    """Lays a word's heat maps over its images, side by side: bright where the model looked, dark where it did not.

    Args:
        values: `(images, rows, columns)`; the largest of all is brightest.
        grids: of each image, the rows and columns that it has; left out: all.
    """
    largest = max(float(values.max()), 1e-9)
    own = [
        each[:rows, :columns] / largest
        for each, (rows, columns) in zip(values, grids or [values.shape[1:]] * len(values))
    ]
    shown = [_heated(image, each.float().cpu().numpy()) for image, each in zip(images, own)]
    gap = 8
    size = sum(each.width for each in shown) + gap * (len(shown) - 1), max(each.height for each in shown)
    joined, left = Image.new("RGB", size, "white"), 0
    for each in shown:
        joined.paste(each, (left, 0))
        left += each.width + gap
    return joined


def _heated(image: Image.Image, values: np.ndarray) -> Image.Image:
    scale = SHOWN_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    heat = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    place = heat * (len(HEAT) - 1)
    below = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - below)[..., None]
    colours = HEAT[below] * (1 - share) + HEAT[below + 1] * share
    return Image.fromarray((0.45 * np.asarray(image) + 0.55 * colours).round().astype(np.uint8))
