"""`projector_start: least_squares` against numpy on the true features."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from alignvlm.data.scenes import make_scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import IGNORED
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.projector_start import NormalEquations, last_linear_layer
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.plan import ImageCost, describe, plan_stages
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration
from modeling_alignvlm.modeling_alignvlm import similar_groups
from tests.modeling_alignvlm.test_tiles import tiled
from tests.running import arguments_for, parse


SCENES = {"name": "scenes", "annotations": ["short_caption"], "count": 24}
SOURCES = [SCENES, {"name": "scene_texts", "count": 8}]
RIDGE = 1e-3


def solved_by_numpy(x: np.ndarray, t: np.ndarray, ridge: float, bias: bool) -> np.ndarray:
    """Weights (and bias below them) of ridge regression: ordinary least squares with a row more for each weight."""
    penalty = np.sqrt(ridge * (x**2).mean() * len(x)) * np.eye(x.shape[1])
    above = np.hstack([x, np.ones((len(x), 1))]) if bias else x
    below = np.hstack([penalty, np.zeros((len(penalty), 1))]) if bias else penalty
    zeros = np.zeros((len(penalty), t.shape[1]))
    return np.linalg.lstsq(np.vstack([above, below]), np.vstack([t, zeros]), rcond=None)[0]


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_normal_equations_in_pieces_are_least_squares(ridge, bias):
    rng = np.random.default_rng(0)
    x, t = 3 + rng.normal(size=(50, 6)), rng.normal(size=(50, 4))
    equations = NormalEquations(6, 4)
    for piece in np.array_split(np.arange(50), 7):
        equations.add(torch.tensor(x[piece]), torch.tensor(t[piece]))
    weight, offset = equations.solve(ridge, bias)
    expected = solved_by_numpy(x, t, ridge, bias)
    np.testing.assert_allclose(weight.T, expected[:6], rtol=1e-9, atol=1e-12)
    assert (offset is None) != bias
    if bias:
        np.testing.assert_allclose(offset, expected[6], rtol=1e-9, atol=1e-12)


def start(checkpoint, folder, **fields) -> dict:
    """The entry of a stage whose step moves nothing: what it writes is what it starts from."""
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"sources": SOURCES, "projector_start": "least_squares", "projector_start_ridge": RIDGE, "max_steps": 1}
    return run_stage(arguments_for(checkpoint, folder, **{**given, "projector_learning_rate": 1e-30, **fields}))


@pytest.mark.parametrize("kind", ["linear", "mlp", "pool", "shuffled"])
def test_a_stage_begins_where_least_squares_on_the_true_features_ends(make_model, processor, tmp_path, kind):
    config = (
        {"projector_type": "linear", "pixel_shuffle_factor": 2} if kind == "shuffled" else {"projector_type": kind}
    )
    model = make_model(seed=4, **config)
    own = processor
    if kind == "shuffled":
        own = type(processor)(
            processor.image_processor,
            processor.tokenizer,
            image_seq_length=1,
            chat_template=processor.chat_template,
        )
    save_checkpoint(model, own, tmp_path / "stage0", {"stages": []})
    entry = start(tmp_path / "stage0", tmp_path / "stage1")["projector_start"]
    assert entry["method"] == "least_squares" and entry["images"] == 24 and entry["ridge"] == RIDGE

    collator, inputs, targets = AlignVLMCollator(own), [], []
    before = model.model.projector.layers
    for record in make_scenes(24, annotations=("short_caption",)):
        batch = collator([record])
        with torch.no_grad():
            features = model.model.encode_images(batch["pixel_values"])[0]  # (4 places, 32)
            if kind == "shuffled":
                features = features.flatten()[None]  # all four make one token
            reached = features if kind in ("linear", "shuffled") else before[:-1](features)
            embeddings = model.get_input_embeddings()(batch["input_ids"][batch["labels"] != IGNORED])
        inputs.append(reached.double().numpy())
        targets.append(np.repeat(embeddings.double().numpy().mean(0)[None], len(reached), axis=0))
    expected = solved_by_numpy(np.concatenate(inputs), np.concatenate(targets), RIDGE, bias=kind != "pool")

    written = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "stage1").model.projector
    layer = last_linear_layer(written)
    found = layer.weight.T if layer.bias is None else torch.cat([layer.weight.T, layer.bias[None]])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=1e-5)
    for name, value in written.state_dict().items():
        if not name.startswith("layers.2") and kind == "mlp":
            torch.testing.assert_close(value, model.model.projector.state_dict()[name], rtol=0, atol=1e-29, msg=name)


@torch.no_grad()
def mean_loss(checkpoint, processor, sources: list[dict]) -> float:
    model, collator, total, count = (
        AlignVLMForConditionalGeneration.from_pretrained(checkpoint),
        AlignVLMCollator(processor),
        0.0,
        0,
    )
    for record in make_scenes(**{name: value for name, value in sources[0].items() if name != "name"}):
        batch = collator([record])
        labels = int((batch["labels"] != IGNORED).sum())
        total, count = total + labels * model(**batch).loss.item(), count + labels
    return total / count


@pytest.mark.parametrize("worse", [False, True])
def test_the_loss_tells_whether_the_start_is_a_better_one(make_model, processor, tmp_path, caplog, worse):
    """It is worse than what training has made of the projector; and better than any other, if the language model was trained on it."""
    model, sources = make_model(seed=4, projector_type="linear"), [{**SCENES, "count": 12}]
    save_checkpoint(model, processor, tmp_path / "new", {"stages": []})
    AcceleratorState._reset_state(reset_partial_state=True)
    fields = (
        {"projector_learning_rate": 0.1}
        if worse
        else {"projector_start": "least_squares", "language_learning_rate": 0.02}
    )
    fields |= {"max_steps": 30, "per_device_train_batch_size": 12, "sources": sources}
    run_stage(arguments_for(tmp_path / "new", tmp_path / "trained", **{"projector_learning_rate": 1e-30, **fields}))
    trained = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "trained")
    if not worse:
        trained.model.projector.load_state_dict(model.model.projector.state_dict())
    save_checkpoint(trained, processor, tmp_path / "stage0", {"stages": []})
    caplog.clear()
    entry = start(tmp_path / "stage0", tmp_path / "stage1", sources=sources)["projector_start"]
    for moment, folder in (("before", "stage0"), ("after", "stage1")):
        expected = mean_loss(tmp_path / folder, processor, sources)
        assert entry[f"loss_{moment}"] == pytest.approx(expected, abs=2e-4)
    assert (entry["loss_after"] > entry["loss_before"]) == worse
    assert ("raised the loss of the first records" in caplog.text) == worse


FUSED = {"vision_feature_layer": [-2, -1], "vision_layer_fusion": "weighted_sum"}
OTHERS = {"tiles": {}, "merged": {"merge_image_tokens": 2}, "fused": FUSED}


@pytest.mark.parametrize("kind", OTHERS)
def test_tiles_merged_tokens_and_layers_added_up_begin_there_too(make_model, processor, tmp_path, kind):
    model = make_model(seed=4, projector_type="linear", **(FUSED if kind == "fused" else {}))
    save_checkpoint(model, processor, tmp_path / "stage0", {"stages": []})
    scenes = {**SCENES, "count": 12, "image_size": 40}
    fields = {"tiles": {"max_tiles": 6, "tile_marks": True}, "merged": OTHERS["merged"], "fused": {}}[kind]
    entry = start(tmp_path / "stage0", tmp_path / "stage1", sources=[scenes], **fields)
    assert entry["projector_start"]["images"] == 12

    own = tiled(processor, max_tiles=6) if kind == "tiles" else processor
    collator, inputs, targets = AlignVLMCollator(own), [], []
    for record in make_scenes(12, annotations=("short_caption",), image_size=40):
        batch = collator([record])
        with torch.no_grad():
            layers = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
            reached = layers.last_hidden_state  # (images or tiles, 4 places, 32)
            if kind == "fused":
                chosen = (layers.hidden_states[-2], layers.last_hidden_state)
                reached = sum(torch.nn.functional.layer_norm(each, (32,), eps=1e-6) for each in chosen) / 2
            embeddings = model.get_input_embeddings()(batch["input_ids"][batch["labels"] != IGNORED])
        reached = reached.flatten(0, 1)
        if kind == "merged":
            groups = similar_groups(reached[None], 2)[0]
            reached = torch.stack([reached[groups == group].mean(0) for group in range(2)])
        assert len(reached) == (batch["input_ids"] == model.config.image_token_id).sum() or kind == "merged"
        inputs.append(reached.double().numpy())
        targets.append(np.repeat(embeddings.double().numpy().mean(0)[None], len(reached), axis=0))
    assert kind != "tiles" or sum(map(len, inputs)) > 2 * 12 * 4
    expected = solved_by_numpy(np.concatenate(inputs), np.concatenate(targets), RIDGE, bias=True)
    layer = last_linear_layer(AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "stage1").model.projector)
    found = torch.cat([layer.weight.T, layer.bias[None]]).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


def test_filled_rows_begin_where_others_do(checkpoint, tmp_path):
    start(checkpoint, tmp_path / "one", projector_start_records=5)
    filled = start(checkpoint, tmp_path / "filled", projector_start_records=5, row_length=200, max_length=200)
    assert filled["projector_start"]["images"] == 5 and filled["rows"]["records_per_row"] > 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "filled"))
    assert torch.equal(one["model.projector.layers.2.weight"], other["model.projector.layers.2.weight"])


@pytest.mark.parametrize("mask_type", ["prefix", '{"image": 0.5, "prefix": 0.5}'])
def test_an_image_counts_once_however_many_rows_and_branches_hold_it(checkpoint, tmp_path, mask_type):
    """Under `prefix` every annotation has a row with the image; behind a text of its own, every branch of a row holds the image."""
    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "a.png")
    asked = [[{"type": "text", "text": text}, {"type": "image"}] for text in ("What?", "Name it:", "And this:")]
    talks = [{"messages": [{"role": "user", "content": parts}], "responses": ["a red square"]} for parts in asked]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": ["a.png"], "conversations": talks}))
    sources = [{**SCENES, "annotations": ["short_caption", "questions"], "count": 12}, {"data": "rows.jsonl"}]
    fields = {"sources": [*sources, SOURCES[1]], "data_dir": tmp_path}
    for name, given in (("image", "image"), ("other", mask_type)):
        entry = start(checkpoint, tmp_path / name, attention_mask_type=given, **fields)
        assert entry["projector_start"]["images"] == 13
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("image", "other"))
    name = "model.projector.layers.2.weight"
    torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    for records in (5, 2000):
        given = {**fields, "projector_start": "least_squares", "projector_start_records": records}
        words = arguments_for(checkpoint, tmp_path, attention_mask_type=mask_type, projector_learning_rate=1, **given)
        (plan,) = plan_stages([parse(words)], processes=1, sample=2)
        read = min(records, 13)
        assert f"  projector_start: {read} records with an image, " in describe(plan, "H100", 0.4)
        image = ImageCost.of(AlignVLMConfig.from_pretrained(checkpoint))
        assert plan.start_flops == pytest.approx(read * image.flops)


def test_the_order_and_number_of_records_are_those_of_training(checkpoint, tmp_path):
    one = start(checkpoint, tmp_path / "one", projector_start_records=5)
    assert one["projector_start"]["images"] == 5
    start(checkpoint, tmp_path / "same", projector_start_records=5)
    start(checkpoint, tmp_path / "other", projector_start_records=6)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other")]
    name = "model.projector.layers.2.weight"
    assert torch.equal(files[0][name], files[1][name]) and not torch.equal(files[0][name], files[2][name])


def test_a_16_bit_encoder_starts_nearly_where_a_32_bit_one_does(checkpoint, tmp_path):
    start(checkpoint, tmp_path / "fp32")
    start(checkpoint, tmp_path / "bf16", bf16=True, frozen_16_bit=True)
    name = "model.projector.layers.2."
    full, half = (load_file(tmp_path / each / "model.safetensors") for each in ("fp32", "bf16"))
    norms = (full[f"{name}bias"] - half[f"{name}bias"]).norm(), full[f"{name}bias"].norm()
    assert half[f"{name}bias"].dtype == torch.float32 and 0 < norms[0] < 0.2 * norms[1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"projector_start": "random"}, "'random'. Valid values: least_squares"),
        (
            {"projector_learning_rate": None, "language_learning_rate": 1e-3},
            "this stage freezes it: set projector_lear",
        ),
        ({"projector_start_records": 0}, "projector_start_records=0 must be at least 1"),
        ({"projector_start_ridge": -1}, "projector_start_ridge=-1.0 must be 0 or a positive number"),
        ({"streaming": True}, "a stream has none yet"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("alignvlm.stages.stage.load_model", lambda arguments: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        start(checkpoint, tmp_path, **fields)


def test_a_trained_projector_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    start(checkpoint, tmp_path / "stage1")
    monkeypatch.setattr("alignvlm.stages.stage.load_model", lambda arguments: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"would replace the projector of .* that stage 3 has trained"):
        start(tmp_path / "stage1", tmp_path / "stage2")


def test_records_without_images_are_no_start(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="none of the stage's records has an image"):
        start(checkpoint, tmp_path, sources=SOURCES[1:])
