"""Programs in child processes, forked from a server that has imported everything once.

A process spends five seconds on importing torch, transformers and TRL, a fork of one that has imported them none. What is said of a
script, of its command line or of `accelerate launch` needs the real command; for all else there is this.
"""

import gc
import importlib
import multiprocessing
import os
import signal
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.forked",
        "tests.killing",
        "alignvlm.stages.stage",
        "alignvlm.evaluation.evaluate_model",
        "alignvlm.tools.recaption",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.siglip.image_processing_pil_siglip",
        "transformers.models.siglip.modeling_siglip",
    ]
)


def prepare(log: Path) -> None:
    """Makes a fork like a process that was started: its own group and log, data workers that are forked, one thread for its work."""
    import torch

    gc.freeze()
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["OMP_NUM_THREADS"] = "1"  # which accelerate sets the threads of ranks by
    torch.set_num_threads(1)


def _run(main: str, given: tuple, log: Path, processes: int) -> None:
    from accelerate import debug_launcher

    prepare(log)
    module, _, name = main.partition(":")
    function = getattr(importlib.import_module(module), name)
    if processes == 1:
        function(*given)
    else:
        debug_launcher(function, given, processes)


def start(main: str, *given, log: Path, processes: int = 1) -> multiprocessing.Process:
    """Starts a function, `start("module:function", *arguments)`, in a process of its own or as the ranks of several."""
    process = CONTEXT.Process(target=_run, args=(main, given, log, processes))
    process.start()
    return process


def run(main: str, *given, log: Path, processes: int = 1, timeout: float = 300) -> str:
    """Runs a function to its end, which must be a good one; returns what it printed."""
    process = start(main, *given, log=log, processes=processes)
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == 0, log.read_text()[-4000:]
    return log.read_text()
