"""Pushing an exported folder: the same checks and the same commit as a checkpoint's, and loading it needs no remote code."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from alignvlm.evaluation.answer import answer
from alignvlm.export.export import export
from alignvlm.stages.checkpoint import save_checkpoint
from hub_upload.checks import check
from hub_upload.package import MANIFEST, files_of, package
from hub_upload.push import PushError, push
from hub_upload.stock import is_stock, package_stock
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.hub_client import Client, ClientError
from tests.hub_upload.test_hub import connect, holds, put, run, text_of
from tests.loopback_hub import LoopbackHub


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(make_model, processor, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("exported")
    free = {"license": "apache-2.0"}
    backbones = {"vision": "user/eyes", "vision_licence": free, "language": "user/words", "language_licence": free}
    save_checkpoint(
        make_model(projector_type="pool"), processor, folder / "given", {"backbones": backbones, "stages": []}
    )
    export(str(folder / "given"), folder / "out")
    return folder / "given", folder / "out"


@pytest.fixture
def mine(exported, tmp_path) -> Path:
    return shutil.copytree(exported[1], tmp_path / "mine")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Client:
    client = connect(hub, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


LOADING = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

options = {"revision": sys.argv[1]}
model = AutoModelForImageTextToText.from_pretrained("user/stock", **options)
processor = AutoProcessor.from_pretrained("user/stock", **options)
parts = [{"type": "image", "image": Image.open("photo.png")}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
assert not any(name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "transformers_modules") for name in sys.modules)
print("RESULT", json.dumps(processor.decode(tokens, skip_special_tokens=True)))
"""


@pytest.mark.slow
def test_pushed_and_loaded_without_remote_code(hub, client, exported, mine, tmp_path):
    checkpoint, _ = exported
    (mine / ".env").write_text("SECRET=1")
    (mine / "modeling_mine.py").write_text("x = 1")
    output = run(hub, tmp_path, ROOT / "hub_upload/push.py", mine, "user/stock", "--tag", "v1")
    commit = hub.repositories["user/stock"].refs["main"]
    assert f'AutoModelForImageTextToText.from_pretrained("user/stock", revision="{commit}")' in output
    staged = package_stock(mine, tmp_path / "staged", repository="user/stock")
    assert holds(hub, "user/stock", staged) and not any(name.endswith(".py") for name in files_of(staged))
    assert hub.repositories["user/stock"].tags == {"v1": commit} and hub.repositories["user/stock"].private
    card = text_of(hub, "user/stock", "README.md")
    assert 'from_pretrained("user/stock")' in card and "license: apache-2.0" in card and "user/eyes" in card
    assert "custom_code" not in card and "trust_remote_code" not in card
    again = client("hub_upload.push:send", staged, "user/stock")
    assert not again["changed"] and again["commit"] == commit and again["kept"] == [] and not again["has_code"]

    photo = Image.effect_noise((40, 30), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    output = run(hub, tmp_path, "-I", "-c", LOADING, commit)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    ours = answer(model, AlignVLMProcessor.from_pretrained(checkpoint), [photo], [["What is it?"]], max_new_tokens=8)[
        0
    ][0]
    theirs = next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
    assert json.loads(theirs).strip() == ours.strip() != ""


def test_a_card_edited_by_hand_keeps_its_text_and_a_licence_is_asked_for(hub, client, mine, tmp_path):
    card = mine / "README.md"
    card.write_text(card.read_text().replace("# out", "# My model"))
    client("hub_upload.push:send", package_stock(mine, tmp_path / "edited", repository="user/edited"), "user/edited")
    there = text_of(hub, "user/edited", "README.md")
    assert "# My model" in there and "edited in the folder" in there and 'from_pretrained("user/edited")' in there
    card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
    with pytest.raises(ClientError, match=r"README.md states no license.*--license LICENSE"):
        client("hub_upload.push:push", mine, "user/unlicensed")
    assert "user/unlicensed" not in hub.repositories
    assert "license: mit" in (package_stock(mine, tmp_path / "given", license="mit") / "README.md").read_text()


def test_it_replaces_no_other_model(hub, client, exported, mine, tmp_path):
    checkpoint, staged = package(exported[0], tmp_path / "checkpoint"), package_stock(mine, tmp_path / "staged")
    client("hub_upload.push:send", checkpoint, "user/checkpoint")
    with pytest.raises(ClientError, match=r"another kind \(model_type 'alignvlm'.*Name another repository"):
        client("hub_upload.push:send", staged, "user/checkpoint")
    client("hub_upload.push:send", staged, "user/export")
    with pytest.raises(ClientError, match=r"another kind \(model_type 'shieldgemma2'.*Name another repository"):
        client("hub_upload.push:send", checkpoint, "user/export")
    hub.create("user/theirs")
    put(hub, "user/theirs", config__json=(mine / "config.json").read_text(), model__safetensors=b"x")
    before = hub.files("user/theirs")
    with pytest.raises(ClientError, match=r"was not pushed from here.*Name another repository"):
        client("hub_upload.push:send", staged, "user/theirs")
    assert hub.files("user/theirs") == before


@pytest.mark.slow
@pytest.mark.parametrize("case", ["weights", "incomplete", "code"])
def test_a_folder_that_fails_the_checks_is_not_sent(hub, client, mine, case):
    if case == "weights":
        weights = load_file(mine / "model.safetensors")
        weights.popitem()
        save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
        said = "weights do not match the configuration: missing_keys"
    elif case == "incomplete":
        (mine / "tokenizer.json").unlink()
        said = "is not a complete export: tokenizer.json missing. Give a folder of `alignvlm export --to transformers`"
    else:
        values = json.loads((mine / "tokenizer_config.json").read_text())
        values["auto_map"] = {"AutoTokenizer": ["someone/else--tokenization.Tokenizer", None]}
        (mine / "tokenizer_config.json").write_text(json.dumps(values))
        said = "tokenizer_config.json: auto_map names code"
    with pytest.raises(ClientError, match=said):
        client("hub_upload.push:push", mine, f"user/bad-{case}")
    assert f"user/bad-{case}" not in hub.repositories


@pytest.mark.parametrize("form, program", [("onnx", "ONNX Runtime and transformers.js"), ("gguf", "llama.cpp")])
def test_an_export_for_another_program_is_refused_with_the_way_to_upload_it(mine, tmp_path, form, program):
    """By the files that `alignvlm export` writes, which tests/export makes."""
    (mine / "model.safetensors").unlink()
    if form == "onnx":
        (mine / "onnx").mkdir()
        (mine / "onnx/decoder_model_merged.onnx").write_bytes(b"")
    else:
        mine = tmp_path / "gguf"
        mine.mkdir()
        for name in ("gguf-F16.gguf", "mmproj-gguf-F16.gguf"):
            (mine / name).write_bytes(b"GGUF")
    said = rf"is an export for {program}, .*`hf upload user/x {mine} --private`"
    with pytest.raises(PushError, match=said):
        push(mine, "user/x")


def test_code_beside_it_is_found_by_the_checks(mine, tmp_path):
    assert is_stock(mine)
    staged = package_stock(mine, tmp_path / "staged")
    assert check(staged, load=False) == []
    (staged / "modeling_mine.py").write_text("x = 1")
    assert "modeling_mine.py: code, which a model of transformers' own needs none of" in check(staged, load=False)
    assert f"modeling_mine.py: not in {MANIFEST}" in check(staged, load=False)
