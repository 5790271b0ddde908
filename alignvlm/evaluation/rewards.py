"""The metrics as rewards of single answers, in the form that TRL's trainers call.

`reward(prompts, completions, **columns)` returns a number per completion, or None where it does not judge: captions are judged by `cider`
and `chair`, all other answers by `accuracy`. `docs/reward.md` says when to use which.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from typing import Any

from alignvlm.evaluation.judge import computed, load_metric


CIDER = "cider"


class Reward(ABC):
    """A reward function of TRL.

    Args:
        training_references: the references of every caption that is trained, for what a metric must know beyond one answer.
    """

    name: str  # in `REWARDS`, a recipe's `rewards` and TRL's log

    def __init__(self, training_references: Iterable[list[str]] = ()):
        self.__name__ = self.name

    def __call__(
        self, prompts: list, completions: list, references: list[list[str]], metric: list[str | None], **columns: Any
    ) -> list[float | None]:
        """Returns the reward of each completion.

        Args:
            prompts: not read.
            completions: messages of the assistant in a list each, as TRL gives them for conversations, or texts.
            references: the accepted answers to each.
            metric: what judges each: see `DataSet.metric_of`. None: nothing does.
            **columns: `kinds` and `choices`, for metrics that ask for them; all others are not read.
        """
        items = [
            {"prediction": text_of(completion), "references": accepted, "metric": by, "kind": kind, "choices": choices}
            for completion, accepted, by, kind, choices in zip(
                completions,
                references,
                metric,
                columns.get("kinds") or [""] * len(completions),
                columns.get("choices") or [None] * len(completions),
                strict=True,
            )
        ]
        chosen = [index for index, item in enumerate(items) if self.judges(item["metric"])]
        rewards: list[float | None] = [None] * len(items)
        for index, value in zip(chosen, self.of([items[index] for index in chosen]), strict=True) if chosen else ():
            rewards[index] = value
        return rewards

    @abstractmethod
    def judges(self, metric: str | None) -> bool:
        """Whether it judges answers of this metric."""

    @abstractmethod
    def of(self, items: list[dict]) -> list[float | None]:
        """Returns the rewards of items that it judges; at least one."""


class Cider(Reward):
    """CIDEr-D of a caption. A word weighs as much as it is rare among the captions that are trained."""

    name = "cider"

    def __init__(self, training_references: Iterable[list[str]] = ()):
        super().__init__(training_references)
        self.metric = load_metric(CIDER)
        references = list(training_references)
        if not references:
            raise ValueError(
                "The reward `cider` needs captions, and the sources hold none. Name some, or leave it out."
            )
        self.frequencies = self.metric.document_frequencies(references)

    def judges(self, metric: str | None) -> bool:
        return metric == CIDER

    def of(self, items: list[dict]) -> list[float]:
        _, scores = computed(self.metric, items, document_frequencies=self.frequencies)
        return [score["cider"] for score in scores]


class Accuracy(Reward):
    """The first score of the answer's own metric, as `alignvlm evaluate` judges it: 1 for a right answer, 0 for a wrong one, or between.

    Metrics that judge the answers about an image together, such as MME's, are left out.
    """

    name = "accuracy"

    def judges(self, metric: str | None) -> bool:
        return metric not in (None, CIDER) and not _judges_together(metric)

    def of(self, items: list[dict]) -> list[float | None]:
        rewards: dict[int, float | None] = {}
        for name in dict.fromkeys(item["metric"] for item in items):
            metric = load_metric(name)
            score, where = next(iter(metric.means.values()))
            own = [index for index, item in enumerate(items) if item["metric"] == name]
            _, scores = computed(metric, [items[index] for index in own])
            for index, found in zip(own, scores, strict=True):
                counts = all(found[key] == value for key, value in where.items())
                rewards[index] = float(found[score]) if counts else None
        return [rewards[index] for index in range(len(items))]


@cache
def _judges_together(metric: str) -> bool:
    """Whether a metric asks which answers belong together, which no single answer tells."""
    return "ids" in load_metric(metric).features


class Chair(Reward):
    """Minus the share of a caption's object words that name something its references do not; 0 for a caption without any."""

    name = "chair"

    def __init__(self, training_references: Iterable[list[str]] = ()):
        super().__init__(training_references)
        self.metric = load_metric("chair")

    def judges(self, metric: str | None) -> bool:
        return metric == CIDER

    def of(self, items: list[dict]) -> list[float]:
        _, scores = computed(self.metric, items)
        return [-len(score["hallucinated"]) / max(len(score["mentioned"]), 1) for score in scores]


REWARDS: dict[str, type[Reward]] = {kind.name: kind for kind in (Cider, Accuracy, Chair)}


def make_rewards(names: Iterable[str], training_references: Iterable[list[str]]) -> list[Reward]:
    """Makes the rewards of these names; `training_references` as for `Reward`.

    Raises:
        ValueError: for an unknown name.
    """
    references = list(training_references)
    for name in names:
        if name not in REWARDS:
            raise ValueError(f"There is no reward {name!r}. Valid values: {', '.join(REWARDS)}.")
    return [REWARDS[name](references) for name in names]


def text_of(completion: str | list[dict]) -> str:
    """Returns what a completion says, stripped of surrounding white space as `answer` strips answers."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
