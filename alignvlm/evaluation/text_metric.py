"""The base of the metrics that need this package: texts judged by references, and a sentence for anything else.

A metric's module imports this module, not the class: `evaluate.load` takes the first metric class that it finds in a module.
"""

import datasets
import evaluate


TEXT = datasets.Value("string")
TEXTS = datasets.List(TEXT)


class TextMetric(evaluate.Metric):
    """A metric of texts. `alignvlm/evaluation/judge.py` says what `means`, `of_sums` and the other names are.

    Args:
        about: what it measures, and whose convention that is; goes into result files.
        numbers: what `compute` takes and returns.
        citation: in BibTeX.
        sources: pages of the paper and the official code.
        columns: the features it gets.
    """

    about = ""
    numbers = ""
    citation = ""
    sources: tuple[str, ...] = ()
    columns: dict[str, datasets.Value | datasets.List] = {"predictions": TEXT, "references": TEXTS}
    means: dict = {}
    of_sums: dict = {}
    per_prompt: tuple[str, ...] = ()
    per_kind: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    headlines: tuple[str, ...] | None = None

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.about,
            citation=self.citation,
            inputs_description=self.numbers,
            features=datasets.Features(self.columns),
            reference_urls=list(self.sources),
        )

    def add(self, *, prediction=None, reference=None, **others) -> None:
        """Adds one item. See `compute`."""
        self.add_batch(predictions=[prediction], references=[reference], **others)

    def add_batch(self, *, predictions=None, references=None, **others) -> None:
        """Adds items after checking them: a refused batch leaves earlier items as they were. See `compute`.

        Raises:
            ValueError: without predictions, for an item without references, and for what is not text. An empty prediction is allowed.
        """
        if not predictions:
            raise ValueError(f"{self.name} needs at least one prediction; got none.")
        for index, prediction in enumerate(predictions):
            if not isinstance(prediction, str):
                raise ValueError(f"Prediction {index} is {prediction!r}, not a string. Use '' for an empty answer.")
        if self.columns["references"] == TEXTS:
            references = [[group] if isinstance(group, str) else group for group in references or []]
        for index, group in enumerate(references or []):
            texts = group if isinstance(group, list | tuple) else [group]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"Item {index} needs at least one reference, each a string; it has {group!r}.")
        self.check_references(references)
        super().add_batch(predictions=predictions, references=references, **others)

    def check_references(self, references: list | None) -> None:
        """Refuses references by which this metric cannot judge, before any question is asked; by default none.

        Raises:
            ValueError: with the references of the first such item.
        """


def mean(items: list[dict], score: str) -> float | None:
    """Returns the mean of a score of items; None without any."""
    return sum(item[score] for item in items) / len(items) if items else None
