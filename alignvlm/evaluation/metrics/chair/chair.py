"""Objects in captions that the image does not show, for the `evaluate` library, as CHAIR counts them."""

import numpy as np

from alignvlm.evaluation import text_metric
from alignvlm.evaluation.metrics.chair.coco_objects import OBJECT_OF, objects_in


class Chair(text_metric.TextMetric):
    about = """
CHAIR (Rohrbach et al., 2018, arXiv 1809.02156) with COCO's 80 objects and the official synonyms: CHAIRi is the share of object words that name
something that is not in the image, CHAIRs that of captions with such a word. In the image is what the references name: for numbers as in papers,
the names of all annotated objects and all captions of people. Lower is better; longer captions have higher values, so `chair_objects`, the object
words of a caption, and `chair_recall` belong beside them. Later programs (that of lmms-eval) take lemmas of WordNet in place of singular forms.
"""
    numbers = """
Args:
    predictions (list of str): one caption per image.
    references (list of list of str): texts that name what is in the image: names of objects, captions.

Returns:
    chair_i (float): hallucinated object words over all object words; None without any.
    chair_s (float): share of captions with a hallucinated one.
    chair_recall (float): share of the objects in the images that the captions name; None without any.
    chair_objects (float): mean number of object words.
    per_item (list of dict): for each caption its `mentioned` and `hallucinated` objects, `chair_s`, how many objects are in the image (`present`),
        and how many of these it names (`found`).
"""
    citation = """
@inproceedings{rohrbach2018object,
  title={Object hallucination in image captioning},
  author={Rohrbach, Anna and Hendricks, Lisa Anne and Burns, Kaylee and Darrell, Trevor and Saenko, Kate},
  booktitle={EMNLP},
  year={2018}
}
"""
    sources = ("https://arxiv.org/abs/1809.02156", "https://github.com/LisaAnne/Hallucination")
    headlines = ("chair_i", "chair_s")
    lower_is_better = headlines
    neutral = ("chair_objects",)
    means = {"chair_s": ("chair_s", {}), "chair_objects": ("chair_objects", {})}

    def _compute(self, predictions, references):
        items = [_judged(prediction, group) for prediction, group in zip(predictions, references)]
        found = {}
        for name, (summed, function) in self.of_sums.items():
            value = function(np.sum([summed(item) for item in items], axis=0))
            found[name] = None if np.isnan(value) else float(value)
        return {**found, **{name: text_metric.mean(items, name) for name in self.means}, "per_item": items}


def _judged(prediction: str, references: list[str]) -> dict:
    present = {name for reference in references for name in _named(reference)}
    mentioned = objects_in(prediction)
    hallucinated = [name for name in mentioned if name not in present]
    return {
        "mentioned": mentioned,
        "hallucinated": hallucinated,
        "chair_s": bool(hallucinated),
        "chair_objects": len(mentioned),
        "present": len(present),
        "found": len(present & set(mentioned)),
    }


def _named(reference: str) -> list[str]:
    """Returns the objects that a reference names: the one whose name it is, or those of a caption."""
    return [OBJECT_OF[reference]] if reference in OBJECT_OF else objects_in(reference)


def _share(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


Chair.of_sums = {
    "chair_i": (lambda scores: [len(scores["hallucinated"]), len(scores["mentioned"])], _share),
    "chair_recall": (lambda scores: [scores["found"], scores["present"]], _share),
}
