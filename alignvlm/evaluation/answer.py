"""Batched answers of a model about images: what evaluation, the quickstart and the demo call.

Many questions about one image share the trunk, all up to its last token. It is encoded and prefilled once, for several images at a
time; then all their questions are asked in one batch from that cache. Under masks that let images see the prompt (`prefix`,
`mutual`) no two questions share a trunk: there the image is encoded once and the rest is done per question.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_alignvlm import CACHE_NAME, MASK_TYPES, TokenLayout, to_rgb


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    prompts: Sequence[Sequence[str]],
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: str | None = None,
    **generation_options,
) -> list[list[str]]:
    """Answers every prompt about every image.

        answer(model, processor, [photo, chart], [["What is it?", "How many dogs are there?"], ["Describe the chart."]])

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        images: per entry one image (PIL or an array, see `to_rgb`), or a list of none or several, which stand before the prompt.
        prompts: for each entry of `images`, its prompts.
        batch_size: prompts answered at once.
        progress: the title of a progress bar; none without it.
        **generation_options: for `model.generate`, such as `num_beams`; greedy decoding by default. Whatever is not given is as the
            model's `generation_config` says, except that there is one answer per prompt.

    Returns:
        The answers, nested as `prompts`, stripped of surrounding white space; the same as of one prompt at a time.

    Raises:
        ValueError: if there are not as many lists of prompts as images, a prompt holds the image placeholder, or several answers
            per prompt are asked for.
    """
    if len(images) != len(prompts):
        raise ValueError(f"Got {len(images)} images and {len(prompts)} lists of prompts; each image needs one list.")
    given_config = generation_options.get("generation_config")
    for name, only in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        asked = generation_options.get(name, getattr(given_config, name, None))
        if asked not in (None, only):
            raise ValueError(
                f"`answer` gives one text per prompt, which {name}={asked!r} does not. Call `model.generate` itself, or ask each "
                "prompt several times with do_sample=True."
            )
    shown = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "num_beams": (given_config or model.generation_config).num_beams or 1,
        **generation_options,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }
    answers: list[list[str]] = [[] for _ in prompts]
    total = sum(map(len, prompts))
    with tqdm(total=total, desc=progress, disable=progress is None) as bar:
        for entries in _batches([len(entry) for entry in shown], [len(group) for group in prompts], batch_size):
            asked = [
                (entry, _tokens(processor, len(shown[entry]), prompt))
                for entry in entries
                for prompt in prompts[entry]
            ]
            pixel_values = None
            if shown[entries[0]]:
                flat = [to_rgb(image) for entry in entries for image in shown[entry]]
                pixel_values = processor.image_processor(flat, return_tensors="pt")["pixel_values"].to(model.device)
            mask_type = MASK_TYPES.get(model.config.attention_mask_type)  # None: only the checkpoint's own code has it
            shares_trunk = mask_type is not None and mask_type.shares_trunk and pixel_values is not None
            shares_trunk = shares_trunk and getattr(
                model.config, "packing", True
            )  # code of format 1 has no such field
            generate = _from_shared_trunks if shares_trunk else _from_image_features
            rows = [(entries.index(entry), trunk, prompt) for entry, (trunk, prompt) in asked]
            generated = generate(model, processor, rows, pixel_values, batch_size, options)
            for (entry, _), text in zip(asked, processor.batch_decode(generated, skip_special_tokens=True)):
                answers[entry].append(text.strip())
            bar.update(len(asked))
    return answers


def _batches(image_counts: list[int], prompt_counts: list[int], batch_size: int) -> Iterator[list[int]]:
    """Consecutive entries with equally many images and together at most `batch_size` prompts, or a single one with more."""
    batch: list[int] = []
    for entry, count in enumerate(prompt_counts):
        if count == 0:
            continue
        full = sum(prompt_counts[other] for other in batch) + count > batch_size
        if batch and (full or image_counts[entry] != image_counts[batch[0]]):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _tokens(processor: ProcessorMixin, image_count: int, prompt: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt behind its images as the chat template writes them: the trunk, image tokens expanded, and the rest."""
    content = [*({"type": "image"} for _ in range(image_count)), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # The code of a checkpoint pushed before it had the method leaves special tokens to the tokenizer.
    special = processor.adds_special_tokens(text) if hasattr(processor, "adds_special_tokens") else True
    tokens = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    places = [place for place, token in enumerate(tokens) if token == processor.image_token_id]
    if len(places) != image_count:
        raise ValueError(f"The prompt {prompt!r} holds the placeholder {processor.image_token!r}. Remove it.")
    end = places[-1] + 1 if places else 0
    trunk = []
    for token in tokens[:end]:
        trunk += [token] * (processor.image_seq_length if token == processor.image_token_id else 1)
    return trunk, tokens[end:]


def _left_padded(rows: list[list[int]], processor: ProcessorMixin, device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, each `(rows, longest)`."""
    padded = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(device)
    return padded["input_ids"], padded["attention_mask"]


def _from_shared_trunks(model, processor, rows, pixel_values, batch_size: int, options: dict) -> list[Tensor]:
    """Prefills the trunk of each entry once, then generates behind copies of that cache, `batch_size` prompts at a time."""
    first_rows = {entry: trunk for entry, trunk, _ in reversed(rows)}
    trunks = torch.tensor([first_rows[entry] for entry in sorted(first_rows)], device=model.device)  # (entries, trunk)
    prefilled = getattr(model.model(input_ids=trunks, pixel_values=pixel_values, use_cache=True), CACHE_NAME)
    generated = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        entry_of = torch.tensor([entry for entry, _, _ in batch], device=model.device)
        prompt_ids, prompt_mask = _left_padded([prompt for _, _, prompt in batch], processor, model.device)
        cache = copy.deepcopy(prefilled)  # generating goes on writing into it
        cache.batch_select_indices(entry_of.repeat_interleave(options["num_beams"]))
        input_ids = torch.cat([trunks[entry_of], prompt_ids], dim=1)
        attention_mask = torch.cat([torch.ones_like(trunks[entry_of]), prompt_mask], dim=1)
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **{CACHE_NAME: cache}, **options)
        generated += list(output[:, input_ids.shape[1] :])
    return generated


def _from_image_features(model, processor, rows, pixel_values, batch_size: int, options: dict) -> list[Tensor]:
    """Encodes each image once, then generates from whole prompts, `batch_size` at a time."""
    entries = 1 + max(entry for entry, _, _ in rows)
    if pixel_values is not None:
        features = model.get_image_features(pixel_values).pooler_output
        features = features.reshape(entries, -1, features.shape[-1])  # (entries, image tokens, hidden)
    generated = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        input_ids, attention_mask = _left_padded(
            [trunk + prompt for _, trunk, prompt in batch], processor, model.device
        )
        embeddings = model.get_input_embeddings()(input_ids)
        layout_inputs = {}
        if pixel_values is not None:
            config = model.config
            layout = TokenLayout.from_input_ids(
                input_ids, config.image_token_id, config.image_seq_length, attention_mask=attention_mask
            )
            entry_of = torch.tensor([entry for entry, _, _ in batch], device=model.device)
            is_image = (layout.image_ids >= 0).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(is_image, features[entry_of].to(embeddings.dtype))
            layout_inputs["image_ids"] = layout.image_ids
        generated += list(
            model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **layout_inputs, **options)
        )
    return generated
