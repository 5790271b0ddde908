"""What goes wrong in long runs: kills, full disks, dead workers and ranks, numbers that are not finite."""

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alignvlm.stages.checkpoint import (
    complete_checkpoints,
    is_complete,
    last_complete_checkpoint,
    only_writer,
    save_checkpoint,
)
from alignvlm.stages.stage import main
from hub_upload.run_record import read_run_record
from tests import forked, uneven_ranks
from tests.killing import start
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
RATES = {"language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}
SAVING = {**RATES, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


def finish(process, timeout: float = 120) -> int:
    process.join(timeout)
    assert not process.is_alive()
    return process.exitcode


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """A run nobody interrupted, in a process like the others."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert finish(start(arguments_for(checkpoint, folder, **SAVING), folder)) == 0
    return folder


def goes_on_as_if_never_interrupted(checkpoint: Path, folder: Path, whole: Path) -> bool:
    resume = ["--resume_from_checkpoint"] if last_complete_checkpoint(folder) else []
    process = start([*arguments_for(checkpoint, folder, **SAVING), *resume], folder)
    assert finish(process) == 0, folder.with_suffix(".log").read_text()[-2000:]
    losses = [read_run_record(f)["stages"][-1]["logged_losses"] for f in (folder, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    return same_weights(folder, whole)


# A save opens some ten files from Python, and there are four; the numbers stand for writes from the first to the last.
@pytest.mark.slow
@pytest.mark.parametrize("write", random.Random(1).sample(range(2, 45), 8))
def test_killed_while_writing(checkpoint, whole, tmp_path, write):
    folder = tmp_path / "run"
    process = start(arguments_for(checkpoint, folder, **SAVING), folder, kill_at=write)
    code = finish(process)
    if code == 0:
        pytest.fail(f"the run opened less than {write} files")
    assert code == -9 and not (folder / "alignvlm_run.json").exists()
    assert goes_on_as_if_never_interrupted(checkpoint, folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_time(checkpoint, whole, tmp_path, seed):
    folder = tmp_path / "run"
    process = start(arguments_for(checkpoint, folder, **SAVING), folder)
    log, rng = folder.with_suffix(".log"), random.Random(seed)
    steps = rng.randint(1, 5)
    while process.is_alive() and (log.read_text().count("  loss ") if log.exists() else 0) < steps:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    assert finish(process) == -9
    assert goes_on_as_if_never_interrupted(checkpoint, folder, whole)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_not_taken_for_complete(whole, checkpoint, tmp_path):
    assert [path.name for path in complete_checkpoints(whole)] == ["checkpoint-4", "checkpoint-6"]
    state = (whole / "checkpoint-6/trainer_state.json").read_text()
    for step, text in ((8, None), (10, ""), (12, state[: len(state) // 2])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
        assert not is_complete(folder)
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "none") is None
    fields = arguments_for(checkpoint, tmp_path, **SAVING)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        main([*fields, "--resume_from_checkpoint"])
    with pytest.raises(ValueError, match=r"checkpoint-12' is no checkpoint-. folder that was written to its end"):
        main([*fields, "--resume_from_checkpoint", str(tmp_path / "checkpoint-12")])


@pytest.mark.slow
def test_a_run_does_not_mix_with_an_earlier_one(whole, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"is finished\. To train longer, go on with --resume_from_checkpoint"):
        main(arguments_for(checkpoint, whole, **SAVING))
    alone = shutil.copytree(whole, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(ValueError, match=r"is finished\. To train anew, name another output_dir, or remove this one"):
        main(arguments_for(checkpoint, alone, **SAVING))
    unfinished = shutil.copytree(whole, tmp_path / "unfinished", ignore=shutil.ignore_patterns("alignvlm_run.json"))
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of an earlier run. Go on from it with --resume"):
        main(arguments_for(checkpoint, unfinished, **SAVING))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file size limit", "small disk"])
def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, whole, tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    size = sum(path.stat().st_size for path in (whole / "checkpoint-6").rglob("*"))
    mounted = False
    if kind == "small disk":
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("needs the right to mount")
    try:
        limit = None if mounted else ("checkpoint-4", (whole / "model.safetensors").stat().st_size // 2)
        process = start(arguments_for(checkpoint, folder, **SAVING), folder, limit=limit)
        assert finish(process) == 1
        log = folder.with_suffix(".log").read_text()
        assert "checkpoint-4 could not be written" in log and "The last complete checkpoint is" in log
        assert ("No space left" if mounted else "File too large") in log
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(folder)], check=True)
        assert goes_on_as_if_never_interrupted(checkpoint, folder, whole)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_the_end_is_told_and_leaves_no_finished_run(checkpoint, tmp_path):
    folder = tmp_path / "run"
    fields = {**RATES, "max_steps": 1, "save_strategy": "no"}
    process = start(arguments_for(checkpoint, folder, **fields), folder, limit=("run/config.json", 20_000))
    assert finish(process) == 1
    log = folder.with_suffix(".log").read_text()
    assert "The stage is trained, but" in log and "File too large" in log
    assert "No checkpoint is complete: make room, and start again." in log
    assert not (folder / "alignvlm_run.json").exists()


def test_a_disk_without_room_for_the_weights_is_found_before_training(checkpoint, tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(OSError, match=r"has room for 0 MB, and the weights of the stage have \d+ MB"):
            main(arguments_for(checkpoint, tmp_path, **RATES))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_output_folder_nobody_can_write_to(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run' cannot be written to: .*Name another folder"):
        main(arguments_for(checkpoint, tmp_path / "file/run", **RATES))


@pytest.mark.filterwarnings("ignore:This process")  # of Python 3.12: it has threads
def test_a_second_run_does_not_write_into_the_folder_of_the_first(checkpoint, tmp_path):
    """Nor does a data worker that outlives its run, which may have been killed, keep the next one out."""
    folder = tmp_path / "run"
    folder.mkdir()
    with only_writer(folder):
        with pytest.raises(ValueError, match=r"Another run is writing into .*Wait for its end, or name another"):
            main(arguments_for(checkpoint, folder, **RATES))
        context = multiprocessing.get_context("fork")
        started = context.Event()
        worker = context.Process(target=lambda: (started.set(), time.sleep(60)))
        worker.start()
        assert started.wait(60)
    try:
        with only_writer(folder):
            assert list(folder.iterdir()) == []
    finally:
        worker.kill()


def test_another_model_is_not_written_over(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="holds a model of type 'qwen2', which would be written over"):
        main(arguments_for(checkpoint, tmp_path, **RATES))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_dead_data_worker_ends_the_run(checkpoint, whole, tmp_path):
    folder = tmp_path / "run"
    fields = {
        **SAVING,
        "max_steps": 2000,
        "save_total_limit": 3,
        "num_train_epochs": 1000,
        "dataloader_num_workers": 1,
    }
    process = start(arguments_for(checkpoint, folder, **fields), folder)
    while process.is_alive() and last_complete_checkpoint(folder) is None:
        time.sleep(0.01)
    assert process.is_alive(), folder.with_suffix(".log").read_text()[-2000:]
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    for worker in workers:
        worker.kill()
    assert finish(process) == 1
    # It may die while it hands a batch over: then its socket is closed, or nobody listens there.
    assert re.search(
        r"DataLoader worker \(pid|Connection(Reset|Refused)Error|EOFError", folder.with_suffix(".log").read_text()
    )
    assert last_complete_checkpoint(folder) is not None


@pytest.fixture(scope="module")
def poisoned(make_model, processor, tmp_path_factory) -> Path:
    """A checkpoint whose embedding of "~" is not a number, and whose head is another matrix."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = make_model(text={"tie_word_embeddings": False})
    (token,) = processor.tokenizer("~", add_special_tokens=False)["input_ids"]
    model.get_input_embeddings().weight.data[token] = float("nan")
    save_checkpoint(model, processor, folder, {"stages": []})
    return folder


@pytest.mark.parametrize("bf16", [False, True])
def test_a_loss_that_is_not_finite_names_the_records(poisoned, tmp_path, bf16):
    data = tmp_path / "rows.jsonl"
    rows = [{"annotations": [{"prompt": "Say it.", "response": f"This is row {i}."}]} for i in range(16)]
    rows[6]["annotations"][0]["prompt"] = "Say ~ again."
    data.write_text("\n".join(map(json.dumps, rows)))
    fields = {"sources": [{"name": "local", "data": str(data)}], "language_learning_rate": 1e-5, "bf16": bf16}
    fields |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "max_steps": 8}
    with pytest.raises(FloatingPointError) as error:
        main(arguments_for(poisoned, tmp_path / "run", **fields))
    message = str(error.value)
    assert "the loss is not finite" in message and "local[6] ('This is row 6.')" in message
    assert message.count("This is row") == 2  # the batch, and no other
    last = last_complete_checkpoint(tmp_path / "run")
    assert last is None or str(last) in message


def launch(arguments: list[str], **environment: str) -> subprocess.Popen:
    config = ROOT / "training/accelerate/cpu_2_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return subprocess.Popen(
        [*command, "--main_process_port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TWO = {**SAVING, "max_steps": 4000, "num_train_epochs": 1000, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def with_a_dead_rank(checkpoint, tmp_path_factory):
    """The folder of a run by two processes, one of which died, the exit status, and what was printed; `modules` beside it would hold
    remote code."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    given = arguments_for(checkpoint, folder, **TWO)
    process = launch(["training/stage3.py", *given], HF_MODULES_CACHE=str(folder.with_name("modules")))
    while process.poll() is None and last_complete_checkpoint(folder) is None:
        time.sleep(0.02)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    assert ranks
    ranks[0].kill()
    output, _ = process.communicate(timeout=120)
    return folder, process.returncode, output


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_run_resumes(checkpoint, with_a_dead_rank, tmp_path):
    folder, status, output = with_a_dead_rank
    assert status != 0
    assert "Signal 9 (SIGKILL)" in output and "rank" in output
    step = int(last_complete_checkpoint(folder).name.split("-")[1])
    fields = {**TWO, "max_steps": step + 2}
    given = [*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"]
    forked.run("alignvlm.stages.stage:main", given, log=tmp_path / "log", processes=2)
    assert read_run_record(folder)["stages"][-1]["steps"] == step + 2
    fields["max_steps"] = step + 4
    with pytest.raises(ValueError, match="global_batch_size was 4 and is 2"):  # with one process less
        main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])


@pytest.mark.slow
def test_images_on_one_rank_and_text_on_the_other(checkpoint, tmp_path):
    given = str(checkpoint), str(tmp_path / "two")
    forked.run("tests.uneven_ranks:main", *given, log=tmp_path / "log", processes=2)
    uneven_ranks.main(str(checkpoint), str(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_no_remote_code_is_loaded_in_training(with_a_dead_rank):
    """So several processes cannot race for the modules cache."""
    folder, _, _ = with_a_dead_rank
    assert last_complete_checkpoint(folder) is not None
    assert not list(folder.with_name("modules").rglob("*alignvlm*"))
