"""Batched answers of a model about images: what evaluation, the quickstart and the demo call."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_alignvlm.masking_alignvlm import TokenLayout


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
    """Answers every prompt about every image; an image goes through the vision encoder once for all its prompts.

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        images: per entry one PIL image, or a sequence of none or several, which stand before the prompt.
        prompts: for each entry of `images`, its prompts.
        batch_size: prompts answered at once.
        progress: the title of a progress bar; none without it.
        **generation_options: for `model.generate`, such as `num_beams`. Greedy decoding by default.

    Returns:
        The answers, nested as `prompts`, stripped of surrounding white space.

    Raises:
        ValueError: if there are not as many lists of prompts as images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"Got {len(images)} images and {len(prompts)} lists of prompts; each image needs one list.")
    shown = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in images]
    asked = [(index, prompt) for index, group in enumerate(prompts) for prompt in group]
    answers: list[list[str]] = [[] for _ in prompts]
    features: dict[int, Tensor] = {}  # of the entries in this batch: (images, image_seq_length, hidden)
    for start in tqdm(range(0, len(asked), batch_size), desc=progress, disable=progress is None):
        batch = asked[start : start + batch_size]
        inputs = _inputs(processor, [(shown[index], prompt) for index, prompt in batch]).to(model.device)
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        embeddings = model.get_input_embeddings()(input_ids)
        layout_inputs = {}
        if "pixel_values" in inputs:
            pixel_values = inputs["pixel_values"].split([len(shown[index]) for index, _ in batch])
            first = {index: pixels for (index, _), pixels in reversed(list(zip(batch, pixel_values)))}
            features = {index: features[index] for index in first if index in features}
            if new := [index for index in first if index not in features and len(first[index])]:
                encoded = model.get_image_features(torch.cat([first[index] for index in new])).pooler_output
                features.update(zip(new, encoded.split([len(first[index]) for index in new])))
            image_tokens = torch.cat([features[index] for index, _ in batch if index in features])
            layout = TokenLayout.from_input_ids(
                input_ids, model.config.image_token_id, model.config.image_seq_length, attention_mask=attention_mask
            )
            embeddings = embeddings.masked_scatter(
                (layout.image_ids >= 0).unsqueeze(-1), image_tokens.to(embeddings.dtype)
            )
            layout_inputs["image_ids"] = layout.image_ids
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation_options}
        generated = model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **layout_inputs, **options)
        for (index, _), text in zip(batch, processor.batch_decode(generated, skip_special_tokens=True)):
            answers[index].append(text.strip())
    return answers


def _inputs(processor: ProcessorMixin, batch: list[tuple[list[Image.Image], str]]):
    """Prompts with their images in front, as the chat template writes them, padded on the left."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for images, prompt in batch
    ]
    images = [images for images, _ in batch] if any(images for images, _ in batch) else None
    return processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
