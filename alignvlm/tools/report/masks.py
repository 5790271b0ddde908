"""Draws who may attend to whom on one example: tokens of the real processor, masks of `masking_alignvlm` itself."""

from dataclasses import dataclass
from itertools import groupby

import torch
from markupsafe import Markup

from alignvlm.data.record import Conversation
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import takes_native_shapes, tokens_of
from modeling_alignvlm import MASK_TYPES, WHOLE, AlignVLMConfig, AlignVLMProcessor, TokenLayout
from modeling_alignvlm.masking_alignvlm import dense_mask


MOST_IMAGE_TOKENS, MOST_TOKENS = 16, 64
NATIVE = (3, 5)  # rows and columns of tokens of the example's images, where they have their native shape
EXPLANATIONS = {
    "causal": "Every token sees only what stands before it: the top left of an image never learns what is at its bottom right.",
    "image": "Every token sees what stands before it, and the tokens of an image see all of that image.",
    "prefix": "Image and question see each other completely; only the answer is written from left to right.",
    "mutual": "Every token sees what stands before it, the tokens of an image see all of it, and the question, too.",
}


@dataclass
class Token:
    """A token of the example: its text, and its `group`: `image`, `prompt` or `response`."""

    text: str
    group: str


@dataclass
class MaskView:
    """The mask of one type on the example.

    Args:
        name: the mask type.
        stages: the numbers of the stages that trained under it; empty for one that is drawn for comparison.
        explanation: a sentence.
        rows: per token, "1" for each token it may see and "0" for the others.
        picture: the mask as SVG: a row per token that looks, a column per token looked at.
    """

    name: str
    stages: list
    explanation: str
    rows: list[str]
    picture: Markup


@dataclass
class MaskExample:
    """One example under all mask types, those that were used first; `left_out` image tokens are not drawn."""

    tokens: list[Token]
    views: list[MaskView]
    left_out: int
    shortened: bool


def mask_example(
    processor: AlignVLMProcessor, config: AlignVLMConfig, conversation: Conversation, stages: list[dict]
) -> MaskExample:
    """Encodes the conversation with its first response and draws the masks of all types.

    Args:
        stages: entries of the run record, for their mask types.
    """
    # Tiles, or all patches, would be too many tokens to draw.
    grid = NATIVE if takes_native_shapes(processor) else WHOLE
    whole = [grid] * conversation.image_count
    branch = Encoder(processor).encode(conversation, whole)[0]
    input_ids = torch.tensor([branch.input_ids])
    prompt_mask = torch.arange(len(branch))[None] < branch.prompt_length
    layout = TokenLayout.from_input_ids(
        input_ids,
        config.image_token_id,
        config.image_seq_length,
        prompt_mask=prompt_mask,
        image_ids=torch.tensor([branch.image_ids]),
    )
    kept = _drawn(layout.image_ids[0].tolist(), tokens_of(processor, grid))
    tokens = [_token(processor, branch, layout, config, position) for position in kept]
    used: dict[str, list] = {}
    for stage in stages:
        own = stage.get("attention_mask_type_shares") or [
            stage.get("attention_mask_type") or config.attention_mask_type
        ]
        for name in own:
            used.setdefault(name, []).append(stage.get("stage"))
    names = sorted(MASK_TYPES, key=lambda name: name not in used)
    views = []
    for name in names:
        mask = dense_mask(layout, name)[0, 0][kept][:, kept].tolist()
        rows = ["".join("1" if seen else "0" for seen in row) for row in mask]
        picture = _picture(rows, tokens)
        views.append(
            MaskView(name, used.get(name, []), EXPLANATIONS.get(name, MASK_TYPES[name].explanation), rows, picture)
        )
    images = sum(position >= 0 for position in layout.image_ids[0].tolist())
    drawn = sum(token.group == "image" for token in tokens)
    return MaskExample(tokens, views, images - drawn, len(branch) - (images - drawn) > len(kept))


def _drawn(image_ids: list[int], image_seq_length: int) -> list[int]:
    """Returns the positions that are drawn: of each image at most `MOST_IMAGE_TOKENS`, evenly; together at most `MOST_TOKENS`."""
    step = -(-image_seq_length // MOST_IMAGE_TOKENS)
    kept, within = [], 0
    for position, image in enumerate(image_ids):
        within = within + 1 if image >= 0 and position and image_ids[position - 1] == image else 0
        if image < 0 or within % step == 0:
            kept.append(position)
    return kept[:MOST_TOKENS]


def _token(processor, branch, layout: TokenLayout, config: AlignVLMConfig, position: int) -> Token:
    if layout.image_ids[0, position] >= 0:
        first = layout.image_ids[0].tolist().index(int(layout.image_ids[0, position]))
        if config.merge_image_tokens is not None:
            return Token(f"token {position - first + 1} of the image", "image")
        native = takes_native_shapes(processor)
        columns = NATIVE[1] if native else config.feature_grid[1] // config.pixel_shuffle_factor
        row, column = divmod(position - first, columns)
        return Token(f"row {row + 1}, column {column + 1}", "image")
    text = processor.tokenizer.decode([branch.input_ids[position]])
    return Token(text, "prompt" if position < branch.prompt_length else "response")


def _picture(rows: list[str], tokens: list[Token]) -> Markup:
    """Draws the mask: cells in the colour of the token that is seen, with a band of the tokens' own colours above and at the left."""
    size, band = len(tokens), 2
    parts = []
    for start, group, length in _runs([token.group for token in tokens]):
        parts.append(f'<rect class="{group}" x="{start + band}" y="0" width="{length}" height="{band - 0.5}"/>')
        parts.append(f'<rect class="{group}" x="0" y="{start + band}" width="{band - 0.5}" height="{length}"/>')
    for y, row in enumerate(rows):
        cells = [token.group if seen == "1" else "" for seen, token in zip(row, tokens)]
        for start, group, length in _runs(cells):
            if group:
                parts.append(
                    f'<rect class="{group}" x="{start + band}" y="{y + band}" width="{length - 0.08:.2f}" height="0.92"/>'
                )
    parts.append(
        f'<rect class="pick" x="{band - 0.2}" y="-9" width="{size + 0.2}" height="1" />'
    )  # report.js moves it
    whole = size + band
    return Markup(
        f'<svg viewBox="0 0 {whole} {whole}" aria-hidden="true">{"".join(parts)}</svg>'  # the words beside it say the same
    )


def _runs(values: list[str]) -> list[tuple[int, str, int]]:
    """Returns equal neighbours as `(start, value, length)`."""
    found, start = [], 0
    for value, run in groupby(values):
        length = len(list(run))
        found.append((start, value, length))
        start += length
    return found
