"""Two programs at the same work: the second is refused while the first runs, and goes on when it has been killed."""

import subprocess
import sys
import time

import pytest
from accelerate import PartialState

from alignvlm.evaluation.batches import Work, run_batches


AT_WORK = """
import sys, time
from pathlib import Path
from accelerate import PartialState
from alignvlm.evaluation.batches import Work, run_batches

def run(batch):
    if batch.start == 2:
        time.sleep(600)
    return [index * 10 for index in batch]

run_batches(Work(6, {}, run), 2, Path(sys.argv[1]), PartialState(cpu=True), "work")
"""


def test_a_second_program_waits_its_turn(tmp_path):
    folder, asked = tmp_path / ".work", []

    def run(batch):
        asked.append(batch.start)
        return [index * 10 for index in batch]

    def go_on():
        return run_batches(Work(6, {}, run), 2, folder, PartialState(cpu=True), "work")

    first = subprocess.Popen([sys.executable, "-c", AT_WORK, str(folder)])
    try:
        deadline = time.monotonic() + 120
        while not any(file.read_text().endswith("\n") for file in folder.glob("*.jsonl")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        with pytest.raises(
            ValueError, match=r"Another program is at this work, in .*\.work: wait until it ends, or stop it"
        ):
            go_on()
    finally:
        first.kill()
        first.wait()
    assert go_on() == [0, 10, 20, 30, 40, 50] and asked == [2, 4]
