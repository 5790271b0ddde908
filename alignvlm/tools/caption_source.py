"""Writes captions as a source of training data: the kept ones, the rejected ones, a summary, and images that have no file of their own."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import torch
import yaml
from PIL import Image

from alignvlm.data.bare_images import BareImages
from alignvlm.tools.caption_filters import Judged
from hub_upload.run_record import write_json


def write_source(
    output: Path, images: BareImages, judged: list[Judged], train_prompt: str, captioned_by: dict, settings: dict
) -> dict:
    """Writes the files and prints the counts and the source's line of YAML.

    Kept captions go to `output` as rows of the schema `annotations`, the others to `<name>.rejected.jsonl`, all settings and counts to
    `<name>.summary.json`. Paths start at the folder of `output` if the images lie below it, else at the images' own folder (`image_dir`).
    Images that lie in rows are written to `<name>_images/`, byte for byte.

    Args:
        judged: one for each of `images`.
        train_prompt: the prompt that the captions answer.
        captioned_by: what wrote the captions, for every row.
        settings: for the summary.

    Returns:
        The summary.

    Raises:
        ValueError: if no caption is kept; `output` is not there then.
    """
    image_dir, prefix = _image_dir(output, images)
    kept, rejected = [], []
    for index, one in enumerate(judged):
        place = {"place": images.place_of(index)}
        found = {"measures": one.measures, **({"samples": one.samples} if one.samples else {})}
        if one.rejected is not None:  # no column of these rows is read as a caption
            rejected.append({**place, "rejected_caption": one.caption, **one.rejected, **found})
            continue
        path = prefix + images[index]["path"] if images.all_paths else _written(images[index], output)
        annotation = {"prompt": train_prompt, "response": one.caption, "kind": "caption"}
        kept.append({"image": path, "annotations": [annotation], **found, **place, "captioned_by": captioned_by})
    counts = Counter(_described(one.rejected) for one in judged if one.rejected is not None)
    summary = {
        **settings,
        "train_prompt": train_prompt,
        "captioned_by": captioned_by,
        "kept": len(kept),
        "rejected": dict(counts.most_common()),
        "bad_rows": images.bad_rows,
        "quantiles": _quantiles(judged),
    }
    _write_rows(beside(output, ".rejected.jsonl"), rejected)
    if kept:
        _write_rows(output, kept)
    else:
        output.unlink(missing_ok=True)  # of other filters
    write_json(beside(output, ".summary.json"), summary)
    print(report(summary, output))
    if not kept:
        raise ValueError(
            f"All {len(judged)} captions are rejected, so {output} was not written. {beside(output, '.rejected.jsonl')} says why; name "
            "other limits, with which nothing is captioned again."
        )
    source = {"data": str(output), **({} if image_dir is None else {"image_dir": str(image_dir)})}
    line = yaml.safe_dump(source, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False).strip()
    print(f"To train on {output}:\n\nsources:\n  - {line}")
    return summary


def beside(output: Path, ending: str) -> Path:
    """Returns the path of a file beside the output, named after it."""
    return output.with_name(output.stem + ending)


def report(summary: dict, output: Path) -> str:
    """Returns the counts, and the quantiles of the measures over all captions, one per line."""
    lines = [f"{output.name}: {summary['kept']} captions of {summary['images']} images"]
    lines += [f"  rejected {count:>7}  {reason}" for reason, count in summary["rejected"].items()]
    if summary["bad_rows"]:
        lines.append(f"  left out {len(summary['bad_rows']):>7}  rows, the first: {summary['bad_rows'][0]}")
    for name, (low, middle, high) in summary["quantiles"].items():
        lines.append(f"  {name:<12} median {middle:.4g}, 5% below {low:.4g}, 5% above {high:.4g}")
    by = summary["captioned_by"]
    return "\n".join([*lines, f"  written by {by['name']}, whose licence is: {by['licence']}"])


def _image_dir(output: Path, images: BareImages) -> tuple[Path | None, str]:
    """Returns the source's `image_dir`, if it needs one, and what goes before the images' paths."""
    if not images.all_paths:
        return None, ""
    folder, home = images.folder.resolve(), output.parent.resolve()
    if not folder.is_relative_to(home):
        return images.folder, ""
    below = folder.relative_to(home).as_posix()
    return None, "" if below == "." else f"{below}/"


def _written(image: dict, output: Path) -> str:
    """Writes the bytes of an image, named after their hash, and returns its path from the output's folder."""
    content = image.get("bytes")
    if content is None:
        content = (Path(image.get("folder") or "") / image["path"]).read_bytes()
    kind = Image.open(io.BytesIO(content)).format.lower()
    folder = beside(output, "_images")
    file = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.{'jpg' if kind == 'jpeg' else kind}"
    if not file.exists() or file.stat().st_size != len(content):
        folder.mkdir(exist_ok=True)
        file.write_bytes(content)
    return file.relative_to(output.parent).as_posix()


def _described(rejected: dict) -> str:
    return f"{rejected['reason']} {rejected['limit']:g}" if "limit" in rejected else rejected["reason"]


def _quantiles(judged: list[Judged]) -> dict[str, list[float]]:
    """Returns the 5%, 50% and 95% quantiles of each measure, rejected captions included."""
    values: dict[str, list[float]] = {}
    for one in judged:
        for name, value in one.measures.items():
            values.setdefault(name, []).append(value)
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    return {name: torch.tensor(found, dtype=torch.float64).quantile(at).tolist() for name, found in values.items()}


def _write_rows(file: Path, rows: list[dict]) -> None:
    """Writes a jsonl file completely or not at all."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(file)
