"""Draws images for the loop of docs/recaption.md, and judges captions: by the drawn scene's own, or by people's captions of photos.

python benchmarks/recaption.py draw photos
python benchmarks/recaption.py count out/round1.jsonl out/round2.jsonl
python benchmarks/recaption.py score captions.jsonl out/recaptioned.jsonl    # captions.jsonl: rows of `image` and `captions`
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/recaption.py`

from alignvlm.data import scenes
from alignvlm.data.record import Record
from alignvlm.evaluation.metrics.cider.cider_d import cider_d
from alignvlm.evaluation.metrics.cider.ptb_tokenizer import tokenize


COUNT, SEED = 512, 77  # no scene of the quickstart's recipes


def records() -> dict[str, Record]:
    """The drawn scenes, by the names of their image files."""
    drawn = scenes.make_scenes(COUNT, seed=SEED, annotations=("short_caption",))
    return {f"{index:03}.png": Record.from_row(row) for index, row in enumerate(drawn)}


def share_right(rows: list[dict], found: dict[str, Record]) -> float:
    """The share of rows whose caption is the scene's own."""
    right = sum(row["annotations"][0]["response"] in found[row["image"]].conversations[0].responses for row in rows)
    return right / max(1, len(rows))


def score(references: dict[str, list[str]], rows: list[dict]) -> str:
    """A table of CIDEr against people's captions, with the document frequencies of all captioned images: of each image's first sample,
    and of the chosen captions whose agreement reaches a limit.

    Args:
        references: by the name of the image's file.
        rows: as `alignvlm recaption` writes them, with several samples.
    """
    groups = [tokenize(references[Path(row["image"]).name]) for row in rows]
    lines = ["| captions | images | CIDEr, 95% interval |", "|---|---|---|"]
    chosen = [row["annotations"][0]["response"] for row in rows]
    agreement = np.array([row["measures"]["agreement"] for row in rows])
    limits = [float(np.quantile(agreement, share).round(2)) for share in (0.5, 0.8)]
    parts = [
        ("the first sample", [row["samples"][0] for row in rows], 0.0),
        ("the sample that agrees most", chosen, 0.0),
    ]
    parts += [(f"of these, `--min_agreement {limit:g}`", chosen, limit) for limit in limits]
    for name, texts, limit in parts:
        values = cider_d(tokenize(texts), groups)[agreement >= limit]
        drawn = np.random.default_rng(0).choice(values, (1000, len(values))).mean(axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        lines.append(f"| {name} | {len(values)} | {values.mean():.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("draw", "count", "score"))
    p.add_argument(
        "paths",
        nargs="+",
        help="The new folder to draw into; or files that `alignvlm recaption` wrote, to score behind people's.",
    )
    arguments = p.parse_args(argv)
    if arguments.what == "draw":
        folder = Path(arguments.paths[0])
        folder.mkdir(parents=True)
        for name, record in records().items():
            record.images[0].save(folder / name)
        return
    if arguments.what == "score":
        people, *paths = (
            [json.loads(line) for line in Path(path).read_text().splitlines()] for path in arguments.paths
        )
        for rows in paths:
            print(score({Path(row["image"]).name: row["captions"] for row in people}, rows))
        return
    found = records()
    for path in arguments.paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        print(f"{path}: {len(rows)} captions, {share_right(rows, found):.3f} word for word right")


if __name__ == "__main__":
    main()
