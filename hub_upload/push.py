"""Pushes a checkpoint or its export to the Hub: package, checks, one commit on the expected parent, checksums read back, tag.

    python hub_upload/push.py out/stage4 user/my-alignvlm [--public] [--tag v1] [--dry_run]
    python hub_upload/push.py out/llava user/my-llava            # a folder of `alignvlm export --to transformers`
    python hub_upload/push.py --space user/demo --model user/my-alignvlm    # the demo of a pushed checkpoint: see `space.py`

The token is the client's own (`hf auth login`, or HF_TOKEN). Private by default. At any time the branch is either unchanged or
complete, and a second try sends no large file again. A push replaces only the files of an earlier checkpoint; all others stay, and so
does an edited card.
"""

import sys
from os.path import abspath, dirname


# The folder of a script comes first in the path, and its inspect.py is not the standard one.
if __name__ == "__main__":
    sys.path[0] = dirname(dirname(abspath(__file__)))

import hashlib
import json
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from hub_upload.card_text import FOLDER, author_of, is_marked
from hub_upload.checks import check, try_loading
from hub_upload.command_line import ArgumentParser, run
from hub_upload.commit import (
    CARD,
    THE_HUBS,
    Change,
    Pushed,
    PushError,
    check_name,
    files_at,
    publish,
    read_at,
    same_content,
)
from hub_upload.package import (
    MANIFEST,
    add_package_options,
    card_over,
    files_of,
    is_allowed,
    note_releases,
    package,
    read_manifest,
)
from hub_upload.space import main as push_a_space
from hub_upload.stock import is_stock, model_type_of, other_program, package_stock


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".pkl", ".tflite")
# Files that transformers would load beside ours, unchecked.
INTERFERING = ("adapter_config.json", "custom_generate/generate.py", "chat_template.json")


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = True,
    revision: str = "main",
    tag: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    overwrite_card: bool = False,
    delete_others: bool = False,
    max_shard_size: str = "5GB",
    message: str | None = None,
    server: str | None = None,
) -> Pushed:
    """Packages, checks and pushes the checkpoint `folder`, or the export of one.

    Args:
        repository: `user/name`; created if it does not exist.
        private: of a new repository; an existing one must be so already. None: private if new, else as it is.
        revision: the branch; created from main if it does not exist.
        tag: set on the commit.
        create_pr: propose the change instead of making it.
        dry_run: look at the repository, and stop before anything is sent.
        license, license_name, license_link: of the weights. Left out: the strictest of the backbones', or what an export's card states.
        overwrite_card: write the card anew where it was edited, in the folder or on the Hub. Otherwise its text stays, and that of an
            export's folder always.
        delete_others: delete all files of the repository that are not the checkpoint's. Otherwise they stay.
        server: "vllm" pushes a folder that vLLM can serve (see `hub_upload.serving`).

    Raises:
        PushError: if the folder must not be pushed or the Hub refuses it; the message says what to do.
    """
    check_name(repository)
    if create_pr and tag:
        raise PushError("A pull request has no commit to tag yet. Leave out --tag.")
    if program := other_program(folder):
        raise PushError(
            f"{folder} is an export for {program}, and a push sends only what transformers loads. Upload the folder as it is: "
            f"`hf upload {repository} {folder}{'' if private is False else ' --private'}`."
        )
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "staged"
        try:
            options = (max_shard_size, license, license_name, license_link, repository)
            if not is_stock(folder):
                package(folder, staged, *options, overwrite_card, server)
            elif server is not None:
                raise ValueError(f"it is an export, which {server} runs as it is: leave out --for {server}.")
            else:
                package_stock(folder, staged, *options)
        except (OSError, ValueError) as error:
            raise PushError(f"{folder} cannot be packaged: {error}") from error
        problems, releases = check(staged, load=False), {}
        if not problems:
            problems, releases = try_loading(staged)
        if problems:
            raise PushError(f"{folder} must not be pushed:\n" + "\n".join(f"  {problem}" for problem in problems))
        if not is_stock(staged):
            note_releases(staged, releases, repository)
        return send(
            staged,
            repository,
            private=private,
            revision=revision,
            tag=tag,
            create_pr=create_pr,
            dry_run=dry_run,
            license_given=bool(license),
            overwrite_card=overwrite_card,
            delete_others=delete_others,
            message=message or f"Upload {Path(folder).name}",
        )


def send(
    staged: str | Path,
    repository: str,
    *,
    private: bool | None = True,
    revision: str = "main",
    tag: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    license_given: bool = False,
    overwrite_card: bool = False,
    delete_others: bool = False,
    message: str = "Upload",
) -> Pushed:
    """Makes the branch hold the files of a packaged and checked folder, in one commit; see `push`."""
    staged, api = Path(staged), HfApi()
    rules = {"license_given": license_given, "overwrite_card": overwrite_card, "delete_others": delete_others}
    pushed = publish(
        api,
        repository,
        lambda commit: _compare(api, repository, commit, staged, **rules),
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        dry_run=dry_run,
        message=message,
    )
    pushed.has_code = not is_stock(staged)
    return pushed


def _compare(
    api: HfApi,
    repository: str,
    commit: str,
    staged: Path,
    license_given: bool,
    overwrite_card: bool,
    delete_others: bool,
) -> Change:
    """Compares a commit of the repository with the staged folder.

    Raises:
        PushError: if it holds another kind of model, or files that would be loaded in place of ours.
    """
    there = files_at(api, repository, commit)

    def read(name: str) -> str | None:
        if name not in there:
            return None
        if same_content(staged / name, there[name]):
            return (staged / name).read_text(encoding="utf-8")
        return read_at(api, repository, commit, name)

    listed = read_manifest(read(MANIFEST) or "")
    is_ours = _check_kind(repository, read("config.json"), there, staged, pushed_by_us="config.json" in listed)
    contents: dict[str, Path | bytes] = {name: staged / name for name in files_of(staged)}
    card, whose = (staged / CARD).read_text(encoding="utf-8"), None
    if author_of(card) == FOLDER:
        whose = "was edited in the folder (or written by an older release)"
    if not overwrite_card and (on_the_hub := read(CARD)) is not None:
        as_pushed = listed.get(CARD) == hashlib.sha256(on_the_hub.encode()).hexdigest()
        if is_marked(on_the_hub) or not as_pushed:  # else written by a release that made no mark
            try:
                card, kept = card_over(card, on_the_hub, license_given)
            except ValueError as error:
                raise PushError(
                    f"The README.md of {repository}: {error} (--overwrite_card writes it anew.)"
                ) from error
            whose = "was edited on the Hub" if kept else whose
            contents[CARD] = card.encode()
            contents[MANIFEST] = _with_hash(staged, contents[CARD])
    others = sorted(set(there) - set(contents) - {THE_HUBS})
    # Files of an earlier push, or of a kind that checkpoints consist of: a stale index or shard would be loaded in place of the new weights.
    stale = [
        name for name in others if is_ours and (name in listed or (is_allowed(name) and not name.endswith(".py")))
    ]
    removed = others if delete_others else stale
    kept = [name for name in others if name not in removed]
    if found := [name for name in kept if name in INTERFERING]:
        raise PushError(
            f"{repository} holds {', '.join(found)}, which transformers would load beside this checkpoint. Remove it there, or push with "
            "--delete_others, which deletes " + ", ".join(kept) + "."
        )
    changed = [
        name for name, content in contents.items() if name not in there or not same_content(content, there[name])
    ]
    operations = [CommitOperationAdd(name, contents[name]) for name in changed]
    operations += [CommitOperationDelete(name) for name in removed]
    return Change(contents, operations, removed, kept, whose)


def _check_kind(
    repository: str, config: str | None, there: dict[str, RepoFile], staged: Path, pushed_by_us: bool
) -> bool:
    """Whether a repository holds a model of the kind of the staged one; False if it holds no model.

    Raises:
        PushError: if it holds another kind, or one of transformers' own classes that was not pushed by this package.
    """
    advice = "A push would replace that model. Name another repository."
    if config is None:
        if weights := [name for name in there if name.endswith(WEIGHTS)]:
            raise PushError(f"{repository} holds weights that are no AlignVLM model's ({weights[0]}). {advice}")
        return False
    kind = model_type_of(config)
    if kind != json.loads((staged / "config.json").read_text(encoding="utf-8"))["model_type"]:
        raise PushError(
            f"{repository} holds a model of another kind (model_type {kind!r} in its config.json). {advice}"
        )
    if is_stock(staged) and not pushed_by_us:
        raise PushError(
            f"{repository} holds a model that was not pushed from here (its {MANIFEST} lists none). {advice}"
        )
    return True


def _with_hash(staged: Path, card: bytes) -> bytes:
    """Makes the manifest of a packaged folder, with the hash of another card."""
    listed = read_manifest((staged / MANIFEST).read_text(encoding="utf-8")) | {CARD: hashlib.sha256(card).hexdigest()}
    return "".join(f"{digest}  {name}\n" for name, digest in listed.items()).encode()


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--space" for argument in arguments):
        return push_a_space(arguments)
    parser = ArgumentParser(
        description="Pushes a checkpoint or its export to the Hub. `push.py --space --help` is about the demo as a Space."
    )
    parser.add_argument(
        "folder",
        help="The output_dir of a stage, or a folder of `alignvlm export --to transformers` (other exports: `hf upload`).",
    )
    parser.add_argument("repository", help="user/name")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", default=True, help="The default.")
    visibility.add_argument("--public", dest="private", action="store_false")
    parser.add_argument("--revision", default="main", help="Branch.")
    parser.add_argument("--tag", help="Set on the commit.")
    parser.add_argument("--create_pr", action="store_true", help="Propose the change instead of making it.")
    parser.add_argument("--dry_run", action="store_true", help="Package, check, look at the repository; send nothing.")
    parser.add_argument(
        "--delete_others",
        action="store_true",
        help="Delete all files of the repository that are not the checkpoint's.",
    )
    add_package_options(parser)
    parser.add_argument("--message", help="Of the commit.")
    options = vars(parser.parse_args(arguments))
    try:
        pushed = push(options.pop("folder"), options.pop("repository"), **options)
    except PushError as error:
        raise SystemExit(f"error: {error}") from error
    for note in pushed.notes():
        print(note)
    if pushed.commit is None:
        print("Dry run: all checks passed; nothing was sent.")
        return
    if pushed.pull_request:
        print(f"Proposed: {pushed.pull_request}")
    elif not pushed.changed:
        print(f"{pushed.repository} holds exactly this already; no commit was made.")
    print(f"{'Private' if pushed.private else 'Public'}. To load it:\n{pushed.how_to_load()}")


if __name__ == "__main__":
    run(main)
