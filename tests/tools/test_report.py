"""`alignvlm report` on a run that was really trained and evaluated: what the page says, and that nothing of it can do harm."""

import base64
import hashlib
import io
import json
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.data import scenes
from alignvlm.data.images import read_image
from alignvlm.data.record import Conversation, one_turn
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.evaluation.judge import compare, judge
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.report.answers import choose_answers, score_of, score_text
from alignvlm.tools.report.charts import Scale, Series, duration, number, plot, round_end
from alignvlm.tools.report.heat import data_folders, heat_maps
from alignvlm.tools.report.masks import MOST_IMAGE_TOKENS, mask_example
from alignvlm.tools.report.metrics import task_views, time_line
from alignvlm.tools.report.one_run import report_of_run
from alignvlm.tools.report.read import read_run
from alignvlm.tools.report.report import main, report_of_stage, write_report
from alignvlm.tools.report.two_runs import _differences, _settings
from hub_upload.package import is_allowed
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import MASK_TYPES, AlignVLMConfig, AlignVLMProcessor
from tests.running import arguments_for
from tests.tools.conftest import evaluate


ROOT = Path(__file__).parents[2]
HOSTILE = """</script><script>window.harmed = 1</script>"><img src=x onerror="window.harmed = 1">'&{{ 7 * 7 }}"""


class Page(HTMLParser):
    """The text of a page, its elements with their attributes, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.scripts, self.parts = [], [], []
        self._inside = None
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.parts.append(data)

    def all(self, tag: str, **attributes) -> list[dict]:
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        found = [its for name, its in self.elements if name == tag]
        return [its for its in found if all(its.get(name) == value for name, value in named.items())]


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(trained_run) -> Page:
    return Page(report_of_run(trained_run))


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_page_loads_nothing_and_runs_its_own_script_only(page):
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("srcset", "action", "style") or "url(" not in (value or "")
            if name in ("src", "href"):
                assert value.startswith(("data:image/webp;base64,", "#"))
            assert not name.startswith("on")
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (its["content"] for its in page.all("meta") if its.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")


def test_the_page_says_what_was_trained(page, trained_run):
    stages = read_run_record(trained_run / "stage2")["stages"]
    for entry in stages:
        assert [line["loss"] for line in entry["log"]] == entry["logged_losses"]
        assert [line["step"] for line in entry["log"]] == [1, 2, 3, 4]
        assert all(line["tokens_per_second"] > 0 for line in entry["log"])
    labels = [its["aria-label"] for its in page.all("svg", role="img")]
    first, last = (number(stages[0]["logged_losses"][place]) for place in (0, -1))
    assert any(label.startswith(f"Stage 1: loss in training from {first} to {last}") for label in labels)
    for name in ("text_perplexity", "mir", "eval_loss"):
        before, after = (number(stages[1][f"{name}_{when}"]) for when in ("before", "after"))
        assert f"{before} → {after}" in page.text
    assert "rate up to 0.01" in page.text and "rate up to 0.002" in page.text and "frozen" in page.text
    assert "tokens a second" in page.text


def test_curves_are_those_of_the_log(trained_run):
    stages = read_run_record(trained_run / "stage2")["stages"]
    line = time_line(stages)
    drawn = re.search(r'class="line training" d="M([^"]+)"', line.panels[1].loss)[1]
    points = [tuple(map(float, point.split())) for point in drawn.split("L")]
    values = [*(loss for stage in stages for loss in stage["logged_losses"])]
    values += [stage[f"eval_loss_{when}"] for stage in stages for when in ("before", "after")]
    scale = Scale.of(values)
    expected = [(25.0 * (i + 1), 100 - scale.place(loss)) for i, loss in enumerate(stages[1]["logged_losses"])]
    np.testing.assert_allclose(points, expected, atol=0.01)
    # All modules follow one schedule: the language model's rate is a fifth of the projector's at every step.
    rates = {}
    for module in ("projector", "language"):
        drawn = re.search(rf'class="line {module}" d="M([^"]+)"', line.panels[1].rates)[1]
        rates[module] = [float(point.split()[1]) for point in drawn.split("L")]
    distances = np.subtract(rates["language"], rates["projector"])
    assert (distances > 5).all() and np.ptp(distances) < 0.05  # equal on a logarithmic axis


def test_results_stand_beside_controls_and_guessing(trained_run):
    run = read_run(trained_run)
    (task,) = task_views(run.results)
    accuracy = next(view for view in task.metrics if view.title == "Right answers")
    labels = [(row.label, row.kind) for row in accuracy.rows]
    assert labels == [
        ("Stage 1", "model"),
        ("Stage 2", "model"),
        ("Stage 2, every image replaced by grey", "control"),
        ("Always the commonest answer", "baseline"),
    ]
    assert accuracy.rows[0].note == "the first 3 images only" and accuracy.rows[1].note == ""
    content = json.loads((trained_run / "stage2/results/scenes.json").read_text())
    numbers = content["metrics"]["pathvqa_accuracy"]
    assert accuracy.rows[1].place == pytest.approx(100 * numbers["accuracy"])
    assert accuracy.rows[1].low == pytest.approx(100 * numbers["intervals"]["accuracy"][0])
    assert accuracy.rows[3].value == numbers["majority_accuracy"]


def test_answers_have_their_own_images_and_are_sorted_into_groups(trained_run):
    run = read_run(trained_run)
    answers, notes = choose_answers(run, None, data_folders(run, trained_run))
    again, _ = choose_answers(run, None, data_folders(run, trained_run))
    assert not notes and [(a.prediction, a.groups) for a in answers] == [(a.prediction, a.groups) for a in again]
    assert {answer.kind for answer in answers} >= {"short caption", "yes/no question", "colour"}
    for kind in {answer.kind for answer in answers}:
        best, worst = ([a.score for a in answers if a.kind == kind and g in a.groups] for g in ("best", "worst"))
        assert all(score > 0 for score in best) and min(best, default=1) >= max(worst, default=0)
        assert any(a.kind == kind and "random" in a.groups for a in answers)
    drawn = scenes.make_scenes(6, "test", seed=3)
    asked = [
        (
            (c["messages"][-1]["content"][-1]["text"], c["responses"][0]),
            np.asarray(read_image(row["images"][0]), float),
        )
        for row in drawn
        for c in row["conversations"]
    ]
    for answer in answers:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.uris[0].partition(",")[2]))))
        same_question = [image for key, image in asked if key == (answer.prompt, answer.references[0])]
        distances = [np.abs(shown - image).mean() for image in same_question]
        assert min(distances) < 12


def test_heat_maps_are_the_attention_of_the_checkpoint(trained_run):
    run = read_run(trained_run)
    answers, _ = choose_answers(run, None, data_folders(run, trained_run))
    maps, notes = heat_maps(run, answers)
    assert maps and not notes
    model, processor, _ = load_checkpoint(str(trained_run / "stage2"), torch.device("cpu"))
    for one in maps:
        image = one.answer.pictures.images(one.answer.prediction)
        looked = attention_to_images(model, processor, image, one.answer.prompt, one.answer.text)
        assert one.words == [word.text for word in looked.words]
        values = np.frombuffer(base64.b64decode(one.values), np.uint8)
        values = values.reshape(len(one.layers), len(one.words), *one.shape)
        for place, layer in enumerate(("mean", "rollout", 0, 1)):
            for word in range(len(one.words)):
                expected = looked.of_word(word, layer)
                np.testing.assert_allclose(values[place, word] / 255, expected / expected.max(), atol=0.51 / 255)
                assert one.shares[place][word] == round(100 * float(expected.sum()))


@pytest.mark.parametrize("name", MASK_TYPES)
def test_masks_are_drawn_as_the_model_applies_them(checkpoint, name):
    processor, config = (kind.from_pretrained(checkpoint) for kind in (AlignVLMProcessor, AlignVLMConfig))
    asked = one_turn("What?", ["A red circle."], image_count=2)
    example = mask_example(processor, config, asked, [{"stage": 3, "attention_mask_type": name}])
    view = example.views[0]
    assert (view.name, view.stages) == (name, [3]) and {v.name for v in example.views} == set(MASK_TYPES)
    groups = [token.group for token in example.tokens]
    assert groups.count("image") == 8 and example.left_out == 0
    images = np.where(np.array(groups) == "image", (np.cumsum(np.array(groups) == "image") - 1) // 4, -1)
    prompt = np.array(groups) != "response"
    for q, row in enumerate(view.rows):
        for k, seen in enumerate(row):
            same = images[q] == images[k] >= 0
            ahead = {
                "causal": False,
                "image": same,
                "prefix": prompt[q] and prompt[k],
                "mutual": same or (images[q] >= 0 and prompt[k]),
            }
            assert (seen == "1") == bool(k <= q or ahead[name])
    drawn = sum(float(width) + 0.08 for width in re.findall(r'width="([\d.]+)" height="0.92"', view.picture))
    assert round(drawn) == sum(row.count("1") for row in view.rows)


def test_all_mask_types_of_a_stage_count_as_used(checkpoint):
    processor, config = (kind.from_pretrained(checkpoint) for kind in (AlignVLMProcessor, AlignVLMConfig))
    mixed = {"attention_mask_type": "image", "attention_mask_type_shares": {"image": 0.5, "causal": 0.5}}
    stages = [{"stage": 1, "attention_mask_type": "image"}, {"stage": 2, **mixed}]
    example = mask_example(processor, config, one_turn("What?", ["A red circle."], 1), stages)
    used = {view.name: view.stages for view in example.views}
    assert used == {"image": [1, 2], "causal": [2], "prefix": [], "mutual": []}
    assert {view.name for view in example.views[:2]} == {"image", "causal"}


def test_of_many_image_tokens_some_are_drawn(checkpoint, processor):
    config = AlignVLMConfig.from_pretrained(checkpoint)
    config.image_grid = [20, 20]
    many = AlignVLMProcessor(
        processor.image_processor, processor.tokenizer, 400, chat_template=processor.chat_template
    )
    example = mask_example(many, config, one_turn("What?", ["A red circle."], 1), [])
    shown = [token.text for token in example.tokens if token.group == "image"]
    assert len(shown) == MOST_IMAGE_TOKENS and example.left_out == 400 - MOST_IMAGE_TOKENS
    assert shown[:2] == ["row 1, column 1", "row 2, column 6"]


def hostile(value):
    """Every text of a JSON value replaced by one that tries to run."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value} {HOSTILE}" if isinstance(value, str) else value


def test_nothing_from_the_data_becomes_markup(run):
    def spoil(result):
        result["definitions"] = hostile(result["definitions"])
        result["metrics"]["cider"]["by_prompt"] = {
            f"{prompt} {HOSTILE}": numbers for prompt, numbers in result["metrics"]["cider"]["by_prompt"].items()
        }
        for prediction in result["predictions"]:
            prediction |= {key: hostile(prediction[key]) for key in ("prompt", "prediction", "references")}

    for path in run.glob("stage*/results/*.json"):
        rewrite(path, spoil)

    def spoil_record(record):
        record["backbones"] = hostile(record["backbones"])
        for stage in record["stages"]:
            stage |= {key: hostile(stage[key]) for key in ("data", "versions", "precision")}
            stage["losses_of_data"] = {"bad_image_list": [HOSTILE], HOSTILE: 3}

    rewrite(run / "stage2" / RUN_RECORD, spoil_record)
    named = run.with_name(f"run {HOSTILE.replace('/', '')}")
    run.rename(named)
    written = Page(report_of_run(named))
    assert (
        len(written.scripts) == 1 and written.all("img", src="x") == [] and "window.harmed" not in written.scripts[0]
    )
    assert written.text.count("<script>window.harmed = 1</script>") > 20
    assert "49" not in re.findall(r"&(\S*)", written.text)  # no template in a template
    assert not any(name.startswith("on") for _, its in written.elements for name in its)


MISSING = {
    "no results": (lambda run: [shutil.rmtree(path) for path in run.glob("stage*/results")], "No results yet"),
    "no data": (lambda run: shutil.rmtree(run / "scenes"), "The images are not shown: the data (scenes) were not found"),
    "other data": (
        lambda run: scenes.make_scenes(6, "test", seed=4).to_parquet(run / "scenes/test.parquet"),
        "The images are not shown: scenes has changed since the evaluation",
    ),
    "unreadable data": (lambda run: (run / "scenes/test.parquet").write_bytes(b"no"), "scenes could not be read"),
    "other weights": (
        lambda run: shutil.copy(run / "stage1/model.safetensors", run / "stage2/model.safetensors"),
        "The weights have changed since the evaluation",
    ),
    "damaged result": (
        lambda run: (run / "stage2/results/scenes-blank_image.json").write_text("{"),
        "scenes-blank_image.json could not be read",
    ),
    "damaged record": (lambda run: (run / "stage1" / RUN_RECORD).write_text("["), f"{RUN_RECORD} could not be read"),
    "old record": (
        lambda run: rewrite(run / "stage2" / RUN_RECORD, lambda r: [stage.pop("log") for stage in r["stages"]]),
        "These records are older than the report",
    ),
    "bare record": (
        lambda run: rewrite(run / "stage2" / RUN_RECORD, lambda r: r.update(stages=[{"stage": s} for s in (1, 2)])),
        "Nothing was measured before and after",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, said", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_said_in_the_page(run, change, said):
    change(run)
    written = Page(report_of_run(run))
    assert said in written.text and "What was trained" in written.text
    assert ("Stage 2" in written.text) or said.startswith(RUN_RECORD)


def test_a_stage_that_has_not_finished_has_the_log_of_its_checkpoint(checkpoint, tmp_path):
    folder = tmp_path / "stage1"
    run_stage(
        arguments_for(checkpoint, folder, stage=1, projector_learning_rate=1e-2, save_strategy="steps", save_steps=2)
    )
    for name in (RUN_RECORD, "config.json"):
        (folder / name).unlink()
    written = Page(report_of_run(tmp_path))
    assert "stage1 has not finished: what is shown of it is its checkpoint-4, of 4 steps" in written.text
    assert any("projector at most 0.01" in its["aria-label"] for its in written.all("svg", role="img"))
    assert any("Stage 1: loss in training" in its["aria-label"] for its in written.all("svg", role="img"))
    assert "The checkpoint is not here" in written.text


def test_of_several_runs_in_a_folder_one_is_shown_and_the_others_are_named(checkpoint, run):
    """`other` is a stage 1 of its own, `part` a stage 2 that differs from `stage2` and comes before it."""
    for folder, previous, stage in (("other", checkpoint, 1), ("part", run / "stage1", 2)):
        run_stage(arguments_for(previous, run / folder, stage=stage, max_steps=1, projector_learning_rate=1e-3))
        evaluate(run / folder, run / "scenes", "--limit", "1")
    shutil.copytree(run / "other/results", run / "results")  # names the checkpoint by its folder
    shown = read_run(run)
    assert shown.checkpoint == run / "stage2"
    assert {result.checkpoint.name for result in shown.results} == {"stage1", "stage2"}
    written = Page(report_of_run(run, attention=False))
    assert "holds stages of several runs: that of stage2 is shown; other and part are left out" in written.text
    assert "the first 1 images only" not in written.text
    alone = read_run(run / "other")
    assert alone.checkpoint == run / "other" and not alone.notes and len(alone.results) == 1


def test_a_run_alone_in_its_folder_leaves_nothing_out(checkpoint, run):
    untrained = shutil.copytree(checkpoint, run / checkpoint.name)  # what stage 1 started from
    evaluate(untrained, run / "scenes", "--limit", "1")
    shown = read_run(run)
    assert shown.notes == [] and [result.stage for result in shown.results] == [0, 1, 2, 2]


def test_a_result_alone_opens(trained_run, tmp_path):
    in_place = Page(report_of_run(trained_run / "stage1/results/scenes.json", data=str(trained_run / "scenes")))
    assert in_place.all("canvas") and "Stage 1" in in_place.text
    alone = Path(shutil.copy(trained_run / "stage1/results/scenes.json", tmp_path))
    written = Page(report_of_run(alone, data=str(trained_run / "scenes")))
    assert "The checkpoint is not beside the result" in written.text and written.all("article") and written.all("img")
    of_folder = Page(report_of_run(tmp_path))
    assert "There is no record of any stage here" in of_folder.text and "Right answers" in of_folder.text
    named = tmp_path / "signs.json"
    named.write_text(json.dumps({**json.loads(alone.read_text()), "name": "signs"}))
    called = Page(report_of_run(named, data=str(trained_run / "scenes")))
    assert len(called.all("img")) == len(written.all("img")) and "signs" in called.text


def test_the_perplexity_of_a_text_opens(trained_run, run):
    text = run / "text.txt"
    text.write_text("A red circle is at the left. A blue square is at the right. " * 20)
    evaluate(run / "stage2", text, "--task", "text_perplexity", "--window", "32")
    written = Page(report_of_run(run))
    assert "Perplexity of a text" in written.text and "bits_per_byte" in written.text


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: path / "nothing", "There is no file or folder"),
        (lambda path: path, "holds no run"),
        (lambda path: path / "record.json", "is no result of `alignvlm evaluate`"),
    ],
    ids=["no folder", "an empty folder", "another file"],
)
def test_a_path_without_a_run_is_refused_in_a_sentence(tmp_path, make, said):
    (tmp_path / "record.json").write_text('{"stages": []}')
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main([str(make(tmp_path))])
    assert not list(tmp_path.glob("*.html*"))


def test_two_runs_have_paired_differences_and_the_answers_that_changed(trained_run, tmp_path):
    stage1, stage2 = (tmp_path / f"{stage}.json" for stage in ("one", "two"))
    for stage, path in ((1, stage1), (2, stage2)):
        shutil.copytree(trained_run / f"stage{stage}", tmp_path / f"stage{stage}")
        evaluate(tmp_path / f"stage{stage}", trained_run / "scenes")
        shutil.copy(tmp_path / f"stage{stage}/results/scenes.json", path)

    def improve(result):
        for prediction in result["predictions"][::3]:
            prediction["prediction"] = prediction["references"][0]
        result |= judge(result["predictions"])

    rewrite(stage2, improve)
    first, second = (json.loads(path.read_text()) for path in (stage1, stage2))
    written = Page(write_report(stage1, stage2, tmp_path / "both.html", data=str(trained_run / "scenes")).read_text())
    for name, found in compare(first, second).items():
        low, high = found["interval"]
        signed = [f"{'+' if value > 0 else ''}{number(value)}" for value in (found["difference"], low, high)]
        assert f"{signed[0]} ({signed[1]} to {signed[2]})" in written.text, name
    pairs = list(zip(first["predictions"], second["predictions"]))
    changed = [(a, b) for a, b in pairs if a["prediction"] != b["prediction"]]
    better = sum(score_of(b) > score_of(a) for a, b in changed)
    worse = sum(score_of(b) < score_of(a) for a, b in changed)
    assert (
        f"{len(changed)} of {len(pairs)} answers differ: {better} are better in the second, {worse} worse"
        in written.text
    )
    assert "Where both were asked the same questions, each question is compared with itself" in written.text
    assert written.all("article", data_groups="better") and written.all("img")


def test_two_runs_that_were_asked_otherwise_are_not_compared(trained_run, tmp_path):
    written = Page(write_report(trained_run / "stage1", trained_run / "stage2", tmp_path / "both.html").read_text())
    assert "do not answer the same questions" in written.text and not written.all("article")
    assert "asked the same questions" not in written.text
    assert "Stage 2, learning rates" in written.text
    shutil.copytree(trained_run / "stage1", tmp_path / "bare", ignore=shutil.ignore_patterns("results"))
    written = Page(write_report(tmp_path / "bare", trained_run / "stage2", tmp_path / "both.html").read_text())
    assert "Only stage2 has a result of the task 'scenes'" in written.text
    assert "asked the same questions" not in written.text
    shutil.copytree(trained_run / "stage2", tmp_path / "bare2", ignore=shutil.ignore_patterns("results"))
    written = Page(write_report(tmp_path / "bare", tmp_path / "bare2", tmp_path / "both.html").read_text())
    assert "Neither run has results" in written.text and "asked the same questions" not in written.text
    shutil.copytree(trained_run / "stage2", tmp_path / "blank", ignore=shutil.ignore_patterns("scenes.json"))
    written = Page(write_report(tmp_path / "bare", tmp_path / "blank", tmp_path / "both.html").read_text())
    assert "Neither run has results but of controls" in written.text
    shutil.copytree(trained_run, tmp_path / "partly")
    result = tmp_path / "partly/stage2/results/scenes.json"
    result.write_text(result.read_text().replace('"task": "scenes"', '"task": "other"'))
    written = Page(write_report(trained_run / "stage2", tmp_path / "partly", tmp_path / "both.html").read_text())
    assert "partly has a result of the task 'scenes' of stage1, but none of stage2" in written.text
    assert "Only partly has a result of the task 'other'" in written.text


def test_settings_of_two_runs_stand_beside_each_other_by_the_number_of_the_stage(run, tmp_path):
    record = read_run_record(run / "stage2")
    first, second = record["stages"]
    again = {**second, "seed": 7}
    for name, stages in (("short", [first, second]), ("long", [first, {**second, "stage": 4}, {**again, "stage": 4}])):
        shutil.copytree(run / "stage2", tmp_path / name, ignore=shutil.ignore_patterns("results"))
        (tmp_path / name / RUN_RECORD).write_text(json.dumps({**record, "stages": stages}))
    found = _settings(read_run(tmp_path / "short"), read_run(tmp_path / "long"))
    settings = {title: values for title, *values in found}
    assert {title.split(",")[0] for title in settings} == {"Stage 2", "Stage 4", "Stage 4 (time 2)"}
    assert settings["Stage 2, seed"] == ["1", "none"] and settings["Stage 4, seed"] == ["none", "1"]
    assert settings["Stage 4 (time 2), seed"] == ["none", "7"]


def test_a_stage_writes_its_report_unless_told_not_to(checkpoint, tmp_path, monkeypatch):
    for name, more in (("with", []), ("without", ["--no_report"])):
        given = arguments_for(checkpoint, tmp_path / name, stage=1, max_steps=1, projector_learning_rate=1e-2)
        monkeypatch.setattr(sys, "argv", ["stage1.py", *given, *more])
        runpy.run_path(str(ROOT / "training/stage1.py"), run_name="__main__")
    written = Page((tmp_path / "with/report.html").read_text())
    assert "No results yet" in written.text and "Stage 1" in written.text and written.all("fieldset")
    assert not (tmp_path / "without/report.html").exists() and (tmp_path / "without" / RUN_RECORD).is_file()
    assert not is_allowed("report.html")  # it stays here when the stage is pushed


def test_a_report_that_fails_does_not_fail_the_stage(checkpoint, tmp_path, caplog, capsys):
    (tmp_path / "report.html").mkdir()  # cannot be replaced by a file
    entry = run_stage(
        arguments_for(checkpoint, tmp_path, stage=1, max_steps=1, projector_learning_rate=1e-2), report=report_of_stage
    )
    assert entry["steps"] == 1 and read_run_record(tmp_path)["stages"][-1]["steps"] == 1
    assert "Report:" not in capsys.readouterr().out
    assert "The report could not be written: [Errno 21] Is a directory" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


def test_the_command_writes_where_it_is_told(trained_run, tmp_path, capsys):
    main([str(trained_run), "--output", str(tmp_path / "deep/page.html"), "--no_attention"])
    assert capsys.readouterr().out.strip().endswith("page.html")
    written = Page((tmp_path / "deep/page.html").read_text())
    assert "Heat maps were switched off" in written.text and not written.all("canvas")


def test_numbers_and_axes_are_written_for_people():
    assert [number(v) for v in (None, float("nan"), 0, 0.0, 0.00012345, 0.972, 12.0, 12345.6, 7)] == [
        *("unknown", "unknown", "0", "0", "0.000123", "0.972", "12", "12,346", "7")
    ]
    assert [duration(s) for s in (None, 4.04, 59.6, 163, 11100)] == [
        "unknown",
        "4.0 s",
        "1 min 0 s",
        "2 min 43 s",
        "3 h 5 min",
    ]
    assert [round_end(v) for v in (0, 0.7, 1, 9.2, 10.1, 2600)] == pytest.approx([1, 0.8, 1, 10, 12, 3000])
    assert Scale.of([]) is None and Scale.of([None, float("inf")]) is None
    scale = Scale.of([0.01, 10])
    assert scale.log and scale.place(0.0) == 0 and [text for _, text in scale.ticks()] == ["0.01", "0.1", "1", "10"]
    same = Scale.of([3.0, 3.0])
    assert 0 < same.place(3.0) <= 100 and same.ticks()


def test_conversations_of_several_turns_are_looked_at_as_they_were_asked(trained_run):
    """The pictures' conversation is the one of the data, not a prompt made up anew."""
    run = read_run(trained_run)
    answers, _ = choose_answers(run, None, data_folders(run, trained_run))
    for answer in answers[:5]:
        conversation = answer.pictures.conversation(answer.prediction)
        assert isinstance(conversation, Conversation) and conversation.prompt == answer.prompt


def test_rates_of_each_module_are_drawn_where_the_log_has_them():
    log = [
        {"step": step, "loss": 1.0, "learning_rate/vision": rate, "learning_rate/projector": 10 * rate}
        for step, rate in ((1, 1e-4), (2, 5e-5))
    ]
    stage = {"stage": 2, "steps": 2, "learning_rates": {"projector": 1e-3, "vision": 1e-4}, "log": log}
    line = time_line([stage])
    scale = Scale.of([1e-3, 1e-4, 1e-4, 5e-5, 5e-4], log=True, floor=1e-6)
    for module, rates in (("vision", (1e-4, 5e-5)), ("projector", (1e-3, 5e-4))):
        drawn = re.search(rf'class="line {module}" d="M([^"]+)"', line.panels[0].rates)[1]
        expected = [(50.0 * step, 100 - scale.place(rate)) for step, rate in zip((1, 2), rates)]
        np.testing.assert_allclose([list(map(float, p.split())) for p in drawn.split("L")], expected, atol=0.01)


def test_no_field_is_needed(run):
    """Fields of the last stage's record and of its result are left out, three at a time; the page is made all the same."""
    shutil.rmtree(run / "stage1/results")
    record, result = run / "stage2" / RUN_RECORD, run / "stage2/results/scenes.json"
    parts = ((record, lambda c: c["stages"][-1]), (result, lambda c: c), (result, lambda c: c["predictions"][0]))
    for path, part in parts:
        whole = json.loads(path.read_text())
        names = list(part(whole))
        for start in range(0, len(names), 3):
            less = json.loads(json.dumps(whole))
            for name in names[start : start + 3]:
                del part(less)[name]
            path.write_text(json.dumps(less))
            assert "What was trained" in report_of_run(run, attention=False), names[start : start + 3]
        path.write_text(json.dumps(whole))


def test_answers_are_ranked_by_being_right_not_by_saying_yes():
    scores = {"said_yes": True, "is_yes": False, "correct": False}
    wrong = {"metric": "pope", "prediction": "Yes", "scores": scores}
    right = {"metric": "pope", "prediction": "No", "scores": {"said_yes": False, "is_yes": False, "correct": True}}
    assert score_of(right) > score_of(wrong) and (score_text(right), score_text(wrong)) == ("right", "wrong")
    names_what_is_not_there = {
        "metric": "chair",
        "prediction": "A cat.",
        "scores": {"chair_s": True, "chair_objects": 1},
    }
    assert score_of(names_what_is_not_there) == 0.0
    assert score_of({"metric": "of another release", "scores": {"points": 0.4}}) == 0.4


def test_a_lower_value_is_called_better_where_it_is():
    def verdict(direction: int, sign: int) -> str:
        found = {"difference": 0.2 * sign, "interval": sorted((0.1 * sign, 0.3 * sign)), "direction": direction}
        return _differences({"number": found})[0].verdict

    assert verdict(1, 1) == verdict(-1, -1) == "the second is better"
    assert verdict(-1, 1) == verdict(1, -1) == "the first is better"
    assert verdict(0, 1) == "the second is higher"


def test_a_name_in_a_record_becomes_no_markup():
    name = 'x"/></svg><form action="https://example.org">'
    drawn = plot([Series(name, [(0, 1.0), (100, 2.0)], marks=True)], Scale(0, 2), "rates")
    assert "<form" not in drawn
