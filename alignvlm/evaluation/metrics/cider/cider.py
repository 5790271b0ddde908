"""CIDEr-D for the `evaluate` library: the official metric of image captioning, without Java."""

import datasets
import evaluate

from .cider_d import cider_d, document_frequencies
from .ptb_tokenizer import tokenize


_DESCRIPTION = """
CIDEr-D (Vedantam et al., 2015, arXiv 1411.5726) as coco-caption computes it and the literature reports it under the name CIDEr:
captions are tokenized as by its Java program, counts are clipped, sentence length is penalised with sigma 6, and scores are
multiplied by 10. Papers print `cider` times 100: a paper's "CIDEr 120.5" is 1.205 here.
"""

_CITATION = """
@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based image description evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (list of str): one caption per image.
    references (list of list of str, or list of str): all captions that people wrote for each image; their number may differ between
        images.
    document_frequencies (dict, optional): what `document_frequencies` of this module returned for other references. By default
        those of the given references, as in papers; a score then depends on all images of the computation, and is 0 for a single
        image.

Returns:
    cider (float): the mean over images.
    cider_per_item (list of float): the score of each image, in order.

Order matters in one case, as in the official program: the period of a caption that ends in a single letter ("letter B.") depends
on the first word of the next caption.

Raises:
    ValueError: for no predictions, an image without references, or something that is not text. An empty prediction scores 0.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Cider(evaluate.Metric):
    # For `alignvlm/evaluation/judge.py`.
    means = {"cider": ("cider", {})}
    per_prompt = ("cider",)
    beside = ("bleu", "rouge_l", "wording")

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
            codebase_urls=["https://github.com/tylin/coco-caption"],
            reference_urls=["https://arxiv.org/abs/1411.5726"],
        )

    def document_frequencies(self, references: list[list[str]] | list[str]) -> dict:
        """Returns the document frequencies of a set of references, for scoring other captions: JSON-serialisable."""
        tokenized = _tokenize_groups(_as_groups(references))
        return {"documents": len(tokenized), "frequencies": document_frequencies(tokenized)}

    def add(self, *, prediction=None, reference=None, **options):
        """Adds one item. See `compute`."""
        self.add_batch(predictions=[prediction], references=[reference], **options)

    def add_batch(self, *, predictions=None, references=None, **options):
        """Adds items after checking them: a refused batch leaves earlier items as they were. See `compute`."""
        references = _as_groups(references)
        if not predictions:
            raise ValueError("CIDEr needs at least one prediction; got none.")
        for index, prediction in enumerate(predictions):
            if not isinstance(prediction, str):
                raise ValueError(f"Prediction {index} is {prediction!r}, not a string. Use '' for an empty caption.")
        super().add_batch(predictions=predictions, references=references, **options)

    def normal_form(self, reference, kind):
        return " ".join(tokenize([reference])[0])

    def _compute(self, predictions, references, document_frequencies=None):
        frequencies = document_frequencies or {"documents": None, "frequencies": None}
        if set(frequencies) != {"documents", "frequencies"}:
            raise ValueError(
                f"document_frequencies must hold `documents` and `frequencies`, not {sorted(frequencies)}; "
                "get them from this metric's `document_frequencies(references)`."
            )
        scores = cider_d(tokenize(predictions), _tokenize_groups(references), **frequencies)
        return {"cider": float(scores.mean()), "cider_per_item": scores.tolist()}


def _as_groups(references) -> list[list[str]]:
    """Returns one list of references per item, also for a single reference without a list."""
    groups = [[group] if isinstance(group, str) else group for group in references or []]
    for index, group in enumerate(groups):
        if not isinstance(group, list | tuple) or not group or not all(isinstance(text, str) for text in group):
            raise ValueError(f"Item {index} needs at least one reference, each a string; it has {group!r}.")
    return groups


def _tokenize_groups(groups: list[list[str]]) -> list[list[list[str]]]:
    tokens = iter(tokenize([reference for group in groups for reference in group]))
    return [[next(tokens) for _ in group] for group in groups]
