"""Draws docs/masks.png: who sees whom, for each mask type and for a packed row.

python docs/draw_masks.py
"""

import sys
from pathlib import Path

import matplotlib
import torch


matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python docs/draw_masks.py`

from matplotlib import pyplot
from matplotlib.colors import ListedColormap

from modeling_alignvlm import MASK_TYPES, TokenLayout, dense_mask


# A token's kind and its branch: start of the prompt, image, rest of the prompt, response.
ONE = [("<s>", 0), *[("img", 0)] * 4, *[("ask", 0)] * 3, *[("say", 0)] * 3]
PACKED = [("<s>", 0), *[("img", 0)] * 4, *[("ask", 1)] * 2, *[("say", 1)] * 2, *[("ask", 2)] * 2, *[("say", 2)] * 2]
COLOURS = ListedColormap(["white", "#b9d4ec", "#2f6fa7"])  # hidden, seen by a causal mask too, seen ahead


def layout_of(tokens: list[tuple[str, int]]) -> TokenLayout:
    kinds, branches = zip(*tokens)
    return TokenLayout(
        image_ids=torch.tensor([[0 if kind == "img" else -1 for kind in kinds]]),
        record_ids=torch.zeros(1, len(tokens), dtype=torch.long),
        branch_ids=torch.tensor([branches]),
        prompt_mask=torch.tensor([[kind != "say" for kind in kinds]]),
    )


def draw(axes, tokens: list[tuple[str, int]], mask_type: str, title: str) -> None:
    mask = dense_mask(layout_of(tokens), mask_type)[0, 0]
    ahead = torch.ones_like(mask).triu(1)
    axes.imshow(mask.int() + (mask & ahead).int(), cmap=COLOURS, vmin=0, vmax=2)
    names = [kind for kind, _ in tokens]
    axes.set(title=title, xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90, fontsize=7)
    axes.set_yticklabels(names, fontsize=7)
    axes.set_xticks([i + 0.5 for i in range(len(names))], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(names))], minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="both", length=0)


def main() -> None:
    figure, grid = pyplot.subplots(1, len(MASK_TYPES) + 1, figsize=(16, 3.6), layout="constrained")
    for axes, mask_type in zip(grid, MASK_TYPES):
        draw(axes, ONE, mask_type, mask_type)
    draw(grid[-1], PACKED, "image", "image, two annotations packed")
    grid[0].set_ylabel("a token ...")
    grid[0].set_xlabel("... sees")
    path = Path(__file__).with_name("masks.png")
    figure.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
