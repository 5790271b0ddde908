"""The version of the package stands in one place, and what is written by it says which it was."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from hub_upload.run_record import library_versions


ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_stands_in_one_place():
    """`pyproject.toml`; the changelog begins with it, and no other file of ours names it as the package's."""
    sources = [
        file for folder in ("alignvlm", "hub_upload", "modeling_alignvlm") for file in (ROOT / folder).rglob("*")
    ]
    sources += [ROOT / "README.md", ROOT / "model_card.md", ROOT / "mkdocs.yml", ROOT / "CONTRIBUTING.md"]
    named = [file for file in sources if file.suffix in (".py", ".md", ".yml") and VERSION in file.read_text()]
    assert not named
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.startswith(f"## [{VERSION}] - ")


def test_the_installed_package_has_this_version():
    assert importlib.metadata.version("alignvlm") == VERSION, "Run: pip install --editable . --no-deps"
    assert library_versions()["alignvlm"] == VERSION


def test_the_run_record_of_a_stage_and_its_card_name_the_version(checkpoint, tmp_path):
    from alignvlm.stages.stage import main as run_stage
    from tests.running import arguments_for

    run_stage(arguments_for(checkpoint, tmp_path / "stage1", stage=1, projector_learning_rate=1e-3, max_steps=1))
    record = json.loads((tmp_path / "stage1/alignvlm_run.json").read_text())
    assert record["stages"][-1]["versions"]["alignvlm"] == library_versions()["alignvlm"]
    card = (tmp_path / "stage1/README.md").read_text()
    assert f"AlignVLM {library_versions()['alignvlm']}" in card


def test_where_several_are_installed_the_one_that_is_imported_is_named(tmp_path):
    """Python imports the first that it finds on its path."""
    for folder, version in (("first", "7.0"), ("second", "8.0")):
        metadata = tmp_path / folder / f"alignvlm-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: alignvlm\nVersion: {version}\n")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "first")!r}, {str(tmp_path / "second")!r}]
from hub_upload.run_record import library_versions
print(library_versions()["alignvlm"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "7.0", done.stderr


def test_env_says_what_a_report_of_a_fault_needs(capsys):
    from alignvlm.tools.environment import main

    main([])
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["alignvlm"] == library_versions()["alignvlm"]
    assert found["torch"] == importlib.metadata.version("torch") and found["python"].startswith(sys.version.split()[0])
    assert found["precision"].split()[0] in ("fp32", "bf16", "fp16") and "cores" in found["processor"]
    with pytest.raises(SystemExit, match="no option --verbos"):
        main(["--verbos"])
