"""`alignvlm blend`: checkpoints between a trained and an untouched language model, and what is measured of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignvlm.data.scenes import make_scenes
from alignvlm.evaluation.evaluate_model import main as evaluate
from alignvlm.stages.stage import main as run_stage
from alignvlm.stages.trainer import module_of
from alignvlm.tools.blend import main as blend
from hub_upload.run_record import read_run_record
from tests.running import arguments_for, weights_alone


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Stage 3 without mixing, and with the share 0.25."""
    folder = tmp_path_factory.mktemp("blend")
    for share in (0.0, 0.25):
        fields = {"language_learning_rate": 1e-2, "max_steps": 2, "keep_language": share}
        run_stage(arguments_for(checkpoint, folder / f"{share:g}", **fields))
    return folder


def test_a_share_is_what_the_stage_would_have_written_and_is_measured(checkpoint, trained, tmp_path, capsys):
    make_scenes(2, "test", seed=0).to_parquet(tmp_path / "scenes.parquet")
    (tmp_path / "text.txt").write_text("A red square is at the top. " * 20)
    on = ["--task", "scenes", "--data", str(tmp_path / "scenes.parquet"), "--text", str(tmp_path / "text.txt")]
    on += ["--use_cpu", "--dtype", "fp32", "--max_new_tokens", "2", "--bootstrap_samples", "10"]
    given = [str(trained / "0"), "--untouched", str(weights_alone(checkpoint, tmp_path / "untouched")), *on]
    blend([*given, "--shares", "0", "0.25", "1", "--output_dir", str(tmp_path / "line")])

    expected = {
        "0": load_file(trained / "0/model.safetensors"),
        "0.25": load_file(trained / "0.25/model.safetensors"),
        "1": load_file(checkpoint / "model.safetensors"),
    }
    for share, weights in expected.items():
        for name, value in load_file(tmp_path / f"line/keep_{share}/model.safetensors").items():
            if module_of(name) == "language":
                assert torch.equal(value, weights[name]), (share, name)
    line = json.loads((tmp_path / "line/line.json").read_text())
    assert [row["share"] for row in line] == [0, 0.25, 1]
    perplexities = [row["text_perplexity"]["text"]["perplexity"] for row in line]
    assert len(set(perplexities)) == 3 and all(row["scenes"] for row in line)
    evaluate([str(checkpoint), "--task", "text_perplexity", "--data", on[5], *on[6:], "--output_dir", str(tmp_path)])
    own = json.loads((tmp_path / "text_perplexity.json").read_text())["metrics"]["text"]["perplexity"]
    assert perplexities[2] == pytest.approx(
        own, rel=1e-6
    )  # with frozen encoder and projector: all of the untouched model
    printed = capsys.readouterr().out
    assert re.search(rf"\| 0.25 +\| text_perplexity +\| perplexity +\| {perplexities[1]:.4f}", printed)
    entry = read_run_record(tmp_path / "line/keep_0.25")["stages"][-1]
    assert entry["keep_language"]["share"] == 0.25 and entry["stage"] == 3

    def line_after(*more: str) -> list[dict]:
        blend([*given[:3], "--output_dir", str(tmp_path / "line"), *more])
        return json.loads((tmp_path / "line/line.json").read_text())

    added = line_after("--shares", "0.5", *on[4:])
    assert [row["share"] for row in added] == [0, 0.25, 0.5, 1] and [added[i] for i in (0, 1, 3)] == line
    assert added[2]["text_perplexity"] and "scenes" not in added[2]
    assert line_after("--shares", "0.25") == added  # measures nothing, so nothing of it is replaced
    (tmp_path / "line/keep_0.25/results/text_perplexity.json").unlink()
    (tmp_path / "text.txt").write_text("A blue circle is below. " * 20)
    again = line_after("--shares", "0.25", *on[4:])
    assert again[1]["scenes"] == line[1]["scenes"] and again[1]["text_perplexity"] != line[1]["text_perplexity"]
    shutil.rmtree(tmp_path / "line/keep_0")
    assert [row["share"] for row in line_after("--shares", "1")] == [0.25, 0.5, 1]


def test_options_that_are_refused_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        blend(["--help"])
    shown = capsys.readouterr().out
    assert "--untouched" in shown and "--limit" in shown
    assert not re.search("--(server|server_requests|data_dir|tasks)\\b", shown)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["{trained}/0", "--untouched", "{checkpoint}", "--shares", "1.2"],
            "--shares 1.2 is the share .* from 0 to 1",
        ),
        (
            ["{trained}/0", "--untouched", "{checkpoint}", "--shares", "0.5", "0.3", "0.30000001"],
            "--shares: keep_0.3 would be the folder of two of them",
        ),
        (["{trained}/0", "--untouched", "no/such/folder"], "No such folder: 'no/such/folder'"),
        (["{checkpoint}", "--untouched", "{checkpoint}"], "No stage of .* has trained its language model"),
        (["{trained}/0.25", "--untouched", "{checkpoint}"], "is mixed already, with the share 0.25"),
        (["{trained}/0"], "Give --untouched"),
        (["{trained}/0", "--compare", "a.json", "b.json"], "--compare is of `alignvlm evaluate` alone"),
        (
            ["{trained}/0", "--untouched", "{checkpoint}", "--server", "http://localhost:1/v1"],
            "--server is of `alignvlm evaluate` alone",
        ),
        (["{trained}/0", "--server_requests", "3"], "--server_requests is of `alignvlm evaluate` alone"),
        (["{trained}/0", "--data_dir", "sets"], "--data_dir is of `alignvlm evaluate` alone"),
        *(
            (
                ["{trained}/0", "--untouched", "{checkpoint}", *words],
                f"{words[0]} is of an evaluation, and there is none: give --task or --text, too, or leave it out",
            )
            for words in (["--data", "a.jsonl"], ["--limit", "2"], ["--blank_image"], ["--dtype", "fp32"])
        ),
        (
            ["{trained}/0", "--untouched", "{checkpoint}", "--text", "a.txt", "--data", "a.jsonl"],
            "--data is of a --task, and there is none: give one, or leave it out",
        ),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(checkpoint, trained, tmp_path, words, message):
    given = [word.format(trained=trained, checkpoint=checkpoint) for word in words]
    with pytest.raises((ValueError, FileNotFoundError, SystemExit), match=message):
        blend([*given, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_something_else_is_not_taken_for_this_one(checkpoint, trained, tmp_path):
    def mix(model: Path, untouched: Path, *shares: str) -> None:
        blend([str(model), "--untouched", str(untouched), "--shares", *shares, "--output_dir", str(tmp_path / "line")])

    model, mixed = shutil.copytree(trained / "0", tmp_path / "model"), tmp_path / "line/keep_0.25"
    mix(model, checkpoint, "0.25")
    written = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in mixed.iterdir()}
    message = rf"{mixed} holds another mixture .* Remove the folder, or name another --output_dir"
    with pytest.raises(ValueError, match=message):
        mix(model, trained / "0", "0.5", "0.25")
    with pytest.raises(ValueError, match=message):
        mix(model, checkpoint, "0.25000001")  # of the same folder's name
    retrained = shutil.copytree(model, tmp_path / "retrained/model")
    shutil.copy(trained / "0.25/model.safetensors", retrained)
    with pytest.raises(ValueError, match=message):
        mix(retrained, checkpoint, "0.5", "0.25")
    assert not (tmp_path / "line/keep_0.5").exists()
    mix(model, checkpoint, "0.25", "0.5")  # goes on
    assert (tmp_path / "line/keep_0.5/alignvlm_run.json").is_file()
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in mixed.iterdir()} == written


@pytest.mark.slow
def test_several_processes_are_refused_and_say_so_once(checkpoint, trained, tmp_path):
    config = str(ROOT / "training/accelerate/cpu_2_processes.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "-m",
        "alignvlm.tools.blend",
    ]
    command += [str(trained / "0"), "--untouched", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = re.findall("^error: `alignvlm blend` runs on one process, and there are 2", done.stderr, re.MULTILINE)
    assert done.returncode and len(told) == 1
    assert "alignvlm/tools/blend.py" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()
