"""Pushes the demo of a pushed checkpoint as a Space, by the same checked, atomic way as a model.

    python hub_upload/push.py --space user/demo --model user/my-alignvlm [--compare user/other] [--public] [--dry_run]

A Space holds what `demo/` holds and the modules that its app imports, copied from this package; the checkpoint's code is not run. A push
replaces the files of an earlier one and keeps all others, and what was edited in the README.md.
"""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from hub_upload.card_text import split_card
from hub_upload.checks import LOCAL_PATH, SECRETS
from hub_upload.command_line import ArgumentParser
from hub_upload.commit import (
    CARD,
    THE_HUBS,
    Change,
    Pushed,
    PushError,
    check_name,
    files_at,
    patiently,
    publish,
    read_at,
    same_content,
)
from hub_upload.package import MANIFEST, files_of, read_manifest, write_manifest
from hub_upload.shared_files import shared_folder
from hub_upload.stock import OUR_TYPE, model_type_of


APP = ("README.md", "app.py", "requirements.txt")
OURS = ("alignvlm", "hub_upload", "modeling_alignvlm")
APP_MODULE = "alignvlm.tools.demo"
PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds the packages `OURS`
RENEWED = ("sdk", "sdk_version", "python_version", "app_file", "models")  # of an edited README.md

IMPORTS = """
import json, sys
folder, *ours = sys.argv[1:]
sys.path.insert(0, folder)
import alignvlm.tools.demo
print("RESULT " + json.dumps([m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ours and m.__file__]))
"""


class SpaceApi:
    """`HfApi`, whose calls are about Spaces."""

    def __init__(self):
        self.api = HfApi()

    def create_repo(self, repository: str, **options):
        return self.api.create_repo(repository, repo_type="space", space_sdk="gradio", **options)

    def model_info(self, repository: str, **options):
        return self.api.space_info(repository, **options)

    def __getattr__(self, name: str):
        return functools.partial(getattr(self.api, name), repo_type="space")


def modules_of_the_app() -> list[Path]:
    """The files of all modules that the app imports, relative to the folder of the packages."""
    waiting, found = [APP_MODULE], set()
    while waiting:
        name = waiting.pop()
        path = PACKAGES.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file() or file in found:  # the second of `from module import name` is no file
            continue
        found.add(file)
        package = name if path.is_dir() else name.rpartition(".")[0]
        waiting += [name.rpartition(".")[0]] if "." in name else []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [each.name for each in node.names if each.name.split(".")[0] in OURS]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                if module.split(".")[0] in OURS:
                    waiting += [module, *(f"{module}.{each.name}" for each in node.names)]
    return sorted(file.relative_to(PACKAGES) for file in found)


def package_space(output: str | Path, models: list[str]) -> Path:
    """Stages the Space of one or two checkpoints of the Hub in the new folder `output`; returns `output`."""
    output, source = Path(output), shared_folder() / "demo"
    output.mkdir(parents=True)
    for name in APP:
        shutil.copyfile(source / name, output / name)
    for file in modules_of_the_app():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGES / file, output / file)
    data, body = split_card((output / CARD).read_text(encoding="utf-8"))
    (output / CARD).write_text(_card({**data, "models": models}, body), encoding="utf-8")
    write_manifest(output, changed=())
    return output


def check_space(folder: str | Path) -> list[str]:
    """Lists everything wrong with a packaged Space, one sentence each; runs the app's imports in a process of its own."""
    folder, problems = Path(folder), []
    for name in files_of(folder):
        text = (folder / name).read_text(encoding="utf-8")
        problems += [f"{name}: looks like it holds {kind}" for kind, rule in SECRETS.items() if re.search(rule, text)]
        if found := re.search(LOCAL_PATH, text):
            problems.append(f"{name}: holds the local path {found[0]!r}")
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    problems += [f"requirements.txt: {line} is not pinned by ==" for line in lines if "==" not in line]
    data, _ = split_card((folder / CARD).read_text(encoding="utf-8"))
    lacking = [name for name in ("title", "sdk", "sdk_version", "app_file", "license", "models") if not data.get(name)]
    problems += [f"README.md: its metadata lack {name}" for name in lacking]
    if f"gradio=={data.get('sdk_version')}" not in lines:
        problems.append(f"README.md: sdk_version {data.get('sdk_version')} is not the gradio of requirements.txt")
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, str(folder.resolve()), *OURS],
            cwd=elsewhere,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    found = re.search(r"^RESULT (.*)", done.stdout, re.MULTILINE)
    if found is None:
        return [f"its app cannot be imported: {done.stderr.strip()[-500:]}"]
    outside = [file for file in json.loads(found[1]) if not Path(file).is_relative_to(folder.resolve())]
    return [f"its app imports {file}, which is not in it" for file in outside]


def push_space(
    repository: str,
    models: list[str],
    *,
    private: bool | None = True,
    dry_run: bool = False,
    delete_others: bool = False,
    message: str | None = None,
) -> Pushed:
    """Packages, checks and pushes the demo of one or two checkpoints of the Hub as the Space `repository`; see `hub_upload.push.push`.

    Raises:
        PushError: if it must not be pushed or the Hub refuses it; the message says what to do.
    """
    for name in (repository, *models):
        check_name(name)
    for name in models:
        _check_model(name)
    api = SpaceApi()
    with tempfile.TemporaryDirectory() as temporary:
        staged = package_space(Path(temporary) / "staged", models)
        if problems := check_space(staged):
            raise PushError("The Space must not be pushed:\n" + "\n".join(f"  {problem}" for problem in problems))
        return publish(
            api,
            repository,
            lambda commit: _compare(api, repository, commit, staged, delete_others),
            private=private,
            revision="main",
            tag=None,
            create_pr=False,
            dry_run=dry_run,
            message=message or f"Demo of {' and '.join(models)}",
        )


def _check_model(name: str) -> None:
    """Raises a `PushError` if the Hub has no such model, or one that the app does not load."""
    api = HfApi()
    try:
        commit = patiently(lambda: api.model_info(name), name).sha
    except PushError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        raise PushError(
            f"The Hub has no model {name!r} that this token may read, so the Space would show nothing. Push it first: "
            f"push.py FOLDER {name}."
        ) from error
    found = ": it has no config.json"
    if "config.json" in files_at(api, name, commit):
        kind = model_type_of(read_at(api, name, commit, "config.json"))
        if kind == OUR_TYPE:
            return
        found = f" but a model of type {kind!r}"
    raise PushError(
        f"{name!r} is no checkpoint of AlignVLM{found}. The demo shows checkpoints only: name a repository that `push.py FOLDER "
        "USER/NAME` made of one."
    )


def _compare(api: SpaceApi, repository: str, commit: str, staged: Path, delete_others: bool) -> Change:
    """Compares a commit of the Space with the staged folder.

    Raises:
        PushError: if it holds another app.
    """
    there = files_at(api, repository, commit)
    if "app.py" in there and MANIFEST not in there and not delete_others:
        raise PushError(
            f"{repository} holds an app that was not pushed from here, which a push would replace. Name another Space, or push with "
            "--delete_others."
        )
    listed = read_manifest(read_at(api, repository, commit, MANIFEST)) if MANIFEST in there else {}
    contents: dict[str, Path | bytes] = {name: staged / name for name in files_of(staged)}
    whose = None
    if listed and CARD in there:
        on_the_hub = read_at(api, repository, commit, CARD)
        ours = (staged / CARD).read_text(encoding="utf-8")
        data, body = split_card(on_the_hub)
        renewed = _card({**data, **{name: split_card(ours)[0][name] for name in RENEWED}}, body)
        if renewed != ours:
            contents[CARD], whose = renewed.encode(), "was edited on the Hub"
    others = sorted(set(there) - set(contents) - {THE_HUBS})
    removed = others if delete_others else [name for name in others if name in listed]
    changed = [
        name for name, content in contents.items() if name not in there or not same_content(content, there[name])
    ]
    operations = [CommitOperationAdd(name, contents[name]) for name in changed]
    operations += [CommitOperationDelete(name) for name in removed]
    return Change(contents, operations, removed, [name for name in others if name not in removed], whose)


def _card(data: dict, body: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"


def main(argv: list[str]) -> None:
    """Pushes a Space; an error ends the program with one sentence."""
    parser = ArgumentParser(description="Pushes the demo of a pushed checkpoint as a Space.")
    parser.add_argument("--space", required=True, metavar="USER/NAME", help="The Space; created if it does not exist.")
    parser.add_argument("--model", required=True, metavar="USER/NAME", help="The checkpoint's repository.")
    parser.add_argument("--compare", metavar="USER/NAME", help="A second checkpoint, which answers beside the first.")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", default=True, help="The default.")
    visibility.add_argument("--public", dest="private", action="store_false")
    parser.add_argument("--dry_run", action="store_true", help="Package, check, look at the Space; send nothing.")
    parser.add_argument("--delete_others", action="store_true", help="Delete all files that are not the demo's.")
    parser.add_argument("--message", help="Of the commit.")
    options = vars(parser.parse_args(argv))
    models = [name for name in (options.pop("model"), options.pop("compare")) if name]
    try:
        pushed = push_space(options.pop("space"), models, **options)
    except PushError as error:
        raise SystemExit(f"error: {error}") from error
    for note in pushed.notes():
        print(note)
    if pushed.commit is None:
        print("Dry run: all checks passed; nothing was sent.")
        return
    if not pushed.changed:
        print(f"{pushed.repository} holds exactly this already; no commit was made.")
    print(f"{'Private' if pushed.private else 'Public'}: {constants.ENDPOINT}/spaces/{pushed.repository}")
