"""Who may attend to whom: the one definition behind training, prefill, decoding, the processor's dense mask and every kernel.

`MASK_TYPES` is the table of mask types: a new one is a row of it. `attention_rule` turns a `TokenLayout` and a mask type into
an index-based boolean function `rule(batch, head, query, key)`. Evaluated by broadcasting it is a dense mask (`dense_mask`),
converted once it is an additive mask for eager attention, and traced it is a block mask for flex attention
(`attention_mask_for`). The same function proves that no answer can leak into its own prediction (`leaking_edges`).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Of an image that is cut into tiles, what the mask types take for an image: each tile, or all tiles with the marks between them.
IMAGE_BLOCKS = ("tile", "image")


@dataclass
class TokenLayout:
    """Describes each token of a batch of rows; every field has shape `(batch, length)`.

    Args:
        image_ids (`torch.LongTensor`): -1, or the index of the token's image (of its tile, if tiles are blocks) within its row.
        record_ids (`torch.LongTensor`): -1 for padding, else the index of the token's record within its row.
        branch_ids (`torch.LongTensor`): 0 for the trunk of a record, `k > 0` for the tokens of its k-th annotation.
        prompt_mask (`torch.BoolTensor`): True for the tokens before the first response of their branch.

    Raises:
        ValueError: if a field is not of shape `(batch, length)`, the same for all four, or the batch is empty.
    """

    image_ids: Tensor
    record_ids: Tensor
    branch_ids: Tensor
    prompt_mask: Tensor

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value.ndim != 2 or value.shape != self.image_ids.shape or value.shape[0] == 0:
                raise ValueError(
                    f"`{field.name}` has shape {tuple(value.shape)}; a layout needs four fields of one shape (batch, length) "
                    f"with at least one row, and `image_ids` has {tuple(self.image_ids.shape)}."
                )

    @classmethod
    def from_image_mask(
        cls,
        is_image: Tensor,
        image_seq_length: int,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        record_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        image_block: str | None = None,
    ) -> "TokenLayout":
        """Builds the layout of rows whose image tokens are known, with defaults for the rest.

        Args:
            is_image (`torch.BoolTensor` of shape `(batch, length)`): True at image tokens, for instance
                `input_ids == config.image_token_id`.
            image_seq_length (`int`): tokens per image or tile. Counting them tells two adjacent ones apart.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 or False at padding.
            image_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                instead of counting, the image of each token, with the marks between its tiles; -1 at text.
            image_block (`str`, *optional*): `"tile"` counts tiles, whatever `image_ids` says: see `IMAGE_BLOCKS`.

        Without `record_ids` a row is one record, without `branch_ids` one trunk, without `prompt_mask` all response.
        """
        if image_ids is None or image_block == "tile":
            image_ids = torch.where(is_image, (is_image.long().cumsum(-1) - 1) // image_seq_length, -1)
        if record_ids is None:
            record_ids = torch.zeros_like(image_ids)
        if attention_mask is not None:
            record_ids = torch.where(attention_mask.bool(), record_ids, -1)
        branch_ids = torch.zeros_like(image_ids) if branch_ids is None else branch_ids
        prompt_mask = torch.zeros_like(is_image) if prompt_mask is None else prompt_mask.bool()
        return cls(image_ids, record_ids, branch_ids, prompt_mask)

    @classmethod
    def from_input_ids(cls, input_ids: Tensor, image_token_id: int, image_seq_length: int, **known) -> "TokenLayout":
        """Reads the layout off `input_ids` of shape `(batch, length)`; `known` as in `from_image_mask`."""
        return cls.from_image_mask(input_ids == image_token_id, image_seq_length, **known)

    def placed_in_cache(
        self, past_length: int | Tensor, total_length: int, attention_mask: Tensor | None
    ) -> "TokenLayout":
        """Places this layout behind `past_length` cached tokens, in a cache of `total_length` positions.

        Cached tokens count as text of record 0's trunk (the queries come after them, so no forward edge needs more), unless
        `attention_mask` of shape `(batch, <= total_length)` marks them as padding; unused positions are padding.
        """
        batch, length = self.image_ids.shape
        device = self.image_ids.device
        positions = torch.arange(total_length, device=device).expand(batch, -1)
        real = positions < past_length
        if attention_mask is not None:
            padding_mask = torch.nn.functional.pad(attention_mask.bool(), (0, total_length - attention_mask.shape[-1]))
            real = real & padding_mask.to(device)
        own = past_length + torch.arange(length, device=device)

        def place(values: Tensor, background: Tensor) -> Tensor:
            return background.clone().index_copy(1, own, values)

        return TokenLayout(
            image_ids=place(self.image_ids, torch.full_like(positions, -1)),
            record_ids=place(self.record_ids, torch.where(real, 0, -1)),
            branch_ids=place(self.branch_ids, torch.zeros_like(positions)),
            prompt_mask=place(self.prompt_mask, torch.zeros_like(real)),
        )


def same_image(layout: TokenLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """True where tokens q and k of row b are tokens of the same image."""
    return (layout.image_ids[b, q] == layout.image_ids[b, k]) & (layout.image_ids[b, q] >= 0)


def both_before_response(layout: TokenLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """True where tokens q and k of row b both come before the first response of their branch."""
    return layout.prompt_mask[b, q] & layout.prompt_mask[b, k]


def same_image_or_image_to_prompt(layout: TokenLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """As `same_image`, and True where q is an image token and k comes before the first response."""
    return same_image(layout, b, q, k) | ((layout.image_ids[b, q] >= 0) & layout.prompt_mask[b, k])


@dataclass(frozen=True)
class MaskType:
    """A row of the table: which later tokens a token may see too.

    Args:
        explanation (`str`): the later tokens that a token sees, in a few words, for help texts.
        looks_ahead (`Callable`):
            `looks_ahead(layout, b, q, k)` on index tensors that broadcast: True where token q of row b sees a later token k of
            its record and branch. None for never.
        needs_prompt (`bool`): whether `looks_ahead` reads `prompt_mask`.
        text_looks_ahead (`bool`): whether tokens look ahead in rows without images, too.
        shares_trunk (`bool`):
            whether no token of a trunk sees into a branch, so that branches with different prompts can share it. Where False, the
            collator makes one row per branch, and every question is answered from a complete prompt.
    """

    explanation: str
    looks_ahead: Callable[[TokenLayout, Tensor, Tensor, Tensor], Tensor] | None
    needs_prompt: bool
    text_looks_ahead: bool
    shares_trunk: bool


MASK_TYPES = {
    "causal": MaskType(
        "none",
        looks_ahead=None,
        needs_prompt=False,
        text_looks_ahead=False,
        shares_trunk=True,
    ),
    "image": MaskType(
        "those of the same image",
        looks_ahead=same_image,
        needs_prompt=False,
        text_looks_ahead=False,
        shares_trunk=True,
    ),
    "prefix": MaskType(
        "all before the first response",
        looks_ahead=both_before_response,
        needs_prompt=True,
        text_looks_ahead=True,
        shares_trunk=False,
    ),
    "mutual": MaskType(
        "as `image`, and image tokens see the prompt",
        looks_ahead=same_image_or_image_to_prompt,
        needs_prompt=True,
        text_looks_ahead=False,
        shares_trunk=False,
    ),
}


def get_mask_type(name: str) -> MaskType:
    """Looks up a row of the table; raises a `ValueError` that lists the valid names for an unknown one."""
    if name not in MASK_TYPES:
        raise ValueError(f"Unknown mask type {name!r}. Valid values: {', '.join(MASK_TYPES)}.")
    return MASK_TYPES[name]


def describe_mask_types() -> str:
    """Lists each name with its explanation in one line, for help texts."""
    return "; ".join(f"`{name}`: {mask_type.explanation}" for name, mask_type in MASK_TYPES.items())


def attention_rule(layout: TokenLayout, mask_type: str) -> Rule:
    """Returns `rule(batch, head, query, key)` on index tensors: True where the query token may attend to the key token.

    Query q may see key k iff k is real and in the same record, and k is in the trunk or in q's own branch, and `k <= q` or the
    mask type lets q look ahead to k. Every token sees itself, so no row of a mask is empty.
    """
    looks_ahead = get_mask_type(mask_type).looks_ahead
    record, branch = layout.record_ids, layout.branch_ids

    def rule(b, h, q, k):
        in_order = k <= q if looks_ahead is None else (k <= q) | looks_ahead(layout, b, q, k)
        same_record = (record[b, q] == record[b, k]) & (record[b, k] >= 0)
        in_reach = (branch[b, k] == 0) | (branch[b, k] == branch[b, q])
        return (same_record & in_reach & in_order) | (q == k)

    return rule


def dense_mask(layout: TokenLayout, mask_type: str) -> Tensor:
    """Evaluates the rule as a bool tensor of shape `(batch, 1, length, length)`, True where attention is allowed."""
    batch, length = layout.image_ids.shape
    index = torch.arange(length, device=layout.image_ids.device)
    rows = torch.arange(batch, device=layout.image_ids.device)[:, None, None, None]
    mask = attention_rule(layout, mask_type)(rows, 0, index[None, None, :, None], index[None, None, None, :])
    return mask.expand(batch, 1, length, length)


def attention_mask_for(
    rule: Rule, config, inputs_embeds: Tensor, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0
):
    """Converts the rule to the form that the attention kernel of `config` reads.

    Args:
        rule: indices are absolute: query i of `inputs_embeds` is token `q_offset + i`, key j is token `kv_offset + j`.
        config (`PreTrainedConfig`): the language model's; its `_attn_implementation` chooses the form.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`): for shape, dtype and device.

    Returns:
        `(batch, 1, length, kv_length)`: bool for `sdpa`, additive float for `eager`, a `BlockMask` for `flex_attention`.
    """
    # Imported here, because it takes 1.5 s and the configuration, which needs no kernel, imports this file.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=inputs_embeds.shape[0],
        q_length=inputs_embeds.shape[1],
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=rule,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=inputs_embeds.dtype,
        device=inputs_embeds.device,
        config=config,
    )


def leaking_edges(layout: TokenLayout, mask_type: str, response_mask: Tensor) -> Tensor:
    """Finds the edges through which a response could reach its own prediction or an earlier one.

    An edge q -> k with k > q is safe iff no response token lies in (q, k]: then k carries nothing that was not known
    when the first of them was predicted.

    Args:
        response_mask (`torch.BoolTensor` of shape `(batch, length)`): True at tokens with a label.

    Returns:
        `torch.BoolTensor` of shape `(batch, length, length)`, True at the unsafe edges of the mask.
    """
    if response_mask.shape != layout.image_ids.shape:
        raise ValueError(
            f"`response_mask` has shape {tuple(response_mask.shape)}, the layout {tuple(layout.image_ids.shape)}."
        )
    seen = response_mask.long().cumsum(-1)
    return dense_mask(layout, mask_type)[:, 0] & (seen[:, None, :] > seen[:, :, None])


def check_no_leak(layout: TokenLayout, mask_type: str, response_mask: Tensor) -> None:
    """Raises a `ValueError` that names row, query and key if `leaking_edges` finds any edge."""
    edges = leaking_edges(layout, mask_type, response_mask)
    if edges.any():
        row, query, key = edges.nonzero()[0].tolist()
        raise ValueError(
            f"Under the mask type {mask_type!r} token {query} of row {row} sees token {key}, at or behind a response token: "
            "the model could read the answer it is to predict. Check `prompt_mask` and where the images stand."
        )


__all__ = [
    "IMAGE_BLOCKS",
    "MASK_TYPES",
    "MaskType",
    "TokenLayout",
    "attention_mask_for",
    "attention_rule",
    "check_no_leak",
    "dense_mask",
    "describe_mask_types",
    "get_mask_type",
    "leaking_edges",
    "same_image",
]
