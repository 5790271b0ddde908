"""Several tasks and all controls in one go: one table, which says what of a score needs the image."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from alignvlm.data import scenes
from alignvlm.evaluation.controls import most_frequent, needed, table
from alignvlm.evaluation.evaluate_model import main, parser
from alignvlm.evaluation.judge import compare, judge
from alignvlm.evaluation.task_list import evaluate_several
from tests import forked


CONTROLS = ("blank_image", "shuffle_images", "question_only", "most_frequent_answer")


def result_of(answers: list[str], task: str = "pathvqa") -> dict:
    references = ["red", "blue", "red", "green", "red", "blue", "red", "green"] * 5
    predictions = [
        {"id": str(index), "prompt": "?", "prediction": answer, "references": [right], "metric": "pathvqa_accuracy"}
        for index, (answer, right) in enumerate(zip(answers * 5, references))
    ]
    return {"task": task, "control": None, "bootstrap_samples": 200, "seed": 0, **judge(predictions, 200)}


def test_what_needs_the_image_is_what_the_best_control_does_not_reach():
    seeing = result_of(["red", "blue", "red", "green", "red", "blue", "blue", "green"])  # 7 of 8
    controls = {"blank_image": result_of(["red"] * 8), "shuffle_images": result_of(["blue"] * 8)}  # 4, 2
    found = needed(seeing, controls)["accuracy"]
    assert found["control"] == "blank_image" and found["difference"] == pytest.approx(3 / 8)
    assert found["interval"][0] > 0 and "yes_no_accuracy" not in needed(seeing, controls)
    blind = result_of(["red"] * 8)
    assert needed(blind, controls)["accuracy"]["difference"] == 0.0
    lines = table([(seeing, controls)]).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:4] == ["pathvqa", "accuracy", "0.8750"] and cells[5:9] == ["0.5000", "0.2500", "-", "-"]
    assert cells[9] == "+0.3750" and len({len(line) for line in lines}) == 1
    assert "grey image" not in table([(seeing, {})])


def judged_as(metric: str, answers: list[str], references: list[list[str]]) -> dict:
    predictions = [
        {"id": str(index), "prompt": "?", "prediction": answer, "references": right, "metric": metric}
        for index, (answer, right) in enumerate(zip(answers, references))
    ]
    return {"task": "local", "control": None, "bootstrap_samples": 100, "seed": 0, **judge(predictions, 100)}


def test_a_control_that_never_says_yes_has_no_precision_to_compare():
    right = [["yes"], ["no"]] * 6
    seeing, blind = judged_as("pope", ["Yes", "No"] * 6, right), judged_as("pope", ["No"] * 12, right)
    found = needed(seeing, {"blank_image": blind})
    assert found["pope_accuracy"]["difference"] == pytest.approx(0.5) and "pope_precision" not in found
    assert "pope_precision" not in compare(blind, seeing) and compare(blind, seeing)["pope_yes"]["direction"] == 0
    assert "pope" in table([(seeing, {"blank_image": blind})])


def test_where_lower_is_better_the_lowest_control_counts():
    objects = [["A dog.", "dog"]] * 8
    seeing, wrong = (judged_as("chair", [answer] * 8, objects) for answer in ("A dog.", "A cat and a dog."))
    half = judged_as("chair", ["A cat."] * 2 + ["A dog."] * 6, objects)
    found = needed(seeing, {"blank_image": wrong, "shuffle_images": half})["chair_s"]
    assert found["control"] == "shuffle_images" and found["difference"] == pytest.approx(-0.25)
    assert found["direction"] == -1


def frequent(metric: str, references: list[list[str]], kinds: list[str] | None = None) -> tuple[dict, list[str]]:
    """The numbers of always giving the most frequent answer, and the answers."""
    items = [
        {"id": str(index), "prompt": "?", "prediction": "", "references": right, "metric": metric, "kind": kind}
        for index, (right, kind) in enumerate(zip(references, kinds or [""] * len(references)))
    ]
    result = {"task": "local", "control": None, "bootstrap_samples": 5, "seed": 0, **judge(items, 5)}
    found = most_frequent(result)
    return found["metrics"][metric], [item["prediction"] for item in found["predictions"]]


def test_the_most_frequent_answer_is_counted_as_the_metric_compares():
    """By case and punctuation "no" would be the most frequent."""
    numbers, answers = frequent("pathvqa_accuracy", [["Yes"]] * 6 + [["no"]] * 8 + [["yes "]] + [["yes"]] * 5)
    assert numbers["accuracy"] == numbers["majority_accuracy"] == 0.6
    assert set(answers) == {"Yes"}  # as most references write it


def test_the_most_frequent_answer_is_one_for_yes_no_questions_and_one_for_the_others_of_a_kind():
    numbers, answers = frequent(
        "pathvqa_accuracy", [["yes"]] * 5 + [["no"]] * 3 + [["a dog"], ["Dog"], ["cat"], ["bird"]]
    )
    assert numbers["yes_no_accuracy"] == numbers["majority_yes_no_accuracy"] == 5 / 8
    assert numbers["free_form_accuracy"] == numbers["majority_free_form_accuracy"] == 0.5
    assert answers == ["yes"] * 8 + ["a dog"] * 4


@pytest.mark.parametrize(
    ("metric", "references", "number", "value"),
    [
        ("choice_accuracy", [["b"], ["b"], ["a"], ["A"], [" A"]], "choice_accuracy", 3 / 5),
        ("pope", [["Yes"], ["no"], ["yes"], ["no"], ["Sure"]], "pope_accuracy", 3 / 5),
        ("pope", [["NO"], ["NO"], ["YES"], ["No"], ["no"]], "pope_accuracy", 4 / 5),  # "NO" as an answer means yes
        ("anls", [["Main  Street"], ["elm road"], ["elm road"], ["main street"], ["Main Street"]], "anls", 3 / 5),
        ("relaxed_accuracy", [["12%"], ["7"], ["7"], ["0.12"], [".12"]], "relaxed_accuracy", 3 / 5),
        ("relaxed_accuracy", [["Red"], ["nan"], ["nan"], ["nan"], ["red"]], "relaxed_accuracy", 2 / 5),
        ("ocrbench", [["EXIT"], ["stop"], ["stop"], ["exit"], ["Exit"]], "ocrbench", 3 / 5),
        # one of ten people said "left" everywhere; all agree on "Up." and "up"
        ("vqa_accuracy", [["left"] + [f"it{i}" for i in range(9)]] * 3 + [["Up."] * 10, ["up"] * 10], "vqa_accuracy_evalai", 2 / 5),
        ("pathvqa_accuracy", [["", "red"]] * 3 + [["blue"]], "accuracy", 1 / 4),  # the first reference alone counts
    ],
)  # fmt: skip
def test_every_metric_of_answers_counts_them_in_its_own_form(metric, references, number, value):
    numbers, _ = frequent(metric, references)
    assert numbers[number] == pytest.approx(value)


def test_captions_are_counted_by_their_words():
    captions = [["A dog runs.", "A dog."], ["The cat sat."], ["a dog runs", "no"], ["The cat sat."], ["A dog runs"]]
    _, answers = frequent("cider", captions)
    assert set(answers) == {"A dog runs."}


def test_kinds_of_formulas_keep_their_case():
    formulas = "Handwritten Mathematical Expression Recognition"
    references = [["X"], ["x"], ["x"], ["X"], ["x y"]]
    _, answers = frequent("ocrbench", [*references, ["x y"], ["xy"]], [formulas] * 7)
    assert set(answers) == {"x y"}


def test_references_that_no_answer_equals_have_no_most_frequent_answer():
    numbers, answers = frequent("pathvqa_accuracy", [[""], [""]])
    assert numbers["accuracy"] == 0 and set(answers) == {""}


def test_likelihoods_that_one_result_lacks_are_not_compared():
    choices = {"A": "red", "B": "blue"}
    given = [
        {"id": str(index), "prompt": "?", "prediction": "A", "references": ["A"], "choices": choices, "metric": "choice_accuracy"}
        for index in range(4)
    ]  # fmt: skip
    likelihoods = [{"sum": s, "tokens": 1, "without_image": s, "without_question": s} for s in (-1.0, -2.0)]
    measured = [{**item, "likelihoods": likelihoods} for item in given]
    first, second = ({"task": "ai2d", **judge(items, 100)} for items in (given, measured))
    found = compare(first, second, samples=100)
    assert found["choice_accuracy"]["difference"] == 0 and "choice_accuracy_by_likelihood" not in found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Scenes, a multiple-choice set and a text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "scenes").mkdir()
    scenes.make_scenes(4, "test", ("short_caption", "questions"), seed=3).to_parquet(folder / "scenes/test.parquet")
    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(folder / f"{index}.png")
    rows = [
        {
            "image": f"{index}.png",
            "question": "How red?",
            "options": ["not", "some", "very much"],
            "answer": str(index),
        }
        for index in range(3)
    ]
    (folder / "ai2d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text_perplexity.txt").write_text("A red circle is left of a blue square.")
    return folder


def options(checkpoint: Path, data_dir: Path, output: Path, *more: str) -> list[str]:
    return [
        *(str(checkpoint), "--tasks", "scenes,ai2d,text_perplexity", "--data_dir", str(data_dir), "--use_cpu"),
        *("--output_dir", str(output), "--max_new_tokens", "3", "--bootstrap_samples", "20", *more),
    ]


def test_several_tasks_and_all_controls_make_one_table(checkpoint, data_dir, tmp_path, capsys):
    text = evaluate_several(parser().parse_args(options(checkpoint, data_dir, tmp_path, "--controls")))
    names = [f"{task}{control}" for task in ("scenes", "ai2d") for control in ("", *(f"-{c}" for c in CONTROLS))]
    assert set(os.listdir(tmp_path)) == {f"{name}.json" for name in (*names, "text_perplexity")} | {"tasks.md"}
    assert (tmp_path / "tasks.md").read_text() == text + "\n" and text in capsys.readouterr().out
    firsts = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines()[2:]}
    assert {
        ("scenes", "cider"),
        ("scenes", "bleu_4"),
        ("ai2d", "choice_accuracy"),
        ("text_perplexity", "perplexity"),
    } < firsts
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    measured = [p["likelihoods"] for p in results["ai2d"]["predictions"]]
    assert all(len(own) == 3 and all(one["sum"] < 0 < one["tokens"] for one in own) for own in measured)
    alone = [p["likelihoods"] for p in results["ai2d-question_only"]["predictions"]]
    assert alone[0] == alone[1] == alone[2] and measured[0] != measured[1]  # the questions are the same
    accuracy = results["scenes-most_frequent_answer"]["metrics"]["pathvqa_accuracy"]
    assert accuracy["yes_no_accuracy"] == accuracy["majority_yes_no_accuracy"]
    assert accuracy["accuracy"] >= accuracy["majority_accuracy"]  # each kind of question has its own answer
    constant = {(p["kind"], p["prediction"]) for p in results["scenes-most_frequent_answer"]["predictions"]}
    assert len(constant) == len({kind for kind, _ in constant}) > 3
    assert {p["prediction"] for p in results["ai2d-most_frequent_answer"]["predictions"]} == {"A"}


def test_what_is_there_already_is_not_asked_again(checkpoint, data_dir, tmp_path, capsys):
    arguments = options(checkpoint, data_dir, tmp_path)
    text = evaluate_several(parser().parse_args(arguments))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "ai2d.json").unlink()
    capsys.readouterr()
    assert evaluate_several(parser().parse_args(arguments)) == text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    printed = capsys.readouterr().out
    assert "scenes.json is there already" in printed and "ai2d.json is there already" not in printed
    evaluate_several(parser().parse_args([*arguments, "--seed", "1"]))
    assert "there already" not in capsys.readouterr().out


def test_other_images_under_the_same_names_are_other_data(checkpoint, data_dir, tmp_path):
    """In another folder, or drawn again in theirs: an answer to the one says nothing of the other."""
    folders = [tmp_path / name for name in ("clear", "copy", "blurred")]
    for folder, brightness in zip(folders, (200, 200, 90)):
        folder.mkdir()
        Image.new("RGB", (12, 12), (brightness, 20, 20)).save(folder / "photo.png")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "photo.png", "question": "?", "answer": "red"}) + "\n")
    arguments = [
        str(checkpoint),
        "--tasks",
        "mine=local",
        "--data_dir",
        str(tmp_path),
        "--use_cpu",
        "--max_new_tokens",
        "3",
    ]
    arguments += ["--output_dir", str(tmp_path / "results"), "--image_dir"]
    main([*arguments, str(folders[0])])
    before = (tmp_path / "results/mine.json").read_bytes()
    main([*arguments, str(folders[1])])
    assert (tmp_path / "results/mine.json").read_bytes() == before
    with pytest.raises(SystemExit, match=r"mine\.json holds the result of mine\.jsonl .*with other image files"):
        main([*arguments, str(folders[2])])
    shutil.copy(folders[2] / "photo.png", folders[0])
    with pytest.raises(SystemExit, match="other image files"):
        main([*arguments, str(folders[0])])
    assert (tmp_path / "results/mine.json").read_bytes() == before


def test_the_work_of_a_result_goes_even_if_the_program_ended_right_after_writing_it(
    checkpoint, data_dir, tmp_path, monkeypatch
):
    arguments = parser().parse_args(options(checkpoint, data_dir, tmp_path))

    def end(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alignvlm.evaluation.one_task.shutil.rmtree", end)
        with pytest.raises(KeyboardInterrupt):
            evaluate_several(arguments)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".scenes-")]
    evaluate_several(arguments)
    assert set(os.listdir(tmp_path)) == {"scenes.json", "ai2d.json", "text_perplexity.json", "tasks.md"}


def test_two_sets_of_ones_own_are_two_tasks_of_a_list(checkpoint, data_dir, tmp_path):
    """The name of each says where its data are, and what its results are called."""
    for name, answer in (("colours", "red"), ("shapes", "round")):
        row = {"image": "0.png", "question": "What is it?", "answer": answer}
        (data_dir / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (data_dir / "book.txt").write_text("A red circle.")
    arguments = [
        str(checkpoint),
        "--tasks",
        "colours=local, shapes=local,book=text_perplexity",
        "--data_dir",
        str(data_dir),
    ]
    arguments += ["--use_cpu", "--max_new_tokens", "3", "--output_dir", str(tmp_path)]
    text = evaluate_several(parser().parse_args(arguments))
    assert set(os.listdir(tmp_path)) == {"colours.json", "shapes.json", "book.json", "tasks.md"}
    assert {line.split("|")[1].strip() for line in text.splitlines()[2:]} == {"colours", "shapes", "book"}
    for name, answer in (("colours", "red"), ("shapes", "round")):
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["name"] == name and result["task"] == "local"
        assert [p["references"] for p in result["predictions"]] == [[answer]]


def test_a_list_whose_results_stand_in_the_way_of_others_is_refused_before_anything_is_asked(
    checkpoint, data_dir, tmp_path, capsys
):
    arguments = options(checkpoint, data_dir, tmp_path, "--controls")
    evaluate_several(parser().parse_args(arguments))
    (tmp_path / "scenes.json").unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for more, what in (
        (["--limit", "1"], r"scenes-blank_image\.json .*--limit 1"),
        (["--num_beams", "2"], r"num_beams 1, not 2"),
        (["--prompt", "What?"], r"prompt None, not 'What\?'"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match=what):
            main([*arguments, *more])
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    main(arguments)
    assert (tmp_path / "scenes.json").is_file()


@pytest.mark.slow
def test_a_list_that_was_killed_goes_on_to_the_same_files(checkpoint, data_dir, tmp_path):
    """By one process, and by two: in the middle of a control, with a task before it finished and a task after it not begun."""
    arguments = options(checkpoint, data_dir, tmp_path / "killed", "--controls", "--batch_size", "1")
    evaluate = "alignvlm.evaluation.evaluate_model:main"
    process = forked.start(evaluate, arguments, log=tmp_path / "log")
    deadline = time.time() + 300
    while process.is_alive() and time.time() < deadline:
        done = (tmp_path / "killed/scenes.json").exists()
        if done and any(file.read_text() for file in (tmp_path / "killed").glob(".scenes-*/0.jsonl")):
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    left = set(os.listdir(tmp_path / "killed"))
    assert "scenes.json" in left and not left & {"ai2d.json", "tasks.md"}
    shutil.copytree(tmp_path / "killed", tmp_path / "one")

    forked.run(evaluate, arguments, log=tmp_path / "log", processes=2)
    for name in ("one", "whole"):
        main(options(checkpoint, data_dir, tmp_path / name, "--controls", "--batch_size", "1"))
    expected = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert len(expected) == 2 * 5 + 2
    for name in ("killed", "one"):
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == expected, name


def test_any_metric_can_judge_ones_own_data(checkpoint, data_dir, tmp_path):
    """CHAIR of captions whose references are captions of people and the names of annotated objects."""
    row = {"image": "0.png", "captions": ["A dog sleeps.", "couch", "dining table"]}
    (data_dir / "rows.jsonl").write_text(json.dumps(row))
    arguments = [str(checkpoint), "--task", "local", "--data", str(data_dir / "rows.jsonl"), "--use_cpu"]
    arguments += ["--metric", "chair", "--output_dir", str(tmp_path), "--max_new_tokens", "3"]
    main(arguments)
    result = json.loads((tmp_path / "local.json").read_text())
    assert list(result["metrics"]) == ["chair"] and result["metric"] == "chair"
    assert result["predictions"][0]["scores"]["present"] == 3
    with pytest.raises(SystemExit, match=r"There is no metric 'spice'\. Valid values: anls, bleu"):
        main([*arguments[:-1], "3", "--metric", "spice"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "ai2d", "--task", "ai2d"], "either a --task or several --tasks"),
        (["--tasks", "ai2d,ai3d"], "Unknown task 'ai3d'. Valid tasks: .*ai2d"),
        (["--tasks", "ai2d,pope", "--data_dir", "DATA"], "holds 0 folders or files called 'pope'; expected one"),
        (["--tasks", "ai2d,pope", "--data", "DATA"], "--data is the data of one task"),
        (["--tasks", "ai2d,scenes"], "The task 'scenes' has no data by default: give --data_dir"),
        (
            ["--tasks", "ai2d,scenes,ai2d", "--data_dir", "DATA"],
            "--tasks has 'ai2d' twice. Give each a name of its own",
        ),
        (
            ["--tasks", "shapes=ai2d"],
            "--tasks shapes=ai2d takes the data called 'shapes' in --data_dir, which is not given",
        ),
        (["--tasks", "others=ai2d", "--data_dir", "DATA"], "holds 0 folders or files called 'others'; expected one"),
        (["--tasks", "a/b=ai2d"], None),
        (["--task", "ai2d", "--data_dir", "DATA"], "the data of one --task is --data"),
        (["--task", "ai2d", "--controls", "--blank_image"], "--controls includes --blank_image"),
        (["--task", "ai2d", "--question_only", "--blank_image"], "--blank_image and --question_only are two controls"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(arguments, message, checkpoint, data_dir, tmp_path):
    given = [str(data_dir) if argument == "DATA" else argument for argument in arguments]
    if "--controls" not in given and "--task" in given:
        given += ["--data", str(data_dir / "ai2d.jsonl")]
    with pytest.raises(SystemExit, match=message):
        main([str(checkpoint), *given, "--use_cpu", "--output_dir", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()
