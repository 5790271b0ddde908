"""A checkpoint with an encoder that takes images in their native shape: assembled, planned, trained, asked; what cannot be is said first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Siglip2Config, Siglip2Model, set_seed
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from alignvlm.data import signs
from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, parser
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.export.homes import HOMES, obstacles
from alignvlm.rows.tiles import grids_of
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.reward_arguments import WHOLE_IMAGES
from alignvlm.stages.stage import main
from alignvlm.stages.tiles import check_not_cut
from alignvlm.tools.demo_model import Decoding, DemoModel, Talk, heat_map
from alignvlm.tools.plan import ImageCost, plan_stages
from alignvlm.tools.report.masks import NATIVE as DRAWN
from alignvlm.tools.report.masks import mask_example
from hub_upload.card import _image_size
from hub_upload.run_record import read_run_record
from hub_upload.serving import check_for_vllm
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import TEXT, make_tokenizer
from tests.modeling_alignvlm.test_native_shapes import NATIVE
from tests.modeling_alignvlm.test_remote_code import run_child
from tests.modeling_alignvlm.test_tiles import picture
from tests.running import arguments_for, parse


SIGNS = [{"name": "scene_signs", "count": 12, "image_size": 40}, {"name": "scene_texts", "count": 4}]
FIELDS = {"sources": SIGNS, "projector_learning_rate": 1e-3, "vision_learning_rate": 1e-3, "max_steps": 2}


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


@pytest.fixture(scope="module")
def stages(stage0) -> list[list[str]]:
    """Arguments of two stages: one that trains the encoder, one with filled rows and an auxiliary loss."""
    one, two = (stage0.parent / name for name in ("one", "two"))
    filled = {
        "row_length": 200,
        "max_length": 200,
        "per_device_train_batch_size": 1,
        "embedding_loss": 0.1,
        "vision_learning_rate": None,
    }
    return [
        arguments_for(stage0, one, **FIELDS, activation_checkpointing=True),
        arguments_for(one, two, **{**FIELDS, **filled}),
    ]


@pytest.fixture(scope="module")
def trained(stages, stage0) -> Path:
    """The checkpoint behind both stages."""
    for given in stages:
        AcceleratorState._reset_state(reset_partial_state=True)
        main(given)
    AcceleratorState._reset_state(reset_partial_state=True)
    return stage0.parent / "two"


def test_the_plan_takes_native_shapes(stages):
    for plan in plan_stages(list(map(parse, stages)), processes=1, sample=3):
        assert plan.step_flops > 0 and plan.memory["activations"] > 0
        assert all(batch.images == batch.whole_images for batch in plan.batches)
        assert 3 <= plan.mixture.parts[0].image_tokens <= 2 * 6  # one or two rows a record, of at most 200 tokens


def test_stages_train_and_record_it(stage0, trained):
    entries = read_run_record(trained)["stages"]
    assert [entry["max_num_patches"] for entry in entries] == [24, 24]
    before, after = map(AlignVLMForConditionalGeneration.from_pretrained, (stage0, trained))
    patches = "vision_tower.embeddings.patch_embedding.weight"
    assert not torch.equal(after.model.get_parameter(patches), before.model.get_parameter(patches))


def test_an_evaluation_in_batches_is_that_of_one_image_at_a_time(trained, tmp_path):
    signs.make_signs(5, "test", image_size=40).to_parquet(tmp_path / "test.parquet")
    given = [str(trained), "--task", "scene_signs", "--data", str(tmp_path / "test.parquet"), "--use_cpu"]
    given += ["--max_new_tokens", "4", "--bootstrap_samples", "5", "--dtype", "fp32"]
    found = []
    for size in ("1", "5"):
        more = ["--output_dir", str(tmp_path / size), "--batch_size", size]
        result = evaluate_checkpoint(parser().parse_args([*given, *more]))
        assert result["max_num_patches"] == 24 and result["data"]["images"] == 5
        found.append([(each["prompt"], each["prediction"]) for each in result["predictions"]])
    assert found[0] == found[1] and len(found[0]) > 5


FROM_THE_FOLDER = """
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages[0]["content"].insert(0, {"type": "image", "image": picture.rotate(90, expand=True)})
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save((dict(inputs), model(**inputs).logits), f"{workdir}/found.pt")
"""


@pytest.mark.slow
def test_the_folder_itself_takes_native_shapes(trained, tmp_path):
    """In a process that cannot import this package, with the processor's inputs and the model's logits of this one."""
    Image.fromarray(np.asarray(picture((20, 12)))).save(tmp_path / "picture.png")
    run_child(FROM_THE_FOLDER, trained, tmp_path)
    inputs, logits = torch.load(tmp_path / "found.pt")
    shapes = inputs["spatial_shapes"].tolist()
    assert len(shapes) == 2 and shapes[0] == shapes[1][::-1] != shapes[1]
    model = AlignVLMForConditionalGeneration.from_pretrained(trained)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_the_demo_answers_and_draws_each_image_in_its_shape(trained):
    model, processor, _ = load_checkpoint(str(trained), torch.device("cpu"), dtype="fp32")
    demo, images = DemoModel("native", model, processor, "fp32", tag=""), [picture((60, 10)), picture((20, 40))]
    talk = Talk(("wide.png", "tall.png")).with_user("What?")
    pieces = list(demo.stream(talk, images, Decoding("image", max_new_tokens=4)))
    assert pieces[-1] == answer(model, processor, [images], [["What?"]], max_new_tokens=4)[0][0]
    looked = demo.look(talk, images, "a circle", "image")
    assert looked.grids == grids_of(processor, images) and len(set(looked.grids)) == 2
    values = torch.zeros_like(looked.of_word(0))
    for image, (rows, columns) in enumerate(looked.grids):
        values[image, :rows, :columns] = 1
    drawn = np.asarray(heat_map(images, values, looked.grids))
    wide, tall = (np.asarray(heat_map([image], torch.ones(1, *grid))) for image, grid in zip(images, looked.grids))
    assert np.array_equal(drawn[: wide.shape[0], : wide.shape[1]], wide)  # the margins of smaller grids are not drawn
    assert np.array_equal(drawn[:, -tall.shape[1] :], tall)


def test_what_has_no_place_for_native_shapes_says_so(trained):
    config, processor = AlignVLMConfig.from_pretrained(trained), AlignVLMProcessor.from_pretrained(trained)
    for home in HOMES:
        assert any("native shape" in obstacle.reason for obstacle in obstacles(config, home, processor)), home
    with pytest.raises(ValueError, match="not tried with images in their native shape"):
        check_for_vllm(trained)
    with pytest.raises(ValueError, match="stage 5 shows complete images, and Siglip2ImageProcessor"):
        check_not_cut(processor, WHOLE_IMAGES)


def test_drawn_masks_show_an_image_of_several_rows(stage0):
    config, processor = AlignVLMConfig.from_pretrained(stage0), AlignVLMProcessor.from_pretrained(stage0)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    example = mask_example(processor, config, Conversation([{"role": "user", "content": content}], ["A"]), [])
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
