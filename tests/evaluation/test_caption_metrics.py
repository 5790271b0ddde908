"""BLEU and ROUGE-L equal the official scorers, and wording counts what it says."""

import json
import random

import numpy as np
import pytest

from alignvlm.evaluation.judge import compare, judge, load_metric
from tests import examples


WORDS = "a the dog cat runs sleeps red blue on in two".split()


def random_captions(rng: random.Random, items: int) -> tuple[list[str], list[list[str]]]:
    def caption() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))

    return [caption() for _ in range(items)], [[caption() for _ in range(rng.randint(1, 5))] for _ in range(items)]


def official(name: str, predictions: list[str], references: list[list[str]]):
    """The number and the scores of each item, by pycocoevalcap; the texts hold nothing that its tokenizer would change."""
    scorers = {"bleu": ("pycocoevalcap.bleu.bleu", "Bleu"), "rouge_l": ("pycocoevalcap.rouge.rouge", "Rouge")}
    scorer = getattr(pytest.importorskip(scorers[name][0]), scorers[name][1])()
    options = {"verbose": 0} if name == "bleu" else {}
    given = [dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}]
    return scorer.compute_score(*given, **options)


def test_bleu_equals_pycocoevalcap():
    metric = load_metric("bleu")
    for seed in range(examples(20)):
        predictions, references = random_captions(random.Random(seed), 1 + 9 * seed)
        numbers, per_item = official("bleu", predictions, references)
        found = metric.compute(predictions=predictions, references=references)
        for n in range(1, 5):
            assert found[f"bleu_{n}"] == pytest.approx(numbers[n - 1], rel=1e-12, abs=1e-15)
            own = [item[f"bleu_{n}"] for item in found["per_item"]]
            np.testing.assert_allclose(own, per_item[n - 1], rtol=1e-12, atol=1e-15)


def test_rouge_l_equals_pycocoevalcap():
    metric = load_metric("rouge_l")
    for seed in range(examples(20)):
        predictions, references = random_captions(random.Random(seed), 1 + 9 * seed)
        number, per_item = official("rouge_l", predictions, references)
        found = metric.compute(predictions=predictions, references=references)
        assert found["rouge_l"] == pytest.approx(number, abs=1e-12)
        np.testing.assert_allclose(found["rouge_l_per_item"], per_item, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_scores_of_real_captioners_are_the_expected_ones(shared_data):
    """As pycocoevalcap with the Java tokenizer found them, from the untokenized captions on."""
    rows = [json.loads(line) for line in (shared_data / "metric_checks/coco_karpathy_test.jsonl").open()]
    expected = json.loads((shared_data / "metric_checks/expected_scores.json").read_text())["coco"]
    for captioner in ("magic", "zerocap"):
        captioned = [row for row in rows if captioner in row["predictions"]]
        given = {
            "predictions": [row["predictions"][captioner]["text"] for row in captioned],
            "references": [row["captions"] for row in captioned],
        }
        bleu, rouge = load_metric("bleu").compute(**given), load_metric("rouge_l").compute(**given)
        assert [bleu[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(expected[captioner]["Bleu"], abs=1e-9)
        assert rouge["rouge_l"] == pytest.approx(expected[captioner]["ROUGE_L"], abs=1e-9)


def predictions_of(texts: list[str], references: list[list[str]]) -> list[dict]:
    return [
        {"id": str(index // 2), "prompt": "?", "prediction": text, "references": group, "metric": "cider"}
        for index, (text, group) in enumerate(zip(texts, references))
    ]


def test_the_interval_of_bleu_is_that_of_the_corpus_number():
    """Every resample counts n-grams again, as if the drawn images were the corpus; a mean over images is another number."""
    texts, references = random_captions(random.Random(3), 60)
    result = judge(predictions_of(texts, references), samples=3, seed=5)
    images = sorted({str(index // 2) for index in range(60)})
    resamples = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=3)
    values = []
    for counts in resamples:
        drawn = [int(image) for image, count in zip(images, counts) for _ in range(count)]
        chosen = [index for image in drawn for index in (2 * image, 2 * image + 1)]
        given = {"predictions": [texts[i] for i in chosen], "references": [references[i] for i in chosen]}
        values.append(load_metric("bleu").compute(**given)["bleu_2"])
    numbers = result["metrics"]["bleu"]
    assert numbers["intervals"]["bleu_2"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), rel=1e-9)
    own = np.mean([item["scores"]["bleu_2"] for item in result["predictions"]])
    assert abs(own - numbers["bleu_2"]) > 0.01


def test_comparisons_of_captions_are_paired_for_every_number():
    texts, references = random_captions(random.Random(4), 40)
    better = [group[0] if index % 3 == 0 else text for index, (text, group) in enumerate(zip(texts, references))]
    first, second = ({"task": "any", **judge(predictions_of(each, references), 50)} for each in (texts, better))
    found = compare(first, second, samples=50)
    assert set(found) == {
        *("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "words", "empty", "repetition", "loops")
    }
    for metric, name in (("bleu", "bleu_4"), ("rouge_l", "rouge_l")):
        expected = second["metrics"][metric][name] - first["metrics"][metric][name]
        assert found[name]["difference"] == pytest.approx(expected) and found[name]["interval"][0] > 0
    old = {**first, "metrics": {"cider": first["metrics"]["cider"]}}  # of a file without these metrics
    assert set(compare(old, second, samples=10)) == {"cider"}


def test_wording_by_hand():
    answers = ["a dog runs", "A dog runs", "", "red red red red red", "see the cat see the cat see the cat", "a b a b"]
    found = load_metric("wording").compute(predictions=answers, references=[["x"]] * 6)
    per_item = found.pop("per_item")
    assert [item["words"] for item in per_item] == [3, 3, 0, 5, 9, 4]
    assert [item["repetition"] for item in per_item] == [0, 0, 0, 1 / 2, 1 / 2, 0]  # 2 sequences, 1 kind; 6, 3
    assert [item["loops"] for item in per_item] == [False, False, False, True, True, False]
    assert found == {
        "words": 4,
        "empty": pytest.approx(1 / 6),
        "repetition": pytest.approx(1 / 6),
        "loops": pytest.approx(2 / 6),
        "distinct": pytest.approx(5 / 6),
        "vocabulary": 8,
    }


def test_what_is_no_text_is_named():
    for name in ("bleu", "rouge_l"):
        with pytest.raises(ValueError, match=r"Item 1 needs at least one reference, each a string; it has \[\]"):
            load_metric(name).compute(predictions=["a", "b"], references=[["a"], []])
        with pytest.raises(ValueError, match="Prediction 0 is None"):
            load_metric(name).compute(predictions=[None], references=[["a"]])
