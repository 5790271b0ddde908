"""Stages an exported folder for a push: a model of a class that is part of transformers, as `alignvlm export` writes it.

It holds no code, so nothing of `package` but the files, the licence and the card concerns it.
"""

import json
import shutil
from pathlib import Path

from hub_upload.card import PLACEHOLDER
from hub_upload.card_text import FOLDER, GENERATED, author_of, body_of, join_card, split_card
from hub_upload.licences import FIELDS, given_licence
from hub_upload.package import check_shard_size, files_of, is_allowed, shard, weights_of, write_manifest
from hub_upload.run_record import RUN_RECORD


NEEDED = ("README.md", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
OUR_TYPE = "alignvlm"
# The files of exports that transformers does not load, and the programs that do.
OTHER_PROGRAMS = {"*.gguf": "llama.cpp", "onnx/*.onnx": "ONNX Runtime and transformers.js"}


def is_stock(folder: str | Path) -> bool:
    """Whether a folder's configuration is of another class than AlignVLM's and names no code of its own."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") not in (None, OUR_TYPE) and "auto_map" not in config


def model_type_of(config: str) -> str | None:
    """The `model_type` in the text of a config.json; None if it names none."""
    try:
        return json.loads(config).get("model_type")
    except (ValueError, AttributeError):
        return None


def other_program(folder: str | Path) -> str | None:
    """The program that an export is for, if it has no weights that transformers loads; None for all other folders."""
    if weights_of(Path(folder)):
        return None
    return next((program for files, program in OTHER_PROGRAMS.items() if any(Path(folder).glob(files))), None)


def package_stock(
    folder: str | Path,
    output: str | Path,
    max_shard_size: str = "5GB",
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    repository: str = PLACEHOLDER,
) -> Path:
    """Stages the exported `folder` in the new folder `output`; returns `output`. Its card keeps its text.

    Args:
        max_shard_size, license, license_name, license_link, repository: see `hub_upload.package.package`. The licence left out: that
            of the card, which the export took over from the checkpoint.

    Raises:
        FileNotFoundError: if the folder is not a complete export.
        ValueError: if the licence is not known, `max_shard_size` is no size, or the card has metadata that cannot be read.
    """
    folder, output = Path(folder), Path(output)
    check_shard_size(max_shard_size)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing or not weights_of(folder):
        raise FileNotFoundError(
            f"{folder} is not a complete export: {', '.join(missing) or 'its weights'} missing. Give a folder of `alignvlm export "
            "--to transformers`."
        )
    text = (folder / "README.md").read_text(encoding="utf-8")
    try:
        data, _ = split_card(text)
    except ValueError as error:
        raise ValueError(f"README.md: {error}") from error
    if given := given_licence(license, license_name, license_link):
        data = {name: value for name, value in data.items() if name not in FIELDS} | given
    if not data.get("license"):
        raise ValueError("README.md states no license. Name that of your weights: --license LICENSE.")
    output.mkdir(parents=True)
    for name in files_of(folder):
        if is_allowed(name) and name != RUN_RECORD and not name.endswith(".py") and not (folder / name).is_symlink():
            shutil.copyfile(folder / name, output / name)
    author = GENERATED if author_of(text) == GENERATED else FOLDER
    (output / "README.md").write_text(
        join_card(data, body_of(text).replace(PLACEHOLDER, repository), author), encoding="utf-8"
    )
    shard(output, max_shard_size)
    write_manifest(output, changed=tuple(files_of(output)))
    return output
