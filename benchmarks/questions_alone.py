"""What the words of questions alone tell of their answers: a linear classifier that sees no image.

    python benchmarks/questions_alone.py --data FOLDER

The words of a question, and all two and three of them in a row, choose among the most frequent answers of the training questions: softmax regression,
the half of the "simple baseline" of Zhou et al. (2015, arXiv 1512.02167) that reads. The weight of its L2 penalty is the best on a tenth of the training images,
before it is fitted to all of them. Its answers are judged as a model's are, by the same metric, with the interval of the bootstrap over
images. Beside a model's score and its score with another image, it says how much a benchmark asks about images at all.

FOLDER holds `pathvqa/{train,dev}.jsonl`, `daquar/qa.jsonl` and `vqa_rad/train.jsonl` with their images, divided as by `real_photos.py`. A minute of one core.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/questions_alone.py`

from alignvlm.data.record import Conversation
from alignvlm.data.sources import Source
from alignvlm.evaluation.judge import judge
from alignvlm.evaluation.questions import load_source
from benchmarks.stage_runs import machine, prepare_photos, update_results


RESULTS = Path(__file__).resolve().parents[1] / "docs/results.json"
FILES = {"pathvqa": ("train", "dev"), "daquar": ("train", "test"), "vqa_rad": ("train", "test")}
PENALTIES = (1e-5, 1e-4, 1e-3)
ANSWERS = 300  # that the classifier can give
NUMBERS = {
    "accuracy": "accuracy",
    "yes_no_accuracy": "yes/no accuracy",
    "free_form_accuracy": "open, exact",
    "free_form_f1": "open, token F1",
}


def features_of(question: str) -> set[str]:
    """The words of a question, and all two and three in a row, with its begin and its end as words."""
    words = ["<", *re.findall(r"[a-z0-9]+", question.lower()), ">"]
    return {" ".join(words[at : at + length]) for length in (1, 2, 3) for at in range(len(words) - length + 1)}


class QuestionClassifier:
    """Softmax regression from the words of a question to its answer.

    Args:
        questions: of the training records.
        answers: to them.
        penalty: the weight of the sum of squared weights, beside the mean cross entropy.
        answers_known: how many of the most frequent answers can be given.
    """

    def __init__(self, questions: list[str], answers: list[str], penalty: float, answers_known: int = ANSWERS):
        self.answers = [answer for answer, _ in Counter(answers).most_common(answers_known)]
        counts = Counter(feature for question in questions for feature in features_of(question))
        self.features = {name: index for index, name in enumerate(sorted(name for name, n in counts.items() if n > 2))}
        number = {answer: index for index, answer in enumerate(self.answers)}
        known = [(question, number[answer]) for question, answer in zip(questions, answers) if answer in number]
        self._fit(
            self.matrix([question for question, _ in known]), torch.tensor([label for _, label in known]), penalty
        )

    def matrix(self, questions: list[str]) -> torch.Tensor:
        """Returns which features each question has (`(questions, features)`, sparse, float32)."""
        found = [sorted(self.features[name] for name in features_of(q) if name in self.features) for q in questions]
        rows = torch.tensor([row for row, indices in enumerate(found) for _ in indices], dtype=torch.long)
        columns = torch.tensor([index for indices in found for index in indices], dtype=torch.long)
        size = (len(questions), len(self.features))
        return torch.sparse_coo_tensor(
            torch.stack([rows, columns]), torch.ones(len(rows)), size, check_invariants=True
        ).coalesce()

    def _fit(self, matrix: torch.Tensor, labels: torch.Tensor, penalty: float) -> None:
        self.weights = torch.zeros(len(self.features), len(self.answers), requires_grad=True)
        self.bias = torch.zeros(len(self.answers), requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights, self.bias], max_iter=40, history_size=5)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = torch.sparse.mm(matrix, self.weights) + self.bias
            value = torch.nn.functional.cross_entropy(logits, labels) + penalty * self.weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, questions: list[str]) -> list[str]:
        """Answers questions."""
        logits = torch.sparse.mm(self.matrix(questions), self.weights) + self.bias
        return [self.answers[index] for index in logits.argmax(-1).tolist()]


def question_of(name: str, conversation: Conversation, source: Source) -> dict:
    """Returns a question of the record of this name as `judge` takes it, without a prediction."""
    return {
        "id": name,
        "prompt": conversation.prompt,
        "references": conversation.responses,
        "kind": conversation.kind,
        "metric": source.metric_of(conversation),
    }


def read(file: Path, split: str) -> list[dict]:
    """Reads the questions of a file as `judge` takes them, without predictions."""
    source = load_source("local", split, str(file))
    names = source.ids or map(str, range(len(source)))
    return [
        question_of(name, conversation, source)
        for name, conversations in zip(names, source.conversations(False), strict=True)
        for conversation in conversations
    ]


def answered(training: list[dict], asked: list[dict], penalty: float, samples: int) -> dict:
    """Judges the answers of a classifier that these training questions made."""
    classifier = QuestionClassifier([q["prompt"] for q in training], [q["references"][0] for q in training], penalty)
    predictions = classifier([q["prompt"] for q in asked])
    return judge([{**q, "prediction": given} for q, given in zip(asked, predictions)], samples)["metrics"]


def measure(training: list[dict], asked: list[dict]) -> dict:
    """Chooses the penalty on a tenth of the training images, fits all of them, and judges the answers to the questions that were held out."""
    held = set(sorted({q["id"] for q in training})[::10])
    within, without = ([q for q in training if (q["id"] in held) == inside] for inside in (True, False))

    def right(penalty: float) -> float:
        (metric,) = answered(without, within, penalty, samples=1).values()
        return metric["accuracy"]

    penalty = max(PENALTIES, key=right)
    (metric,) = answered(training, asked, penalty, samples=1000).values()
    numbers = {
        name: {"value": metric[name], "interval": metric["intervals"].get(name)}
        for name in NUMBERS
        if metric.get(name) is not None
    }
    return {"questions": len(asked), "training_questions": len(training), "penalty": penalty, "numbers": numbers}


def table(found: dict) -> str:
    """The table of docs/results.md: beside each number, that of the model with the right image and with another."""
    lines = ["| task | metric | words of the question alone (95% interval) |", "|---|---|---|"]
    for task, result in found["tasks"].items():
        for name, number in result["numbers"].items():
            low, high = number["interval"]
            lines.append(f"| {task} | {NUMBERS[name]} | {number['value']:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--results", default=str(RESULTS), help="JSON file of the results.")
    arguments = p.parse_args()
    tasks = {}
    with tempfile.TemporaryDirectory() as temporary:
        prepare_photos(Path(arguments.data), Path(temporary))
        for task, (train, held_out) in FILES.items():
            folder = Path(temporary) / task
            tasks[task] = measure(
                *(read(folder / f"{name}.jsonl", name) for name in (train, held_out)),
            )
            print(task, tasks[task], flush=True)
    found = {"machine": machine(), "tasks": tasks}
    update_results(Path(arguments.results), "questions_alone", found)
    print(table(found))


if __name__ == "__main__":
    main()
