"""The measurements on photos, on a few drawn ones with models of random weights: the arms, and a real one."""

import argparse
import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from alignvlm.data import scenes
from benchmarks.findings import Photos, SmallPhotos
from benchmarks.tokens import Arm, run
from benchmarks.tokens_photos import ARMS, FrontierOnPhotos, FrontierOnSmallPhotos
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
