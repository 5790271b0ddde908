"""Finds a model by its name, a folder or a repository of the Hub: whether it exists, its files, its commit."""

import os
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library the client uses, lost connections among them


def check_model(name: str | os.PathLike, revision: str | None = None) -> None:
    """Checks that a model exists before anything is loaded.

    Raises:
        FileNotFoundError: if `name` is neither a folder nor a readable model of the Hub; the message says which of them it can be.
        ValueError: for a revision of a folder.
    """
    if any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        if revision is not None:
            raise ValueError(
                f"The revision {revision!r} would be of a model of the Hub, but {str(name)!r} is a folder here, read as it is. Leave the "
                "revision out."
            )
        return
    if Path(name).is_dir():
        below = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
        raise FileNotFoundError(
            f"{str(name)!r} holds no model: it has no config.json. "
            + (f"Models lie in its folders {', '.join(below)}: name one." if below else "Name a folder that has one.")
        )
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"No such folder: {str(name)!r} (looked for in {Path.cwd()}). Name a folder with a model, as a stage or "
            "`alignvlm assemble` writes it, or a model of the Hub as user/name."
        ) from error
    try:
        cached_file(str(name), "config.json", revision=revision)
    except OSError as error:
        what = "model" if revision is None else f"revision {revision!r} of a model"
        raise FileNotFoundError(
            f"No such folder: {str(name)!r} (looked for in {Path.cwd()}), and the Hub gives no {what} of that name: {error}"
        ) from error


def file_of(model: str | os.PathLike, name: str, revision: str | None = None) -> str | None:
    """The path of one file of a folder or (downloaded) of a Hub repository; None if it has no such file."""
    return cached_file(str(model), name, revision=revision, _raise_exceptions_for_missing_entries=False)


def commit_of(model: str | os.PathLike, revision: str | None = None) -> str | None:
    """The commit that a Hub repository's branch or tag points to now; None for a folder."""
    if Path(model).is_dir():
        return None
    return extract_commit_hash(cached_file(str(model), "config.json", revision=revision), None)
