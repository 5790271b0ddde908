"""Nano backbones that can read: an encoder and a language model trained from nothing on drawn signs (`alignvlm/data/signs.py`).

The encoder is a small ResNet: a convolutional one learns to read in minutes of one core where a nano SigLIP does not, and takes images of
any size. It learns from what an encoder sees of a scene with and without tiles, so that no way of showing scenes is new to it.
"""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.data import scenes, signs
from alignvlm.data.record import Record, one_turn
from alignvlm.quickstart.nano import train_language_model, train_loop
from modeling_alignvlm.processing_alignvlm import best_grid


SIDE, FEATURE = 64, 8  # pixels of a tile's side, and of a feature's
GRID = SIDE // FEATURE
LETTERS = sorted(set("".join(signs.WORDS)) | set("0123456789"))
MOST = max(map(len, signs.WORDS))
NOTHING, UNREADABLE = 0, -100  # labels of a place: no sign there, or one that is cut


def train_sign_backbones(
    folder: Path, seed: int, scene_count: int, vision_steps: int, language_steps: int
) -> tuple[Path, Path]:
    """Trains both backbones on the training split, saves them under `folder` and returns their two folders."""
    vision, language = Path(folder) / "vision", Path(folder) / "language"
    if not vision.is_dir():
        train_reader(vision, seed, scene_count, vision_steps)
    train_language_model(language, seed, language_steps, draw_dialogue=sign_dialogue, split_digits=True)
    return vision, language


def sign_dialogue(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prompts and responses about signs that are not drawn; the first prompt describes them."""
    scene = signs.random_signs(rng, "train")
    asked = signs.sign_questions(scene)
    turns = [asked[i][:2] for i in rng.permutation(len(asked))]
    described = " ".join(f"The {sign.colour} sign has {sign.text}." for sign in scene.signs)
    first, response = turns[0]
    return [(f"{described} {first}", response), *turns[1:]]


def views(scene: signs.SignScene, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws a scene and shows it as an encoder may see it: squashed into one tile, into 2 x 2, and cut into at most 2, 4 and 6.

    Returns:
        Pairs of a tile `(SIDE, SIDE, 3)` and, for each of its features, the colour and the letters of the sign there, `(GRID, GRID, 1 + MOST)`:
        `NOTHING`, the place in the list of colours or in `LETTERS` plus 1, or `UNREADABLE`.
    """
    image, places = signs.draw_signs_at(scene, rng, SIDE)
    grids = {(1, 1), (2, 2), *(best_grid((image.height, image.width), (SIDE, SIDE), most) for most in (2, 4, 6))}
    shown = []
    for rows, columns in sorted(grids):
        pixels = np.asarray(image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC))
        labels = np.zeros((rows * GRID, columns * GRID, 1 + MOST), dtype=np.int64)
        covered = np.zeros(labels.shape[:2])
        across, down = columns * SIDE / image.width, rows * SIDE / image.height
        for sign, (left, top, right, bottom) in zip(scene.signs, places):
            left, right, top, bottom = left * across, right * across, top * down, bottom * down
            cut = left // SIDE != np.ceil(right / SIDE) - 1 or top // SIDE != np.ceil(bottom / SIDE) - 1
            letters = [1 + LETTERS.index(letter) for letter in sign.text] + [NOTHING] * (MOST - len(sign.text))
            label = [1 + list(scenes.COLOURS).index(sign.colour), *([UNREADABLE] * MOST if cut else letters)]
            area = np.outer(_overlap(top, bottom, len(labels)), _overlap(left, right, labels.shape[1]))
            labels[area > covered] = label
            covered = np.maximum(area, covered)
        for row in range(rows):
            for column in range(columns):
                places_of = np.s_[row * GRID : (row + 1) * GRID, column * GRID : (column + 1) * GRID]
                tile = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                if labels[places_of].any() or rng.random() < 0.3:  # of empty tiles a few are enough
                    shown.append((tile, labels[places_of]))
    return shown


def view_records(count: int, seed: int, views_per_scene: int = 6) -> Dataset:
    """Makes records of single views, of each scene the overview and some others, with the questions about the signs that are not cut."""
    rng = np.random.default_rng([seed, 21])
    records: list[dict] = []
    while len(records) < count:
        overview, *others = views(signs.random_signs(rng, "train"), rng)
        for index in rng.permutation(len(others))[: views_per_scene - 1]:
            records += view_record(*others[index])
        records += view_record(*overview)
    return Dataset.from_list(records[:count], features=scenes.RECORD_FEATURES)


def view_record(tile: np.ndarray, labels: np.ndarray) -> list[dict]:
    """The record of a view; none if it shows no complete sign."""
    found = np.unique(labels.reshape(-1, 1 + MOST), axis=0)
    seen = [
        signs.Sign(list(scenes.COLOURS)[colour - 1], "".join(LETTERS[letter - 1] for letter in letters if letter), (0, 0))
        for colour, *letters in found[(found[:, 0] > 0) & (found[:, 1] != UNREADABLE)].tolist()
    ]  # fmt: skip
    asked = signs.sign_questions(signs.SignScene((1, 1), tuple(seen))) if seen else []
    if (found == UNREADABLE).any():
        asked = [each for each in asked if each[2] != "count"]
    image = io.BytesIO()
    Image.fromarray(tile).save(image, "BMP")
    turns = [one_turn(question, [answer], 1, kind) for question, answer, kind in asked]
    return [Record([{"bytes": image.getvalue()}], turns).to_row()] if seen else []


def _overlap(start: float, end: float, features: int) -> np.ndarray:
    """Pixels of a line from `start` to `end` that lie in each feature."""
    edges = np.arange(features + 1) * FEATURE
    return np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None)


def train_reader(folder: Path, seed: int, scene_count: int, steps: int, batch_size: int = 64) -> None:
    """Trains the encoder to tell of every place the colour and the letters of the sign there, if any."""
    set_seed(seed)
    rng = np.random.default_rng([seed, 20])
    shown = [view for _ in range(scene_count) for view in views(signs.random_signs(rng, "train"), rng)]
    pixels, labels = np.stack([tile for tile, _ in shown]), torch.from_numpy(np.stack([label for _, label in shown]))
    config = ResNetConfig(
        embedding_size=24, hidden_sizes=[48, 96], depths=[1, 2], layer_type="basic", downsample_in_first_stage=False
    )
    encoder = ResNetModel(config)
    classes = [1 + len(scenes.COLOURS), *[1 + len(LETTERS)] * MOST]
    head = nn.Linear(config.hidden_sizes[-1], sum(classes))

    def loss_of_step(step: int) -> torch.Tensor:
        chosen = rng.integers(len(pixels), size=batch_size)
        images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2) / 127.5 - 1  # as the image processor does
        features = encoder(images).last_hidden_state.permute(0, 2, 3, 1)
        wanted = labels[chosen]
        weights = torch.where(wanted[..., 0] > 0, 1.0, 0.1).flatten()
        loss_of = partial(F.cross_entropy, reduction="none", ignore_index=UNREADABLE)
        predictions = head(features).float().split(classes, dim=-1)
        losses = sum(loss_of(p.flatten(0, 2), wanted[..., i].flatten()) for i, p in enumerate(predictions))
        return (losses * weights).sum() / weights.sum()

    train_loop("encoder", [encoder.train(), head], 5e-3, steps, loss_of_step)
    encoder.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
