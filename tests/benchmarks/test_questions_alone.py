"""The classifier that answers questions from their words alone."""

import json

import pytest
import torch

from benchmarks.questions_alone import QuestionClassifier, features_of, measure, read, table


def test_features_are_the_words_and_all_two_and_three_in_a_row():
    assert features_of("Is it, red?") == {
        *("<", "is", "it", "red", ">"),
        *("< is", "is it", "it red", "red >"),
        *("< is it", "is it red", "it red >"),
    }


QUESTIONS = [f"what is {thing} {number} made of?" for thing in ("table", "lamp", "cup") for number in range(5)]
ANSWERS = ["wood"] * 5 + ["metal"] * 5 + ["clay"] * 5


def test_it_is_the_optimum_of_the_penalised_cross_entropy():
    classifier = QuestionClassifier(QUESTIONS, ANSWERS, penalty=1e-2)
    logits = classifier.matrix(QUESTIONS) @ classifier.weights + classifier.bias
    labels = torch.tensor([classifier.answers.index(answer) for answer in ANSWERS])
    loss = torch.nn.functional.cross_entropy(logits, labels) + 1e-2 * classifier.weights.square().sum()
    gradients = torch.autograd.grad(loss, [classifier.weights, classifier.bias])
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    assert "table" in classifier.features and "table 1" not in classifier.features  # seen once
    assert classifier(["what is the lamp?", "what is the cup made of?"]) == ["metal", "clay"]


def test_only_the_most_frequent_answers_are_given():
    classifier = QuestionClassifier([*QUESTIONS, "what is it?"], [*ANSWERS, "wood"], penalty=1e-3, answers_known=1)
    assert classifier(["what is the lamp made of?", "why?"]) == ["wood", "wood"]


def test_answers_are_judged_as_a_model_s_and_no_image_is_read(tmp_path):
    files = {}
    for name, count in (("train", 60), ("test", 12)):
        rows = [
            {"image": f"{name}{index}.jpg", "question": f"is the {colour} thing here?", "answer": answer}
            for index in range(count)
            for colour, answer in (("red", "yes"), ("blue", "no"))
        ]
        rows += [{"image": f"{name}0.jpg", "question": "what is here?", "answer": "a thing"}] * 3
        files[name] = tmp_path / f"{name}.jsonl"
        rows += [{"image": "other.jpg", "question": "what is there?", "answer": "never seen"}] * (name == "test")
        files[name].write_text("\n".join(map(json.dumps, rows)))
    found = measure(read(files["train"], "train"), read(files["test"], "test"))
    assert found["numbers"]["yes_no_accuracy"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert (found["questions"], found["training_questions"]) == (26, 121)  # exact duplicates are asked once
    lines = table({"tasks": {"made up": found}}).splitlines()
    assert "| made up | yes/no accuracy | 1.000 (1.000 to 1.000) |" in lines
    assert found["numbers"]["accuracy"]["value"] == pytest.approx(25 / 26)  # no training question has the last answer
