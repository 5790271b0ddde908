"""Encoders of every kind: what they make of an image is measured, and kept in the checkpoint; what cannot be used is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EfficientNetConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.backbones import main as assemble_main
from alignvlm.stages.encoder_measure import measure_encoder, without_timm
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.plan import plan_stages
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import make_tokenizer
from tests.running import arguments_for


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# kind: (config, side of the processor's pictures, grid, width)
ENCODERS = {
    "siglip": (SiglipVisionConfig(**SIZES, image_size=32, patch_size=8), 32, [4, 4], 32),
    "clip": (CLIPVisionConfig(**SIZES, image_size=32, patch_size=8), 32, [4, 4], 32),
    "vit": (ViTConfig(**SIZES, image_size=32, patch_size=8), 32, [4, 4], 32),
    "dinov2 of another size": (Dinov2Config(**SIZES, image_size=56, patch_size=8), 32, [4, 4], 32),
    "2 x 2 places, 5 tokens before": (
        Dinov2WithRegistersConfig(**SIZES, image_size=16, patch_size=8, num_register_tokens=4),
        16,
        [2, 2],
        32,
    ),
    "swin": (SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1]), 64, [8, 8], 16),
    "mobilenet_v2": (MobileNetV2Config(depth_multiplier=0.25, finegrained_output=False), 64, [2, 2], 320),
    "convnext": (ConvNextConfig(hidden_sizes=[4, 8, 16, 24], depths=[1, 1, 1, 1]), 64, [2, 2], 24),
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        32,
        [4, 4],
        16,
    ),
    "efficientnet": (
        EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128),
        64,
        [2, 2],
        128,
    ),
}
MAPS = ("mobilenet_v2", "convnext", "resnet", "efficientnet")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    tokenizer = make_tokenizer(())
    set_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoder(folder: Path, config, processor) -> str:
    set_seed(2)
    AutoModel.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def square(side: int) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": side, "width": side})


@pytest.fixture(scope="module")
def assembled(tmp_path_factory, language):
    """A function that assembles an encoder of `ENCODERS`, once; returns its folder and the checkpoint's."""
    made = {}

    def make(kind: str) -> tuple[str, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("encoder")
            config, side, _, _ = ENCODERS[kind]
            encoder = save_encoder(folder / "encoder", config, square(side))
            assemble(BackboneArguments(encoder, language, str(folder / "stage0"), projector_type="linear"))
            made[kind] = encoder, folder / "stage0"
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_checkpoint_holds_what_was_measured(assembled, kind):
    encoder, folder = assembled(kind)
    _, side, grid, width = ENCODERS[kind]
    model = AlignVLMForConditionalGeneration.from_pretrained(folder).eval()
    processor = AlignVLMProcessor.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_grid"], config["image_size"], config["vision_hidden_size"]) == (grid, [side, side], width)
    assert processor.image_seq_length == grid[0] * grid[1]
    pictures = [Image.new("RGB", size, "red") for size in ((40, 90), (90, 40))]
    batch = processor(images=pictures, text=["<image> One"] * 2, return_tensors="pt")
    with torch.no_grad():
        alone = AutoModel.from_pretrained(encoder).eval()(batch["pixel_values"]).last_hidden_state
        features = model.get_image_features(batch["pixel_values"]).last_hidden_state
        assert model(**batch).logits.isfinite().all()
    if kind in MAPS:
        rows, columns = grid
        expected = [alone[:, :, row, column] for row in range(rows) for column in range(columns)]
        assert torch.equal(features, torch.stack(expected, dim=1))
    else:
        assert torch.equal(features, alone[:, -grid[0] * grid[1] :])
    again = AlignVLMConfig.from_dict(model.config.to_dict())
    assert again.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_stages_and_their_plan_take_any_encoder(assembled, tmp_path, kind):
    """And a stage leaves the statistics of a frozen encoder's batch norms as they are."""
    from trl import TrlParser

    _, folder = assembled(kind)
    given = arguments_for(folder, tmp_path / "run", projector_learning_rate=1e-3)
    (plan,) = plan_stages(list(TrlParser(StageArguments).parse_args_and_config(given)), processes=1)
    assert plan.memory["activations"] > 0 and plan.step_flops > 0
    run_stage(given)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run"))
    for name, value in before.items():
        assert torch.equal(after[name], value) == (".projector." not in name), name


def test_a_pooling_projector_trains_and_stands_in_the_card(language, tmp_path):
    encoder = save_encoder(tmp_path / "encoder", ENCODERS["siglip"][0], square(ENCODERS["siglip"][1]))
    fields = {"projector_type": "pool", "pixel_shuffle_factor": 2}
    assemble(BackboneArguments(encoder, language, str(tmp_path / "stage0"), **fields))
    run_stage(arguments_for(tmp_path / "stage0", tmp_path / "run", projector_learning_rate=1e-3, max_steps=2))
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("stage0", "run"))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {f"model.projector.layers.{layer}.weight" for layer in (0, 1)}
    assert "and a pooling projector" in (tmp_path / "run/README.md").read_text()


def test_batch_norms_in_training_are_those_of_inference(assembled):
    _, folder = assembled("resnet")
    model = AlignVLMForConditionalGeneration.from_pretrained(folder)
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval().get_image_features(pixel_values).last_hidden_state
        assert torch.equal(model.train().get_image_features(pixel_values).last_hidden_state, expected)
    assert model.training and model.model.vision_tower.training


def test_text_alone_trains_with_an_encoder_without_image_size(assembled):
    """The blank image that keeps the encoder in the graph has the measured size."""
    _, folder = assembled("resnet")
    model = AlignVLMForConditionalGeneration.from_pretrained(folder).train()
    input_ids = torch.arange(5, 11)[None]
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert next(model.model.projector.parameters()).grad is not None


def test_a_grid_that_is_not_square_is_merged_in_squares(language, tmp_path):
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 64})
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    encoder = save_encoder(tmp_path / "encoder", config, processor)
    arguments = BackboneArguments(encoder, language, str(tmp_path / "stage0"), pixel_shuffle_factor=2)
    model, _ = assemble(arguments)
    assert model.config.feature_grid == (4, 8) and model.config.image_seq_length == 8
    places = torch.arange(32.0).reshape(1, 32, 1)
    merged = model.model.projector.pixel_shuffle(places)
    assert merged[0, 0].tolist() == [0, 1, 8, 9] and merged[0, 5].tolist() == [18, 19, 26, 27]
    arguments.pixel_shuffle_factor = 3
    with pytest.raises(ValueError, match="divide the feature grid of 4 x 8"):
        assemble(arguments)


@pytest.mark.parametrize(
    "config, processor, message",
    [
        (
            SiglipVisionConfig(**SIZES, image_size=16, patch_size=8),
            square(32),
            "does not take what its image processor makes, pixel values of 32 x 32: .*try --image_size 16",
        ),
        (
            CLIPVisionConfig(**SIZES, image_size=32, patch_size=8),
            CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
            "different sizes: 240 x 320 becomes 32 x 42, 320 x 240 becomes 42 x 32, .*--image_size",
        ),
        (
            ViTMAEConfig(**SIZES, image_size=32, patch_size=8),
            square(32),
            "other features of the same picture each time, as ViT-MAE does",
        ),
        (
            CONFIG_MAPPING["sam2_vision_model"](),
            square(64),
            r"maps of shape \(3, 2, 2, 768\), which are not \(images, hidden, height, width\)",
        ),
    ],
    ids=["siglip", "clip", "vit_mae", "channels last"],
)
def test_what_gives_no_fixed_places_is_refused(language, tmp_path, config, processor, message):
    encoder = save_encoder(tmp_path / "encoder", config, processor)
    with pytest.raises(ValueError, match=message):
        assemble(BackboneArguments(encoder, language, str(tmp_path / "stage0")))


@pytest.mark.parametrize("kind, layers", [("siglip", [-3, -1]), ("dinov2 of another size", [1, 2])])
def test_several_layers_are_assembled_from_one_option(language, tmp_path, kind, layers):
    encoder = save_encoder(tmp_path / "encoder", ENCODERS[kind][0], square(ENCODERS[kind][1]))
    given = ["--vision", encoder, "--language", language, "--output_dir", str(tmp_path / "stage0")]
    given += ["--vision_feature_layer", *map(str, layers), "--vision_layer_fusion", "weighted_sum"]
    assemble_main(given)
    config = AlignVLMConfig.from_pretrained(tmp_path / "stage0")
    assert (config.vision_feature_layer, config.vision_hidden_size, config.feature_size) == (layers, 32, 64)
    assert config.vision_layer_fusion == "weighted_sum" and config.feature_grid == (4, 4)


def test_calibration_is_tried_when_a_checkpoint_is_assembled(language, tmp_path):
    encoder = save_encoder(tmp_path / "encoder", ENCODERS["siglip"][0], square(ENCODERS["siglip"][1]))
    fields = {"modality_calibration": True, "merge_image_tokens": 5}
    model, processor = assemble(BackboneArguments(encoder, language, str(tmp_path / "stage0"), **fields))
    assert not any(
        parameter.any() for parameter in model.model.projector.calibrations.parameters()
    )  # the trial left nothing
    assert model.config.image_seq_length == processor.image_seq_length == 5

    tokenizer = make_tokenizer(())
    config = CONFIG_MAPPING["gpt_neox_japanese"](
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    set_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deaf")
    tokenizer.save_pretrained(tmp_path / "deaf")
    with pytest.raises(
        ValueError, match=r"gpt_neox_japanese.* does not tell its layers where images are: .*Leave it out"
    ):
        assemble(BackboneArguments(encoder, str(tmp_path / "deaf"), str(tmp_path / "out"), modality_calibration=True))
    assert not (tmp_path / "out").exists()


class WithoutStates(torch.nn.Module):
    """An encoder of others that gives its final output alone, as many of timm do."""

    config = SiglipVisionConfig(**SIZES, image_size=32, patch_size=8)
    dtype = torch.float32

    def forward(self, pixel_values, output_hidden_states=False, return_dict=True):
        return BaseModelOutput(last_hidden_state=pixel_values.flatten(2)[..., :16].transpose(1, 2))


@pytest.mark.parametrize(
    "kind, layers, message",
    [
        (
            "siglip",
            [-2, 3],
            r"vision_feature_layer=3 cannot be had of .*siglip_vision_model.*: it has the layers -3 to 2",
        ),
        (
            "clip",
            [-4],
            "vision_feature_layer=-4 cannot be had of .*: it has the layers -3 to 2; -1 is its final output",
        ),
        ("swin", [0, 1], r"vision_feature_layer=\[0, 1\] names layers of different shapes of .*0: \(3, 256, 8\), 1: "),
        ("mobilenet_v2", [-1, 0], r"=\[-1, 0\] names layers of different shapes of the encoder .*mobilenet_v2"),
        (
            None,
            [-2, -1],
            "vision_feature_layer=-2 cannot be had of .*: it returns no hidden states; -1 is its final output",
        ),
    ],
)
def test_layers_that_an_encoder_does_not_have_are_refused(kind, layers, message):
    config, side = ENCODERS[kind][:2] if kind else (None, 32)
    set_seed(2)
    encoder = AutoModel.from_config(config) if kind else WithoutStates()
    with pytest.raises(ValueError, match=message):
        measure_encoder("it", encoder, square(side), layers)


@pytest.mark.parametrize("crop", [False, True])
def test_image_size_mends_what_is_refused(language, tmp_path, crop):
    """With a crop the picture keeps its form, without one it is squeezed."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, do_center_crop=crop, crop_size={"height": 48, "width": 48}
    )
    config = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    encoder = save_encoder(tmp_path / "encoder", config, processor)
    assemble(BackboneArguments(encoder, language, str(tmp_path / "stage0"), image_size=32))
    processor = AlignVLMProcessor.from_pretrained(tmp_path / "stage0")
    picture = np.zeros((60, 120, 3), dtype=np.uint8)
    picture[:, :20] = 255  # cut off by a crop
    pixel_values = processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    assert (pixel_values.max() < 0) == crop


def test_checkpoints_of_format_1_load_unchanged(checkpoint, tmp_path, processor):
    """They tell the grid by the encoder's config, and have no field of what was measured."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    added = ("image_size", "image_grid", "vision_hidden_size", "supported_mask_types", "packing")
    old = {name: value for name, value in config.items() if name not in added} | {"format_version": 1}
    (folder / "config.json").write_text(json.dumps(old))
    batch = processor(images=Image.new("RGB", (9, 9), "red"), text="<image> One", return_tensors="pt")
    models = [AlignVLMForConditionalGeneration.from_pretrained(path).eval() for path in (checkpoint, folder)]
    with torch.no_grad():
        assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)
    assert models[1].config.image_seq_length == 4
    models[1].save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["format_version"] == 2
    again = AlignVLMConfig.from_pretrained(tmp_path / "new")
    assert again.to_dict() == AlignVLMConfig.from_pretrained(checkpoint).to_dict()


def test_a_config_that_tells_no_grid_is_refused():
    with pytest.raises(
        ValueError, match=r"'resnet' has no 'patch_size'. Give image_size, image_grid and vision_hidden"
    ):
        AlignVLMConfig(vision_config={"model_type": "resnet"})


def timm_processor(**data_config):
    """What `without_timm` reads of transformers' wrapper; the library itself needs torchvision, which has no build for a CPU alone."""
    config = {"input_size": (3, 56, 56), "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return type("TimmWrapperImageProcessor", (), {"data_config": {**config, **data_config}})()


@pytest.mark.parametrize("mode, shape", [("center", (80, 128)), ("center", (150, 100)), ("squash", (90, 37))])
def test_images_are_prepared_as_timm_does_for_evaluation(mode, shape):
    """The oracle are timm's transforms (`transforms_imagenet_eval`), written with Pillow."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    made = without_timm("it", timm_processor(crop_mode=mode, crop_pct=0.875))(picture, return_tensors="pt")
    width, height = picture.size
    if mode == "center":
        scale = 64 / min(width, height)
        size = (64, int(height * scale)) if width <= height else (int(width * scale), 64)
    else:
        size = (64, 64)
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 56) // 2, (size[1] - 56) // 2
    values = np.asarray(resized.crop((left, top, left + 56, top + 56)), dtype=np.float64) / 255
    expected = ((values - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]).transpose(2, 0, 1)
    np.testing.assert_allclose(made["pixel_values"][0], expected, atol=1e-5)


@pytest.mark.parametrize("config", [{"crop_mode": "border"}, {"interpolation": "random"}, {"input_size": (3, 56, 64)}])
def test_timm_transforms_that_transformers_lacks_are_refused(config):
    with pytest.raises(ValueError, match=r"'it' are prepared by timm with crop_mode=.* which no image processor of"):
        without_timm("it", timm_processor(**config))
