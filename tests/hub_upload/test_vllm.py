"""A folder packaged for vLLM gives our logits through the calls of vLLM's transformers backend (tests/vllm_backend.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignvlm.stages.checkpoint import save_checkpoint
from hub_upload import serving
from hub_upload.checks import check, try_loading
from hub_upload.package import main, package
from hub_upload.push import PushError, push
from modeling_alignvlm import MASK_TYPES, AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.configuration_alignvlm import BASE_MODEL


BACKEND = Path(__file__).parents[1] / "vllm_backend.py"  # run, never imported: it hides our packages
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 3.0,
}
CASES = {
    "causal": {"mask_type": "causal"},
    "image": {"mask_type": "image"},
    "image, pool, untied llama": {
        "text": {"model_type": "llama", "tie_word_embeddings": False},
        "projector_type": "pool",
        "tie_word_embeddings": False,
    },
    "image, sliding window, capped logits": {"text": GEMMA},
    "image, tiles": {"image_block": "image"},
    "image, tiles with marks": {"image_block": "tile"},
}
TILES = {"image, tiles": {"max_tiles": 4}, "image, tiles with marks": {"max_tiles": 4, "tile_marks": True}}
RED, GREY = Image.new("RGB", (20, 12), (200, 30, 60)), Image.linear_gradient("L").convert("RGB")
PROMPTS = [
    ("<image> What is it?", [RED]),
    ("And what, in a few more words than before, is this: <image><image> Tell me.", [GREY, RED]),
    ("Just some text.", []),
]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_model, processor) -> dict[str, Path]:
    """A checkpoint for each case."""
    folder, free = tmp_path_factory.mktemp("checkpoints"), {"license": "apache-2.0"}
    backbones = {"vision": "tiny", "vision_licence": free, "language": "tiny", "language_licence": free}
    for name, values in CASES.items():
        own = AlignVLMProcessor(
            processor.image_processor,
            processor.tokenizer,
            4,
            chat_template=processor.chat_template,
            **TILES.get(name, {}),
        )
        save_checkpoint(make_model(**values), own, folder / name, {"backbones": backbones, "stages": []})
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory) -> dict[str, dict]:
    """What the backend makes of each case, of `image` without the range of its images, and of a folder packaged as usual."""
    work = tmp_path_factory.mktemp("served")
    folders = {name: package(folder, work / name, server="vllm") for name, folder in checkpoints.items()}
    folders["as usual"] = package(checkpoints["image"], work / "as usual")
    folders["not told"] = folders["image"]
    requests = [
        {
            "folder": str(folder),
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "is_mm_prefix_lm": False if name == "not told" else None,
        }
        for name, folder in folders.items()
    ]
    torch.save(requests, work / "requests.pt")
    environment = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(work)}
    command = [sys.executable, "-I", BACKEND, work / "requests.pt", work / "found.pt"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(folders, torch.load(work / "found.pt")))


@torch.no_grad()
def ours(checkpoint: Path, mask_type: str | None = None) -> list[dict]:
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
    model.config.attention_mask_type = mask_type or model.config.attention_mask_type
    model.generation_config.eos_token_id = None  # says as many tokens as the server
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    found = []
    for text, images in PROMPTS:
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append({"inputs": inputs, "logits": model(**inputs).logits[0], "tokens": tokens[0, length:].tolist()})
    return found


def differences(theirs: list[dict], ours: list[dict]) -> list[float]:
    return [float((there["logits"] - here["logits"]).abs().max()) for there, here in zip(theirs, ours)]


@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_our_tokens_and_logits(checkpoints, served, case):
    assert "error" not in served[case], served[case]["error"]
    theirs, here = served[case]["prompts"], ours(checkpoints[case])
    for there, one in zip(theirs, here):
        assert there["input_ids"] == one["inputs"]["input_ids"][0].tolist()
        assert there["tokens"] == one["tokens"]
    assert max(differences(theirs, here)) < 1e-10


def test_without_the_ranges_of_images_it_would_be_the_causal_mask(checkpoints, served):
    theirs = served["not told"]["prompts"]
    one, two, text = differences(theirs, ours(checkpoints["image"]))
    assert min(one, two) > 1e-2 and text < 1e-10
    assert max(differences(theirs, ours(checkpoints["image"], "causal"))) < 1e-10


def test_a_folder_packaged_as_usual_cannot_be_served(served):
    assert "Error(s) in loading state_dict for AlignVLMForConditionalGeneration" in served["as usual"]["error"]


def test_each_mask_type_is_either_what_vllm_makes_or_refused(checkpoints, processor, tmp_path):
    plain = json.loads((checkpoints["image"] / "config.json").read_text())
    for name in MASK_TYPES:
        folder = shutil.copytree(checkpoints["image"], tmp_path / name)
        (folder / "config.json").write_text(json.dumps({**plain, "attention_mask_type": name}))
        assert AlignVLMConfig.from_pretrained(folder).is_mm_prefix_lm == (name == "image")
        if name in serving.MASK_TYPES:
            continue
        with pytest.raises(SystemExit, match=f"error: vLLM cannot serve .*causal and image.*{name!r}. Use"):
            main([str(folder), str(tmp_path / "out"), "--for", "vllm"])
        assert not (tmp_path / "out").exists()
        with pytest.raises(PushError, match=f"cannot be packaged: vLLM cannot serve .*{name!r}"):
            push(folder, "user/mine", server="vllm")


def test_an_image_longer_than_the_sliding_window_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["image, sliding window, capped logits"], tmp_path / "given")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an image has 4 tokens, the window 3"):
        package(folder, tmp_path / "out", server="vllm")
    config["attention_mask_type"] = "causal"
    (folder / "config.json").write_text(json.dumps(config))
    assert package(folder, tmp_path / "out", server="vllm")


def test_code_of_an_older_release_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["image"], tmp_path / "given")
    code = folder / "processing_alignvlm.py"
    code.write_text(code.read_text().replace("_get_num_multimodal_tokens", "_count"))
    with pytest.raises(ValueError, match=r"its processing_alignvlm\.py is of an older release and has no `_get_num"):
        package(folder, tmp_path / "out", server="vllm")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_a_repository_like_any_other(checkpoints, tmp_path):
    out = package(checkpoints["image"], tmp_path / "out", repository="user/mine", server="vllm")
    assert check(out, load=False) == []
    card = (out / "README.md").read_text()
    assert "vllm serve user/mine --trust-remote-code --model-impl transformers" in card
    usual = package(checkpoints["image"], tmp_path / "usual", repository="user/mine")
    assert "vllm" not in (usual / "README.md").read_text()
    differing = [path.name for path in out.iterdir() if path.read_bytes() != (usual / path.name).read_bytes()]
    assert sorted(differing) == ["README.md", "config.json", "manifest.sha256"]


@pytest.mark.slow
def test_the_auto_classes_load_the_folder_and_answer(checkpoints, tmp_path):
    assert try_loading(package(checkpoints["image"], tmp_path / "out", server="vllm"))[0] == []


def test_the_head_is_tied_only_if_the_model_ties_it(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["image, pool, untied llama"], tmp_path / "given")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True  # as the backbone's own; vLLM would believe it
    (folder / "config.json").write_text(json.dumps(config))
    out = package(folder, tmp_path / "out", server="vllm")
    assert json.loads((out / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_the_base_model_stays_in_auto_map_when_the_configuration_is_saved_again(checkpoints, tmp_path):
    assert BASE_MODEL == serving.BASE_MODEL
    out = package(checkpoints["image"], tmp_path / "out", server="vllm")
    for given in (BASE_MODEL, f"user/mine--{BASE_MODEL}"):
        config = json.loads((out / "config.json").read_text())
        config["auto_map"]["AutoModel"] = given
        (out / "config.json").write_text(json.dumps(config))
        AlignVLMConfig.from_pretrained(out).save_pretrained(tmp_path / "again")
        auto_map = json.loads((tmp_path / "again/config.json").read_text())["auto_map"]
        assert auto_map["AutoModel"] == BASE_MODEL and len(auto_map) == 4


def test_the_processor_counts_what_it_writes(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 30)])
    inputs = processor(text="<image><image>", images=[RED, GREY], return_tensors="pt")
    assert sum(counts["num_image_tokens"]) == int(inputs["mm_token_type_ids"].sum()) == 8
    assert sum(counts["num_image_patches"]) == len(inputs["pixel_values"]) == 2
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


@pytest.mark.parametrize("block, tile_marks, made", [("tile", False, "image"), ("image", True, "tile")])
def test_blocks_that_vllm_does_not_make_are_refused(checkpoints, tmp_path, block, tile_marks, made):
    shutil.copytree(checkpoints["image, tiles"], tmp_path / "one")
    for name, values in (
        ("config.json", {"image_block": block}),
        ("processor_config.json", {"tile_marks": tile_marks}),
    ):
        path = tmp_path / "one" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(
        ValueError, match=f"makes the masks of image_block '{made}', and this checkpoint was trained with '{block}'"
    ):
        serving.check_for_vllm(tmp_path / "one")
