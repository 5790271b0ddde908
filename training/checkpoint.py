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
import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from hub_upload.card import make_card
from hub_upload.package import RUN_RECORD, parameter_count, renewed_card
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


logger = transformers.utils.logging.get_logger(__name__)

PROGRESS = "alignvlm_progress.json"  # in each checkpoint-N: what the run had read and taken up to it
VERSIONED_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "alignvlm")


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries a result depends on."""
    found = {
        distribution.metadata["Name"].lower(): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return {name: found[name] for name in VERSIONED_PACKAGES if name in found}


def read_run_record(folder: str | os.PathLike, revision: str | None = None) -> dict:
    """The run record of a checkpoint; one without stages if the folder or Hub repository has none."""
    path = transformers.utils.cached_file(
        str(folder), RUN_RECORD, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return json.loads(Path(path).read_text()) if path else {"stages": []}


def read_progress(checkpoint: str | os.PathLike) -> dict | None:
    """What `AlignVLMTrainer.progress` was when a `checkpoint-N` folder was written; None if it does not say."""
    path = Path(checkpoint) / PROGRESS
    return json.loads(path.read_text()) if path.is_file() else None


def check_model(name: str | os.PathLike, revision: str | None = None) -> None:
    """Checks that a model is there before anything is loaded.

    Raises:
        FileNotFoundError: if `name` is neither a folder nor a model of the Hub that can be read; the message says which of them it can
            be.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"No such folder: {str(name)!r} (looked for in {Path.cwd()}). Name a folder with a model, as a stage or "
            "`python -m training.backbones` writes it, or a model of the Hub as user/name."
        ) from error
    try:
        transformers.utils.cached_file(str(name), "config.json", revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"No such folder: {str(name)!r} (looked for in {Path.cwd()}), and the Hub gives no model of that name: {error}"
        ) from error


def commit_of(model: str | os.PathLike, revision: str | None = None) -> str | None:
    """The commit a Hub repository's branch or tag stands for now; None for a folder."""
    if Path(model).is_dir():
        return None
    path = transformers.utils.cached_file(str(model), "config.json", revision=revision)
    return transformers.utils.hub.extract_commit_hash(path, None)


def check_writable(folder: str | os.PathLike) -> None:
    """Raises a clear error if nothing can be written into `folder`, which is created if need be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise OSError(f"output_dir {str(folder)!r} cannot be written to: {error}. Name another folder.") from error


def is_whole(checkpoint: Path) -> bool:
    """Whether a `checkpoint-N` folder of the trainer was written to its end: `trainer_state.json` is what it writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole `checkpoint-N` folders of a run, in the order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    return sorted(filter(is_whole, found), key=lambda path: int(path.name.split("-")[-1]))


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The last of `whole_checkpoints`; None if there is none."""
    return next(reversed(whole_checkpoints(output_dir)), None)


def average_weights(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of the weights of several checkpoint folders, summed in float64; dtypes are those of the first."""
    files = [sorted(folder.glob("*.safetensors")) for folder in checkpoints]
    mean = {}
    for parts in zip(*files, strict=True):
        opened = [safe_open(part, framework="pt") for part in parts]
        for name in opened[0].keys():  # noqa: SIM118 - not a dictionary
            first = opened[0].get_tensor(name)
            total = first.double() if first.is_floating_point() else None
            if total is None:
                mean[name] = first
                continue
            for other in opened[1:]:
                total += other.get_tensor(name).double()
            mean[name] = (total / len(opened)).to(first.dtype)
    return mean


def save_checkpoint(
    model: AlignVLMForConditionalGeneration,
    processor: AlignVLMProcessor,
    folder: str | os.PathLike,
    record: dict,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a complete repository into `folder`, run record last: a folder with a record is whole.

    A README.md that was edited by hand keeps its text.

    Args:
        state_dict: the weights, where `model` holds only its share of them.
    """
    folder = Path(folder)
    (folder / RUN_RECORD).unlink(missing_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
    shutil.copyfile(_licence_file(), folder / "LICENSE")
    card = make_card(record, json.loads((folder / "config.json").read_text()), parameter_count(folder))
    readme = folder / "README.md"
    try:
        readme.write_text(renewed_card(readme.read_text(), card) if readme.is_file() else card)
    except ValueError as error:  # too late to stop; packaging will ask for it to be mended
        logger.warning(f"{readme} was left as it is: {error}")
    unfinished = folder / f"{RUN_RECORD}.tmp"
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(folder / RUN_RECORD)


def _licence_file() -> Path:
    """The licence of the code files, from the checkout or the installed distribution."""
    checkout = Path(__file__).parents[1] / "LICENSE"
    if checkout.is_file():
        return checkout
    distribution = importlib.metadata.distribution("alignvlm")
    return next(Path(distribution.locate_file(file)) for file in distribution.files if file.name == "LICENSE")
