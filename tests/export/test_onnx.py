"""Exported to ONNX: what onnxruntime makes of the files is what the checkpoint makes, under every mask type, cached and padded."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from alignvlm.export import onnx, onnx_model
from alignvlm.export.export import export, main
from alignvlm.export.homes import describe_homes
from alignvlm.export.onnx import OnnxGraphs, llava_processor
from alignvlm.export.onnx_model import OnnxModel
from alignvlm.export.stock import compare
from alignvlm.stages.checkpoint import save_checkpoint
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import VISION


pytest.importorskip("onnxruntime")
ONE_LAYER = {"vision": {**VISION, "num_hidden_layers": 1}, "text": {"num_hidden_layers": 1}}
GEMMA = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 4}
# What `make_model` takes, and options of the export
CASES = {
    "causal": ({"mask_type": "causal"}, {}),
    "two layers added up, merged tokens": (
        {
            "mask_type": "causal",
            "vision_feature_layer": [-1, -2],
            "vision_layer_fusion": "weighted_sum",
            "merge_image_tokens": 2,
        },
        {},
    ),
    "image": ({"mask_type": "image"}, {"int8": True}),
    "prefix": ({"mask_type": "prefix", "projector_type": "linear"}, {}),
    "mutual, windows": (
        {
            "mask_type": "mutual",
            "projector_type": "pool",
            "pixel_shuffle_factor": 2,
            "text": {**GEMMA, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        },
        {},
    ),
}


SLOW = ("two layers added up, merged tokens", "mutual, windows")  # an export takes twenty seconds
EXPORTED = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_model, processor):
    """A function that exports a case, once: returns the folders of the checkpoint and of the export."""
    made = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in made:
            folder, (values, options) = tmp_path_factory.mktemp("onnx"), CASES[case]
            model = make_model(**{**ONE_LAYER, **values})
            with torch.no_grad():  # a trained one: norms begin at 1, biases at 0
                for parameter in model.model.projector.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            ours = AlignVLMProcessor(
                processor.image_processor,
                processor.tokenizer,
                image_seq_length=model.config.image_seq_length,
                chat_template=processor.chat_template,
            )
            save_checkpoint(model, ours, folder / "stage4", {"backbones": {}, "stages": []})
            assert export(str(folder / "stage4"), folder / "out", "onnx", **options).form == "onnx"
            made[case] = folder / "stage4", folder / "out"
        return made[case]

    return make


def questions(processor, tensors: str) -> dict:
    """Two rows, padded: one about an image, one about two that follow each other directly."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    red = Image.new("RGB", (20, 12), (200, 30, 60))
    texts = ["<image> What is it?", "What, in a few more words than before, are these: <image><image> Tell me."]
    return dict(processor(images=[[red], [noise, red]], text=texts, padding=True, return_tensors=tensors))


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_a_padded_batch_gets_the_logits_and_the_text_of_the_checkpoint(exported, case):
    checkpoint, out = exported(case)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    inputs = questions(AlignVLMProcessor.from_pretrained(checkpoint), "pt")
    given = questions(AutoProcessor.from_pretrained(out), "np")
    assert np.array_equal(given["input_ids"], inputs["input_ids"].numpy())
    there = OnnxModel(out)
    tokens = there.generate(**given, max_new_tokens=12)
    assert tokens.tolist() == model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, -12:].tolist()
    assert len(set(map(tuple, tokens.tolist()))) == 2
    real = inputs["attention_mask"].bool()
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clip(0)
    expected = model(**inputs, position_ids=position_ids, prompt_mask=real).logits[real]
    torch.testing.assert_close(torch.from_numpy(there.logits(**given))[real], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_a_later_turn_with_an_image_goes_on_from_the_kept_cache(exported, case):
    checkpoint, out = exported(case)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor, there = AlignVLMProcessor.from_pretrained(checkpoint), OnnxModel(out)
    images = [Image.new("RGB", (20, 12), colour) for colour in ("red", "navy")]
    first, second = (
        processor(images=image, text=text, return_tensors="pt")
        for image, text in zip(images, ("<image> What is it?", " And <image> this?"))
    )
    prompt = first["attention_mask"].bool()
    done = model(**first, prompt_mask=prompt, use_cache=True)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    later = {**second, "attention_mask": mask, "past_key_values": done.get("cache", done.get("past_key_values"))}
    expected = model(**later, prompt_mask=torch.zeros_like(second["attention_mask"], dtype=torch.bool)).logits

    def arrays(inputs):
        return there.embed(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy())

    _, cache = there.step(arrays(first), first["attention_mask"].numpy(), there.empty_cache(1))
    actual, _ = there.step(arrays(second), mask.numpy(), cache)
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=1e-4)
    last, _ = there.step(arrays(second), mask.numpy(), cache, keep=2)
    np.testing.assert_allclose(last, actual[:, -2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case, wrong", [("image", "causal"), ("prefix", "image"), ("causal", "image")])
def test_another_mask_is_noticed(exported, case, wrong):
    checkpoint, out = exported(case)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, attention_mask_type=wrong).eval()
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="OnnxGraphs gives other logits than this checkpoint"):
        compare(model, processor, OnnxGraphs(OnnxModel(out)), AutoProcessor.from_pretrained(out))


def test_files_with_8_bit_weights_are_smaller_and_nearly_the_same(exported):
    _, out = exported("image")
    given = questions(AutoProcessor.from_pretrained(out), "np")
    exact, rounded = OnnxModel(out).logits(**given), OnnxModel(out, "_quantized").logits(**given)
    assert 1e-3 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.2
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        size, smaller = ((out / "onnx" / f"{name}{suffix}.onnx").stat().st_size for suffix in ("", "_quantized"))
        assert smaller < 0.9 * size  # the graph itself is most of a tiny one
    assert not list(exported("causal")[1].glob("onnx/*_quantized.onnx"))


CHILD = """
import importlib.util, sys
import numpy as np

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "alignvlm", "modeling_alignvlm"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
file, folder, given = sys.argv[1:]
spec = importlib.util.spec_from_file_location("onnx_model", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.OnnxModel(folder).generate(**np.load(given), max_new_tokens=8).tolist())
"""


def test_the_runner_needs_numpy_and_onnxruntime_alone(exported, tmp_path):
    _, out = exported("image")
    given = questions(AutoProcessor.from_pretrained(out), "np")
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-I", "-c", CHILD, onnx_model.__file__, str(out), str(tmp_path / "given.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == OnnxModel(out).generate(**given, max_new_tokens=8).tolist()


def test_the_code_of_the_page_on_exports_runs(exported, tmp_path, monkeypatch, capsys):
    _, out = exported("image")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/onnx").symlink_to(out)
    Image.new("RGB", (20, 12), (200, 30, 60)).save(tmp_path / "photo.jpg")
    page = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text().split("\n## ONNX\n")[1]
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_runner_refuses_what_it_cannot_answer(exported, tmp_path):
    _, out = exported("image")
    processor, model = AutoProcessor.from_pretrained(out), OnnxModel(out)
    given = questions(processor, "np")
    fewer, none = {**given, "pixel_values": given["pixel_values"][:2]}, {**given, "pixel_values": None}
    for inputs, sentence in (
        (fewer, r"12 image tokens, and 2 image\(s\) of 4 tokens were given"),
        (none, r"12 image tokens, but no `pixel_values` were given"),
        (questions(processor, "pt"), r"`input_ids` is of type Tensor, .*return_tensors=.np."),
        ({**given, "max_new_tokens": 0}, r"max_new_tokens=0: .* at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.generate(**inputs)

    config = json.loads((out / "config.json").read_text())
    longest = int(given["attention_mask"].sum(-1).max())
    config["text_config"]["max_position_embeddings"] = longest + 8
    shutil.copytree(out, tmp_path / "short")
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    model = OnnxModel(tmp_path / "short")
    assert model.generate(**given, max_new_tokens=8).shape == (2, 8)
    with pytest.raises(ValueError, match=rf"{longest} tokens and an answer of 9 .* takes {longest + 8}.*Shorten"):
        model.generate(**given, max_new_tokens=9)


def test_the_runner_names_the_file_that_is_not_there(exported, tmp_path):
    checkpoint, out = exported("causal")  # without --int8
    for folder, suffix, name in (
        (tmp_path / "nothing", "", "config.json"),
        (checkpoint, "", "onnx/vision_encoder.onnx"),
        (out, "_quantized", "onnx/vision_encoder_quantized.onnx"),
        (out, "q8", "onnx/vision_encoderq8.onnx"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{folder / name} is not there\. .*--to onnx.*--int8"):
            OnnxModel(folder, suffix)


def test_the_folder_has_what_transformers_js_reads(exported):
    checkpoint, out = exported("image")
    config, settings, images, processor = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config")
    )
    ours = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "llava" and config["image_token_index"] == ours["image_token_id"]
    assert config["text_config"]["num_hidden_layers"] == 1
    assert settings["chat_template"] == (checkpoint / "chat_template.jinja").read_text()
    assert images["image_processor_type"] == "SiglipImageProcessor" and images["processor_class"] == "LlavaProcessor"
    assert processor["patch_size"] == 8 and processor["image_token"] == "<image>"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert "library_name: transformers.js" in (out / "README.md").read_text()
    assert not list(out.glob("**/*.py")) and not any("auto_map" in file.read_text() for file in out.glob("*.json"))
    (shapes,) = (value.shape for value in OnnxModel(out).layers if value.name == "past_key_values.0.key")
    assert shapes == ["batch_size", 1, "past_sequence_length", 16]  # transformers.js makes the empty cache of these


@pytest.mark.parametrize(
    "size, grid, factor", [((16, 16), (2, 2), 1), ((24, 48), (3, 6), 3), ((32, 32), (5, 5), 1), ((30, 30), (4, 7), 1)]
)
def test_its_processor_writes_the_tokens_of_an_image(make_model, processor, size, grid, factor):
    values = {"image_size": list(size), "image_grid": list(grid), "pixel_shuffle_factor": factor}
    config = make_model(vision={**VISION, "image_size": 64}, **values).config
    image_processor = type(processor.image_processor)(size={"height": size[0], "width": size[1]})
    ours = AlignVLMProcessor(image_processor, processor.tokenizer, image_seq_length=config.image_seq_length)
    given = {"images": Image.new("RGB", (20, 12)), "text": "<image> What is it?"}
    assert llava_processor(ours, config)(**given)["input_ids"] == ours(**given)["input_ids"]


def test_large_weights_lie_beside_the_graph(exported, tmp_path, monkeypatch):
    import onnx_ir

    _, out = exported("image")
    folder = tmp_path / "apart"
    shutil.copytree(out, folder)
    monkeypatch.setattr(onnx, "INLINE_BYTES", 1000)
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        program = onnx_ir.load(out / f"onnx/{name}.onnx")
        assert onnx.save(program, folder / f"onnx/{name}.onnx")
        assert (folder / f"onnx/{name}.onnx_data").stat().st_size > 1000
    given = questions(AutoProcessor.from_pretrained(out), "np")
    np.testing.assert_array_equal(OnnxModel(folder).logits(**given), OnnxModel(out).logits(**given))


def refused(folder: Path, sentence: str, out: Path, *options: str) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit, match=sentence):
        main([str(folder), str(out), *options])
    assert sorted(out.parent.iterdir()) == before


def test_bad_input_gets_a_sentence_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    refused(checkpoint, "--int8 is an option of the form 'onnx', not of 'transformers'", out, "--int8")

    def trace(graph):
        raise RuntimeError("no such operator: x\nand a long story")

    with monkeypatch.context() as patch:
        patch.setattr(onnx, "trace", trace)
        sentence = "does not take the vision_encoder of this checkpoint: no such operator: x$"
        refused(checkpoint, sentence, out, "--to", "onnx")
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "onnx_of_elsewhere"))
    refused(checkpoint, r"--to onnx needs onnx_of_elsewhere: pip install 'alignvlm\[export\]'", out, "--to", "onnx")


def test_a_wrong_graph_leaves_nothing(checkpoint, exported, tmp_path, monkeypatch):
    """The graphs of another checkpoint, in the place of this one's."""
    import onnx_ir

    files = iter(("vision_encoder", "embed_tokens", "decoder_model_merged"))
    folder = exported("prefix")[1] / "onnx"
    monkeypatch.setattr(onnx, "trace", lambda graph: onnx_ir.load(folder / f"{next(files)}.onnx"))
    refused(checkpoint, "gives other logits than this checkpoint", tmp_path / "out", "--to", "onnx")


def test_what_can_become_onnx(make_model, checkpoint, capsys):
    config = make_model().config
    assert describe_homes(config, "onnx") == ["ONNX (graphs for onnxruntime and transformers.js): yes"]
    config.text_config.layer_types = ["linear_attention", "full_attention"]
    (line,) = describe_homes(config, "onnx")
    assert line.endswith("keys and values, and the language model 'qwen2' has layers of type linear_attention")
    main([str(checkpoint)])
    assert "ONNX (graphs for onnxruntime and transformers.js): yes" in capsys.readouterr().out


def test_a_language_model_with_another_cache_is_refused(make_model):
    text = {"model_type": "mamba", "state_size": 4, "num_hidden_layers": 1}
    model = make_model(mask_type="causal", text=text, attn_implementation="eager")
    with pytest.raises(ValueError, match="The language model 'mamba' keeps another cache than keys and values"):
        onnx.graphs(model)
