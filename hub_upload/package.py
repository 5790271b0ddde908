"""Stages a checkpoint as a clean folder: files on the allow-list, a card, a manifest of hashes, and nothing else.

    python -m hub_upload.package out/stage4 out/to_push [--for vllm]

The same checkpoint gives the same folder, byte for byte.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hub_upload.card import PLACEHOLDER, make_card
from hub_upload.card_text import (
    FOLDER,
    GENERATED,
    HAND,
    author_of,
    body_of,
    join_card,
    renewed_metadata,
    split_card,
)
from hub_upload.command_line import ArgumentParser, run
from hub_upload.licences import given_licence, licence_of
from hub_upload.run_record import RUN_RECORD, read_json, read_run_record, sha256_of, write_run_record
from hub_upload.serving import SERVERS, check_for_vllm, prepare_for_vllm


MANIFEST = "manifest.sha256"
# Complete names, as regular expressions; all other files are left out.
ALLOWED = (
    r"README\.md",
    r"LICENSE",
    r"config\.json",
    r"generation_config\.json",
    r"processor_config\.json",
    r"preprocessor_config\.json",
    r"tokenizer\.json",
    r"tokenizer_config\.json",
    r"special_tokens_map\.json",
    r"added_tokens\.json",
    r"vocab\.json",
    r"merges\.txt",
    r"chat_template\.jinja",
    r"(configuration|masking|modeling|processing)_[a-z0-9_]+\.py",
    r"model(-\d{5}-of-\d{5})?\.safetensors",
    r"model\.safetensors\.index\.json",
    re.escape(RUN_RECORD),
    re.escape(MANIFEST),
)
NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", RUN_RECORD)


def is_allowed(name: str) -> bool:
    """Whether a path in the repository is on the allow-list."""
    return any(re.fullmatch(pattern, name) for pattern in ALLOWED)


def files_of(folder: Path) -> list[str]:
    """The paths of all files below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint; results name their hash."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("lora/*.safetensors")])


def results_of(folder: Path) -> list[dict]:
    """Reads the results that were measured with a checkpoint's own weights, without the predictions.

    They are in `results/`, and of a packaged folder in its run record; one in `results/` replaces the record's of the same task and data.
    Controls (blank or shuffled images), results on part of the data, and other JSON files are left out.

    Raises:
        ValueError: with file and line, for one that is not JSON.
    """
    weights = weights_of(folder)
    digest = sha256_of(weights)
    found = []
    for path in sorted((folder / "results").glob("*.json")):
        result = read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("model"), dict):
            continue  # no result
        same = result["model"].get("weights_sha256") == digest
        if same and not result.get("control") and result.get("limit") is None:
            found.append({name: value for name, value in result.items() if name != "predictions"})
    packaged = _are_as_packaged(folder, [*weights, folder / RUN_RECORD])
    renewed = [_subject(result) for result in found]
    kept = [
        result
        for result in read_run_record(folder).get("results", [])
        if (packaged or result["model"].get("weights_sha256") == digest) and _subject(result) not in renewed
    ]
    return kept + found


def _are_as_packaged(folder: Path, files: list[Path]) -> bool:
    """Whether files are those that packaging wrote: then the record is about these weights, though merged or split after a measurement."""
    if not (folder / MANIFEST).is_file():
        return False
    listed = read_manifest((folder / MANIFEST).read_text(encoding="utf-8"))
    return all(listed.get(file.relative_to(folder).as_posix()) == sha256_of([file]) for file in files)


def _subject(result: dict) -> list:
    """What a result is about."""
    return without_local_paths([result.get(name) for name in ("task", "name", "data")])


_NAME = r"[^\s'\"/\\:,;()<>{}|]+"
_HOME = r"~(?:[A-Za-z_][\w.-]*)?"
_MACHINE = r"[\w.-]+@[\w.-]+:"  # as scp writes it
# An absolute path, or one in a home folder or on another machine, wherever it stands in a text; addresses are none.
ABSOLUTE_PATH = (
    rf"(?<![\w.:/\\~@-])(?:(?:{_HOME})?(?:/{_NAME}){{2,}}|{_MACHINE}~?(?:/{_NAME})+|file:/+{_NAME}(?:/{_NAME})*"
    rf"|[A-Za-z]:(?:[\\/]+{_NAME})+)"
)
# The begin of a path whose names may hold white space; it ends with the text, or with the quotes around it.
_BEGIN = rf"(?:{_HOME}/|/[^/\s'\"`]+/|{_MACHINE}[~/]|file:/|[A-Za-z]:[\\/]|\\\\|\.\.[\\/])"
_QUOTED_PATH = rf"(['\"`])({_BEGIN}(?:(?!\1).)*)\1"
_SIGNED_ADDRESS = r"(\b[a-z][a-z0-9+.-]*://)(?:[^\s/@'\"]+@)?([^\s?'\"]*)(?:\?[^\s'\"]+)?"


def without_local_paths(value):
    """Cuts the absolute paths in a JSON value to their last name, inside sentences too (there those with white space only if they stand
    in quotes), and from addresses what signs them: a query, a user's name."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(_SIGNED_ADDRESS, r"\1\2", value)
    path, colon, rest = value.partition(": ")
    if re.match(_BEGIN, path):
        value = _last_name(path) + colon + rest
    value = re.sub(_QUOTED_PATH, lambda found: found[1] + _last_name(found[2]) + found[1], value)
    return re.sub(ABSOLUTE_PATH, lambda found: _last_name(found[0]), value)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def package(
    folder: str | Path,
    output: str | Path,
    max_shard_size: str = "5GB",
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    repository: str = PLACEHOLDER,
    overwrite_card: bool = False,
    server: str | None = None,
) -> Path:
    """Stages the checkpoint `folder` in `output`, whose files it replaces when the new ones are complete; returns `output`.

    Args:
        max_shard_size: weights above it are split, as `save_pretrained` does.
        license, license_name, license_link: of the weights, as the Hub's card metadata name it; the code is under Apache 2.0. Left out:
            the strictest of the backbones'.
        repository: the one that the card's examples load.
        overwrite_card: write the card anew where it was edited by hand, in `output` or else in `folder`. Otherwise its text stays, and
            its metadata are renewed.
        server: "vllm" makes a folder that vLLM can serve (see `hub_upload.serving`).

    Raises:
        FileNotFoundError: if the folder is not a complete checkpoint.
        ValueError: if `output` is not empty and was not made by this function, the licence is not known, a card has metadata that cannot
            be read, the weights are damaged, `max_shard_size` is no size, or the server cannot run the checkpoint.
    """
    folder, output = Path(folder), Path(output)
    check_shard_size(max_shard_size)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing or not weights_of(folder):
        raise FileNotFoundError(
            f"{folder} is not a complete checkpoint: {', '.join(missing) or 'its weights'} missing. Give the output_dir of a stage."
        )
    _check_weights(folder)
    if server == "vllm":
        check_for_vllm(folder)
    record = read_run_record(folder)
    record = without_local_paths({**record, "results": results_of(folder)})
    if given := given_licence(license, license_name, license_link):
        record["licence"] = given
    licence_of(record)  # asks for one that is not known
    edited = None
    if output.exists() and any(output.iterdir()):
        strange = [name for name in files_of(output) if not is_allowed(name)]
        if strange or not (output / MANIFEST).is_file() or output.resolve() == folder.resolve():
            raise ValueError(
                f"{output} was not made by packaging{f': {strange[:3]} in it' if strange else ''}, and would be lost. Name a new folder."
            )
        edited = None if overwrite_card else _edited_card(output, repository)
    there = (
        None
        if overwrite_card or not (folder / "README.md").is_file()
        else (folder / "README.md").read_text(encoding="utf-8")
    )
    place = output.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as workspace:
        staged = Path(workspace) / "staged"
        staged.mkdir()
        for name in files_of(folder):
            if (
                is_allowed(name)
                and name not in (RUN_RECORD, "README.md", MANIFEST)
                and not (folder / name).is_symlink()
            ):
                shutil.copyfile(folder / name, staged / name)
        if (folder / "lora").is_dir():
            _merge_lora(folder / "lora", staged)
        shard(staged, max_shard_size)
        if server == "vllm":
            prepare_for_vllm(staged)
        _write_texts(staged, record, repository, there, edited, license_given=bool(given))
        if place.exists():
            place.rename(Path(workspace) / "before")
        staged.rename(place)
    return output


def _edited_card(output: Path, repository: str) -> str | None:
    """The card of a packaged folder that somebody edited there, with the metadata that packaging did not write; None for other cards.

    Raises:
        ValueError: if its metadata cannot be read.
    """
    file = output / "README.md"
    if not file.is_file() or not (output / "config.json").is_file():
        return None
    text = file.read_text(encoding="utf-8")
    config = read_json(output / "config.json")
    written, _ = split_card(make_card(read_run_record(output), config, 0, repository))  # the number stands in the text
    try:
        data, body = split_card(text)[0], body_of(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error} (--overwrite_card writes it anew.)") from error
    added = {name: value for name, value in data.items() if value != written.get(name)}
    author = HAND if author_of(text) == HAND else GENERATED  # the text of another folder's card is still there
    return join_card(added, body, author) if added or author == HAND else None


def _check_weights(folder: Path) -> None:
    for file in weights_of(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"The weights in {file} are damaged or cut off: {error}.") from error


def note_releases(output: Path, releases: dict[str, str], repository: str = PLACEHOLDER) -> None:
    """Writes the releases that loaded a packaged folder into its run record and card."""
    record = read_run_record(output)
    _write_texts(
        output, {**record, "loaded_with": releases}, repository, (output / "README.md").read_text(encoding="utf-8")
    )


def _write_texts(
    output: Path,
    record: dict,
    repository: str,
    there: str | None,
    edited: str | None = None,
    license_given: bool = False,
) -> None:
    """Writes run record, card and manifest. An existing card keeps text edited by hand, and metadata of its own.

    Args:
        there: the card of the checkpoint's folder.
        edited: the card that the packaged folder had before, if it was edited there: its text stays rather than that of `there`.
    """
    write_run_record(output, record)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    card = make_card(record, config, parameter_count(output), repository)
    if there is not None:
        card = renewed_card(there, card, repository, license_given)
    if edited is not None:
        try:
            card, _ = card_over(card, edited, license_given)
        except ValueError as error:
            raise ValueError(f"README.md: {error} (--overwrite_card writes it anew.)") from error
    (output / "README.md").write_text(card, encoding="utf-8")
    write_manifest(output, changed=(RUN_RECORD, "README.md"))


def renewed_card(there: str, card: str, repository: str = PLACEHOLDER, license_given: bool = False) -> str:
    """Renews the card of a folder; an existing one keeps text that somebody edited, and metadata of its own.

    Raises:
        ValueError: if its metadata cannot be read, or name a licence that is neither stricter nor less strict than ours.
    """
    data, body = split_card(card)
    try:
        data = renewed_metadata(split_card(there)[0], data, license_given)
        author = author_of(there)
    except ValueError as error:
        raise ValueError(f"README.md: {error} (--overwrite_card writes it anew.)") from error
    if author == GENERATED:
        return join_card(data, body, GENERATED)
    return join_card(data, body_of(there).replace(PLACEHOLDER, repository), FOLDER)


def card_over(ours: str, there: str, license_given: bool) -> tuple[str, bool]:
    """Makes the card to write over an existing one; also returns whether the existing text stays.

    Raises:
        ValueError: as `renewed_card`.
    """
    data, body = split_card(ours)
    data = renewed_metadata(split_card(there)[0], data, license_given)
    author, existing_author = author_of(ours), author_of(there)
    replaced = existing_author == GENERATED or existing_author == author == FOLDER
    if replaced or body_of(there) == body_of(ours):
        return join_card(data, body, author), False
    return join_card(data, body_of(there), HAND), True


def write_manifest(folder: Path, changed: tuple[str, ...]) -> None:
    """Writes the hash of every other file of a packaged folder; takes that of files not in `changed` from the existing manifest."""
    known = read_manifest((folder / MANIFEST).read_text(encoding="utf-8")) if (folder / MANIFEST).is_file() else {}
    known = {name: digest for name, digest in known.items() if name not in changed}
    names = [name for name in files_of(folder) if name != MANIFEST]
    lines = [f"{known.get(name) or sha256_of([folder / name])}  {name}\n" for name in names]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def read_manifest(text: str) -> dict[str, str]:
    """Reads the hash of each file in a manifest."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def parameter_count(folder: Path) -> int:
    """Counts the weights in a folder; tied ones count once."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                size = 1
                for side in weights.get_slice(name).get_shape():
                    size *= side
                count += size
    return count


def _merge_lora(lora: Path, output: Path) -> None:
    """Adds LoRA products that a stage kept apart to the weights in `output`: W + alpha / rank * B A (arXiv 2106.09685).

    Loading a repository would not look for them.
    """
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    apart = load_file(lora / "adapter_model.safetensors")
    prefixes = {name.removesuffix(".lora_A.weight") for name in apart if name.endswith(".lora_A.weight")}
    found = set()
    for file in output.glob("*.safetensors"):
        tensors = load_file(file)
        for prefix in prefixes & {f"base_model.model.{name}".removesuffix(".weight") for name in tensors}:
            product = apart[f"{prefix}.lora_B.weight"].double() @ apart[f"{prefix}.lora_A.weight"].double()
            name = prefix.removeprefix("base_model.model.") + ".weight"
            product = product.T if config.get("fan_in_fan_out") else product  # GPT-2's layers hold W transposed
            scaled = product * (config["lora_alpha"] / config["r"])
            tensors[name] = (tensors[name].double() + scaled).to(tensors[name].dtype)
            found.add(prefix)
        save_file(tensors, file, metadata={"format": "pt"})
    if found != prefixes:
        raise ValueError(
            f"{lora} holds LoRA weights of layers the checkpoint does not have: {sorted(prefixes - found)[:3]}."
        )


def check_shard_size(size: str) -> None:
    """Raises a `ValueError` if a text is no size of files."""
    if not re.fullmatch(r"\s*(?=[\d.]*[1-9])\d*\.?\d+\s*[KMGT]B\s*", size, re.IGNORECASE):
        raise ValueError(
            f"--max_shard_size {size!r} is no size. Give a number above 0 with KB, MB, GB or TB, such as 5GB."
        )


def shard(folder: Path, max_shard_size: str) -> None:
    """Splits `model.safetensors` where it is larger than a shard may be."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return
    tensors = load_file(file)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    if not plan.is_sharded:
        return
    for name, members in plan.filename_to_tensors.items():
        save_file({member: tensors[member] for member in members}, folder / name, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    file.unlink()


def add_package_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of packaging that a push has too."""
    parser.add_argument(
        "--for",
        dest="server",
        choices=SERVERS,
        help="Make a folder that this server can run: AutoModel is the base model there.",
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="Larger weights are split into files of this size. Default: 5GB."
    )
    parser.add_argument(
        "--license", help="Of the weights, by the Hub's name. Left out: the strictest of the backbones."
    )
    parser.add_argument("--license_name", help="With --license other: its name.")
    parser.add_argument("--license_link", help="With --license other: where to read it.")
    parser.add_argument(
        "--overwrite_card", action="store_true", help="Write the card anew where it was edited by hand."
    )


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Stages a checkpoint as a clean folder.")
    parser.add_argument("folder", help="The output_dir of a stage, or a packaged folder.")
    parser.add_argument("output", help="The clean folder.")
    add_package_options(parser)
    options = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    try:
        output = package(options.pop("folder"), options.pop("output"), **options)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    for name in files_of(output):
        print(f"{(output / name).stat().st_size:>14,}  {name}")


if __name__ == "__main__":
    run(main)
