"""Exported to transformers' own classes: the same tokens, logits and text, in a process without our package and without remote code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from alignvlm.evaluation.load import load_checkpoint
from alignvlm.export.export import FORMS, export, main, write_card
from alignvlm.export.homes import HOMES, describe_homes, obstacles
from alignvlm.export.stock import WRITERS, compare, stock_model
from alignvlm.stages.checkpoint import save_checkpoint
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import VISION, lose_tokenizer
from tests.stages.shipped_templates import SHIPPED
from tests.stages.test_chat_templates import extended_processor, shipped_tokenizer


CLIP = {**VISION, "model_type": "clip_vision_model"}
# home: {case: what `make_model` takes}
CASES = {
    "LLaVA": {
        "siglip": {"mask_type": "causal", "vision_feature_layer": -2},
        "two layers of siglip": {"mask_type": "causal", "vision_feature_layer": [1, -3]},
        "three layers of clip": {"mask_type": "causal", "vision": CLIP, "vision_feature_layer": [-1, 0, -2]},
        "clip, untied llama": {
            "mask_type": "causal",
            "vision": CLIP,
            "text": {"model_type": "llama", "tie_word_embeddings": False},
        },
    },
}
GEMMA = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 3}
CASES["Gemma 3"] = {
    "every patch": {"text": GEMMA, "projector_type": "pool"},
    "untied, pooled, every layer complete": {
        "vision": {**VISION, "patch_size": 4},
        "text": {**GEMMA, "tie_word_embeddings": False, "layer_types": ["full_attention"] * 2},
        "projector_type": "pool",
        "pixel_shuffle_factor": 2,
    },
    "qwen2": {"projector_type": "pool"},
    "untied llama": {
        "projector_type": "pool",
        "text": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 8},
    },
}
CASES["DeepSeek-VL"] = {
    "qwen2": {"mask_type": "causal"},
    "untied llama": {"mask_type": "causal", "text": {"model_type": "llama", "tie_word_embeddings": False}},
}
# A map of 2 x 2 places
MAP = {"mask_type": "causal", "image_grid": [2, 2], "image_size": [16, 16], "vision_hidden_size": 16}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
MOBILENET = {"model_type": "mobilenet_v2", "depth_multiplier": 0.25, "finegrained_output": False, "output_stride": 8}
CASES["FastVLM"] = {
    "resnet": {**MAP, "vision": RESNET},
    "mobilenet, untied llama": {
        **MAP,
        "vision_hidden_size": 320,
        "vision": MOBILENET,
        "text": {"model_type": "llama", "tie_word_embeddings": False},
    },
}
CASES["PaliGemma"] = {
    "qwen2": {"mask_type": "prefix", "projector_type": "linear"},
    "untied llama": {
        "mask_type": "prefix",
        "projector_type": "linear",
        "text": {"model_type": "llama", "tie_word_embeddings": False},
    },
}
ALL = [(home, case) for home, cases in CASES.items() for case in cases]
FREE = {"license": "apache-2.0"}


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_model, processor):
    """A function that saves the checkpoint of a case, once; returns its folder."""
    made = {}

    def make(home: str, case: str) -> Path:
        if (home, case) not in made:
            folder = tmp_path_factory.mktemp("given") / "stage4"
            record = {"vision": "user/eyes", "vision_licence": FREE, "language": "tiny", "language_licence": FREE}
            model = make_model(**CASES[home][case])
            with torch.no_grad():  # a trained one: norms begin at 1, biases at 0
                for parameter in model.model.projector.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            save_checkpoint(model, processor, folder, {"backbones": record, "stages": []})
            made[home, case] = folder
        return made[home, case]

    return make


CHILD = """
import sys, torch

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

parts = [{"type": "image", "image": Image.new("RGB", (20, 12), (200, 30, 60))}, {"type": "text", "text": "What is it?"}]
for folder in sys.argv[1:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = {"input_ids": inputs["input_ids"], "logits": logits, "text": processor.decode(tokens), "class": type(model).__name__}
    torch.save(found, folder + ".found.pt")
assert not any(name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "transformers_modules") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(given, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The exports of all cases, loaded and asked by one process, which writes what it found beside each."""
    home_folder = tmp_path_factory.mktemp("exported")
    folders = {}
    for number, (home, case) in enumerate(ALL):
        folders[home, case] = home_folder / str(number)
        assert export(str(given(home, case)), folders[home, case]).name == home
    environment = {
        "HF_HOME": str(home_folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(home_folder),
    }
    command = [sys.executable, "-I", "-c", CHILD, *map(str, folders.values())]
    done = subprocess.run(command, cwd=home_folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_what_needs_our_processor_refuses_an_export_and_names_what_takes_it(exported):
    folder = str(exported[ALL[0]])
    with pytest.raises(ValueError, match=r"Name the checkpoint that it was exported from.* the --server"):
        load_checkpoint(folder, torch.device("cpu"))
    model, _, _ = load_checkpoint(folder, torch.device("cpu"), others=True)  # as `alignvlm recaption` does
    assert type(model).__module__.startswith("transformers.models.")


@torch.no_grad()
def answer(checkpoint: Path) -> dict:
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    parts = [
        {"type": "image", "image": Image.new("RGB", (20, 12), (200, 30, 60))},
        {"type": "text", "text": "What is it?"},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    text = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = {} if model.config.attention_mask_type != "prefix" else {"prompt_mask": inputs["attention_mask"].bool()}
    logits = model(**inputs, **prompt).logits
    return {"input_ids": inputs["input_ids"], "logits": logits, "text": processor.decode(text)}


@pytest.mark.parametrize("home, case", ALL)
def test_a_child_process_without_our_code_answers_alike(given, exported, home, case):
    out = exported[home, case]
    assert not list(out.glob("**/*.py")) and not any("auto_map" in path.read_text() for path in out.glob("*.json"))
    there, here = torch.load(f"{out}.found.pt"), answer(given(home, case))
    assert there["class"] == next(each.class_name for each in HOMES if each.name == home)
    assert torch.equal(there["input_ids"], here["input_ids"]) and there["text"] == here["text"] != ""
    torch.testing.assert_close(there["logits"], here["logits"], atol=1e-5, rtol=1e-5)


# More of what a home takes; the export itself compares
MORE = {
    "Gemma 3": [
        {"projector_type": "pool", "text": text}
        for text in (
            {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
            {"model_type": "qwen3", "head_dim": 16},
            {"model_type": "smollm3", "pad_token_id": 0},
            {"model_type": "olmo3", "pad_token_id": 0, "sliding_window": 3},
            {
                "model_type": "llama",
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            },
        )
    ],
    "PaliGemma": [
        {"mask_type": "prefix", "projector_type": "linear", "text": text}
        for text in ({"model_type": "qwen3", "head_dim": 16}, {"model_type": "smollm3", "pad_token_id": 0})
    ],
    "DeepSeek-VL": [{"mask_type": "causal", "text": {"model_type": "gpt_neox", "tie_word_embeddings": False}}],
    "FastVLM": [
        {**MAP, "vision": {"hidden_sizes": [8, 16], "depths": [1, 1], **vision}}
        for vision in (
            {"model_type": "convnext", "num_stages": 2},
            {"model_type": "convnextv2", "num_stages": 2},
            {"model_type": "regnet", "embedding_size": 8, "groups_width": 8},
        )
    ],
    "LLaVA": [
        {"mask_type": "causal", "vision": {**VISION, "model_type": "vit"}, "vision_feature_layer": -2},
        {"mask_type": "causal", "vision": {**VISION, "model_type": "dinov2"}, "vision_feature_layer": 1},
        {
            "mask_type": "causal",
            "vision": CLIP,
            "text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 3},
        },
        {"mask_type": "causal", "vision": CLIP, "text": {"model_type": "gpt_neox", "tie_word_embeddings": False}},
    ],
}


@pytest.mark.parametrize(
    "home, index", [(home, index) for home, values in MORE.items() for index in range(len(values))]
)
def test_more_of_what_a_home_takes(make_model, processor, tmp_path, home, index):
    record = {"backbones": {}, "stages": []}
    save_checkpoint(make_model(**MORE[home][index]), processor, tmp_path / "given", record)
    assert export(str(tmp_path / "given"), tmp_path / "out").name == home


@pytest.mark.parametrize("home", CASES)
@torch.no_grad()
def test_a_padded_batch_gets_the_same_texts(given, tmp_path, home):
    checkpoint = given(home, next(iter(CASES[home])))
    export(str(checkpoint), tmp_path / "out")
    red, noise = Image.new("RGB", (20, 12), (200, 30, 60)), Image.effect_noise((30, 50), 80).convert("RGB")
    texts = ["<image> What is it?", "And what, in a few more words than before, is this: <image> Tell me."]
    options = {"images": [[red], [noise]], "text": texts, "padding": True, "return_tensors": "pt"}
    found = []
    for model, processor in (
        (AlignVLMForConditionalGeneration.from_pretrained(checkpoint), AlignVLMProcessor.from_pretrained(checkpoint)),
        (
            AutoModelForImageTextToText.from_pretrained(tmp_path / "out"),
            AutoProcessor.from_pretrained(tmp_path / "out"),
        ),
    ):
        found.append(model.eval().generate(**processor(**options), max_new_tokens=8, do_sample=False))
    assert torch.equal(*found) and len(set(map(tuple, found[0][:, -8:].tolist()))) == 2


def in_64_bit(model) -> torch.nn.Module:
    """The model with the parts too that transformers computes in 32 bit whatever the weights have: norms and rotary angles."""

    def normed(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)

    for module in model.double().modules():
        kind = type(module).__name__
        if kind.endswith(("RMSNorm", "RotaryEmbedding")):
            module.forward = (normed if kind.endswith("RMSNorm") else rotary).__get__(module)
    return model


@pytest.mark.parametrize("case", CASES["PaliGemma"])
@torch.no_grad()
def test_paligemma_differs_by_the_rounding_of_its_angles_alone(given, exported, case):
    """It counts positions from 1. At the same positions its logits are ours bit for bit, and in 64 bit it does not matter."""
    ours = AlignVLMForConditionalGeneration.from_pretrained(given("PaliGemma", case)).eval()
    theirs = AutoModelForImageTextToText.from_pretrained(exported["PaliGemma", case]).eval()
    processor = AutoProcessor.from_pretrained(exported["PaliGemma", case])
    text = f"{processor.image_token} " + "What is it? " * 100
    inputs = processor(images=Image.effect_noise((40, 30), 80).convert("RGB"), text=text, return_tensors="pt")
    prompt = {"prompt_mask": inputs["attention_mask"].bool()}
    positions = WRITERS["PaliGemma"].first_position + torch.arange(inputs["input_ids"].shape[1])[None]
    types = {"token_type_ids": inputs.pop("token_type_ids")}
    stock = theirs(**inputs, **types).logits
    assert torch.equal(ours(**inputs, **prompt, position_ids=positions).logits, stock)
    assert not torch.equal(ours(**inputs, **prompt).logits, stock)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    exact = [in_64_bit(model)(**inputs, **more).logits for model, more in ((ours, prompt), (theirs, types))]
    torch.testing.assert_close(*exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("home", ["LLaVA", "PaliGemma"])
def test_the_processor_counts_an_images_tokens_for_vllm(given, tmp_path, home):
    checkpoint = given(home, next(iter(CASES[home])))
    export(str(checkpoint), tmp_path / "out")
    processor, ours = AutoProcessor.from_pretrained(tmp_path / "out"), AlignVLMProcessor.from_pretrained(checkpoint)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(30, 50), (300, 20)])
    assert counts["num_image_tokens"] == [ours.image_seq_length] * 2 and counts["num_image_patches"] == [1, 1]


@pytest.mark.parametrize("home", ["LLaVA", "Gemma 3"])  # the processor of the others is LLaVA's
@pytest.mark.parametrize("template", SHIPPED)
def test_language_models_own_templates_write_the_tokens_of_training(make_model, tmp_path, home, template):
    """With begin tokens of the template, of the tokenizer or of both, and with system messages refused or dropped."""
    processor = extended_processor(shipped_tokenizer(template))
    tokenizer = processor.tokenizer
    values = dict(CASES[home][next(iter(CASES[home]))])
    model = make_model(**{**values, "text": {**values.get("text", {}), "vocab_size": len(tokenizer)}})
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    save_checkpoint(model, processor, tmp_path / "given", {"backbones": {}, "stages": []})
    if template == "zephyr":  # it writes no begin token, so training has none; but the tokenizer adds one
        with pytest.raises(ValueError, match="writes other tokens than this checkpoint was trained on"):
            export(str(tmp_path / "given"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["given"]
        return
    assert export(str(tmp_path / "given"), tmp_path / "out").name == home


def test_the_folder_has_the_licence_and_the_backbones_of_the_checkpoint(given, tmp_path):
    export(str(given("LLaVA", "siglip")), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in card and "user/eyes" in card and "LlavaForConditionalGeneration" in card
    assert "custom_code" not in card and str(tmp_path) not in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("home, case", [("LLaVA", "siglip"), ("FastVLM", "resnet"), ("Gemma 3", "every patch")])
def test_16_bit_weights_stay_so(given, tmp_path, home, case):
    folder = tmp_path / "half"
    model = AlignVLMForConditionalGeneration.from_pretrained(given(home, case), dtype=torch.bfloat16)
    shutil.copytree(given(home, case), folder)
    model.save_pretrained(folder)
    export(str(folder), tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    kept = load_file(folder / "model.safetensors")
    assert sum(not value.is_floating_point() for value in weights.values()) == sum(
        not value.is_floating_point() for value in kept.values()
    )
    wide = {name for name, value in weights.items() if value.is_floating_point() and value.dtype != torch.bfloat16}
    # One less than a norm's weight may need more digits.
    assert {name.rpartition("multi_modal_projector.")[2] for name in wide} <= {"mm_soft_emb_norm.weight"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}


def test_one_changed_weight_is_noticed(given, processor, tmp_path):
    model, changed = (AlignVLMForConditionalGeneration.from_pretrained(given("LLaVA", "siglip")).eval() for _ in "ab")
    other = WRITERS["LLaVA"].processor(processor, model.config)
    stock_model(changed, HOMES[0]).save_pretrained(tmp_path / "same")
    compare(model, processor, LlavaForConditionalGeneration.from_pretrained(tmp_path / "same"), other)
    with torch.no_grad():
        next(changed.model.projector.parameters())[0] += 0.1
    stock_model(changed, HOMES[0]).save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="gives other logits than this checkpoint"):
        compare(model, processor, LlavaForConditionalGeneration.from_pretrained(tmp_path / "changed"), other)


def test_other_tokens_are_noticed(given, processor):
    model = AlignVLMForConditionalGeneration.from_pretrained(given("LLaVA", "siglip")).eval()
    other = WRITERS["LLaVA"].processor(processor, model.config)
    other.chat_template = other.chat_template.replace("Assistant:", "Assistant :")
    with pytest.raises(ValueError, match="LlavaProcessor writes other tokens than this checkpoint was trained on"):
        compare(model, processor, model, other)


# What `make_model` takes, and what is said of the home
NO_HOME = {
    "mask": (
        {"vision_feature_layer": -2},
        "its attention mask is 'causal', not 'image'. One change .*: attention_mask_type: causal",
    ),
    "layer": (
        {"mask_type": "causal"},
        "'siglip_vision_model' is none of them .*One change .*: vision_feature_layer: -2",
    ),
    "one of several layers": (
        {"mask_type": "causal", "vision_feature_layer": [-3, -1]},
        "'siglip_vision_model' is none of them .*One change .*: vision_feature_layer: .-3.$",
    ),
    "weighted sum": (
        {"mask_type": "causal", "vision_feature_layer": [-3, -2], "vision_layer_fusion": "weighted_sum"},
        "knows no vision_layer_fusion='weighted_sum'. One change .*: vision_layer_fusion: concatenate$",
    ),
    "projector": (
        {"mask_type": "causal", "vision_feature_layer": -2, "projector_type": "linear"},
        "its projector is 'mlp', not 'linear'. One change .*: projector_type: mlp",
    ),
    "pixel shuffle": (
        {"mask_type": "causal", "vision_feature_layer": -2, "pixel_shuffle_factor": 2},
        "no pixel shuffle. One change .*: pixel_shuffle_factor: 1",
    ),
    "tied": (
        {
            "mask_type": "causal",
            "vision": CLIP,
            "text": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
        },
        "'gpt2' calls its embeddings otherwise$",
    ),
    "softcap": (
        {
            "mask_type": "causal",
            "vision": CLIP,
            "text": {"model_type": "gemma2", "head_dim": 16},
            "attn_implementation": "eager",
        },
        "it does not cap logits as the language model 'gemma2' does$",
    ),
    "encoder": (
        {**MAP, "vision_feature_layer": -2, "vision": RESNET},
        "it takes the vision encoders siglip_vision_model, clip_vision_model, vit, dinov2, not 'resnet'",
    ),
    "two": ({"mask_type": "mutual"}, "its attention mask is 'causal', not 'mutual'; it reads hidden states"),
}


POOL, PREFIX = {"projector_type": "pool", "text": GEMMA}, {"mask_type": "prefix", "projector_type": "linear"}
NO_HOME |= {
    "Gemma 3: language model": (
        {"projector_type": "pool", "text": {"model_type": "gpt_neox", "tie_word_embeddings": False}},
        "it takes the language models gemma3_text, qwen2, qwen3, smollm3, olmo3, llama, not 'gpt_neox'$",
    ),
    "Gemma 3: softcap": (
        {"projector_type": "pool", "text": {**GEMMA, "final_logit_softcapping": 30.0}},
        "it does not cap logits as the language model 'gemma3_text' does$",
    ),
    "Gemma 3: mask": (
        {**POOL, "mask_type": "causal"},
        "its attention mask is 'image', not 'causal'. One change .*: attention_mask_type: image",
    ),
    "Gemma 3: layer": (
        {**POOL, "vision_feature_layer": -2},
        "not vision_feature_layer=-2. One change .*: vision_feature_layer: -1",
    ),
    "Gemma 3: tokens": (
        {**POOL, "pixel_shuffle_factor": 2},
        "its processor writes at least 3 tokens an image, not 1$",
    ),
    "Gemma 3: encoder": (
        {**POOL, "vision": CLIP},
        "no encoder with tokens before the patches, such as 'clip_vision_model'$",
    ),
    "DeepSeek-VL: mask": (
        {},
        "its attention mask is 'causal', not 'image'. One change .*: attention_mask_type: causal",
    ),
    "DeepSeek-VL: layer": (
        {"mask_type": "causal", "vision_feature_layer": -2},
        "not vision_feature_layer=-2. One change .*: vision_feature_layer: -1",
    ),
    "DeepSeek-VL: layers": (
        {"mask_type": "causal", "vision_feature_layer": [-2, -1]},
        "not vision_feature_layer=.-2, -1.. One change .*: vision_feature_layer: -1",
    ),
    "DeepSeek-VL: activation": (
        {"mask_type": "causal", "projector_hidden_act": "relu"},
        "its projector's activation is 'gelu', not 'relu'$",
    ),
    "FastVLM: encoder": (
        {"mask_type": "causal"},
        "its encoder gives a map of features .convnext, convnextv2, mobilenet_v2, regnet, resnet., not 'siglip_vision_model'$",
    ),
    "FastVLM: layer": (
        {**MAP, "vision": RESNET, "vision_feature_layer": -2},
        "not vision_feature_layer=-2. One change .*: vision_feature_layer: -1",
    ),
    "FastVLM: squares": (
        {**MAP, "vision": RESNET, "image_size": [16, 20]},
        "its processor counts squares of pixels, and 2 x 2 do not divide 16 x 20$",
    ),
    "FastVLM: pixel shuffle": (
        {**MAP, "vision": RESNET, "pixel_shuffle_factor": 2},
        "no pixel shuffle. One change .*: pixel_shuffle_factor: 1",
    ),
    "PaliGemma: projector": (
        {**PREFIX, "projector_type": "mlp"},
        "its projector is 'linear', not 'mlp'. One change .*: projector_type: linear",
    ),
    "PaliGemma: pixel shuffle": (
        {**PREFIX, "pixel_shuffle_factor": 2},
        "no pixel shuffle. One change .*: pixel_shuffle_factor: 1",
    ),
    "PaliGemma: language model": (
        {**PREFIX, "text": {"model_type": "gpt_neox", "tie_word_embeddings": False}},
        "it takes the language models qwen2, qwen3, llama, smollm3, not 'gpt_neox'$",
    ),
    "PaliGemma: windows": (
        {
            **PREFIX,
            "text": {
                "use_sliding_window": True,
                "sliding_window": 3,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        },
        "no mask for sliding windows",
    ),
}


@pytest.mark.parametrize("case", NO_HOME)
def test_a_configuration_without_a_home_is_told_why(make_model, case):
    name = case.partition(":")[0] if ":" in case else "LLaVA"
    values, said = NO_HOME[case]
    config = make_model(**values).config
    home = next(home for home in HOMES if home.name == name)
    line = next(line for line in describe_homes(config) if line.startswith(f"{name} ("))
    assert re.search(said, line), line
    assert not ("One change" in line and len(obstacles(config, home)) > 1)


def test_a_mask_type_that_the_language_model_cannot_keep_is_not_offered(make_model):
    config = make_model(vision_feature_layer=-2, supported_mask_types=["image"]).config
    assert not any("One change" in line for line in describe_homes(config) if line.startswith("LLaVA"))


def test_bad_input_gets_a_sentence_and_leaves_nothing(given, checkpoint, tmp_path):
    def refused(folder: Path, sentence: str, out: Path = tmp_path / "out") -> None:
        before = sorted(out.parent.iterdir())
        with pytest.raises(SystemExit, match=sentence):
            main([str(folder), str(out)])
        assert sorted(out.parent.iterdir()) == before

    good = given("LLaVA", "siglip")
    folders = {name: tmp_path / name for name in ("other", "apart", "broken", "no words", "full")}
    for folder in folders.values():
        shutil.copytree(good, folder)
    config = json.loads((good / "config.json").read_text())
    (folders["other"] / "config.json").write_text(json.dumps(config | {"model_type": "elsewhere"}))
    (folders["other"] / "modeling_alignvlm.py").write_text("raise SystemExit('ran')")
    refused(folders["other"], "model of type 'elsewhere', not an AlignVLM checkpoint. Its code was not run")
    (folders["apart"] / "lora").mkdir()
    (folders["apart"] / "lora/adapter_config.json").write_text("{}")
    refused(folders["apart"], "keeps LoRA weights apart")
    (folders["broken"] / "model.safetensors").write_bytes(b"x")
    refused(folders["broken"], "The weights of '.*broken' cannot be read: .*copy the checkpoint again")
    lose_tokenizer(folders["no words"])
    refused(folders["no words"], "The tokenizer of '.*no words' does not have '<image>' as its token")
    refused(checkpoint, "None of the homes in the form 'transformers' computes what this checkpoint does")
    refused(tmp_path / "nowhere", "nowhere")
    refused(good, "is there already", folders["full"])


def test_the_command_line(given, tmp_path, capsys):
    good = str(given("LLaVA", "siglip"))
    main([good])
    assert capsys.readouterr().out.splitlines()[0] == "LLaVA (LlavaForConditionalGeneration): yes"
    main([good, str(tmp_path / "new/out"), "--to", "transformers"])
    assert "loads without remote code" in capsys.readouterr().out
    assert (tmp_path / "new/out/model.safetensors").is_file()
    for option in (["--to", "transformers"], ["--outtype", "q8_0"], ["--int8"]):
        with pytest.raises(SystemExit, match=f"error: {option[0]} is of an export: name OUT, too"):
            main([good, *option])


@pytest.mark.parametrize("form", FORMS)
def test_the_card_says_with_which_tag_prompts_begin(given, tmp_path, form):
    folder = given("LLaVA", "siglip")
    shutil.copytree(folder, tmp_path / "tagged")
    record = read_run_record(folder)
    stage = {"stage": 4, "evaluation_tag": 'the "short" one:'}
    (tmp_path / "tagged" / RUN_RECORD).write_text(json.dumps({**record, "stages": [stage]}))
    cards = {}
    for name in (str(folder), str(tmp_path / "tagged")):
        files = {"language": "out-F16.gguf", "vision": "mmproj-out-F16.gguf"}
        write_card(name, None, next(home for home in HOMES if home.form == form), tmp_path, "out", files)
        cards[name] = (tmp_path / "README.md").read_text()
    plain, tagged = cards.values()
    assert "short" not in plain and 'Its prompts begin with `the "short" one:`, as in training' in tagged
    if form != "transformers":  # whose example asks nothing
        assert '"What is it?"' in plain and r'"the \"short\" one: What is it?"' in tagged
