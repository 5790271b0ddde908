"""`cache_features`: training from features kept on disk is training, bit for bit, and no feature outlives what made it."""

import copy
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from alignvlm.data.images import image_hash
from alignvlm.rows.features import FeatureStore
from alignvlm.stages import features
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.stage import main
from alignvlm.tools.plan import main as plan_main
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import AlignVLMModel
from tests.conftest import VISION
from tests.running import SOURCES, arguments_for
from tests.stages.test_stages import launch, weights


TEXTS = {"name": "scene_texts", "count": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of no, one or two images; one image in several rows, and one in two files."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for index in range(7):
        pixels = torch.randint(0, 255, (20, 24, 3), generator=generator).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    groups = [["0.png"], ["1.png", "2.png"], ["copy.png"], ["3.png"], ["4.png", "0.png"], ["5.png"], ["6.png"], []]
    lines = []
    for index, images in enumerate(groups):
        messages = [{"role": "user", "content": f"What is {index}?"}, {"role": "assistant", "content": f"{index} red"}]
        lines.append(json.dumps({"images": images, "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(model, output: Path, data: Path, *more: str, **fields) -> dict:
    """A stage on the rows, two epochs, in batches of two records."""
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {
        "data_dir": data,
        "sources": [{"data": "rows.jsonl"}, TEXTS],
        "eval_sources": [{"data": "rows.jsonl", "limit": 3}],
        "per_device_train_batch_size": 2,
        "max_steps": None,
        "num_train_epochs": 2,
        "projector_learning_rate": 1e-2,
        "language_learning_rate": 1e-3,
        **fields,
    }
    return main([*arguments_for(model, output, **given), *more])


def assert_same(one: dict, other: dict, folder: Path, other_folder: Path) -> None:
    for name in ("logged_losses", "train_loss", "eval_loss_before", "eval_loss_after", "losses_of_data", "steps"):
        assert one[name] == other[name], name
    expected, actual = load_file(folder / "model.safetensors"), load_file(other_folder / "model.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


CASES = {
    "sdpa": {},
    "eager, accumulated": {"attn_implementation": "eager", "gradient_accumulation_steps": 2},
    "bf16, lora with dropout, recomputed": {
        "bf16": True,
        "lora_r": 2,
        "lora_dropout": 0.5,
        "activation_checkpointing": True,
    },
    "16-bit encoder, contrast": {"bf16": True, "frozen_16_bit": True, "token_weighting": "contrast"},
    "two layers, added up, of a 16-bit encoder": {
        "model": {"vision_feature_layer": [-1, -2], "vision_layer_fusion": "weighted_sum"},
        "bf16": True,
        "frozen_16_bit": True,
    },
    "a class token, workers, a row per branch": {
        "model": {"vision": {**VISION, "model_type": "vit", "hidden_act": "gelu"}, "vision_feature_layer": [1, -1]},
        "dataloader_num_workers": 1,
        "attention_mask_type": "prefix",
        "sources": [SOURCES[0], TEXTS],
        "eval_sources": None,
        "max_steps": 5,
    },
    "filled rows": {"row_length": 120, "max_length": 120, "attention_mask_type": "mutual"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_losses_and_weights_are_those_without_it(
    checkpoint, make_model, processor, data, tmp_path, fields, monkeypatch
):
    encoded, fields = [], dict(fields)
    if values := fields.pop("model", None):
        checkpoint = tmp_path / "model"
        save_checkpoint(make_model(**values), processor, checkpoint, {"stages": []})
    encode_images = AlignVLMModel.encode_images

    def counted(self, pixel_values, *others):
        encoded.append(len(pixel_values))
        found = encode_images(self, pixel_values, *others)
        assert found.is_contiguous()  # as kept ones are: kernels differ
        return found

    monkeypatch.setattr(AlignVLMModel, "encode_images", counted)
    plain = run(checkpoint, tmp_path / "plain", data, **fields)
    kept = run(checkpoint, tmp_path / "kept", data, cache_features=True, **fields)
    assert_same(plain, kept, tmp_path / "plain", tmp_path / "kept")
    said = kept["cache_features"]
    assert said["encoded"] == said["images"] == 7
    assert said["share_of_batches"] == 1 and "cache_features" not in plain

    encoded.clear()
    again = {"cache_features": True, "features_dir": tmp_path / "kept/features", **fields}
    again = run(checkpoint, tmp_path / "again", data, **again)
    assert_same(plain, again, tmp_path / "plain", tmp_path / "again")
    assert again["cache_features"]["encoded"] == 0
    assert set(encoded) == {1}  # of the trial for random numbers, and blank images of batches without any


def test_the_next_stage_with_the_same_encoder_reads_them(checkpoint, data, tmp_path):
    fields = {"cache_features": True, "features_dir": tmp_path / "features"}
    first = run(checkpoint, tmp_path / "1", data, **fields)
    rates = {"language_learning_rate": None}
    plain = run(tmp_path / "1", tmp_path / "plain", data, per_device_train_batch_size=3, **rates)
    second = run(tmp_path / "1", tmp_path / "2", data, per_device_train_batch_size=3, **fields, **rates)
    assert first["cache_features"]["encoded"] == 7 and second["cache_features"]["encoded"] == 0
    assert_same(plain, second, tmp_path / "plain", tmp_path / "2")
    (folder,) = (tmp_path / "features").iterdir()
    described = json.loads((folder / "features.json").read_text())
    assert described["images_at_once"] and str(tmp_path) not in json.dumps(described)


def test_a_home_folder_is_found(checkpoint, data, tmp_path, monkeypatch):
    """In every field and source that names a path, as in `output_dir`; `~` is no folder of where the command runs."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir()
    shutil.copytree(checkpoint, tmp_path / "home/model")
    shutil.copytree(data, tmp_path / "home/data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fields = {
        "cache_features": True,
        "features_dir": "~/features",
        "keep_language": 0.2,
        "keep_language_from": "~/model",
    }
    fields |= {"sources": [{"data": "~/data/rows.jsonl", "image_dir": "~/data"}], **SHORT}
    fields |= {"save_strategy": "steps", "save_steps": 1}
    run("~/model", "~/run", "~/data", **fields)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"model", "data", "features", "run"}
    more = {**fields, "sources": [{"data": "rows.jsonl"}], "max_steps": 2, "allow_other_data": True}
    entry = run("~/model", "~/again", "~/data", resume_from_checkpoint="~/run/checkpoint-1", **more)
    assert entry["resumed_at"] == [1] and entry["cache_features"]["encoded"] == 0


def changed_encoder(model, processor):
    with torch.no_grad():
        next(model.model.vision_tower.parameters())[0] += 1e-3


def changed_processor(model, processor):
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def changed_layer(model, processor):
    model.config.vision_feature_layer = -2


@pytest.fixture(scope="module")
def first(checkpoint, data, tmp_path_factory) -> Path:
    """The features of a stage of one step."""
    folder = tmp_path_factory.mktemp("first")
    run(checkpoint, folder / "stage", data, cache_features=True, features_dir=folder / "features", **SHORT)
    return folder / "features"


SHORT = {"max_steps": 1, "eval_sources": None}


@pytest.mark.parametrize("change", [None, changed_encoder, changed_processor, changed_layer, "bf16"])
def test_what_makes_other_features_does_not_read_old_ones(make_model, processor, data, first, tmp_path, change):
    shutil.copytree(first, tmp_path / "features")
    model, processor = make_model(), copy.deepcopy(processor)
    if callable(change):
        change(model, processor)
    save_checkpoint(model, processor, tmp_path / "model", {"stages": []})
    fields = {**SHORT, "cache_features": True, "features_dir": tmp_path / "features", "bf16": change == "bf16"}
    said = run(tmp_path / "model", tmp_path / "2", data, **fields)["cache_features"]
    assert said["encoded"] == (said["images"] if change else 0)
    assert len(list((tmp_path / "features").iterdir())) == (2 if change else 1)


def test_a_changed_image_is_another_image(data, tmp_path):
    shutil.copy(data / "0.png", tmp_path / "0.png")
    before = image_hash(tmp_path / "0.png")
    assert before == image_hash({"path": "copy.png", "folder": str(data), "bytes": None})
    assert before == image_hash({"bytes": (data / "0.png").read_bytes()}) != image_hash(data / "1.png")
    shutil.copy(data / "1.png", tmp_path / "0.png")
    assert image_hash(tmp_path / "0.png") == image_hash(data / "1.png")
    opened = Image.open(data / "0.png")
    assert image_hash(opened) == image_hash(opened.convert("RGB")) != image_hash(opened.rotate(180))


def test_a_resumed_run_is_one_that_was_not_interrupted(checkpoint, data, tmp_path):
    fields = {"cache_features": True, "save_strategy": "steps", "save_steps": 3}
    straight = run(checkpoint, tmp_path / "straight", data, **fields)
    shutil.copytree(tmp_path / "straight/checkpoint-9", tmp_path / "resumed/checkpoint-9")
    (kept,) = (tmp_path / "straight/features").iterdir()
    left = tmp_path / "resumed/features" / kept.name  # as a kill leaves it: an unfinished file beside a complete one
    left.mkdir(parents=True)
    store = FeatureStore(kept)
    keys = sorted(store._places)[:3]
    FeatureStore(left).write(keys, store.stacked(keys))
    (left / "0.safetensors.1.tmp").write_bytes(b"half")
    resumed = run(checkpoint, tmp_path / "resumed", data, "--resume_from_checkpoint", **fields)
    assert resumed["cache_features"]["encoded"] == 4 and resumed["resumed_at"] == [9]
    names = ("logged_losses", "train_loss", "eval_loss_after", "steps")
    assert all(resumed[name] == straight[name] for name in names)
    expected, actual = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_an_image_that_cannot_be_read_is_skipped_as_without_it(checkpoint, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "5.png").unlink()
    fields = {"on_bad_image": "skip", "max_bad_images": 0.5, "eval_sources": None}
    plain = run(checkpoint, tmp_path / "plain", folder, **fields)
    kept = run(checkpoint, tmp_path / "kept", folder, cache_features=True, **fields)
    assert plain["losses_of_data"]["bad_image"] == 4 and kept["cache_features"]["images"] == 6
    plain["eval_loss_before"] = plain["eval_loss_after"] = kept["eval_loss_before"] = kept["eval_loss_after"] = None
    assert_same(plain, kept, tmp_path / "plain", tmp_path / "kept")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_learning_rate": 1e-3}, "keeps features of a frozen encoder, and vision_learning_rate=0.001 trains"),
        ({"streaming": True, "max_steps": 2}, "a stream does not"),
        ({"torch_compile": True}, "a compiled encoder rounds otherwise"),
        ({"cache_features": None, "features_dir": "x"}, "features_dir='x' is read by cache_features only"),
        ({"features_dir": __file__}, "features_dir='.*py': .*py' is a file. Name a folder"),
        ({"features_dir": f"{__file__}/below"}, "features_dir='.*below': .*py' is a file. Name a folder"),
        ({"sources": [TEXTS], "eval_sources": None}, "no source has an image"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_where_it_cannot_be_it_is_refused(checkpoint, data, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path / "run", data, **{"cache_features": True, **fields})
    assert not (tmp_path / "run" / RUN_RECORD).exists() and not (tmp_path / "run/features").exists()


def test_an_encoder_with_dropout_is_refused(make_model, processor, data, tmp_path):
    vision = make_model().config.vision_config.to_dict() | {"attention_dropout": 0.1}
    save_checkpoint(make_model(vision=vision), processor, tmp_path / "model", {"stages": []})
    with pytest.raises(ValueError, match=r"'siglip_vision_model' draws random numbers in training \(dropout\)"):
        run(tmp_path / "model", tmp_path / "run", data, cache_features=True)
    assert not (tmp_path / "run/features").exists()


def rounding_by(batch_sizes):
    """An encoder whose kernels round otherwise in batches of some sizes."""
    encode_images = AlignVLMModel.encode_images

    def encode(self, pixel_values, *others):
        found = encode_images(self, pixel_values, *others)
        return found * (1 + 1e-6) if len(pixel_values) in batch_sizes else found

    return encode


def test_batches_in_which_the_encoder_rounds_otherwise_are_encoded(checkpoint, data, tmp_path, monkeypatch):
    """Not read from the disk; and if they are the usual ones, the option is refused."""
    monkeypatch.setattr(AlignVLMModel, "encode_images", rounding_by({3}))
    plain = run(checkpoint, tmp_path / "plain", data)
    kept = run(checkpoint, tmp_path / "kept", data, cache_features=True)
    assert 0.5 < kept["cache_features"]["share_of_batches"] < 1
    assert_same(plain, kept, tmp_path / "plain", tmp_path / "kept")

    encode_images = AlignVLMModel.encode_images
    monkeypatch.setattr(
        AlignVLMModel,
        "encode_images",
        lambda self, pixels, *others: (
            encode_images(self, pixels, *others) + (torch.arange(len(pixels)) * 1e-3)[:, None, None]
        ),
    )
    with pytest.raises(
        ValueError, match=r"in fp32, the encoder 'siglip_vision_model' gives an image other last bits in"
    ):
        run(checkpoint, tmp_path / "run", data, cache_features=True, per_device_train_batch_size=4)
    assert not (tmp_path / "run/features").exists()


def test_the_plan_says_how_large_it_will_be_and_refuses_what_does_not_fit(
    checkpoint, data, tmp_path, capsys, monkeypatch
):
    recipe = tmp_path / "stage1.yaml"
    recipe.write_text(
        f"stage: 1\nmodel: {checkpoint}\noutput_dir: {tmp_path}/out\nprojector_learning_rate: 1.0e-3\ncache_features: true\n"
        f"data_dir: {data}\nsources: [{{data: rows.jsonl}}, {{name: scenes, count: 20}}]\nper_device_train_batch_size: 2\n"
    )
    plan_main(["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"])
    told = capsys.readouterr().out
    assert f"at most 29 images x 4 positions x 32 values x 4 bytes = {29 * 4 * 32 * 4 / 1e9:.3g} GB" in told
    run(checkpoint, tmp_path / "run", data, cache_features=True)
    (folder,) = (tmp_path / "run/features").iterdir()
    stored = sum(value.nbytes for file in folder.glob("*.safetensors") for value in load_file(file).values())
    assert stored == 7 * 4 * 32 * 4

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        ValueError, match=r"needs 1\.48e-05 GB below .*out/features', where 1e-06 GB are free. Name another"
    ):
        plan_main(["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"])
    monkeypatch.setattr("alignvlm.stages.stage.check_room", lambda *_: None)  # for the weights there is room
    with pytest.raises(ValueError, match=r"cache_features needs 3\.58e-06 GB below"):
        run(checkpoint, tmp_path / "full", data, cache_features=True)
    assert not (tmp_path / "full/features").exists()


TWO_STAGES = """
import sys
from accelerate import PartialState
from accelerate.state import AcceleratorState
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.stage import run_stage
for more in (["--output_dir", sys.argv[1]], ["--output_dir", sys.argv[2], "--cache_features", "true"]):
    run_stage(parse_fields([*sys.argv[3:], *more], StageArguments)[0])
    AcceleratorState._reset_state()
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_same_losses(checkpoint, data, tmp_path):
    fields = {
        "sources": [{"data": str(data / "rows.jsonl")}, TEXTS],
        "projector_learning_rate": 1e-2,
        "output_dir": None,
    }
    (tmp_path / "two_stages.py").write_text(TWO_STAGES)
    folders = [tmp_path / "plain", tmp_path / "kept"]
    given = arguments_for(checkpoint, tmp_path, **fields, per_device_train_batch_size=2)
    launch(tmp_path / "two_stages.py", *map(str, folders), *given)
    plain, kept = (read_run_record(folder)["stages"][-1] for folder in folders)
    assert kept["cache_features"]["encoded"] == 7 and kept["processes"] == 2
    assert kept["cache_features"]["share_of_batches"] == 1
    assert len(list((tmp_path / "kept/features").glob("*/*.safetensors"))) == 2
    assert_same(plain, kept, *folders)
