"""Ctrl-C and SIGTERM: real signals to real runs, which go on afterwards as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignvlm.stages.checkpoint import INTERRUPTED, complete_checkpoints, last_complete_checkpoint
from alignvlm.stages.stage import main
from hub_upload.run_record import read_run_record
from tests import forked
from tests.killing import start
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
STAGE = "alignvlm.stages.stage:main"
RATES = {"language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}
# An interruption must neither push a checkpoint out nor be averaged.
FIELDS = {
    **RATES,
    "max_steps": 40,
    "save_strategy": "steps",
    "save_steps": 15,
    "save_total_limit": 2,
    "average_last": 2,
}


def wait_for(log: Path, pattern: str, is_alive, timeout: float = 200) -> None:
    end = time.monotonic() + timeout
    while not (log.exists() and re.search(pattern, log.read_text())):
        assert is_alive() and time.monotonic() < end, log.read_text()[-3000:] if log.exists() else "no output"
        time.sleep(0.002)


def finish(process, timeout: float = 200) -> int:
    process.join(timeout)
    assert not process.is_alive()
    return process.exitcode


def same_result(a: Path, b: Path) -> bool:
    """Losses and weights, bit for bit."""
    losses = [read_run_record(folder)["stages"][-1]["logged_losses"] for folder in (a, b)]
    weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
    return losses[0] == losses[1] and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """A run nobody interrupted."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    assert finish(start(arguments_for(checkpoint, folder, **FIELDS), folder)) == 0
    return folder


@pytest.mark.parametrize(("number", "workers", "step"), [(signal.SIGTERM, 1, 3), (signal.SIGINT, 1, 33)])
def test_a_signal_to_the_group_writes_a_checkpoint_and_the_run_goes_on(
    checkpoint, whole, tmp_path, number, workers, step
):
    folder = tmp_path / "run"
    fields = arguments_for(checkpoint, folder, **FIELDS, dataloader_num_workers=workers)
    process = start(fields, folder)
    log = folder.with_suffix(".log")
    wait_for(log, rf"stage 3 +{step}/40  loss ", process.is_alive)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number, log.read_text()[-3000:]
    last = last_complete_checkpoint(folder)
    taken = int(last.name.split("-")[1])
    printed = log.read_text()
    assert f"Stopped by {number.name} after step {taken} of 40. {last} is complete." in printed
    assert "Go on with the same command and --resume_from_checkpoint." in printed and "Traceback" not in printed
    assert not (folder / "alignvlm_run.json").exists()
    assert last.parent.name == INTERRUPTED or taken in (15, 30)
    process = start([*fields, "--resume_from_checkpoint"], folder)
    assert finish(process) == 0, log.read_text()[-3000:]
    assert same_result(folder, whole)
    entries = [read_run_record(each)["stages"][-1] for each in (folder, whole)]
    assert entries[0]["averaged"] == entries[1]["averaged"] == ["checkpoint-30", "checkpoint-40"]
    assert entries[0]["resumed_at"] == [taken]
    assert not (folder / INTERRUPTED).exists()
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-30", "checkpoint-40"]


@pytest.mark.slow
@pytest.mark.parametrize("decides", [False, True])
def test_a_signal_leaves_an_evaluation_unless_training_depends_on_it(checkpoint, whole, tmp_path, decides):
    folder = tmp_path / "run"
    held_out = [{"name": "scene_texts", "count": 250}]  # a second or more, one at a time
    evaluating = {"eval_sources": held_out, "eval_strategy": "steps", "eval_steps": 7, "per_device_eval_batch_size": 1}
    best = {"metric_for_best_model": "loss"} if decides else {}
    process = start(arguments_for(checkpoint, folder, **FIELDS, **evaluating, **best), folder)
    log = folder.with_suffix(".log")
    wait_for(log, r"stage 3 +7/40  loss ", process.is_alive)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    last = last_complete_checkpoint(folder)
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_loss" in entry]
    assert (last.name, 7 in evaluated) == (("checkpoint-8", True) if decides else ("checkpoint-7", False))
    process = start([*arguments_for(checkpoint, folder, **FIELDS), "--resume_from_checkpoint"], folder)
    assert finish(process) == 0, log.read_text()[-3000:]
    assert same_result(folder, whole)


def wait_until_it_listens(process) -> None:
    """Until SIGTERM is caught, which is when it trains."""
    while not int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16) >> 14 & 1:
        time.sleep(0.01)


def test_an_evaluation_at_the_start_is_finished_and_the_run_stops_after_its_first_step(checkpoint, tmp_path):
    folder = tmp_path / "run"
    held_out = [{"name": "scene_texts", "count": 200}]  # a second, one at a time
    evaluating = {
        "eval_sources": held_out,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "eval_on_start": True,
        "per_device_eval_batch_size": 1,
    }
    process = start(arguments_for(checkpoint, folder, **FIELDS, **evaluating), folder)
    log = folder.with_suffix(".log")
    wait_for(log, "Stage 3: ", process.is_alive)
    wait_until_it_listens(process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    last = last_complete_checkpoint(folder)
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0] and last.name == "checkpoint-1"
    assert f"Stopped by SIGTERM after step 1 of 40. {last} is complete." in log.read_text()


def test_a_second_ctrl_c_ends_at_once(checkpoint, tmp_path):
    folder = tmp_path / "run"
    sources = [{"name": "scene_texts", "count": 6000}]  # a step takes all of them
    slow = {**RATES, "max_steps": 2, "gradient_accumulation_steps": 1500, "sources": sources}
    process = start(arguments_for(checkpoint, folder, **slow), folder)
    log = folder.with_suffix(".log")
    wait_for(log, "Stage 3: ", process.is_alive)
    wait_until_it_listens(process)
    os.kill(process.pid, signal.SIGINT)
    wait_for(log, r"SIGINT: a checkpoint is written after this step\. Ctrl-C again ends at once\.", process.is_alive)
    time.sleep(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert finish(process, 20) == -signal.SIGINT  # a shell says 130
    assert last_complete_checkpoint(folder) is None


def test_without_save_on_signal_a_signal_ends_the_run_as_it_ends_any_program(checkpoint, tmp_path):
    folder = tmp_path / "run"
    fields = {**RATES, "max_steps": 5000, "num_train_epochs": 10_000, "save_on_signal": False}
    process = start(arguments_for(checkpoint, folder, **fields), folder)
    wait_for(folder.with_suffix(".log"), "1/5000  loss ", process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, 20) == -signal.SIGTERM
    assert last_complete_checkpoint(folder) is None


def test_a_finished_run_says_so_and_what_to_do(checkpoint, whole, tmp_path):
    copy = tmp_path / "whole"
    shutil.copytree(whole, copy)
    fields = arguments_for(checkpoint, copy, **FIELDS)
    with pytest.raises(
        ValueError, match=r"is finished. To train longer, go on with --resume_from_checkpoint and a larger"
    ):
        main(fields)
    for path in complete_checkpoints(copy):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"is finished and kept no checkpoint-\* folder to go on from"):
        main([*fields, "--resume_from_checkpoint"])
    assert same_result(copy, whole)


def launch(arguments: list[str], log: Path) -> subprocess.Popen:
    config = ROOT / "training/accelerate/cpu_2_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, "--main_process_port", "0", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_and_answers_change_nothing(checkpoint, tmp_path):
    """SIGTERM to the launcher, which hands it on; the run that is interrupted shows answers, the other does not."""
    log, folder, other = tmp_path / "log", tmp_path / "run", tmp_path / "whole"
    fields = {**RATES, "max_steps": 30, "per_device_train_batch_size": 2}
    forked.run(STAGE, arguments_for(checkpoint, other, **fields), log=log, processes=2)
    given = arguments_for(checkpoint, folder, **fields, show_every=2)
    process = launch(["training/stage3.py", *given], log)
    wait_for(log, r"stage 3 +3/30  loss ", lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0  # the launcher's own status
    printed = log.read_text()
    assert printed.count("Stopped by SIGTERM after step ") == 1 and printed.count("SIGTERM: a checkpoint") == 1, (
        printed
    )
    last = last_complete_checkpoint(folder)
    assert last.parent.name == INTERRUPTED and (last / "rng_state_1.pth").is_file()
    forked.run(STAGE, [*given, "--resume_from_checkpoint"], log=log, processes=2)
    assert same_result(folder, other)


def test_checkpoints_without_an_optimizer_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="save_only_model: leave it out"):
        main(arguments_for(checkpoint, tmp_path, **RATES, save_only_model=True))
