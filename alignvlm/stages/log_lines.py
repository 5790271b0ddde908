"""What a stage says while it trains: one line per log step, and a bar below the lines in a terminal.

The numbers are those that `AlignVLMTrainer.log` gives to every callback, so a tracker (`report_to`) has them too.
"""

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length
from transformers.utils import logging


try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

LIBRARY_CALLBACKS = (PrinterCallback, DEFAULT_PROGRESS_CALLBACK)  # what transformers prints instead
REWARDS = {"reward": "reward", "rewards/margins": "margin"}  # of stage 5, by TRL's names: of GRPO, of DPO
RATE = "learning_rate/"  # before a module's name: its learning rate in the log


def say(text: str) -> None:
    """Prints to the output, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def bars_in_a_terminal_only() -> None:
    """Hides the bars of `datasets`, transformers and the Hub's client where errors go to no terminal: each state would be a line."""
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


class LogLines(TrainerCallback):
    """Prints a line per log step, evaluation and metric, from process 0; shows a bar if its errors go to a terminal.

    `disable_tqdm` leaves out the bar.
    """

    def __init__(self, stage: int = 0):
        self.stage = stage
        self.bar: tqdm | None = None
        self.evaluation_bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = self._bar(args, f"stage {self.stage}", "step", total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.evaluation_bar is None:
                self.evaluation_bar = self._bar(args, "held-out records", "batch", total=len(eval_dataloader))
            self.evaluation_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
            self.evaluation_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            say(line(self.stage, state.global_step, state.max_steps, logs))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _bar(self, args, title: str, unit: str, **options) -> tqdm:
        hidden = args.disable_tqdm or not sys.stderr.isatty()
        return tqdm(desc=title, unit=unit, dynamic_ncols=True, leave=False, disable=hidden, **options)


def line(stage: int, step: int, steps: int, logs: dict[str, float]) -> str:
    """Writes what a trainer logs in one line.

    Args:
        stage, step: of the stage.
        steps: that it will have in the end; 0 before training, when nobody knows.
        logs: as `Trainer.log` has them: of a log step, an evaluation, the end of training, or any other numbers.
    """
    parts = [position(stage, step, steps)]
    if "loss" in logs:
        rates = {name.removeprefix(RATE): value for name, value in logs.items() if name.startswith(RATE)}
        parts.append(f"loss {logs['loss']:7.4f}")
        parts += [f"{name} {logs[key]:.3f}" for key, name in REWARDS.items() if logs.get(key) is not None]
        parts.append("lr " + " ".join(f"{module} {rate:.1e}" for module, rate in rates.items()))
        parts += [f"{short(logs[f'{what}_per_second']):>5} {what}/s" for what in ("tokens", "images")]
        parts.append(f"{logs['memory_gb']:.2f} GB")
        parts.append(f"{clock(logs['seconds_left'])} left")
    elif "eval_loss" in logs:
        parts += [f"held-out loss {logs['eval_loss']:.4f}", clock(logs["eval_runtime"])]
    elif "train_runtime" in logs:
        parts += [f"trained for {clock(logs['train_runtime'])}", f"mean loss {logs['train_loss']:.4f}"]
    else:
        parts += [f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch"]
    return "  ".join(parts)


def position(stage: int, step: int, steps: int) -> str:
    """Returns the beginning of a line: the stage, and the step of how many."""
    return f"stage {stage}  {step:>{len(str(steps))}}/{steps}" if steps else f"stage {stage}  before training"


def short(value: float) -> str:
    """Writes a number with three digits: 0.52, 48.3, 12.3k, 1.20M."""
    letters = ["", "k", "M", "G"]
    while value >= 999.5 and len(letters) > 1:
        value /= 1000
        letters.pop(0)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{letters[0]}"


def clock(seconds: float) -> str:
    """Writes a time as 0:07, 12:34, 1:02:03 or 2d 03:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_gb(device: torch.device) -> float:
    """Returns the most memory that this process has held so far: what PyTorch had allocated on a GPU, else all of the process."""
    module = torch.get_device_module(device) if device.type != "cpu" else None
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device) / 1e9
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e9
    with suppress(OSError):  # Linux: `ru_maxrss` of a child process begins with what its parent held
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
