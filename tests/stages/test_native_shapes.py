"""A checkpoint with an encoder that takes images in their native shape: assembled, planned, trained, asked; what cannot be is said first."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Siglip2Config, Siglip2Model, set_seed
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.export.homes import HOMES, obstacles
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.stage import main
from alignvlm.tools.plan import ImageCost, plan_stages
from alignvlm.tools.report.masks import NATIVE as DRAWN
from alignvlm.tools.report.masks import mask_example
from hub_upload.card import _image_size
from hub_upload.run_record import read_run_record
from hub_upload.serving import check_for_vllm
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import TEXT, make_tokenizer
from tests.modeling_alignvlm.test_native_shapes import NATIVE
from tests.modeling_alignvlm.test_tiles import picture
from tests.running import arguments_for


SIGNS = [{"name": "scene_signs", "count": 12, "image_size": 40}, {"name": "scene_texts", "count": 4}]
FIELDS = {"sources": SIGNS, "projector_learning_rate": 1e-3, "vision_learning_rate": 1e-3, "max_steps": 2}


def parse(given: list[str]) -> StageArguments:
    from trl import TrlParser

    return TrlParser(StageArguments).parse_args_and_config(given)[0]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[str, str]:
    """Folders of a SigLIP 2 model with its text half, as on the Hub, and of a language model."""
    folder = tmp_path_factory.mktemp("backbones")
    set_seed(2)
    vision = {name: value for name, value in NATIVE.items() if name != "model_type"}
    words = {name: vision[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text = {**words, "num_attention_heads": 2, "vocab_size": 20, "projection_size": 32}
    Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)).save_pretrained(folder / "siglip2")
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(folder / "siglip2")
    tokenizer = make_tokenizer(())
    config = {name: value for name, value in TEXT.items() if name != "model_type"}
    Qwen2ForCausalLM(Qwen2Config(**config, vocab_size=len(tokenizer))).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return str(folder / "siglip2"), str(folder / "language")


@pytest.fixture(scope="module")
def stage0(backbones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "stage0"
    assemble(BackboneArguments(*backbones, str(folder), pixel_shuffle_factor=2, max_num_patches=24))
    return folder


def test_an_assembled_checkpoint_takes_native_shapes(backbones, stage0):
    model, processor, _ = load_checkpoint(str(stage0), torch.device("cpu"))
    config = json.loads((stage0 / "config.json").read_text())
    assert config["max_num_patches"] == 24 and config["vision_hidden_size"] == 32
    assert "image_seq_length" not in config and config["image_size"] is None and config["image_grid"] is None
    assert processor.native_shapes and processor.image_seq_length == model.config.image_seq_length == 6
    assert (processor.image_processor.max_num_patches, processor.pixel_shuffle_factor) == (24, 2)
    inputs = processor.process_images([picture((60, 10)), picture((20, 20))], return_tensors="pt")
    shapes = inputs["spatial_shapes"]
    encoder = Siglip2Model.from_pretrained(backbones[0]).vision_model.eval()
    mask = torch.arange(24) < shapes.prod(-1, keepdim=True)
    with torch.no_grad():
        alone = encoder(inputs["pixel_values"], mask, shapes).last_hidden_state
        found = model.model.encode_images(inputs["pixel_values"], shapes)
    assert found.shape == (1, int(mask.sum()), 32)
    for own, of_image, (rows, columns) in zip(
        found[0].split(shapes.prod(-1).tolist()), alone, shapes.tolist(), strict=True
    ):
        squares = own.unflatten(0, (rows // 2, columns // 2, 2, 2)).transpose(1, 2).reshape(rows * columns, 32)
        torch.testing.assert_close(squares, of_image[: rows * columns])
    assert "16 x 16" not in _image_size(config) and _image_size(config) == "no more than 24 patches of 4 x 4"


def test_stages_and_their_plan_take_native_shapes(stage0, tmp_path):
    first = arguments_for(stage0, tmp_path / "one", **FIELDS)
    filled = {
        "row_length": 200,
        "max_length": 200,
        "per_device_train_batch_size": 1,
        "embedding_loss": 0.1,
        "vision_learning_rate": None,
    }
    second = arguments_for(tmp_path / "one", tmp_path / "two", **{**FIELDS, **filled})
    plans = plan_stages(list(map(parse, (first, second))), processes=1, sample=3)
    for plan in plans:
        assert plan.step_flops > 0 and plan.memory["activations"] > 0
        assert all(batch.images == batch.whole_images for batch in plan.batches)
        assert 3 <= plan.mixture.parts[0].image_tokens <= 6
    for given in (first, second):
        main(given)
    entries = read_run_record(tmp_path / "two")["stages"]
    assert [entry["max_num_patches"] for entry in entries] == [24, 24]
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "two")
    processor = AlignVLMProcessor.from_pretrained(tmp_path / "two")
    assert answer(model, processor, [picture((60, 10))], [["What?"]], max_new_tokens=2)
    before = AlignVLMForConditionalGeneration.from_pretrained(stage0)
    patches = "vision_tower.embeddings.patch_embedding.weight"
    assert not torch.equal(model.model.get_parameter(patches), before.model.get_parameter(patches))
    for home in HOMES:
        assert any("native shape" in obstacle.reason for obstacle in obstacles(model.config, home, processor)), home
    with pytest.raises(ValueError, match="not tried with images in their native shape"):
        check_for_vllm(tmp_path / "two")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    example = mask_example(processor, model.config, Conversation([{"role": "user", "content": content}], ["A"]), [])
    drawn = [token.text for token in example.tokens if token.group == "image"]
    rows, columns = DRAWN
    assert drawn == [f"row {r + 1}, column {c + 1}" for r in range(rows) for c in range(columns)]


def test_the_plan_counts_what_the_encoder_computes(stage0):
    model = AlignVLMForConditionalGeneration.from_pretrained(stage0, attn_implementation="eager").eval()
    processor = AlignVLMProcessor.from_pretrained(stage0)
    inputs = processor.process_images([picture((60, 10))], return_tensors="pt")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.encode_images(inputs["pixel_values"], inputs["spatial_shapes"])
    assert ImageCost.of(model.config).flops == counter.get_total_flops()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"max_tiles": 4}, "max_tiles=4 cuts images into squares"),
        ({"merge_image_tokens": 2}, "merge_image_tokens=2 leaves every image as many tokens"),
        ({"cache_features": True, "vision_learning_rate": None}, "cache_features keeps one feature map an image, and"),
        ({"projector_start": "least_squares"}, "projector_start takes images of as many tokens each, and"),
        ({"max_length": 5}, "max_length=5 leaves no room"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_runs(stage0, tmp_path, fields, sentence):
    given = arguments_for(stage0, tmp_path / "run", **{**FIELDS, **fields})
    for start in (main, lambda given: plan_stages([parse(given)], processes=1, sample=2)):
        with pytest.raises((ValueError, SystemExit), match=sentence):
            start(given)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"image_size": 32}, "image_size=32 is the side of a square"),
        ({"max_tiles": 2}, "max_tiles=2 cuts images into squares"),
        ({"merge_image_tokens": 2}, "merge_image_tokens=2 leaves every image as many tokens"),
        ({"pixel_shuffle_factor": 5}, "max_num_patches=16 must be a number of patches"),
    ],
    ids=str,
)
def test_what_cannot_be_assembled_is_refused(backbones, tmp_path, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        assemble(BackboneArguments(*backbones, str(tmp_path / "stage0"), **fields))
    assert not (tmp_path / "stage0").exists()


def test_other_encoders_and_image_processors_are_refused(backbones, vision, tmp_path):
    folder = str(tmp_path / "stage0")
    with pytest.raises(ValueError, match="max_num_patches=24 is for encoders that take images in their native shape"):
        assemble(BackboneArguments(vision, backbones[1], folder, max_num_patches=24))
    Siglip2Model.from_pretrained(backbones[0]).save_pretrained(tmp_path / "other")
    Siglip2ImageProcessorPil(patch_size=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"patch_size=8\) does not make the patches"):
        assemble(BackboneArguments(str(tmp_path / "other"), backbones[1], folder))
