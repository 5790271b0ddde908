"""VQA accuracy by the answers of several people, for the `evaluate` library."""

from alignvlm.evaluation import text_metric
from alignvlm.evaluation.metrics.pathvqa_accuracy.vqa_normalisation import normalise, without_punctuation


LEAST_PEOPLE = 4  # one is left out, and three others must have given an answer that scores 1


class VQAAccuracy(text_metric.TextMetric):
    about = """
VQA accuracy (Antol et al., 2015, arXiv 1505.00468): an answer scores min(1, n / 3) where n other people gave it too, the mean over all people
taken as the one left out. `vqa_accuracy` is that of the official evaluation of VQA (`vqaEval.py`): the prediction is normalised, of people's answers
only punctuation goes, and nothing where all of them agree, for VQA's were normalised when they were collected. `vqa_accuracy_evalai` normalises
all of them as the EvalAI server and MMF do, which is official for TextVQA, and which lmms-eval takes for OK-VQA and VizWiz as well: commas and
question marks go, and "'s" stands apart, before the same rules.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of list of str): the answers of all people, usually ten. Fewer than four are refused: a right answer would not score 1.

Returns:
    vqa_accuracy, vqa_accuracy_evalai (float): means over questions. Papers print them times 100.
    per_item (list of dict): both for each question.
"""
    citation = """
@inproceedings{antol2015vqa,
  title={{VQA}: Visual question answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={ICCV},
  year={2015}
}
"""
    sources = ("https://arxiv.org/abs/1505.00468", "https://github.com/GT-Vision-Lab/VQA")
    headlines = ("vqa_accuracy", "vqa_accuracy_evalai")
    means = {name: (name, {}) for name in ("vqa_accuracy", "vqa_accuracy_evalai")}
    per_kind = ("vqa_accuracy",)

    def normal_form(self, reference, kind):
        return normalise(reference)

    def credit(self, answer, references):
        return official(answer, references)

    def check_references(self, references):
        for group in references or []:
            if len(group) < LEAST_PEOPLE:
                raise ValueError(
                    f"{self.name} counts how many of several people gave an answer, and needs at least {LEAST_PEOPLE} people's answers to a "
                    f"question; one has {len(group)}: {group!r}. Judge by a right answer alone (--metric pathvqa_accuracy), or read "
                    "everyone's (`all_answers: true` of a source)."
                )

    def _compute(self, predictions, references):
        items = [
            {"vqa_accuracy": official(prediction, group), "vqa_accuracy_evalai": evalai(prediction, group)}
            for prediction, group in zip(predictions, references)
        ]
        return {**{name: text_metric.mean(items, name) for name in self.means}, "per_item": items}


def official(prediction: str, answers: list[str]) -> float:
    """Returns the score by the official evaluation of VQA."""
    people = [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else answers
    return _agreement(normalise(prediction), people)


def evalai(prediction: str, answers: list[str]) -> float:
    """Returns the score with the normalisation of EvalAI and MMF."""
    given, *people = (normalise(_words(text)) for text in (prediction, *answers))
    return _agreement(given, people)


def _words(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _agreement(given: str, people: list[str]) -> float:
    """Returns the mean over people of min(1, n / 3), n being how many of the others gave the answer."""
    same = people.count(given)
    scores = [min(1.0, (same - (answer == given)) / 3) for answer in people]
    return sum(scores) / len(scores)
