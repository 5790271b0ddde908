"""The measurements on photos, on a few drawn ones with models of random weights: the arms, and a real one."""

import argparse
import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from alignvlm.data import scenes
from benchmarks import wide_photos
from benchmarks.findings import Photos, SmallPhotos
from benchmarks.tokens import Arm, run
from benchmarks.tokens_photos import ARMS, FrontierOnPhotos, FrontierOnSmallPhotos
from benchmarks.wide_photos import WidePhotos
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests.conftest import make_tokenizer
from tests.stages.conftest import SIZES, vision  # noqa: F401 - a fixture


COUNT = 10  # photos; of the last three, which have captions by a model, one is held out


@pytest.fixture(scope="module")
def world(tmp_path_factory, vision):  # noqa: F811
    """Makes a world of `benchmarks`, on a folder laid out as `benchmarks/real_photos.py` says."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("flickr8k/images", "pathvqa", "text", "daquar/images", "vqa_rad/images"):
        (folder / name).mkdir(parents=True)
    records = scenes.make_scenes(COUNT, annotations=("short_caption",))
    rows, by_model = [], []
    for number, record in enumerate(records):
        image, (caption,) = f"images/{number}.png", record["conversations"][0]["responses"]
        record["images"][0].save(folder / "flickr8k" / image)
        split = "train" if number < COUNT - 3 else "val"
        rows.append({"image": image, "split": split, "captions": [caption, f"There is {caption}"]})
        if split == "val":
            by_model.append({"image": image, "blip2_zero_shot": caption, "blip2_lora_flickr8k": caption})
    asked = [{"image": "images/0.png", "question": "What?", "answer": "this"}]
    for file, content in (
        ("flickr8k/captions.jsonl", rows),
        ("flickr8k/ai_captions.jsonl", by_model),
        ("daquar/qa.jsonl", asked),
        ("vqa_rad/train.jsonl", asked),
    ):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in content))
    tokenizer = make_tokenizer(())
    set_seed(1)
    language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=2))
    for part in (language, tokenizer):
        part.save_pretrained(folder / "language")

    def make(kind, output):
        given = argparse.Namespace(photos=folder, vision=vision, language=str(folder / "language"))
        return kind(output, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Photos, "HELD_OUT", 1)
        yield make


def test_arms_on_photos_differ_only_in_what_they_are_named_after(world, tmp_path):
    found = world(Photos, tmp_path).findings(seed=3)
    for mask, stages in found["masks"].arms.items():
        assert [changes.pop("attention_mask_type") for _, changes in stages] == [mask] * 2
    assert list(found["masks"].arms) == list(MASK_TYPES)
    assert len({json.dumps(stages) for stages in found["masks"].arms.values()}) == 1
    from_nothing, from_stage3 = found["downstream"].arms.values()
    assert from_nothing == from_stage3[-1:]


def test_small_photos_train_the_encoder_in_stage_2_alone_and_share_its_features_where_they_are_the_same(
    world, tmp_path
):
    found = world(SmallPhotos, tmp_path).findings(seed=3)
    arms = {
        name: {arm: [*finding.shared, *stages] for arm, stages in finding.arms.items()}
        for name, finding in found.items()
    }
    for number, changes in (stage for finding in arms.values() for stages in finding.values() for stage in stages):
        assert number == 2 if "vision_learning_rate" not in changes else changes["vision_learning_rate"] is None
    cached = {
        name: {arm: {changes["features_dir"] for _, changes in stages} for arm, stages in finding.items()}
        for name, finding in arms.items()
    }
    features = {str(tmp_path / "features")}
    assert cached == {
        "masks": {"causal": features, "image": features, "prefix": {None}, "mutual": {None}},
        "alignment": {"short": {None}, "long": {None}},
        "downstream": {"from stage 0": features, "from stage 3": features},
        "recaptions": dict.fromkeys(found["recaptions"].arms, features),
    }
    for mask, stages in found["masks"].arms.items():
        assert [changes.pop("attention_mask_type") for _, changes in stages] == [mask] * 2
        for _, changes in stages:
            assert changes.pop("cache_features") == (changes.pop("features_dir") is not None)
    assert len({json.dumps(stages) for stages in found["masks"].arms.values()}) == 1
    assert [[number for number, _ in arm] for arm in found["alignment"].arms.values()] == [[1, 2, 3]] * 2
    from_nothing, from_stage3 = found["downstream"].arms.values()
    assert from_nothing == from_stage3[-1:] and len(from_stage3) == 3


def test_captions_of_held_out_photos_are_not_trained_on(world, tmp_path):
    data = world(Photos, tmp_path).output / "data"
    read = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in data.glob("*.jsonl")}
    images = {name: {row["image"] for row in rows} for name, rows in read.items()}
    assert images["test"] == {"images/7.png"} and len(images["train"]) == COUNT - 3
    assert images["human"] == images["BLIP-2"] == images["BLIP-2 tuned"] == {"images/8.png", "images/9.png"}
    assert {len(row["captions"]) for row in read["human"] + read["BLIP-2"]} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FrontierOnPhotos, FrontierOnSmallPhotos])
def test_fewer_tokens_are_measured_on_photos(world, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(kind, "sizes", (2, 0, 2))
    monkeypatch.setattr(kind, "in_process", True)
    shuffle = ARMS["pixel shuffle, 2 x 2, 256 pixels"].assembly | {"image_size": 16}
    arms = {"mlp": Arm(), "merged": Arm({"merge_image_tokens": 1}), "shuffled": Arm(shuffle)}
    results = tmp_path / "results.json"
    run(world(kind, tmp_path), arms, seeds=1, results=results)
    found = json.loads(results.read_text())[kind.results]
    whole = found["tokens"].pop("mlp")
    assert found["tokens"] == {"merged": 1, "shuffled": whole // 4} and whole >= 4
    for name, runs in found["runs"].items():
        values = runs["0"]["values"]
        assert values["loss"] > 0 and values["CIDEr"] >= 0, name


def test_each_half_of_a_wide_image_is_a_photo_with_its_own_captions(world, tmp_path, monkeypatch):
    data = world(WidePhotos, tmp_path).output / "data"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    photos = [Image.open(data / "flickr8k" / row["image"]).convert("RGB") for row in rows]
    monkeypatch.setattr(wide_photos, "SIDE", photos[0].width)
    record = wide_photos.pair(rows[1:3], data / "flickr8k")
    (image,) = record.images
    wide = np.asarray(Image.open(io.BytesIO(image["bytes"])))
    for half, photo in zip(np.split(wide, 2, axis=1), photos[1:3], strict=True):
        np.testing.assert_array_equal(half, np.asarray(photo))
    asked = [(conversation.prompt.split()[-2], conversation.responses) for conversation in record.conversations]
    assert asked == [("left", rows[1]["captions"]), ("right", rows[2]["captions"])]


@pytest.mark.slow
def test_tiles_are_measured_on_pairs_of_photos(world, tmp_path, monkeypatch):
    monkeypatch.setattr(WidePhotos, "sizes", (1, 0, 2))
    monkeypatch.setattr(WidePhotos, "HELD_OUT", 2)
    monkeypatch.setattr(WidePhotos, "in_process", True)
    results = tmp_path / "results.json"
    own = world(WidePhotos, tmp_path)
    run(own, {"squashed": Arm(), "tiles": Arm({"max_tiles": 2})}, seeds=1, results=results)
    found = json.loads(results.read_text())["wide_photos"]
    assert found["tokens"]["tiles"] == 3 * found["tokens"]["squashed"]
    for runs in found["runs"].values():
        assert runs["0"]["values"]["loss"] > 0 and runs["0"]["values"]["CIDEr"] >= 0
    stages = own.stages(1, 0, 2)
    files = [changes["sources"][0]["data"] for _, changes in stages]
    assert files == ["pairs-train-0-1.parquet", "pairs-train-1-3.parquet"]
    assert [changes["eval_sources"] for _, changes in stages] == [None, [{"data": "pairs-test-0-1.parquet"}]]
