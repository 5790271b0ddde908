"""Shows what `trust_remote_code=True` would run of a repository or folder, without running it.

    alignvlm inspect user/name [--revision COMMIT]

Lists each Python file with its hash, its imports and everything beyond what model code needs; and everything else that loading could
execute: pickles, code of other repositories, `custom_generate`. It works for anyone's repository of this kind.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError

from hub_upload.code_rules import read_code
from hub_upload.command_line import ArgumentParser, run
from hub_upload.package import files_of
from hub_upload.repository import HTTPError, check_model
from hub_upload.run_record import sha256_of


PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5")
MAPPINGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "adapter_config.json",
)


@dataclass
class CodeFile:
    """A Python file, and what to know about it before it runs."""

    name: str
    sha256: str
    lines: int
    imports: list[str]
    problems: list[str]


@dataclass
class Inspection:
    """The code that a repository would run."""

    revision: str | None
    auto_map: dict[str, str] = field(default_factory=dict)
    files: list[CodeFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_suspicious(self) -> bool:
        return bool(self.warnings) or any(file.problems for file in self.files)


def inspect(name: str, revision: str | None = None) -> Inspection:
    """Reads the code and the mappings of a folder or Hub repository; downloads nothing else.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: for a revision of a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"The revision {revision!r} would be of a repository, but this is a folder here. Leave the revision out."
            )
        names, commit = files_of(Path(name)), None
        paths = {file: Path(name) / file for file in names}
    else:
        try:
            info = HfApi().model_info(name, revision=revision)
        except (HFValidationError, HTTPError, OSError):
            check_model(name, revision)  # says so if there is neither folder nor model
            raise
        names, commit = [file.rfilename for file in info.siblings], info.sha
        wanted = [n for n in names if n.endswith(".py") or n in MAPPINGS]
        paths = {file: Path(hf_hub_download(name, file, revision=commit)) for file in wanted}
    found = Inspection(commit)
    code = [file for file in names if file.endswith(".py")]
    beside = {file for file in code if "/" not in file}
    for file in code:
        findings = read_code(paths[file], beside)
        lines = paths[file].read_text(encoding="utf-8", errors="replace").count("\n")
        found.files.append(CodeFile(file, sha256_of([paths[file]]), lines, findings.imports, findings.problems))
        if file.startswith("custom_generate/"):
            found.warnings.append(f"{file} runs whenever `generate` is called with trust_remote_code")
    for file in MAPPINGS:
        if file not in paths:
            continue
        try:
            content = json.loads(paths[file].read_text(encoding="utf-8"))
        except ValueError as error:
            found.warnings.append(f"{file} is not JSON: {error}")
            continue
        if file == "adapter_config.json" and content.get("base_model_name_or_path"):
            base = content["base_model_name_or_path"]
            found.warnings.append(f"{file} makes transformers load {base}, and its code, in place of this repository")
        for name, target in _targets(content):
            found.auto_map[f"{file}: {name}"] = target
            module = target.split("--")[-1].split(".")[0]
            if "--" in target:
                found.warnings.append(f"{file}: {name} comes from another repository, {target.split('--')[0]}")
            elif f"{module}.py" not in beside:
                found.warnings.append(f"{file}: {name} names {module}.py, which is not there")
    found.warnings += [
        f"{file} may hold a pickle, which runs code when loaded" for file in names if file.endswith(PICKLED)
    ]
    return found


def _targets(content: dict) -> Iterator[tuple[str, str]]:
    """Yields each class that a configuration makes transformers load from a Python file, behind the name that asks for it."""
    mapping = content.get("auto_map", {})
    named = (
        mapping.items() if isinstance(mapping, dict) else [("AutoTokenizer", mapping)]
    )  # a list: an old tokenizer's
    pipelines = content.get("custom_pipelines", {})
    for name, options in pipelines.items() if isinstance(pipelines, dict) else []:
        named = [*named, (f"pipeline {name}", options.get("impl") if isinstance(options, dict) else options)]
    for name, targets in named:
        yield from (
            (name, target)
            for target in (targets if isinstance(targets, list) else [targets])
            if isinstance(target, str)
        )


def describe(name: str, found: Inspection) -> str:
    """Writes the inspection as text."""
    lines = [f"{name}" + (f" at {found.revision}" if found.revision else "")]
    if not found.files:
        lines.append("  no Python files: trust_remote_code would run nothing of it")
    lines += [f"  {auto_class} -> {target}" for auto_class, target in found.auto_map.items()]
    for file in found.files:
        lines += [
            f"\n{file.name}  ({file.lines} lines)",
            f"  sha256   {file.sha256}",
            f"  imports  {', '.join(file.imports)}",
        ]
        lines += [f"  !  {problem}" for problem in file.problems] or ["  nothing beyond what model code needs"]
    lines += [f"\n!  {warning}" for warning in found.warnings]
    if found.is_suspicious:
        lines.append("\nRead the lines marked ! before you trust it.")
    elif found.revision:
        lines.append(
            f'\nTo run exactly this: from_pretrained("{name}", revision="{found.revision}", trust_remote_code=True)'
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Shows what trust_remote_code would run.")
    parser.add_argument("name", help="A folder, or a repository of the Hub.")
    parser.add_argument("--revision")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        found = inspect(arguments.name, arguments.revision)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise SystemExit(f"error: {arguments.name}: {error}") from error
    print(describe(arguments.name, found))
    sys.exit(1 if found.is_suspicious else 0)


if __name__ == "__main__":
    run(main)
