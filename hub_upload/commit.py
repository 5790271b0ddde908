"""Makes one commit on the expected parent and reads it back: at any time the branch is either unchanged or complete.

Calls that fail by overload or a lost connection are tried again; other errors are explained. A second try sends no large file again.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hub_upload.repository import HTTPError
from hub_upload.run_record import sha256_of


CARD = "README.md"
THE_HUBS = ".gitattributes"  # written by the Hub itself
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


@dataclass
class Change:
    """What a commit changes: the contents of the checkpoint's files, the operations, and what becomes of other files."""

    contents: dict[str, Path | bytes]
    operations: list
    removed: list[str]
    kept: list[str]
    card: str | None


def check_name(repository: str) -> None:
    """Raises a `PushError` if the Hub would not take the name of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PushError(f"{repository!r} names no repository: {error}") from error
    if "/" not in repository:
        raise PushError(f"{repository!r} names no repository. Expected user/name.")


def free_tag(repository: str, tag: str) -> str:
    """Returns `tag`, or where a repository has it already the first that it has not of `tag-2`, `tag-3` and so on.

    Raises:
        PushError: if the Hub does not answer.
    """
    try:
        refs = patiently(lambda: HfApi().list_repo_refs(repository), repository)
    except PushError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return tag
        raise
    taken = {ref.name for ref in refs.tags}
    return next(name for name in chain([tag], (f"{tag}-{number}" for number in count(2))) if name not in taken)


def is_public(repository: str) -> bool:
    """Whether a repository is public; False where the Hub does not say."""
    try:
        return HfApi().model_info(repository).private is False
    except (HTTPError, OSError, ValueError):
        return False


def publish(
    api: HfApi,
    repository: str,
    compare: Callable[[str], Change],
    *,
    private: bool | None,
    revision: str,
    tag: str | None,
    create_pr: bool,
    dry_run: bool,
    message: str,
) -> Pushed:
    """Makes one commit of what `compare` says of the branch's head, on exactly that head, and reads it back; see `hub_upload.push.push`."""
    if not dry_run:
        patiently(lambda: api.create_repo(repository, private=private is not False, exist_ok=True), repository)
    try:
        info = patiently(lambda: api.model_info(repository), repository)
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
    if tag:
        _check_tag(api, repository, tag, None if change.operations else head)
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
        return patiently(lambda: api.model_info(repository, revision=revision), repository).sha
    except RevisionNotFoundError:
        if not make:
            return None
        patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True), repository)
        return patiently(lambda: api.model_info(repository, revision=revision), repository).sha


def files_at(api: HfApi, repository: str, commit: str) -> dict[str, RepoFile]:
    """Lists the files of a commit, by their paths."""
    tree = patiently(lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)), repository)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def read_at(api: HfApi, repository: str, commit: str, name: str) -> str:
    """Reads a text file of a commit."""
    with tempfile.TemporaryDirectory() as temporary:
        path = patiently(
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


def _tagged(api: HfApi, repository: str, tag: str) -> str | None:
    """Returns the commit that a tag names; None if there is no such tag."""
    refs = patiently(lambda: api.list_repo_refs(repository), repository)
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def _check_tag(api: HfApi, repository: str, tag: str, commit: str | None) -> None:
    """Raises a `PushError` if a tag names another commit than this one, or any if this is None, one that is yet to be made."""
    if (existing := _tagged(api, repository, tag)) not in (None, commit):
        raise PushError(
            f"{repository}: the tag {tag!r} already names {existing}, and tags do not move. Nothing was sent. Take another tag."
        )


def _tag(api: HfApi, repository: str, tag: str, commit: str) -> None:
    existing = _tagged(api, repository, tag)
    if existing is None:
        patiently(lambda: api.create_tag(repository, tag=tag, revision=commit), repository)
    elif existing != commit:  # somebody made it meanwhile
        raise PushError(
            f"The files are pushed as {commit}, but the tag {tag!r} already names {existing}, and tags do not move. Take another tag."
        )


def patiently(call, repository: str):
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
