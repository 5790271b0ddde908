"""The demo as a Space: complete, checked, and pushed in one commit to a Hub on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hub_upload.package import files_of
from hub_upload.space import check_space, modules_of_the_app, package_space
from tests.hub_client import Client, ClientError
from tests.hub_upload.test_hub import put
from tests.loopback_hub import LoopbackHub


ROOT = Path(__file__).parents[2]
BASE = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


@pytest.fixture
def staged(tmp_path) -> Path:
    return package_space(tmp_path / "staged", ["user/model"])


def put_model(hub: LoopbackHub, name: str, kind: str) -> None:
    hub.create(name)
    put(hub, name, config__json=json.dumps({"model_type": kind}))


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_space_is_complete(staged):
    assert check_space(staged) == []
    files = files_of(staged)
    assert {"app.py", "README.md", "requirements.txt", "alignvlm/tools/demo.py"} <= set(files)
    assert not any("stages" in name or "test" in name for name in files), "more than the app imports"
    card = metadata((staged / "README.md").read_text())
    assert card["models"] == ["user/model"] and card["sdk"] == "gradio" and card["app_file"] == "app.py"
    ranges = (ROOT / "pyproject.toml").read_text()
    pinned = dict(line.split("==") for line in (staged / "requirements.txt").read_text().split())
    assert f'"gradio>={pinned["gradio"].split(".")[0]}.' in ranges


@pytest.mark.slow
def test_what_is_wrong_with_a_space_is_told(staged):
    module = modules_of_the_app()[-1]
    (staged / module).unlink()
    (problem,) = check_space(staged)
    assert "cannot be imported" in problem or "is not in it" in problem
    (staged / "app.py").write_text("TOKEN = 'hf_" + "a" * 34 + "'\n")
    (staged / "requirements.txt").write_text("gradio\n")
    problems = " ".join(check_space(staged))
    assert "app.py: looks like it holds a Hugging Face token" in problems
    assert "gradio is not pinned" in problems and "sdk_version" in problems


ASKING_THE_APP = """
import json, os, app
found = [app.checkpoints()]
os.environ["ALIGNVLM_MODEL"] = "a/b c/d"
found.append(app.checkpoints())
del os.environ["ALIGNVLM_MODEL"]
with open("README.md") as file:
    card = file.read()
with open("README.md", "w") as file:
    file.write(card.replace("- user/model", ""))
print("RESULT", json.dumps(found), flush=True)
app.checkpoints()
"""


@pytest.mark.slow
def test_the_app_takes_its_model_from_the_environment_or_the_card(staged):
    command, environment = [sys.executable, "-c", ASKING_THE_APP], {**BASE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=staged, env=environment, capture_output=True, text=True)
    assert "set ALIGNVLM_MODEL" in done.stderr and done.returncode
    assert json.loads(re.search("RESULT (.*)", done.stdout)[1]) == [["user/model"], ["a/b", "c/d"]]


@pytest.mark.slow
def test_a_space_is_pushed_in_one_commit_and_read_back(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        client = Client({**BASE, **hub.environment(tmp_path / "home")}, tmp_path)
        try:
            client("hub_client:quick")
            client("hub_client:check_spaces_once")
            push = "hub_upload.space:push_space"
            with pytest.raises(ClientError, match="has no model 'user/model' that this token may read"):
                client(push, "user/demo", ["user/model"])
            assert "spaces/user/demo" not in hub.repositories
            with pytest.raises(ClientError, match=r"'user/empty' is no checkpoint of AlignVLM: it has no config.json"):
                hub.create("user/empty")
                client(push, "user/demo", ["user/empty"])
            for name in ("user/model", "user/other"):
                put_model(hub, name, "alignvlm")
            put_model(hub, "user/llava", "llava")
            for models in (["user/llava"], ["user/model", "user/llava"]):
                said = "'user/llava' is no checkpoint of AlignVLM but a model of type 'llava'.*The demo shows checkpoints only"
                with pytest.raises(ClientError, match=said):
                    client(push, "user/demo", models)
            assert "spaces/user/demo" not in hub.repositories
            dry = client(push, "user/demo", ["user/model"], dry_run=True)
            assert dry["commit"] is None and "spaces/user/demo" not in hub.repositories
            pushed = client(push, "user/demo", ["user/model"])
            space = hub.repositories["spaces/user/demo"]
            assert pushed["commit"] == space.refs["main"] and pushed["private"] and space.private
            assert space.history() == ["Demo of user/model", "initial commit"]
            expected = package_space(tmp_path / "expected", ["user/model"])
            there = hub.files("spaces/user/demo")
            assert sorted(set(there) - {".gitattributes"}) == files_of(expected)
            assert all(hub.content(there[name]) == (expected / name).read_bytes() for name in files_of(expected))
            assert not client(push, "user/demo", ["user/model"])["changed"] and len(space.history()) == 2

            # What somebody wrote there stays; what an earlier push left behind goes; another model is shown.
            card = hub.content(there["README.md"]).decode().replace("title: AlignVLM", "title: Mine") + "\nBy me.\n"
            manifest = hub.content(there["manifest.sha256"]) + b"0  old_module.py\n"
            changed = {
                "README.md": card.encode(),
                "notes.txt": b"x",
                "old_module.py": b"",
                "manifest.sha256": manifest,
            }
            space.commit(
                "main", {**there, **{name: hub.store(content) for name, content in changed.items()}}, "by hand"
            )
            pushed = client(push, "user/demo", ["user/other", "user/model"])
            assert pushed["removed"] == ["old_module.py"] and pushed["kept"] == ["notes.txt"] and pushed["card"]
            card = hub.content(hub.files("spaces/user/demo")["README.md"]).decode()
            assert metadata(card)["title"] == "Mine" and metadata(card)["models"] == ["user/other", "user/model"]
            assert card.endswith("By me.\n")

            # Somebody pushes meanwhile: their commit stays.
            def theirs():
                files = {**hub.files("spaces/user/demo"), "README.md": hub.store(b"---\nsdk: gradio\n---\nTheirs\n")}
                space.commit("main", files, "theirs")

            hub.faults.append({"method": "POST", "path": "/commit/", "before": theirs})
            with pytest.raises(ClientError, match="Someone pushed"):
                client(push, "user/demo", ["user/model"])
            assert space.history()[0] == "theirs"

            hub.create("spaces/user/strange")
            files = {"app.py": hub.store(b"print()")}
            hub.repositories["spaces/user/strange"].commit("main", files, "an app")
            with pytest.raises(ClientError, match="was not pushed from here"):
                client(push, "user/strange", ["user/model"])
            with pytest.raises(ClientError, match="names no repository"):
                client(push, "user/demo", ["/tmp/model"])
        finally:
            client.close()


@pytest.mark.slow
def test_the_command_pushes_a_space(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = {**BASE, **hub.environment(tmp_path / "home")}
        command = [sys.executable, str(ROOT / "hub_upload/push.py"), "--space", "user/demo"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode and "--model" in done.stderr
        command += ["--model", "user/model", "--public"]
        put_model(hub, "user/model", "alignvlm")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"Public: {hub.url}/spaces/user/demo" in done.stdout
        assert json.dumps(hub.repositories["spaces/user/demo"].private) == "false"
