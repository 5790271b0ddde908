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
    images: Sequence[Image.Image],
    prompts: Sequence[Sequence[str]],
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: str | None = None,
    **generation_options,
) -> list[list[str]]:
    """Answers every prompt about every image; an image goes through the vision encoder once for all its prompts.

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        images: one PIL image per entry.
        prompts: for each image, its prompts.
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
    asked = [(index, prompt) for index, group in enumerate(prompts) for prompt in group]
    answers: list[list[str]] = [[] for _ in prompts]
    features: dict[int, Tensor] = {}  # image tokens of the current images, by index: (image_seq_length, hidden)
    for start in tqdm(range(0, len(asked), batch_size), desc=progress, disable=progress is None):
        batch = asked[start : start + batch_size]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
            )
            for _, prompt in batch
        ]
        inputs = processor(
            images=[[images[index]] for index, _ in batch],
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        layout = TokenLayout.from_input_ids(
            input_ids, model.config.image_token_id, model.config.image_seq_length, attention_mask=attention_mask
        )
        pixel_values = dict(zip((index for index, _ in batch), inputs["pixel_values"]))  # one per image
        features = {index: features[index] for index in pixel_values if index in features}
        if new := [index for index in pixel_values if index not in features]:
            encoded = model.get_image_features(torch.stack([pixel_values[index] for index in new])).pooler_output
            features.update(zip(new, encoded))
        embeddings = model.get_input_embeddings()(input_ids)
        image_tokens = torch.stack([features[index] for index, _ in batch]).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter((layout.image_ids >= 0).unsqueeze(-1), image_tokens)
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation_options}
        generated = model.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, image_ids=layout.image_ids, **options
        )
        for (index, _), text in zip(batch, processor.batch_decode(generated, skip_special_tokens=True)):
            answers[index].append(text.strip())
    return answers
