"""Talks with a checkpoint at a prompt: takes several turns, with images, and prints each answer while it is generated.

    alignvlm chat out/stage4 photo.jpg

Keeps the conversation as transformers' messages, and encodes all of it anew at each turn: under the mask types `prefix` and `mutual`
a kept cache would change the answer.
"""

import argparse
import io
import sys
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, TextStreamer

from alignvlm.data.images import read_image
from alignvlm.evaluation.answer import context_of
from alignvlm.evaluation.load import add_loading_options, evaluation_tag, with_tag
from alignvlm.tools.ask import load
from hub_upload.command_line import ArgumentParser, positive, run


HELP = """\
/image PATH  add an image to your next message
/reset       begin again: forget all messages and images
/help        show this
/quit        end, as the end of the input does"""


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(
        description="Talks with a checkpoint about images.",
        epilog=f"At the prompt:\n{HELP}",
        usage="%(prog)s CHECKPOINT [IMAGE] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument("image", nargs="?", help="An image for the first message.")
    p.add_argument(
        "--max_new_tokens",
        type=positive,
        metavar="N",
        default=256,
        help="Where an answer is cut off. Default: 256.",
    )
    add_loading_options(p)
    return p


class AnswerStreamer(TextStreamer):
    """Prints words as soon as they are complete, without the white space before the first."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        print(text, end="\n" if stream_end else "", flush=True)


class Chat:
    """A conversation: its messages so far, and the images for the next message.

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        tag: the source tag before the user's first message, as in training (`Conversation.with_prefix`).
        max_new_tokens: where an answer is cut off, or where the model's context ends.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, tag: str = "", max_new_tokens: int = 256):
        self.model, self.processor, self.tag, self.max_new_tokens = model, processor, tag, max_new_tokens
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict] = []
        self.images: list[Image.Image] = []

    @torch.inference_mode()
    def reply(self, text: str) -> str:
        """Prints the greedy answer to a message while it is generated, and returns it.

        Raises:
            ValueError: for a message that is no UTF-8 or holds the image placeholder, and for a conversation that leaves no room for an
                answer; the message is not kept.
        """
        _check_text(text)
        images = [{"type": "image", "image": image} for image in self.images]
        text = text if self.messages else with_tag(self.tag, text)
        content = [*images, {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        limit = context_of(self.model)
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - length)
        if limit is not None and length >= limit:
            raise ValueError(
                f"The conversation has {length} tokens, which leave no room for an answer within {limit}. Write less, or forget all messages "
                "and images with /reset."
            )
        output = self.model.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            streamer=AnswerStreamer(self.processor.tokenizer),
        )
        answer = self.processor.decode(output[0, length:], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.images = []
        return answer

    def add_image(self, path: str) -> None:
        """Adds an image to the next message; prints an error if it cannot be read."""
        try:
            self.images.append(read_image(Path(path).expanduser()))
        except ValueError as error:
            print(f"error: {_printable(str(error))}")
        else:
            print(f"{_printable(path)} goes with your next message.")

    def obey(self, line: str) -> bool:
        """Runs a line that begins with a slash. Returns False if the chat ends."""
        command, _, rest = line.partition(" ")
        if command == "/image" and rest:
            self.add_image(rest.strip().strip("'\""))
        elif command == "/image":
            print("error: /image needs the path of an image.")
        elif command == "/reset":
            self.reset()
            print("All messages and images are forgotten.")
        elif command == "/help":
            print(HELP)
        elif command != "/quit":
            print(f"error: There is no command {_printable(command)}.\n{HELP}")
        return command != "/quit"

    def run(self) -> None:
        """Reads lines and answers until `/quit` or the end of the input. An interrupt during an answer ends only the answer."""
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                if not self.obey(line):
                    return
            elif line:
                try:
                    self.reply(line)
                except ValueError as error:
                    print(f"error: {error}")
                except KeyboardInterrupt:
                    print("\nInterrupted; your message is not kept.")


def _check_text(text: str) -> None:
    """Refuses a line whose bytes are no UTF-8: `input` leaves half of a surrogate pair for each, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(chr(code))
        raise ValueError(
            f"The message is no UTF-8: it holds {what} behind {text[max(error.start - 20, 0) : error.start]!r}. It is not kept; write it again."
        ) from error


def _printable(text: str) -> str:
    """Returns a text that is or names what was typed; half surrogates, which standard output may not take, are escaped."""
    return text.encode(errors="backslashreplace").decode()


def main(argv: list[str] | None = None) -> None:
    """Loads the checkpoint and talks; a checkpoint that cannot be loaded ends the program with one sentence."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        model, processor, precision = load(arguments)
        tag = evaluation_tag(arguments.checkpoint, arguments.revision)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # or a line that is no UTF-8 would end the conversation
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - makes `input` keep the lines for the arrow keys
    print(f"{arguments.checkpoint} on {model.device.type} in {precision}. /help lists the commands.")
    chat = Chat(model, processor, tag, arguments.max_new_tokens)
    if arguments.image is not None:
        chat.add_image(arguments.image)
    chat.run()


if __name__ == "__main__":
    run(main)
