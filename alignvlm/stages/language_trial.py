"""Tries a language model inside AlignVLM: which mask types it keeps, and whether its rows can be packed.

A dozen tokens with two adjacent images in them go through the model a few times. Changing one token after the other shows who
sees whom; left-padded rows are generated from and computed again without cache and padding; a packed row is compared with
the rows it is made of. Nothing is read from names or flags of the language model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignvlm.evaluation.answer import stated_positions
from modeling_alignvlm import CACHE_NAME, AlignVLMForConditionalGeneration, TokenLayout
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, dense_mask


# In units of the logits' standard deviation. Float32 sums in another order differ by 1e-6 to 1e-5 (up to 1e-4 through dozens of
# layers); what a mask or a position changes is 1e-2 and more.
SAME = 2e-3
VISIBLE = 1e-6
KINDS = "tiijjtttrrr"  # text, image, next image, text, response
TRIAL_LENGTH = len(KINDS)
NEW_TOKENS = 3


# What messages call the attempts.
ATTEMPTS = {
    "_try_who_sees_whom": "a row with images",
    "_try_generation": "generation",
    "_try_packing": "a packed row",
}


class PromiseBroken(Exception):
    """What the language model does other than the mask type, the packing or the cache demands."""


@dataclass
class LanguageTrial:
    """What was seen to hold. `reasons` says why of each mask type and of `packing` that does not."""

    mask_types: list[str] = field(default_factory=list)
    packing: bool = True
    reasons: dict[str, str] = field(default_factory=dict)


def last_position(language_model: PreTrainedModel) -> int | None:
    """The number of positions of a language model that looks them up in a table; None if it computes them (RoPE, ALiBi).

    A table is an embedding of positions or a buffer with a row for each: read off the module, on any device, meta too.
    """
    positions = stated_positions(language_model.config)
    if positions is None:
        return None
    words = language_model.get_input_embeddings()
    tables = [
        module.num_embeddings
        for module in language_model.modules()
        if isinstance(module, nn.Embedding) and module is not words
    ]
    tables += [buffer.shape[-2] for buffer in language_model.buffers() if buffer.ndim > 1]
    # OPT and its kin count from 2.
    return positions if any(positions <= size <= positions + 2 for size in tables) else None


@torch.no_grad()
def try_language_model(model: AlignVLMForConditionalGeneration) -> LanguageTrial:
    """Tries every mask type, and packing under those that hold; the model is left as it was."""
    config, training = model.config, model.training
    before = config.attention_mask_type, config.packing, config.supported_mask_types
    trial = LanguageTrial()
    model.eval()
    config.supported_mask_types = None
    try:
        for mask_type in MASK_TYPES:
            config.attention_mask_type = mask_type
            for what, attempts in (
                (mask_type, (_try_who_sees_whom, _try_generation)),
                ("packing", (_try_packing,)),
            ):
                if what in trial.reasons or (what == "packing" and mask_type in trial.reasons):
                    continue
                config.packing = what == "packing"
                if reason := _first_failure(model, attempts):
                    trial.reasons[what] = reason
    finally:
        config.attention_mask_type, config.packing, config.supported_mask_types = before
        model.train(training)
    trial.mask_types = [mask_type for mask_type in MASK_TYPES if mask_type not in trial.reasons]
    trial.packing = bool(trial.mask_types) and "packing" not in trial.reasons
    return trial


def _first_failure(model: AlignVLMForConditionalGeneration, attempts: tuple) -> str | None:
    for attempt in attempts:
        try:
            attempt(model)
        except PromiseBroken as broken:
            return str(broken)
        except Exception as error:  # whatever a language model of others raises
            first_line = (str(error).strip() or "without a message").splitlines()[0]
            return f"{ATTEMPTS[attempt.__name__]} raises {type(error).__name__}: {first_line[:200]}"
    return None


def _layout(device, kinds: str = KINDS) -> TokenLayout:
    """The layout of one row, `(1, length)`; the letters are those of `KINDS`."""
    images = {"i": 0, "j": 1}
    return TokenLayout(
        image_ids=torch.tensor([[images.get(kind, -1) for kind in kinds]], device=device),
        record_ids=torch.zeros(1, len(kinds), dtype=torch.long, device=device),
        branch_ids=torch.zeros(1, len(kinds), dtype=torch.long, device=device),
        prompt_mask=torch.tensor([[kind != "r" for kind in kinds]], device=device),
    )


def _embeddings(model: AlignVLMForConditionalGeneration, seed: int, count: int = 1) -> Tensor:
    """Embeddings of random words, `(count, TRIAL_LENGTH, hidden)`, and at image positions means of two: what the language model knows
    to read, but no words."""
    generator = torch.Generator().manual_seed(seed)
    image_token = model.config.image_token_id
    words_but_image = min(model.config.text_config.vocab_size - 1, 1000)
    input_ids = torch.randint(words_but_image, (2, count, TRIAL_LENGTH), generator=generator)
    input_ids += input_ids >= image_token  # wherever among the words its placeholder stands
    words, others = model.get_input_embeddings()(input_ids.to(model.device))
    is_image = torch.tensor([kind in "ij" for kind in KINDS], device=model.device)[:, None]
    return torch.where(is_image, (words + others) / 2, words)


def _logits(model: AlignVLMForConditionalGeneration, embeddings: Tensor, layout: TokenLayout, **inputs) -> Tensor:
    """Logits of rows of one layout."""
    rows = embeddings.shape[0]
    for name in ("image_ids", "prompt_mask"):
        inputs[name] = getattr(layout, name).expand(rows, -1)
    inputs["mm_token_type_ids"] = (inputs["image_ids"] >= 0).long()
    inputs.setdefault("attention_mask", torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device))
    logits = model(inputs_embeds=embeddings, use_cache=False, **inputs).logits
    if not logits.isfinite().all():
        raise PromiseBroken("its logits are not finite")
    return logits


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of logits, in units of their standard deviation."""
    return ((one - other).abs().max() / other.std()).item()


def _try_who_sees_whom(model: AlignVLMForConditionalGeneration) -> None:
    """Each token in turn is replaced: the logits of those that may see it change, those of the others do not."""
    mask_type = model.config.attention_mask_type
    row, other = _embeddings(model, seed=0, count=2)
    rows = row.repeat(TRIAL_LENGTH + 1, 1, 1)  # the last one stays as it is
    for place in range(TRIAL_LENGTH):
        rows[place, place] = other[place]
    layout = _layout(row.device)
    logits = _logits(model, rows, layout)
    change = (logits[:-1] - logits[-1]).abs().amax(-1).T / logits.std()  # (query, key)
    sees = dense_mask(layout, mask_type)[0, 0]
    reaches = sees.float()
    for _ in range(4):  # over several layers a token is also seen through others; 16 steps reach every end
        reaches = ((reaches @ reaches) > 0).float()
    leaks = (change > SAME) & (reaches == 0)
    if leaks.any():
        query, key = leaks.nonzero()[0].tolist()
        raise PromiseBroken(f"token {query} sees token {key}, which {mask_type!r} hides from it")
    later = sees & ~sees.tril()
    for name, edges in (("earlier", sees & sees.tril()), ("later", later)):
        if edges.any() and (change[edges] > VISIBLE).float().mean() < 0.9:
            raise PromiseBroken(f"it does not let tokens see the {name} ones that {mask_type!r} shows them")
    if later.any():  # and not by a trifle
        model.config.attention_mask_type = "causal"
        try:
            causal = _logits(model, rows[-1:], layout)
        finally:
            model.config.attention_mask_type = mask_type
        if _difference(logits[-1:], causal) < SAME:
            raise PromiseBroken(f"under {mask_type!r} it gives the logits of 'causal'")


def _try_generation(model: AlignVLMForConditionalGeneration) -> None:
    """Words generated from left-padded rows with a cache have the logits of each row alone, without cache and padding."""
    rows = _embeddings(model, seed=1, count=2)
    layout = _layout(rows.device)
    prompt = KINDS.index("r")
    padding = 2
    lengths = [prompt - padding, prompt]  # the first row lacks the end of its text
    padded = torch.zeros(2, prompt, dtype=torch.long, device=rows.device)
    embeddings = model.get_input_embeddings()(padded)
    attention_mask = torch.zeros(2, prompt, dtype=torch.long, device=rows.device)
    image_ids = torch.full((2, prompt), -1, device=rows.device)
    for index, length in enumerate(lengths):
        embeddings[index, -length:] = rows[index, :length]
        attention_mask[index, -length:] = 1
        image_ids[index, -length:] = layout.image_ids[0, :length]
    output = model.generate(
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        image_ids=image_ids,
        mm_token_type_ids=(image_ids >= 0).long(),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    words = model.get_input_embeddings()(output.sequences[:, -NEW_TOKENS:])
    generated = torch.stack(output.logits, dim=1)  # (rows, new tokens, vocabulary)
    for index, length in enumerate(lengths):
        alone = torch.cat([rows[index, :length], words[index, :-1]])[None]
        kinds = KINDS[:length] + "r" * (NEW_TOKENS - 1)
        expected = _logits(model, alone, _layout(rows.device, kinds))[0, -NEW_TOKENS:]
        if (found := _difference(generated[index], expected)) > SAME:
            how = "behind padding" if length < prompt else "without padding"
            raise PromiseBroken(
                f"with a cache, {how}, it gives other logits than without (by {found:.1g} standard deviations)"
            )


def _try_packing(model: AlignVLMForConditionalGeneration) -> None:
    """Two annotations behind one trunk and two records in one row give the logits of separate rows."""
    device = model.device
    rows = _embeddings(model, seed=2, count=2)
    trunk = KINDS.rindex("j") + 1
    rows[1, :trunk] = rows[0, :trunk]
    layout = _layout(device)
    positions = torch.arange(TRIAL_LENGTH, device=device)
    separate = _logits(model, rows, layout, position_ids=positions.expand(2, -1))

    shared = MASK_TYPES[model.config.attention_mask_type].shares_trunk
    start = trunk if shared else 0
    places = [(0, place) for place in range(TRIAL_LENGTH)] + [(1, place) for place in range(start, TRIAL_LENGTH)]
    row_of, place_of = (torch.tensor(values, device=device) for values in zip(*places))
    branch_ids = torch.where(place_of >= trunk, row_of + 1, 0) if shared else torch.zeros_like(place_of)
    record_ids = torch.zeros_like(row_of) if shared else row_of
    image_ids = layout.image_ids[0, place_of]
    image_ids = torch.where(image_ids >= 0, image_ids + (0 if shared else 2) * row_of, -1)
    packed_layout = TokenLayout(
        image_ids[None], record_ids[None], branch_ids[None], layout.prompt_mask[0, place_of][None]
    )
    packed = _logits(
        model,
        rows[row_of, place_of][None],
        packed_layout,
        position_ids=place_of[None],
        record_ids=record_ids[None],
        branch_ids=branch_ids[None],
    )[0]
    if (found := _difference(packed, separate[row_of, place_of])) > SAME:
        raise PromiseBroken(f"packed rows give other logits than separate ones (by {found:.1g} standard deviations)")
    if shared:
        _try_shared_cache(model, rows, separate, layout, trunk)


def _try_shared_cache(model, rows: Tensor, separate: Tensor, layout: TokenLayout, trunk: int) -> None:
    """Questions of different lengths, left-padded behind one prefilled trunk, have the logits of complete rows."""
    inputs = {"image_ids": layout.image_ids[:, :trunk], "mm_token_type_ids": (layout.image_ids[:, :trunk] >= 0).long()}
    cache = getattr(model.model(inputs_embeds=rows[:1, :trunk], use_cache=True, **inputs), CACHE_NAME)
    cache.batch_repeat_interleave(2)
    padding = 2
    questions = rows[:, trunk:].clone()
    questions[0] = questions[0].roll(padding, dims=0)
    attention_mask = torch.ones(2, TRIAL_LENGTH, dtype=torch.long, device=rows.device)
    attention_mask[0, trunk : trunk + padding] = 0
    positions = attention_mask.cumsum(-1)[:, trunk:] - 1
    output = model.model(
        inputs_embeds=questions,
        attention_mask=attention_mask,
        position_ids=positions,
        **{CACHE_NAME: cache},
        mm_token_type_ids=torch.zeros_like(positions),
        prompt_mask=torch.zeros_like(positions, dtype=torch.bool),
    )
    logits = model.lm_head(output.last_hidden_state)
    softcap = getattr(model.config.text_config, "final_logit_softcapping", None)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    for index, shift in ((0, padding), (1, 0)):
        if (found := _difference(logits[index, shift:], separate[index, trunk : TRIAL_LENGTH - shift])) > SAME:
            raise PromiseBroken(
                "answers from a prefilled image differ from answers to complete prompts "
                f"(by {found:.1g} standard deviations)"
            )
