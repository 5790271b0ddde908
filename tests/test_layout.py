"""The layout of DESIGN: imports run one way, and what pip installs is complete and minds nobody's own folders."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from alignvlm import cli


ROOT = Path(__file__).parents[1]
GROUND = ("modeling_alignvlm", "hub_upload")
INSTALLED = ("alignvlm", *GROUND)
ORDER = (
    "data",
    "rows",
    "evaluation",
    "stages",
    "export",
    "tools",
    "quickstart",
    "cli",
)  # each may import those before it
LAUNCHED = ("training", "demo", "benchmarks", "tests", "docs")  # may import anything; nothing imports them


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for top in INSTALLED for file in sorted((ROOT / top).rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """All that a module imports anywhere in it, in full names; of our own always the module."""
    file = FILES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {each if each in FILES else module for each in names}
    return found


def of(imports: set[str], *tops: str) -> set[str]:
    return {each for each in imports if each.split(".")[0] in tops}


def opens_text(call: ast.AST) -> bool:
    """Tells whether a call opens, reads or writes a file as text in the encoding that the system prefers."""
    if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    function = call.func
    if isinstance(function, ast.Name):
        return function.id == "open" and "b" not in ast.unparse(call.args[1:])
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) in ("Image", "os", "tarfile"):
        return False
    return function.attr in ("read_text", "write_text") or (
        function.attr == "open" and "b" not in ast.unparse(call.args)
    )


def test_texts_are_read_and_written_as_utf8():
    files = [*FILES.values(), *(ROOT / "training").rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    assert [f"{file}:{node.lineno}" for file, node in nodes if opens_text(node)] == []


def test_what_travels_with_a_checkpoint_imports_only_its_neighbours_by_name():
    for name in (name for name in FILES if name.split(".")[0] == "modeling_alignvlm"):
        assert not of(imports_of(name), "alignvlm", "hub_upload", *LAUNCHED), name
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, ast.Import):
                assert not of({alias.name for alias in node.names}, "modeling_alignvlm"), name
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or (node.level == 1 and node.module and "." not in node.module), name
                assert (node.module or "").split(".")[0] != "modeling_alignvlm" or node.level == 1, name


def test_the_upload_imports_nothing_else_of_ours():
    for name in (name for name in FILES if name.split(".")[0] == "hub_upload"):
        assert not of(imports_of(name), "alignvlm", "modeling_alignvlm", *LAUNCHED), name


def test_the_library_imports_one_way():
    for name in (name for name in FILES if name.split(".")[0] == "alignvlm"):
        imports = imports_of(name)
        assert not of(imports, *LAUNCHED), name
        if name == "alignvlm":
            assert not of(imports, "alignvlm"), "alignvlm/__init__.py imports what it holds"
            continue
        own = name.split(".")[1]
        assert own in ORDER, f"{name} has no place in the order of imports: add {own} to it, here and in DESIGN"
        for each in of(imports, "alignvlm"):
            other = each.partition(".")[2].split(".")[0]
            if other:
                assert ORDER.index(other) <= ORDER.index(own), f"{name} imports {each}, which stands above it"


def test_no_modules_import_each_other_in_circles():
    graph = {name: {each for each in imports_of(name) if each in FILES and each != name} for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"These import each other in a circle: {' <- '.join(error.args[1])}")


def test_the_commands_are_modules_of_ours():
    assert {module for module, _ in cli.COMMANDS.values()} <= set(FILES)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """The folder into which pip has installed the distribution of a copy of the sources."""
    folder = tmp_path_factory.mktemp("distribution")
    copy, target = folder / "sources", folder / "target"
    copy.mkdir()
    for name in (*INSTALLED, "training", "demo"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(copy)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "__pycache__" not in file.parts}


def test_pip_installs_three_import_names(target):
    others = {"share", "bin"}
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} - others == set(INSTALLED)


def test_the_distribution_is_complete(target):
    """All modules, the metrics and their neighbours, the card's template, and what one launches."""
    for name in INSTALLED:
        assert contents(target / name, "**/*.py") == contents(ROOT / name, "**/*.py")
    page = ("*.html", "*.css", "*.js")
    assert contents(target / "alignvlm/tools/report", *page) == contents(ROOT / "alignvlm/tools/report", *page)
    tasks = "alignvlm/evaluation/lmms_tasks"
    assert contents(target / tasks, "*") == contents(ROOT / tasks, "*") and (target / tasks / "pathvqa.yaml").is_file()
    shared = ("model_card.md", "training/*.py", "training/*/*.yaml", "training/*/*/*.yaml")
    shared += ("demo/README.md", "demo/app.py", "demo/requirements.txt")
    expected = contents(ROOT, *shared)
    assert {"training/stage4.py", "training/recipes/nano/stage1.yaml", "training/accelerate/ddp.yaml"} <= set(expected)
    assert contents(target / "share/alignvlm", *shared) == expected, "see data-files in pyproject.toml"


IMPORT_ALL = """
import sys
import alignvlm.stages.stage, alignvlm.evaluation.evaluate_model, alignvlm.evaluation.judge
import modeling_alignvlm, hub_upload.card
from alignvlm.quickstart import quickstart

ours = ("alignvlm", "modeling_alignvlm", "hub_upload")
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ours and getattr(module, "__file__", None):
        print(module.__file__)
print(quickstart.TRAINING / "stage1.py")
print(quickstart.QuickstartArguments().recipe + "/stage1.yaml")
print(hub_upload.card.template_path())
for metric in ("cider", "pathvqa_accuracy"):
    print(alignvlm.evaluation.judge.METRICS / metric / f"{metric}.py")
"""


@pytest.mark.slow
def test_it_works_in_a_folder_with_packages_of_the_same_names(target, tmp_path):
    for name in ("training", "evaluation", "data", "rows", "stages", "tools", "demo", "quickstart"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the user\\'s own {name}')\n")
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    given = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", "alignvlm.cli", "--help"], **given)
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], **given)
    assert done.returncode == 0, done.stderr
    found = [Path(line) for line in done.stdout.splitlines()]
    assert len(found) > 20 and all(file.is_file() and file.is_relative_to(target) for file in found), found
    # `-c` puts the working directory into the path, so that a name of theirs would have been found first.
    assert subprocess.run([sys.executable, "-c", "import data"], **given).returncode == 1
