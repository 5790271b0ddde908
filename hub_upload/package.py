"""Stages a checkpoint as a clean folder: files on the allow-list, a card, a manifest of hashes, and nothing else.

    python -m hub_upload.package out/stage4 out/to_push [--for vllm]

The same checkpoint gives the same folder, byte for byte.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hub_upload.card import PLACEHOLDER, make_card
from hub_upload.card_text import FOLDER, GENERATED, author_of, body_of, join_card, renewed_metadata, split_card
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
    """Reads the results in a checkpoint's `results/` that were measured with its own weights, without the predictions.

    Controls (blank or shuffled images), results on part of the data, and other JSON files are left out.

    Raises:
        ValueError: with file and line, for one that is not JSON.
    """
    digest = sha256_of(weights_of(folder))
    found = []
    for path in sorted((folder / "results").glob("*.json")):
        result = read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("model"), dict):
            continue  # no result
        same = result["model"].get("weights_sha256") == digest
        if same and not result.get("control") and result.get("limit") is None:
            found.append({name: value for name, value in result.items() if name != "predictions"})
    return found


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
    """Stages the checkpoint `folder` in `output`, which is emptied first; returns `output`.

    Args:
        max_shard_size: weights above it are split, as `save_pretrained` does.
        license, license_name, license_link: of the weights, as the Hub's card metadata name it; the code is under Apache 2.0. Left out:
            the strictest of the backbones'.
        repository: the one that the card's examples load.
        overwrite_card: write the card anew where the folder's was edited by hand. Otherwise its text stays, and its metadata are renewed.
        server: "vllm" makes a folder that vLLM can serve (see `hub_upload.serving`).

    Raises:
        FileNotFoundError: if the folder is not a complete checkpoint.
        ValueError: if `output` is not empty and was not made by this function, the licence is not known, the folder's card has metadata
            that cannot be read, its weights are damaged, or the server cannot run the checkpoint.
    """
    folder, output = Path(folder), Path(output)
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
    if output.exists() and any(output.iterdir()):
        strange = [name for name in files_of(output) if not is_allowed(name)]
        if strange or not (output / MANIFEST).is_file() or output.resolve() == folder.resolve():
            raise ValueError(
                f"{output} was not made by packaging{f': {strange[:3]} in it' if strange else ''}, and would be lost. Name a new folder."
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in files_of(folder):
        if is_allowed(name) and name not in (RUN_RECORD, "README.md", MANIFEST) and not (folder / name).is_symlink():
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)
    if (folder / "lora").is_dir():
        _merge_lora(folder / "lora", output)
    shard(output, max_shard_size)
    if server == "vllm":
        prepare_for_vllm(output)
    there = (
        None
        if overwrite_card or not (folder / "README.md").is_file()
        else (folder / "README.md").read_text(encoding="utf-8")
    )
    _write_texts(output, record, repository, there, license_given=bool(given))
    return output


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


def _write_texts(output: Path, record: dict, repository: str, there: str | None, license_given: bool = False) -> None:
    """Writes run record, card and manifest. An existing card keeps text edited by hand, and metadata of its own."""
    write_run_record(output, record)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    card = make_card(record, config, parameter_count(output), repository)
    (output / "README.md").write_text(
        card if there is None else renewed_card(there, card, repository, license_given), encoding="utf-8"
    )
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
        "--license", help="Of the weights, by the Hub's name. Left out: the strictest of the backbones."
    )
    parser.add_argument("--license_name", help="With --license other: its name.")
    parser.add_argument("--license_link", help="With --license other: where to read it.")
    parser.add_argument(
        "--overwrite_card", action="store_true", help="Write the card anew where it was edited by hand."
    )


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Stages a checkpoint as a clean folder.")
    parser.add_argument("folder", help="The output_dir of a stage.")
    parser.add_argument("output", help="The clean folder.")
    parser.add_argument("--max_shard_size", default="5GB")
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
