"""The stages, through the real trainer and the real scripts, on tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from trl import TrlParser

from alignvlm.data import scenes
from alignvlm.data.images import read_image
from alignvlm.data.sources import read_source
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import PROGRESS, read_progress
from alignvlm.stages.reward_stage import main as reward_main
from alignvlm.stages.stage import main
from alignvlm.stages.trainer import AlignVLMTrainer, module_of
from hub_upload.package import package
from hub_upload.run_record import RUN_RECORD, read_run_record, write_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.running import SOURCES, arguments_for


ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "rates",
    [
        {"projector": 1e-2},
        {"projector": 1e-2, "vision": 1e-2},
        {"projector": 1e-2, "language": 1e-2},
        {"projector": 1e-2, "vision": 1e-2, "language": 1e-2},
    ],
    ids=["stage 1", "stage 2", "stage 3", "stage 4"],
)
def test_a_stage_changes_exactly_the_modules_it_declares(checkpoint, tmp_path, rates, capfd):
    main(arguments_for(checkpoint, tmp_path, **{f"{module}_learning_rate": rate for module, rate in rates.items()}))
    before, after = weights(checkpoint), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, value in before.items():
        changed = not torch.equal(value, after[name])
        assert changed == (module_of(name) in rates), name
    log = capfd.readouterr().out
    for module in ("vision", "projector", "language"):
        line = next(line for line in log.splitlines() if line.startswith(f"  {module}"))
        assert ("trains at 0.01" if module in rates else "frozen") in line


def test_four_stages_one_after_the_other_leave_a_whole_record(checkpoint, tmp_path):
    previous = checkpoint
    for stage in (1, 2, 3, 4):
        folder = tmp_path / f"stage{stage}"
        evaluation = json.dumps([{"name": "scenes", "annotations": ["questions"], "count": 4, "split": "test"}])
        main(
            arguments_for(
                previous, folder, stage=stage, max_steps=2, projector_learning_rate=1e-3, eval_sources=evaluation
            )
        )
        previous = folder
    record = read_run_record(previous)
    assert [entry["stage"] for entry in record["stages"]] == [1, 2, 3, 4]
    last = record["stages"][-1]
    assert last["model"] == str(tmp_path / "stage3") and last["steps"] == 2 and last["sources"] == SOURCES
    assert last["records"] == 32 and len(last["logged_losses"]) == 2 and last["versions"]["torch"]
    assert last["eval_loss_before"] == pytest.approx(record["stages"][-2]["eval_loss_after"])
    assert {path.name for path in previous.iterdir()} >= {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "processing_alignvlm.py",
    }


def test_learning_rates_per_module_and_throughput_in_the_log(checkpoint, processor, tmp_path):
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    rates = {"projector": 1e-3, "language": 1e-5}
    fields = {f"{m}_learning_rate": r for m, r in rates.items()}
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(
        arguments_for(checkpoint, tmp_path, lr_scheduler_type="constant", weight_decay=0.1, **fields)
    )
    dataset = scenes.make_scenes(8, annotations=("questions",))
    trainer = AlignVLMTrainer(
        model,
        rates,
        args=arguments,
        train_dataset=dataset,
        data_collator=AlignVLMCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["lr"] == rates[module_of(name)], name
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1), name
    assert all(module_of(name) == "vision" for name in names.values())
    entry = next(entry for entry in trainer.state.log_history if "images_per_second" in entry)
    assert entry["annotations_per_second"] == pytest.approx(8 * entry["images_per_second"], rel=0.01)
    assert entry["tokens_per_second"] > entry["annotations_per_second"]


def test_the_trainers_loss_and_gradients_are_the_models(checkpoint, processor, tmp_path):
    """The head applied only at labels, inside TRL's fused head, against the plain forward pass."""
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(
        arguments_for(
            checkpoint, tmp_path, language_learning_rate=1e-3, vision_learning_rate=1e-3, projector_learning_rate=1e-3
        )
    )
    dataset = scenes.make_scenes(4, annotations=("short_caption", "questions"))
    collator = AlignVLMCollator(processor)
    plain = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).train()
    batch = collator([dataset[i] for i in range(4)])
    loss = plain(**batch, use_cache=False).loss
    loss.backward()
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    trainer = AlignVLMTrainer(
        model,
        arguments.learning_rates,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
    )
    trained = trainer.compute_loss(trainer.model.train(), batch)
    trained.backward()
    torch.testing.assert_close(trained, loss, rtol=1e-5, atol=0)
    for (name, expected), (_, parameter) in zip(plain.named_parameters(), model.named_parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    nothing = trainer.compute_loss(trainer.model, silent)
    nothing.backward()
    assert nothing.item() == 0


def test_resuming_equals_an_uninterrupted_run(checkpoint, tmp_path, library_warnings, capsys):
    fields = {
        "language_learning_rate": 1e-2,
        "projector_learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    straight = main(arguments_for(checkpoint, whole, **fields))
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    AcceleratorState._reset_state(reset_partial_state=True)
    again = main([*arguments_for(checkpoint, resumed, **fields), "--resume_from_checkpoint"])
    assert not [
        message for message in library_warnings if "missing keys" in message
    ]  # the head's, which is the embedding's
    expected, actual = weights(whole), weights(resumed)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert again["logged_losses"] == straight["logged_losses"]
    # The record is that of all pieces, not of the last one.
    assert again["train_loss"] == straight["train_loss"] == pytest.approx(sum(straight["logged_losses"]) / 6, rel=1e-4)
    assert (straight["resumed_at"], again["resumed_at"]) == ([], [3])
    told = re.findall(r"6/6  trained for .*  mean loss (\S+)", capsys.readouterr().out)
    assert told == [f"{straight['train_loss']:.4f}"] * 2
    before = read_progress(whole / "checkpoint-3")["seconds"]
    assert 0 < before < straight["seconds"] + 0.1 and again["seconds"] > before
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="Nothing to resume"):
        main([*arguments_for(checkpoint, tmp_path / "new", **fields), "--resume_from_checkpoint"])


@pytest.mark.slow
def test_a_run_in_a_fresh_process_is_told_of_nothing_deprecated(checkpoint, tmp_path):
    """Libraries say so once in a process, by a warning or in the log."""
    rates = {"language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}
    fields = {**rates, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "activation_checkpointing": True}
    fields |= {"eval_sources": [{**SOURCES[0], "split": "test", "count": 2}], "eval_strategy": "epoch"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always"}
    runs = (
        "import sys; from alignvlm.stages.stage import main; main(sys.argv[1:]); main([*sys.argv[1:], *'{}'.split()])"
    )
    command = [sys.executable, "-c", runs.format("--resume_from_checkpoint --max_steps 3")]
    command += arguments_for(checkpoint, tmp_path / "run", **fields)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_run_record(tmp_path / "run")["stages"][-1]["resumed_at"] == [2]
    told = [line for line in (done.stdout + done.stderr).splitlines() if "deprecat" in line.lower()]
    assert not told, told


STREAM = [{"name": "scenes", "annotations": ["questions"], "count": 10}]
SAVING = {
    "language_learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def streamed(checkpoint, tmp_path_factory) -> Path:
    """A finished run of 24 records from a stream of ten."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    main(arguments_for(checkpoint, folder, sources=STREAM, streaming=True, **SAVING))
    return folder


def copied(run: Path, folder: Path, step: int) -> Path:
    """An output folder with one checkpoint of a run, as a kill leaves it."""
    folder.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_a_stream_that_began_again_equals_an_uninterrupted_run(checkpoint, streamed, tmp_path, step):
    folder = copied(streamed, tmp_path / "run", step)
    fields = arguments_for(checkpoint, folder, sources=STREAM, streaming=True, **SAVING)
    again = main([*fields, "--resume_from_checkpoint"])
    straight = read_run_record(streamed)["stages"][-1]
    assert again["logged_losses"] == straight["logged_losses"] and again["steps"] == 6
    assert again["train_loss"] == straight["train_loss"]
    expected, actual = weights(streamed), weights(folder)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_what_begins_with_a_checkpoint_from_the_middle_of_a_stage_knows_how_it_was_trained(streamed, tmp_path):
    fields = {"language_learning_rate": 1e-2, "max_steps": 1}
    main(arguments_for(streamed / "checkpoint-4", tmp_path / "next", stage=4, **fields))
    earlier, last = read_run_record(tmp_path / "next")["stages"]
    of_the_run = read_run_record(streamed)["stages"][-1]
    assert earlier["logged_losses"] == of_the_run["logged_losses"][:4] and earlier["data"] == of_the_run["data"]
    assert (earlier["steps"], earlier["of_steps"], earlier["unfinished"]) == (4, 6, True)
    assert (last["stage"], last["steps"]) == (4, 1) and not {"of_steps", "unfinished"} & {*last, *of_the_run}
    assert " 4 of 6 |" in (tmp_path / "next/README.md").read_text(encoding="utf-8")
    package(streamed / "checkpoint-4", tmp_path / "packaged")
    assert [entry["logged_losses"] for entry in read_run_record(tmp_path / "packaged")["stages"]] == [
        earlier["logged_losses"]
    ]


@pytest.mark.parametrize("num_train_epochs", [None, 2])
def test_a_finished_run_is_not_started_again_nor_taken_a_step_too_far(checkpoint, tmp_path, num_train_epochs, capfd):
    """Whether its steps end within an epoch or with one."""
    fields = {**SAVING, "per_device_train_batch_size": 16, "save_steps": 4}  # two steps an epoch
    fields |= {"max_steps": 3, "save_steps": 3} if num_train_epochs is None else {"max_steps": -1}
    fields = arguments_for(checkpoint, tmp_path / "run", num_train_epochs=num_train_epochs, **fields)
    straight = main(fields)
    steps = straight["steps"]
    assert steps == (3 if num_train_epochs is None else 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=rf"run' is finished: {steps} of {steps} steps are taken"):
        main([*fields, "--resume_from_checkpoint"])
    written = weights(tmp_path / "run")
    assert read_run_record(tmp_path / "run")["stages"][-1]["train_loss"] == straight["train_loss"]
    # Killed after its last step, before it had written its folder: it writes it, and takes no step.
    (tmp_path / "run" / RUN_RECORD).unlink()
    (tmp_path / "run" / "model.safetensors").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    again = main([*fields, "--resume_from_checkpoint"])
    assert (again["steps"], again["train_loss"]) == (steps, straight["train_loss"])
    assert again["logged_losses"] == straight["logged_losses"]
    assert all(torch.equal(value, written[name]) for name, value in weights(tmp_path / "run").items())


def test_the_run_record_holds_what_a_run_is_repeated_with(checkpoint, tmp_path):
    given = {"optim": "sgd", "optim_args": None, "data_seed": 5, "neftune_noise_alpha": 1.5, "weight_decay": 0.1}
    rates = {"projector_learning_rate": 1e-3, "max_steps": 1}
    entry = main(arguments_for(checkpoint, tmp_path, **given, **rates))
    expected = {**given, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert entry["settings"] == {name: value for name, value in expected.items() if value is not None}
    assert read_run_record(tmp_path)["stages"][-1]["settings"] == entry["settings"]


def test_another_mask_type_than_the_stage_before_had_is_told(streamed, checkpoint, tmp_path, caplog):
    """Not of a checkpoint that no stage has trained, nor of one of the types that the stage mixes."""
    fields = {"projector_learning_rate": 1e-3, "max_steps": 1}
    mixed = '{"causal": 0.5, "image": 0.5}'
    for model, masks, told in ((checkpoint, "causal", False), (streamed, mixed, False), (streamed, "causal", True)):
        caplog.clear()
        main(arguments_for(model, tmp_path / f"{model.name}-{len(masks)}", attention_mask_type=masks, **fields))
        sentence = "was trained under the mask type 'image', and this stage trains under mask type 'causal'"
        assert (sentence in caplog.text) == told


def test_a_run_is_not_ended_by_fewer_steps_than_it_has_taken(checkpoint, streamed, tmp_path):
    folder = copied(streamed, tmp_path / "run", 4)
    fields = {**SAVING, "sources": STREAM, "streaming": True}
    with pytest.raises(ValueError, match=r"checkpoint-4 has taken 4 steps, and the run is now to have 2 .*or more"):
        main([*arguments_for(checkpoint, folder, **{**fields, "max_steps": 2}), "--resume_from_checkpoint"])
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])["steps"] == 6


OTHER = [{**STREAM[0], "count": 11}]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_device_train_batch_size": 2}, "global_batch_size was 4 and is 2"),
        ({"gradient_accumulation_steps": 2}, "global_batch_size was 4 and is 8"),
        ({"sources": OTHER}, r"sources\[0\].count was 10 and is 11"),
        ({"sources": [*STREAM, *STREAM]}, "sources was .* and is"),
        ({"data_seed": 7}, "seed was 42 and is 7"),
        ({"streaming": False}, "streaming was True and is False"),
        ({"max_length": 100}, "max_length was 1024 and is 100"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was False and is True"),
        ({"dataloader_num_workers": 2}, "stream.busy_workers was 0 and is 2"),
    ],
    ids=["batch size", "accumulation", "source", "more sources", "seed", "indexed", "length", "last batch", "workers"],
)
def test_resuming_with_other_data_is_refused(checkpoint, streamed, tmp_path, change, message):
    folder = copied(streamed, tmp_path / "run", 2)
    fields = {**SAVING, "sources": STREAM, "streaming": True, **change}
    if len(fields["sources"]) > 1:
        fields["sources"] = [{**source, "share": 0.5} for source in fields["sources"]]
    with pytest.raises(ValueError, match=f"read other data: .*{message}.*--allow_other_data true"):
        main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"language_learning_rate": 1e-5}, r"learning_rates.language was .* and is 1e-05"),
        ({"vision_learning_rate": 1e-5}, r"learning_rates.vision was None and is 1e-05"),
        ({"attention_mask_type": "causal"}, r"mask_type_shares.image was 1.0 and is None"),
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused' and is 'sgd'"),
        ({"weight_decay": 0.1}, r"weight_decay was 0.0 and is 0.1"),
        ({"lora_r": 2}, "lora_r was 0 and is 2"),
        ({"stage": 4}, "stage was 3 and is 4"),
        ({"bf16": True, "frozen_16_bit": True}, "frozen_16_bit was False and is True"),
        (
            {"projector_start": "least_squares", "projector_learning_rate": 1e-3, "streaming": False},
            "projector_start was None and is 'least_squares'",
        ),
    ],
    ids=["rate", "module", "mask", "optimizer", "decay", "lora", "stage", "16 bits", "start"],
)
def test_resuming_with_other_settings_is_refused(checkpoint, streamed, tmp_path, change, message):
    """An optimizer keeps the learning rates of its checkpoint, and the run record would claim the new ones."""
    folder = copied(streamed, tmp_path / "run", 2)
    fields = {**SAVING, "sources": STREAM, "streaming": True, **change}
    with pytest.raises(ValueError, match=f"with other settings: .*{message}.*Give the stage what it had"):
        main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])


FILES = {"streaming": True, "max_steps": 3, "sources": [{"data": "data"}]}


@pytest.fixture(scope="module")
def of_files(checkpoint, tmp_path_factory) -> Path:
    """A finished run of 12 records from a stream of four files, with the folder of the files beside it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "data").mkdir()
    for number in range(4):
        rows = [{"prompt": "Say", "completion": f"n {number} {index}"} for index in range(10)]
        (folder / f"data/train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    main(arguments_for(checkpoint, folder / "run", data_dir=folder, **{**SAVING, **FILES}))
    return folder / "run"


@pytest.mark.parametrize(
    "change, processes, message",
    [
        ({"dataloader_num_workers": 2}, 1, "stream.busy_workers was 0 and is 2"),
        ({"per_device_train_batch_size": 2}, 2, "stream.processes was 1 and is 2"),
    ],
    ids=["workers", "processes"],
)
def test_a_stream_of_several_files_is_resumed_on_as_many_processes_and_workers(
    checkpoint, of_files, tmp_path, monkeypatch, change, processes, message
):
    """They divide its files among them, and others would read some records again."""
    monkeypatch.setattr(StageArguments, "world_size", processes)
    folder = copied(of_files, tmp_path / "run", 2)
    fields = {**SAVING, **FILES, "data_dir": of_files.parent, **change}
    with pytest.raises(ValueError, match=f"read other data: {message}.*of a stream as many processes and"):
        main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])


ANSWERS = {"stage": 5, "method": "grpo", "rewards": "cider", "max_completion_length": 2, **SAVING, "max_steps": 1}
ANSWERS |= {"num_generations": 2, "sources": [{"name": "scenes", "annotations": ["short_caption"], "count": 8}]}


@pytest.fixture(scope="module")
def answered(checkpoint, tmp_path_factory) -> Path:
    """A finished run of one step of stage 5."""
    folder = tmp_path_factory.mktemp("answered") / "run"
    reward_main(arguments_for(checkpoint, folder, **ANSWERS))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_generations": 4}, "with other settings: num_generations was 2 and is 4"),
        ({"temperature": 0.5}, "with other settings: temperature was 1.0 and is 0.5"),
        ({"num_iterations": 2}, "read other data: num_iterations was 1 and is 2"),
        ({"steps_per_generation": 2}, "read other data: generation_batch_size was 4 and is 8"),
        ({"shuffle_dataset": False}, "read other data: shuffle_dataset was True and is False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_answers_to_a_prompt_is_refused(checkpoint, answered, tmp_path, change, message):
    folder = copied(answered, tmp_path / "run", 1)
    fields = {**ANSWERS, "max_steps": 2, **change}
    with pytest.raises(ValueError, match=message):
        reward_main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])


def test_resuming_on_another_model_is_refused_and_the_same_model_may_have_moved(checkpoint, streamed, tmp_path):
    folder = copied(streamed, tmp_path / "run", 5)
    moved, other = shutil.copytree(checkpoint, tmp_path / "moved"), shutil.copytree(checkpoint, tmp_path / "other")
    write_run_record(other, {**read_run_record(other), "stages": [{"stage": 2, "sources": []}]})
    fields = {**SAVING, "sources": STREAM, "streaming": True, "save_strategy": "no"}
    with pytest.raises(ValueError, match="with other settings: run_record_of_model was"):
        main([*arguments_for(other, folder, **fields), "--resume_from_checkpoint"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments_for(moved, folder, **fields), "--resume_from_checkpoint"])["steps"] == 6


def test_resuming_with_other_data_can_be_allowed_and_the_same_batch_may_be_cut_otherwise(
    checkpoint, streamed, tmp_path, caplog
):
    fields = {**SAVING, "sources": STREAM, "streaming": True, "save_strategy": "no"}
    resume = ["--resume_from_checkpoint", "--allow_other_data", "true"]
    folder = copied(streamed, tmp_path / "other", 5)
    assert main([*arguments_for(checkpoint, folder, **{**fields, "sources": OTHER}), *resume])["steps"] == 6
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = copied(streamed, tmp_path / "same", 5)
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert main([*arguments_for(checkpoint, folder, **fields), resume[0]])["steps"] == 6


def test_a_checkpoint_of_an_earlier_version_goes_on(checkpoint, streamed, tmp_path):
    folder = copied(streamed, tmp_path / "run", 5)
    (folder / "checkpoint-5" / PROGRESS).unlink()
    fields = {**SAVING, "sources": STREAM, "streaming": True}
    entry = main([*arguments_for(checkpoint, folder, **fields), "--resume_from_checkpoint"])
    assert entry["steps"] == 6 and entry["train_loss"] == pytest.approx(entry["logged_losses"][-1], rel=1e-4)


@pytest.mark.parametrize("model", ["out/nano/stage2", "./stage2", "/tmp/none/stage2", "out/stage2"])
@pytest.mark.parametrize("command", ["stage", "data", "plan", "backbones"])
def test_a_missing_model_folder_is_named(command, model, tmp_path, monkeypatch):
    """Also one that could be the name of a model on the Hub, which is not asked here."""
    from alignvlm.stages import backbones
    from alignvlm.tools import plan, show_data

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    arguments = arguments_for(model, tmp_path, projector_learning_rate=1e-3)
    recipe = tmp_path / "stage.yaml"
    recipe.write_text(
        f"stage: 1\nmodel: {model}\noutput_dir: x\nprojector_learning_rate: 1.0e-3\nsources: [{{name: scenes, count: 4}}]\n"
    )
    call = {
        "stage": lambda: main(arguments),
        "data": lambda: show_data.main(arguments),
        "plan": lambda: plan.main(["--config", str(recipe)]),
        "backbones": lambda: backbones.main(["--vision", model, "--language", model, "--output_dir", str(tmp_path)]),
    }[command]
    with pytest.raises((FileNotFoundError, ValueError), match=f"No such folder: '{model}'"):
        call()


def test_a_folder_of_models_is_told_from_a_model(tmp_path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no model.*in its folders stage1, stage2: name one"):
        main(arguments_for(tmp_path, tmp_path / "out", projector_learning_rate=1e-3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model.*Name a folder that has one"):
        main(arguments_for(tmp_path / "empty", tmp_path / "out", projector_learning_rate=1e-3))


def test_gradient_accumulation_gives_the_same_weights(checkpoint, tmp_path):
    runs = {}
    for name, fields in {
        "one": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        main(arguments_for(checkpoint, tmp_path / name, language_learning_rate=1e-4, optim="sgd", **fields))
        runs[name] = weights(tmp_path / name)
    for name, value in runs["one"].items():
        torch.testing.assert_close(runs["accumulated"][name], value, rtol=1e-4, atol=1e-7, msg=name)


def launch(script: str, *arguments: str) -> None:
    """Runs a stage's script in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    config = ROOT / "training/accelerate/cpu_2_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "training" / script), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one_with_the_same_global_batch(checkpoint, tmp_path):
    fields = {"language_learning_rate": 1e-3, "projector_learning_rate": 1e-3, "max_steps": 4}
    main(arguments_for(checkpoint, tmp_path / "one", per_device_train_batch_size=4, **fields))
    launch("stage3.py", *arguments_for(checkpoint, tmp_path / "two", per_device_train_batch_size=2, **fields))
    one, two = (read_run_record(tmp_path / name)["stages"][-1] for name in ("one", "two"))
    assert two["processes"] == 2 and len(one["logged_losses"]) == 4
    assert two["logged_losses"] == pytest.approx(one["logged_losses"], rel=1e-4)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-5, msg=name)


RECIPES = sorted((ROOT / "training/recipes").glob("*/stage[1-4].yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_are_valid(path):
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert path.stem == f"stage{arguments.stage}"
    assert arguments.num_train_epochs == 1 and arguments.learning_rates


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"projector_learning_rate": 0}, "must be a positive number. To freeze"),
        ({"projector_learning_rate": None}, "Nothing trains"),
        ({"attention_mask_type": "sideways"}, "'sideways'. Valid values: causal, image, prefix, mutual"),
        ({"projector_learning_rate": "nan"}, "nan must be a positive number"),
        ({"learning_rate": 1e-4}, "learning_rate=0.0001 is not read: each module has its own"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps=-2 must be at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0.0 must be above 0"),
        ({"num_train_epochs": "inf"}, "num_train_epochs=inf must be above 0 and finite"),
        ({"max_steps": 0}, "max_steps=0 is no number of steps: give 1 or more, or -1"),
        ({"max_steps": -5}, "max_steps=-5 is no number of steps"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps=0.* must be above 0"),
        ({"weight_decay": -1}, "weight_decay=-1.0 must be at least 0"),
        ({"max_grad_norm": "nan"}, "max_grad_norm=nan must be at least 0"),
        ({"pad_to_multiple_of": -3}, "pad_to_multiple_of=-3 must be at least 0"),
        ({"max_bad_images": -1}, "max_bad_images=-1.0 is a share of what is read: give a number from 0 to 1"),
        ({"max_bad_rows": 50}, "max_bad_rows=50.0 is a share of what is read: give a number from 0 to 1"),
        ({"lora_r": 2, "language_learning_rate": 1e-3, "lora_alpha": 0}, "lora_alpha=0.0 must be above 0"),
        ({"lora_r": 2, "language_learning_rate": 1e-3, "lora_alpha": "nan"}, "lora_alpha=nan must be above 0"),
        ({"lora_alpha": 8}, "lora_alpha=8.0 is read by lora_r only: set it, too"),
        ({"lora_target_modules": '["nope"]'}, r"lora_target_modules=\['nope'\] is read by lora_r only"),
        ({"projector_start_records": 5}, "projector_start_records=5 is read by projector_start only"),
        ({"push_license": "mit"}, "push_license='mit' is read by push_to only"),
        ({"seed": -1}, "seed=-1 must be a number from 0 to 4294967295"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' cannot be made .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr' cannot be made .*min_lr"),
        ({"infinite_schedule": '{"cooldown": "half"}'}, "Expected a mapping such as .*cooldown"),
        ({"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit': .*bitsandbytes"),
        ({"report_to": "tensorbord"}, "'tensorbord' is not installed.*Valid here: none"),
        ({"completion_only_loss": False}, "completion_only_loss: leave it out; the loss is that of responses"),
        ({"dataset_text_field": "caption"}, "dataset_text_field: leave it out; the schema of a source says"),
        ({"use_liger_kernel": True}, "use_liger_kernel: leave it out; Liger has no kernels"),
        ({"adam_beta1": 2.0}, "adam_beta1=2.0 must be at least 0 and below 1"),
        ({"adam_epsilon": 0}, "adam_epsilon=0.0 must be above 0"),
        ({"padding_free": True}, "padding_free: leave it out; row_length fills rows"),
        ({"eos_token": "</s>"}, "eos_token: leave it out; the special tokens are the checkpoint's"),
        (
            {"bf16_full_eval": True},
            "bf16_full_eval: leave it out; held-out records are measured in the stage's precision",
        ),
        (
            {"average_last": 2, "save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True},
            "average_last=2 writes the mean of the last checkpoints, load_best_model_at_end the best one",
        ),
        ({"eval_strategy": "epoch"}, "eval_strategy measures on eval_sources: name some"),
        ({"eval_on_start": True}, "eval_on_start measures on eval_sources: name some"),
        ({"metric_for_best_model": "cider"}, "'cider' is not measured .* Valid values: loss"),
        ({"attn_implementation": "sdap"}, "'sdap'. Valid values: sdpa, flex_attention, eager"),
        ({"attn_implementation": "flex_attention"}, "'flex_attention' trains on GPUs only"),
        ({"dataloader_persistent_workers": True}, "set dataloader_num_workers, too"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 999}, "drops all 32 records"),
        ({"push_to_hub": True}, "push_to: user/name pushes the finished stage"),
        ({"sources": '["scenes"]'}, r"\['scenes'\]. Expected a list such as"),
        ({"sources": "scenes"}, "not valid JSON.*Expected a list such as"),
        ({"sources": '[{"name": "scenes", "count": 4, "share": "1e-1"}]'}, "share='1e-1' .* is no number"),
        ({"sources": "[]"}, "needs `model`"),
        ({"output_dir": ""}, r"`output_dir` \(where its checkpoint goes\)"),
        ({"sources": '[{"name": "photos"}]'}, "'photos'. Valid names: llava_pretrain"),
        ({"sources": '[{"name": "scenes", "counts": 3}]'}, r"\['counts'\]. Did you mean count\? Its arguments: count"),
        ({"sources": '[{"name": "local", "data": "none.jsonl"}]'}, "No such file or folder: .*none.jsonl"),
        ({"text_sources": [{"name": "scenes", "count": 2}]}, "text_sources: a record of 'scenes' has an image"),
    ],
)
def test_bad_arguments_are_named(checkpoint, tmp_path, extra, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(arguments_for(checkpoint, tmp_path, **{"projector_learning_rate": 1e-3, **extra}))
    assert not (tmp_path / RUN_RECORD).exists()


@pytest.mark.parametrize("split", ["CP", "SP"])
def test_split_sequences_are_refused(checkpoint, tmp_path, monkeypatch, split):
    """As `accelerate launch` asks for them; accelerate would drop every mask that is not causal."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{split}_SIZE", "2")
    with pytest.raises(ValueError, match=f"{split.lower()}_size=2.*drop attention masks"):
        main(arguments_for(checkpoint, tmp_path, projector_learning_rate=1e-3))


def test_a_field_nobody_knows_is_an_error(checkpoint, tmp_path):
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text("stage: 1\nprojektor_learning_rate: 1.0e-3\n")
    given = arguments_for(checkpoint, tmp_path, projector_learning_rate=1e-3)
    with pytest.raises(SystemExit, match="projektor_learning_rate"):
        main(["--config", str(recipe), *given])
    with pytest.raises(SystemExit, match="--projektor_learning_rate"):
        main([*given, "--projektor_learning_rate", "1e-3"])


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
def test_what_people_have_for_trl_trains_and_is_asked(checkpoint, tmp_path, streaming):
    """A jsonl file of `messages` with two images and two turns trains a stage as it is; then its last question is asked, images shown."""
    from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, parser

    for index in range(2):
        Image.new("RGB", (16, 16), (200 * index, 20, 20)).save(tmp_path / f"{index}.png")
    said = ["Which is red?", "the second", "And the other?", "black"]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
    row = {"images": ["0.png", "1.png"], "messages": messages}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    sources = [{"data": "rows.jsonl"}]
    fields = {"data_dir": tmp_path, "sources": sources, "streaming": streaming, "max_steps": 2}
    entry = main(arguments_for(checkpoint, tmp_path / "stage", language_learning_rate=1e-3, **fields))
    assert entry["steps"] == 2 and entry["losses_of_data"]["bad_row_list"] == []
    command = [str(tmp_path / "stage"), "--task", "local", "--data", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    result = evaluate_checkpoint(parser().parse_args([*command, "--split", "train", "--max_new_tokens", "2"]))
    (prediction, *_) = result["predictions"]
    assert (prediction["prompt"], prediction["references"]) == ("And the other?", ["black"])
    assert [message["role"] for message in prediction["messages"]] == ["user", "assistant", "user"]
    assert "| 3 |" in (card := (tmp_path / "stage/README.md").read_text()) and "rows.jsonl" in card
    assert str(tmp_path) not in card
    if not streaming:  # and the next stage rehearses it
        fields["sources"] = [{"name": "scenes", "count": 4}, {"name": "rehearsal", "stage": 3, "share": 0.5}]
        entry = main(
            arguments_for(tmp_path / "stage", tmp_path / "next", stage=4, language_learning_rate=1e-3, **fields)
        )
        assert [data["name"] for data in entry["data"]] == ["scenes", "rows.jsonl"]


def test_a_stage_that_drops_every_record_writes_nothing(checkpoint, tmp_path):
    given = arguments_for(checkpoint, tmp_path / "run", max_length=20, max_steps=2, projector_learning_rate=1e-3)
    with pytest.raises(RuntimeError, match=r"No record was trained on.*'.*': \d+.*Raise max_length"):
        main(given)
    assert not (tmp_path / "run" / RUN_RECORD).exists()


@pytest.mark.slow
def test_real_photos_through_the_flickr8k_recipe(shared_data, checkpoint, tmp_path):
    """Some steps of the recipe on the shared photos; the loss falls, and the result describes a validation photo."""
    from alignvlm.evaluation.answer import answer

    recipe = ROOT / "training/recipes/flickr8k_nano/stage3.yaml"
    given = {
        "model": checkpoint,
        "output_dir": tmp_path,
        "data_dir": shared_data,
        "max_steps": 60,
        "logging_steps": 10,
    }
    options = [item for name, value in given.items() for item in (f"--{name}", str(value))]
    entry = main(["--config", str(recipe), *options])
    assert entry["logged_losses"][-1] < entry["logged_losses"][0] - 0.3
    photos = read_source({"name": "local", "data": "flickr8k/captions.jsonl", "split": "val", "limit": 2}, shared_data)
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    processor = AlignVLMProcessor.from_pretrained(tmp_path)
    texts = answer(
        model,
        processor,
        [read_image(r["images"][0]) for r in photos],
        [["Write a short caption."]] * 2,
        max_new_tokens=8,
    )
    assert all(len(group) == 1 and group[0] for group in texts)
