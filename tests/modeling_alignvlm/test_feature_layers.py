"""Features of several layers of the encoder: one pass, concatenated as LLaVA's class does, or added up with learned weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration
from tests.conftest import VISION
from tests.modeling_alignvlm.test_modeling import VISION_ENCODERS


def plain_layers(tower, pixel_values: torch.Tensor) -> list[np.ndarray]:
    """What goes into the first layer of an encoder and comes out of each, caught at the layers themselves; also counts the passes."""
    blocks = next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))
    seen, hooks = [], []
    hooks.append(blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda module, args, output: seen.append(output)))
    with torch.no_grad():
        tower(pixel_values)
    for hook in hooks:
        hook.remove()
    return [(value[0] if isinstance(value, tuple) else value).numpy() for value in seen]


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "clip_vision_model", "dinov2_with_registers"])
def test_channels_of_the_layers_stand_side_by_side(make_model, model_type):
    vision = {**VISION, "model_type": model_type, "num_hidden_layers": 3, **VISION_ENCODERS[model_type]}
    model = make_model(vision=vision, vision_feature_layer=[-2, 0, -1, 2]).double()
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    states = plain_layers(model.model.vision_tower, pixel_values)
    with torch.no_grad():
        final = model.model.vision_tower(pixel_values).last_hidden_state.numpy()
    assert len(states) == 4  # of 3 layers

    passes = []
    model.model.vision_tower.register_forward_hook(lambda *call: passes.append(1))
    features = model.get_image_features(pixel_values)
    expected = np.concatenate([part[:, -4:] for part in (states[2], states[0], final, states[2])], axis=-1)
    np.testing.assert_array_equal(features.last_hidden_state.detach().numpy(), expected)
    assert len(passes) == 1 and model.config.feature_size == 4 * 32

    first, _, last = model.model.projector.layers
    weights = {name: value.detach().numpy() for name, value in first.named_parameters(prefix="first")}
    assert weights["first.weight"].shape == (32, 128)
    hidden = torch.from_numpy(expected @ weights["first.weight"].T + weights["first.bias"])
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(features.pooler_output, hidden @ last.weight.T + last.bias, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("projector", [{}, {"pixel_shuffle_factor": 2}, {"projector_type": "pool"}])
def test_the_weighted_sum_is_that_of_normed_layers(make_model, projector):
    """And it begins with all layers alike; scores and norms learn."""
    layers = {"vision_feature_layer": [0, -2, -1], "vision_layer_fusion": "weighted_sum"}
    model = make_model(**layers, **projector).double()
    fusion = model.model.projector.fusion
    assert torch.equal(fusion.layer_scores, torch.zeros(3).double())
    scores = np.array([0.3, -1.0, 2.0])
    with torch.no_grad():
        fusion.layer_scores.copy_(torch.from_numpy(scores))
        for norm in fusion.norms:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    features = torch.randn(2, 4, 96, dtype=torch.float64)
    expected = 0.0
    for index, norm in enumerate(fusion.norms):
        part = features.numpy()[..., 32 * index : 32 * (index + 1)]
        part = (part - part.mean(-1, keepdims=True)) / np.sqrt(part.var(-1, keepdims=True) + norm.eps)
        part = part * norm.weight.detach().numpy() + norm.bias.detach().numpy()
        expected = expected + np.exp(scores[index]) / np.exp(scores).sum() * part
    np.testing.assert_allclose(fusion(features).detach().numpy(), expected, atol=1e-12, rtol=1e-12)

    summed = make_model(**projector).double().model.projector
    summed.layers = model.model.projector.layers
    actual = model.model.projector(features)
    torch.testing.assert_close(actual, summed(torch.from_numpy(expected)), atol=1e-12, rtol=1e-12)
    actual.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in fusion.parameters())


def test_a_checkpoint_keeps_its_layers_and_one_without_says_nothing_of_them(
    make_model, checkpoint, processor, tmp_path
):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vision_feature_layer"] == -1 and "vision_layer_fusion" not in config
    assert not any("fusion" in name for name in make_model().state_dict())

    model = make_model(vision_feature_layer=[-3, -1], vision_layer_fusion="weighted_sum")
    with torch.no_grad():
        model.model.projector.fusion.layer_scores.copy_(torch.tensor([0.5, -0.5]))
    model.save_pretrained(tmp_path)
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (again.config.vision_feature_layer, again.config.vision_layer_fusion) == ([-3, -1], "weighted_sum")
    inputs = processor(images=Image.new("RGB", (9, 9), "red"), text="<image> One", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_weights_that_a_checkpoint_lacks_begin_as_in_a_new_model(checkpoint, tmp_path):
    """Not with what lies in memory, which a model has that is made without values and filled from a file."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    fields = {"vision_feature_layer": [-2, -1], "vision_layer_fusion": "weighted_sum"}
    fusion = AlignVLMForConditionalGeneration.from_pretrained(folder, **fields).model.projector.fusion
    assert torch.equal(fusion.layer_scores, torch.zeros(2))
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in fusion.norms)


def test_a_list_of_one_layer_is_that_layer(make_model):
    config = make_model(vision_feature_layer=[-2]).config
    assert config.vision_feature_layer == -2 and config.feature_size == 32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_feature_layer": []}, r"vision_feature_layer=\[\] must be a number, or a list of different ones"),
        ({"vision_feature_layer": [-1, -2, -1]}, r"=\[-1, -2, -1\] must be a number, or a list of different ones"),
        ({"vision_feature_layer": ["last"]}, r"=\['last'\] must be a number"),
        (
            {"vision_layer_fusion": "mean"},
            "Unknown vision_layer_fusion 'mean'. Valid values: concatenate, weighted_sum",
        ),
        ({"vision_layer_fusion": "weighted_sum"}, "adds up several layers, and vision_feature_layer=-1 names one"),
    ],
)
def test_layers_that_name_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AlignVLMConfig(**fields)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_out_of_range_is_named_with_the_range(make_model, layer):
    model = make_model(vision_feature_layer=[layer, -1])
    said = rf"vision_feature_layer={layer} cannot be had of the encoder 'siglip_vision_model': it has the layers -3 to 2; -1"
    with pytest.raises(ValueError, match=said):
        model.get_image_features(torch.randn(1, 3, 16, 16))
