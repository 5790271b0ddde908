"""Where the model looked while it wrote some of the shown answers: heat maps for every word and layer."""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from alignvlm.data.record import Conversation, one_turn
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.evaluation.load import device_for, load_checkpoint, model_identity
from alignvlm.tools.report.answers import Answer
from alignvlm.tools.report.pictures import as_seen, data_uri
from alignvlm.tools.report.read import Run


MOST = 6  # answers with heat maps
MOST_WORDS = 40
MOST_BYTES = 600_000  # of maps per answer


@dataclass
class HeatMaps:
    """The maps of one answer.

    Args:
        words: of the answer.
        layers: their names, in the order of `values`: the mean, the rollout, and each layer.
        shape: images, rows and columns of a map.
        values: base64 of 8-bit values `(layers, words, images, rows, columns)`, each map scaled to its own maximum.
        shares: per layer and word, how many percent of the attention went to the images.
        uris: the images as the model sees them.
    """

    answer: Answer
    words: list[str]
    layers: list[str]
    shape: tuple[int, int, int]
    values: str
    shares: list[list[int]]
    uris: list[str]


def heat_maps(run: Run, answers: list[Answer]) -> tuple[list[HeatMaps], list[str]]:
    """Computes the maps of some answers with the checkpoint that gave them; returns notes on what cannot be shown, too."""
    chosen = to_look_at(answers)
    if run.checkpoint is None:
        return [], ["The checkpoint is not beside the result, so where the model looked cannot be computed."]
    if not chosen:
        return [], ["There is no answer whose image is at hand, so there is nothing to look at."]
    results = run.last_results()
    if (
        results[0].content.get("model", {}).get("weights_sha256")
        != model_identity(str(run.checkpoint))["weights_sha256"]
    ):
        return [], ["The weights have changed since the evaluation, so the answers are not those of this checkpoint."]
    logging.disable_progress_bar()
    model, processor, _ = load_checkpoint(str(run.checkpoint), device_for())
    tag = str(results[0].content.get("tag") or "")
    found, notes = [], []
    for answer in chosen:
        images = answer.pictures.images(answer.prediction)
        asked = answer.pictures.conversation(answer.prediction)
        if asked is None:
            asked = one_turn(answer.prompt, answer.references or [""], len(images))
        asked = Conversation(asked.messages, asked.responses).with_prefix(tag)
        try:
            looked = attention_to_images(model, processor, images, asked.messages, answer.text)
        except ValueError as error:
            notes.append(f"{answer.prompt!r}: {error}")
            continue
        if len(set(looked.grids)) > 1:
            notes.append(
                f"{answer.prompt!r}: its images have grids of different shapes, which are not drawn beside each other."
            )
            continue
        words = looked.words[:MOST_WORDS]
        maps = torch.stack(
            [
                torch.stack([looked.of_word(word, layer) for word in range(len(words))])
                for layer in ("mean", "rollout", *range(len(looked.layers)))
            ]
        ).numpy()  # (layers, words, images, rows, columns)
        names = ["all layers, averaged", "all layers, followed through (rollout)"]
        names += [f"layer {number + 1} of {len(looked.layers)}" for number in range(len(looked.layers))]
        if maps.size > MOST_BYTES:  # the two averages and some of the layers
            step = -(-maps.size // MOST_BYTES)
            keep = [0, 1, *range(2, len(names), step)]
            maps, names = maps[keep], [names[each] for each in keep]
        most = np.maximum(maps.max(axis=(2, 3, 4), keepdims=True), 1e-12)
        found.append(
            HeatMaps(
                answer=answer,
                words=[word.text for word in words],
                layers=names,
                shape=tuple(maps.shape[2:]),
                values=base64.b64encode((maps / most * 255).round().astype(np.uint8).tobytes()).decode(),
                shares=(maps.sum(axis=(2, 3, 4)) * 100).round().astype(int).tolist(),
                uris=[data_uri(as_seen(image, processor)) for image in images[: maps.shape[2]]],
            )
        )
    return found, notes


def to_look_at(answers: list[Answer]) -> list[Answer]:
    """Chooses answers with images: of each kind the longest of the best, then of the worst, each about an image of its own."""
    with_image = [answer for answer in answers if answer.uris and answer.text.strip()]
    kinds = sorted({(answer.task, answer.kind) for answer in with_image})
    found: list[Answer] = []
    for group in ("best", "worst"):
        candidates = []
        for kind in kinds:
            of_kind = [a for a in with_image if (a.task, a.kind) == kind and group in a.groups and a not in found]
            if of_kind:
                candidates.append(max(of_kind, key=lambda answer: len(answer.text.split())))
        candidates.sort(key=lambda answer: -len(answer.text.split()))
        room = MOST - 2 if group == "best" else MOST
        found += candidates[: room - len(found)]
    return found


def data_folders(run: Run, path: Path) -> list[Path]:
    """Lists the folders in which a run's data may lie: its own, those around it, and where the command runs."""
    start = path if path.is_dir() else path.parent
    return [start, *list(start.resolve().parents)[:2], Path.cwd()]
