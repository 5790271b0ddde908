"""Every code block of the README and of docs/ does what it says: it is run, as written, in a folder as the quickstart leaves it.

A page's blocks are run in their order, in a folder of its own: `bash` by bash, `python` by Python, `yaml` is parsed as a stage's
arguments, `json` as JSON. `text` is what something prints. A block that cannot be run here has a comment before it that says why; its
commands still have to pass their argument parsers.
"""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.formats import options_of
from alignvlm.data.scenes import make_scenes
from alignvlm.data.sources import COMMON
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.reward_arguments import parse_any_stage
from tests.docs.code_blocks import COMMANDS, Block, blocks_of
from tests.docs.command_server import CLIENT
from tests.running import arguments_for


ROOT = Path(__file__).resolve().parents[2]
OWN_TESTS = ("extend.md",)  # tests/test_docs.py does what each section says to a copy of the sources
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# How many blocks of each page are marked as not run.
NOT_RUN = {
    "README.md": 2,
    "alignment.md": 2,
    "demo.md": 3,
    "evaluation.md": 7,
    "example_card.md": 3,
    "export.md": 8,
    "hub.md": 3,
    "image_tokens.md": 1,
    "native_shapes.md": 2,
    "performance.md": 2,
    "recaption.md": 3,
    "recipe.md": 5,
    "results.md": 2,
    "reward.md": 1,
    "see.md": 1,
    "tiles.md": 2,
    "train.md": 4,
}
LINKED = ("alignvlm", "benchmarks", "demo", "hub_upload", "modeling_alignvlm", "training")
CAUSAL = ("export.md",)  # pages whose checkpoint has the mask type that most other programs take
# `make` says what it would do, and does nothing.
RUN = """
set -e
make() {{ {make} --dry-run --directory {root} "$@" > /dev/null; }}
"""
PARSE = """
PATH={commands}
bash() {{ {bash} "$@"; }}
head() {{ read -r line; echo "$line"; }}
scontrol() {{ echo node1; }} # of SLURM, on the second of two nodes
srun() {{ while [[ $1 == -* ]]; do shift; done; "$@"; }}
export SLURM_JOB_ID=12345 SLURM_JOB_NODELIST=node[1-2] SLURM_NNODES=2 SLURM_NODEID=1
command_not_found_handle() {{ return 0; }} # somebody else's program
"""


class Shell:
    """Runs code in folders, by the command server."""

    def __init__(self, commands: Path):
        self.commands = commands
        self.environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}

    def run(self, code: str, folder: Path, parse_only: bool = False) -> str:
        """What bash prints for the code; with `parse_only`, commands of the package end behind their argument parsers."""
        known = {"bash": shutil.which("bash"), "make": shutil.which("make"), "root": ROOT, "commands": self.commands}
        setup = (RUN + (PARSE if parse_only else "")).format(**known)
        with subprocess.Popen(
            ["bash", "-c", setup + code],
            cwd=folder,
            env={**self.environment, **({"ALIGNVLM_PARSE_ONLY": "1"} if parse_only else {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as bash:
            try:
                printed, _ = bash.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                os.killpg(bash.pid, signal.SIGKILL)
                raise
        assert bash.returncode == 0, f"{code}\nends with status {bash.returncode}:\n{printed[-4000:]}"
        return printed


@pytest.fixture(scope="module")
def shell():
    """A shell with the commands `alignvlm`, `accelerate`, `pip` and `python`."""
    with tempfile.TemporaryDirectory(prefix="alignvlm") as name:  # a socket's address must be short
        commands, address = Path(name) / "bin", str(Path(name) / "socket")
        commands.mkdir()
        for command in ("accelerate", "alignvlm", "pip", "python"):
            (commands / command).write_text(CLIENT.format(python=sys.executable, address=address))
            (commands / command).chmod(0o755)
        home = {"HF_HOME": str(Path(name) / "huggingface"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **home, **threads}
        server = Path(__file__).with_name("command_server.py")
        process = subprocess.Popen([sys.executable, str(server), address], env=environment, start_new_session=True)
        try:
            for _ in range(1200):
                if Path(address).exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            assert process.poll() is None and Path(address).exists(), "the command server did not start"
            shell = Shell(commands)
            shell.environment |= home | threads
            yield shell
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def after_the_quickstart(shell, make_model, processor, tmp_path_factory):
    """A function that returns a folder like the one where somebody has run the quickstart, small, for a mask type."""
    made = {}

    def make(mask_type: str) -> Path:
        if mask_type in made:
            return made[mask_type]
        folder = made[mask_type] = tmp_path_factory.mktemp(mask_type)
        run = folder / "out/quickstart"
        (run / "scenes").mkdir(parents=True)
        free = {"license": "apache-2.0"}
        backbones = {"vision": "tiny", "vision_licence": free, "language": "tiny", "language_licence": free}
        layer = {"vision_feature_layer": -2} if mask_type == "causal" else {}
        save_checkpoint(
            make_model(mask_type, **layer), processor, run / "stage0", {"backbones": backbones, "stages": []}
        )
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        rates = {"projector_learning_rate": 1e-3}
        small = [{"name": "scenes", "annotations": ["short_caption", "questions"], "count": 8}]
        for stage in (1, 2, 3, 4):
            fields = {**rates, "stage": stage, "sources": small, "max_steps": 1, "attention_mask_type": mask_type}
            words = arguments_for(f"out/quickstart/stage{stage - 1}", f"out/quickstart/stage{stage}", **fields)
            shell.run(subprocess.list2cmdline(["python", f"training/stage{stage}.py", *words]), folder)
            (folder / f"out/stage{stage}").symlink_to(f"quickstart/stage{stage}")
        scenes = make_scenes(6, "test", seed=0)
        scenes.to_parquet(run / "scenes/test.parquet")
        scenes[0]["images"][0].save(run / "picture.png")
        (folder / "photos").mkdir()
        for number, record in enumerate(scenes):
            record["images"][0].convert("RGB").save(folder / f"photos/{number}.jpg")
        Image.new("RGB", (40, 30), "red").save(folder / "photo.jpg")
        return folder

    return make


def parse_recipe(code: str, folder: Path) -> None:
    """Reads YAML as a stage does; a list or a part of a recipe gets the fields it lacks. Each source knows all of its options."""
    given = yaml.safe_load(code)
    needed = {"stage": 3, "model": "out/stage0", "output_dir": "out/next", "projector_learning_rate": 1e-3}
    sources = [{"name": "scenes"}]
    recipe = folder / "block.yaml"
    recipe.write_text(yaml.safe_dump({**needed, "sources": sources, "report_to": "none", **given}))
    (arguments,) = parse_any_stage(["--config", str(recipe)])
    for source in arguments.sources:
        options = dict(source)
        kind = CATALOGUE.get(options.pop("name", "local"))
        if source.get("name") == "rehearsal":
            continue
        assert kind, f"There is no source {source['name']!r}."
        own = inspect.signature(kind.generate).parameters if kind.generate else [*COMMON, *options_of(kind.read)]
        unknown = set(options) - {"share", "tag", *own}
        assert not unknown, f"{source} has options that nobody knows: {unknown}"


def do(block: Block, shell: Shell, folder: Path) -> None:
    """Does what a block says, or checks what can be checked without doing it."""
    if block.file:
        file = folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.code if file.suffix != ".jsonl" else block.code.split("\n", 1)[1])
    if block.language == "bash":
        shell.run(block.code, folder, parse_only=block.reason is not None)
    elif block.language == "python":
        compile(block.code, block.place, "exec")
        if block.reason is None:
            (folder / "block.py").write_text(block.code)
            shell.run("python block.py", folder)
    elif block.language == "yaml":
        if block.reason is None:
            parse_recipe(block.code, folder)
    elif block.language == "json":
        for line in block.code.splitlines():
            if not line.startswith("#"):
                json.loads(line)
    elif block.language == "text":
        hidden = [line for line in block.code.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
        assert not hidden or block.reason, f"These commands are to be `bash`: {hidden}"
    else:
        assert block.reason, f"Nobody knows how to run {block.language!r}: say before the block why it is not run."


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OWN_TESTS], ids=lambda page: page.name)
def test_the_code_of_a_page_does_what_it_says(page, shell, after_the_quickstart, tmp_path):
    blocks = blocks_of(page)
    if not blocks:
        pytest.skip("no code")
    folder = tmp_path / "here"
    shutil.copytree(after_the_quickstart("causal" if page.name in CAUSAL else "image"), folder, symlinks=True)
    for block in blocks:
        try:
            do(block, shell, folder)
        except BaseException as error:
            raise AssertionError(f"{block.place}: {error}") from error


@pytest.mark.parametrize(
    ("language", "code", "reason", "said"),
    [
        ("bash", "alignvlm ask out/quickstart/stage4 --imgae photo.jpg", None, "Did you mean --image"),
        ("bash", "alignvlm ask out/quickstart/stage4 missing.jpg", None, "missing.jpg"),
        ("bash", "alignvlm push out/stage4 user/name --licence mit", "the Hub", "Did you mean --license"),
        ("bash", "accelerate launch --num_proceses 2 training/stage1.py", "GPUs", "--num_proceses"),
        ("bash", "python training/stage1.py --config missing.yaml", "GPUs", "missing.yaml"),
        ("bash", "python demo/serve.py out/stage4 --prot 80", "a server", "--prot"),
        ("bash", "pip install 'alignvlm[exports]'", "the network", "no extra"),
        ("bash", "make quikstart", None, "quikstart"),
        ("bash", "somebodys-program --option", None, "command not found"),
        ("python", "print(undefined)", None, "NameError"),
        ("python", "print(", "the Hub", "never closed"),
        ("yaml", "projektor_learning_rate: 1.0", None, "Did you mean projector_learning_rate"),
        ("yaml", "sources: [{name: scenes, limitt: 3}]", None, "nobody knows"),
        ("json", "{'image': 1}", None, "double quotes"),
        ("text", "alignvlm ask out/stage4", None, "are to be `bash`"),
        ("ruby", "puts 1", None, "Nobody knows how to run"),
    ],
)
def test_what_is_wrong_in_a_block_is_noticed(language, code, reason, said, shell, after_the_quickstart, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(after_the_quickstart("image"), folder, symlinks=True)
    with pytest.raises((AssertionError, SystemExit, ValueError, SyntaxError), match=re.escape(said)):
        do(Block(language, code, "page.md:1", reason), shell, folder)


def test_blocks_are_found_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```bash\nls\n```\n\n<!-- not run: no time -->\n```python\nx\n\ny\n```\n\n    make all\n\n    make test\n\nText\n\n"
        "```yaml\n# a.yaml\nb: 1\n```\n"
    )
    found = [(block.language, block.code, block.reason, block.file, block.place) for block in blocks_of(page)]
    assert found[0] == ("bash", "ls\n", None, None, "page.md:3")
    assert found[1] == ("python", "x\n\ny\n", "no time", None, "page.md:8")
    assert found[2][:2] == ("bash", "make all\n\nmake test\n") and found[2][2].startswith("an indented block")
    assert found[3] == ("yaml", "# a.yaml\nb: 1\n", None, "a.yaml", "page.md:20")
    assert len(found) == 4


def test_what_is_not_run_is_known():
    """A block more that is not run has to be wanted."""
    found = [(page.name, block) for page in PAGES for block in blocks_of(page)]
    marked = Counter(name for name, block in found if block.reason and not block.reason.startswith("an indented"))
    assert marked == NOT_RUN


def test_blocks_under_docs_have_a_language():
    for page in (ROOT / "docs").glob("*.md"):
        indented = [
            block.place for block in blocks_of(page) if block.reason and block.reason.startswith("an indented")
        ]
        assert not indented, "Write ```bash or ```text, so that the code is coloured and can be copied"
