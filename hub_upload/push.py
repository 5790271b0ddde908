"""Pushes a checkpoint or its export to the Hub: package, checks, one commit on the expected parent, checksums read back, tag.

    python hub_upload/push.py out/stage4 user/my-alignvlm [--public] [--tag v1] [--dry_run]
    python hub_upload/push.py out/llava user/my-llava            # a folder of `alignvlm export`
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
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hub_upload.card_text import (
    FOLDER,
    GENERATED,
    HAND,
    author_of,
    body_of,
    is_marked,
    join_card,
    renewed_metadata,
    split_card,
)
from hub_upload.checks import check, try_loading
from hub_upload.command_line import ArgumentParser
from hub_upload.package import (
    MANIFEST,
    add_package_options,
    files_of,
    is_allowed,
    note_releases,
    package,
    read_manifest,
)
from hub_upload.repository import HTTPError
from hub_upload.run_record import sha256_of
from hub_upload.stock import is_stock, package_stock


THE_HUBS = ".gitattributes"
CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".pkl", ".tflite")
# Files that transformers would load beside ours, unchecked.
INTERFERING = ("adapter_config.json", "custom_generate/generate.py", "chat_template.json")
TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0  # seconds


class PushError(RuntimeError):
    """A push failed; the message says what to do."""


@dataclass
class Pushed:
    """The result of a push, or in a dry run what it would be; `commit` is None then.

    `removed` and `kept` are the other files of the repository; `card` says whose text its README.md has, if somebody edited it.
    """

    repository: str
    commit: str | None
    changed: bool
    private: bool
    pull_request: str | None = None
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    card: str | None = None
    has_code: bool = True

    def how_to_load(self) -> str:
        """The line that loads exactly this."""
        trust = ", trust_remote_code=True" if self.has_code else ""
        return f'AutoModelForImageTextToText.from_pretrained("{self.repository}", revision="{self.commit}"{trust})'

    def notes(self) -> list[str]:
        """Tells what becomes of existing files, one sentence each."""
        dry = self.commit is None
        notes = []
        if self.removed:
            notes.append(f"{'Would delete' if dry else 'Deleted'} on {self.repository}: {', '.join(self.removed)}")
        if self.kept:
            notes.append(
                f"{'Would keep' if dry else 'Kept'} on {self.repository}, where it is no part of the checkpoint: {', '.join(self.kept)}. "
                "--delete_others deletes it."
            )
        if self.card:
            notes.append(
                f"README.md keeps the text that {self.card}; its metadata are renewed. --overwrite_card writes it anew."
            )
        return notes


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


def check_name(repository: str) -> None:
    """Raises a `PushError` if the Hub would not take the name of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PushError(f"{repository!r} names no repository: {error}") from error
    if "/" not in repository:
        raise PushError(f"{repository!r} names no repository. Expected user/name.")


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


def publish(
    api: HfApi,
    repository: str,
    compare: Callable[[str], "Change"],
    *,
    private: bool | None,
    revision: str,
    tag: str | None,
    create_pr: bool,
    dry_run: bool,
    message: str,
) -> Pushed:
    """Makes one commit of what `compare` says of the branch's head, on exactly that head, and reads it back; see `push`."""
    if not dry_run:
        _patiently(lambda: api.create_repo(repository, private=private is not False, exist_ok=True), repository)
    try:
        info = _patiently(lambda: api.model_info(repository), repository)
    except PushError as error:
        if dry_run and isinstance(error.__cause__, RepositoryNotFoundError):
            return Pushed(repository, None, True, private is not False)
        raise
    if private is not None and bool(info.private) != private:
        now, wanted = ("private", "public") if info.private else ("public", "private")
        raise PushError(
            f"{repository} is {now}, and you asked for {wanted}. Nothing was sent. Change it in its settings, or push with --{now}."
        )
    head = _head(api, repository, revision, make=not dry_run) or info.sha
    first = change = compare(head)
    pushed = Pushed(repository, None, bool(change.operations), bool(info.private))
    pushed.removed, pushed.kept, pushed.card = first.removed, first.kept, first.card
    for attempt in range(TRIES):
        if dry_run:
            return pushed
        if not change.operations:
            pushed.commit, pushed.changed = head, attempt > 0
            break
        try:
            made = api.create_commit(
                repository,
                change.operations,
                commit_message=message,
                revision=revision,
                parent_commit=head,
                create_pr=create_pr,
            )
            pushed.commit, pushed.pull_request = made.oid, made.pr_url
            break
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # of hf_xet, and of the card's validation
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise _explained(error, repository) from error
            time.sleep(wait)
            # The answer may have been lost on its way back: then the branch has moved, and holds what we sent.
            now = _head(api, repository, revision)
            if now != head:
                change = compare(now)
                if change.operations or set(change.kept) - set(first.kept):
                    raise _explained(None, repository, status=412) from error
            head = now
    _verify(api, repository, pushed.commit, change)
    if tag:
        _tag(api, repository, tag, pushed.commit)
    return pushed


def _head(api: HfApi, repository: str, revision: str, make: bool = True) -> str | None:
    """Finds the commit of the branch. Creates a missing branch if `make`, else returns None for it."""
    try:
        return _patiently(lambda: api.model_info(repository, revision=revision), repository).sha
    except RevisionNotFoundError:
        if not make:
            return None
        _patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True), repository)
        return _patiently(lambda: api.model_info(repository, revision=revision), repository).sha


@dataclass
class Change:
    """What a commit changes: the contents of the checkpoint's files, the operations, and what becomes of other files."""

    contents: dict[str, Path | bytes]
    operations: list
    removed: list[str]
    kept: list[str]
    card: str | None


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
            return (staged / name).read_text()
        return read_at(api, repository, commit, name)

    listed = read_manifest(read(MANIFEST) or "")
    is_ours = _check_kind(repository, read("config.json"), there, staged, pushed_by_us="config.json" in listed)
    contents: dict[str, Path | bytes] = {name: staged / name for name in files_of(staged)}
    card, whose = (staged / CARD).read_text(), None
    if author_of(card) == FOLDER:
        whose = "was edited in the folder (or written by an older release)"
    if not overwrite_card and (on_the_hub := read(CARD)) is not None:
        as_pushed = listed.get(CARD) == hashlib.sha256(on_the_hub.encode()).hexdigest()
        if is_marked(on_the_hub) or not as_pushed:  # else written by a release that made no mark
            try:
                card, kept = _card_for(card, on_the_hub, license_given)
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
    try:
        kind = json.loads(config).get("model_type")
    except (ValueError, AttributeError):
        kind = None
    if kind != json.loads((staged / "config.json").read_text())["model_type"]:
        raise PushError(
            f"{repository} holds a model of another kind (model_type {kind!r} in its config.json). {advice}"
        )
    if is_stock(staged) and not pushed_by_us:
        raise PushError(
            f"{repository} holds a model that was not pushed from here (its {MANIFEST} lists none). {advice}"
        )
    return True


def _card_for(ours: str, on_the_hub: str, license_given: bool) -> tuple[str, bool]:
    """Makes the card to push over an existing one; also returns whether the existing text stays."""
    data, body = split_card(ours)
    data = renewed_metadata(split_card(on_the_hub)[0], data, license_given)
    author, on_the_hubs_author = author_of(ours), author_of(on_the_hub)
    replaced = on_the_hubs_author == GENERATED or on_the_hubs_author == author == FOLDER
    if replaced or body_of(on_the_hub) == body_of(ours):
        return join_card(data, body, author), False
    return join_card(data, body_of(on_the_hub), HAND), True


def _with_hash(staged: Path, card: bytes) -> bytes:
    """Makes the manifest of a packaged folder, with the hash of another card."""
    listed = read_manifest((staged / MANIFEST).read_text()) | {CARD: hashlib.sha256(card).hexdigest()}
    return "".join(f"{digest}  {name}\n" for name, digest in listed.items()).encode()


def files_at(api: HfApi, repository: str, commit: str) -> dict[str, RepoFile]:
    """Lists the files of a commit, by their paths."""
    tree = _patiently(lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)), repository)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def read_at(api: HfApi, repository: str, commit: str, name: str) -> str:
    """Reads a text file of a commit."""
    with tempfile.TemporaryDirectory() as temporary:
        path = _patiently(
            lambda: api.hf_hub_download(repository, name, revision=commit, local_dir=temporary), repository
        )
        return Path(path).read_bytes().decode(errors="replace")


def same_content(content: Path | bytes, entry: RepoFile) -> bool:
    """Whether the Hub holds this content: by SHA-256 for large files, else by git's hash of the content."""
    if isinstance(content, Path):
        if not content.is_file() or entry.size != content.stat().st_size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == sha256_of([content])
        content = content.read_bytes()
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _verify(api: HfApi, repository: str, commit: str, change: Change) -> None:
    """Raises a `PushError` if a commit does not hold what was sent."""
    there = files_at(api, repository, commit)
    lacking = sorted(set(change.contents) - set(there))
    differing = [
        name
        for name, entry in there.items()
        if name in change.contents and not same_content(change.contents[name], entry)
    ]
    too_many = sorted(set(change.removed) & set(there))
    if differing or lacking or too_many:
        raise PushError(
            f"{repository} does not hold what was sent: differing {differing}, lacking {lacking}, too many {too_many}. Push again."
        )


def _tag(api: HfApi, repository: str, tag: str, commit: str) -> None:
    refs = _patiently(lambda: api.list_repo_refs(repository), repository)
    existing = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if existing is None:
        _patiently(lambda: api.create_tag(repository, tag=tag, revision=commit), repository)
    elif existing != commit:
        raise PushError(
            f"The files are pushed as {commit}, but the tag {tag!r} already names {existing}, and tags do not move. Take another tag."
        )


def _patiently(call, repository: str):
    """Returns the call's result; tries again after overload and lost connections, and explains other errors."""
    for attempt in range(TRIES):
        try:
            return call()
        except RevisionNotFoundError:
            raise
        except (HTTPError, OSError) as error:
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise _explained(error, repository) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """How long to wait before another try; None if trying again cannot help."""
    response = getattr(error, "response", None)
    if isinstance(error, LocalTokenNotFoundError) or (response is None and isinstance(error, HfHubHTTPError)):
        return None
    if isinstance(error, ValueError) and not isinstance(
        error, JSONDecodeError
    ):  # the latter is an overloaded server's page
        return None
    if response is not None and response.status_code != 429 and response.status_code < 500:
        return None
    wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(max(wait, float(asked)), LONGEST_WAIT) if asked.isdigit() else wait


def _explained(error: Exception | None, repository: str, status: int | None = None) -> PushError:
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        text = "The Hub does not know who you are. Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    elif status == 403:
        text = f"Your token may not write to {repository}. Take one with write access, or another namespace."
    elif status == 404 or isinstance(error, RepositoryNotFoundError):
        text = f"{repository} does not exist, or your token may not see it."
    elif status in (409, 412):
        text = f"Someone pushed to {repository} meanwhile. Look at what they did, and push again."
    elif status == 429:
        text = "The Hub asks for fewer calls. Wait some minutes, and push again."
    elif (status is not None and status < 500) or (
        isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)
    ):
        text = "The Hub does not take this."
    else:
        text = f"The Hub could not be reached, or failed, {TRIES} times ({type(error).__name__}). Push again; large files that arrived stay."
    said = getattr(error, "server_message", None) or (str(error) if isinstance(error, ValueError) else "")
    details = ", ".join(filter(None, [f"HTTP {status}" if status else "", f"it said: {said}" if said else ""]))
    return PushError(f"{text} ({details})" if details else text)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--space" for argument in arguments):
        return importlib.import_module("hub_upload.space").main(arguments)  # which stands above this module
    parser = ArgumentParser(
        description="Pushes a checkpoint or its export to the Hub. `push.py --space --help` is about the demo as a Space."
    )
    parser.add_argument("folder", help="The output_dir of a stage, or a folder of `alignvlm export`.")
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
    parser.add_argument("--max_shard_size", default="5GB")
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
    main()
