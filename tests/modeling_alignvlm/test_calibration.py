"""Scale and shift of image tokens behind each layer (MoCa): nothing at first, then what a plain loop over the layers computes."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alignvlm.evaluation.answer import answer
from alignvlm.export.homes import HOMES, obstacles
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.stage import main
from hub_upload.serving import check_for_vllm
from modeling_alignvlm import AlignVLMForConditionalGeneration, dense_mask
from modeling_alignvlm.masking_alignvlm import TokenLayout
from tests.records import of_exchanges
from tests.running import arguments_for, recompute_activations


IMAGE = Image.new("RGB", (16, 16), (200, 30, 60))


@pytest.fixture
def calibrated(make_model):
    """A function that makes a model whose calibrations have learned something."""

    def make(*args, **values):
        model = make_model(*args, modality_calibration=True, **values)
        with torch.no_grad():
            for parameter in model.model.projector.calibrations.parameters():
                parameter.normal_(std=0.5)
        return model

    return make


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_it_begins_as_nothing_bit_for_bit(make_model, processor, kernel):
    off, on = make_model(attn_implementation=kernel), make_model(attn_implementation=kernel, modality_calibration=True)
    on.load_state_dict(off.state_dict(), strict=False)
    batch = processor(images=[IMAGE], text="<image> One", return_tensors="pt")
    assert torch.equal(on(**batch).logits, off(**batch).logits)
    more = on.state_dict().keys() - off.state_dict().keys()
    assert more == {f"model.projector.calibrations.{i}.{kind}" for i in (0, 1) for kind in ("scale", "shift")}
    assert "modality_calibration" not in off.config.to_dict() and on.config.to_dict()["modality_calibration"]


def test_pefts_copy_of_the_projector_calibrates(make_model, processor, tmp_path):
    """PEFT trains a copy of the projector, whose calibrations were neither trained nor applied."""
    peft = pytest.importorskip("peft")
    batch = processor(images=[IMAGE], text="<image> One two", return_tensors="pt")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["projector"])
    model = peft.get_peft_model(make_model(modality_calibration=True), lora)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if "modules_to_save.default.calibrations" in name}
    assert len(trained) == 4 and all(parameter.grad is not None for parameter in trained.values())
    with torch.no_grad():
        before = model(**batch).logits
        for parameter in trained.values():
            parameter.fill_(3.0)
        after = model(**batch).logits
        assert (after - before).abs().max() > 1e-3
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, after, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path)
        loaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, after, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_of_the_model_calibrates_by_its_own(calibrated, processor):
    batch = processor(images=[IMAGE], text="<image> One", return_tensors="pt")
    model = calibrated()
    other, expected = copy.deepcopy(model), model(**batch).logits
    for parameter in model.model.projector.calibrations.parameters():
        parameter.fill_(3.0)
    assert torch.equal(other(**batch).logits, expected) and not torch.equal(model(**batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("mask_type", ["causal", "image"])
def test_it_is_a_scale_and_a_shift_behind_every_layer(calibrated, processor, mask_type):
    model = calibrated(mask_type).double()
    batch = processor(images=[IMAGE], text="Look: <image> One", return_tensors="pt")
    is_image = batch["input_ids"] == model.config.image_token_id
    hidden = model.get_input_embeddings()(batch["input_ids"])
    hidden[is_image] = model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1)
    embeddings = hidden.clone()
    language, positions = model.model.language_model, torch.arange(hidden.shape[1])[None]
    mask = dense_mask(TokenLayout.from_image_mask(is_image, 4), mask_type)
    for layer, calibration in zip(language.layers, model.model.projector.calibrations, strict=True):
        rotary = language.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden[is_image] = hidden[is_image] * (1 + calibration.scale) + calibration.shift
    logits = model(**batch).logits
    torch.testing.assert_close(logits, model.lm_head(language.norm(hidden)), atol=1e-10, rtol=1e-10)
    for known in (
        {"image_ids": is_image.long() - 1},
        {"mm_token_type_ids": is_image.long()},
    ):  # as evaluation and vLLM tell it
        torch.testing.assert_close(model(inputs_embeds=embeddings, **known).logits, logits, atol=1e-10, rtol=1e-10)

    text = processor(text="No image", return_tensors="pt")
    expected = model.lm_head(language(**text).last_hidden_state)
    assert torch.equal(model(**text).logits, expected)


@torch.no_grad()
def test_generation_with_a_cache_gives_the_logits_of_one_without(calibrated, processor):
    model = calibrated()
    batch = processor(
        images=[IMAGE, IMAGE], text=["<image> One", "And <image> two"], padding=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-3, rtol=1e-3)
    prompts = ["What is it?", "Which colour?"]
    alone = [answer(model, processor, [[IMAGE]], [[text]], max_new_tokens=4)[0][0] for text in prompts]
    assert answer(model, processor, [[IMAGE]], [prompts], max_new_tokens=4) == [alone]  # from one prefilled trunk


def test_packed_rows_and_recomputed_activations_give_the_same_gradients(calibrated, processor):
    records = [of_exchanges([IMAGE], [("What is it?", "A red square."), ("Which colour?", "Red.")])]
    records.append(of_exchanges([], [("Say something.", "Fine.")]))
    found = []
    for shared_image, recompute in ((True, False), (False, False), (True, True)):
        model = calibrated().double().train()
        if recompute:
            recompute_activations(model)
        batch = AlignVLMCollator(processor, mask_type="image", shared_image=shared_image)(records)
        batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        loss = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum(), use_cache=False).loss
        loss.backward()
        found.append((loss, [parameter.grad for parameter in model.model.projector.parameters()]))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-6, rtol=1e-4)  # the loss takes logits in float32
    assert model.model.projector.calibrations[0].scale.grad.abs().max() > 0


def test_a_batch_without_images_leaves_no_weight_without_a_gradient(calibrated, processor):
    """Processes that have images would wait for this one."""
    model = calibrated().train()
    text = processor(text="No image", return_tensors="pt")
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.projector.parameters())


def test_a_stage_trains_and_keeps_it_with_lora_and_a_checkpoint_without_begins_as_nothing(checkpoint, tmp_path):
    on = {"modality_calibration": True, "vision_feature_layer": [-2, -1], "vision_layer_fusion": "weighted_sum"}
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, **on)
    assert all(not parameter.any() for parameter in model.model.projector.calibrations.parameters())
    model.save_pretrained(tmp_path / "stage0")
    for file in checkpoint.iterdir():
        if not (tmp_path / "stage0" / file.name).exists() and file.is_file():
            (tmp_path / "stage0" / file.name).write_bytes(file.read_bytes())
    rates = {"projector_learning_rate": 1e-2, "language_learning_rate": 1e-3}
    entry = main(arguments_for(tmp_path / "stage0", tmp_path / "run", lora_r=2, max_steps=2, **rates))
    assert {name: entry[name] for name in on} == on and "merge_image_tokens" not in entry
    weights = load_file(tmp_path / "run/model.safetensors")
    learned = {
        name.split("calibrations.")[1] for name, value in weights.items() if ".calibrations." in name and value.any()
    }
    assert learned == {"0.scale", "0.shift"}  # behind the last layer nothing reads the image here
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.equal(again.model.projector.calibrations[0].shift, weights["model.projector.calibrations.0.shift"])


def test_what_has_no_place_for_it_says_so(make_model, checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"modality_calibration=True needs a language model with `layers`, 2 .* 'gpt2' has"
    ):
        make_model(text={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}, modality_calibration=True)
    config = make_model(modality_calibration=True).config
    for home in HOMES:
        assert any("does not scale and shift" in obstacle.reason for obstacle in obstacles(config, home)), str(home)
    for file in ("config.json", "processor_config.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"modality_calibration": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no place for modality_calibration"):
        check_for_vllm(tmp_path)
