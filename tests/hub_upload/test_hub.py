"""Pushing to and loading from a Hub on this machine: the real client over HTTP, in processes of their own."""

import base64
import hashlib
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from alignvlm.evaluation import answer as generate
from hub_upload.package import files_of, note_releases, package
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.hub_client import Client, ClientError
from tests.loopback_hub import LoopbackHub
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
BASE = {name: os.environ[name] for name in ("PATH", "HOME", "ALIGNVLM_TEST_DATA") if name in os.environ}


@pytest.fixture(scope="module", params=["lfs", "xet"])
def hub(request, tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp(request.param), xet=request.param == "xet") as hub:
        yield hub


@pytest.fixture(scope="module")
def lfs_hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("lfs"), part_size=30_000) as hub:
        yield hub


def connect(hub: LoopbackHub, folder: Path, **options) -> Client:
    client = Client({**BASE, **hub.environment(folder / "home", **options)}, folder)
    client("hub_client:quick")
    return client


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = connect(hub, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def lfs_client(lfs_hub, tmp_path_factory):
    client = connect(lfs_hub, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def staged(checkpoint, tmp_path_factory) -> Path:
    return package(checkpoint, tmp_path_factory.mktemp("staged") / "out")


def holds(hub: LoopbackHub, repository: str, folder: Path, ref: str = "main") -> bool:
    """Whether a branch holds exactly a folder's files."""
    there = {name: blob for name, blob in hub.files(repository, ref).items() if name != ".gitattributes"}
    if sorted(there) != files_of(folder):
        return False
    return all(
        blob.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if blob.sha256
        else hub.content(blob) == (folder / name).read_bytes()
        for name, blob in there.items()
    )


def change_weights(folder: Path, by: float = 0.0) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += by or random.random()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_a_push_from_beginning_to_end(hub, client, checkpoint, tmp_path):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    (mine / ".env").write_text("SECRET=1")
    pushed = client("hub_upload.push:push", mine, "user/whole", tag="v1")
    repository = hub.repositories["user/whole"]
    assert pushed["commit"] == repository.refs["main"] == repository.tags["v1"] and pushed["changed"]
    assert repository.private and repository.history() == ["Upload mine", "initial commit"]
    assert pushed["removed"] == pushed["kept"] == [] and pushed["card"] is None
    staged = package(mine, tmp_path / "staged", repository="user/whole")
    record = json.loads(hub.content(hub.files("user/whole")["alignvlm_run.json"]))
    releases = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert record["loaded_with"] == releases
    note_releases(staged, record["loaded_with"], repository="user/whole")
    assert holds(hub, "user/whole", staged)
    sentence = "Loaded and asked about an image with `transformers` {transformers}, `torch` {torch} and Python {python} before"
    assert sentence.format(**releases) in (staged / "README.md").read_text()
    # Again: nothing to say, so nothing is said.
    again = client("hub_upload.push:send", staged, "user/whole", tag="v1")
    assert not again["changed"] and again["commit"] == pushed["commit"] and len(repository.history()) == 2
    # A change, and a file somebody put there by hand.
    repository.commit("main", {**hub.files("user/whole"), "stray.txt": hub.store(b"x")}, "by hand")
    change_weights(mine)
    package(mine, staged, repository="user/whole")
    third = client("hub_upload.push:send", staged, "user/whole", tag="v2", message="third", delete_others=True)
    assert holds(hub, "user/whole", staged) and third["removed"] == ["stray.txt"]
    assert repository.history() == ["third", "by hand", "Upload mine", "initial commit"]
    assert repository.tags == {"v1": pushed["commit"], "v2": third["commit"]}
    for weights in ("of v2", "others"):  # those that are there already under another tag, and new ones
        if weights == "others":
            change_weights(mine)
            package(mine, staged, repository="user/whole")
        with pytest.raises(ClientError, match=r"the tag 'v1' already names .* Nothing was sent\. Take another tag"):
            client("hub_upload.push:send", staged, "user/whole", tag="v1")
        assert repository.refs["main"] == third["commit"]


def text_of(hub: LoopbackHub, repository: str, name: str) -> str:
    return hub.content(hub.files(repository)[name]).decode()


def put(hub: LoopbackHub, name: str, **files: str | bytes) -> None:
    """Somebody's commit to a repository; `__` in a name stands for a dot."""
    contents = {path.replace("__", "."): content for path, content in files.items()}
    blobs = {path: hub.store(c.encode() if isinstance(c, str) else c) for path, c in contents.items()}
    hub.repositories[name].commit("main", {**hub.files(name), **blobs}, "by hand")


def test_what_else_a_repository_holds_stays(lfs_hub, lfs_client, checkpoint, staged, tmp_path):
    """Only what the checkpoint that was there consisted of goes: a stale index or shard would be loaded in place of the new weights."""
    split = package(checkpoint, tmp_path / "split", max_shard_size="40KB")
    lfs_client("hub_upload.push:send", split, "user/others")
    theirs = {
        "cat__png": b"x",
        "model-q4__gguf": b"x",
        "vocab__json": "{}",
        "modeling_mine__py": "x = 1",
        "a/b__txt": "x",
    }
    put(lfs_hub, "user/others", **theirs)
    pushed = lfs_client("hub_upload.push:send", staged, "user/others")
    shards = sorted(name for name in files_of(split) if name not in files_of(staged))
    assert len(shards) > 2 and pushed["removed"] == sorted([*shards, "vocab.json"])  # a tokenizer would read it
    assert pushed["kept"] == ["a/b.txt", "cat.png", "model-q4.gguf", "modeling_mine.py"]
    assert sorted(lfs_hub.files("user/others")) == sorted([".gitattributes", *files_of(staged), *pushed["kept"]])
    same = lfs_client("hub_upload.push:send", staged, "user/others")
    assert not same["changed"] and same["kept"] == pushed["kept"] and same["removed"] == []
    look = lfs_client("hub_upload.push:send", staged, "user/others", delete_others=True, dry_run=True)
    assert look["removed"] == pushed["kept"] and look["commit"] is None and not holds(lfs_hub, "user/others", staged)
    assert lfs_client("hub_upload.push:send", staged, "user/others", delete_others=True)["removed"] == pushed["kept"]
    assert holds(lfs_hub, "user/others", staged)


def test_a_dry_run_makes_nothing(lfs_hub, lfs_client, staged):
    assert lfs_client("hub_upload.push:send", staged, "user/unmade", dry_run=True)["commit"] is None
    assert "user/unmade" not in lfs_hub.repositories
    lfs_hub.create("user/unbranched")
    assert lfs_client("hub_upload.push:send", staged, "user/unbranched", dry_run=True, revision="b")["changed"]
    assert list(lfs_hub.repositories["user/unbranched"].refs) == ["main"]


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"config__json": '{"model_type": "llama"}', "model__safetensors": b"x"},
            r"another kind \(model_type 'llama'",
        ),
        ({"config__json": '{"architecture": "resnet"}'}, r"another kind \(model_type None"),
        ({"config__json": "no json"}, r"another kind \(model_type None"),
        ({"unet/diffusion_pytorch_model__safetensors": b"x"}, r"no AlignVLM model's \(unet/diffusion"),
        ({"llama-q4__gguf": b"x"}, r"no AlignVLM model's \(llama-q4.gguf\)"),
    ],
    ids=["llama", "timm", "broken", "diffusers", "gguf"],
)
def test_a_repository_of_another_kind_is_refused(lfs_hub, lfs_client, staged, files, message):
    lfs_hub.create("user/kind")
    put(lfs_hub, "user/kind", **files)
    before = lfs_hub.files("user/kind")
    with pytest.raises(ClientError, match=rf"user/kind holds .*{message}.*Name another repository"):
        lfs_client("hub_upload.push:send", staged, "user/kind", delete_others=True)
    assert lfs_hub.files("user/kind") == before


def test_what_would_be_loaded_beside_the_checkpoint_is_refused(lfs_hub, lfs_client, staged):
    lfs_client("hub_upload.push:send", staged, "user/beside")
    put(lfs_hub, "user/beside", adapter_config__json="{}", cat__png=b"x")
    with pytest.raises(ClientError, match=r"holds adapter_config.json, which .* deletes adapter_config.json, cat.png"):
        lfs_client("hub_upload.push:send", staged, "user/beside")
    lfs_client("hub_upload.push:send", staged, "user/beside", delete_others=True)
    assert holds(lfs_hub, "user/beside", staged)


def test_a_card_edited_on_the_hub_stays(lfs_hub, lfs_client, checkpoint, staged, tmp_path):
    def send(folder: Path, **options) -> dict:
        return lfs_client("hub_upload.push:send", folder, "user/card", **options)

    def card() -> tuple[dict, str]:
        _, front, body = text_of(lfs_hub, "user/card", "README.md").split("---\n", 2)
        return yaml.safe_load(front), body

    send(staged)
    generated = text_of(lfs_hub, "user/card", "README.md")
    # Metadata alone, as the Hub's own form changes them: the text is still ours, and is renewed.
    changed = generated.replace("license: apache-2.0", "license: cc-by-nc-4.0\nthumbnail: cat.png").replace(
        "- alignvlm", "- cats"
    )
    put(lfs_hub, "user/card", README__md=changed)
    mine = shutil.copytree(staged, tmp_path / "mine")
    note_releases(mine, {"transformers": "9.9"}, repository="user/card")
    assert send(mine)["card"] is None
    data, body = card()
    assert "with `transformers` 9.9 before" in body
    assert (
        data["license"] == "cc-by-nc-4.0"
        and data["thumbnail"] == "cat.png"
        and {"cats", "alignvlm"} <= {*data["tags"]}
    )
    # The text too.
    put(
        lfs_hub,
        "user/card",
        README__md=text_of(lfs_hub, "user/card", "README.md").replace("Limits and risks", "My cat's limits"),
    )
    for license_given in (True, False):  # a licence that is named wins
        pushed = send(staged, license_given=license_given)
        data, body = card()
        assert pushed["card"] == "was edited on the Hub" and "My cat's limits" in body
        assert data["license"] == "apache-2.0" and data["thumbnail"] == "cat.png"
        digest = hashlib.sha256(text_of(lfs_hub, "user/card", "README.md").encode()).hexdigest()
        assert f"{digest}  README.md" in text_of(lfs_hub, "user/card", "manifest.sha256")
    assert not pushed["changed"]
    # Edited in the folder as well: the Hub's stays, since the folder's is not lost.
    edited = shutil.copytree(checkpoint, tmp_path / "edited")
    (edited / "README.md").write_text(
        (edited / "README.md").read_text().replace("Limits and risks", "The folder's limits")
    )
    from_folder = package(edited, tmp_path / "from folder", repository="user/card")
    assert send(from_folder)["card"] == "was edited on the Hub" and "My cat's limits" in card()[1]
    # Unless one says so.
    assert send(staged, overwrite_card=True)["card"] is None and holds(lfs_hub, "user/card", staged)
    # One edited in the folder replaces ours, and itself, but ours does not replace it.
    assert "edited in the folder" in send(from_folder)["card"] and "The folder's limits" in card()[1]
    assert send(staged)["card"] == "was edited on the Hub" and "The folder's limits" in card()[1]


def test_cards_that_we_did_not_write_stay_and_those_of_older_releases_go(lfs_hub, lfs_client, staged):
    lfs_hub.create("user/card2")
    put(lfs_hub, "user/card2", README__md="My plans for this model.\r\n")
    lfs_client("hub_upload.push:send", staged, "user/card2")
    found = text_of(lfs_hub, "user/card2", "README.md")
    assert "My plans for this model." in found and "license: apache-2.0" in found and "Limits" not in found
    old = (staged / "README.md").read_text().split("<!--")[0].replace("Limits and risks", "Old limits")
    manifest = f"{hashlib.sha256(old.encode()).hexdigest()}  README.md\n"
    put(lfs_hub, "user/card2", README__md=old, manifest__sha256=manifest)
    lfs_client("hub_upload.push:send", staged, "user/card2")
    assert holds(lfs_hub, "user/card2", staged)
    put(lfs_hub, "user/card2", README__md="---\nlicense: [\n---\n")
    with pytest.raises(ClientError, match=r"(?s)README.md of user/card2: its metadata are no YAML.*--overwrite_card"):
        lfs_client("hub_upload.push:send", staged, "user/card2")


def test_a_licence_is_read_from_the_hub(lfs_hub, lfs_client):
    lfs_hub.create("user/backbone")
    put(lfs_hub, "user/backbone", README__md="---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n")
    found = lfs_client("hub_upload.licences:read_licence", "user/backbone")
    link = "https://huggingface.co/user/backbone/blob/main/LICENSE"
    assert found == {"license": "other", "license_name": "qwen", "license_link": link}
    lfs_hub.create("user/bare")
    assert lfs_client("hub_upload.licences:read_licence", "user/bare") is None
    assert lfs_client("hub_upload.licences:read_licence", "user/nothing") is None


def test_branches_and_pull_requests(hub, client, staged):
    client("hub_upload.push:send", staged, "user/branches", revision="trial")
    assert holds(hub, "user/branches", staged, "trial") and list(hub.files("user/branches")) == [".gitattributes"]
    proposed = client("hub_upload.push:send", staged, "user/branches", create_pr=True)
    assert proposed["pull_request"].endswith("/user/branches/discussions/1")
    assert holds(hub, "user/branches", staged, "refs/pr/1") and list(hub.files("user/branches")) == [".gitattributes"]


def test_visibility_is_read_back_before_anything_is_sent(hub, client, staged):
    hub.create("user/open", private=False)
    with pytest.raises(
        ClientError, match=r"user/open is public, and you asked for private. Nothing was sent.* --public"
    ):
        client("hub_upload.push:send", staged, "user/open")
    assert list(hub.files("user/open")) == [".gitattributes"]
    client("hub_upload.push:send", staged, "user/open", private=None)
    assert holds(hub, "user/open", staged) and not hub.repositories["user/open"].private
    with pytest.raises(ClientError, match=r"PushError: 'user/my--model' names no repository"):
        client("hub_upload.push:push", staged, "user/my--model")


def test_a_repository_that_cannot_be_seen_is_told(lfs_hub, lfs_client, staged):
    headers = {"X-Error-Code": "RepoNotFound"}
    lfs_hub.faults[:] = [{"method": "GET", "path": "models/user/unseen", "status": 404, "headers": headers}]
    with pytest.raises(ClientError, match=r"user/unseen does not exist, or your token may not see it. \(HTTP 404"):
        lfs_client("hub_upload.push:send", staged, "user/unseen")
    lfs_hub.faults.clear()


def test_what_cannot_be_inspected_is_told(lfs_hub, lfs_client):
    with pytest.raises(ClientError, match=r"^FileNotFoundError: No such folder: 'stage/nine' .* the Hub "):
        lfs_client("hub_upload.inspect:inspect", "stage/nine")
    lfs_hub.create("user/code")  # no model, and read all the same
    put(lfs_hub, "user/code", code__py="import socket\n")
    assert [file["name"] for file in lfs_client("hub_upload.inspect:inspect", "user/code")["files"]] == ["code.py"]


def test_what_the_hub_says_is_told(lfs_hub, lfs_client, staged, tmp_path):
    lfs_hub.faults[:] = [{"method": "POST", "path": "/tag/", "status": 400}]
    with pytest.raises(ClientError, match=r"The Hub does not take this. \(HTTP 400, it said: a fault of the test"):
        lfs_client("hub_upload.push:send", staged, "user/told", tag="bad tag")
    lfs_hub.faults.clear()


def test_a_folder_that_fails_the_checks_is_not_sent(hub, client, checkpoint, tmp_path):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    with (mine / "masking_alignvlm.py").open("a") as file:
        file.write("\nimport requests\n")
    with pytest.raises(ClientError, match=r"must not be pushed:\n  masking_alignvlm.py: line .* imports requests"):
        client("hub_upload.push:push", mine, "user/refused")
    assert "user/refused" not in hub.repositories


CALLS = [
    ("POST", "repos/create"),
    ("GET", r"api/models/user/[^/]+$"),
    ("GET", "/tree/"),
    ("POST", "validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "objects/batch"),
    ("PUT", "/upload/"),
    ("POST", "/commit/"),
    ("GET", "/refs"),
    ("POST", "/tag/"),
]


@pytest.mark.parametrize("method, path", CALLS, ids=lambda value: value.strip("/"))
@pytest.mark.parametrize("status", [503, 429])
def test_overload_on_any_call_is_waited_out(lfs_hub, lfs_client, staged, tmp_path, method, path, status):
    name = f"user/busy-{status}-{abs(hash((method, path)))}"
    mine = shutil.copytree(staged, tmp_path / "mine")
    change_weights(mine)
    lfs_hub.faults[:] = [
        {"method": method, "path": path, "status": status, "times": 2, "headers": {"Retry-After": "0"}}
    ]
    try:
        pushed = lfs_client("hub_upload.push:send", mine, name, tag="v1")
    except ClientError as error:
        # Some calls the client itself does not repeat, and asks to be made again: then a second push must do.
        pytest.fail(f"{method} {path}: {error}")
    assert lfs_hub.faults[0]["times"] < 2, "the fault was never met"
    assert holds(lfs_hub, name, mine) and pushed["commit"] == lfs_hub.repositories[name].tags["v1"]
    assert len(lfs_hub.repositories[name].history()) == 2


@pytest.mark.parametrize("method, path", [("PUT", "/upload/"), ("POST", "/commit/"), ("POST", "objects/batch")])
def test_a_hub_that_stays_down_leaves_the_branch_as_it_was(lfs_hub, lfs_client, staged, tmp_path, method, path):
    name = f"user/down-{abs(hash((method, path)))}"
    mine = shutil.copytree(staged, tmp_path / "mine")
    lfs_client("hub_upload.push:send", mine, name)
    before = lfs_hub.repositories[name].refs["main"]
    change_weights(mine)
    lfs_hub.faults[:] = [{"method": method, "path": path, "status": 500, "times": 1000}]
    with pytest.raises(ClientError, match=r"The Hub could not be reached, or failed, 5 times.*Push again"):
        lfs_client("hub_upload.push:send", mine, name)
    assert lfs_hub.repositories[name].refs["main"] == before
    lfs_hub.faults.clear()
    asked = len(lfs_hub.requests)
    lfs_client("hub_upload.push:send", mine, name)
    assert holds(lfs_hub, name, mine)
    if path == "/commit/":  # the blob was there already
        assert not [r for r in lfs_hub.requests[asked:] if r["method"] == "PUT"]


def test_a_connection_cut_during_an_upload(lfs_hub, lfs_client, staged, tmp_path):
    mine = shutil.copytree(staged, tmp_path / "mine")
    change_weights(mine)
    lfs_hub.faults[:] = [{"method": "PUT", "path": "/upload/", "cut": 5000, "times": 2}]
    lfs_client("hub_upload.push:send", mine, "user/cut")
    assert lfs_hub.faults[0]["times"] == 0 and holds(lfs_hub, "user/cut", mine)


def test_an_answer_that_is_lost(lfs_hub, lfs_client, staged, tmp_path):
    """The commit was made, but nobody said so: there is no second one."""
    mine = shutil.copytree(staged, tmp_path / "mine")
    lfs_hub.faults[:] = [{"method": "POST", "path": "/commit/", "lose_answer": True}]
    pushed = lfs_client("hub_upload.push:send", mine, "user/lost", tag="v1")
    assert holds(lfs_hub, "user/lost", mine) and len(lfs_hub.repositories["user/lost"].history()) == 2
    assert pushed["changed"] and pushed["commit"] == lfs_hub.repositories["user/lost"].tags["v1"]


def test_what_the_hub_holds_is_read_back(lfs_hub, lfs_client, staged, tmp_path):
    mine = shutil.copytree(staged, tmp_path / "mine")
    lfs_client("hub_upload.push:send", mine, "user/readback")
    commits = lfs_hub.repositories["user/readback"].commits

    def damage() -> None:  # when the tree is asked for again, after the commit
        if len(commits) == 3:
            next(reversed(commits.values())).files["config.json"] = lfs_hub.store(b"{}")

    change_weights(mine)
    lfs_hub.faults[:] = [{"method": "GET", "path": "/tree/", "before": damage, "times": 9}]
    with pytest.raises(ClientError, match=r"does not hold what was sent: differing \['config.json'\]"):
        lfs_client("hub_upload.push:send", mine, "user/readback", tag="v1")
    assert lfs_hub.repositories["user/readback"].tags == {}
    lfs_hub.faults.clear()


@pytest.mark.parametrize("fault", [{}, {"status": 503}], ids=["", "and the Hub is busy"])
def test_someone_pushed_meanwhile(lfs_hub, lfs_client, staged, tmp_path, fault):
    mine = shutil.copytree(staged, tmp_path / "mine")
    lfs_client("hub_upload.push:send", mine, "user/busy")
    repository = lfs_hub.repositories["user/busy"]

    def push_something() -> None:
        repository.commit("main", {**lfs_hub.files("user/busy"), "theirs.txt": lfs_hub.store(b"1")}, "theirs")

    change_weights(mine)
    lfs_hub.faults[:] = [{"method": "POST", "path": "/commit/", "before": push_something, **fault}]
    with pytest.raises(
        ClientError, match=r"Someone pushed to user/busy meanwhile. Look at what they did, and push again"
    ):
        lfs_client("hub_upload.push:send", mine, "user/busy")
    assert repository.history()[0] == "theirs" and "theirs.txt" in lfs_hub.files("user/busy")


@pytest.mark.parametrize(
    "token, name, message",
    [
        ("hf_nobody", "user/x", r"The Hub does not know who you are. Log in with `hf auth login`.*HTTP 401"),
        ("hf_loopbackreader", "reader/x", r"Your token may not write to reader/x.*HTTP 403"),
        ("hf_loopbackwriter", "other/x", r"Your token may not write to other/x.*HTTP 403"),
        (None, "user/x", "The Hub does not know who you are"),
    ],
)
def test_who_may_not_write_is_told(lfs_hub, lfs_client, staged, token, name, message):
    lfs_hub.faults.clear()
    writer = lfs_hub.environment(staged)["HF_TOKEN"]
    lfs_client("hub_client:log_in", token)
    with pytest.raises(ClientError, match=message):
        lfs_client("hub_upload.push:send", staged, name)
    lfs_client("hub_client:log_in", writer)
    assert name not in lfs_hub.repositories
    assert "hf_" not in lfs_client.log.read_text()


@pytest.mark.slow
def test_killed_half_way(lfs_hub, lfs_client, staged, tmp_path):
    """While a large file is on its way, and after it: the branch is as before, and no blob that arrived is sent again."""
    mine = shutil.copytree(staged, tmp_path / "mine")
    lfs_hub.faults.clear()
    first = connect(lfs_hub, tmp_path)
    first("hub_upload.push:send", mine, "user/killed")
    repository = lfs_hub.repositories["user/killed"]
    before = repository.refs["main"]
    change_weights(mine)
    for path, client in ((r"/upload/\w+/1$", first), ("/commit/", None)):
        client = client or connect(lfs_hub, tmp_path)

        def kill(victim=client) -> None:
            victim.process.send_signal(signal.SIGKILL)
            time.sleep(0.2)

        method = "POST" if path == "/commit/" else "PUT"
        lfs_hub.faults[:] = [{"method": method, "path": path, "before": kill, "status": 503}]
        with pytest.raises(RuntimeError, match="the client died"):
            client("hub_upload.push:send", mine, "user/killed")
        client.process.wait()
        assert repository.refs["main"] == before
    asked = len(lfs_hub.requests)
    lfs_client("hub_upload.push:send", mine, "user/killed")
    assert holds(lfs_hub, "user/killed", mine)
    assert not [r for r in lfs_hub.requests[asked:] if r["method"] == "PUT"]


def run(hub: LoopbackHub, folder: Path, *command, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**BASE, **hub.environment(folder / "home"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_line_prints_how_to_load_and_never_the_token(lfs_hub, lfs_client, checkpoint, tmp_path):
    lfs_hub.faults.clear()
    output = run(lfs_hub, tmp_path, ROOT / "hub_upload/push.py", checkpoint, "user/cli", "--tag", "v1")
    repository = lfs_hub.repositories["user/cli"]
    commit = repository.refs["main"]
    assert f'from_pretrained("user/cli", revision="{commit}", trust_remote_code=True)' in output
    assert "Private" in output and "hf_loop" not in output and "Kept" not in output
    with_notes = {**lfs_hub.files("user/cli"), "notes.txt": lfs_hub.store(b"x")}
    repository.commit("main", with_notes, "by hand")

    def again(*options: str) -> str:
        """What the command prints in the process of the client."""
        before = lfs_client.log.stat().st_size
        lfs_client("hub_upload.push:main", [checkpoint, "user/cli", *options])
        return lfs_client.log.read_bytes()[before:].decode()

    output = again()
    assert "holds exactly this already; no commit was made" in output
    assert "Kept on user/cli, where it is no part of the checkpoint: notes.txt. --delete_others deletes it" in output
    output = again("--delete_others", "--dry_run")
    assert "Would delete on user/cli: notes.txt" in output and "nothing was sent" in output
    assert lfs_hub.files("user/cli") == with_notes
    output = run(lfs_hub, tmp_path, ROOT / "hub_upload/push.py", checkpoint, "user/my--model", code=2)
    assert "error: 'user/my--model' names no repository" in output and "Traceback" not in output
    run(lfs_hub, tmp_path, "-m", "hub_upload.inspect", "user/cli", PYTHONPATH=str(ROOT))


LOADING = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
from transformers.utils.hub import HF_MODULES_CACHE, cached_file, extract_commit_hash


def load(name, revision):
    options = {"revision": revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, **options)
    model = AutoModel.from_pretrained(name, **options)
    messages = [
        {"role": "user", "content": [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What is it?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = pipeline("image-text-to-text", model=name, **options)(
        text=messages, generate_kwargs={"max_new_tokens": 5, "do_sample": False}, return_full_text=False
    )
    assert answers[0]["generated_text"] == text, (answers, text)
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    model.save_pretrained("resaved")
    processor.save_pretrained("resaved")
    return {"text": text, "total": total, "commit": commit}


given = [each.split("@") for each in sys.argv[2:]]
refused = None
if sys.argv[1] == "distrust":
    try:
        AutoModel.from_pretrained(given[0][0])
    except ValueError as error:
        refused = str(error)
    assert not list(Path(HF_MODULES_CACHE).rglob("modeling_alignvlm.py"))
print("RESULT", json.dumps([refused, *(load(*each) for each in given)]))
"""


def load(hub: LoopbackHub, folder: Path, begin: str, *named: str, **environment: str) -> list:
    """What a process without our packages finds in each `name@revision`, behind how it was refused, if it is to begin with "distrust"."""
    output = run(hub, folder, "-I", "-c", LOADING, begin, *named, **environment)
    return json.loads(re.search(r"RESULT (.*)", output)[1])


@pytest.mark.slow
def test_loading_from_the_hub(hub, client, checkpoint, tmp_path):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    staged = package(mine, tmp_path / "staged")
    first = client("hub_upload.push:send", staged, "user/loaded", tag="v1")
    change_weights(staged, by=1.0)
    second = client("hub_upload.push:send", staged, "user/loaded")
    Image.new("RGB", (20, 12), (200, 30, 60)).save(tmp_path / "picture.png")
    asked = len(hub.requests)
    first_commit = f"user/loaded@{first['commit']}"
    refused, old, new = load(hub, tmp_path, "distrust", first_commit, "user/loaded@main")
    assert "trust_remote_code=True" in refused
    assert new["total"] == pytest.approx(old["total"] + 1, abs=1e-4) and new["commit"] == second["commit"]
    assert not [r for r in hub.requests[asked:] if r["path"].startswith("/large") and r["token"]], "the token followed"
    # Saved again, it is still a repository of its own.
    config = json.loads((tmp_path / "resaved/config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_alignvlm.AlignVLMForConditionalGeneration"
    assert (tmp_path / "resaved/modeling_alignvlm.py").read_text() == (checkpoint / "modeling_alignvlm.py").read_text()
    _, again, cached = load(hub, tmp_path, "trust", "./resaved@main", first_commit, HF_HUB_OFFLINE="1")
    assert again["text"] == new["text"] and again["total"] == pytest.approx(new["total"])
    assert cached == old
    shutil.rmtree(tmp_path / "home")


def test_the_hf_command_downloads_what_was_pushed(hub, client, staged, tmp_path):
    client("hub_upload.push:send", staged, "user/downloaded")
    hf = Path(sys.executable).parent / "hf"
    environment = {**BASE, **hub.environment(tmp_path / "home")}
    command = [str(hf), "download", "user/downloaded", "--local-dir", str(tmp_path / "copy")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    for name in files_of(staged):
        assert (tmp_path / "copy" / name).read_bytes() == (staged / name).read_bytes()


@pytest.mark.slow
def test_training_goes_on_from_the_hub_and_pushes_each_stage(lfs_hub, lfs_client, checkpoint, staged, tmp_path):
    lfs_hub.faults.clear()

    def train(model, output: Path, **fields) -> str:
        """What a stage prints in the process of the client."""
        before = lfs_client.log.stat().st_size
        lfs_client("alignvlm.stages.stage:main", arguments_for(model, output, **fields))
        return lfs_client.log.read_bytes()[before:].decode()

    pushed = lfs_client("hub_upload.push:send", staged, "user/start")
    fields = {
        "model_revision": pushed["commit"],
        "projector_learning_rate": 1e-2,
        "max_steps": 1,
        "push_to": "user/trained",
    }
    for stage, model in ((3, "user/start"), (4, str(tmp_path / "3"))):
        fields = fields if stage == 3 else {**fields, "model_revision": None}
        output = train(model, tmp_path / str(stage), stage=stage, **fields)
        assert 'from_pretrained("user/trained", revision=' in output, output[-3000:]
    repository = lfs_hub.repositories["user/trained"]
    assert set(repository.tags) == {"stage3", "stage4"} and repository.tags["stage4"] == repository.refs["main"]
    assert not [name for name in lfs_hub.files("user/trained") if "optimizer" in name or "checkpoint" in name]
    record = read_run_record(tmp_path / "4")
    assert record["stages"][0]["model"] == "user/start" and record["stages"][0]["model_revision"] == pushed["commit"]
    # Trained again, it gets a tag of its own: the first names other weights.
    first, fields = repository.tags["stage3"], {**fields, "model_revision": None}
    output = train(checkpoint, tmp_path / "again", stage=3, seed=7, **fields)
    assert "Pushed, tag stage3-2." in output, output[-3000:]
    assert repository.tags["stage3"] == first and repository.tags["stage3-2"] == repository.refs["main"] != first
    # A Hub that is down costs no training, and the command that it then prints does what failed.
    repository.private = False
    lfs_hub.faults[:] = [{"method": "POST", "path": "/commit/", "status": 403, "times": 9}]
    output = train(checkpoint, tmp_path / "it is down", stage=3, **fields)
    assert "The push did not succeed: Your token may not write" in output
    assert read_run_record(tmp_path / "it is down")["stages"][-1]["steps"] == 1
    lfs_hub.faults.clear()
    (command,) = re.findall("Try again: (python .*)", output)
    _, script, *given = shlex.split(command)
    run(lfs_hub, tmp_path, ROOT / script, *given)
    assert repository.tags["stage3-3"] == repository.refs["main"] and not repository.private


@pytest.mark.slow
def test_serving_answers_the_openai_client_about_a_picture(lfs_hub, lfs_client, checkpoint, tmp_path):
    openai = pytest.importorskip("openai")
    lfs_hub.faults.clear()
    lfs_client("hub_upload.push:send", package(checkpoint, tmp_path / "staged"), "user/served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "demo/serve.py"), "user/served"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [*command, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"],
        cwd=tmp_path,
        env={**BASE, **lfs_hub.environment(tmp_path / "home")},
        stdout=log,
        stderr=log,
    )
    try:
        picture = io.BytesIO()
        Image.new("RGB", (20, 12), (200, 30, 60)).save(picture, "PNG")
        url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as asking:
            deadline = time.monotonic() + 120
            while True:
                try:
                    asking.models.list()
                    break
                except openai.APIConnectionError:
                    assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()[
                        -3000:
                    ]
                    time.sleep(0.2)
            answer = asking.chat.completions.create(
                model="user/served",
                max_tokens=6,
                temperature=0,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {"type": "text", "text": "What colour is it?"},
                        ],
                    }
                ],
            )
        text = answer.choices[0].message.content
    finally:
        server.terminate()
        server.wait(20)
        log.close()
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    picture.seek(0)
    expected = generate.answer(model, processor, [Image.open(picture)], [["What colour is it?"]], max_new_tokens=6)
    assert text.strip() == expected[0][0].strip(), (tmp_path / "serve.log").read_text()[-3000:]
