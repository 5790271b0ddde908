"""What a stage prints while it trains."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest
from transformers import TrainerState, TrainingArguments

from alignvlm.stages import trainer as trainer_module
from alignvlm.stages.log_lines import LogLines, clock, line, say, short
from alignvlm.stages.stage import main
from tests.running import arguments_for


HELD_OUT = [{"name": "scenes", "annotations": ["questions"], "count": 4, "split": "test"}]
LOGGED = {
    "loss": 2.34567,
    "learning_rate/projector": 3e-4,
    "learning_rate/language": 8.2e-5,
    "tokens_per_second": 12345.0,
    "images_per_second": 45.61,
    "memory_gb": 1.234,
    "seconds_left": 3725,
}


def test_a_line_holds_the_numbers_in_their_units():
    assert line(2, 50, 1000, LOGGED) == (
        "stage 2    50/1000  loss  2.3457  lr projector 3.0e-04 language 8.2e-05  12.3k tokens/s   45.6 images/s  1.23 GB  1:02:05 left"
    )
    assert (
        line(1, 0, 0, {"eval_loss": 4.2, "eval_runtime": 61.2})
        == "stage 1  before training  held-out loss 4.2000  1:01"
    )
    assert line(1, 9, 9, {"mir": 3.14159, "epoch": 1.0}) == "stage 1  9/9  mir 3.142"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.5, "0.50"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.6, "1.00k"),
        (123456, "123k"),
        (2.5e9, "2.50G"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (180005, "2d 02:00:05")]
)
def test_times(seconds, text):
    assert clock(seconds) == text


def test_a_stage_prints_a_line_per_log_step_and_no_dictionaries(checkpoint, tmp_path, capsys, monkeypatch):
    trainers = []
    made = trainer_module.AlignVLMTrainer.__init__
    monkeypatch.setattr(
        trainer_module.AlignVLMTrainer,
        "__init__",
        lambda self, *a, **k: (trainers.append(self), made(self, *a, **k))[1],
    )
    rates = {"projector_learning_rate": 1e-3, "vision_learning_rate": 1e-5}
    fields = {"eval_sources": HELD_OUT, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 2}
    main(arguments_for(checkpoint, tmp_path, **rates, **fields, max_steps=3))
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert not [text for text in printed if "{" in text] and "/s]" not in captured.err  # no bars
    lines = [text for text in printed if text.startswith("stage 3")]
    number = r" *[\d.]+k?"
    for step, text in enumerate((text for text in lines if "  loss " in text), 1):
        pattern = rf"stage 3  {step}/3  loss +\d\.\d{{4}}  lr vision 1.0e-05 projector 1.0e-03  {number} tokens/s  {number} images/s"
        assert re.fullmatch(rf"{pattern}  \d+\.\d\d GB  \d+:\d\d left", text), text
    assert sum("  loss " in text for text in lines) == 3
    assert re.fullmatch(r"stage 3  before training  held-out loss \d+\.\d{4}  0:\d\d", lines[0])
    assert [text[:12] for text in lines if "held-out" in text][1:] == ["stage 3  2/3", "stage 3  3/3", "stage 3  3/3"]
    assert re.fullmatch(r"stage 3  3/3  trained for 0:\d\d  mean loss \d+\.\d{4}", lines[-2])
    (trainer,) = trainers
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, text in zip(logged, (text for text in lines if "  loss " in text), strict=True):
        assert entry["learning_rate/projector"] == 1e-3 and f"loss {entry['loss']:7.4f}" in text
        assert f"{short(entry['tokens_per_second'])} tokens/s" in text and f"{entry['memory_gb']:.2f} GB" in text
    assert logged[-1]["seconds_left"] == 0 < logged[-1]["memory_gb"]


BEFORE = """
import torch
from alignvlm.stages.log_lines import peak_memory_gb
device = torch.device("cpu")
before = peak_memory_gb(device)
"""
MEMORY = f"""{BEFORE}
held = torch.ones(50_000_000 + int(before * 1e9 / 4))  # more than was ever held at once
print(peak_memory_gb(device) - before, held[0].item())
"""


@pytest.mark.slow
def test_memory_grows_with_what_is_held():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[0]) > 0.15


@pytest.mark.slow
def test_memory_is_that_of_the_process_and_not_of_its_parent():
    """A stage that was started from a large process reported that one's memory."""
    parent = (
        "import subprocess, sys; held = b'x' * 1_500_000_000;"
        f"subprocess.run([sys.executable, '-c', {BEFORE + 'print(before)'!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 1.4


def screen(text: str) -> list[str]:
    """What a terminal shows in the end."""
    rows = [""]
    column = 0
    for piece in re.findall(r"\r|\n|\x1b\[[\d;]*\w|[^\r\n\x1b]+", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            rows.append("")
            column = 0
        elif not piece.startswith("\x1b"):
            rows[-1] = rows[-1][:column] + piece + rows[-1][column + len(piece) :]
            column += len(piece)
    return [row.rstrip() for row in rows]


def waiting(master: int) -> str:
    """What was written to a terminal."""
    found = b""
    while select.select([master], [], [], 0.2)[0]:
        found += os.read(master, 100_000)
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_terminal_shows_a_bar_below_whole_lines(tmp_path, monkeypatch, disable_tqdm):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    with os.fdopen(slave, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        arguments = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=disable_tqdm, use_cpu=True)
        state, lines = TrainerState(max_steps=4, is_world_process_zero=True), LogLines(2)
        lines.on_train_begin(arguments, state, None)
        for state.global_step in (1, 2, 3):
            lines.on_step_end(arguments, state, None)
            lines.on_log(arguments, state, None, logs=LOGGED)
        say("something else")
        if lines.bar is not None:
            lines.bar.refresh()
        during = waiting(master)
        lines.on_train_end(arguments, state, None)
        after = during + waiting(master)
    os.close(master)
    expected = [*(line(2, step, 4, LOGGED) for step in (1, 2, 3)), "something else"]
    assert screen(after)[:4] == screen(during)[:4] == expected
    assert not screen(after)[4]
    assert ("stage 2:  75%" in screen(during)[4]) is not disable_tqdm
