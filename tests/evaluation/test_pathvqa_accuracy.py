"""Accuracy of short answers: the official normal form rule by rule, and every number on answers worked out by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import examples


FOLDER = Path(__file__).parents[2] / "alignvlm/evaluation/metrics/pathvqa_accuracy"
spec = importlib.util.spec_from_file_location("vqa_normalisation", FOLDER / "vqa_normalisation.py")
vqa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vqa)


@pytest.fixture(scope="module")
def accuracy():
    return evaluate.load(str(FOLDER))


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" Yes.\n", "yes"),
        ("the\tliver", "liver"),
        ("a, b", "b"),  # the comma stands next to a space: deleted; then "a" is an article
        ("x-ray", "x ray"),  # a hyphen between letters becomes a space
        ("t -shirt", "t shirt"),  # next to a space it is deleted
        ("x-ray and t -shirt", "xray and t shirt"),  # ... everywhere in the answer
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: all marks are deleted
        ("3.5 cm.", "3.5 cm"),
        ("v.2", "v.2"),  # a digit follows: kept
        ("none", "0"),
        ("Two cells", "2 cells"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table's slip
        ("lets", "lets"),
        ("dog's", "dog's"),  # apostrophes and colons are no punctuation here
        ("10:30", "10:30"),
        ("." * 40, "." * 8),  # the official code removes 32 at most
        ("an", ""),
        ("", ""),
    ],
)
def test_normal_form(answer, normal):
    assert vqa.normalise(answer) == normal


def test_every_contraction_is_restored_from_each_lost_apostrophe():
    assert len(vqa.CONTRACTIONS) == 114
    for wrong, right in vqa.CONTRACTIONS.items():
        assert vqa.normalise(wrong) == right
        assert len(right) == len(wrong) + 1 or wrong == "somebody'd"


def test_every_number_by_hand(accuracy):
    predictions = ["Yes.", "normal", "no", "in the liver", "two cells", "bone"]
    references = ["yes", "no", " No", "liver", "2 cell bodies", "marrow"]
    found = accuracy.compute(predictions=predictions, references=references)
    per_item = found.pop("per_item")
    assert found == {
        "accuracy": pytest.approx(2 / 6),
        "yes_no_accuracy": pytest.approx(2 / 3),
        "free_form_accuracy": 0.0,
        "free_form_recall": pytest.approx((1 + 1 / 3 + 0) / 3),
        "free_form_f1": pytest.approx((2 / 3 + 2 / 5 + 0) / 3),  # "in liver" / "liver"; "2 cells" / "2 cell bodies"
        "majority_accuracy": pytest.approx(2 / 6),
        "majority_yes_no_accuracy": pytest.approx(2 / 3),
        "majority_free_form_accuracy": pytest.approx(1 / 3),
        "count": 6,
        "yes_no_count": 3,
        "free_form_count": 3,
        "llava_med_closed": 1.0,  # "normal" contains "no"
        "yes_no_strict": pytest.approx(1 / 3),  # "Yes." is not "yes"
    }
    assert [item["correct"] for item in per_item] == [True, False, True, False, False, False]
    assert [item["yes_no"] for item in per_item] == [True, True, True, False, False, False]
    assert per_item[3] == {"yes_no": False, "correct": False, "recall": 1.0, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("prediction", "reference", "correct"),
    [
        ("", "A", False),
        (" \n", "A", False),
        ("the", "A", False),
        (".", "A", False),
        ("liver", "A", False),
        ("A", "A", True),
        ("a.", "A", True),
        ("Yes", "yes", True),
        ("the a", "A", False),
        ("", "the", False),
        ("The", "the", True),
        ("+", "+", True),  # deleted in the normal form: compared as it is written
        ("-", "+", False),
        ("", "+", False),
        ("", "", False),
        (".", ".", True),
        ("the liver", "Liver.", True),
    ],
)
def test_an_empty_answer_is_wrong(accuracy, prediction, reference, correct):
    found = accuracy.compute(predictions=[prediction], references=[reference])
    assert found["accuracy"] == float(correct)
    if reference != "yes" and prediction != "the a":  # which holds the word "a"
        assert found["free_form_recall"] == found["free_form_f1"] == float(correct)


def test_answers_without_a_normal_form_are_not_all_the_same_for_the_majority(accuracy):
    found = accuracy.compute(predictions=["x"] * 6, references=["A", "A", "the", "+", "", ""])
    assert found["majority_accuracy"] == pytest.approx(2 / 6)  # "A"; nothing is right for an empty reference
    assert accuracy.compute(predictions=["x"], references=[""])["majority_accuracy"] == 0.0


# Of the characters and words that the rules treat, so that equal and empty normal forms are frequent.
pieces = st.sampled_from(
    ["a", "A", "an", "the", " ", "\n", ".", ",", "-", "+", "'", "1", "one", "dont", "yes", "No", "x"]
)
texts = st.one_of(st.text(), st.lists(pieces, max_size=4).map("".join))


@settings(max_examples=examples(150), deadline=None)
@given(texts, texts)
def test_wherever_the_reference_has_a_normal_form_the_value_is_the_official_one(accuracy, prediction, reference):
    judge = sys.modules[type(accuracy).__module__]._judge
    correct = judge(prediction, reference)["correct"]
    if vqa.normalise(reference):
        assert correct == (vqa.normalise(prediction) == vqa.normalise(reference))
    else:
        assert correct <= bool(prediction.strip())
        assert judge(reference, reference)["correct"] == bool(reference.strip())


def test_repeated_words_count_as_often_as_they_occur(accuracy):
    found = accuracy.compute(predictions=["red red red"], references=["red blue"])
    assert (found["free_form_recall"], found["free_form_f1"]) == (0.5, 0.4)


def test_a_kind_without_questions_is_none_and_not_zero(accuracy):
    found = accuracy.compute(predictions=["liver"], references=["kidney"])
    for name in ("yes_no_accuracy", "majority_yes_no_accuracy", "llava_med_closed", "yes_no_strict"):
        assert found[name] is None
    assert found["accuracy"] == 0.0
    found = accuracy.compute(predictions=["yes"], references=["yes"])
    for name in ("free_form_accuracy", "majority_free_form_accuracy", "free_form_recall", "free_form_f1"):
        assert found[name] is None


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "at least one prediction"),
        (["a", None], ["a", "b"], "Prediction 1 is None"),
        (["a"], [2], "Reference 0 is 2"),
        (["a", "b"], ["a"], "Mismatch"),
    ],
)
def test_unusable_input_is_named_and_leaves_what_was_added(accuracy, predictions, references, message):
    accuracy.add(prediction="a", reference="a")
    with pytest.raises(ValueError, match=message):
        accuracy.add_batch(predictions=predictions, references=references)
    assert accuracy.compute()["count"] == 1


def test_pathvqa_references_are_their_own_right_answers(accuracy, shared_data):
    rows = [json.loads(line) for line in (shared_data / "pathvqa/qa.jsonl").open()]
    answers = [row["answer"] for row in rows if row["split"] == "val"]
    found = accuracy.compute(predictions=answers, references=answers)
    assert found["accuracy"] == found["yes_no_accuracy"] == found["free_form_recall"] == found["free_form_f1"] == 1.0
    assert found["count"] == 6279
    assert found["yes_no_count"] == sum(answer.strip().lower() in ("yes", "no") for answer in answers)
    assert found["majority_yes_no_accuracy"] > 0.5
