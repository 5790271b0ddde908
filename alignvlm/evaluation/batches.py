"""Runs work in batches that can be interrupted and resumed, by any number of processes.

Batches do not depend on the number of processes. Each process writes its finished batches to disk, a line each, so interrupted work
continues where it stopped, with the same result.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm


@dataclass
class Work:
    """Units of work that do not depend on each other, and how to run and summarise them.

    Args:
        length: the number of units.
        settings: what decides the outputs, for the result file.
        run: returns one output per unit of a range, each JSON-serialisable.
        summarise: returns the result of all outputs, which are in order.
        prepare: called by every process before the first batch, if any is missing: to load what finished work does not need.
        at_once: how many batches a process runs at once, in threads, for work that waits for others.
    """

    length: int
    settings: dict
    run: Callable[[range], list]
    summarise: Callable[[list], dict] | None = None
    prepare: Callable[[], None] | None = None
    at_once: int = 1


def progress_folder(output_dir: Path, name: str, settings: dict) -> Path:
    """Returns where work of these settings keeps its finished batches; other settings have another folder."""
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return output_dir / f".{name}-{fingerprint}"


def run_batches(work: Work, batch_size: int, folder: Path, state: PartialState, title: str) -> list | None:
    """Runs the batches that `folder` does not hold yet; of n processes each runs every n-th batch.

    Args:
        batch_size: units per batch.
        folder: holds the finished batches, the same for all processes. A crash costs at most the batches in flight.
        title: of the progress bar.

    Returns:
        All outputs in order, on the main process; None on the others.

    Raises:
        ValueError: if another program is at the same work.
    """
    lock = FileLock(folder / "lock")
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _take(lock, folder)
        _drop_unfinished_lines(folder)
    try:
        return _run_missing(work, batch_size, folder, state, title)
    finally:
        lock.release()


def _take(lock: FileLock, folder: Path) -> None:
    """Takes the lock of a folder, which ends with the process. Processes of a launcher that was killed may still be at work there."""
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another program is at this work, in {folder}: wait until it ends, or stop it. Processes of a launcher that was killed go on."
        ) from error
    except NotImplementedError:  # a file system without locks
        pass


def _run_missing(work: Work, batch_size: int, folder: Path, state: PartialState, title: str) -> list | None:
    state.wait_for_everyone()
    batches = {
        start: range(start, min(start + batch_size, work.length)) for start in range(0, work.length, batch_size)
    }
    done = _finished_batches(folder)
    state.wait_for_everyone()  # everyone has read before anyone writes
    missing = [start for start in batches if start not in done]
    mine = missing[state.process_index :: state.num_processes]
    if done and state.is_main_process:
        print(f"Going on with {folder}: {len(done)} of {len(batches)} batches are done.")
    if missing and work.prepare is not None:
        work.prepare()
    with (folder / f"{state.process_index}.jsonl").open("a", encoding="utf-8") as file:
        outputs = _run(work, [batches[start] for start in mine])
        for start, found in tqdm(outputs, desc=title, total=len(mine), disable=not state.is_main_process):
            file.write(json.dumps({"start": start, "outputs": found}) + "\n")
            file.flush()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _finished_batches(folder)
    return [output for start in batches for output in done[start]]


def _run(work: Work, batches: Iterable[range]) -> Iterator[tuple[int, list]]:
    """Yields the first unit and the outputs of each batch when it is finished. After a failure those under way are still yielded."""
    if work.at_once == 1:
        for batch in batches:
            yield batch.start, work.run(batch)
        return
    following, running, failure = iter(batches), {}, None
    with ThreadPoolExecutor(work.at_once) as pool:
        while True:
            if failure is None:
                for batch in islice(following, work.at_once - len(running)):
                    running[pool.submit(work.run, batch)] = batch.start
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                start = running.pop(future)
                if (error := future.exception()) is None:
                    yield start, future.result()
                else:
                    failure = failure or error
    if failure is not None:
        raise failure


def _drop_unfinished_lines(folder: Path) -> None:
    """Removes a last line that a crash cut short, so that the next line does not continue it."""
    for file in folder.glob("*.jsonl"):
        whole, _, rest = file.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            file.write_text(whole + "\n" if whole else "", encoding="utf-8")


def _finished_batches(folder: Path) -> dict[int, list]:
    """Returns the outputs of finished batches by their first unit, whichever process wrote them."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    return {entry["start"]: entry["outputs"] for entry in map(json.loads, lines)}
