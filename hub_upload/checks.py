"""Checks whether anyone can trust and load a packaged folder: every rule that a push insists on.

    python -m hub_upload.checks out/to_push

The last rule decides: a process that cannot import this package, with an empty cache of remote code and without a network, loads the
folder by the Auto classes and answers about an image; an exported folder without `trust_remote_code`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from hub_upload.code_rules import read_code
from hub_upload.command_line import ArgumentParser, run
from hub_upload.licences import problem_with
from hub_upload.package import ABSOLUTE_PATH, MANIFEST, files_of, is_allowed, read_manifest
from hub_upload.run_record import RUN_RECORD, sha256_of
from hub_upload.stock import is_stock


SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(ghp|gho|ghs|ghu)_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"\bhttps?://[^/\s:@]+:[^@/\s]+@",
    "a Weights & Biases key": r"(?i)wandb[_a-z]*key\W{1,4}[0-9a-f]{40}\b",
}
LOCAL_PATH = r"(?<![\w./:-])(/(home|root|Users|tmp|mnt|data|work|workspace|scratch|srv|opt|var|nfs|gpfs|content|export)/[\w./-]+|[A-Za-z]:\\\\?Users\\)"
CARD_FIELDS = ("license", "library_name", "pipeline_tag", "tags", "language")
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")
# Vocabularies hold whatever texts held; they are data, not configuration.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")

LOADS = """
import json, platform, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

folder, with_code = sys.argv[1], sys.argv[2] == "with code"
trust = {"trust_remote_code": True} if with_code else {}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
assert type(processor).__module__.startswith("transformers_modules") == with_code
if with_code:
    assert AutoModel.from_pretrained(folder, dtype="auto", **trust).config.model_type == config.model_type
model, info = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, **trust
)
wrong = {name: sorted(map(str, found)) for name, found in info.items() if found and name.endswith("keys")}
image = Image.linear_gradient("L").convert("RGB")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=1, do_sample=False)
finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
releases = {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}
new = tokens.shape[1] - inputs["input_ids"].shape[1]
print("RESULT " + json.dumps({"wrong": wrong, "new": new, "finite": finite, "releases": releases}))
"""


def check(folder: str | Path, load: bool = True) -> list[str]:
    """Lists everything wrong with a packaged folder, one sentence each; empty if it may be pushed.

    Args:
        load: also load it in a process of its own, which runs its code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is no folder"]
    problems = [*_check_files(folder), *_check_manifest(folder), *_check_weights(folder)]
    problems += _check_no_code(folder) if is_stock(folder) else [*_check_auto_map(folder), *_check_code(folder)]
    problems += [*_check_texts(folder), *_check_card(folder)]
    # Code that breaks the rules is not run.
    return problems + (try_loading(folder)[0] if load and not problems else [])


def _check_files(folder: Path) -> list[str]:
    problems = []
    for name in files_of(folder):
        path = folder / name
        if path.is_symlink():
            problems.append(f"{name}: a link, whose target would be pushed")
        elif not is_allowed(name):
            problems.append(f"{name}: not on the list of what a repository holds")
        elif path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            problems.append(f"{name}: a pickle or an archive")
    return problems


def _check_manifest(folder: Path) -> list[str]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST}: missing; make the folder by hub_upload.package"]
    listed = read_manifest(manifest.read_text(encoding="utf-8"))
    present = set(files_of(folder)) - {MANIFEST}
    problems = [f"{name}: in {MANIFEST}, but not in the folder" for name in sorted(set(listed) - present)]
    problems += [f"{name}: not in {MANIFEST}" for name in sorted(present - set(listed))]
    changed = [name for name in sorted(present & set(listed)) if sha256_of([folder / name]) != listed[name]]
    return problems + [f"{name}: changed since it was packaged" for name in changed]


def _check_weights(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    problems, names = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                names += list(weights.keys())
        except SafetensorError as error:
            problems.append(f"{file.name}: {error}")
    if not files:
        problems.append("no weights")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError):
            return [*problems, f"{index.name}: no weight map"]
        if sorted(listed) != sorted(names) or set(listed.values()) != {file.name for file in files}:
            problems.append(f"{index.name}: does not list what the weight files hold")
    elif len(files) > 1:
        problems.append("several weight files and no index")
    return problems


def _read_json(folder: Path, name: str, problems: list[str]) -> dict:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name}: {error}")
        return {}


def _check_auto_map(folder: Path) -> list[str]:
    problems: list[str] = []
    config = _read_json(folder, "config.json", problems)
    processor = _read_json(folder, "processor_config.json", problems)
    found = config.get("auto_map", {})
    problems += [f"config.json: auto_map lacks {name}" for name in AUTO_CLASSES if config and name not in found]
    for file, mapping in (("config.json", found), ("processor_config.json", processor.get("auto_map", {}))):
        for auto_class, target in mapping.items():
            module, _, name = str(target).partition(".")
            path = folder / f"{module}.py"
            if "--" in str(target):
                problems.append(f"{file}: auto_map sends {auto_class} to another repository, {target}")
            elif not path.is_file() or not re.search(
                rf"^class {re.escape(name)}\b", path.read_text(encoding="utf-8"), re.MULTILINE
            ):
                problems.append(f"{file}: auto_map sends {auto_class} to {target}, which is not in the folder")
    return problems


def _check_code(folder: Path) -> list[str]:
    files = {path.name for path in folder.glob("*.py")}
    return [f"{name}: {problem}" for name in sorted(files) for problem in read_code(folder / name, files).problems]


def _check_no_code(folder: Path) -> list[str]:
    """Refuses code in an exported folder: files, and names of it that would be looked up elsewhere."""
    problems = [f"{path.name}: code, which a model of transformers' own needs none of" for path in folder.glob("*.py")]
    for path in sorted(folder.glob("*config.json")):
        if "auto_map" in _read_json(folder, path.name, problems):
            problems.append(f"{path.name}: auto_map names code")
    return problems


def _check_texts(folder: Path) -> list[str]:
    """Finds secrets, and paths of the machine that made the folder."""
    problems = []
    for name in files_of(folder):
        if name.endswith(".safetensors") or not is_allowed(name):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        for kind, pattern in SECRETS.items():
            if re.search(pattern, text):
                problems.append(f"{name}: looks like it holds {kind}")
        paths = ABSOLUTE_PATH if name.endswith(".json") else LOCAL_PATH
        if name not in VOCABULARIES and (found := re.search(paths, text)):
            problems.append(f"{name}: holds the local path {found[0]!r}")
    return problems


def _check_card(folder: Path) -> list[str]:
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return [f"README.md: {error}"]
    data = card.data.to_dict()
    problems = [f"README.md: its metadata lack {name}" for name in CARD_FIELDS if not data.get(name)]
    if data.get("base_model") and not data.get("base_model_relation"):
        problems.append("README.md: base_model without base_model_relation")
    stated = data.get("license") or []
    found = [problem_with(each) for each in (stated if isinstance(stated, list) else [stated])]
    problems += [f"README.md: {problem}" for problem in found if problem]
    if stated == "other":
        wanted = [name for name in ("license_name", "license_link") if not data.get(name)]
        problems += [f"README.md: license other without {name}" for name in wanted]
    record = _read_json(folder, RUN_RECORD, [])
    values = {
        round(value, 4)
        for result in record.get("results", [])
        for numbers in result["metrics"].values()
        for value in numbers.values()
        if isinstance(value, (int, float))
    }
    for result in card.data.eval_results or []:
        if round(result.metric_value, 4) not in values:
            problems.append(
                f"README.md: the result {result.metric_type} = {result.metric_value} is not in {RUN_RECORD}"
            )
    return problems


def try_loading(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Loads a folder in a process of its own and asks it about an image: the problems, and the releases that process had."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "PATH": os.environ.get("PATH", "")}
        done = subprocess.run(
            [sys.executable, "-I", "-c", LOADS, str(folder.resolve()), "without" if is_stock(folder) else "with code"],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        return [f"does not load by the Auto classes in a fresh process: {done.stderr.strip()[-600:]}"], {}
    result = json.loads(lines[-1].removeprefix("RESULT "))
    problems = [
        f"weights do not match the configuration: {kind} {names[:3]}" for kind, names in result["wrong"].items()
    ]
    if not result["finite"]:
        problems.append("some weights are not finite")
    if result["new"] < 1:
        problems.append("says nothing about an image")
    return problems, result["releases"]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Checks a packaged folder.")
    parser.add_argument("folder")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    problems = check(arguments.folder)
    if problems:
        raise SystemExit(
            f"{arguments.folder} must not be pushed:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    print(f"{arguments.folder}: all checks passed")


if __name__ == "__main__":
    run(main)
