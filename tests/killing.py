"""Stages in child processes that are killed: by the parent, or by themselves at a certain write."""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from tests import forked


def _run(arguments: list[str], log: Path, folder: Path, kill_at: int | None, limit: tuple[str, int] | None) -> None:
    from transformers.utils import logging

    from alignvlm.stages.stage import main

    forked.prepare(log)
    logging.set_verbosity_error()
    writes = 0

    def hook(event: str, details: tuple) -> None:
        nonlocal writes
        path = details[0] if event == "open" else None
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(str(folder)):
            return
        if not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        writes += 1
        if limit is not None and limit[0] in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
        if writes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        main(arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def start(
    arguments: list[str],
    folder: Path,
    kill_at: int | None = None,
    limit: tuple[str, int] | None = None,
) -> multiprocessing.Process:
    """Starts a stage that writes into `folder`, its output going to `folder`.log.

    Args:
        kill_at: it kills itself when it opens its so-manieth file of the folder for writing.
        limit: from the first file whose path holds `limit[0]` on, no file may be larger than `limit[1]` bytes.
    """
    process = forked.CONTEXT.Process(target=_run, args=(arguments, folder.with_suffix(".log"), folder, kill_at, limit))
    process.start()
    return process
