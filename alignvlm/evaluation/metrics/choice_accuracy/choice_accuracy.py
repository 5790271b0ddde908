"""Multiple choice for the `evaluate` library: the letter that is given, the most likely letter, and the most likely choice, each calibrated too."""

import datasets
import numpy as np

from alignvlm.evaluation import text_metric


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WAYS = ("by_letter", "by_letter_calibrated", "by_likelihood", "by_sum", "by_pmi", "by_image")


class ChoiceAccuracy(text_metric.TextMetric):
    about = """
Multiple choice, by what is written and by what is likely. `choice_accuracy` judges the written answer as LLaVA and lmms-eval judge ScienceQA: it must
be the letter, or begin with the capital letter and a period; anything else is wrong. By likelihood, the answer is a letter or a choice's text,
as the answer to the same prompt. `by_letter` takes the likeliest letter, and `by_letter_calibrated` that after dividing out how likely each letter is
wherever the right choice stands: PriDe (Zheng et al., 2024, arXiv 2309.03882), with the prior of some questions asked in every rotation of their
choices, for each number of choices apart. `by_likelihood` takes the choice with the highest mean log-likelihood of its tokens, end token included,
and `by_sum` that with the highest sum, which favours short choices (`acc_norm` and `acc` of lm-evaluation-harness, which divides by bytes in
place of tokens). Two calibrations divide by how likely the choice is anyway: `by_pmi` as the answer to an empty message without image (PMI_DC of
Holtzman et al., 2021, arXiv 2104.08315), and `by_image` as the answer to the same question without the image (after Lin et al., 2024, arXiv
2306.01879, who average over null images; with alpha 1).
"""
    numbers = """
Args:
    predictions (list of str): one written answer per question.
    references (list of str): the right letters.
    choices (list of list of str): the choices of each question; the first is A.
    likelihoods (list of list of dict): for each choice, the `sum` of its tokens' log-likelihoods, their number, `tokens`, and that sum
        `without_image` and `without_question`, each None if it was not measured; an empty list where nobody measured any.
    letters (list of list of list of float): the letters' log-likelihoods: of the question as it is, and of some questions with their choices rotated
        by 1, 2, ... places too; an empty list where nobody measured them.

Returns:
    choice_accuracy (float): share of right letters.
    choice_accuracy_by_letter, choice_accuracy_by_letter_calibrated, choice_accuracy_by_likelihood, choice_accuracy_by_sum, choice_accuracy_by_pmi,
        choice_accuracy_by_image (float): shares of questions whose right choice is the most likely one, of those measured; None of none.
    no_letter (float): share of answers that give no letter of a choice.
    chance (float): what guessing gets: the mean of one over the number of choices.
    letter_prior (dict): how likely each letter is wherever the right choice stands, by the number of choices.
    per_item (list of dict): for each question `correct`, `no_letter` and `chance`; for each way (`by_letter` and so on) whether it was measured
        (`has_by_letter`), and whether its answer is right; `likeliest`, the letter of `by_likelihood`.
"""
    citation = """
@inproceedings{lu2022learn,
  title={Learn to explain: Multimodal reasoning via thought chains for science question answering},
  author={Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and Chang, Kai-Wei and Zhu, Song-Chun and Tafjord, Oyvind and Clark, Peter and
    Kalyan, Ashwin},
  booktitle={NeurIPS},
  year={2022}
}
"""
    sources = (
        "https://arxiv.org/abs/2209.09513",
        "https://github.com/haotian-liu/LLaVA",
        "https://arxiv.org/abs/2309.03882",
        "https://arxiv.org/abs/2104.08315",
        "https://arxiv.org/abs/2306.01879",
    )
    columns = {
        "predictions": text_metric.TEXT,
        "references": text_metric.TEXT,
        "choices": text_metric.TEXTS,
        "likelihoods": datasets.List(
            {
                "sum": datasets.Value("float64"),
                "tokens": datasets.Value("int64"),
                "without_image": datasets.Value("float64"),
                "without_question": datasets.Value("float64"),
            }
        ),
        "letters": datasets.List(datasets.List(datasets.Value("float64"))),
    }
    headlines = (
        "choice_accuracy",
        "choice_accuracy_by_letter_calibrated",
        "choice_accuracy_by_likelihood",
        "choice_accuracy_by_pmi",
    )
    means = {
        "choice_accuracy": ("correct", {}),
        **{f"choice_accuracy_{way}": (way, {f"has_{way}": True}) for way in WAYS},
        "no_letter": ("no_letter", {}),
    }
    lower_is_better = ("no_letter",)
    per_kind = ("choice_accuracy", "choice_accuracy_by_likelihood")

    def normal_form(self, reference, kind):
        return reference.strip().upper()

    def _compute(self, predictions, references, choices, likelihoods, letters):
        priors = letter_priors(letters)
        items = [_judged(*item, priors) for item in zip(predictions, references, choices, likelihoods, letters)]
        found = {}
        for number, (score, where) in self.means.items():
            counted = [item for item in items if all(item[name] == value for name, value in where.items())]
            found[number] = text_metric.mean(counted, score)
        found["chance"] = text_metric.mean(items, "chance")
        found["letter_prior"] = {str(count): np.exp(prior).tolist() for count, prior in priors.items()}
        return {**found, "per_item": items}


def letter_priors(letters: list[list[list[float]]]) -> dict[int, np.ndarray]:
    """Returns the log-probability of each letter wherever the right choice stands, by the number of choices, as PriDe has it.

    Args:
        letters: as `compute` takes them. Only questions asked in every rotation count: there, each choice has stood at each letter once.
    """
    found: dict[int, list[np.ndarray]] = {}
    for measured in letters:
        if len(measured) > 1:
            logits = np.array(measured)  # (rotations, letters)
            over_rotations = _log_softmax(_log_softmax(logits).mean(0))
            found.setdefault(len(over_rotations), []).append(np.exp(over_rotations))
    return {count: np.log(np.mean(priors, axis=0)) for count, priors in sorted(found.items())}


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def letter_of(answer: str) -> str | None:
    """Returns the letter that an answer gives: it is one, in either case, or begins with a capital one and a period."""
    answer = answer.strip()
    if len(answer) == 1:
        return answer.upper()
    return answer[0] if len(answer) > 1 and answer[0].isupper() and answer[1] == "." else None


def _judged(prediction: str, reference: str, choices: list, likelihoods: list, letters: list, priors: dict) -> dict:
    names = list(LETTERS[: len(choices)])
    given, right = letter_of(prediction), reference.strip().upper()
    scores = {"correct": given == right, "no_letter": given not in names, "chance": 1 / max(len(choices), 1)}
    likely = _scores_of_choices(likelihoods, letters, priors)
    for way in WAYS:
        scores[f"has_{way}"] = way in likely
        if way in likely:
            scores[way] = names[likely[way].index(max(likely[way]))] == right
    if "by_likelihood" in likely:
        scores["likeliest"] = names[likely["by_likelihood"].index(max(likely["by_likelihood"]))]
    return scores


def _scores_of_choices(likelihoods: list[dict], letters: list[list[float]], priors: dict) -> dict[str, list[float]]:
    """Returns the score of each choice in each way that was measured; the highest is the answer."""
    found = {}
    if letters:
        found["by_letter"] = letters[0]
        if len(letters[0]) in priors:
            found["by_letter_calibrated"] = (np.array(letters[0]) - priors[len(letters[0])]).tolist()
    if likelihoods:
        found["by_likelihood"] = [each["sum"] / each["tokens"] for each in likelihoods]
        found["by_sum"] = [each["sum"] for each in likelihoods]
        for way, without in (("by_pmi", "without_question"), ("by_image", "without_image")):
            if all(each[without] is not None for each in likelihoods):
                found[way] = [each["sum"] - each[without] for each in likelihoods]
    return found
