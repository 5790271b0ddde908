"""Judging predictions, wherever they come from, and a metric that is only a folder and its name."""

import pytest

from alignvlm.data import scenes
from alignvlm.data.formats import CAPTION_PROMPT, DETAILED_PROMPT
from alignvlm.evaluation import bootstrap
from alignvlm.evaluation import judge as judging
from alignvlm.evaluation.judge import compare, judge
from tests.records import exchanges_of


LENGTH_METRIC = """
import datasets
import evaluate


class Length(evaluate.Metric):
    means = {"length": ("length", {}), "length_of_long": ("length", {"long": True})}
    per_prompt = ("length_of_long",)

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": REFERENCES})
        return evaluate.MetricInfo(description="Length of answers.", citation="", features=features)

    def _compute(self, predictions, references):
        assert all(isinstance(reference, KIND) for reference in references)
        items = [{"length": len(text), "long": len(text) > 3} for text in predictions]
        return {"length": sum(map(len, predictions)) / len(predictions), "shortest": min(map(len, predictions)), RETURNED}
"""


def test_a_prompt_answered_rightly_has_its_own_number():
    """Short captions all wrong and detailed ones all right are not told by their mean alone."""
    drawn = scenes.make_scenes(6, "test", ("short_caption", "detailed_caption"))
    predictions = []
    for index, record in enumerate(drawn):
        exchanges = exchanges_of(record)
        for (prompt, response), written in zip(exchanges, ["Nothing.", exchanges[1][1]]):
            asked = {"id": str(index), "prompt": prompt, "references": [response]}
            predictions.append({**asked, "prediction": written, "metric": "cider"})
    own = judge(predictions, samples=20)["metrics"]["cider"]["by_prompt"]
    assert own[CAPTION_PROMPT]["cider"] == 0
    assert own[DETAILED_PROMPT]["cider"] > 5


def predictions_of(metric: str, *texts: str) -> list[dict]:
    return [
        {"id": str(i // 2), "prompt": f"Question {i % 2}", "prediction": t, "references": ["a", "b"], "metric": metric}
        for i, t in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("references", "kind", "returned"),
    [
        ("text", "str", '"per_item": items'),
        ("datasets.List(text)", "list", '"length_per_item": [i["length"] for i in items], "long_per_item": [i["long"] for i in items]'),
    ],
)  # fmt: skip
def test_a_metric_is_a_folder_and_its_name(tmp_path, monkeypatch, references, kind, returned):
    """Nothing else knows which of its numbers are means, and over what."""
    monkeypatch.setattr(judging, "METRICS", tmp_path)
    name = f"length_{kind}"
    (tmp_path / name).mkdir()
    code = LENGTH_METRIC.replace("REFERENCES", references).replace("KIND", kind).replace("RETURNED", returned)
    (tmp_path / name / f"{name}.py").write_text(code)
    given = predictions_of(name, "long one", "no", "also long", "yes", "x", "four")
    result = judge(given, samples=30)
    assert "scores" not in given[0]  # what was given stays as it is
    assert [p["scores"]["length"] for p in result["predictions"]] == [8, 2, 9, 3, 1, 4]
    numbers = result["metrics"][name]
    assert numbers["length"] == pytest.approx(27 / 6) and numbers["shortest"] == 1
    assert set(numbers) == {"length", "shortest", "intervals", "by_prompt"}
    assert numbers["intervals"]["length"] == bootstrap.interval(list("001122"), [8, 2, 9, 3, 1, 4], 30)
    assert numbers["intervals"]["length_of_long"] == bootstrap.interval(list("012"), [8, 9, 4], 30)
    own = numbers["by_prompt"]
    assert own["Question 0"]["length_of_long"] == 8.5 and own["Question 1"]["length_of_long"] == 4
    assert all(set(numbers["intervals"]) == {"length_of_long"} and numbers["count"] == 3 for numbers in own.values())
    result["task"] = "any"
    assert set(compare(result, result, samples=10)) == {"length", "length_of_long"}


def test_metrics_are_judged_side_by_side_and_an_unknown_one_is_named():
    both = predictions_of("cider", "a dog runs") + predictions_of("pathvqa_accuracy", "a", "c")
    metrics = judge(both, samples=10)["metrics"]
    assert list(metrics) == ["cider", "bleu", "rouge_l", "wording", "pathvqa_accuracy"]  # and those beside CIDEr
    assert "by_prompt" in metrics["cider"] and "by_prompt" not in metrics["pathvqa_accuracy"]
    assert metrics["pathvqa_accuracy"]["accuracy"] == 0.5  # the first reference
    assert set(metrics["pathvqa_accuracy"]["intervals"]) == {
        "accuracy", "free_form_accuracy", "free_form_recall", "free_form_f1"
    }  # fmt: skip
    assert judge([]) == {"metrics": {}, "definitions": {}, "predictions": []}
    with pytest.raises(ValueError, match=r"no metric 'meteor'\. Valid values: .*cider, .*pathvqa_accuracy"):
        judge(predictions_of("meteor", "a"))
