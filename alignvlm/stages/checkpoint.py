"""A checkpoint folder is a repository: weights, code, processor, licence, card and run record, loadable by the Auto classes.

The run record, `alignvlm_run.json`, tells how the weights came about: the backbones, and one entry per stage.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging

from hub_upload.card import make_card
from hub_upload.package import parameter_count, renewed_card
from hub_upload.run_record import RUN_RECORD, write_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

INTERRUPTED = (
    "interrupted"  # folder in output_dir: the checkpoint of a run that a signal stopped between two of its own
)
PROGRESS = "alignvlm_progress.json"  # in each checkpoint-N: what the run had read and taken up to it


def read_progress(checkpoint: str | os.PathLike) -> dict | None:
    """Reads what `AlignVLMTrainer.progress` was when a `checkpoint-N` folder was written; None if it does not say."""
    path = Path(checkpoint) / PROGRESS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_writable(folder: str | os.PathLike, create: bool = True) -> None:
    """Raises a clear error if nothing can be written into `folder`, which is created if need be, or without `create` into the first folder
    above it that is there."""
    try:
        if create:
            Path(folder).mkdir(parents=True, exist_ok=True)
        there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise OSError(f"output_dir {str(folder)!r} cannot be written to: {error}. Name another folder.") from error


def check_no_other_model(folder: str | os.PathLike) -> None:
    """Raises a `ValueError` if `folder` holds a model of another type, such as a backbone, which writing a checkpoint would destroy."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return
    if found not in (None, AlignVLMConfig.model_type):
        raise ValueError(
            f"output_dir {str(folder)!r} holds a model of type {found!r}, which would be written over. Name another folder."
        )


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Lets no other run write into `folder` while the block runs, in the main process of each; the lock leaves nothing on the disk and ends
    with the process, however that ends. Where the file system or the operating system has no locks, there is none.

    Raises:
        ValueError: if another run has it.
    """
    if fcntl is None or not PartialState().is_main_process:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _LOCKS.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another run is writing into {str(folder)!r}. Wait for its end, or name another output_dir."
            ) from error
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        if descriptor in _LOCKS:
            _LOCKS.remove(descriptor)
            os.close(descriptor)


_LOCKS: set[int] = set()


def _leave_locks_to_the_parent() -> None:
    """Runs in a forked child, such as a data worker, which may outlive its parent for seconds."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def is_complete(checkpoint: Path) -> bool:
    """Tells whether a `checkpoint-N` folder of the trainer was written to its end: `trainer_state.json` is what it writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Lists the complete `checkpoint-N` folders of a run, in the order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    return sorted(filter(is_complete, found), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Finds the last of `complete_checkpoints` and of those that an interruption left; None if there is none."""
    found = [*complete_checkpoints(output_dir), *complete_checkpoints(Path(output_dir) / INTERRUPTED)]
    return max(found, key=_step_of, default=None)


def how_to_go_on(output_dir: str | os.PathLike) -> str:
    """Says what to do after a write that failed."""
    last = last_complete_checkpoint(output_dir)
    if last is None:
        return "No checkpoint is complete: make room, and start again."
    return f"The last complete checkpoint is {last}. Make room, and go on with --resume_from_checkpoint."


def check_room(folder: str | os.PathLike, model: torch.nn.Module) -> None:
    """Raises an `OSError` if the disk has less room than the weights that a stage writes in the end, which nothing else would hold then."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    there = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if needed > free + there:
        raise OSError(
            f"output_dir {str(folder)!r} has room for {free / 1e6:,.0f} MB, and the weights of the stage have {needed / 1e6:,.0f} MB. Make "
            "room, or name another folder."
        )


def save_checkpoint(
    model: AlignVLMForConditionalGeneration,
    processor: AlignVLMProcessor,
    folder: str | os.PathLike,
    record: dict,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a complete repository into `folder`, run record last: a folder with a record is complete.

    A README.md that was edited by hand keeps its text.

    Args:
        state_dict: the weights, where `model` holds only its share of them.
    """
    folder = Path(folder)
    (folder / RUN_RECORD).unlink(missing_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
    write_licence(folder)
    card = make_card(record, json.loads((folder / "config.json").read_text(encoding="utf-8")), parameter_count(folder))
    readme = folder / "README.md"
    try:
        readme.write_text(
            renewed_card(readme.read_text(encoding="utf-8"), card) if readme.is_file() else card, encoding="utf-8"
        )
    except ValueError as error:  # too late to stop; packaging will ask for it to be mended
        logger.warning(f"{readme} was left as it is: {error}")
    write_run_record(folder, record)


def write_licence(folder: str | os.PathLike) -> None:
    """Copies the code's licence into the folder of a checkpoint."""
    shutil.copyfile(_licence_file(), Path(folder) / "LICENSE")


def _licence_file() -> Path:
    """Finds the licence of the code files, in the checkout or the installed distribution."""
    checkout = Path(__file__).resolve().parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout
    distribution = importlib.metadata.distribution("alignvlm")
    return next(Path(distribution.locate_file(file)) for file in distribution.files if file.name == "LICENSE")
