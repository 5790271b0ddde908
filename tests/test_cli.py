"""The command `alignvlm`: its help, and what it says to mistyped commands, options and fields."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from trl import TrlParser

from alignvlm import cli
from alignvlm.data.images import read_image
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import complete_checkpoints
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.reward_arguments import DPOArguments, GRPOArguments
from alignvlm.stages.stage import main as run_stage
from hub_upload import command_line
from hub_upload.command_line import ArgumentParser, Ended, sentence_of
from hub_upload.run_record import read_json
from tests.running import arguments_for


ROOT = Path(__file__).parents[1]


HELP_OF_ALL = """
import contextlib, io
from alignvlm import cli

for name in cli.COMMANDS:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            cli.main([name, "--help"])
    except SystemExit as ended:
        print(f"== {name} exits with {ended.code}")
        print(text.getvalue())
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def alignvlm(*arguments: str) -> subprocess.CompletedProcess:
    return run("-m", "alignvlm.cli", *arguments)


def fits_a_screen(text: str) -> bool:
    lines = text.rstrip("\n").split("\n")
    return len(lines) <= 24 and max(map(len, lines)) <= 100


def test_the_help_fits_a_screen_and_names_every_command():
    for arguments in ([], ["--help"]):
        done = alignvlm(*arguments)
        assert done.returncode == 0 and fits_a_screen(done.stdout)
        assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)


def test_every_command_has_help():
    """In one process of their own: each would spend its time on importing the same libraries."""
    done = run("-c", HELP_OF_ALL)
    assert done.returncode == 0, done.stderr
    texts = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    assert list(texts) == [f"{name} exits with 0" for name in cli.COMMANDS]
    for name, text in zip(cli.COMMANDS, texts.values()):
        assert text.startswith(f"usage: alignvlm {name} ") and "--help" in text
        assert name not in ("ask", "chat") or fits_a_screen(text)


def test_a_mistyped_command_names_the_nearest():
    done = alignvlm("chatt")
    assert done.returncode == 2 and "no command 'chatt'. Did you mean 'chat'?" in done.stderr


@pytest.mark.parametrize(
    ("command", "given", "nearest"),
    [
        ("data", ["--learning_rat", "1e-3"], "--learning_rate"),
        ("data", ["--projektor-learning-rate=1e-3"], "--projector_learning_rate"),
        ("data", ["--shwo", "4"], "--show"),
        ("plan", ["--config", "RECIPE", "--procesess", "8"], "--processes"),
        ("plan", ["--config", "RECIPE", "--utilisatio", "0.5"], "--utilisation"),  # no abbreviations
        ("plan", ["--config", "RECIPE", "--row_lenght", "8"], "--row_length"),
        ("assemble", ["--visoin", "somewhere"], "--vision"),
        ("quickstart", ["--ouput_dir", "somewhere"], "--output_dir"),
        ("evaluate", ["out/stage4", "--taks", "pathvqa"], "--tasks?"),
        ("evaluate", ["--use-cpu"], "--use_cpu"),
        ("evaluate", ["out/stage4", "--bootstrap", "10"], "--bootstrap_samples"),  # no abbreviations
        ("recaption", ["out/stage3", "photos", "a.jsonl", "--min_word", "3"], "--min_words"),
        ("ask", ["--max_new_token=5"], "--max_new_tokens"),
        ("ask", ["out/stage4", "photo.jpg", "--imgae", "other.jpg"], "--image"),
        ("ask", ["out/stage4", "photo.jpg", "-revision", "v1"], "--revision"),
        ("chat", ["out/stage4", "--dtpye", "fp32"], "--dtype"),
        ("push", ["--dry_rnu"], "--dry_run"),
        ("push", ["out/stage4", "user/name", "--licence", "mit"], "--license"),
        ("inspect", ["user/name", "--revison", "v1"], "--revision"),
    ],
)
def test_a_mistyped_option_names_the_nearest(command, given, nearest, tmp_path):
    """Although other fields are missing, without which nothing could run."""
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text("stage: 1\n")
    with pytest.raises(SystemExit, match=rf"^error: there is no option --?\S+\. Did you mean {nearest}\?$"):
        cli.main([command, *(str(recipe) if item == "RECIPE" else item for item in given)])


@pytest.mark.parametrize(
    ("command", "content", "nearest"),
    [
        ("data", "projektor_learning_rate: 1.0e-3", "projector_learning_rate"),
        ("plan", "souces: []", "sources"),
        ("assemble", "langauge: somewhere", "language"),
    ],
)
def test_a_mistyped_field_of_a_recipe_names_the_nearest(command, content, nearest, tmp_path):
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text(content)
    with pytest.raises(
        SystemExit, match=rf"^error: .*stage1.yaml: there is no field '\w+'\. Did you mean {nearest}\?$"
    ):
        cli.main([command, "--config", str(recipe)])


def test_other_mistakes_of_a_command_line_are_one_sentence(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("sources: [\n")
    for given, message in (
        (["--qqqqqq", "1"], r"no option --qqqqqq\. --help lists them all\.$"),
        (["--lora_rank", "4"], r"no option --lora_rank\. Its name is --lora_r now\.$"),
        (["--lora_targets", "[]"], r"no option --lora_targets\. Its name is --lora_target_modules now\.$"),
        (["--merge-image-tokens", "none"], "merge_image_tokens=none: write 0 to turn it off"),
        (["--tile_marks=NULL"], "tile_marks=NULL: write false to turn it off"),
        (["--vision_feature_layer", "-1"], "--vision_feature_layer is an option of `alignvlm assemble`"),
        (["recipe.yaml"], r"'recipe.yaml' belongs to no option"),
        (["--config"], "--config needs a YAML file"),
        (["--config", "missing.yaml"], "no file 'missing.yaml'"),
        (["--config", str(broken)], "broken.yaml is not valid YAML"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            parse_fields(given, StageArguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("save_strategy: no", "save_strategy=False: expected a text, not true or false. YAML reads no without quotes"),
        ("eval_strategy: off", "write eval_strategy: 'no', or leave the line out"),
        ("max_steps:", "max_steps has no value"),
        (
            "merge_image_tokens:",
            "merge_image_tokens=None: write 0 to turn it off; left out, it stays as the checkpoint",
        ),
        ("max_tiles: none", "max_tiles=none: write 1 to turn it off"),
        ("max_steps: true", "expected a whole number, not true or false"),
        ("num_train_epochs: [1]", r"num_train_epochs=\[1\]: expected a number, not a list"),
        ("projector_learning_rate: {a: 1}", "expected a number, not a mapping"),
        ("per_device_train_batch_size: 4.5", "expected a whole number, not a fraction"),
        ("run_name: 2026-11-29", "not a date. Write it in quotes: run_name: '2026-11-29'"),
        ("output_dir: 7", "Write it in quotes: output_dir: '7'"),
        ("sources: {name: scenes}", "expected a text or a list, not a mapping"),
        ("stage: 2\nmodel: a\nstage: 3", "line 3, column 1: 'stage' stands here for the second time"),
        ("sources:\n  - {name: scenes, count: 4, name: scenes}", "line 2.*'name' stands here for the second time"),
    ],
)
def test_a_value_of_a_recipe_that_its_field_does_not_take_is_named(line, message, tmp_path):
    recipe = tmp_path / "stage3.yaml"
    recipe.write_text(line + "\n")
    with pytest.raises(SystemExit, match=f"^error: .*stage3.yaml.*{message}"):
        parse_fields(["--config", str(recipe)], StageArguments)


def test_a_choice_of_a_recipe_that_trl_and_torch_do_not_know_is_a_mistake(checkpoint, tmp_path):
    """argparse checks choices on the command line only."""
    recipe = tmp_path / "stage3.yaml"
    given = arguments_for(checkpoint, tmp_path / "out", projector_learning_rate=1e-3)
    for line, message in (
        ("loss_type: focal", "Invalid `loss_type` focal"),
        ("dataloader_multiprocessing_context: spwan", "'spwan'. Valid values: .*spawn"),
    ):
        recipe.write_text(line + "\n")
        with pytest.raises(ValueError, match=message) as found:
            run_stage(["--config", str(recipe), *given])
        assert "error:" in sentence_of(found.value)


@pytest.mark.parametrize("kind", [StageArguments, GRPOArguments, DPOArguments])
def test_a_stage_reads_its_records_once_unless_told_otherwise(kind, tmp_path):
    recipe = tmp_path / "stage.yaml"
    recipe.write_text(
        f"model: stage0\noutput_dir: {tmp_path}/out\nuse_cpu: true\nprojector_learning_rate: 1.0e-3\nsources: [{{name: scenes}}]\n"
        + {StageArguments: "stage: 3\n", GRPOArguments: "rewards: cider\n", DPOArguments: "method: dpo\n"}[kind]
    )
    (found,) = parse_fields(["--config", str(recipe)], kind)
    assert found.num_train_epochs == 1


def test_values_of_a_recipe_that_mean_what_the_field_takes_are_taken(tmp_path):
    recipe = tmp_path / "stage3.yaml"
    recipe.write_text(
        "max_steps: 10.0\nprojector_learning_rate: 1e-4\nnum_train_epochs: 2\nsave_strategy: 'no'\nreport_to:\nmuon: 1\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\nresume_from_checkpoint: false\n"
    )
    given = arguments_for(tmp_path, tmp_path / "out", max_steps=None, save_strategy=None, report_to=None)
    (found,) = parse_fields(["--config", str(recipe), *given], StageArguments)
    assert (found.max_steps, found.projector_learning_rate, found.num_train_epochs) == (10, 1e-4, 2)
    assert type(found.max_steps) is int and found.lr_scheduler_kwargs == {"min_lr": 1e-5} and found.muon is True
    assert found.save_strategy == "no" and found.report_to == [] and found.resume_from_checkpoint is False
    recipe.write_text("stage: 5\nrewards: cider\nlanguage_learning_rate: 1.0e-4\n")
    given = arguments_for(tmp_path, tmp_path / "out", per_device_train_batch_size=8, stage=None)
    (found,) = parse_fields(["--config", str(recipe), *given], GRPOArguments)
    assert found.rewards == ["cider"]


def test_what_is_right_is_read_as_trl_reads_it(tmp_path):
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text("stage: 2\nlora_r: 4\nlanguage_learning_rate: 1.0e-4\nmax_length: 64\nrow_length: 64\n")
    given = [
        "--config",
        str(recipe),
        *arguments_for(tmp_path, tmp_path / "out", stage=None, seed=3),
        "--no_lora_merge",
    ]
    (expected,) = TrlParser(StageArguments).parse_args_and_config(given)
    dashed = [item.replace("_", "-") if item.startswith("--") else item for item in given]
    for written in (given, dashed, [f"--config={recipe}", *given[2:]]):
        (found,) = parse_fields(written, StageArguments)
        assert found.to_dict() == expected.to_dict() and (found.stage, found.lora_merge) == (2, False)


def test_what_argparse_takes_is_taken_and_names_are_not_guessed(monkeypatch):
    parser = ArgumentParser()
    parser.add_argument("question")
    parser.add_argument("--shift", type=float)
    given = parser.parse_intermixed_args(["--shift", "-1.5", "-- what is it?"])
    assert (given.question, given.shift) == ("-- what is it?", -1.5)
    assert parser.parse_args(["--shift=2", "--", "--what"]).question == "--what"
    with pytest.raises(SystemExit, match=r"^error: there is no option --qqqq\. --help lists them all\.$"):
        parser.parse_args(["--qqqq"])
    monkeypatch.setattr(sys, "argv", ["program", "--shfit", "2", "question"])
    with pytest.raises(SystemExit, match=r"^error: there is no option --shfit\. Did you mean --shift\?$"):
        parser.parse_args()


def test_a_mistake_is_its_sentence_alone_and_exit_status_2(tmp_path):
    recipe = tmp_path / "stage3.yaml"
    recipe.write_text("stage: 3\nmodel: nowhere/at/all\nsources: [{name: scenes\n")
    script = str(ROOT / "training/stage3.py")
    done = run(script, "--config", str(recipe))
    place = "line 4, column 1: expected ',' or '}', but got '<stream end>'"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {recipe} is not valid YAML: {place}\n"
    done = run(script, "--config", str(recipe), "--traceback")
    assert done.returncode == 2 and done.stderr.startswith("Traceback") and place in done.stderr.splitlines()[-1]


@pytest.fixture
def failing(capsys):
    """Runs a program that fails as given; returns what it prints to stderr and how it ended."""

    def fail(main, argv=(), **environment) -> tuple[str, BaseException]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as ended:
            for name, value in environment.items():
                patch.setenv(name, value)
            command_line.run(main, list(argv))
        return capsys.readouterr().err, ended.value

    return fail


def test_a_traceback_is_shown_if_asked_for_and_the_option_goes_no_further(failing, tmp_path):
    (tmp_path / "broken.json").write_text('{"a": 1,\n "b" 2}')
    given = []

    def main(argv):
        given.append(argv)
        read_json(tmp_path / "broken.json")

    sentence = f"error: {tmp_path}/broken.json, line 2, column 6: not JSON (Expecting ':' delimiter)."
    printed, ended = failing(main, ["a"])
    assert printed == f"{sentence}\n" and isinstance(ended, Ended) and ended.code == 2
    for argv, environment in ((["a", "--traceback"], {}), (["a"], {"ALIGNVLM_TRACEBACK": "1"})):
        printed, ended = failing(main, argv, **environment)
        assert printed.startswith("Traceback") and "read_json" in printed and printed.endswith(f"\n{sentence}\n")
        assert ended.code == 2
    assert failing(main, ["a"], ALIGNVLM_TRACEBACK="0")[0] == f"{sentence}\n"
    assert given == [["a"]] * 4


def test_what_is_no_mistake_of_the_user_passes_through(failing, tmp_path):
    """It happens in our code or anybody's, and no `raise` of ours says it."""

    def in_our_code(argv):
        complete_checkpoints(0)  # a TypeError

    def unpack(argv):
        (_first,) = argv

    def reset(argv):
        raise ConnectionResetError(104, "Connection reset by peer")

    for main, kind in ((in_our_code, TypeError), (unpack, ValueError), (reset, ConnectionResetError)):
        printed, ended = failing(main)
        assert printed == "" and type(ended) is kind, main
    with pytest.raises(ValueError) as error:
        read_our_step()
    assert sentence_of(error.value) is None


def read_our_step():
    from alignvlm.stages.checkpoint import _step_of

    _step_of(Path("checkpoint-last"))  # int() fails, in a line that raises nothing


def test_files_and_texts_of_libraries_are_mistakes(failing, tmp_path):
    def missing(argv):
        (tmp_path / "none").read_text()

    def library(argv):
        raise OSError("user/name is not a local folder and is not a valid model identifier")

    def text(argv):
        raise SystemExit("error: there is no field")

    for main, expected in (
        (missing, "No such file or directory: "),
        (library, "user/name is not"),
        (text, "no field"),
    ):
        printed, ended = failing(main)
        assert printed.startswith("error: ") and expected in printed and printed.count("\n") == 1 and ended.code == 2

    def stopped(argv):
        raise KeyboardInterrupt

    printed, ended = failing(stopped)
    assert (printed, ended.code) == ("interrupted\n", 130)
    for status in (0, 3):
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda argv, status=status: sys.exit(status), [])
        assert ended.value.code == status


def test_an_error_of_a_data_worker_is_told_without_the_workers_traceback(failing, tmp_path):
    loader = DataLoader([str(tmp_path / "missing.png")], num_workers=1, collate_fn=read_first)
    printed, ended = failing(lambda argv: next(iter(loader)))
    assert printed.startswith("error: Cannot read the image ") and printed.count("\n") == 1 and ended.code == 2


def read_first(batch: list[str]):
    return read_image(batch[0])
