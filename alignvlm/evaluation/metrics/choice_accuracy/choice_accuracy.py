"""Multiple choice for the `evaluate` library: the letter that is given, and the choice that is most likely."""

import datasets

from alignvlm.evaluation import text_metric


class ChoiceAccuracy(text_metric.TextMetric):
    about = """
Multiple choice, two ways. `choice_accuracy` judges the written answer as LLaVA and lmms-eval judge ScienceQA: it must be the letter, or begin with
the capital letter and a period; anything else is wrong. `choice_accuracy_by_likelihood` takes the choice whose text the model finds most likely
as the answer to the same prompt, by the mean log-likelihood of its tokens, end token included; `choice_accuracy_by_sum` by their sum, which
favours short choices (`acc_norm` and `acc` of lm-evaluation-harness, which divides by bytes in place of tokens).
"""
    numbers = """
Args:
    predictions (list of str): one written answer per question.
    references (list of str): the right letters.
    choices (list of list of str): the choices of each question; the first is A.
    likelihoods (list of list of dict): for each choice, the `sum` of its tokens' log-likelihoods and their number, `tokens`; an empty list
        where nobody measured them.

Returns:
    choice_accuracy (float): share of right letters.
    choice_accuracy_by_likelihood, choice_accuracy_by_sum (float): shares of questions whose right choice is the most likely one; None without
        likelihoods.
    no_letter (float): share of answers that give no letter of a choice.
    chance (float): what guessing gets: the mean of one over the number of choices.
    per_item (list of dict): for each question `correct`, `no_letter` and `chance`, and with likelihoods `likeliest` (a letter), `likeliest_correct`
        and `sum_correct`.
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
    sources = ("https://arxiv.org/abs/2209.09513", "https://github.com/haotian-liu/LLaVA")
    columns = {
        "predictions": text_metric.TEXT,
        "references": text_metric.TEXT,
        "choices": text_metric.TEXTS,
        "likelihoods": datasets.List({"sum": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
    }
    headlines = ("choice_accuracy", "choice_accuracy_by_likelihood")
    means = {
        "choice_accuracy": ("correct", {}),
        "choice_accuracy_by_likelihood": ("likeliest_correct", {"measured": True}),
        "choice_accuracy_by_sum": ("sum_correct", {"measured": True}),
        "no_letter": ("no_letter", {}),
    }
    lower_is_better = ("no_letter",)
    per_kind = ("choice_accuracy", "choice_accuracy_by_likelihood")

    def _compute(self, predictions, references, choices, likelihoods):
        items = [_judged(*item) for item in zip(predictions, references, choices, likelihoods)]
        measured = [item for item in items if item["measured"]]
        return {
            "choice_accuracy": text_metric.mean(items, "correct"),
            "choice_accuracy_by_likelihood": text_metric.mean(measured, "likeliest_correct"),
            "choice_accuracy_by_sum": text_metric.mean(measured, "sum_correct"),
            "no_letter": text_metric.mean(items, "no_letter"),
            "chance": text_metric.mean(items, "chance"),
            "per_item": items,
        }


def letters(count: int) -> list[str]:
    """Returns the letters of that number of choices."""
    return [chr(ord("A") + index) for index in range(count)]


def letter_of(answer: str) -> str | None:
    """Returns the letter that an answer gives: it is one, in either case, or begins with a capital one and a period."""
    answer = answer.strip()
    if len(answer) == 1:
        return answer.upper()
    return answer[0] if len(answer) > 1 and answer[0].isupper() and answer[1] == "." else None


def _judged(prediction: str, reference: str, choices: list[str], likelihoods: list[dict]) -> dict:
    names = letters(len(choices))
    given, right = letter_of(prediction), reference.strip().upper()
    scores = {"correct": given == right, "no_letter": given not in names, "chance": 1 / max(len(choices), 1)}
    if not likelihoods:
        return {**scores, "measured": False}
    sums = [each["sum"] for each in likelihoods]
    means = [each["sum"] / each["tokens"] for each in likelihoods]
    likeliest = names[means.index(max(means))]
    return {
        **scores,
        "measured": True,
        "likeliest": likeliest,
        "likeliest_correct": likeliest == right,
        "sum_correct": names[sums.index(max(sums))] == right,
    }
