"""Every rule of the checks, broken once; and the rules for code, construct by construct."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_upload.checks import check, main
from hub_upload.code_rules import read_code
from hub_upload.inspect import describe, inspect
from hub_upload.inspect import main as inspect_main
from hub_upload.package import MANIFEST, files_of, package, sha256_of


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packaged(checkpoint, tmp_path_factory) -> Path:
    return package(checkpoint, tmp_path_factory.mktemp("packaged") / "out")


@pytest.fixture
def folder(packaged, tmp_path) -> Path:
    return shutil.copytree(packaged, tmp_path / "folder")


def renew_manifest(folder: Path) -> None:
    """As if it had been packaged like this."""
    names = [name for name in files_of(folder) if name != MANIFEST]
    (folder / MANIFEST).write_text("".join(f"{sha256_of([folder / name])}  {name}\n" for name in names))


def append(name: str, text: str):
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


def edit_json(name: str, **fields):
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, **fields}))

    return change


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def auto_map(**targets):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_json("config.json", auto_map={**config["auto_map"], **targets})(folder)

    return change


def replace_in_card(old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new))

    return change


RESULT = """\
model-index:
- name: x
  results:
  - task: {type: image-to-text}
    dataset: {type: coco, name: coco}
    metrics: [{type: cider, value: 1.234}]
license: apache-2.0"""


@pytest.mark.parametrize(
    "change, problem",
    [
        (append("README.md", "hf_" + "a" * 34), "README.md: looks like it holds a Hugging Face token"),
        (append("chat_template.jinja", "AKIA" + "A" * 16), "chat_template.jinja: looks like it holds an AWS key"),
        (append("README.md", "https://me:secret@host/x"), "holds a password in an address"),
        (append("README.md", "-----BEGIN RSA PRIVATE KEY-----"), "holds a private key"),
        (edit_json("config.json", _name="/home/me/model"), "config.json: holds the local path '/home/me/model'"),
        (append("alignvlm_run.json", " /tmp/run/1"), "alignvlm_run.json: holds the local path"),
        (lambda f: (f / ".env").write_text("A=1"), ".env: not on the list"),
        (lambda f: (f / "training_args.bin").write_bytes(b"\x80\x05"), "training_args.bin: not on the list"),
        (lambda f: (f / "vocab.json").write_bytes(b"\x80\x05x"), "vocab.json: a pickle"),
        (lambda f: (f / "merges.txt").symlink_to("/etc/hosts"), "merges.txt: a link"),
        (truncate, "model.safetensors: "),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (
            auto_map(AutoModel="modeling_other.X"),
            "auto_map sends AutoModel to modeling_other.X, which is not in the folder",
        ),
        (auto_map(AutoModel="modeling_alignvlm.Nothing"), "modeling_alignvlm.Nothing, which is not in the folder"),
        (auto_map(AutoModel="user/repo--modeling_alignvlm.X"), "to another repository"),
        (edit_json("config.json", auto_map={}), "auto_map lacks AutoConfig"),
        (append("masking_alignvlm.py", "\nimport requests\n"), "masking_alignvlm.py: line"),
        (append("masking_alignvlm.py", "\nprint(1)\n"), "'print(1)' runs at import"),
        (replace_in_card("license: apache-2.0", "licence: apache-2.0"), "its metadata lack license"),
        (
            replace_in_card("license: apache-2.0", "base_model: a/b\nlicense: apache-2.0"),
            "without base_model_relation",
        ),
        (
            replace_in_card("license: apache-2.0", "license: other\nlicense_link: x"),
            "license other without license_name",
        ),
        (replace_in_card("license: apache-2.0", "license: [1"), "README.md: "),
        (replace_in_card("license: apache-2.0", RESULT), "cider = 1.234 is not in alignvlm_run.json"),
    ],
)
def test_what_must_not_be_pushed_is_found(folder, change, problem):
    change(folder)
    renew_manifest(folder)
    problems = check(folder, load=False)
    assert any(problem in found for found in problems), problems


def test_what_changed_since_it_was_packaged_is_found(folder):
    append("README.md", "more")(folder)
    (folder / "LICENSE").unlink()
    shutil.copy(folder / "config.json", folder / "preprocessor_config.json")
    problems = check(folder, load=False)
    assert "README.md: changed since it was packaged" in problems
    assert "LICENSE: in manifest.sha256, but not in the folder" in problems
    assert "preprocessor_config.json: not in manifest.sha256" in problems
    (folder / MANIFEST).unlink()
    assert any("manifest.sha256: missing" in problem for problem in check(folder, load=False))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "projector" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_code(folder: Path) -> None:
    path = folder / "modeling_alignvlm.py"
    path.write_text(path.read_text().replace("def forward(", "def backward("))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, problem",
    [
        (drop_a_weight, "weights do not match the configuration: missing_keys"),
        (not_a_number, "some weights are not finite"),
        (break_code, "does not load by the Auto classes in a fresh process"),
    ],
)
def test_what_only_loading_shows_is_found(folder, change, problem):
    change(folder)
    renew_manifest(folder)
    assert any(problem in found for found in check(folder))


def test_code_that_breaks_the_rules_is_not_run(folder, tmp_path):
    append("masking_alignvlm.py", f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")(folder)
    renew_manifest(folder)
    assert check(folder)
    assert not (tmp_path / "ran").exists()


def test_the_command_line(packaged, folder, capsys):
    main([str(packaged)])
    assert "all checks passed" in capsys.readouterr().out
    append("README.md", "x")(folder)
    with pytest.raises(SystemExit, match=r"must not be pushed:\n  README.md: changed"):
        main([str(folder)])


@pytest.mark.parametrize("name", ["configuration", "masking", "modeling", "processing"])
def test_our_own_code_keeps_the_rules(name):
    folder = ROOT / "modeling_alignvlm"
    found = read_code(folder / f"{name}_alignvlm.py", {path.name for path in folder.glob("*.py")})
    assert found.problems == [] and found.imports


@pytest.mark.parametrize(
    "code, problem",
    [
        ("import requests", "imports requests"),
        ("import subprocess", "imports subprocess"),
        ("def f():\n    import socket", "imports socket"),
        ("from urllib.request import urlopen", "imports urllib.request"),
        ("import torch.hub", "imports torch.hub"),
        ("from transformers.utils import cached_file", "imports transformers.utils.cached_file"),
        ("from os import system", "imports os.system"),
        ("from os import getcwd", "imports os.getcwd; of os only"),
        ("import os\ndef f():\n    os.system('x')", "uses os.system"),
        ("import os\ndef f():\n    os.execvp('x', [])", "uses os.execvp"),
        ("import os as o\ndef f():\n    return o.getenv('HF_TOKEN')", "uses os.getenv"),
        ("import os\nX = os.environ", "uses os.environ"),
        ("def f(x):\n    return eval(x)", "uses eval"),
        ("def f(x):\n    g = exec", "uses exec"),
        ("def f():\n    return open('x')", "uses open"),
        ("def f():\n    return __import__('os')", "uses __import__"),
        ("def f(x):\n    return x.__globals__", "where .__globals__"),
        ("def f(x):\n    return getattr(x, '__globals__')", "where .__globals__"),
        ("def f(x, y):\n    return getattr(x, y)", "getattr of a name that is computed"),
        ("import torch\ndef f():\n    return torch.load('x')", "uses torch.load, which reads"),
        ("import torch as t\ndef f():\n    return t.load('x')", "uses torch.load, which reads"),
        ("from torch import load", "imports torch.load, which reads"),
        ("from numpy import load as l", "imports numpy.load, which reads"),
        ("import torch\ndef f():\n    torch.jit.load('x')", "uses torch.jit.load"),
        ("import torch\ndef f():\n    torch.save(1, 'x')", "uses torch.save"),
        ("import torch\ndef f():\n    torch.hub.load('x', 'y')", "where .hub"),
        ("import torch\ndef f():\n    torch.ops.load_library('x')", "where .load_library"),
        ("from transformers import AutoModel\ndef f():\n    AutoModel.from_pretrained('x')", "where .from_pretrained"),
        ("def f(g):\n    g(trust_remote_code=True)", "passes trust_remote_code"),
        ("def f(model):\n    model.push_to_hub('x')", "where .push_to_hub"),
        ("def f(x=print(1)):\n    pass", "runs at import"),
        ("def g(f):\n    return f\n@g\ndef f():\n    pass", "'@g' runs at import"),
        ("def g():\n    return f\n@g()\ndef f():\n    pass", "'g()' runs at import"),
        ("@print\ndef f():\n    pass", "'@print' runs at import"),
        ("def g():\n    return object\nclass A(g()):\n    pass", "'g()' runs at import"),
        ("print(1)", "runs at import"),
        ("X = print(1)", "runs at import"),
        ("for i in range(3):\n    pass", "runs at import"),
        ("if True:\n    X = 1", "runs at import"),
        ("class A:\n    print(1)", "runs at import"),
        ("class A:\n    x = print(1)", "runs at import"),
        ("from ..other import x", "cannot follow"),
        ("from . import masking", "cannot follow"),
        ("from .sub.module import x", "cannot follow"),
        ("from .missing import x", ".missing is not in the folder"),
        ("from modeling_alignvlm import x", "imports modeling_alignvlm"),
        ("def f(:", "cannot be read as Python"),
    ],
)
def test_forbidden_code(tmp_path, code, problem):
    (tmp_path / "modeling_x.py").write_text(code)
    problems = read_code(tmp_path / "modeling_x.py", {"modeling_x.py", "masking.py"}).problems
    assert any(problem in found for found in problems), problems


TABLE = "from dataclasses import dataclass, field\n@dataclass(frozen=True)\nclass Row:\n    x: object = 1\n"


@pytest.mark.parametrize(
    "code",
    [
        TABLE + "    def __post_init__(self):\n        print(1)\nROWS = {'a': Row(2)}",
        TABLE + "    @property\n    def x(self):\n        return 1\nROWS = {'a': Row(2)}",
        TABLE.replace("= 1", "= field(default_factory=print)") + "ROWS = {'a': Row()}",
        TABLE.replace("class Row", "class Row(Exception)") + "ROWS = {'a': Row(2)}",
        TABLE.replace("@", "dataclass = str\n@") + "ROWS = {'a': Row(2)}",
        TABLE.replace("from dataclasses", "from .modeling_x") + "ROWS = {'a': Row(2)}",
        TABLE + "def f(*_):\n    pass\nRow.__init__ = f\nROWS = {'a': Row(2)}",
        TABLE + "def f(*_):\n    pass\nAlias = Row\nAlias.__init__ = f\nROWS = {'a': Row(2)}",
        TABLE + "def f(*_):\n    pass\nRow = f\nROWS = {'a': Row(2)}",
        TABLE + "ROWS = {'a': Row(print(1))}",
    ],
)
def test_a_table_of_more_than_values_runs_at_import(tmp_path, code):
    (tmp_path / "modeling_x.py").write_text(code)
    problems = read_code(tmp_path / "modeling_x.py", {"modeling_x.py"}).problems
    assert any("runs at import" in found for found in problems), problems


def test_a_table_of_values_is_left_alone(tmp_path):
    (tmp_path / "a.py").write_text(
        TABLE
        + '    """Text."""\n    def double(self):\n        return 2 * self.x\nROWS = {"a": Row(2), "b": Row(x=max)}\n'
    )
    assert read_code(tmp_path / "a.py", {"a.py"}).problems == []


def test_ordinary_code_is_left_alone(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""Text."""\nfrom __future__ import annotations\nimport os\nfrom dataclasses import dataclass, field\nimport torch\n'
        "from transformers.utils import logging\nfrom .b import x\nlogger = logging.get_logger(__name__)\nNAMES = frozenset(('a',))\n"
        "@dataclass\nclass A:\n    x: list = field(default_factory=list)\n    def load(self, path: os.PathLike):\n        return path\n"
        "@torch.no_grad()\ndef f(model):\n    model.eval()\n    return model.load_state_dict({})\n__all__ = ['A']\n"
    )
    (tmp_path / "b.py").write_text("x = 1\n")
    assert read_code(tmp_path / "a.py", {"a.py", "b.py"}).problems == []


def test_inspecting_a_folder_without_running_it(packaged, folder, tmp_path):
    found = inspect(str(packaged))
    assert not found.is_suspicious and len(found.files) == 4 and len(found.auto_map) >= 4
    text = describe(str(packaged), found)
    assert sha256_of([packaged / "modeling_alignvlm.py"]) in text and "nothing beyond what model code needs" in text
    append("masking_alignvlm.py", f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")(folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("import socket\n")
    (folder / "extra.pkl").write_bytes(b"")
    auto_map(AutoTokenizer=["evil/repo--tok.T", None])(folder)
    edit_json("config.json", custom_pipelines={"task": {"impl": "evil/pipe--pipe.P"}})(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    (folder / "tokenizer_config.json").write_text('{"auto_map": ["tok.T", null]}')
    text = describe("x", inspect(str(folder)))
    for expected in (
        "another repository, evil/pipe",
        "load evil/base, and its code",
        "AutoTokenizer names tok.py, which is not there",
        "uses open",
        "runs whenever `generate`",
        "extra.pkl may hold a pickle",
        "another repository, evil/repo",
    ):
        assert expected in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["out/quickstart/stage9", "out/stage9"])
def test_a_folder_to_inspect_that_is_not_there_is_told(name, monkeypatch):
    """The second could be a repository, and the Hub cannot be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=rf"^error: No such folder: '{name}' \(looked for in "):
        inspect_main([name])


def test_a_folder_has_no_revision_to_inspect(tmp_path):
    with pytest.raises(SystemExit, match="The revision 'v1' would be of a repository, but this is a folder here"):
        inspect_main([str(tmp_path), "--revision", "v1"])
