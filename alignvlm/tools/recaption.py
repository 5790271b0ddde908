"""Captions the images of a folder or data set with any image-text model, filters the captions, and writes a source of training data.

    alignvlm recaption out/stage3 photos out/captions.jsonl --min_words 4 --max_repetition 0.5
    accelerate launch -m alignvlm.tools.recaption out/stage3 photos out/captions.jsonl      # several processes

Captions and scores are kept beside the output (`evaluation/batches.py`), so an interrupted run goes on where it stopped, and a run with
other filters captions nothing again. `captioner.py` asks the model, `caption_filters.py` chooses.
"""

import argparse
import hashlib
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm.auto import tqdm

from alignvlm.data.bare_images import BareImages, list_images
from alignvlm.data.formats import CAPTION_PROMPT, IMAGE_TOKEN
from alignvlm.data.images import BadImage, image_hash, read_image
from alignvlm.data.record import ON_BAD_ROW
from alignvlm.evaluation.batches import Work, progress_folder, run_batches
from alignvlm.evaluation.load import add_loading_options, evaluation_tag, load_checkpoint, model_identity
from alignvlm.tools.caption_filters import Judged, Limits, measure, most_agreed, rejection
from alignvlm.tools.caption_source import beside, write_source
from alignvlm.tools.captioner import (
    SCORERS,
    Caption,
    Captioner,
    Scorer,
    check_scorer,
    has_chat_template,
    load_processor,
)
from hub_upload.command_line import ArgumentParser, run
from hub_upload.licences import licence_of, read_licence
from hub_upload.run_record import library_versions, read_run_record


SKIP = "Leave it out with --on_bad_image skip, which keeps what is captioned; or replace it, which begins anew."
SAMPLING = {"temperature": 1.0, "top_p": 1.0}
# What an option may be: whether a number is, and in words.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (
        lambda value: 0 < value < math.inf,
        "a number above 0; without --samples the likeliest caption is taken",
    ),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "max_repetition": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "min_agreement": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "min_score": (lambda value: -1 <= value <= 1, "a number from -1 to 1"),
}


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s MODEL DATA OUTPUT [options]")
    p.add_argument(
        "model", help="A folder or Hub repository of an image-text-to-text model of transformers, or a checkpoint."
    )
    p.add_argument(
        "data",
        help="A folder with images anywhere below it; or a file or folder of rows (jsonl, json, csv, parquet, webdataset) or a "
        "data set of the Hub, whose images are captioned once each.",
    )
    p.add_argument(
        "output", help="The captions, a .jsonl file; its folder also holds the rejected ones and a summary."
    )
    p.add_argument("--split", default="train", help="Of rows. Default: train.")
    p.add_argument("--data_config", help="Config of a Hub data set, or a folder in a local one.")
    p.add_argument("--data_revision", help="Revision of a Hub data set.")
    p.add_argument("--image_dir", help="Where image paths in rows start. Default: beside the file that names them.")
    p.add_argument("--limit", type=int, help="At most this number of images.")
    p.add_argument(
        "--on_bad_image", choices=ON_BAD_ROW, default="raise", help="What to do with an image that cannot be read."
    )
    p.add_argument(
        "--prompt",
        help=f"What the model is asked. Default: {CAPTION_PROMPT!r} if it has a chat template, else nothing. Without a chat "
        "template, the text that it continues.",
    )
    p.add_argument(
        "--train_prompt",
        help=f"The prompt that the captions answer in training. Default: the prompt asked; without a chat template "
        f"{CAPTION_PROMPT!r}.",
    )
    p.add_argument("--batch_size", type=int, default=16, help="Images at once. Default: 16.")
    p.add_argument("--max_new_tokens", type=int, default=128, help="Where a caption is cut off. Default: 128.")
    p.add_argument("--num_beams", type=int, default=1, help="1, the default, is greedy decoding.")
    p.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="Sample N captions per image and take the one that agrees most with the others. Default: 1, without sampling.",
    )
    p.add_argument("--temperature", type=float, help="Of --samples. Default: 1.")
    p.add_argument("--top_p", type=float, help="Of --samples: nucleus sampling. Default: 1, all tokens.")
    p.add_argument("--seed", type=int, default=0, help="Of --samples.")
    add_loading_options(p)
    filters = p.add_argument_group("filters", "Each is off unless named, but for empty and unfinished captions.")
    filters.add_argument("--min_words", type=int, default=1, metavar="N", help="Default: 1.")
    filters.add_argument("--max_words", type=int, metavar="N")
    filters.add_argument(
        "--max_repetition",
        type=float,
        metavar="R",
        help="Highest share of word pairs that repeat an earlier one; 0.5 rejects loops and hardly a text.",
    )
    filters.add_argument(
        "--min_agreement", type=float, metavar="A", help="Least mean F1 of shared words between the --samples, 0 to 1."
    )
    filters.add_argument("--scorer", metavar="MODEL", help="A CLIP or SigLIP that scores each caption with its image.")
    filters.add_argument("--scorer_revision", help="Revision of a Hub scorer.")
    filters.add_argument(
        "--min_score",
        type=float,
        metavar="S",
        help="Least cosine of the scorer; a run without it prints their spread.",
    )
    filters.add_argument("--keep_unfinished", action="store_true", help="Keep captions that --max_new_tokens cut off.")
    return p


def recaption(arguments: argparse.Namespace) -> dict | None:
    """Captions, filters and writes as the command line asks.

    Returns:
        The summary that was written, on the main process; None on the others.

    Raises:
        FileNotFoundError: for a model, a scorer or data that are not there.
        FileExistsError: for an output that another program wrote.
        ValueError: for options that contradict each other or have no effect, a prompt that training would refuse, a scorer that does not embed
            images and texts, and for images that cannot be read (`BadImage`).
    """
    output = Path(arguments.output)
    limits = check_arguments(arguments)
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    with state.main_process_first():  # fetches and converts remote code and data once
        images = list_images(
            arguments.data,
            arguments.split,
            arguments.data_config,
            arguments.data_revision,
            arguments.image_dir,
            arguments.limit,
            arguments.on_bad_image,
        )
        if images.of_rows and output.resolve().is_relative_to(Path(arguments.data).resolve()):
            raise ValueError(
                f"The output {arguments.output!r} would become a part of {arguments.data}. Name a file elsewhere."
            )
        processor = load_processor(arguments.model, arguments.revision, arguments.trust_remote_code)
        asked = arguments.prompt
        if asked is None:
            asked = CAPTION_PROMPT if has_chat_template(processor) else ""
        train_prompt = arguments.train_prompt
        if train_prompt is None:
            train_prompt = asked if has_chat_template(processor) else CAPTION_PROMPT
        if IMAGE_TOKEN in train_prompt:
            raise ValueError(
                f"The captions would answer {train_prompt!r} in training, which holds the image placeholder {IMAGE_TOKEN}. Name a "
                "--train_prompt without it: the image goes before the prompt by itself."
            )
        if arguments.scorer:
            check_scorer(arguments.scorer, arguments.scorer_revision, arguments.trust_remote_code)
        settings = settings_of(arguments, images, asked)
    settings["images_sha256"] = _content_hash(images, state)
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
    captioned = _shared(_caption_work(arguments, images, settings, state), arguments, output, state)
    chosen = [most_agreed([text for text, _ in one["captions"]]) if "captions" in one else None for one in captioned]
    scores = [None] * len(images)
    if arguments.scorer:
        texts = [captioned[i]["captions"][found[0]][0] if found else "" for i, found in enumerate(chosen)]
        scores = _shared(_score_work(arguments, images, texts, settings, state), arguments, output, state)
    if not state.is_main_process:
        return None
    judged = [_judged(*given, limits) for given in zip(captioned, chosen, scores, strict=True)]
    if arguments.on_bad_image == "raise":  # what is kept may be of a run that skipped
        bad = next((i for i, one in enumerate(judged) if one.caption is None), None)
        if bad is not None:
            raise bad_image(images.place_of(bad), judged[bad].rejected["problem"])
    scorer = model_identity(arguments.scorer, arguments.scorer_revision) if arguments.scorer else None
    filters = {**asdict(limits), "scorer": scorer}
    by = {**settings["model"], "licence": _licence(arguments.model, arguments.revision)}
    by |= {name: settings[name] for name in ("prompt", "decoding")}
    return write_source(output, images, judged, train_prompt, by, {**settings, "filters": filters})


def check_arguments(arguments: argparse.Namespace) -> Limits:
    """Returns the limits of the command line.

    Raises:
        FileExistsError: for an output that is there without a summary beside it.
        ValueError: for options without effect, or out of range.
    """
    output = Path(arguments.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"The output {arguments.output!r} is no .jsonl file: name it so.")
    if output.resolve() == Path(arguments.data).resolve():
        raise ValueError(f"The output {arguments.output!r} is the data itself. Name another file.")
    if output.exists() and not beside(output, ".summary.json").exists():
        raise FileExistsError(f"{arguments.output!r} is there already, and not from this command. Name another file.")
    for name, default in (("temperature", None), ("top_p", None), ("min_agreement", None), ("seed", 0)):
        if getattr(arguments, name) != default and arguments.samples < 2:
            raise ValueError(f"--{name} needs --samples of 2 or more; one caption per image is not sampled.")
    for name in ("min_score", "scorer_revision"):
        if getattr(arguments, name) is not None and not arguments.scorer:
            raise ValueError(f"--{name} needs a --scorer: {SCORERS}.")
    for name in ("batch_size", "max_new_tokens", "num_beams", "samples", "limit"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} is less than 1.")
    for name, (is_valid, valid) in RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"--{name} {value:g} is out of range: give {valid}.")
    if arguments.min_words < 0:
        raise ValueError(f"--min_words {arguments.min_words} is less than 0.")
    if arguments.max_words is not None and arguments.max_words < arguments.min_words:
        raise ValueError(f"--max_words {arguments.max_words} is less than --min_words {arguments.min_words}.")
    return Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})


def settings_of(arguments: argparse.Namespace, images: BareImages, prompt: str) -> dict:
    """Returns what decides the captions: kept captions of other settings are not taken for these."""
    tag = evaluation_tag(arguments.model, arguments.revision)
    decoding = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.samples > 1:
        given = {name: getattr(arguments, name) for name in SAMPLING}
        decoding |= {"do_sample": True, "top_k": 0}
        decoding |= {name: SAMPLING[name] if value is None else value for name, value in given.items()}
        decoding |= {"seed": arguments.seed, "samples": arguments.samples}
    return {
        "data": images.identity,
        "images": len(images),
        "model": model_identity(arguments.model, arguments.revision),
        "prompt": f"{tag} {prompt}".strip(),
        "decoding": decoding,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "trust_remote_code": arguments.trust_remote_code,
        "versions": {"python": platform.python_version()} | library_versions(),
    }


def _content_hash(images: BareImages, state: PartialState) -> str:
    """Returns the SHA-256 of all images' contents, undecoded, in their order; each process reads its share.

    Names and sizes do not tell that an image was replaced by another of its resolution in an uncompressed format, and the time of a file
    changes when a folder is copied or touched, which must not cost the captions. So each file is read once more, which costs little beside
    decoding and captioning it.
    """
    mine = range(state.process_index, len(images), state.num_processes)
    hashes = []
    for index in tqdm(mine, desc="read", disable=not state.is_main_process):
        try:
            hashes.append((index, image_hash(images[index])))
        except BadImage:
            hashes.append((index, "unreadable"))
    lines = "".join(f"{found}\n" for _, found in sorted(gather_object(hashes)))
    return hashlib.sha256(lines.encode()).hexdigest()


def _shared(work: Work, arguments: argparse.Namespace, output: Path, state: PartialState) -> list:
    """Runs the work and returns all its outputs to every process."""
    title = "scores" if "scorer" in work.settings else "captions"
    folder = progress_folder(output.parent, f"{output.stem}-{title}", work.settings)
    outputs = [run_batches(work, arguments.batch_size, folder, state, title)]
    return broadcast_object_list(outputs)[0]


def _caption_work(arguments: argparse.Namespace, images: BareImages, settings: dict, state: PartialState) -> Work:
    """Returns work that captions images: of each `captions`, pairs of text and whether it is finished, or a `problem`."""
    decoding = dict(settings["decoding"])
    samples, seed = decoding.pop("samples", 1), decoding.pop("seed", None)
    loaded: list[Captioner] = []

    def load() -> None:
        with state.main_process_first():
            model, processor, precision = load_checkpoint(
                arguments.model,
                state.device,
                arguments.revision,
                arguments.trust_remote_code,
                arguments.dtype,
                arguments.attn_implementation,
                others=True,
            )
        if state.is_main_process:
            print(f"{arguments.model} computes in {precision}")
        loaded.append(Captioner(model, processor, settings["prompt"]))

    def run(units: range) -> list[dict]:
        read = [_read(images, unit, arguments.on_bad_image) for unit in units]
        shown = [image for image in read if isinstance(image, Image.Image)]
        if seed is not None:
            torch.manual_seed(seed * 1_000_003 + units.start)  # the same whichever process runs the batch
        found = iter(loaded[0](shown, samples, **decoding) if shown else [])
        return [
            {"captions": [(caption.text, caption.finished) for caption in next(found)]}
            if isinstance(one, Image.Image)
            else {"problem": one}
            for one in read
        ]

    return Work(len(images), settings, run, prepare=load)


def _score_work(
    arguments: argparse.Namespace, images: BareImages, texts: list[str], settings: dict, state: PartialState
) -> Work:
    """Returns work that scores each image with its text; None for an image without one."""
    loaded: list[Scorer] = []

    def load() -> None:
        given = (state.device, arguments.scorer_revision, arguments.trust_remote_code, arguments.dtype)
        with state.main_process_first():
            loaded.append(Scorer(arguments.scorer, *given))

    def run(units: range) -> list[float | None]:
        scored = [unit for unit in units if texts[unit]]
        shown = [read_image(images[unit]) for unit in scored]
        values = loaded[0](shown, [texts[unit] for unit in scored]) if scored else []
        found = dict(zip(scored, values, strict=True))
        return [found.get(unit) for unit in units]

    scorer = model_identity(arguments.scorer, arguments.scorer_revision)
    return Work(len(images), {**settings, "scorer": scorer}, run, prepare=load)


def _read(images: BareImages, index: int, on_bad_image: str) -> Image.Image | str:
    """Returns an image, or what is wrong with it if such images are skipped."""
    try:
        return read_image(images[index])
    except BadImage as error:
        if on_bad_image == "raise":
            raise bad_image(images.place_of(index), str(error)) from error
        return str(error)


def bad_image(place: str, problem: str) -> BadImage:
    """Returns the error of an image that is not skipped; the problem of a decoder may end without a full stop."""
    problem = problem.rstrip()
    return BadImage(f"{place}: {problem}{'' if problem.endswith(('.', '!', '?')) else '.'} {SKIP}")


def _judged(one: dict, chosen: tuple[int, float] | None, score: float | None, limits: Limits) -> Judged:
    """Judges what the model wrote about an image, by its chosen caption."""
    if chosen is None:
        return Judged(rejected={"reason": "bad image", "problem": one["problem"]})
    number, agreement = chosen
    caption = Caption(*one["captions"][number])
    samples = [text for text, _ in one["captions"]] if len(one["captions"]) > 1 else []
    measures = measure(caption.text, agreement if samples else None, score)
    return Judged(caption.text, measures, samples, rejection(caption, measures, limits))


def _licence(model: str, revision: str | None) -> str:
    """Returns the licence of a model as its run record or its card states it."""
    record = read_run_record(model, revision)
    try:
        licence = licence_of(record) if record.get("backbones") else read_licence(model, revision)
    except ValueError:
        licence = None
    return "not stated" if licence is None else licence.get("license_name") or licence["license"]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; an error ends the program with one sentence."""
    arguments = parser().parse_args(argv)
    try:
        recaption(arguments)
        PartialState().destroy_process_group()  # its threads can abort the process if they outlive the interpreter
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run(main)
