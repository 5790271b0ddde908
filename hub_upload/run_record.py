"""The run record of a checkpoint, `alignvlm_run.json`: how its weights were trained, with versions and hashes.

It is written after the weights, so a folder with a run record has all of them.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from hub_upload.repository import file_of


RUN_RECORD = "alignvlm_run.json"
VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "peft",
    "alignvlm",
)


def read_run_record(model: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Reads the run record of a checkpoint; returns one without stages if the folder or Hub repository has none."""
    path = file_of(model, RUN_RECORD, revision)
    return read_json(Path(path)) if path else {"stages": []}


def write_run_record(folder: str | os.PathLike, record: dict[str, Any]) -> None:
    """Writes the run record of a checkpoint folder: completely or not at all."""
    write_json(Path(folder) / RUN_RECORD, record)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: with file and line, for one that is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file completely or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that a result depends on."""
    found = {}
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)  # of the first on the path, which is imported
    return found


def sha256_of(files: list[Path]) -> str:
    """The SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
