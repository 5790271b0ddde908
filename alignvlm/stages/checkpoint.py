"""A checkpoint folder is a repository: weights, code, processor, licence, card and run record, loadable by the Auto classes.

The run record, `alignvlm_run.json`, tells how the weights came about: the backbones, and one entry per stage.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from hub_upload.card import make_card
from hub_upload.package import parameter_count, renewed_card
from hub_upload.run_record import RUN_RECORD, write_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


logger = logging.get_logger(__name__)

INTERRUPTED = (
    "interrupted"  # folder in output_dir: the checkpoint of a run that a signal stopped between two of its own
)
PROGRESS = "alignvlm_progress.json"  # in each checkpoint-N: what the run had read and taken up to it


def read_progress(checkpoint: str | os.PathLike) -> dict | None:
    """Reads what `AlignVLMTrainer.progress` was when a `checkpoint-N` folder was written; None if it does not say."""
    path = Path(checkpoint) / PROGRESS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_writable(folder: str | os.PathLike) -> None:
    """Raises a clear error if nothing can be written into `folder`, which is created if need be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise OSError(f"output_dir {str(folder)!r} cannot be written to: {error}. Name another folder.") from error


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
    shutil.copyfile(_licence_file(), folder / "LICENSE")
    card = make_card(record, json.loads((folder / "config.json").read_text(encoding="utf-8")), parameter_count(folder))
    readme = folder / "README.md"
    try:
        readme.write_text(
            renewed_card(readme.read_text(encoding="utf-8"), card) if readme.is_file() else card, encoding="utf-8"
        )
    except ValueError as error:  # too late to stop; packaging will ask for it to be mended
        logger.warning(f"{readme} was left as it is: {error}")
    write_run_record(folder, record)


def _licence_file() -> Path:
    """Finds the licence of the code files, in the checkout or the installed distribution."""
    checkout = Path(__file__).resolve().parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout
    distribution = importlib.metadata.distribution("alignvlm")
    return next(Path(distribution.locate_file(file)) for file in distribution.files if file.name == "LICENSE")
