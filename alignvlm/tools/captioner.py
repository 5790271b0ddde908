"""Captions images with any image-text-to-text model of transformers, and scores captions with a CLIP or SigLIP model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from alignvlm.evaluation.precision import choose_precision
from hub_upload.repository import check_model, file_of
from hub_upload.run_record import read_json


@dataclass(frozen=True)
class Caption:
    """A text of the model; `finished` is False if it was cut off by the limit of new tokens."""

    text: str
    finished: bool


class Captioner:
    """A model with its processor and what it is asked.

    Args:
        model, processor: as `load_checkpoint` returns them.
        prompt: what the user says beside the image; where the processor has no chat template, the text that the model continues.
            Empty without a chat template: the model begins by itself.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str):
        self.model, self.processor, self.prompt = model, processor, prompt
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.ends = _end_tokens(model) | {tokenizer.eos_token_id, tokenizer.pad_token_id}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], samples: int = 1, **decoding) -> list[list[Caption]]:
        """Captions a batch of images.

        Args:
            samples: captions per image, each of a run of its own.
            **decoding: for `model.generate`.
        """
        inputs = self._inputs(images).to(self.model.device, self.model.dtype)
        prompt = inputs.get("input_ids")
        if prompt is not None and self.model.config.model_type == "blip":
            prompt = prompt[:, :-1]  # its `generate` takes the tokenizer's end off by itself
        found: list[list[Caption]] = [[] for _ in images]
        for _ in range(samples):
            given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            tokens = _without_prompt(self.model.generate(**given, **decoding), prompt)
            texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
            for captions, text, row in zip(found, texts, tokens.tolist(), strict=True):
                captions.append(Caption(text.strip(), bool(row) and row[-1] in self.ends))
        return found

    def _inputs(self, images: Sequence[Image.Image]):
        if has_chat_template(self.processor):
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}],
                    }
                ]
                for image in images
            ]
            return self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if not self.prompt:
            return self.processor(images=list(images), return_tensors="pt")
        inputs = self.processor(
            images=list(images), text=[self.prompt] * len(images), padding=True, return_tensors="pt"
        )
        if self.model.config.model_type == "git":  # its tokenizer ends every text, and nothing would follow
            inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        return inputs


def has_chat_template(processor: ProcessorMixin) -> bool:
    """Tells whether a processor writes conversations, as instruction-tuned models want them."""
    return bool(getattr(processor, "chat_template", None))


def load_processor(model: str, revision: str | None = None, trust_remote_code: bool = False) -> ProcessorMixin:
    """Loads the processor of a model alone.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has no processor of images and texts.
    """
    check_model(model, revision)
    try:
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{model!r} has no processor of images and texts, it is no image-text model: {error}"
        ) from error
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(
            f"{model!r} has no processor of images and texts ({type(processor).__name__}): it is no image-text model."
        )
    return processor


def _end_tokens(model: PreTrainedModel) -> set[int]:
    """Returns all tokens that end a text of the model; BLIP's ends with the separator."""
    text_config = model.config.get_text_config()
    inner = getattr(getattr(model, "language_model", None), "generation_config", None)
    found = [getattr(one, "eos_token_id", None) for one in (model.generation_config, inner, model.config, text_config)]
    found += [text_config.sep_token_id] if model.config.model_type == "blip" else []
    return {token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


def _without_prompt(output: Tensor, prompt: Tensor | None) -> Tensor:
    """Returns the new tokens `(batch, new)`: some models repeat the prompt before them, others do not."""
    length = 0 if prompt is None else prompt.shape[1]
    repeated = length > 0 and torch.equal(output[:, 1:length], prompt[:, 1:])  # BLIP replaces the first token
    return output[:, length:] if repeated else output


SCORERS = "a CLIP or SigLIP, as google/siglip-base-patch16-224"
FEATURES = {"get_image_features", "get_text_features"}
# Types with both features whose output has no `image_embeds` and `text_embeds` to compare.
OTHER_EMBEDDINGS = ("blip-2", "flava")


def check_scorer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Checks that a scorer is there and embeds images and texts, by its configuration and processor, before anything is captioned. A model with
    code of its own is checked when it is loaded.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it does not embed images and texts, or has no processor of both.
    """
    try:
        check_model(name, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--scorer {name!r} is neither a folder with a config.json nor a model of the Hub that can be read here"
            f"{'' if revision is None else f' at the revision {revision!r}'}: name {SCORERS}."
        ) from error
    file = file_of(name, "config.json", revision)
    config = read_json(Path(file)) if file else {}  # a folder of adapters has none
    if not (trust_remote_code and "auto_map" in config):
        kind = config.get("model_type")
        names = MODEL_MAPPING_NAMES.get(kind, "")
        model_class = getattr(transformers, names if isinstance(names, str) else names[0], None)
        # `dir`, because classes that lack a library raise ImportError for any attribute
        if kind in OTHER_EMBEDDINGS or not set(dir(model_class)) >= FEATURES:
            raise ValueError(
                f"--scorer {name!r} (of type {kind!r}) does not embed images and texts; name a CLIP or SigLIP."
            )
    try:
        load_processor(name, revision, trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"--scorer {name!r} has no processor of images and texts that can be loaded: name {SCORERS}."
        ) from error


class Scorer:
    """Scores how well a caption fits its image: the cosine of both embeddings, in -1..1, by a model of two encoders (CLIP, SigLIP).

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it does not embed images and texts.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
    ):
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.processor = load_processor(name, **options)
        model = AutoModel.from_pretrained(name, dtype="auto", **options)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ValueError(
                f"{name!r} ({type(model).__name__}) does not embed images and texts; name a CLIP or SigLIP."
            )
        self.model = model.to(choose_precision(dtype, device, model.dtype).dtype).eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Returns the score of each image with its text. Texts longer than the model's positions are cut off."""
        inputs = self.processor(
            images=list(images),
            text=list(texts),
            padding="max_length",  # SigLIP was trained so; CLIP masks it
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
        return torch.nn.functional.cosine_similarity(
            outputs.image_embeds.float(), outputs.text_embeds.float()
        ).tolist()
