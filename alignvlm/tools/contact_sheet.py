"""Shows what a stage's sources hold: a table, and a contact sheet of images, prompts and responses as the model gets them."""

import base64
import html
import io
from itertools import cycle, groupby, islice
from pathlib import Path

import numpy as np
from datasets import IterableDataset
from PIL import Image

from alignvlm.data.images import BadImage, read_image
from alignvlm.data.mixture import Mixture, Part
from alignvlm.rows.collator import AlignVLMCollator, LeftOut
from alignvlm.rows.packing import IGNORED, Row
from alignvlm.rows.tiles import image_inputs_of
from modeling_alignvlm import AlignVLMProcessor


STYLE = """body { font: 14px/1.5 sans-serif; margin: 2em; max-width: 70em }
article { display: flex; gap: 1em; margin: 1em 0; padding-top: 1em; border-top: 1px solid #ccc }
img { width: 12em; height: 12em; object-fit: contain; image-rendering: pixelated } pre { white-space: pre-wrap; margin: 0 0 .5em }
b { font-weight: normal; background: #cde8c9 } i { font-style: normal; background: #e4e4e4; color: #666 }"""


def describe_parts(mixture: Mixture, collator: AlignVLMCollator, sample: int = 1000) -> str:
    """Returns a table with a line per source, measured on at most `sample` of its records (0: all; of a stream 1000).

    Columns: the records, those drawn per epoch, the share of tokens, annotations and tokens per record, the share of image tokens, and
    records with images that cannot be read.
    """
    lines = [
        f"{'source':<20} {'records':>9} {'an epoch':>9} {'share':>6} {'annotations':>11} {'tokens: mean':>12} {'95%':>6} {'longest':>7} "
        f"{'of images':>9} {'bad images':>12}"
    ]
    for index, part in enumerate(mixture.parts):
        streamed = isinstance(part.source.rows, IterableDataset)
        tokens, images, bad, left_out = [], [], [], LeftOut(collator.packer.max_length)
        for record in part.sample(sample or (1000 if streamed else len(part.source))):
            image, text = collator.token_counts(record, left_out)
            tokens.append(image + text)
            images.append(image)
            try:
                for picture in record["images"]:
                    read_image(picture)
            except BadImage as error:
                bad.append(str(error))
        count = "stream" if streamed else f"{len(part.source):,}"
        drawn = "" if mixture.draws is None else f"{mixture.draws[index]:,}"
        share = "" if part.share is None else f"{part.share:.1%}"
        lines.append(
            f"{part.name:<20} {count:>9} {drawn:>9} {share:>6} {left_out.annotations / left_out.records:>11.2f} {np.mean(tokens):>12.1f} "
            f"{np.percentile(tokens, 95):>6.0f} {max(tokens):>7} {sum(images) / max(sum(tokens), 1):>9.1%} {f'{len(bad)} of {left_out.records}':>12}"
        )
        lines += [f"  {message}" for message in bad[:5]]
        if str(left_out):
            lines.append(f"  {left_out}")
        if bad_rows := part.source.bad_rows:
            lines += [f"  {len(bad_rows)} bad rows, left out:", *(f"    {message}" for message in bad_rows[:5])]
    return "\n".join(lines)


def write_contact_sheet(mixture: Mixture, collator: AlignVLMCollator, count: int, path: Path) -> None:
    """Writes one HTML file with at most `count` records, from the sources in turn; trained tokens are coloured."""
    records = [part.sample(count) for part in mixture.parts]
    shown = [(part, next(found, None)) for part, found in islice(cycle(zip(mixture.parts, records)), count)]
    body = "".join(_article(part, record, collator) for part, record in shown if record is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>Training data</title><style>{STYLE}</style><h1>Training data</h1>"
        f"<p>As the model gets them: images after the image processor, tokens as text; <b>coloured</b> tokens are trained, "
        f"<i>grey</i> ones stand for the image.</p>{body}\n",
        encoding="utf-8",
    )


def _article(part: Part, record: dict, collator: AlignVLMCollator) -> str:
    try:
        pictures = [read_image(image) for image in record["images"]]
    except BadImage as error:
        return (
            f"<article><div><h3>{html.escape(part.name)}</h3><p>Skipped: {html.escape(str(error))}</p></div></article>"
        )
    losses: list[dict] = []
    texts = "".join(f"<pre>{_branches(row, collator)}</pre>" for row in collator.rows(record, losses))
    notes = "".join(f"<p>{html.escape(loss['kind'])}: {html.escape(loss['what'])}</p>" for loss in losses)
    shown = "".join(f'<img src="{_data_url(picture, collator)}">' for picture in pictures)
    return f"<article>{shown}<div><h3>{html.escape(part.name)}</h3>{texts}{notes}</div></article>\n"


def _branches(row: Row, collator: AlignVLMCollator) -> str:
    """Writes a row's tokens as HTML: an image's tokens as one mark, each branch on lines of its own."""
    image_token = collator.processor.image_token_id
    kinds = [
        (branch, token == image_token, label != IGNORED)
        for branch, token, label in zip(row.branch_ids, row.input_ids, row.labels)
    ]
    pieces, previous = [], 0
    for (branch, is_image, is_trained), run in groupby(range(len(row)), key=kinds.__getitem__):
        run = list(run)
        if branch != previous:
            pieces.append("\n")
        previous = branch
        if is_image:
            pieces.append(f"<i>[{len(run)} image tokens]</i>")
            continue
        text = html.escape(collator.tokenizer.decode(row.input_ids[run[0] : run[-1] + 1]))
        pieces.append(f"<b>{text}</b>" if is_trained else text)
    return "".join(pieces)


def after_processing(picture: Image.Image, processor: AlignVLMProcessor) -> Image.Image:
    """Returns an RGB image (of one that is cut into tiles, its overview) after resizing, cropping and normalisation, back in 8-bit values."""
    image_processor, inputs = processor.image_processor, image_inputs_of(processor, [picture])
    values = inputs["pixel_values"][0].numpy()
    if "spatial_shapes" in inputs:  # patches of an image in its native shape
        (rows, columns), side = inputs["spatial_shapes"][0].tolist(), image_processor.patch_size
        patches = values[: rows * columns].reshape(rows, columns, side, side, -1)
        values = patches.swapaxes(1, 2).reshape(rows * side, columns * side, -1).transpose(2, 0, 1)
    values = values.transpose(1, 2, 0)
    if getattr(image_processor, "do_normalize", False):
        values = values * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))


def _data_url(picture: Image.Image, collator: AlignVLMCollator) -> str:
    file = io.BytesIO()
    after_processing(picture, collator.processor).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
