"""The plan of a stage against what the stage then does."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from alignvlm.data import scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.stage import main
from alignvlm.stages.trainer import freeze_all_but
from alignvlm.tools.plan import describe, plan_stages, step_flops, steps_of
from alignvlm.tools.plan import main as plan_main
from alignvlm.tools.show_data import main as data_main
from tests.running import SOURCES, arguments_for, recompute_activations
from tests.running import parse as parse_list


def parse(*given) -> StageArguments:
    return parse_list(list(given))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "trains", [("projector",), ("projector", "vision"), ("projector", "language"), ("projector", "vision", "language")]
)
def test_flops_are_those_pytorch_counts(make_model, processor, trains, recompute):
    """Of the backbone; the head is a matrix product for tokens nobody needs to count twice."""
    model = make_model(attn_implementation="eager", text={"num_key_value_heads": 2})
    freeze_all_but(model, dict.fromkeys(trains, 1.0))
    if recompute:
        recompute_activations(model)
    batch = AlignVLMCollator(processor)([scenes.make_scenes(4)[i] for i in range(4)])
    counter = FlopCounterMode(display=False)
    with counter:
        outputs = model.train().model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        outputs.last_hidden_state.sum().backward()
    modules = (model.model.vision_tower, model.model.projector, model.model.language_model)
    rows, length = batch["input_ids"].shape
    planned = step_flops(modules, set(trains), len(batch["pixel_values"]), rows, length, 0, recompute)
    # Left out in one or the other: gradients of pictures' patches, rotary angles, the last layer's gradient.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


@settings(deadline=None, max_examples=30)
@given(
    records=st.integers(1, 40),
    batch=st.integers(1, 9),
    accumulated=st.integers(1, 4),
    epochs=st.sampled_from([0.5, 1, 1.5, 3]),
    drop_last=st.booleans(),
)
def test_steps_are_those_that_the_trainer_counts(records, batch, accumulated, epochs, drop_last):
    """Each epoch ends with a step, whatever is left for it."""
    assume(not drop_last or records >= batch)
    given_too = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            dataloader_drop_last=drop_last,
            use_cpu=True,
            report_to="none",
            **given_too,
        )
        trainer = Trainer(nn.Linear(1, 1), arguments, train_dataset=[{"labels": 0}] * records)
    counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert steps_of(arguments, records, 1) == counted


def test_records_steps_and_parameters_are_those_of_the_run(checkpoint, tmp_path):
    fields = {
        "max_steps": None,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "projector_learning_rate": 1e-3,
    }
    words = arguments_for(checkpoint, tmp_path / "run", **fields)
    (plan,) = plan_stages([parse(*words)], processes=1)
    entry = main(words)
    assert plan.steps == entry["steps"] and plan.records == 2 * entry["records"]
    projector = sum(v.numel() for v in model_weights(checkpoint).values() if v is not None)
    assert plan.parameters["projector"][0] == projector == plan.parameters["projector"][1]
    assert plan.parameters["language"][0] == 0 < plan.parameters["language"][1]
    for part, data in zip(plan.mixture.parts, entry["data"]):
        assert part.name == data["name"] and data["records_per_epoch"] == len(part.source)
    assert plan.memory["optimizer"] == 8 * projector and plan.memory["gradients"] == 4 * projector


def test_the_plan_says_what_the_other_way_to_take_turns_costs(checkpoint, tmp_path):
    """Of three turns about an image: whole, each sees those before it; independent, each is a branch. The plan counts both."""
    (tmp_path / "0.png").touch()
    turns = [{"user": f"What is at {place}?", "assistant": "a red circle"} for place in ("top", "left", "bottom")]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"image": "0.png", "texts": turns}) + "\n" for _ in range(3))
    )
    costs = {}
    for name in ("whole", "independent"):
        sources = [{"data": "rows.jsonl", "turns": name}, {"name": "scenes", "count": 4}]
        (plan,) = plan_stages(
            [
                parse(
                    *arguments_for(
                        checkpoint,
                        tmp_path / "run",
                        sources=sources,
                        data_dir=str(tmp_path),
                        projector_learning_rate=1e-3,
                    )
                )
            ],
            processes=1,
        )
        costs[name] = plan.mixture.parts[0].tokens
        assert plan.other_turns[1] is None
        text = describe(plan, "H100", 0.4)
        other, tokens = plan.other_turns[0]
        assert other != name and f"with `turns: {other}`: {tokens:.0f} tokens a record" in text
        costs[f"{other}, told"] = tokens
    assert costs["whole"] == costs["whole, told"] != costs["independent"] == costs["independent, told"]


def model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {n: v for n, v in load_file(checkpoint / "model.safetensors").items() if ".projector." in n}


def test_stages_that_start_from_each_other_and_rehearse(checkpoint, tmp_path):
    rates = {"projector_learning_rate": 1e-3}
    first = parse(*arguments_for(checkpoint, tmp_path / "1", stage=1, **rates))
    rehearsal = [{"name": "scenes", "count": 8, "seed": 9}, {"name": "rehearsal", "stage": 1, "share": 0.5}]
    second = parse(*arguments_for(tmp_path / "1", tmp_path / "2", stage=2, sources=rehearsal, **rates))
    plans = plan_stages([first, second], processes=4)
    assert [part.name for part in plans[1].mixture.parts] == ["scenes", *(s["name"] for s in SOURCES)]
    tokens = [part.tokens * draws for part, draws in zip(plans[1].mixture.parts, plans[1].mixture.draws)]
    assert sum(tokens[1:]) / sum(tokens) == pytest.approx(0.5, abs=0.05)
    assert plans[0].records == 4 * 4 * 4 and plans[0].memory["DDP buckets"] > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"stage 2 .*Cannot rehearse"):
        third = parse(*arguments_for(checkpoint, tmp_path / "3", stage=2, sources=rehearsal, **rates))
        plan_stages([third], processes=1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "nowhere/at/all"}, "stage 3 .model 'nowhere/at/all'"),
        ({"sources": [{"name": "local", "data": "none.jsonl"}]}, "stage 3 .*No such file or folder: .*none.jsonl"),
        ({"sources": [{"name": "scenes"}]}, "stage 3 .*Source 'scenes' needs count"),
        ({"eval_sources": [{"name": "scene"}]}, "stage 3 .*Unknown source 'scene'"),
        (
            {"sources": [{"name": s, "count": 9, "share": x} for s, x in (("scenes", 0.5), ("scene_texts", 0.6))]},
            "sum to 1.1 instead of 1",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            r"stage 3 .*: attn_implementation='flash_attention_2' cannot apply the mask type 'image'\. Use 'sdpa'",
        ),
        (
            {"attn_implementation": "flash_attention_2", "attention_mask_type": '{"causal": 0.5, "image": 0.5}'},
            r"attn_implementation='flash_attention_2' knows the mask type 'causal' alone",
        ),
        (
            {"attn_implementation": "my/flash-kernel", "attention_mask_type": '{"causal": 0.5, "image": 0.5}'},
            r"attn_implementation='my/flash-kernel' knows the mask type 'causal' alone",
        ),
        ({"attn_implementation": "flash", "attention_mask_type": "causal"}, r'stage 3 .*"flash"` is not supported'),
        (
            {"lora_r": 2, "lora_target_modules": ["qkv"], "language_learning_rate": 1e-3},
            r"stage 3 .*\['qkv'\] name no",
        ),
    ],
)
def test_what_a_run_would_stumble_over_is_found(checkpoint, tmp_path, fields, message):
    model = fields.pop("model", checkpoint)
    words = arguments_for(model, tmp_path, **{"projector_learning_rate": 1e-3, **fields})
    with pytest.raises((ValueError, OSError), match=message):
        plan_stages([parse(*words)], processes=1)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_a_kernel_that_is_not_installed_here_can_be_planned(checkpoint, tmp_path, monkeypatch, kernel):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "kernels", None)
    fields = {"attention_mask_type": "causal", "projector_learning_rate": 1e-3, "attn_implementation": kernel}
    first, second = (parse(*arguments_for(checkpoint, tmp_path / each, **fields)) for each in "12")
    second.model = first.output_dir
    assert [plan.steps for plan in plan_stages([first, second], processes=1, sample=2)] == [4, 4]


@pytest.mark.parametrize("fields", [{}, {"image_start_fraction": 0.3}, {"sources": [{**SOURCES[0], "count": 9}]}])
def test_rows_of_few_records_are_those_of_the_run(checkpoint, tmp_path, fields):
    """An epoch of fewer records than the window from which rows are filled, of which no other draw would tell."""
    sources = [{**SOURCES[0], "share": 0.8}, {**SOURCES[1], "share": 0.2}]
    fields = {"row_length": 300, "max_length": 300, "max_steps": -1, "sources": sources, **fields}
    words = arguments_for(checkpoint, tmp_path / "run", projector_learning_rate=1e-3, **fields)
    (plan,) = plan_stages([parse(*words)], processes=1)
    entry = main(words)
    rows = entry["rows"]
    assert plan.rows == rows["rows_per_epoch"] and plan.records == entry["records"] and plan.steps == entry["steps"]
    assert f"rows of 300 tokens, {rows['fill']:.0%} filled" in describe(plan, "H100", 0.4)


def test_the_command_line(checkpoint, tmp_path, capsys):
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text(
        "stage: 1\nprojector_learning_rate: 1.0e-3\nuse_cpu: true\nbf16: false\nper_device_train_batch_size: 4\n"
        f"model: {checkpoint}\noutput_dir: {tmp_path}/stage1\nsources:\n  - {{name: scenes, count: 40}}\n"
    )
    other = tmp_path / "stage2.yaml"
    text = (
        recipe.read_text().replace("stage: 1", "stage: 2").replace(f"model: {checkpoint}", f"model: {tmp_path}/stage1")
    )
    other.write_text(text.replace(f"output_dir: {tmp_path}/stage1", f"output_dir: {tmp_path}/stage2"))
    plan_main(["--config", f"{tmp_path}/stage*.yaml", "--processes", "2", "--gpu", "A100", "--num_train_epochs", "3"])
    output = capsys.readouterr().out
    assert "Stage 1" in output and "Stage 2" in output and "In all" in output
    assert re.search(r"120 records, 15 steps of 8 records", output)
    assert "fits into 80 GB of one A100" in output
    assert "  Gemma 3 (Gemma3ForConditionalGeneration): its projector is 'pool', not 'mlp'" in output
    with pytest.raises(SystemExit, match="projektor"):
        plan_main(["--config", str(recipe), "--projektor", "3"])
    for option, value in (("--processes", "0"), ("--sample", "-1"), ("--utilisation", "0"), ("--utilisation", "40")):
        with pytest.raises(SystemExit):
            plan_main(["--config", str(recipe), option, value])
        assert f"argument {option}: '{value}' is no " in capsys.readouterr().err


def test_stage_5_is_planned_by_its_prompts(checkpoint, tmp_path, capsys):
    recipe = tmp_path / "stage5.yaml"
    recipe.write_text(
        "stage: 5\nmethod: grpo\nrewards: [cider, accuracy]\nprojector_learning_rate: 1.0e-3\nprecision: fp32\n"
        "num_generations: 4\nper_device_train_batch_size: 8\nattention_mask_type: prefix\n"
        f"model: {checkpoint}\noutput_dir: {tmp_path}/stage5\nsources:\n  - {{name: scenes, count: 10}}\n"
    )
    plan_main(["--config", str(recipe)])
    output = capsys.readouterr().out
    assert "grpo: 100 prompts, 50 steps of 2 prompts with 4 answers each, rewarded by cider, accuracy" in output
    with pytest.raises(ValueError, match=r"stage 5 .*'flash_attention_2' cannot apply the mask type 'prefix'"):
        plan_main(["--config", str(recipe), "--attn_implementation", "flash_attention_2"])
    with pytest.raises(SystemExit, match="num_generation"):
        plan_main(["--config", str(recipe), "--num_generation", "3"])
    causal = tmp_path / "causal"
    shutil.copytree(checkpoint, causal)
    config = json.loads((causal / "config.json").read_text())
    kept = {"attention_mask_type": "causal", "supported_mask_types": ["causal"]}
    (causal / "config.json").write_text(json.dumps({**config, **kept}))
    with pytest.raises(ValueError, match=r"stage 5 .*cannot keep attention_mask_type='prefix'"):
        plan_main(["--config", str(recipe), "--model", str(causal)])
    with pytest.raises(ValueError, match="a response without a rejected answer"):
        recipe.write_text(re.sub("method: grpo.*\n|rewards.*\n|num_gen.*\n", "", recipe.read_text()) + "method: dpo\n")
        plan_main(["--config", str(recipe)])


def test_what_max_length_leaves_out_is_told_before_and_is_what_the_stage_leaves_out(checkpoint, tmp_path, capsys):
    """An annotation without room for its response, a response that is cut, and a record of which nothing is left."""
    long = " ".join(["word"] * 60)
    rows = [
        {"prompt": "What?", "completion": "short"},
        {"prompt": "What?", "completion": long},
        {"prompt": long, "completion": "no room"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    questions = [{"prompt": prompt, "response": "r"} for prompt in ("p", long, "p", long)]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": "a.png", "annotations": questions}))
    divided = {"name": "scenes", "annotations": ["short_caption", "questions"], "count": 6}
    sources = [divided, *({"data": str(tmp_path / name)} for name in ("asked.jsonl", "rows.jsonl"))]
    given = arguments_for(
        checkpoint, tmp_path / "run", sources=sources, projector_learning_rate=1e-3, max_length=45, max_steps=-1
    )
    (plan,) = plan_stages([parse(*given)], processes=1, sample=2)
    data_main(given)
    printed = capsys.readouterr().out
    entry = main(given)
    dropped = entry["losses_of_data"]
    nothing, *told = plan.left_out
    assert not nothing  # what does not fit into a row of a scene makes another
    assert [int(re.search(r"leaves out (\d+) of", said)[1]) for said in told] == [2, 1]
    assert [dropped[kind] for kind in ("dropped_annotation", "dropped_record", "cut_response")] == [2, 1, 1]
    for said in told:
        assert said.startswith("max_length=45 leaves out ") and said in printed and said in describe(plan, "H100", 0.4)
    assert ", and cuts 1 responses" in told[1]
    wide = plan_stages([parse(*given, "--max_length", "512")], processes=1, sample=2)[0]
    assert wide.left_out == ["", "", ""] and "leaves out" not in describe(wide, "H100", 0.4)
