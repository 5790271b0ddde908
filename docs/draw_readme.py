"""Draws docs/readme.webp, the picture of the README: an image, a question and its answer, where the model looked, and who sees whom.

python docs/draw_readme.py out/quickstart
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image


matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python docs/draw_readme.py`

from matplotlib import pyplot

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.evaluation.load import device_for, load_checkpoint
from docs.draw_masks import ONE, draw


QUESTION = "Write a short caption."


def two_words(maps: list[np.ndarray]) -> list[int]:
    """The word before which the model looked at the image most, and the one before which it looked elsewhere, in their order."""
    first = max(range(len(maps)), key=lambda word: maps[word].sum())
    looking = [word for word in range(len(maps)) if maps[word].sum() > maps[first].sum() / 2]
    alike = {word: (maps[word] * maps[first]).sum() / np.linalg.norm(maps[word]) for word in looking}
    return sorted([first, min(alike, key=alike.get)])


def main(run: str) -> None:
    model, processor, _ = load_checkpoint(f"{run}/stage4", device_for(use_cpu=True))
    image = Image.open(f"{run}/picture.png").convert("RGB")
    ((said,),) = answer(model, processor, [[image]], [[QUESTION]], max_new_tokens=32)
    looked = attention_to_images(model, processor, [image], QUESTION, said)
    chosen = two_words([np.asarray(looked.of_word(word)[0]) for word in range(len(looked.words))])
    figure, row = pyplot.subplots(1, 4, figsize=(10.6, 3.0), layout="constrained", width_ratios=[1, 1, 1, 1.25])
    row[0].imshow(image)
    row[0].set_title(f"“{QUESTION}”\n“{said}”", fontsize=8.5)
    for axes, word in zip(row[1:], sorted(chosen)):
        heat = np.asarray(looked.of_word(word)[0])
        axes.imshow(image)
        shape = (image.height, image.width)
        grown = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(shape[::-1], Image.Resampling.NEAREST))
        axes.imshow(grown / heat.max(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
        axes.set_title(f"where it looked\nbefore “{looked.words[word].text.strip()}”", fontsize=8.5)
    for axes in row[:-1]:
        axes.set_axis_off()
    draw(row[-1], ONE, "image", "")
    row[-1].set_title("a token of this row sees these:\nimage tokens see each other", fontsize=8.5)
    figure.savefig(Path(__file__).with_name("readme.webp"), dpi=110, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main(*sys.argv[1:])
