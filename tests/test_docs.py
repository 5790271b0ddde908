"""The pages under docs/ and the README: their links lead somewhere, and what is written by a script is as the script writes it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_page_of_the_tree_names_every_file():
    spec = importlib.util.spec_from_file_location("write_tree_page", ROOT / "docs/write_tree_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert (ROOT / "docs/tree.md").read_text() == page, "Run docs/write_tree_page.py"
    files = [
        file
        for folder in ("modeling_alignvlm", "hub_upload", "alignvlm", "training")
        for file in (ROOT / folder).rglob("*.py")
    ]
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        if file.name != "__init__.py" and "/metrics/" not in path:
            assert f"(../{path})" in page
            assert module.purpose(file), f"{path} has no docstring"


class CopyOfSources:
    """A copy of the sources in a folder, to which a section of docs/extend.md is done as it says."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("modeling_alignvlm", "alignvlm", "hub_upload", "benchmarks", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "model_card.md"):
            shutil.copy(ROOT / name, folder)

    def replace(self, file: str, old: str, new: str) -> None:
        content = (self.folder / file).read_text()
        assert content.count(old) == 1, f"{file} has {old!r} {content.count(old)} times"
        (self.folder / file).write_text(content.replace(old, new))

    def insert(self, file: str, behind: str, text: str) -> None:
        self.replace(file, behind, behind + text)

    def write(self, file: str, text: str) -> None:
        (self.folder / file).parent.mkdir(exist_ok=True)
        (self.folder / file).write_text(text)

    def run(self, *words: str) -> str:
        """What `python words` prints in the copy."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def pytest(self, line: str, *options: str) -> str:
        """What a command line of the page prints, `pytest ...`."""
        return self.run("-m", *shlex.split(line), *options)

    def alignvlm(self, line: str, before: str = "", after: str = "") -> str:
        """What a command line of the page prints, `alignvlm ...`, between other code in the same process, which imports libraries once."""
        name, *words = shlex.split(line)
        assert name == "alignvlm"
        return self.run("-c", f"{before}\nfrom alignvlm import cli\n\ncli.main({words})\n{after}")


def section_of_extending(title: str) -> dict[str, list[str]]:
    """The code of a section of docs/extend.md by language; `page`: all of it."""
    sections = (ROOT / "docs/extend.md").read_text().split("\n## ")[1:]
    (text,) = (text for text in sections if text.startswith(f"{title}\n"))
    found: dict[str, list[str]] = {"page": [text]}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL):
        found.setdefault(language, []).append(code)
    return found


@pytest.mark.slow
def test_the_mask_type_of_the_page_on_extending_works(tmp_path):
    """Puts the page's code where the page says, in a copy of the sources, and runs the tests there that the page names."""
    code = section_of_extending("A mask type")
    (rule, row, definition), (command,) = code["python"], code["bash"]
    sources = CopyOfSources(tmp_path)
    masking = "modeling_alignvlm/masking_alignvlm.py"
    last_rule = "    return same_image(layout, b, q, k) | ((layout.image_ids[b, q] >= 0) & layout.prompt_mask[b, k])\n"
    sources.insert(masking, last_rule, f"\n\n{rule}")
    sources.insert(masking, "MASK_TYPES = {\n", row)
    sources.insert("tests/modeling_alignvlm/test_masking.py", "LOOKS_AHEAD = {\n", definition)
    # Kernels are compiled for a minute; the other tests compare with the same dense mask.
    slow = "tests/modeling_alignvlm/test_modeling.py::test_attention_kernels_agree_and_apply_the_dense_mask"
    printed = sources.pytest(command, "--verbose", "--verbose", "--deselect", slow)
    for name in (
        "test_mask_equals_the_written_definition",
        "test_a_packed_row_gives_loss_and_gradients",
        "test_answers_are_those",
    ):
        assert name in printed


def add_the_data_set(sources: CopyOfSources, checkpoint: Path) -> dict[str, list[str]]:
    """Does what the page's section on a data set says, and puts its row, an image and a checkpoint where its examples look for them."""
    code = section_of_extending("A data set")
    function, row, fixture, line, _ = code["python"]
    sources.insert("alignvlm/data/formats.py", "\n\n# One function per row schema.\n", f"\n\n{function}")
    sources.insert("alignvlm/data/catalogue.py", "CATALOGUE: dict[str, DataSet] = {\n", row)
    tests = "tests/data/test_sources.py"
    sources.insert(tests, '    return {"data": parquet(folder, "trl.parquet", rows, **features)}\n', f"\n\n{fixture}")
    sources.insert(tests, "FIXTURES = {\n", line)
    (json_line,) = code["json"]
    sources.write("counts.jsonl", json_line)
    Image.new("RGB", (20, 12), "red").save(sources.folder / json.loads(json_line)["image"])
    shutil.copytree(checkpoint, sources.folder / "out/stage3")
    return code


@pytest.mark.slow
def test_the_data_set_of_the_page_on_extending_works(tmp_path, checkpoint):
    """Its tests pass, a batch of it trains, a row that an option leaves out is left out, and it can be asked."""
    sources = CopyOfSources(tmp_path)
    code = add_the_data_set(sources, checkpoint)
    tests, evaluation = code["bash"]
    printed = sources.pytest(tests, "--verbose", "--verbose")
    for streaming in ("indexed", "streaming"):
        assert f"becomes_records[cell_counts-{streaming}] PASSED" in printed
    assert "test_every_data_set_of_the_catalogue_is_tested PASSED" in printed
    left_out = """
import pytest
with pytest.raises(ValueError, match="The options given leave out all 1 rows of counts.jsonl"):
    read_source({"name": "cell_counts", "data": "counts.jsonl", "highest": 2})
"""
    batch = f"{code['python'][-1]}{left_out}print('RESULT')"
    conversations, loss = sources.alignvlm(evaluation, before=batch).split("RESULT")[0].rsplit(maxsplit=1)
    assert "'How many cells are there?'" in conversations and "'responses': ['3']" in conversations
    assert 0 < float(loss) < 100
    result = json.loads((tmp_path / "out/stage3/results/cell_counts.json").read_text())
    (prediction,) = result["predictions"]
    assert (prediction["prompt"], prediction["references"]) == ("How many cells are there?", ["3"])
    assert result["metrics"]["pathvqa_accuracy"]["count"] == 1 and result["data"]["licence"] == "CC0 1.0"


@pytest.mark.slow
def test_the_metric_of_the_page_on_extending_works(tmp_path, checkpoint):
    """Its tests pass, an evaluation of the data set writes its numbers, and the model card shows them."""
    sources = CopyOfSources(tmp_path)
    _, evaluation = add_the_data_set(sources, checkpoint)["bash"]
    code = section_of_extending("A metric")
    (metric, test), (tests,) = code["python"], code["bash"]
    sources.write("alignvlm/evaluation/metrics/off_by_one/off_by_one.py", metric)
    ((named, before),) = re.findall(r"`(metric=\S+)` in place of `(metric=\S+)`", code["page"][0])
    row = (
        (sources.folder / "alignvlm/data/catalogue.py")
        .read_text()
        .split('"cell_counts": ')[1]
        .split('"llava_pretrain"')[0]
    )
    assert row.count(before) == 1
    sources.replace("alignvlm/data/catalogue.py", row, row.replace(before, named))
    sources.write("tests/evaluation/test_off_by_one.py", test)
    assert "test_counts_may_be_wrong_by_one PASSED" in sources.pytest(tests, "--verbose", "--verbose")
    packaged = 'from hub_upload import package\n\npackage.main(["out/stage3", "out/clean"])'
    sources.alignvlm(evaluation, after=packaged)
    result = json.loads((tmp_path / "out/stage3/results/cell_counts.json").read_text())
    numbers = result["metrics"]["off_by_one"]
    assert numbers["off_by_one"] in (0, 1) and numbers["intervals"]["off_by_one"] == [numbers["off_by_one"]] * 2
    assert set(numbers["by_prompt"]) == {"How many cells are there?"}
    assert set(result["predictions"][0]["scores"]) == {"number", "near"}
    (headline,) = yaml.safe_load((tmp_path / "out/clean/README.md").read_text().split("---")[1])["model-index"]
    assert headline["results"][0]["metrics"][0]["type"] == "off_by_one"


@pytest.mark.slow
def test_the_stage_option_of_the_page_on_extending_works(tmp_path):
    """Its test, which runs a stage of two steps, passes, and so do those of the other options beside it."""
    code = section_of_extending("A stage option")
    (field, check, option, named, test), (tests,) = code["python"], code["bash"]
    sources = CopyOfSources(tmp_path)
    arguments, weights = "alignvlm/stages/arguments.py", "alignvlm/stages/weights.py"
    sources.replace(arguments, "    lora_r: int = field(\n", f"{field}    lora_r: int = field(\n")
    sources.insert(arguments, '        _read_json(self, "lora_target_modules", like=["q_proj", "v_proj"])\n', check)
    held = "# How the model holds its weights in training"
    sources.replace(weights, held, f"{option}\n\n{held}")
    sources.replace(weights, "WRITTEN = (KeepLanguage, Average)\n", named)
    sources.write("tests/stages/test_start_share.py", test)
    printed = sources.pytest(tests, "--verbose", "--verbose")
    assert "test_the_start_keeps_its_share PASSED" in printed
    assert "test_only_what_is_asked_for_is_an_option_and_needs_complete_weights PASSED" in printed
