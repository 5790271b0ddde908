"""Rewards: each is its metric's score of the answer, in TRL's form."""

import pytest

from alignvlm.evaluation.judge import judge, load_metric
from alignvlm.evaluation.rewards import REWARDS, make_rewards


CAPTIONS = [
    ["A red circle.", "a circle in red"],
    ["A blue square and a red cross."],
    ["A dog on a couch.", "A dog sleeps on a sofa."],
]
ANSWERS = ["a red circle", "a red circle and a blue square", "a dog and a cat on a couch"]
COLUMNS = {"references": CAPTIONS, "metric": ["cider"] * 3, "kinds": ["short_caption"] * 3, "choices": [None] * 3}


def said(texts: list[str]) -> list[list[dict]]:
    """Completions as TRL gives them for conversations."""
    return [[{"role": "assistant", "content": f" {text}\n"}] for text in texts]


def test_cider_is_the_metrics_with_the_training_captions_frequencies():
    training = [*CAPTIONS, ["A green triangle."], ["A red square."]]
    (reward,) = make_rewards(["cider"], training)
    metric = load_metric("cider")
    frequencies = metric.document_frequencies(training)
    expected = metric.compute(predictions=ANSWERS, references=CAPTIONS, document_frequencies=frequencies)
    assert reward([None] * 3, said(ANSWERS), trainer_state=None, **COLUMNS) == expected["cider_per_item"]
    assert reward([None] * 3, ANSWERS, **COLUMNS) == expected["cider_per_item"]  # texts, too
    assert min(expected["cider_per_item"]) > 0 and len(set(expected["cider_per_item"])) == 3
    alone = metric.compute(predictions=ANSWERS, references=CAPTIONS)["cider_per_item"]
    assert expected["cider_per_item"] != alone
    # An answer's reward does not depend on the others of its batch.
    for index, value in enumerate(expected["cider_per_item"]):
        columns = {name: values[index : index + 1] for name, values in COLUMNS.items()}
        assert reward([None], said(ANSWERS[index : index + 1]), **columns) == [value]


def test_chair_is_minus_the_share_of_hallucinated_object_words():
    (reward,) = make_rewards(["chair"], [])
    items = load_metric("chair").compute(predictions=ANSWERS, references=CAPTIONS)["per_item"]
    assert [len(item["mentioned"]) for item in items] == [0, 0, 3] and items[2]["hallucinated"] == ["cat"]
    assert reward([None] * 3, said(ANSWERS), **COLUMNS) == [0, 0, pytest.approx(-1 / 3)]


def test_accuracy_is_the_judges_score_of_each_answer_by_its_own_metric():
    questions = [
        ("pathvqa_accuracy", "Yes.", ["yes"], None),
        ("cider", "a red circle", ["A red circle."], None),
        ("vqa_accuracy", "two", ["2", "2", "two", "3", "3", "3", "3", "3", "3", "3"], None),
        ("pathvqa_accuracy", "left lung", ["the lung"], None),
        ("choice_accuracy", "B", ["B"], ["one", "two"]),
        (None, "whatever", ["else"], None),
    ]
    metrics, answers, references, choices = map(list, zip(*questions))
    (reward,) = make_rewards(["accuracy"], [])
    columns = {"references": references, "metric": metrics, "kinds": ["question"] * 6, "choices": choices}
    found = reward([None] * 6, said(answers), **columns)
    assert found[1] is None and found[5] is None  # not its own to judge: TRL leaves these out
    for index in (0, 2, 3, 4):
        metric, answer, accepted, own = questions[index]
        item = {
            "id": "0",
            "prompt": "?",
            "prediction": answer,
            "references": accepted,
            "metric": metric,
            "choices": own,
        }
        number, (score, _) = next(iter(load_metric(metric).means.items()))
        judged = judge([item], samples=10)
        assert found[index] == float(judged["predictions"][0]["scores"][score]) == judged["metrics"][metric][number]
    assert found[0] == found[4] == 1 and found[3] == 0 and 0 < found[2] < 1


def test_accuracy_leaves_out_metrics_of_several_answers_together():
    """MME judges the two answers about an image together, and a reward sees one."""
    (reward,) = make_rewards(["accuracy"], [])
    assert not reward.judges("mme") and reward.judges("pope")
    columns = {"references": [["yes"], ["yes"]], "metric": ["mme", "pope"], "kinds": ["count", ""]}
    assert reward([None] * 2, said(["Yes.", "Yes."]), **columns) == [None, 1]


def test_bad_rewards_are_named():
    with pytest.raises(ValueError, match=r"There is no reward .cidre.\. Valid values: cider, accuracy, chair"):
        make_rewards(["cidre"], CAPTIONS)
    with pytest.raises(ValueError, match="`cider` needs captions, and the sources hold none"):
        make_rewards(["cider"], [])
    assert [reward.__name__ for reward in make_rewards(REWARDS, CAPTIONS)] == list(REWARDS)  # their names in TRL's log
