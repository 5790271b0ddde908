"""Assembling a stage-0 checkpoint: weights kept, image token added, other architectures refused in words."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.evaluation.load import load_checkpoint
from alignvlm.stages import stage
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.chat_templates import CHATML_TEMPLATE
from alignvlm.tools import plan, show_data
from hub_upload.run_record import write_run_record
from modeling_alignvlm import MASK_TYPES, AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import make_tokenizer
from tests.running import arguments_for, parse
from tests.stages.conftest import SIZES


@pytest.fixture(scope="module")
def text_tokenizer():
    """A tokenizer as a language model has it: with chat tokens, without an image token."""
    return make_tokenizer(("<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="module")
def language(tmp_path_factory, text_tokenizer):
    folder = tmp_path_factory.mktemp("language")
    set_seed(1)
    config = LlamaConfig(**SIZES, vocab_size=len(text_tokenizer), num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_any_mask_type_can_be_assembled(vision, language, tmp_path, mask_type):
    model, _ = assemble(BackboneArguments(vision, str(language), str(tmp_path), attention_mask_type=mask_type))
    assert model.config.attention_mask_type == mask_type
    assert AlignVLMForConditionalGeneration.from_pretrained(tmp_path).config.attention_mask_type == mask_type


@pytest.mark.parametrize("program", ["a stage", "data", "plan", "ask", "keep_language_from"])
def test_a_backbone_is_not_taken_for_a_checkpoint(checkpoint, vision, language, tmp_path, program):
    rates = {"projector_learning_rate": 1e-3, "language_learning_rate": 1e-3}
    given = arguments_for(language, tmp_path / "run", **rates)
    kept = arguments_for(checkpoint, tmp_path / "run", **rates, keep_language=0.5, keep_language_from=str(vision))
    call = {
        "a stage": lambda: stage.main(given),
        "data": lambda: show_data.main(given),
        "plan": lambda: plan.plan_stages([parse(given)], processes=1),
        "ask": lambda: load_checkpoint(str(language), torch.device("cpu")),
        "keep_language_from": lambda: stage.main(kept),
    }[program]
    kind = "siglip_vision_model" if program == "keep_language_from" else "llama"
    with pytest.raises(
        ValueError, match=f"is no checkpoint .* but a model of type '{kind}'. `alignvlm assemble` makes"
    ):
        call()


def test_a_model_that_is_there_is_not_written_over(vision, language, tmp_path):
    with pytest.raises(ValueError, match=r"holds a model of type .* Name another folder"):
        assemble(BackboneArguments(vision, str(language), str(language)))
    write_run_record(tmp_path, {"backbones": {}, "stages": [{"stage": 3}]})
    with pytest.raises(ValueError, match="holds a model that stage 3 has trained"):
        assemble(BackboneArguments(vision, str(language), str(tmp_path)))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"vision_layer_fusion": "sum"},
            r"Unknown vision_layer_fusion 'sum'\. Valid values: concatenate, weighted_sum",
        ),
        ({"vision_layer_fusion": "weighted_sum"}, r"vision_feature_layer=\[-1\] names one"),
        (
            {"vision_feature_layer": [-1, -1]},
            r"vision_feature_layer=\[-1, -1\] must be a number, or a list of different",
        ),
        ({"attention_mask_type": "imag"}, "Unknown attention_mask_type 'imag'"),
        ({"projector_type": "mpl"}, "Unknown projector_type 'mpl'"),
        ({"tile_marks": True}, "tile_marks=True is for images that are cut into tiles"),
        ({"image_block": "tile", "max_tiles": 1}, "image_block='tile' is for images that are cut into tiles"),
        ({"merge_image_tokens": 5}, "merge_image_tokens=5 must be from 1 to 4"),
        ({"pixel_shuffle_factor": 3}, "must be at least 1 and divide the feature grid of 2 x 2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_backbones_are_loaded(vision, language, tmp_path, monkeypatch, fields, message):
    """What depends on the encoder, before the language model."""
    counted = {"merge_image_tokens", "pixel_shuffle_factor"} & {*fields}
    loads = "AutoModelForCausalLM.from_pretrained" if counted else "check_model"
    monkeypatch.setattr(f"alignvlm.stages.backbones.{loads}", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        assemble(BackboneArguments(vision, str(language), str(tmp_path / "stage0"), **fields))
    assert not (tmp_path / "stage0").exists()


@pytest.mark.parametrize("count", [0, 3])
def test_no_tokens_are_merged_where_none_shall_be_left(vision, language, tmp_path, count):
    model, processor = assemble(BackboneArguments(vision, str(language), str(tmp_path), merge_image_tokens=count))
    assert model.config.merge_image_tokens == (count or None)
    assert processor.image_seq_length == (count or 4)


def test_both_backbones_are_kept_as_they_are(vision, language, tmp_path):
    model, processor = assemble(BackboneArguments(vision, str(language), str(tmp_path)))
    encoder = SiglipVisionModel.from_pretrained(vision).state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    alone = AutoModelForCausalLM.from_pretrained(language)
    input_ids = AutoTokenizer.from_pretrained(language)("What colour is the circle?", return_tensors="pt")["input_ids"]
    reloaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = reloaded(input_ids=input_ids).logits[..., : alone.config.vocab_size]
        torch.testing.assert_close(logits, alone(input_ids=input_ids).logits, atol=1e-6, rtol=1e-6)
    again = AlignVLMProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template == CHATML_TEMPLATE  # the tokenizer has chat tokens
    assert reloaded.config.image_token_id == again.image_token_id
    assert again.tokenizer.convert_tokens_to_ids("<|im_end|>") in reloaded.generation_config.eos_token_id


def test_chatml_prompts_read_as_chatml(vision, language, tmp_path):
    _, processor = assemble(BackboneArguments(vision, str(language), str(tmp_path)))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    messages.append({"role": "assistant", "content": "That."})
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
    )


def test_tokens_around_images_are_single_and_the_usual_ones_with_pool(vision, language, tmp_path):
    def begins(name: str, **fields) -> str:
        _, processor = assemble(BackboneArguments(vision, str(language), str(tmp_path / name), **fields))
        processor = AlignVLMProcessor.from_pretrained(tmp_path / name)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        ids = processor.tokenizer(processor.apply_chat_template(messages))["input_ids"]
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        around = [token for token in tokens if token.startswith("<") and not token.startswith("<|")]
        return "".join(around)

    assert begins("pool", projector_type="pool") == "<start_of_image><image><end_of_image>"
    assert begins("mlp") == begins("none", projector_type="pool", image_begin="", image_end="") == "<image>"
    assert begins("one", image_begin="<look>") == "<look><image>"
    for name, token in (("image_begin", "<image>"), ("image_end", "two words"), ("image_end", " x")):
        with pytest.raises(ValueError, match=f"{name}={token!r} cannot be the token around an image"):
            BackboneArguments(vision, str(language), str(tmp_path), **{name: token})


def test_images_are_resized_as_asked_for(vision, language, tmp_path):
    photo = Image.effect_noise((37, 23), 80).convert("RGB")
    found = {}
    for name in (None, "bilinear", "bicubic"):
        folder = tmp_path / str(name)
        assemble(BackboneArguments(vision, str(language), str(folder), image_resample=name))
        images = AlignVLMProcessor.from_pretrained(folder).image_processor
        side = images.size["height"]
        found[name] = images(photo, return_tensors="pt")["pixel_values"][0]
        if name is not None:
            resized = np.asarray(photo.resize((side, side), Image.Resampling[name.upper()]), np.float32)
            expected = torch.tensor(resized).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
    assert torch.equal(found[None], found["bicubic"]) and not torch.equal(found["bilinear"], found["bicubic"])
    with pytest.raises(ValueError, match=r"image_resample='cubic' is unknown\. Known: bilinear, bicubic, lanczos"):
        BackboneArguments(vision, str(language), str(tmp_path), image_resample="cubic")


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_vision_half_of_an_image_text_model_is_taken(kind, language, tmp_path):
    vision_config = {**SIZES, "image_size": 16, "patch_size": 8}
    text_config = {**SIZES, "vocab_size": 50, "projection_dim": 32}
    config_class, model_class = {"siglip": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}[kind]
    whole = model_class(config_class(vision_config=vision_config, text_config=text_config)).eval()
    whole.save_pretrained(tmp_path / "both")
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "both")
    model, _ = assemble(BackboneArguments(str(tmp_path / "both"), str(language), str(tmp_path / "stage0")))
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = whole.vision_model(pixels).last_hidden_state[:, -4:]
        torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected)


def test_a_head_that_is_more_than_a_product_is_noticed(vision, text_tokenizer, tmp_path):
    phi = PhiForCausalLM(PhiConfig(**SIZES, vocab_size=len(text_tokenizer)))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.save_pretrained(tmp_path)
    text_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its head does more than a matrix product"):
        assemble(BackboneArguments(vision, str(tmp_path), str(tmp_path / "stage0")))


def test_really_pretrained_weights(vision, shared_data, tmp_path):
    """The stories model keeps telling stories."""
    stories = shared_data / "weights/stories260k"
    model, processor = assemble(BackboneArguments(vision, str(stories), str(tmp_path)))
    alone, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = tokenizer.decode(alone.generate(**inputs, **options)[0])
    assert processor.tokenizer.decode(model.generate(**inputs, **options)[0]) == expected and "there was a" in expected


def test_a_really_pretrained_encoder_of_feature_maps(shared_data, tmp_path):
    """MobileNetV2 at 224 pixels: 7 x 7 places, in rows, each with the channels the classifier was trained on."""
    mobilenet, stories = (str(shared_data / "weights" / name) for name in ("mobilenet_v2_1.0_224", "stories260k"))
    assemble(BackboneArguments(mobilenet, stories, str(tmp_path)))
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    processor = AlignVLMProcessor.from_pretrained(tmp_path)
    assert (model.config.image_grid, model.config.image_size) == ([7, 7], [224, 224])
    assert processor.image_seq_length == model.config.image_seq_length == 49
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    batch = processor(images=picture, text="<image> Once upon a time", return_tensors="pt")
    with torch.no_grad():
        alone = AutoModel.from_pretrained(mobilenet)(batch["pixel_values"]).last_hidden_state
        features = model.get_image_features(batch["pixel_values"]).last_hidden_state
        for place in (0, 8, 48):
            torch.testing.assert_close(features[0, place], alone[0, :, place // 7, place % 7])
    answer = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] == batch["input_ids"].shape[1] + 5
