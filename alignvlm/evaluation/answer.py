"""Answers prompts about images in batches, for evaluation, the quickstart and the demo.

Each image is encoded once. Prompts about one image share a trunk: the tokens that all of them begin with. The trunks of several entries
are prefilled together, and one batch answers all their prompts from that cache. Under masks that let images see the prompt (`prefix`,
`mutual`) prompts share only the image features.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from alignvlm.rows.encode import Branch, Encoder, check_prompt
from alignvlm.rows.packing import trunk_length
from alignvlm.rows.tiles import grids_of, has_grids, image_inputs_of
from modeling_alignvlm import CACHE_NAME, MASK_TYPES, to_rgb


Messages = list[dict[str, Any]]


class PromptTooLong(ValueError):
    """A prompt after which the language model has no room for an answer; `problem` is the sentence behind the prompt's name."""

    def __init__(self, name: str, tokens: int, context: int):
        self.problem = (
            f"has {tokens} tokens with its images; the language model takes {context}, the answer among them. Shorten it, or show "
            "fewer or smaller images."
        )
        super().__init__(f"{name} {self.problem}")


def stated_positions(text_config: PreTrainedConfig) -> int | None:
    """The positions that a language model's config tells of; None if it tells of none."""
    names = ("max_position_embeddings", "max_seq_len")
    return next((value for name in names if isinstance(value := getattr(text_config, name, None), int)), None)


def context_of(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a prompt and its answer may have together, as the language model's config says; None if it does not."""
    return stated_positions(model.config.text_config)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    prompts: Sequence[Sequence[str | Messages]],
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    progress: str | None = None,
    refuse_long_prompts: bool = True,
    **generation_options,
) -> list[list[str]]:
    """Answers every prompt about every image.

        answer(model, processor, [photo, chart], [["What is it?", "How many dogs are there?"], ["Describe the chart."]])

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        images: per entry one image (PIL or an array, see `to_rgb`), or a list of none or several.
        prompts: for each entry of `images`, its prompts. A text stands after all images of its entry. A conversation is a list of
            messages in transformers' form, the last the user's. Its k-th image part shows the k-th image of its entry; what the part
            itself carries is not read, and images beyond its parts are not shown.
        batch_size: prompts answered at once.
        max_new_tokens: the most tokens of an answer; None: as many as a given `generation_config` says, else 32.
        progress: the title of a progress bar; None: no bar.
        refuse_long_prompts: whether a prompt that leaves no room for an answer is an error. If not, its answer is an empty text, and a warning
            tells of it: for a benchmark that a single long question must not end.
        **generation_options: for `model.generate`, such as `num_beams` or `generation_config`. Those named go before what a given
            `generation_config` sets, and that before greedy decoding. The model's own gives all others, except that there is one
            answer per prompt.

    Returns:
        The answers, nested as `prompts`, stripped of surrounding white space; the same as for one prompt at a time. Where a prompt leaves the
        language model less room than `max_new_tokens`, its answer ends there.

    Raises:
        PromptTooLong: a `ValueError`, before anything is answered, for a prompt that leaves no room for an answer, unless
            `refuse_long_prompts` is False.
        ValueError: if the numbers of images and of lists of prompts differ, if a prompt holds the image placeholder, if a conversation
            has more image parts than its entry has images or does not end with the user's message, for options that ask for
            several answers per prompt, and for a model in training mode with activation checkpointing.
    """
    if len(images) != len(prompts):
        raise ValueError(f"Got {len(images)} images and {len(prompts)} lists of prompts; each image needs one list.")
    if model.training and model.is_activation_checkpointing:
        raise ValueError(
            "The model is in training mode with activation checkpointing, which fills no cache. Call model.eval() first."
        )
    given_config = generation_options.get("generation_config")
    for name, only in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        asked = generation_options.get(name, getattr(given_config, name, None))
        if asked not in (None, only):
            raise ValueError(
                f"`answer` gives one text per prompt, which {name}={asked!r} does not. Call `model.generate` itself, or ask each "
                "prompt several times with do_sample=True."
            )
    shown = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    if any(isinstance(group, str) for group in prompts):
        raise ValueError("`prompts` holds a text in place of a list of prompts. Give one list per entry of `images`.")
    conversations = [
        [_conversation(prompt, len(entry), f"prompts[{row}][{column}]") for column, prompt in enumerate(group)]
        for row, (entry, group) in enumerate(zip(shown, prompts))
    ]
    options = {
        **_defaults(model, given_config),
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        **generation_options,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }
    encoder = Encoder(processor)
    long = _without_room(model, processor, encoder, shown, conversations)
    if long and refuse_long_prompts:
        raise next(iter(long.values()))
    if long:
        warnings.warn(f"{len(long)} prompts are not answered. The first: {next(iter(long.values()))}", stacklevel=2)
        conversations = [
            [messages for column, messages in enumerate(group) if (row, column) not in long]
            for row, group in enumerate(conversations)
        ]
    answers: list[list[str]] = [[] for _ in prompts]
    total = sum(map(len, conversations))
    with tqdm(total=total, desc=progress, disable=progress is None) as bar:
        for entries in _batches([len(group) for group in conversations], batch_size):
            counts = [max(map(check_prompt, conversations[entry])) for entry in entries]
            upright = [list(map(to_rgb, shown[entry][:count])) for entry, count in zip(entries, counts)]
            groups = [
                [encoder.prompt(messages, grids) for messages in conversations[entry]]
                for entry, grids in zip(entries, (grids_of(processor, entry_images) for entry_images in upright))
            ]
            generated = iter(_generated(model, processor, groups, upright, batch_size, options))
            for entry, group in zip(entries, groups):
                tokens = [next(generated) for _ in group]
                answers[entry] = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
                bar.update(len(group))
    for row, column in sorted(long):
        answers[row].insert(column, "")
    return answers


def _defaults(model: PreTrainedModel, given: GenerationConfig | None) -> dict[str, Any]:
    """Returns options of `generate` for where the caller names none: as the given config sets them, else `answer`'s or the model's own."""
    own = model.generation_config
    defaults = {
        "do_sample": False,
        "max_new_tokens": 32,
        "num_beams": own.num_beams or 1,
        "use_cache": own.use_cache is not False,
        "cache_implementation": own.cache_implementation,
    }
    return defaults | {name: value for name in defaults if (value := getattr(given, name, None)) is not None}


def _conversation(prompt: str | Messages, image_count: int, name: str) -> Messages:
    """Returns the messages of a prompt. Refuses, by its `name`, a conversation that does not fit that number of images."""
    if isinstance(prompt, dict):
        raise ValueError(
            f"{name} is a single message; expected a text or a list of messages. Put the conversation into a list."
        )
    if isinstance(prompt, str):
        return [{"role": "user", "content": [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]}]
    try:
        parts = check_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if parts > image_count:
        raise ValueError(
            f"{name} has {parts} image part(s), and its entry of `images` holds {image_count} image(s). Give one image per part."
        )
    return prompt


def _without_room(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    encoder: Encoder,
    shown: list[list],
    conversations: list[list[Messages]],
) -> dict[tuple[int, int], PromptTooLong]:
    """Returns by row and column the prompts after which there is no room for an answer."""
    context, found = context_of(model), {}
    if context is None:
        return found
    for row, (images, group) in enumerate(zip(shown, conversations)):
        grids = grids_of(processor, list(map(to_rgb, images))) if has_grids(processor) else None
        for column, messages in enumerate(group):
            length = len(encoder.prompt(messages, grids))
            if length >= context:
                found[row, column] = PromptTooLong(f"prompts[{row}][{column}]", length, context)
    return found


def _batches(prompt_counts: list[int], batch_size: int) -> Iterator[list[int]]:
    """Yields consecutive entries with together at most `batch_size` prompts, or a single entry with more."""
    batch: list[int] = []
    for entry, count in enumerate(prompt_counts):
        if count == 0:
            continue
        if batch and sum(prompt_counts[other] for other in batch) + count > batch_size:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _image_features(
    model: PreTrainedModel, processor: ProcessorMixin, images: list[list], groups: list[list[Branch]]
) -> list[Tensor | None]:
    """Returns per entry the tokens `(tokens, hidden)` of the images that its prompts show, each encoded once; None without any."""
    counts = [max(_image_tokens(model, prompt.input_ids) for prompt in group) for group in groups]
    flat = [image for entry in images for image in entry]
    if not flat:
        return [None] * len(groups)
    inputs = _image_inputs(model, processor, flat)
    return list(model.get_image_features(**inputs).pooler_output.flatten(0, 1).split(counts))


def _image_inputs(model: PreTrainedModel, processor: ProcessorMixin, images: list) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in image_inputs_of(processor, images).items()}


def _image_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> int:
    return tokens.count(model.config.image_token_id)


def _generated(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    groups: list[list[Branch]],
    images: list[list],
    batch_size: int,
    options: dict,
) -> list[Tensor]:
    """Generates the new tokens of each prompt, `batch_size` prompts at a time, after copies of their prefilled trunks if there are any.

    Without a cache every step encodes the images again, as `generate` gives embeddings to the first step only. Prompts that leave less room
    than the others are apart from them, so that no position is beyond the language model's last.
    """
    features = _image_features(model, processor, images, groups) if options["use_cache"] else None
    trunks = _trunks(model, groups, options)
    past, cache = None, None
    if any(trunks):
        past = _left_padded([(group[0], 0, trunk) for group, trunk in zip(groups, trunks)], processor, model.device)
        cache = _prefilled(model, *past, features)
    rows = [(entry, prompt) for entry, group in enumerate(groups) for prompt in group]
    generated = []
    for new_tokens, chunk in _chunks(rows, batch_size, options["max_new_tokens"], context_of(model)):
        entry_of = [entry for entry, _ in chunk]
        rests = _left_padded(
            [(prompt, trunks[entry], len(prompt)) for entry, prompt in chunk], processor, model.device
        )
        inputs = {}
        if past is not None:
            chosen = torch.tensor(entry_of, device=model.device)
            rests = tuple(torch.cat([before[chosen], new], dim=1) for before, new in zip(past, rests))
            inputs[CACHE_NAME] = copy.deepcopy(cache)  # generating writes into it
            inputs[CACHE_NAME].batch_select_indices(chosen.repeat_interleave(options["num_beams"]))
        input_ids, attention_mask, image_ids = rests
        if features is None:
            shown = [image for entry, prompt in chunk for image in images[entry][: prompt.image_count()]]
            inputs = {**_image_inputs(model, processor, shown), "image_ids": image_ids} if shown else {}
        elif any(_image_tokens(model, prompt.input_ids[trunks[entry] :]) for entry, prompt in chunk):
            counts = [_image_tokens(model, prompt.input_ids) for _, prompt in chunk]
            shown = [features[entry][:count] for entry, count in zip(entry_of, counts) if count]
            inputs |= _embedded(model, input_ids, image_ids, shown)
        own = {**options, "max_new_tokens": new_tokens}
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **inputs, **own)
        generated += list(output[:, input_ids.shape[1] :])
    return generated


def _chunks(
    rows: list[tuple[int, Branch]], batch_size: int, most: int, context: int | None
) -> Iterator[tuple[int, list[tuple[int, Branch]]]]:
    """Yields consecutive rows with the same room for new tokens, at most `batch_size`, and that room."""

    def room(row: tuple[int, Branch]) -> int:
        return most if context is None else min(most, context - len(row[1]))

    for new_tokens, run in groupby(rows, room):
        alike = list(run)
        for start in range(0, len(alike), batch_size):
            yield new_tokens, alike[start : start + batch_size]


def _trunks(model: PreTrainedModel, groups: list[list[Branch]], options: dict) -> list[int]:
    """Returns per entry how many tokens its prompts share.

    No entry has a trunk if that saves nothing, if later tokens change what a trunk means, if the language model cannot continue after a
    padded cache, or if the options ask for none or for one that `generate` makes itself.
    """
    config, nothing = model.config, [0] * len(groups)
    if not options["use_cache"] or options["cache_implementation"] is not None:
        return nothing
    # Without `packing`, positions count the padding after a trunk. Code of format 1 has no such field.
    mask_type = MASK_TYPES.get(config.attention_mask_type)  # None: only the checkpoint's own code has it
    if mask_type is None or not mask_type.shares_trunk or not getattr(config, "packing", True):
        return nothing
    lengths = list(map(trunk_length, groups))
    if not any(length and len(group) > 1 for length, group in zip(lengths, groups)):
        return nothing
    rest = max(len(prompt) - length for length, group in zip(lengths, groups) for prompt in group)
    window = getattr(config.text_config, "sliding_window", None)
    if window is not None and max(lengths) + rest + options["max_new_tokens"] > window:
        return nothing  # the window would count the padding too
    return lengths


def _left_padded(
    pieces: list[tuple[Branch, int, int]], processor: ProcessorMixin, device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `input_ids`, `attention_mask` and `image_ids` of pieces of prompts (from a token to another), padded on the left, each
    `(pieces, longest)`."""
    rows = [list(prompt.input_ids[start:end]) for prompt, start, end in pieces]
    padded = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(device)
    image_ids = torch.full_like(padded["input_ids"], -1, dtype=torch.long)
    for row, (prompt, start, end) in zip(image_ids, pieces):
        if end > start:
            row[start - end :] = torch.tensor(prompt.image_ids[start:end])
    return padded["input_ids"].long(), padded["attention_mask"].long(), image_ids


def _embedded(
    model: PreTrainedModel, input_ids: Tensor, image_ids: Tensor, features: list[Tensor]
) -> dict[str, Tensor]:
    """Returns `inputs_embeds` `(rows, length, hidden)` with the images' tokens in place, and what says which tokens those are."""
    embeddings = model.get_input_embeddings()(input_ids)
    is_image = input_ids == model.config.image_token_id
    embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), torch.cat(features).to(embeddings.dtype))
    return {"inputs_embeds": embeddings, "image_ids": image_ids, "mm_token_type_ids": is_image.long()}


def _prefilled(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor, features: list[Tensor | None]
):
    """Returns the cache of left-padded trunks `(entries, length)`."""
    counts = (input_ids == model.config.image_token_id).sum(-1).tolist()
    shown = [images[:count] for images, count in zip(features, counts) if count]
    inputs = _embedded(model, input_ids, image_ids, shown) if shown else {"input_ids": input_ids}
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model.model(attention_mask=attention_mask, position_ids=position_ids, use_cache=True, **inputs)
    return getattr(outputs, CACHE_NAME)
