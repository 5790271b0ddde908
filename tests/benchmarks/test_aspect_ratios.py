"""Views of photos that are not square: what the encoder is shown, and the comparison of the answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MobileNetV2ImageProcessor, ResNetConfig, ResNetModel

from alignvlm.evaluation.questions import load_task
from benchmarks import questions_and_images
from benchmarks.aspect_ratios import (
    COMPARED,
    LONG,
    SIDE,
    STRIDE,
    VIEWS,
    long_ones,
    measure,
    own_shape,
    table,
    tiles,
    tokens_of_view,
)
from benchmarks.questions_and_images import Questions


SIZES = [(60, 40), (40, 60), (40, 40), (90, 30)]  # width, height


@pytest.fixture
def vision(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "vision")
    processor = MobileNetV2ImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


def photo(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(336, 224), (224, 560), (211, 160), (100, 100)])
def test_an_own_shape_has_the_pixels_of_the_square_and_the_shape_of_the_image(size):
    (((height, width), grid),) = own_shape(SIDE, Image.new("RGB", size))
    assert grid == (1, 1) and height % STRIDE == width % STRIDE == 0
    assert height * width == pytest.approx(SIDE**2, rel=0.2)
    assert abs(np.log(width / height * size[1] / size[0])) < np.log(1.2)


def test_tiles_are_crops_of_the_resized_image_behind_the_overview(vision):
    model = ResNetModel.from_pretrained(vision).eval()
    processor = MobileNetV2ImageProcessor.from_pretrained(vision)
    image = photo((60, 40))
    shapes = tiles(20, 6, image)
    assert shapes == [((20, 20), (1, 1)), ((40, 60), (2, 3))]
    assert tiles(64, 6, image) == [((64, 64), (1, 1))]  # no larger than a tile: not cut
    found = tokens_of_view(model, processor, image, shapes)
    crops = [image.crop((x, y, x + 20, y + 20)) for y in (0, 20) for x in (0, 20, 40)]  # the image has the grid's size
    expected = []
    for each in (image.resize((20, 20), Image.Resampling.BILINEAR), *crops):
        with torch.no_grad():
            output = model(processor(each, do_resize=False, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
        expected.append(output.flatten(1).T)
    torch.testing.assert_close(
        found, torch.cat(expected), atol=0.05, rtol=0
    )  # bytes of the overview may round otherwise
    torch.testing.assert_close(found[len(expected[0]) :], torch.cat(expected[1:]), atol=1e-4, rtol=0)


def test_views_are_compared_on_the_questions_about_long_images(vision, tmp_path, monkeypatch):
    monkeypatch.setattr(questions_and_images, "PASSES", 2)
    sets = []
    for name, count in (("train", 24), ("test", 12)):
        rows = []
        for number in range(count):
            photo(SIZES[number % 4], number).save(tmp_path / f"{name}{number}.png")
            answers = ("yes", "red") if number % 3 else ("no", "blue")
            for asked, answer in zip(("is it wide?", "what colour is it?"), answers):
                rows.append({"image": f"{name}{number}.png", "question": asked, "answer": answer})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sets.append(Questions(load_task("local", name, str(tmp_path / f"{name}.jsonl"))))
    asked = long_ones(sets[1])
    lengths = [max(SIZES[index % 4]) / min(SIZES[index % 4]) for index in sets[1].images[asked].tolist()]
    assert len(asked) == 18 and min(lengths) >= LONG
    found = measure(*sets, str(vision))
    assert (found["questions"], found["images"]) == (18, 9) and list(found["views"]) == list(VIEWS)
    for view, values in found["views"].items():
        earlier = [other for other in COMPARED if list(VIEWS).index(other) < list(VIEWS).index(view)]
        assert list(values["over"]) == earlier and 0 <= values["numbers"]["accuracy"]["value"] <= 1
        for other in earlier:
            gain = values["over"][other]["accuracy"]
            numbers = (found["views"][name]["numbers"]["accuracy"]["value"] for name in (view, other))
            assert gain["difference"] == pytest.approx(next(numbers) - next(numbers))
            assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]
    counts = [found["views"][view]["tokens"] for view in VIEWS]
    assert counts[0] < counts[1] and counts[3] >= counts[0]
    lines = table({"tasks": {"photos": found}}).splitlines()
    assert len(lines) == 2 + sum(len(values["numbers"]) for values in found["views"].values())
    assert len({line.count("|") for line in lines}) == 1
