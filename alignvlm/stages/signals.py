"""Ctrl-C and SIGTERM: the step that runs is finished, a checkpoint is written, and the run says how to go on.

transformers' own `enable_jit_checkpoint` knows SIGTERM only, may write in the middle of a step, whose random numbers are then spent, and
lets each of several processes stop at a step of its own.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal and a launcher may both send what was one Ctrl-C; a second one comes later than this many seconds.
SAME_SECONDS = 1.0


class Interrupted(SystemExit):
    """Ends the process as the signal would have: exit status 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class EvaluationStopped(Exception):
    """Leaves an evaluation that a signal stopped; the trainer goes on with the checkpoint."""


class StopOnSignal(TrainerCallback):
    """Stops all processes of a trainer after the same step, with a checkpoint, once one of them has got a signal.

    An evaluation on the way is left after its batch, unless training depends on what it finds (`metric_for_best_model`) or no step has
    been taken (`eval_on_start`). A second Ctrl-C ends the process at once. `stopped` is the signal that stopped training, or None.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.received: int | None = None
        self.received_at = 0.0
        self.stopped: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopOnSignal"]:
        """Takes the signals while the block runs; only Python's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.process = os.getpid()
        self.trainer.add_callback(self)
        before = {number: signal.signal(number, self._receive) or signal.SIG_DFL for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.trainer.remove_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_received(args, state, control)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.may_leave_evaluation and args.metric_for_best_model is None:
            self._stop_if_received(args, state, control)
            if self.stopped is not None:
                raise EvaluationStopped

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped is not None:  # in the middle of it, perhaps; the checkpoint is written
            control.should_save = control.should_evaluate = False

    def _stop_if_received(self, args, state, control) -> None:
        self.stopped = self._agreed()
        if self.stopped is None:
            return
        ends_an_epoch = args.save_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch)
        self.trainer.saves_aside = not (control.should_save or ends_an_epoch)
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a forked child
            return
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            if self.trainer.is_world_process_zero():
                again = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
                told = f"\n{signal.Signals(number).name}: a checkpoint is written after this step.{again}\n"
                os.write(2, told.encode())  # printing is not safe here
        elif number == signal.SIGINT and time.monotonic() - self.received_at > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _agreed(self) -> int | None:
        """Returns the signal that any process has got."""
        if self.trainer.accelerator.num_processes == 1:
            return self.received
        own = torch.tensor([self.received or 0], device=self.trainer.accelerator.device)
        return int(self.trainer.accelerator.gather(own).max()) or None


def sheltered(worker_init_fn: Callable[[int], None] | None) -> Callable[[int], None]:
    """Returns a `worker_init_fn` for a data worker that leaves signals to the process it works for.

    Ctrl-C, launchers and clusters send signals to whole groups of processes; a step whose workers are gone could not be finished.
    """
    return partial(_start_worker, worker_init_fn)


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _end_by_parent(parent: int) -> None:
    """Obeys SIGTERM from the parent, which ends its workers by it."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
