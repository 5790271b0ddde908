"""Two programs at the same work: the second is refused while the first runs, and goes on when it has been killed."""

import time

import pytest
from accelerate import PartialState

from alignvlm.evaluation.batches import Work, run_batches
from tests import forked


def work_on(folder):
    """Does a batch, and stays at the next."""

    def run(batch):
        if batch.start == 2:
            time.sleep(600)
        return [index * 10 for index in batch]

    run_batches(Work(6, {}, run), 2, folder, PartialState(cpu=True), "work")


def test_a_second_program_waits_its_turn(tmp_path):
    folder, asked = tmp_path / ".work", []

    def run(batch):
        asked.append(batch.start)
        return [index * 10 for index in batch]

    def go_on():
        return run_batches(Work(6, {}, run), 2, folder, PartialState(cpu=True), "work")

    first = forked.start("tests.evaluation.test_batches:work_on", folder, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not any(file.read_text().endswith("\n") for file in folder.glob("*.jsonl")):
            assert time.monotonic() < deadline and first.is_alive()
            time.sleep(0.05)
        with pytest.raises(
            ValueError, match=r"Another program is at this work, in .*\.work: wait until it ends, or stop it"
        ):
            go_on()
    finally:
        first.kill()
        first.join()
    assert go_on() == [0, 10, 20, 30, 40, 50] and asked == [2, 4]
