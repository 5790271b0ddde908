"""Pushes a checkpoint to the Hub: package, checks, one commit on the expected parent, checksums read back, tag.

    python hub_upload/push.py out/stage4 user/my-alignvlm [--public] [--tag v1] [--dry_run]

The token is the client's own (`hf auth login`, or HF_TOKEN). Private by default. At any time the branch is either as before or
complete; a second try sends no large file again.
"""

import sys
from os.path import abspath, dirname


# The folder of a script comes first in the path, and its inspect.py is not the standard one.
if __name__ == "__main__":
    sys.path[0] = dirname(dirname(abspath(__file__)))

import argparse
import hashlib
import tempfile
import time
from dataclasses import dataclass
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

from hub_upload.checks import check
from hub_upload.package import files_of, package, sha256_of


HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library the client uses, lost connections among them
KEPT = ".gitattributes"  # the Hub's own
TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0  # seconds


class PushError(RuntimeError):
    """A push that did not happen, with what to do about it."""


@dataclass
class Pushed:
    """What a push left on the Hub."""

    repository: str
    commit: str
    changed: bool
    private: bool
    pull_request: str | None = None

    def how_to_load(self) -> str:
        """The line that loads exactly this."""
        return f'AutoModelForImageTextToText.from_pretrained("{self.repository}", revision="{self.commit}", trust_remote_code=True)'


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = True,
    revision: str = "main",
    tag: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    license: str = "apache-2.0",
    max_shard_size: str = "5GB",
    message: str | None = None,
) -> Pushed | None:
    """Packages, checks and pushes the checkpoint `folder`.

    Args:
        repository: `user/name`; created if it does not exist.
        private: of a new repository; an existing one must be so already. None: private if new, else as it is.
        revision: the branch; created from main if it does not exist.
        tag: set on the commit.
        create_pr: propose the change instead of making it.
        dry_run: stop before anything is sent; returns None.

    Raises:
        PushError: if the folder must not be pushed, or the Hub did not take it; the message says what to do.
    """
    check_name(repository)
    if create_pr and tag:
        raise PushError("A pull request has no commit to tag yet. Leave out --tag.")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "staged"
        try:
            package(folder, staged, max_shard_size, license, repository)
        except (OSError, ValueError) as error:
            raise PushError(f"{folder} cannot be packaged: {error}") from error
        if problems := check(staged):
            raise PushError(f"{folder} must not be pushed:\n" + "\n".join(f"  {problem}" for problem in problems))
        if dry_run:
            return None
        return send(
            staged,
            repository,
            private=private,
            revision=revision,
            tag=tag,
            create_pr=create_pr,
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
    message: str = "Upload",
) -> Pushed:
    """Makes the branch hold exactly the files of a packaged and checked folder, in one commit; see `push`."""
    staged, api = Path(staged), HfApi()
    _patiently(lambda: api.create_repo(repository, private=private is not False, exist_ok=True), repository)
    info = _patiently(lambda: api.model_info(repository), repository)
    if private is not None and bool(info.private) != private:
        now, wanted = ("private", "public") if info.private else ("public", "private")
        raise PushError(
            f"{repository} is {now}, and you asked for {wanted}. Nothing was sent. Change it in its settings, or push with --{now}."
        )
    head = _head(api, repository, revision)
    files = files_of(staged)
    for attempt in range(TRIES):
        operations = _operations(api, repository, head, staged, files)
        if not operations:
            commit, changed, pull_request = head, attempt > 0, None
            break
        try:
            made = api.create_commit(
                repository,
                operations,
                commit_message=message,
                revision=revision,
                parent_commit=head,
                create_pr=create_pr,
            )
            commit, changed, pull_request = made.oid, True, made.pr_url
            break
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # of hf_xet, and of the card's validation
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise _explained(error, repository) from error
            time.sleep(wait)
            # The answer may have been lost on its way back: then the branch has moved, and holds what we sent.
            now = _head(api, repository, revision)
            if now != head and _operations(api, repository, now, staged, files):
                raise _explained(None, repository, status=412) from error
            head = now
    _verify(api, repository, commit, staged)
    if tag:
        _tag(api, repository, tag, commit)
    return Pushed(repository, commit, changed, bool(info.private), pull_request)


def _head(api: HfApi, repository: str, revision: str) -> str:
    """The commit of the branch, which is made if need be."""
    try:
        return _patiently(lambda: api.model_info(repository, revision=revision), repository).sha
    except RevisionNotFoundError:
        _patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True), repository)
        return _patiently(lambda: api.model_info(repository, revision=revision), repository).sha


def _operations(api: HfApi, repository: str, commit: str, staged: Path, files: list[str]) -> list:
    """What makes the repository hold exactly `files`: additions of what differs, and deletions."""
    tree = _patiently(lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)), repository)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changed = [name for name in files if name not in there or not _same(staged / name, there[name])]
    if not changed and not set(there) - set(files) - {KEPT}:
        return []
    additions = [CommitOperationAdd(name, staged / name) for name in changed]
    return additions + [CommitOperationDelete(name) for name in sorted(set(there) - set(files) - {KEPT})]


def _same(file: Path, entry: RepoFile) -> bool:
    """Whether a local file is what the Hub holds: by SHA-256 for large files, else by git's hash of the content."""
    if entry.size != file.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of([file])
    content = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _verify(api: HfApi, repository: str, commit: str, staged: Path) -> None:
    found = _patiently(lambda: api.verify_repo_checksums(repository, revision=commit, local_dir=staged), repository)
    missing = [path for path in found.missing_paths if path != KEPT]
    if found.mismatches or found.extra_paths or missing:
        raise PushError(
            f"{repository} does not hold what was sent: differing {[mismatch['path'] for mismatch in found.mismatches]}, lacking {found.extra_paths}, "
            f"too many {missing}. Push again."
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
    """The call's result; overload and lost connections are tried again, anything else is explained."""
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
    parser = argparse.ArgumentParser(description="Pushes a checkpoint to the Hub.")
    parser.add_argument("folder", help="The output_dir of a stage.")
    parser.add_argument("repository", help="user/name")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", default=True, help="The default.")
    visibility.add_argument("--public", dest="private", action="store_false")
    parser.add_argument("--revision", default="main", help="Branch.")
    parser.add_argument("--tag", help="Set on the commit.")
    parser.add_argument("--create_pr", action="store_true", help="Propose the change instead of making it.")
    parser.add_argument("--dry_run", action="store_true", help="Package and check only.")
    parser.add_argument("--license", default="apache-2.0", help="Of the weights, for the card.")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--message", help="Of the commit.")
    options = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    try:
        pushed = push(options.pop("folder"), options.pop("repository"), **options)
    except PushError as error:
        raise SystemExit(f"error: {error}") from error
    if pushed is None:
        print("Dry run: all checks passed; nothing was sent.")
        return
    if pushed.pull_request:
        print(f"Proposed: {pushed.pull_request}")
    elif not pushed.changed:
        print(f"{pushed.repository} holds exactly this already; no commit was made.")
    print(f"{'Private' if pushed.private else 'Public'}. To load it:\n{pushed.how_to_load()}")


if __name__ == "__main__":
    main()
