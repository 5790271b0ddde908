"""CLIPScore of captions for the `evaluate` library, with any CLIP that is given by name or folder."""

import datasets
import torch
from transformers import AutoModel, AutoProcessor

from alignvlm.data.images import read_image
from alignvlm.evaluation import text_metric
from alignvlm.evaluation.load import device_for


PREFIX = "A photo depicts "
WEIGHT = 2.5


class ClipScore(text_metric.TextMetric):
    about = """
CLIPScore (Hessel et al., 2021, arXiv 2104.08718) of captions: 2.5 times the cosine of the embeddings of image and caption, 0 if that is negative,
every caption behind "A photo depicts". RefCLIPScore is its harmonic mean with the highest cosine of the caption and one of its references. The
paper's numbers are with `openai/clip-vit-base-patch32`; those of another model cannot be compared with them. Texts longer than the model's
positions are cut off.
"""
    numbers = """
Args:
    predictions (list of str): one caption per image.
    references (list of list of str): captions by people.
    images (list): the images: PIL images, paths, or encoded bytes as `datasets.Image` has them.
    model (str): a CLIP's folder or Hub repository.
    batch_size (int): images at once; 32 by default.

Returns:
    clip_score, ref_clip_score (float): means over captions.
    per_item (list of dict): `clip_score` and `ref_clip_score` of each caption.
"""
    citation = """
@inproceedings{hessel2021clipscore,
  title={CLIPScore: A reference-free evaluation metric for image captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={EMNLP},
  year={2021}
}
"""
    sources = ("https://arxiv.org/abs/2104.08718", "https://github.com/jmhessel/clipscore")
    columns = {"predictions": text_metric.TEXT, "references": text_metric.TEXTS, "images": datasets.Image()}
    headlines = ("clip_score", "ref_clip_score")
    means = {"clip_score": ("clip_score", {}), "ref_clip_score": ("ref_clip_score", {})}

    def _compute(self, predictions, references, images, model, batch_size=32):
        embed = Embedder(model)
        items = []
        for start in range(0, len(predictions), batch_size):
            chosen = slice(start, start + batch_size)
            seen = embed.images(images[chosen])
            said = embed.texts(predictions[chosen])
            for group, image, caption in zip(references[chosen], seen, said, strict=True):
                items.append(_scored(image, caption, embed.texts(group)))
        return {**{name: text_metric.mean(items, name) for name in self.means}, "per_item": items}


class Embedder:
    """Embeds images and captions with a CLIP, as vectors of length 1, each `(items, dimensions)` in float32.

    Raises:
        ValueError: if the model does not embed images and texts.
    """

    def __init__(self, name: str):
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(device_for())
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ValueError(f"{name!r} ({type(self.model).__name__}) does not embed images and texts; name a CLIP.")
        self.processor = AutoProcessor.from_pretrained(name)

    @torch.inference_mode()
    def images(self, images: list) -> torch.Tensor:
        inputs = self.processor(images=[read_image(image) for image in images], return_tensors="pt")
        return _normalised(self.model.get_image_features(**inputs.to(self.model.device)))

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> torch.Tensor:
        inputs = self.processor(
            text=[PREFIX + caption for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return _normalised(self.model.get_text_features(**inputs.to(self.model.device)))


def _normalised(output) -> torch.Tensor:
    return torch.nn.functional.normalize(output.pooler_output, dim=-1).cpu()


def _scored(image: torch.Tensor, caption: torch.Tensor, references: torch.Tensor) -> dict[str, float]:
    score = WEIGHT * max((image @ caption).item(), 0)
    likeness = max((references @ caption).max().item(), 0)
    both = score + likeness
    return {"clip_score": score, "ref_clip_score": 2 * score * likeness / both if both else 0.0}
