"""Evaluations of a real tiny checkpoint: the same whoever counts, resumed as if never interrupted, and comparable."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignvlm.data import scenes
from alignvlm.data.formats import CAPTION_PROMPT, DETAILED_PROMPT
from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, main, parser
from alignvlm.evaluation.judge import compare
from alignvlm.evaluation.one_task import report
from alignvlm.evaluation.perplexity import text_perplexity
from alignvlm.tools import ask
from hub_upload.repository import check_model
from hub_upload.run_record import RUN_RECORD
from tests import forked


ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "alignvlm/evaluation/evaluate_model.py")
MAIN = "alignvlm.evaluation.evaluate_model:main"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.make_scenes(14, "test", seed=3).to_parquet(folder / "test.parquet")
    return folder


def options(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        str(checkpoint),
        *("--task", "scenes", "--data", str(data), "--output_dir", str(output), "--use_cpu"),
        *("--max_new_tokens", "6", "--batch_size", "4", "--bootstrap_samples", "50", *more),
    ]


@pytest.fixture(scope="module")
def result(checkpoint, data, tmp_path_factory) -> dict:
    return evaluate_checkpoint(parser().parse_args(options(checkpoint, data, tmp_path_factory.mktemp("result"))))


def test_the_file_says_what_was_found_and_how(result, checkpoint, data, tmp_path):
    assert evaluate_checkpoint(parser().parse_args(options(checkpoint, data, tmp_path))) == result
    assert json.loads((tmp_path / "scenes.json").read_text()) == result
    assert os.listdir(tmp_path) == ["scenes.json"]
    assert len(result["predictions"]) == 14 * 10
    names = {"cider", "bleu", "rouge_l", "wording", "pathvqa_accuracy"}
    assert set(result["metrics"]) == set(result["definitions"]) == names
    accuracy = result["metrics"]["pathvqa_accuracy"]
    assert accuracy["count"] == 14 * 8
    correct = [p["scores"]["correct"] for p in result["predictions"] if p["metric"] == "pathvqa_accuracy"]
    assert accuracy["accuracy"] == pytest.approx(sum(correct) / len(correct))
    for numbers in result["metrics"].values():
        for name, (low, high) in numbers["intervals"].items():
            assert low <= numbers[name] <= high
    assert result["data"]["images"] == 14 and len(result["data"]["files"][0]["sha256"]) == 64
    assert result["decoding"] == {"num_beams": 1, "max_new_tokens": 6, "do_sample": False}
    assert {"torch", "transformers", "evaluate", "alignvlm"} <= set(result["versions"])


def test_captions_are_judged_per_prompt_too(result):
    own = result["metrics"]["cider"]["by_prompt"]
    assert set(own) == {CAPTION_PROMPT, DETAILED_PROMPT}
    for prompt, numbers in own.items():
        scores = [p["scores"]["cider"] for p in result["predictions"] if p["prompt"] == prompt]
        assert numbers["count"] == len(scores) == 14
        assert numbers["cider"] == pytest.approx(sum(scores) / len(scores))
        low, high = numbers["intervals"]["cider"]
        assert low <= numbers["cider"] <= high
    means = [numbers["cider"] for numbers in own.values()]
    assert result["metrics"]["cider"]["cider"] == pytest.approx(sum(means) / 2)
    assert "cider of 'Write a short caption.'" in report(result)


def test_results_of_a_local_checkpoint_lie_in_its_folder(checkpoint, data):
    arguments = parser().parse_args(options(checkpoint, data, Path("unused"), "--limit", "1"))
    arguments.output_dir = None
    evaluate_checkpoint(arguments)
    (checkpoint / "results/scenes.json").unlink()
    (checkpoint / "results").rmdir()


def test_a_result_does_not_take_the_place_of_one_of_other_data(checkpoint, tmp_path):
    given = []
    for name, colour in (("walls", "white"), ("floors", "red")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        row = {"image": f"{name}.png", "question": "Of which colour?", "answer": colour}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        given.append(["--task", "local", "--data", str(tmp_path / f"{name}.jsonl")])
    walls, floors = (options(checkpoint, tmp_path, tmp_path / "results")[:1] + each for each in given)
    rest = [
        "--output_dir",
        str(tmp_path / "results"),
        "--use_cpu",
        "--max_new_tokens",
        "2",
        "--bootstrap_samples",
        "5",
    ]
    main([*walls, *rest])
    kept = (tmp_path / "results/local.json").read_text()
    with pytest.raises(
        SystemExit, match=r"local\.json holds the result of .*walls.jsonl.*, not of .*floors.jsonl.* --name"
    ):
        main([*floors, *rest])
    assert (tmp_path / "results/local.json").read_text() == kept
    main([*walls, *rest])  # again is no other data
    main([*floors, *rest, "--name", "floors"])
    found = json.loads((tmp_path / "results/floors.json").read_text())
    assert found["name"] == "floors" and report(found).startswith("floors\n")
    main([*floors, *rest, "--name", "floors", "--blank_image"])
    assert sorted(os.listdir(tmp_path / "results")) == ["floors-blank_image.json", "floors.json", "local.json"]
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "walls.png", tmp_path / "elsewhere")
    row = {"image": "walls.png", "question": "What?", "answer": "white"}
    (tmp_path / "elsewhere/walls.jsonl").write_text(json.dumps(row))
    elsewhere = [item.replace("walls.jsonl", "elsewhere/walls.jsonl") for item in walls]
    with pytest.raises(SystemExit, match=r"local\.json holds the result of a .*walls.jsonl.* of other content"):
        main([*elsewhere, *rest])
    with pytest.raises(SystemExit, match="'a/b' is no name for a file"):
        parser().parse_args([*walls, "--name", "a/b"])
    with pytest.raises(SystemExit, match="--name floors is for the result of one task"):
        main([str(checkpoint), "--tasks", "local,scenes", "--name", "floors", "--data_dir", str(tmp_path)])


def test_a_result_of_an_option_is_not_taken_for_one_without(checkpoint, data, tmp_path):
    """Options that a result names only where they are on."""
    given = options(checkpoint, data, tmp_path, "--limit", "2")
    evaluate_checkpoint(parser().parse_args(given))
    before = (tmp_path / "scenes.json").read_text()
    for more, what in (
        (["--metric", "pathvqa_accuracy"], "metric None, not 'pathvqa_accuracy'"),
        (["--merge_image_tokens", "2"], "merge_image_tokens 0, not 2"),
        (["--prompt", "What is it?"], r"prompt None, not 'What is it\?'"),
    ):
        with pytest.raises(ValueError, match=what):
            evaluate_checkpoint(parser().parse_args([*given, *more]), keep_finished=True)
    assert (tmp_path / "scenes.json").read_text() == before
    with_metric = [*given, "--metric", "pathvqa_accuracy", "--name", "short"]
    found = evaluate_checkpoint(parser().parse_args(with_metric), keep_finished=True)
    with pytest.raises(ValueError, match="metric 'pathvqa_accuracy', not None"):
        evaluate_checkpoint(parser().parse_args([*given, "--name", "short"]), keep_finished=True)
    assert json.loads((tmp_path / "short.json").read_text()) == found


def test_a_result_says_how_many_tokens_were_left_of_an_image(checkpoint, make_model, processor, data, tmp_path):
    """An option that asks for what the checkpoint does anyway makes no other result, nor does an older file that does not say."""
    merging = tmp_path / "merging"
    make_model(merge_image_tokens=2).save_pretrained(merging)
    own = copy.copy(processor)
    own.image_seq_length = 2
    own.save_pretrained(merging)
    for own, count, other in ((merging, 2, 0), (checkpoint, 0, 2)):
        given = options(own, data, tmp_path / f"of_{count}", "--limit", "1", "--max_new_tokens", "2")
        found = evaluate_checkpoint(parser().parse_args(given))
        assert (found["merge_image_tokens"], found["max_tiles"]) == (count, 1)
        equal = parser().parse_args([*given, "--merge_image_tokens", str(count), "--max_tiles", "1"])
        assert evaluate_checkpoint(equal, keep_finished=True) == evaluate_checkpoint(equal) == found
        with pytest.raises(ValueError, match=rf"holds a result with merge_image_tokens {count}, not {other}\."):
            evaluate_checkpoint(parser().parse_args([*given, "--merge_image_tokens", str(other)]))
    older = {name: value for name, value in found.items() if name not in ("merge_image_tokens", "max_tiles")}
    (tmp_path / "of_0/scenes.json").write_text(json.dumps(older))
    assert evaluate_checkpoint(parser().parse_args(given), keep_finished=True) == older
    assert evaluate_checkpoint(parser().parse_args(given)) == found


def test_a_short_look_does_not_take_the_place_of_a_complete_result(checkpoint, data, tmp_path, monkeypatch):
    """Nothing is asked before it is refused; a larger look may take the place of a smaller one."""
    given = options(checkpoint, data, tmp_path, "--max_new_tokens", "2")
    for limit, count in (("2", 2), ("2", 2), ("3", 3), (None, 14), (None, 14)):
        main([*given, *(["--limit", limit] if limit else [])])
        assert json.loads((tmp_path / "scenes.json").read_text())["data"]["images"] == count
    kept = (tmp_path / "scenes.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("alignvlm.evaluation.one_task.run_batches", lambda *_: pytest.fail("asked"))
        with pytest.raises(
            SystemExit,
            match=r"scenes\.json holds a result of all images, more than --limit 2 .*--output_dir.*--name.*remove",
        ):
            main([*given, "--limit", "2"])
        for more, what in (
            (["--num_beams", "2"], "num_beams 1, not 2"),
            (["--max_new_tokens", "3"], "max_new_tokens 2, not 3"),
            (["--tag", "[a]"], r"tag '', not '\[a\]'"),
            (["--dtype", "bf16"], "dtype 'float32', not 'bfloat16'"),
            (["--num_beams", "2", "--limit", "2"], "num_beams 1, not 2"),
        ):
            with pytest.raises(SystemExit, match=rf"scenes\.json holds a result with {what}\. .*--output_dir"):
                main([*given, *more])
    assert (tmp_path / "scenes.json").read_text() == kept
    main([*given, "--limit", "2", "--name", "look"])
    with pytest.raises(SystemExit, match=r"look\.json holds a result of 2 images, more than --limit 1 "):
        main([*given, "--limit", "1", "--name", "look"])
    main([*given, "--batch_size", "3", "--bootstrap_samples", "20", "--seed", "1"])  # the answers are the same
    assert json.loads((tmp_path / "scenes.json").read_text())["seed"] == 1
    main([*given, "--shuffle_images"])
    with pytest.raises(SystemExit, match="seed 0, not 1"):  # of which the images depend
        main([*given, "--shuffle_images", "--seed", "1"])


def test_a_result_does_not_take_the_place_of_one_of_another_model(checkpoint, data, tmp_path):
    given = options(checkpoint, data, tmp_path / "results", "--limit", "1", "--max_new_tokens", "2")
    main(given)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    main([str(other), *given[1:]])  # another name, the same weights
    torch_file = other / "model.safetensors"
    weights = load_file(torch_file)
    save_file({name: value + 1 for name, value in weights.items()}, torch_file, {"format": "pt"})
    own = [part for part in given[1:] if part not in ("--output_dir", str(tmp_path / "results"))]
    (other / "results").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "results/scenes.json", other / "results/scenes.json")
    main([str(other), *own])  # of what the folder holds now
    assert (other / "results/scenes.json").read_bytes() != (tmp_path / "results/scenes.json").read_bytes()
    with pytest.raises(SystemExit, match=r"scenes\.json holds the result of the model 'other' with other weights"):
        main([str(other), *given[1:]])
    main([str(other), *given[1:], "--name", "changed"])


def test_prompts_carry_the_tag_the_last_stage_asks_for(result, checkpoint, data, tmp_path):
    tagged = shutil.copytree(checkpoint, tmp_path / "tagged")
    (tagged / RUN_RECORD).write_text(json.dumps({"stages": [{"evaluation_tag": "[old]"}, {"evaluation_tag": "[a]"}]}))
    found = {}
    for name, model, more in (
        ("record", tagged, ()),
        ("given", checkpoint, ("--tag", "[a]")),
        ("off", tagged, ("--tag", "")),
    ):
        found[name] = evaluate_checkpoint(parser().parse_args(options(model, data, tmp_path / name, *more)))
    answers = {name: [p["prediction"] for p in f["predictions"]] for name, f in (*found.items(), ("plain", result))}
    assert found["record"]["tag"] == found["given"]["tag"] == "[a]" and found["off"]["tag"] == result["tag"] == ""
    assert answers["record"] == answers["given"] != answers["plain"] == answers["off"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(checkpoint, data, tmp_path):
    config = str(ROOT / "training/accelerate/cpu_2_processes.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, SCRIPT]
    command += options(checkpoint, data, tmp_path / "two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main(options(checkpoint, data, tmp_path / "one"))
    assert (tmp_path / "one/scenes.json").read_bytes() == (tmp_path / "two/scenes.json").read_bytes()


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_to_the_same_file(checkpoint, data, tmp_path):
    arguments = options(checkpoint, data, tmp_path / "killed", "--batch_size", "1")
    process = forked.start(MAIN, arguments, log=tmp_path / "log")
    deadline = time.time() + 120
    lines = 0
    while lines < 2 and process.is_alive() and time.time() < deadline:
        lines = sum(file.read_text().count("\n") for file in (tmp_path / "killed").glob(".scenes-*/*.jsonl"))
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 2 <= lines < 14 and not (tmp_path / "killed/scenes.json").exists()
    (progress,) = (tmp_path / "killed").glob(".scenes-*/0.jsonl")
    with progress.open("a") as file:
        file.write('{"start": 9, "outp')  # as if killed in the middle of a line

    printed = forked.run(MAIN, arguments, log=tmp_path / "log", processes=2)  # by more processes than began it
    assert "Going on with" in printed
    main(options(checkpoint, data, tmp_path / "whole", "--batch_size", "1"))
    assert (tmp_path / "killed/scenes.json").read_bytes() == (tmp_path / "whole/scenes.json").read_bytes()


def test_other_settings_do_not_go_on_with_a_half_done_evaluation(checkpoint, data, tmp_path, result):
    """A finished batch of another run is not taken for this one's."""
    stale = tmp_path / ".scenes-000000000000"
    stale.mkdir()
    (stale / "0.jsonl").write_text('{"start": 0, "outputs": [["stale"]]}\n')
    assert evaluate_checkpoint(parser().parse_args(options(checkpoint, data, tmp_path))) == result
    assert stale.exists()


def test_the_checkpoints_own_code_finds_the_same(checkpoint, data, tmp_path, result):
    forked.run(MAIN, options(checkpoint, data, tmp_path, "--trust_remote_code"), log=tmp_path / "log")
    assert json.loads((tmp_path / "scenes.json").read_text())["predictions"] == result["predictions"]


def test_controls_and_beams_have_their_own_answers(checkpoint, data, tmp_path, result):
    answers = {"plain": [p["prediction"] for p in result["predictions"]]}
    for name, more in (
        ("blank_image", ["--blank_image"]),
        ("shuffle_images", ["--shuffle_images"]),
        ("beams", ["--num_beams", "3"]),
    ):
        found = evaluate_checkpoint(parser().parse_args(options(checkpoint, data, tmp_path, *more)))
        answers[name] = [p["prediction"] for p in found["predictions"]]
        assert [p["references"] for p in found["predictions"]] == [p["references"] for p in result["predictions"]]
    assert {"scenes.json", "scenes-blank_image.json", "scenes-shuffle_images.json"} == set(os.listdir(tmp_path))
    assert len({tuple(texts) for texts in answers.values()}) == 4
    first_questions = {p["prompt"]: set() for p in result["predictions"]}
    blank = json.loads((tmp_path / "scenes-blank_image.json").read_text())["predictions"]
    for prediction in blank:  # without a picture the same prompt has one answer
        first_questions[prediction["prompt"]].add(prediction["prediction"])
    assert all(len(texts) <= 1 for texts in first_questions.values())


def test_compare_is_paired_and_refuses_other_questions(result, checkpoint, data, tmp_path, capsys):
    evaluate_checkpoint(parser().parse_args(options(checkpoint, data, tmp_path, "--blank_image")))
    (tmp_path / "a.json").write_text(json.dumps(result))
    capsys.readouterr()
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "scenes-blank_image.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("B differs from A in how it was asked: control 'blank_image', not None\n")
    assert "accuracy" in printed and "cider" in printed and "p = " in printed
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert "differs" not in capsys.readouterr().out
    assert all(found["difference"] == 0.0 and found["p"] == 1.0 for found in compare(result, result).values())
    fewer = {**result, "predictions": result["predictions"][:-1]}
    with pytest.raises(ValueError, match="do not answer the same questions"):
        compare(result, fewer)


def test_text_perplexity_is_that_of_the_model_alone(checkpoint, tmp_path):
    text = "Ein Kreis is a circle. " * 30 + "Größe: 3 cm.\n"
    (tmp_path / "text.txt").write_text(text)
    arguments = [str(checkpoint), "--task", "text_perplexity", "--data", str(tmp_path / "text.txt"), "--use_cpu"]
    arguments += ["--window", "50", "--output_dir", str(tmp_path)]
    numbers = evaluate_checkpoint(parser().parse_args(arguments))["metrics"]["text"]

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager")
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses, size = [], 0
    for start in range(0, len(ids), 50):
        window = torch.tensor([ids[start : start + 50]])
        with torch.no_grad():
            logits = model.model.language_model(window).last_hidden_state @ model.lm_head.weight.T
        losses += (-logits.log_softmax(-1)[0, :-1].gather(1, window[0, 1:, None])).flatten().tolist()
        size += len(tokenizer.decode(ids[start + 1 : start + 50]).encode())
    assert numbers["tokens"] == len(losses)
    assert numbers["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert numbers["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-4)
    low, high = numbers["intervals"]["perplexity"]
    assert low <= numbers["perplexity"] <= high
    assert text_perplexity(model, tokenizer, text, 50) == pytest.approx(numbers["perplexity"], rel=1e-4)  # a stage's


def test_bad_rows_are_left_out_if_asked_and_noted_in_the_file(checkpoint, tmp_path, capsys):
    rows = [{"image": f"{index}.png", "question": "What?", "answer": "a"} for index in range(3)]
    rows[1]["answer"] = None
    for index in range(3):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(checkpoint), "--task", "local", "--data", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "results"), "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 2: `answer` is None.*--on_bad_row skip"):
        main(arguments)
    assert not (tmp_path / "results").exists()  # nothing was asked
    main([*arguments, "--on_bad_row", "skip"])
    result = json.loads((tmp_path / "results/local.json").read_text())
    assert len(result["predictions"]) == 1 and result["data"]["bad_rows"] == 2
    assert [problem.split(":")[0] for problem in result["data"]["bad_row_list"]] == [
        "rows.jsonl, line 2",
        "rows.jsonl, line 3",
    ]
    assert "bad rows, left out" in capsys.readouterr().out


def test_rows_of_text_are_checked_too(checkpoint, tmp_path):
    rows = [{"text": "One line. "}, {"text": ""}, {"text": None}, {"text": "And another."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(checkpoint), "--task", "text_perplexity", "--data", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 3: `text` is None"):
        main(arguments)
    main([*arguments, "--on_bad_row", "skip"])
    result = json.loads((tmp_path / "text_perplexity.json").read_text())
    tokens = AutoProcessor.from_pretrained(checkpoint).tokenizer("One line. \n\n\n\nAnd another.")["input_ids"]
    assert result["metrics"]["text"]["tokens"] == len(tokens) - 1 and result["data"]["bad_rows"] == 1


@pytest.fixture
def short_sighted(checkpoint, tmp_path) -> Path:
    """The checkpoint with a context of 40 tokens."""
    folder = shutil.copytree(checkpoint, tmp_path / "short_sighted")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_questions_longer_than_the_context_are_bad_rows(short_sighted, tmp_path, capsys):
    """Found before anything is asked; those with some room get shorter answers, and are counted."""
    texts = ["What?", " ".join(["red"] * 60), "Why?", " ".join(["a"] * 14)]
    rows = [{"image": f"{index // 2}.png", "question": text, "answer": "a"} for index, text in enumerate(texts)]
    for index in range(2):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(short_sighted), "--task", "local", "--data", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "results"), "--max_new_tokens", "12"]
    problem = r"rows.jsonl, line 2: the prompt 'red red .*\.\.\. has \d+ tokens with its images; the language model takes 40, the answer among them"
    with pytest.raises(SystemExit, match=problem + r"\. Mend it.*--on_bad_row skip"):
        main(arguments)
    assert not (tmp_path / "results").exists()
    main([*arguments, "--on_bad_row", "skip"])
    result = json.loads((tmp_path / "results/local.json").read_text())
    assert [each["prompt"] for each in result["predictions"]] == [texts[0], texts[2], texts[3]]
    data = result["data"]
    assert (data["images"], data["questions"], data["bad_rows"], data["answers_with_less_room"]) == (2, 3, 1, 1)
    printed = capsys.readouterr().out
    assert "bad rows, left out" in printed and "answers with less room" in printed
    main([*arguments, "--on_bad_row", "skip", "--question_only"])
    blind = json.loads((tmp_path / "results/local-question_only.json").read_text())
    assert blind["data"] == data  # the same questions
    main([*arguments, "--on_bad_row", "skip", "--limit", "1", "--name", "first"])
    assert json.loads((tmp_path / "results/first.json").read_text())["data"]["questions"] == 1


def test_choices_need_room_too(short_sighted, tmp_path):
    row = {"image": "0.png", "question": "What?", "options": ["a", " ".join(["red"] * 60)], "answer": "0"}
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "ai2d.jsonl").write_text(json.dumps({**row, "options": ["a", "b c d e f g h i j k l m n o p q r s"]}))
    arguments = [str(short_sighted), "--task", "ai2d", "--data", str(tmp_path / "ai2d.jsonl"), "--use_cpu"]
    with pytest.raises(SystemExit, match=r"line 1: .* the language model takes 40"):
        main(arguments)


def test_a_window_of_text_longer_than_the_context_is_refused(short_sighted, tmp_path):
    (tmp_path / "text.txt").write_text("A red circle is left of a blue square. " * 10)
    arguments = [str(short_sighted), "--task", "text_perplexity", "--data", str(tmp_path / "text.txt"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"--window 512: the language model takes 40 tokens\. Give 40 or less"):
        main(arguments)
    main([*arguments, "--window", "40"])


def test_ask_names_a_question_longer_than_the_context(short_sighted, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(
        SystemExit, match=r"error: The question has \d+ tokens with its images; .* takes 40, .*Shorten it"
    ):
        ask.main([str(short_sighted), str(tmp_path / "0.png"), "red " * 60, "--use_cpu"])


def test_a_revision_that_the_hub_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="and the Hub gives no revision 'v1' of a model of that name"):
        check_model("user/none", "v1")
    with pytest.raises(FileNotFoundError, match="and the Hub gives no model of that name"):
        check_model("user/none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a checkpoint or a --server, and a --task"),
        (["out/nano/stage4", "--task", "scenes", "--data", "DATA"], "No such folder: 'out/nano/stage4'"),
        (
            ["CHECKPOINT", "--task", "scenes", "--data", "DATA", "--revision", "v1"],
            "The revision 'v1' would be of a model of the Hub",
        ),
        (["CHECKPOINT", "--task", "scenes", "--data", "out/my/scenes"], "No such file or folder: out/my/scenes"),
        (["no/checkpoint", "--task", "scenes"], r"needs data: .* `from alignvlm\.data\.scenes import make_scenes; "),
        (["no/checkpoint", "--task", "scene_signs"], r"needs data: .* make_signs\(100, 'test'\)\.save_to_disk\("),
        (["no/checkpoint", "--task", "local"], r"needs data: give a local folder .*, as --data\.$"),
        (["no/checkpoint", "--task", "text_perplexity"], "needs --data"),
        (
            ["no/checkpoint", "--task", "text_perplexity", "--data", "DATA", "--blank_image"],
            "has no images: leave out",
        ),
        (["CHECKPOINT", "--task", "scenes", "--data", "DATA", "--blank_image", "--shuffle_images"], "two controls"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message, checkpoint, data):
    known = {"CHECKPOINT": str(checkpoint), "DATA": str(data)}
    with pytest.raises(SystemExit, match=message):
        main([known.get(a, a) for a in arguments] + ["--use_cpu"])


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
@pytest.mark.parametrize(
    "option",
    ["limit", "batch_size", "bootstrap_samples", "num_beams", "max_new_tokens", "max_tiles"],
)
def test_a_number_below_one_is_refused_before_anything_is_read(option, number):
    with pytest.raises(SystemExit, match=rf"argument --{option}: '{number}' is no whole number of 1 or more"):
        parser().parse_args(["model", "--task", "scenes", f"--{option}", number])
    assert getattr(parser().parse_args(["model", "--task", "scenes", f"--{option}", "1"]), option) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"task": "scenes", "metrics": {}}', "3"])
def test_only_results_are_compared(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(
        SystemExit, match=r"other\.json is no result of an evaluation: it lacks .*predictions\. Compare two files"
    ):
        main(["--compare", str(tmp_path / "other.json"), str(tmp_path / "other.json")])


def test_people_too_few_for_a_metric_are_told_before_anything_is_asked(checkpoint, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "q?", "answers": ["yes"] * 3}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    given = [
        str(checkpoint),
        "--task",
        "okvqa",
        "--split",
        "test",
        "--data",
        str(tmp_path / "test.jsonl"),
        "--use_cpu",
    ]
    given += ["--output_dir", str(tmp_path / "results"), "--max_new_tokens", "2", "--bootstrap_samples", "5"]
    with pytest.raises(SystemExit, match=r"needs at least 4 people's answers to a question; one has 3: "):
        main(given)
    assert not (tmp_path / "results").exists()
    main([*given, "--metric", "pathvqa_accuracy"])


def test_a_text_file_is_read_as_the_sources_read_text(checkpoint, tmp_path):
    book = tmp_path / "book.txt"
    given = [
        str(checkpoint),
        "--task",
        "text_perplexity",
        "--data",
        str(book),
        "--use_cpu",
        "--output_dir",
        str(tmp_path),
    ]
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        book.write_bytes(mark + b"A red circle is left of a blue square.")
        found.append(evaluate_checkpoint(parser().parse_args([*given, "--name", f"book{len(mark)}"]))["metrics"])
    assert found[0] == found[1]
    book.write_bytes("café".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"book\.txt is not UTF-8 text: .*Save it as UTF-8"):
        main(given)
