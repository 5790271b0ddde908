"""Asks a checkpoint about an image and prints the answer; without a question, it describes the image.

    alignvlm ask out/stage4 photo.jpg "What is he holding?"
    alignvlm ask out/stage4 before.jpg --image after.jpg "What has changed?"

Several images stand before the question, in the given order.
"""

import argparse

from PIL import Image
from transformers.utils import logging

from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.data.images import read_image
from alignvlm.evaluation.answer import PromptTooLong, answer
from alignvlm.evaluation.load import add_loading_options, device_for, evaluation_tag, load_checkpoint, with_tag
from hub_upload.command_line import ArgumentParser, positive, run


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s CHECKPOINT IMAGE [QUESTION] [options]")
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument("image", help="An image file.")
    p.add_argument("question", nargs="?", default=CAPTION_PROMPT, help=f"Default: {CAPTION_PROMPT!r}")
    p.add_argument("--image", dest="more_images", metavar="IMAGE", action="append", default=[], help="One more image.")
    p.add_argument(
        "--max_new_tokens", type=positive, metavar="N", default=128, help="Where an answer is cut off. Default: 128."
    )
    add_loading_options(p)
    return p


def ask(arguments: argparse.Namespace) -> str:
    """Answers the command line's question.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for an image that cannot be read (`BadImage`), and for a question that holds the image placeholder or leaves the language
            model no room for an answer.
    """
    images: list[Image.Image] = [read_image(path) for path in (arguments.image, *arguments.more_images)]
    model, processor, _ = load(arguments)
    prompt = with_tag(evaluation_tag(arguments.checkpoint, arguments.revision), arguments.question)
    try:
        return answer(model, processor, [images], [[prompt]], max_new_tokens=arguments.max_new_tokens)[0][0]
    except PromptTooLong as error:
        raise ValueError(f"The question {error.problem}") from error


def load(arguments: argparse.Namespace):
    """Loads model, processor and precision of the command line's checkpoint (see `load_checkpoint`), without progress bars."""
    logging.disable_progress_bar()
    return load_checkpoint(
        arguments.checkpoint,
        device_for(arguments.use_cpu),
        arguments.revision,
        arguments.trust_remote_code,
        arguments.dtype,
        arguments.attn_implementation,
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the answer; an error ends the program with one sentence."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        print(ask(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run(main)
