"""What pooled features of an image add to the words of a question: a small network that sees both, beside one that sees the words alone.

    python benchmarks/questions_and_images.py --data FOLDER --vision MOBILENET
    python benchmarks/questions_and_images.py --data FOLDER --vision MOBILENET --tasks pathvqa --pixels 320 --cells 3

The network scores the most frequent answers of the training questions by the question's words, as `questions_alone.py` does, plus by the product of the
image's and the question's embedding, element by element (Antol et al., 2015, arXiv 1505.00468). The image's is made of the mean of the frozen
encoder's last map, standardised. The same network without the second half is trained beside it. Both are trained as often over all questions as was best
on a tenth of the training images. What the image adds is the difference between the two; how much the first leans on it, that to its own
answers about another image. Each is judged as a model's answers are, with the interval of the paired bootstrap over images.

With `--pixels` images are resized to so many, and with `--cells N` the image's vector is the means of N x N parts of the map, one after the
other: whether a closer look or more image tokens would tell more. Such a view has a table of its own.

FOLDER is that of `questions_alone.py`, MOBILENET a folder of transformers (or Hub name). Fifteen minutes of one core, most of it the encoder.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/questions_and_images.py`

from alignvlm.evaluation.judge import compare, judge
from alignvlm.evaluation.questions import EvaluationSet, load_task, shuffled
from benchmarks.questions_alone import ANSWERS, FILES, NUMBERS, features_of, question_of
from benchmarks.stage_runs import machine, prepare_photos, update_results


RESULTS = Path(__file__).resolve().parents[1] / "docs/results.json"
PASSES = 12  # over the training questions, at most
BATCH = 256
NETWORKS = 3  # whose scores are added up


class Answerer(nn.Module):
    """Scores answers by the words of a question and the features of an image.

    Args:
        words: number of known words (and of two and three in a row).
        features: length of an image's vector.
        answers: number of answers.
        size: length of the embeddings that are multiplied.
        sees: whether the image counts; without it only the words do.
    """

    def __init__(self, words: int, features: int, answers: int, size: int = 64, sees: bool = True):
        super().__init__()
        self.sees = sees
        self.by_words = nn.EmbeddingBag(words, answers, mode="sum")
        nn.init.zeros_(self.by_words.weight)
        self.question = nn.EmbeddingBag(words, size, mode="mean")
        self.image = nn.Linear(features, size)
        self.by_both = nn.Linear(size, answers)
        self.dropout = nn.Dropout(0.5)

    def forward(self, words: Tensor, starts: Tensor, images: Tensor) -> Tensor:
        """Returns the scores (`(questions, answers)`).

        Args:
            words: the numbers of all questions' words in a row (int64).
            starts: where each question's begin (`(questions,)`, int64).
            images: `(questions, features)`, float32.
        """
        scores = self.by_words(words, starts)
        if not self.sees:
            return scores + self.by_both.bias
        question = torch.tanh(4 * self.question(words, starts))
        image = torch.tanh(self.image(self.dropout(images)))
        return scores + self.by_both(self.dropout(question * image))


class Questions:
    """The questions of a file, each with the position of its image.

    Attributes:
        asked: as `judge` takes them, without predictions.
        images: of each question its image's position in the file (int64).
        others: the same, of another image (see `alignvlm.evaluation.questions.shuffled`).
    """

    def __init__(self, data: EvaluationSet):
        self.data, self.asked = data, []
        pairs = []
        for one, other in zip(data.asked, shuffled(data.asked, seed=0), strict=True):
            for conversation in one.conversations:
                self.asked.append(question_of(one.id, conversation, data.source))
                pairs.append((one.index, other.index))
        self.images, self.others = torch.tensor(pairs).T

    def batches(self, vocabulary: dict[str, int], order: list[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yields the positions of questions, and their words as `Answerer` takes them."""
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            words, starts = [], []
            for position in chosen:
                starts.append(len(words))
                found = features_of(self.asked[position]["prompt"])
                words += sorted(vocabulary[name] for name in found if name in vocabulary)
            yield chosen, torch.tensor(words, dtype=torch.long), torch.tensor(starts)


@torch.no_grad()
def pooled_features(data: EvaluationSet, vision: str, pixels: int | None = None, cells: int = 1) -> Tensor:
    """Returns the mean over positions of the encoder's last output, for each record's first image (`(records, features)`, float32).

    Args:
        pixels: the images' height and width; by default the processor's.
        cells: makes means over `cells` x `cells` parts of a map (`(records, features * cells * cells)`).
    """
    size = {} if pixels is None else {"size": {"height": pixels, "width": pixels}}
    model, processor = AutoModel.from_pretrained(vision), AutoImageProcessor.from_pretrained(vision, **size)
    model = model.eval().to(memory_format=torch.channels_last)
    found = []
    for first in range(0, len(data.asked), 16):
        images = [group[0] for group in data.images(data.asked[first : first + 16])]
        output = model(processor(images, return_tensors="pt")["pixel_values"].to(memory_format=torch.channels_last))
        last = output.last_hidden_state
        if last.dim() == 4:  # a map
            found.append(nn.functional.adaptive_avg_pool2d(last, cells).flatten(1))
        else:  # tokens
            found.append(last.mean(1))
    return torch.cat(found)


class Classifier:
    """Networks of one kind, which every `train_pass` trains once on the same questions, in another order.

    Args:
        training: the questions.
        features: of the images of `training` (`(records, features)`).
        positions: of the questions that are trained on; their words and most frequent answers are the known ones.
        sees: whether the networks see the image.
    """

    def __init__(self, training: Questions, features: Tensor, positions: list[int], sees: bool):
        self.training, self.features = training, features
        questions = [training.asked[position] for position in positions]
        counts = Counter(name for question in questions for name in features_of(question["prompt"]))
        self.vocabulary = {name: at for at, name in enumerate(sorted(name for name, n in counts.items() if n > 2))}
        given = Counter(question["references"][0] for question in questions)
        self.answers = [answer for answer, _ in given.most_common(ANSWERS)]
        self.center, self.scale = features.mean(0), features.std(0) + 1e-3
        number = {answer: at for at, answer in enumerate(self.answers)}
        self.known = [position for position in positions if training.asked[position]["references"][0] in number]
        self.labels = torch.tensor([number.get(question["references"][0], -1) for question in training.asked])
        self.networks, self.optimizers = [], []
        torch.manual_seed(0)
        for _ in range(NETWORKS):
            network = Answerer(len(self.vocabulary), features.shape[1], len(self.answers), sees=sees)
            self.networks.append(network)
            self.optimizers.append(torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1, fused=True))

    def train_pass(self) -> None:
        """Trains each network once on all the questions."""
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            network.train()
            order = [self.known[at] for at in torch.randperm(len(self.known)).tolist()]
            for chosen, words, starts in self.training.batches(self.vocabulary, order):
                scores = network(words, starts, self.standard(self.features[self.training.images[chosen]]))
                optimizer.zero_grad()
                nn.functional.cross_entropy(scores, self.labels[chosen]).backward()
                optimizer.step()
            network.eval()

    def standard(self, features: Tensor) -> Tensor:
        """Standardises features by the mean and deviation of the training images."""
        return (features - self.center) / self.scale

    @torch.no_grad()
    def __call__(
        self, questions: Questions, features: Tensor, positions: list[int], another: bool = False, samples: int = 1000
    ) -> dict:
        """Answers questions about their images, or about other images; returns what `judge` makes of it, with so many bootstrap samples."""
        images = questions.others if another else questions.images
        judged = []
        for chosen, words, starts in questions.batches(self.vocabulary, positions):
            seen = self.standard(features[images[chosen]])
            scores = sum(network(words, starts, seen).log_softmax(-1) for network in self.networks)
            for position, best in zip(chosen, scores.argmax(-1).tolist(), strict=True):
                judged.append({**questions.asked[position], "prediction": self.answers[best]})
        return {"task": "local", **judge(judged, samples)}


def accuracy(result: dict) -> float:
    """The share of right answers of a result."""
    (metric,) = result["metrics"].values()
    return metric["accuracy"]


def sets_of(tasks: Sequence[str], data: str) -> Iterator[tuple[str, list[EvaluationSet]]]:
    """Yields each task with its training and its held-out questions, of a folder laid out as `real_photos.py` says."""
    with tempfile.TemporaryDirectory() as temporary:
        prepare_photos(Path(data), Path(temporary))
        for task in tasks:
            folder = Path(temporary) / task
            yield (
                task,
                [
                    load_task("local", name, str(folder / f"{name}.jsonl"), image_dir=str(folder))
                    for name in FILES[task]
                ],
            )


def numbers_of(result: dict) -> dict[str, dict]:
    """The value and the interval of each of `NUMBERS` that a result has."""
    (metric,) = result["metrics"].values()
    return {
        number: {"value": metric[number], "interval": metric["intervals"].get(number)}
        for number in NUMBERS
        if metric.get(number) is not None
    }


def gains(other: dict, result: dict) -> dict[str, dict]:
    """The paired differences of a result to another, of `NUMBERS`."""
    return {number: gain for number, gain in compare(other, result).items() if number in NUMBERS}


def best_classifier(training: Questions, features: Tensor, sees: bool) -> tuple[Classifier, int]:
    """Trains networks as often over all questions as was best on a tenth of the images; returns them, and how often that was."""
    tenth = set(sorted({question["id"] for question in training.asked})[::10])
    inside, outside = (
        [at for at, question in enumerate(training.asked) if (question["id"] in tenth) == held]
        for held in (True, False)
    )
    classifier, tried = Classifier(training, features, outside, sees), []
    for _ in range(PASSES):
        classifier.train_pass()
        tried.append(accuracy(classifier(training, features, inside, samples=1)))
    passes = tried.index(max(tried)) + 1
    classifier = Classifier(training, features, list(range(len(training.asked))), sees)
    for _ in range(passes):
        classifier.train_pass()
    return classifier, passes


def measure(training: Questions, held_out: Questions, features: Tensor, features_held_out: Tensor) -> dict:
    """Trains networks with and without images, and judges their answers to the held-out questions.

    Returns:
        `passes`; `numbers`: for each number of the metric its `value` and `interval` with `image`, with `another_image`, and of `words` alone;
        `differences`: what the own image makes to the other two, with intervals.
    """
    passes, results = {}, {}
    all_held_out = list(range(len(held_out.asked)))
    for name, sees in (("words", False), ("image", True)):
        classifier, passes[name] = best_classifier(training, features, sees)
        results[name] = classifier(held_out, features_held_out, all_held_out)
    results["another_image"] = classifier(held_out, features_held_out, all_held_out, another=True)
    numbers = {}
    for name, result in results.items():
        for number, found in numbers_of(result).items():
            numbers.setdefault(number, {})[name] = found
    differences = {name: gains(results[name], results["image"]) for name in ("words", "another_image")}
    return {"questions": len(all_held_out), "passes": passes, "numbers": numbers, "differences": differences}


def table(found: dict) -> str:
    """The table of docs/results.md."""
    lines = [
        "| task | metric | words and image | another image | words alone | image over words (95% interval) | own over another image (95% interval) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, result in found["tasks"].items():
        for number, values in result["numbers"].items():
            cells = [f"{values[name]['value']:.3f}" for name in ("image", "another_image", "words")]
            for name in ("words", "another_image"):
                gain = result["differences"][name][number]
                low, high = gain["interval"]
                cells.append(f"{gain['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
            lines.append(f"| {task} | {NUMBERS[number]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_views(views: dict) -> str:
    """The table of docs/results.md about images of other sizes and maps in parts."""
    of_views = {f"{task}, {name}": result for name, found in views.items() for task, result in found["tasks"].items()}
    return table({"tasks": of_views})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--vision", required=True)
    p.add_argument("--tasks", nargs="+", choices=list(FILES), default=list(FILES))
    p.add_argument("--pixels", type=int, help="Height and width of the images. Default: the encoder's.")
    p.add_argument(
        "--cells", type=int, default=1, help="Parts of the map in each direction. Default: 1, the mean of all."
    )
    p.add_argument("--results", default=str(RESULTS), help="JSON file of the results.")
    arguments = p.parse_args()
    tasks = {}
    for task, sets in sets_of(arguments.tasks, arguments.data):
        features = [pooled_features(data, arguments.vision, arguments.pixels, arguments.cells) for data in sets]
        tasks[task] = measure(*map(Questions, sets), *features)
        print(task, tasks[task], flush=True)
    found = {"machine": machine(), "tasks": tasks}
    if (arguments.pixels, arguments.cells) == (None, 1):
        update_results(Path(arguments.results), "questions_and_images", found)
        print(table(found))
        return
    results, name = Path(arguments.results), "questions_and_images_views"
    views = json.loads(results.read_text()).get(name, {}) if results.is_file() else {}
    views[f"{arguments.pixels or 'own'} pixels, {arguments.cells} x {arguments.cells} cells"] = found
    update_results(results, name, views)
    print(table_of_views(views))


if __name__ == "__main__":
    main()
