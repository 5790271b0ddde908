"""`embedding_loss`: the encoder's features predicted from the language model's hidden states, against a plain computation."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from alignvlm.data.scenes import make_scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.embedding_loss import EmbeddingHead, layer_of
from alignvlm.stages.stage import main as run_stage
from alignvlm.stages.weights import EmbeddingLoss
from alignvlm.tools.plan import plan_stages
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.modeling_alignvlm import similar_groups
from tests import forked
from tests.conftest import PLAIN_TEMPLATE
from tests.modeling_alignvlm.test_tiles import tiled
from tests.running import arguments_for
from tests.stages.test_weights import parsed


SOURCES = [{"name": "scenes", "annotations": ["short_caption", "questions"], "count": 8}]
STILL = {"projector_learning_rate": 1e-30, "language_learning_rate": 1e-30}


def run(checkpoint, folder, **fields) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"sources": SOURCES, "projector_learning_rate": 1e-2, "language_learning_rate": 1e-2, **fields}
    return run_stage(arguments_for(checkpoint, folder, **given))


@pytest.fixture(scope="module")
def unnormed(make_model, processor, tmp_path_factory):
    """A checkpoint whose encoder's features have another mean and variance than its last layer norm begins with."""
    model, folder = make_model(), tmp_path_factory.mktemp("unnormed")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_layernorm" in name:
                parameter.copy_(torch.linspace(-1, 3, len(parameter)))
    save_checkpoint(model, processor, folder, {"stages": []})
    return folder


@torch.no_grad()
def plain_loss(model, batch: dict, layer: int, seed: int = 42) -> float:
    """The loss of one batch, place by place, with the head's first weights."""
    norm, linear = EmbeddingHead(model.config, layer, seed)
    features = model.model.vision_tower(batch["pixel_values"]).last_hidden_state  # (images or tiles, 4, 32)
    if count := model.config.merge_image_tokens:
        groups = similar_groups(features, count)
        means = [of[own == group].mean(0) for of, own in zip(features, groups) for group in range(count)]
        features = torch.stack(means).unflatten(0, (-1, count))
    outputs = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    distances = []
    places = (batch["input_ids"] == model.config.image_token_id).nonzero()
    assert len(places) == len(features) * model.config.image_seq_length
    for (row, place), feature in zip(places, features.flatten(0, 1)):
        target = (feature - feature.mean()) / (feature.var(unbiased=False) + 1e-5).sqrt()
        error = (linear(norm(outputs.hidden_states[layer][row, place])) - target).abs()
        distances.append(torch.where(error < 1, error**2 / 2, error - 0.5))
    return torch.cat(distances).mean().item()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layer", [None, 2])
def test_the_loss_is_that_of_the_labels_and_the_plain_one(unnormed, processor, tmp_path, layer, accumulation):
    """Of a step with all eight scenes, once or in two micro-batches, whose head has not moved yet."""
    fields = {"max_steps": 1, "per_device_train_batch_size": 8 // accumulation, **STILL}
    fields["gradient_accumulation_steps"] = accumulation
    without = run(unnormed, tmp_path / "without", **fields)
    entry = run(unnormed, tmp_path / "with", **fields, embedding_loss=0.5, embedding_loss_layer=layer)
    model = AlignVLMForConditionalGeneration.from_pretrained(unnormed).train()
    records = list(make_scenes(8, annotations=("short_caption", "questions")))
    expected = plain_loss(model, AlignVLMCollator(processor)(records), layer or 1)  # all rows weigh the same
    assert entry["logged_losses"][0] - without["logged_losses"][0] == pytest.approx(0.5 * expected, rel=1e-4)
    assert entry["log"][0]["embedding_loss"] == pytest.approx(expected, rel=1e-4)
    assert entry["embedding_loss"] == {"weight": 0.5, "layer": layer or 1}
    assert "embedding_loss" not in without and "embedding_loss" not in without["log"][0]


@pytest.mark.parametrize("kind", ["tiles", "merged", "filled rows"])
def test_the_loss_is_that_of_tiles_merged_tokens_and_filled_rows(unnormed, processor, tmp_path, kind):
    sources, own, more = [{**SOURCES[0], "image_size": 40}], processor, {}
    fields = {"max_steps": 1, "per_device_train_batch_size": 8, "embedding_loss": 0.5, **STILL}
    if kind == "tiles":
        own, more = tiled(processor, max_tiles=6), {"image_block": "image"}
        fields |= {"max_tiles": 6, "tile_marks": True}
    elif kind == "merged":
        own = AlignVLMProcessor(processor.image_processor, processor.tokenizer, 3, chat_template=PLAIN_TEMPLATE)
        more = {"merge_image_tokens": 3}
        fields |= more
    else:
        fields |= {"row_length": 400, "max_length": 400}
    entry = run(unnormed, tmp_path / "out", **fields, sources=sources)
    model = AlignVLMForConditionalGeneration.from_pretrained(unnormed, **more).train()
    records = list(make_scenes(8, annotations=("short_caption", "questions"), image_size=40))
    batch = AlignVLMCollator(own)(records)
    assert (len(batch["pixel_values"]) > 2 * 8) == (kind == "tiles")
    assert entry["log"][0]["embedding_loss"] == pytest.approx(plain_loss(model, batch, 1), rel=1e-4)
    assert kind != "filled rows" or entry["rows"]["records_per_row"] > 1


def test_the_head_learns_and_is_thrown_away(checkpoint, tmp_path):
    mixed = {"sources": [*SOURCES, {"name": "scene_texts", "count": 8}], "per_device_train_batch_size": 2}
    fields = {"max_steps": 30, "embedding_loss": 1.0, **mixed}  # batches without an image are among them
    losses = [line["embedding_loss"] for line in run(checkpoint, tmp_path / "out", **fields)["log"]]
    with_images = [loss for loss in losses if loss]
    assert len(with_images) < len(losses) and sum(with_images[-5:]) < 0.8 * sum(with_images[:5])
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys()


def test_with_other_options_and_resumed_it_is_the_same(checkpoint, tmp_path):
    fields = {"embedding_loss": 0.5, "lora_r": 2, "bf16": True, "frozen_16_bit": True, "average_last": 2}
    fields |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "activation_checkpointing": True,
        "token_weighting": "contrast",
    }
    whole = run(checkpoint, tmp_path / "whole", **fields)
    resumed_from = tmp_path / "whole/checkpoint-2"
    assert "embedding_head.1.weight" in load_file(resumed_from / "model.safetensors")
    (tmp_path / "whole" / RUN_RECORD).unlink()
    again = run(checkpoint, tmp_path / "whole", **fields, resume_from_checkpoint=str(resumed_from))
    assert again["logged_losses"] == whole["logged_losses"] and again["resumed_at"] == [2]
    assert load_file(tmp_path / "whole/model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()


def test_the_middle_layer_is_read_and_others_must_exist(make_model):
    config = make_model(text={"num_hidden_layers": 5}).config
    assert layer_of(config, None) == 3 and layer_of(config, 5) == 5
    for layer in (0, 6, -1):
        with pytest.raises(ValueError, match=f"embedding_loss_layer={layer} must be from 1 to 5"):
            layer_of(config, layer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_loss": -1}, "embedding_loss=-1.0 is a weight"),
        ({"embedding_loss_layer": 1}, "is read by embedding_loss only"),
        ({"embedding_loss": 0.1, "embedding_loss_layer": 3}, "must be from 1 to 2, the number of layers"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("alignvlm.stages.stage.load_model", lambda arguments: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path, **fields)


def test_sharded_weights_are_refused():
    checked = []
    EmbeddingLoss(0.5, 1, 0).check(SimpleNamespace(check_complete_weights=checked.append))
    assert checked == ["embedding_loss"]


def test_the_plan_refuses_what_the_stage_does(checkpoint, tmp_path):
    given = parsed(checkpoint, tmp_path, embedding_loss=0.5, embedding_loss_layer=3, projector_learning_rate=1)
    with pytest.raises(ValueError, match="must be from 1 to 2"):
        plan_stages([given], processes=1, sample=1)


@pytest.mark.slow
def test_two_processes_and_micro_batches_train_what_one_batch_trains(checkpoint, tmp_path):
    """Of batches whose halves hold unequally many images, or none. The head's gradient is that of the encoder's features, too."""
    few = [{"name": "scenes", "annotations": ["short_caption"], "count": 6}, {"name": "scene_texts", "count": 10}]
    fields = {"sources": few, "embedding_loss": 0.5, "max_steps": 3, "optim": "sgd", "weight_decay": 0}
    fields |= {
        "projector_learning_rate": 0.05,
        "language_learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 3,
        "activation_checkpointing": True,
    }
    one = run(checkpoint, tmp_path / "one", **fields, per_device_train_batch_size=8)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    given = arguments_for(checkpoint, tmp_path / "two", **fields, **batches)
    forked.run("alignvlm.stages.stage:main", given, log=tmp_path / "log", processes=2)
    two = read_run_record(tmp_path / "two")["stages"][-1]
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("loss", "embedding_loss"):
        values = [[line[name] for line in entry["log"]] for entry in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4) and len(set(values[0])) == 3
    written, expected = (load_file(tmp_path / name / "checkpoint-3/model.safetensors") for name in ("two", "one"))
    assert written["embedding_head.1.weight"].abs().sum() > 0
    for name, value in expected.items():  # the head is among them
        torch.testing.assert_close(written[name], value, rtol=1e-4, atol=1e-6, msg=name)
