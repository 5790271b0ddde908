"""Draws images for the loop of docs/recaption.md, and counts which captions are word for word the drawn scene's.

python benchmarks/recaption.py draw photos
python benchmarks/recaption.py count out/round1.jsonl out/round2.jsonl
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/recaption.py`

from alignvlm.data import scenes
from alignvlm.data.record import Record


COUNT, SEED = 512, 77  # no scene of the quickstart's recipes


def records() -> dict[str, Record]:
    """The drawn scenes, by the names of their image files."""
    drawn = scenes.make_scenes(COUNT, seed=SEED, annotations=("short_caption",))
    return {f"{index:03}.png": Record.from_row(row) for index, row in enumerate(drawn)}


def share_right(rows: list[dict], found: dict[str, Record]) -> float:
    """The share of rows whose caption is the scene's own."""
    right = sum(row["annotations"][0]["response"] in found[row["image"]].conversations[0].responses for row in rows)
    return right / max(1, len(rows))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("draw", "count"))
    p.add_argument("paths", nargs="+", help="The new folder to draw into; or files that `alignvlm recaption` wrote.")
    arguments = p.parse_args(argv)
    if arguments.what == "draw":
        folder = Path(arguments.paths[0])
        folder.mkdir(parents=True)
        for name, record in records().items():
            record.images[0].save(folder / name)
        return
    found = records()
    for path in arguments.paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        print(f"{path}: {len(rows)} captions, {share_right(rows, found):.3f} word for word right")


if __name__ == "__main__":
    main()
