"""Exported to GGUF: weights and tokens read back, and, where there is a build of llama.cpp, what llama.cpp itself makes of the files.

ALIGNVLM_LLAMA_CPP names the folder with `llama-server` (`benchmarks/llama_cpp.py build`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.export.export import export, main
from alignvlm.export.gguf import OUTTYPES, compare_tensors, compare_tokens, encode, rounding, write_file
from alignvlm.export.gguf_prompt import PROBES, Prompt, llama_cpp_template, training_ids
from alignvlm.export.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, read_vocabulary, rebuild
from alignvlm.export.homes import describe_homes
from alignvlm.stages.chat_templates import IMAGE_BEGIN, IMAGE_END, IMAGE_TOKEN, chat_template
from alignvlm.stages.checkpoint import save_checkpoint
from benchmarks.llama_cpp import EXACT, Server, our_text, question
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import IMAGE_SIZE, VISION, make_tokenizer
from tests.stages.shipped_templates import SHIPPED
from tests.stages.test_chat_templates import shipped_tokenizer


gguf = pytest.importorskip("gguf")

CLIP = {**VISION, "model_type": "clip_vision_model"}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA_3["original_max_position_embeddings"] = 64
# home: {case: what `make_model` takes}
CASES = {
    "gemma3": {
        "every patch": {},
        "qwen3, pooled": {
            "vision": {**VISION, "patch_size": 4},
            "pixel_shuffle_factor": 2,
            "text": {"model_type": "qwen3", "head_dim": 16},
        },
        "untied llama 3": {
            "text": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 16, "rope_parameters": LLAMA_3}
        },
        "smollm3": {"text": {"model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0}},
    },
    "mlp": {
        "siglip": {"vision_feature_layer": -2},
        "final output, llama": {"text": {"model_type": "llama"}},
        "first layer": {"vision_feature_layer": 1},
    },
}
FIELDS = {"gemma3": {"projector_type": "pool"}, "mlp": {"mask_type": "causal"}}
ALL = [(home, case) for home, cases in CASES.items() for case in cases]


def processor_for(home: str, template: str | None = None) -> AlignVLMProcessor:
    """A processor as assembly makes it: plain words, or a language model's own template and tokenizer."""
    tokenizer = shipped_tokenizer(template) if template else make_tokenizer(())
    marks = (IMAGE_BEGIN, IMAGE_TOKEN, IMAGE_END) if home == "gemma3" else (IMAGE_TOKEN,)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)}, replace_extra_special_tokens=False)
    written, own = chat_template(tokenizer, "".join(marks))
    resample = 2 if home == "gemma3" else 3  # bilinear, bicubic: as llama.cpp resizes for each
    images = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, resample=resample)
    return AlignVLMProcessor(
        images, tokenizer, image_seq_length=4, chat_template=written, template_writes_special_tokens=own
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_model):
    """A function that saves the checkpoint of a case, once if no folder is given; returns its folder."""
    made = {}

    def make(home: str, case: str, template: str | None = None, folder: Path | None = None, **changes) -> Path:
        if folder is None and (home, case, template) in made:
            return made[home, case, template]
        processor = processor_for(home, template)
        tokenizer = processor.tokenizer
        values = {**FIELDS[home], **CASES[home][case], **changes}
        more = {"vocab_size": len(tokenizer) + 5, "eos_token_id": tokenizer.eos_token_id}
        model = make_model(**{**values, "text": {**values.get("text", {}), **more}})
        model.config.image_token_id = processor.image_token_id
        with torch.no_grad():  # a trained one: norms begin at 1, biases at 0, and images change what is written
            for parameter in model.model.projector.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            last = [parameter for parameter in model.model.projector.parameters() if parameter.ndim == 2][-1]
            features = model.get_image_features(torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)).pooler_output
            last.mul_(1.5 * model.get_input_embeddings().weight.std() / features.std())
        out = folder or tmp_path_factory.mktemp("given") / "stage4"
        save_checkpoint(model, processor, out, {"backbones": {}, "stages": []})
        if folder is None:
            made[home, case, template] = out
        return out

    return make


def written(folder: Path) -> tuple[Path, Path]:
    """The files of the language model and of encoder and projector."""
    vision = next(folder.glob("mmproj-*.gguf"))
    return next(path for path in folder.glob("*.gguf") if path != vision), vision


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_each_number_format_has_its_files(given, tmp_path, outtype):
    export(str(given("gemma3", "every patch")), tmp_path / "my-vlm", "gguf", outtype=outtype)
    matrices, others = OUTTYPES[outtype]
    names = ["README.md", f"mmproj-my-vlm-{others}.gguf", f"my-vlm-{matrices}.gguf"]
    assert sorted(path.name for path in (tmp_path / "my-vlm").iterdir()) == names
    language, vision = (gguf.GGUFReader(path) for path in written(tmp_path / "my-vlm"))
    assert {tensor.tensor_type.name for tensor in language.tensors} == {"F32", matrices, others}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in vision.tensors}
    assert kinds["v.blk.0.ffn_up.weight"] == others and kinds["v.position_embd.weight"] == "F32"
    card = (tmp_path / "my-vlm/README.md").read_text()
    assert card.count(f" -m my-vlm-{matrices}.gguf --mmproj mmproj-my-vlm-{others}.gguf") == 2


@pytest.mark.parametrize(
    "home, case", [("gemma3", "every patch"), ("gemma3", "untied llama 3"), ("mlp", "final output, llama")]
)
@torch.no_grad()
def test_transformers_reads_the_same_language_model_from_the_file(given, tmp_path, home, case):
    checkpoint = given(home, case)
    export(str(checkpoint), tmp_path / "out", "gguf", outtype="f32")
    path = written(tmp_path / "out")[0]
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    if "llama 3" in case:  # its reader leaves the frequencies out
        theirs.model.rotary_emb = ours.model.language_model.rotary_emb
    input_ids = torch.randint(2, 300, (2, 100))
    torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids=input_ids).logits, atol=1e-4, rtol=1e-4)


def test_factors_of_llama_3_are_those_of_transformers(given, tmp_path):
    checkpoint = given("gemma3", "untied llama 3")
    export(str(checkpoint), tmp_path / "out", "gguf", outtype="f32")
    tensors = gguf.GGUFReader(written(tmp_path / "out")[0]).tensors
    factors = torch.tensor(next(tensor.data for tensor in tensors if tensor.name == "rope_freqs.weight"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    torch.testing.assert_close(plain / factors, model.model.language_model.rotary_emb.inv_freq)
    assert len(set(factors.tolist())) > 2


@torch.no_grad()
def image_tokens(path: Path, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the graphs `gemma3` and `mlp` of llama.cpp compute of an mmproj file."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    weights = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    eps, heads = values["clip.vision.attention.layer_norm_epsilon"], values["clip.vision.attention.head_count"]

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    patches = weights["v.patch_embd.weight"]
    x = F.conv2d(pixel_values, patches, weights["v.patch_embd.bias"], stride=values["clip.vision.patch_size"])
    x = x.flatten(2).transpose(1, 2) + weights["v.position_embd.weight"]
    for index in range(values["clip.vision.block_count"]):
        name = f"v.blk.{index}"
        normed = norm(f"{name}.ln1", x)
        q, k, v = (linear(f"{name}.attn_{kind}", normed).unflatten(-1, (heads, -1)).transpose(1, 2) for kind in "qkv")
        x = x + linear(f"{name}.attn_out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.ffn_up", norm(f"{name}.ln2", x)), approximate="tanh")
        x = x + linear(f"{name}.ffn_down", inner)
    if "v.post_ln.weight" in weights:
        x = norm("v.post_ln", x)
    if values["clip.projector_type"] == "mlp":
        assert values["clip.vision.feature_layer"] == [values["clip.vision.block_count"]]
        return linear("mm.2", F.gelu(linear("mm.0", x), approximate="tanh"))
    side = values["clip.vision.image_size"] // values["clip.vision.patch_size"]
    grid = x.transpose(1, 2).unflatten(2, (side, side))
    x = F.avg_pool2d(grid, values["clip.vision.projector.scale_factor"]).flatten(2).transpose(1, 2)
    return F.rms_norm(x, x.shape[-1:], weights["mm.soft_emb_norm.weight"], eps) @ weights["mm.input_projection.weight"]


@pytest.mark.parametrize("home, case", ALL)
@torch.no_grad()
def test_encoder_and_projector_compute_the_same_from_the_file(given, tmp_path, home, case):
    checkpoint = given(home, case)
    export(str(checkpoint), tmp_path / "out", "gguf", outtype="f32")
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    ours, theirs = (
        model.get_image_features(pixel_values).pooler_output,
        image_tokens(written(tmp_path / "out")[1], pixel_values),
    )
    tolerance = (
        1e-5 if home == "gemma3" else 2e-3
    )  # llama.cpp's GELU between the projector's layers is the one by tanh
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(ours.std()), rtol=1e-4)


@pytest.mark.parametrize("home", CASES)
@pytest.mark.parametrize("template", SHIPPED)
def test_language_models_own_templates_write_the_tokens_of_training(given, tmp_path, home, template):
    checkpoint = given(home, next(iter(CASES[home])), template, tmp_path / "given")
    assert export(str(checkpoint), tmp_path / "out", "gguf").class_name == home


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_rounding_is_what_a_number_format_loses_and_no_more(kind):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-7, 2, (64, 1))).astype(np.float32)
    stored = encode(torch.from_numpy(weight), kind)
    values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    shares = np.abs(values - weight) / rounding(weight, kind)
    assert 0.6 < shares.max() <= 1


def test_a_changed_weight_or_key_is_noticed(given, tmp_path):
    weights = {"a.weight": torch.randn(4, 32), "b.bias": torch.randn(4)}
    write_file(tmp_path / "x.gguf", "llama", gguf.GGUFType.MODEL, weights, ("Q8_0", "Q8_0"))
    compare_tensors(tmp_path / "x.gguf", weights)
    changed = {**weights, "a.weight": weights["a.weight"].clone()}
    changed["a.weight"][1, 2] += 0.1
    with pytest.raises(ValueError, match=r"other values of a\.weight than the checkpoint, by more than Q8_0 rounds"):
        compare_tensors(tmp_path / "x.gguf", changed)
    with pytest.raises(ValueError, match="has other weights"):
        compare_tensors(tmp_path / "x.gguf", {"a.weight": weights["a.weight"]})
    huge = {"a.weight": torch.full((1, 32), 1e6)}
    write_file(tmp_path / "y.gguf", "llama", gguf.GGUFType.MODEL, huge, ("F16", "F16"))
    with pytest.raises(ValueError, match="by more than F16 rounds"):
        compare_tensors(tmp_path / "y.gguf", huge)

    export(str(given("gemma3", "every patch")), tmp_path / "out", "gguf")
    path, processor = written(tmp_path / "out")[0], processor_for("gemma3")
    compare_tokens(path, processor, Prompt("", False, IMAGE_BEGIN, IMAGE_END))
    with pytest.raises(ValueError, match=r"llama\.cpp writes other tokens than this checkpoint was trained on"):
        compare_tokens(path, processor, Prompt("", False))
    processor.chat_template = processor.chat_template.replace("Assistant:", "Assistant :")
    with pytest.raises(ValueError, match=r"llama\.cpp writes other tokens than this checkpoint was trained on"):
        compare_tokens(path, processor, Prompt("", False, IMAGE_BEGIN, IMAGE_END))


def test_only_a_template_that_reads_texts_otherwise_is_changed():
    chatml, plain = processor_for("gemma3", "qwen2.5"), processor_for("gemma3")
    assert llama_cpp_template(chatml, IMAGE_BEGIN, IMAGE_END) == chatml.chat_template
    template = llama_cpp_template(plain, IMAGE_BEGIN, IMAGE_END)
    assert plain.chat_template.removesuffix("\n") in template != plain.chat_template
    text = "User: Look: <__media_aB3__> what <_is> it?\n"
    messages = [{"role": "user", "content": "Look:<__media_aB3__>what <_is> it?"}]
    assert plain.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) == text.replace(
        ": <", ":<"
    )


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_real_tokenizers_are_rebuilt_from_the_vocabulary(shared_data, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    found = rebuild(read_vocabulary(tokenizer, len(tokenizer) + 3))
    assert pre_tokenizer_name(tokenizer) == {"gpt2": "gpt-2", "qwen2.5": "qwen2"}[name]
    text = (shared_data / "text/wikitext2.valid.txt").read_text()[:30_000]
    assert found.encode(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pre_tokenizers_cut_numbers_and_words_apart_from_each_other():
    base = read_vocabulary(make_tokenizer(()), 400)
    text = "I'LL 1234 x1\n\n  y"
    cuts = set()
    for name in PRE_TOKENIZERS:
        pieces = rebuild(type(base)(base.tokens, base.kinds, base.merges, name)).pre_tokenizer.pre_tokenize_str(text)
        cuts.add(tuple(piece for piece, _ in pieces))
    assert len(cuts) == len(PRE_TOKENIZERS)


# What `make_model` takes, and what is said of the home
NO_HOME = {
    "mlp: layers": (
        {"mask_type": "causal", "vision_feature_layer": [-3, -2]},
        "it is written for one layer, not vision_feature_layer=.-3, -2.$",
    ),
    "gemma3: mask": ({"mask_type": "causal", "projector_type": "pool"}, "One change .*: attention_mask_type: image"),
    "gemma3: projector": ({}, "its projector is 'pool', not 'mlp'. One change .*: projector_type: pool"),
    "gemma3: encoder": ({"projector_type": "pool", "vision": CLIP}, "no encoder with tokens before the patches"),
    "gemma3: language model": (
        {"projector_type": "pool", "text": {"model_type": "gemma3_text", "head_dim": 16}},
        "it is written for the language models llama, qwen2, qwen3, smollm3, not 'gemma3_text'$",
    ),
    "gemma3: windows": (
        {
            "projector_type": "pool",
            "text": {
                "use_sliding_window": True,
                "sliding_window": 3,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        },
        "llama.cpp has no sliding windows for the language model 'qwen2'$",
    ),
    "gemma3: rope": (
        {
            "projector_type": "pool",
            "text": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        },
        "rope_type='linear'",
    ),
    "gemma3: biases": (
        {"projector_type": "pool", "text": {"model_type": "llama", "attention_bias": True}},
        "not written for biases of the language model 'llama'$",
    ),
    "gemma3: width": (
        {"projector_type": "pool", "vision": {**VISION, "intermediate_size": 32}},
        "llama.cpp swaps both layers",
    ),
    "mlp: pixel shuffle": (
        {"mask_type": "causal", "pixel_shuffle_factor": 2},
        "no pixel shuffle. One change .*: pixel_shuffle_factor: 1",
    ),
    "mlp: encoder": (
        {"mask_type": "causal", "vision": CLIP},
        "takes the encoder siglip_vision_model, not 'clip_vision_model', since llama.cpp puts a class token behind the patches$",
    ),
    "mlp: activation": (
        {"mask_type": "causal", "vision": {**VISION, "hidden_act": "gelu"}},
        "'gelu_pytorch_tanh' in this encoder, not 'gelu'$",
    ),
    "mlp: projector's activation": ({"mask_type": "causal", "projector_hidden_act": "relu"}, "'gelu', not 'relu'$"),
}


@pytest.mark.parametrize("case", NO_HOME)
def test_a_configuration_without_a_home_is_told_why(make_model, case):
    values, said = NO_HOME[case]
    lines = describe_homes(make_model(**values).config, "gguf", processor_for("gemma3"))
    line = next(line for line in lines if line.startswith(f"llama.cpp ({case.partition(':')[0]})"))
    assert re.search(said, line), line


def test_processors_without_a_home_are_told_why(make_model):
    def said(processor, **values) -> list[str]:
        return describe_homes(make_model(**values).config, "gguf", processor)

    pool = {"projector_type": "pool"}
    assert said(processor_for("gemma3"), **pool)[0] == "llama.cpp (gemma3): yes"
    change = f"image_begin: {IMAGE_BEGIN}, image_end: {IMAGE_END}"
    assert said(processor_for("mlp"), **pool)[0].endswith(
        f"around an image, and the chat template does not. One change before training opens it: {change}"
    )
    projector = "its projector is 'pool', not 'mlp'. One change before training opens it: projector_type: pool"
    assert said(processor_for("mlp"))[0] == f"llama.cpp (gemma3): {projector}"  # which adds both tokens
    assert said(processor_for("mlp"), mask_type="causal")[1] == "llama.cpp (mlp): yes"
    for change, sentence in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "none of the pre-tokenizers gpt-2, smollm, qwen2, llama-bpe"),
        ({"normalizer": {"type": "Lowercase"}}, "the tokenizer's normalizer Lowercase does"),
        ({"model": "WordLevel"}, "it is written for byte-level BPE tokenizers, and this one is WordLevel"),
    ):
        processor = processor_for("mlp")
        backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        if "model" in change:
            words = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
            change = {"model": words, "pre_tokenizer": None, "decoder": None}
        processor.tokenizer._tokenizer = type(processor.tokenizer._tokenizer).from_str(json.dumps(backend | change))
        assert sentence in said(processor, mask_type="causal")[1]
    processor = processor_for("mlp")
    processor.image_processor.rescale_factor = 1.0
    assert "divides pixel values by 255" in said(processor, mask_type="causal")[1]


def test_another_interpolation_is_said(given, tmp_path, caplog):
    checkpoint = given("gemma3", "every patch")
    export(str(checkpoint), tmp_path / "same", "gguf")
    assert not any("interpolation" in message for message in caplog.messages)
    shutil.copytree(checkpoint, tmp_path / "given")
    settings = tmp_path / "given/processor_config.json"
    values = json.loads(settings.read_text())
    values["image_processor"]["resample"] = 3
    settings.write_text(json.dumps(values))
    export(str(tmp_path / "given"), tmp_path / "other", "gguf")
    (said,) = [message for message in caplog.messages if "smaller by bilinear interpolation" in message]
    assert "16 x 16" in said and said.endswith("One change before training mends it: image_resample: bilinear")


def test_bad_input_gets_a_sentence_and_leaves_nothing(given, tmp_path, monkeypatch):
    def refused(sentence: str, *command: str) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit, match=sentence):
            main(list(command))
        assert sorted(tmp_path.iterdir()) == before

    good, out = str(given("gemma3", "every patch")), str(tmp_path / "out")
    refused("--outtype is an option of the form 'gguf', not of 'transformers'", good, out, "--outtype", "f16")
    shutil.copytree(good, tmp_path / "bare")
    bare = tmp_path / "bare/chat_template.jinja"
    bare.write_text(bare.read_text().replace(IMAGE_BEGIN, "").replace(IMAGE_END, ""))
    refused(f"llama.cpp writes {IMAGE_BEGIN} and {IMAGE_END}", str(tmp_path / "bare"), out, "--to", "gguf")
    shutil.copytree(good, tmp_path / "ends")
    settings = tmp_path / "ends/generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [1, 2, 3, 4]}))
    refused(
        "one to three tokens that end an answer; this checkpoint has 4", str(tmp_path / "ends"), out, "--to", "gguf"
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"needs the package gguf: pip install 'alignvlm\[export\]'", good, out, "--to", "gguf")


def test_tokens_around_images_do_not_hinder_the_stock_class(given, tmp_path):
    text = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 3}
    checkpoint = given("gemma3", "every patch", None, tmp_path / "given", text=text)
    assert export(str(checkpoint), tmp_path / "out").name == "Gemma 3"


@pytest.fixture(scope="session")
def binaries() -> Path:
    folder = os.environ.get("ALIGNVLM_LLAMA_CPP")
    if not folder or not (Path(folder) / "llama-server").is_file():
        pytest.skip("ALIGNVLM_LLAMA_CPP names no folder with llama-server")
    return Path(folder)


QUARTERS = np.array([[[255, 0, 0], [0, 0, 255]], [[0, 90, 0], [240, 240, 230]]], np.uint8)
PICTURE = Image.fromarray(QUARTERS.repeat(20, 0).repeat(20, 1))
PART = {"type": "image", "image": PICTURE}


@torch.no_grad()
def most_likely(model, processor, messages) -> dict[int, float]:
    """Token: log probability, of the five most likely first tokens of an answer that do not end it."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = model(**inputs).logits[0, -1].log_softmax(-1)
    best = [token for token in found.topk(6).indices.tolist() if token != processor.tokenizer.eos_token_id]
    return {token: float(found[token]) for token in best[:5]}


def largest_difference(server: Server, expected: dict[int, float], messages: list[dict]) -> float:
    answer = server.answer(messages, 1, logprobs=True, top_logprobs=20, ignore_eos=True)
    if "logprobs" not in answer["choices"][0]:
        return 100.0  # part of a character, which the server keeps back
    found = {token["id"]: token["logprob"] for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return max(abs(found.get(token, -100.0) - value) for token, value in expected.items())


@pytest.mark.parametrize("home, case", ALL)
def test_llama_cpp_gives_the_same_probabilities(given, tmp_path, binaries, home, case):
    checkpoint = given(home, case)
    export(str(checkpoint), tmp_path / "out", "gguf", outtype="f32")
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    mask_type, other_type = ("causal", "image") if home == "mlp" else ("image", "causal")
    for text in ("What is it?", "And where?", "Tell me.", "How many?", "Red or blue?"):
        messages, other_picture = question(PICTURE, text), question(PICTURE.rotate(90), text)
        expected = most_likely(model, processor, messages)
        if "\ufffd" not in processor.tokenizer.decode(max(expected, key=expected.get)):
            break
    with Server(tmp_path / "out", binaries, *EXACT, "--special") as server:
        right = largest_difference(server, expected, messages)
        elsewhere = largest_difference(server, expected, other_picture)
        assert model.config.attention_mask_type == mask_type
        model.config.attention_mask_type = other_type
        wrong = largest_difference(server, most_likely(model, processor, messages), messages)
    assert right < 0.02 and min(wrong, elsewhere) > 5 * right, (right, wrong, elsewhere)


@pytest.mark.parametrize("home", CASES)
def test_the_command_of_card_and_docs_answers_as_the_checkpoint_does(given, tmp_path, binaries, home):
    checkpoint = given(home, next(iter(CASES[home])))
    export(str(checkpoint), tmp_path / "my-vlm", "gguf", outtype="f32")
    docs = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text()
    (ours,) = re.findall(r"^llama-mtmd-cli .*", docs, flags=re.MULTILINE)
    (cards,) = re.findall(r"^llama-mtmd-cli .*", (tmp_path / "my-vlm/README.md").read_text(), flags=re.MULTILINE)
    assert ours.replace("Q8_0", "F32") == cards
    PICTURE.save(tmp_path / "my-vlm/photo.png")
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    expected = our_text(model, AlignVLMProcessor.from_pretrained(checkpoint), question(PICTURE, "What is it?"), 12)
    command, printed = f"{binaries}/{cards} -n 12 {' '.join(EXACT)}", ""
    for _ in range(10):  # with a model this small the program may end before its thread that prints has begun
        done = subprocess.run(command, shell=True, cwd=tmp_path / "my-vlm", capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr[-3000:]
        if printed := done.stdout.decode(errors="replace").strip():
            break
    assert printed == expected.strip() != ""


@pytest.mark.parametrize("template", [None, "qwen3", "smollm2", "llama3", "llama3.2", "with_generation"])
@pytest.mark.parametrize("home", CASES)
def test_llama_cpp_writes_the_tokens_of_training(given, tmp_path, binaries, home, template):
    checkpoint = given(home, next(iter(CASES[home])), template, tmp_path / "given")
    export(str(checkpoint), tmp_path / "out", "gguf", outtype="f32")
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    begin, end = (IMAGE_BEGIN, IMAGE_END) if home == "gemma3" else ("", "")
    with Server(tmp_path / "out", binaries) as server:
        image = [*server.tokens(begin), processor.image_token_id, *server.tokens(end)]
        for messages in PROBES:
            with_images = [
                {**message, "content": [PART if part["type"] == "image" else part for part in message["content"]]}
                for message in messages
            ]
            first, *others = server.pieces(with_images)
            ids = first + [token for piece in others for token in image + piece]
            assert ids == training_ids(processor, messages)[0]
