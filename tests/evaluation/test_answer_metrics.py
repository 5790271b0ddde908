"""Metrics of answers equal the official code, whose scores `record_official_scores.py` recorded, and refuse what cannot be judged."""

import json

import numpy as np
import pytest

from alignvlm.evaluation.judge import judge, load_metric
from tests.evaluation.record_official_scores import RECORDED


OFFICIAL = json.loads(RECORDED.read_text())


def computed(name: str, **columns) -> dict:
    return load_metric(name).compute(**columns)


def test_anls_equals_the_official_code():
    predictions, references, scores = map(list, zip(*OFFICIAL["anls"]))
    found = computed("anls", predictions=predictions, references=references)
    assert found["anls_per_item"] == pytest.approx(scores, abs=1e-12)
    assert found["anls"] == pytest.approx(sum(scores) / len(scores))
    assert 0.5 in scores and any(0.5 < score < 1 for score in scores) and scores.count(0) > 10


def test_half_of_the_characters_right_counts():
    """The official code keeps 0.5; the equation of the paper does not."""
    assert computed("anls", predictions=["ab", "a"], references=[["ac"], ["bcd"]])["anls_per_item"] == [0.5, 0.0]


def test_relaxed_accuracy_equals_the_official_code():
    predictions, references, right = map(list, zip(*OFFICIAL["relaxed_accuracy"]))
    found = computed("relaxed_accuracy", predictions=predictions, references=references)
    assert found["relaxed_accuracy_per_item"] == right
    assert 50 < sum(right) < 350


def test_vqa_accuracy_equals_the_official_code():
    predictions, references, scores = map(list, zip(*OFFICIAL["vqa_accuracy"]))
    found = computed("vqa_accuracy", predictions=predictions, references=references)
    for name, position in (("vqa_accuracy", 0), ("vqa_accuracy_evalai", 1)):
        own = [item[name] for item in found["per_item"]]
        assert own == pytest.approx([score[position] for score in scores], abs=1e-12), name
    assert len({round(score[0], 2) for score in scores}) > 3


def test_ocrbench_equals_the_official_code():
    predictions, references, kinds, right = map(list, zip(*OFFICIAL["ocrbench"]))
    found = computed("ocrbench", predictions=predictions, references=references, kinds=kinds)
    assert found["ocrbench_per_item"] == [bool(score) for score in right] and 30 < sum(right) < 170


def test_letters_are_read_as_by_llava():
    predictions, references, choices, right = map(list, zip(*OFFICIAL["choices"]))
    given = {"predictions": predictions, "references": references, "choices": choices}
    found = computed("choice_accuracy", **given, likelihoods=[[]] * len(choices), letters=[[]] * len(choices))
    assert [item["correct"] for item in found["per_item"]] == [score == 1 for score in right] and 10 < sum(right) < 150
    assert found["choice_accuracy_by_likelihood"] is None
    assert found["chance"] == pytest.approx(sum(1 / len(each) for each in choices) / len(choices))


def test_the_likeliest_choice_is_counted_by_tokens_and_as_a_whole():
    none = {"without_image": None, "without_question": None}
    sums = [[(-3.0, 1), (-4.0, 4)], [(-1.0, 1), (-9.0, 2)]]
    likelihoods = [[{"sum": total, "tokens": tokens, **none} for total, tokens in group] for group in sums]
    given = {"predictions": ["B", "C"], "references": ["B", "A"], "choices": [["x", "y"]] * 2}
    found = computed("choice_accuracy", **given, likelihoods=likelihoods, letters=[[], []])
    assert (found["choice_accuracy_by_likelihood"], found["choice_accuracy_by_sum"]) == (1.0, 0.5)
    assert (found["choice_accuracy"], found["no_letter"], found["chance"]) == (0.5, 0.5, 0.5)
    assert [item["likeliest"] for item in found["per_item"]] == ["B", "A"]
    unmeasured = ("letter", "letter_calibrated", "pmi", "image")
    assert all(found[f"choice_accuracy_by_{way}"] is None for way in unmeasured) and found["letter_prior"] == {}


def test_what_is_likely_anyway_is_divided_out():
    """The second choice is likely whatever is asked; what the question and the image add favours the first."""
    first = {"sum": -9.0, "tokens": 3, "without_question": -30.0, "without_image": -10.0}
    second = {"sum": -4.0, "tokens": 2, "without_question": -5.0, "without_image": -4.5}
    given = {"predictions": ["?"] * 2, "references": ["A", "A"], "choices": [["x", "y"]] * 2, "letters": [[], []]}
    unseen = [{**each, "without_image": None} for each in (first, second)]
    found = computed("choice_accuracy", **given, likelihoods=[[first, second], unseen])
    assert (found["choice_accuracy_by_likelihood"], found["choice_accuracy_by_sum"]) == (0.0, 0.0)
    assert (found["choice_accuracy_by_pmi"], found["choice_accuracy_by_image"]) == (1.0, 1.0)
    assert [item["has_by_image"] for item in found["per_item"]] == [True, False]


def test_a_taste_for_a_letter_is_divided_out():
    """A model knows the answers but likes C: where each choice has stood at each letter once, that taste is all that is left, exactly."""
    generator = np.random.default_rng(0)
    taste = np.log([0.1, 0.2, 0.6, 0.1])
    known = generator.normal(size=(40, 4))
    observed = [[taste + np.roll(own, -shift) for shift in range(4)] for own in known]
    # One question in four is asked in every rotation; a constant added to all letters, as the end token's likelihood is, changes nothing.
    letters = [
        [list(row - 3) for row in (rows if index % 4 == 0 else rows[:1])] for index, rows in enumerate(observed)
    ]
    letters.append([[-1.0, -2.0]])  # no question with two choices was rotated
    references = ["ABCD"[own.argmax()] for own in known] + ["A"]
    choices = [list("wxyz")] * 40 + [["x", "y"]]
    given = {"predictions": ["?"] * 41, "references": references, "choices": choices, "likelihoods": [[]] * 41}
    found = computed("choice_accuracy", **given, letters=letters)
    assert found["letter_prior"] == {"4": pytest.approx([0.1, 0.2, 0.6, 0.1])}
    assert found["choice_accuracy_by_letter_calibrated"] == 1.0 and found["choice_accuracy_by_letter"] < 0.9
    last = found["per_item"][-1]
    assert last["by_letter"] and not last["has_by_letter_calibrated"] and not last["has_by_likelihood"]


def test_mme_equals_the_official_code():
    predictions, references, kinds, ids = map(list, zip(*OFFICIAL["mme"]["items"]))
    found = computed("mme", predictions=predictions, references=references, kinds=kinds, ids=ids)
    for name, score in OFFICIAL["mme"]["scores"].items():
        assert found[name.removesuffix("_score")] == pytest.approx(score), name
    with pytest.raises(ValueError, match=r"two questions about an image; 'a.png' \(count\) has 1"):
        computed("mme", predictions=["yes"], references=["yes"], kinds=["count"], ids=["a.png"])
    with pytest.raises(ValueError, match=r"no category 'size'\. Its categories: existence"):
        computed("mme", predictions=["yes"] * 2, references=["yes", "no"], kinds=["size"] * 2, ids=["a.png"] * 2)
    assert computed("mme", predictions=["y"] * 2, references=["Yes", "No"], kinds=["OCR"] * 2, ids=["a"] * 2)["mme_cognition"] is None  # fmt: skip


def test_objects_in_captions_are_the_official_ones():
    from alignvlm.evaluation.metrics.chair.coco_objects import OBJECT_OF, OBJECTS, objects_in

    assert len(OBJECTS) == 80 and set(OBJECT_OF.values()) == set(OBJECTS)
    for caption, objects in OFFICIAL["chair"]:
        assert objects_in(caption) == objects, caption
    assert sum(bool(objects) for _, objects in OFFICIAL["chair"]) > 150
    assert [name for name in OBJECTS if objects_in(name) != [name]] == ["bus"]  # "bu" in the official singular


def test_chair_by_hand():
    captions = ["A dog and two cats on a couch.", "A man holds a wine glass.", "A sunset."]
    references = [["dog", "couch", "a dog sleeps"], ["person", "bus"], ["A bench by the sea"]]
    found = computed("chair", predictions=captions, references=references)
    assert found["chair_i"] == pytest.approx(2 / 5) and found["chair_s"] == pytest.approx(2 / 3)
    assert found["chair_recall"] == pytest.approx(3 / 5) and found["chair_objects"] == pytest.approx(5 / 3)
    assert [item["hallucinated"] for item in found["per_item"]] == [["cat"], ["wine glass"], []]
    nothing = computed("chair", predictions=["x"], references=[["y"]])
    assert nothing["chair_i"] is None and nothing["chair_recall"] is None and nothing["chair_s"] == 0


def test_pope_equals_the_official_script():
    predictions, references = map(list, zip(*OFFICIAL["pope"]["items"]))
    found = computed("pope", predictions=predictions, references=references)
    names = {
        "Accuracy": "accuracy",
        "Precision": "precision",
        "Recall": "recall",
        "F1 score": "f1",
        "Yes ratio": "yes",
    }
    for official, name in names.items():
        assert found[f"pope_{name}"] == pytest.approx(float(OFFICIAL["pope"]["scores"][official])), name
    nobody = computed("pope", predictions=["no"], references=["no"])
    assert nobody["pope_precision"] is None and nobody["pope_f1"] is None and nobody["pope_recall"] is None


def test_pope_is_judged_apart_for_each_way_to_choose_objects():
    predictions = [
        {"id": str(i), "prompt": "?", "prediction": p, "references": [r], "kind": kind, "metric": "pope"}
        for i, (p, r, kind) in enumerate(
            [("Yes", "yes", "a"), ("No", "yes", "a"), ("Yes", "no", "b"), ("No", "no", "b")]
        )
    ]
    numbers = judge(predictions, samples=50)["metrics"]["pope"]
    own = numbers["by_kind"]
    assert (own["a"]["pope_f1"], own["b"]["pope_f1"], numbers["pope_f1"]) == (pytest.approx(2 / 3), 0.0, 0.5)
    assert own["b"]["pope_recall"] is None and own["a"]["count"] == 2
    low, high = numbers["intervals"]["pope_f1"]
    assert 0 <= low < 0.5 < high <= 1


def test_what_cannot_be_judged_is_named():
    for name in ("anls", "relaxed_accuracy", "vqa_accuracy", "pope"):
        with pytest.raises(ValueError, match=r"Prediction 1 is 3, not a string\. Use '' for an empty answer"):
            computed(name, predictions=["a", 3], references=["a", "b"])
        with pytest.raises(ValueError, match=f"{name} needs at least one prediction"):
            computed(name, predictions=[], references=[])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_answers_of_too_few_people_are_refused_by_vqa_accuracy(count):
    """With one, every right answer scored 0; with two 0.33, with three 0.67."""
    people = ["yes"] * count
    with pytest.raises(
        ValueError,
        match=rf"needs at least 4 people's answers to a question; one has {count}: .*--metric pathvqa_accuracy",
    ):
        computed("vqa_accuracy", predictions=["yes", "yes"], references=[["yes"] * 10, people])
    assert computed("vqa_accuracy", predictions=["yes"], references=[["yes"] * 4])["vqa_accuracy"] == 1
