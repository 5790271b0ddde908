"""LoRA through the real trainer: what trains, merged against unmerged, and what a checkpoint then is."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from alignvlm.data import scenes
from alignvlm.evaluation.load import load_checkpoint, load_weights
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.lora import add_lora, merge_saved_lora
from alignvlm.stages.stage import main
from alignvlm.stages.trainer import module_of
from alignvlm.tools.plan import plan_stages
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration
from tests.running import arguments_for, parse


LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "down_proj"]}
RATES = {"language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}


def logits(model, processor) -> torch.Tensor:
    records = [scenes.make_scenes(3, annotations=("questions",), seed=8)[i] for i in range(3)]
    batch = AlignVLMCollator(processor)(records)
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for merge in (True, False):
        main(arguments_for(checkpoint, folder / str(merge), **LORA, **RATES, lora_merge=merge))
    return folder / "True", folder / "False"


def test_only_targets_and_projector_change(checkpoint, folders):
    before, after = load_file(checkpoint / "model.safetensors"), load_file(folders[0] / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        trains = module_of(name) == "projector" or name.endswith(("q_proj.weight", "down_proj.weight"))
        trains &= "vision_tower" not in name
        assert torch.equal(value, after[name]) != trains, name
    assert read_run_record(folders[0])["stages"][-1]["lora"]["r"] == 4


def test_merged_equals_unmerged_with_its_lora_weights(checkpoint, processor, folders):
    merged = logits(AlignVLMForConditionalGeneration.from_pretrained(folders[0]), processor)
    apart = AlignVLMForConditionalGeneration.from_pretrained(folders[1])
    without = logits(apart, processor)
    apart.load_adapter(str(folders[1] / "lora"))
    scale = merged.abs().max()
    assert (logits(apart, processor) - merged).abs().max() < 1e-5 * scale
    assert (without - merged).abs().max() > 1e-2 * scale
    from peft import PeftModel

    apart = PeftModel.from_pretrained(
        AlignVLMForConditionalGeneration.from_pretrained(folders[1]), str(folders[1] / "lora")
    )
    assert (logits(apart, processor) - merged).abs().max() < 1e-5 * scale
    assert not (folders[0] / "lora").exists()


def test_the_next_stage_and_evaluation_take_unmerged_weights_along(processor, folders, tmp_path):
    merged, apart = (AlignVLMForConditionalGeneration.from_pretrained(folder) for folder in folders)
    assert merge_saved_lora(apart, folders[1]) and not merge_saved_lora(merged, folders[0])
    expected = logits(merged, processor)
    assert (logits(apart, processor) - expected).abs().max() < 1e-5 * expected.abs().max()
    results = {}
    for folder in folders:
        entry = main(
            arguments_for(folder, tmp_path / folder.name, optim="sgd", vision_learning_rate=1e-3, max_steps=2)
        )
        results[folder.name] = entry["logged_losses"]
        again = main(
            arguments_for(folder, tmp_path / f"{folder.name} lora", optim="sgd", **LORA, **RATES, max_steps=2)
        )
        results[f"{folder.name} lora"] = again["logged_losses"]
    assert results["True"] == pytest.approx(results["False"], rel=1e-3)
    assert results["True lora"] == pytest.approx(results["False lora"], rel=1e-3)
    for name in results:  # what a stage saves is called what it was called before
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == load_file(folders[1] / "model.safetensors").keys()
    from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, parser

    (tmp_path / "data").mkdir()
    scenes.make_scenes(6, "test").to_parquet(tmp_path / "data/test.parquet")
    predictions = []
    for folder in folders:
        options = [
            str(folder),
            "--task",
            "scenes",
            "--data",
            str(tmp_path / "data"),
            "--limit",
            "6",
            "--output_dir",
            str(folder / "results"),
            "--use_cpu",
        ]
        found = evaluate_checkpoint(
            parser().parse_args([*options, "--use_cpu", "--max_new_tokens", "6", "--bootstrap_samples", "5"])
        )
        predictions.append([prediction["prediction"] for prediction in found["predictions"]])
    assert predictions[0] == predictions[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 4},
        {
            "max_steps": None,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
        },
    ],
    ids=["no workers", "workers that stay for all epochs"],
)
def test_an_interrupted_lora_stage_resumes_bit_for_bit(checkpoint, tmp_path, fields):
    fields = {**LORA, **RATES, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2, **fields}
    whole = main(arguments_for(checkpoint, tmp_path / "whole", **fields))
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "again/checkpoint-2")
    again = main([*arguments_for(checkpoint, tmp_path / "again", **fields), "--resume_from_checkpoint"])
    assert again["logged_losses"] == whole["logged_losses"]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_checkpoint_from_the_middle_of_a_lora_stage_is_no_start(checkpoint, tmp_path):
    """Its linear layers have other names, so that they would be drawn at random."""
    main(arguments_for(checkpoint, tmp_path / "stage", **LORA, **RATES, save_strategy="steps", save_steps=2))
    middle = tmp_path / "stage/checkpoint-2"
    given, message = (
        arguments_for(middle, tmp_path / "next", **RATES),
        "checkpoint-2' cannot be loaded.*go on with that stage",
    )
    with pytest.raises(ValueError, match=message):
        main(given)
    with pytest.raises(ValueError, match=message):
        plan_stages([parse(given)], processes=1)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(middle), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"lacks 6 of the model's weights.*go on with that stage"):
        load_weights(AlignVLMForConditionalGeneration, str(middle))


def test_bad_targets_are_named(make_model):
    with pytest.raises(
        ValueError, match=r"\['qkv'\] name no linear layer of the language model; it has \['down_proj'"
    ):
        add_lora(make_model(), 4, 8, 0.0, ["q_proj", "qkv"])


@pytest.mark.slow
def test_a_merged_checkpoint_loads_where_there_is_no_peft(folders, tmp_path):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folders[0])!r}, trust_remote_code=True)\n"
        "print(sorted(n for n, _ in model.named_parameters() if 'lora' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert json.loads((folders[0] / "config.json").read_text())["model_type"] == "alignvlm"
