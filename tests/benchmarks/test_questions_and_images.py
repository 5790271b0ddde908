"""The network that answers questions from their words and pooled features of an image."""

import json

import pytest
import torch
from PIL import Image
from transformers import MobileNetV2ImageProcessor, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from alignvlm.evaluation.questions import load_task
from benchmarks.questions_and_images import Answerer, Questions, measure, pooled_features, table


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def written(folder, name: str, count: int):
    """Questions whose words tell nothing of their answer, but the picture does; and some that the words do tell."""
    rows = []
    for index in range(count):
        colour = ("red", "blue")[index % 2]
        Image.new("RGB", (40, 40), COLOURS[colour]).save(folder / f"{name}{index}.png")
        for asked in COLOURS:
            questions = [(f"is the thing {asked}?", "yes" if asked == colour else "no"), ("is water wet?", "yes")]
            rows += [{"image": f"{name}{index}.png", "question": q, "answer": answer} for q, answer in questions]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task("local", name, str(folder / f"{name}.jsonl"))


def test_the_image_adds_what_the_words_do_not_tell(tmp_path):
    sets = [written(tmp_path, name, count) for name, count in (("train", 200), ("test", 40))]
    colours = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(count // 2, 1) for count in (200, 40)]
    found = measure(*map(Questions, sets), *colours)
    values = {name: number["value"] for name, number in found["numbers"]["yes_no_accuracy"].items()}
    assert values["image"] == 1.0
    assert values["words"] == pytest.approx(
        2 / 3, abs=0.01
    )  # of three questions of an image, one is told by its words
    assert values["another_image"] < 0.9
    for name in ("words", "another_image"):
        gain = found["differences"][name]["yes_no_accuracy"]
        assert gain["difference"] == pytest.approx(1 - values[name])
        assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]
    (line,) = [line for line in table({"tasks": {"made up": found}}).splitlines() if "yes/no" in line]
    assert line.startswith(
        f"| made up | yes/no accuracy | 1.000 | {values['another_image']:.3f} | {values['words']:.3f} |"
    )


def test_without_sight_the_image_is_not_read_and_with_it_the_product_is():
    torch.manual_seed(0)
    words, starts, images = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2]), torch.randn(2, 5)
    blind = Answerer(3, 5, 4, sees=False).eval()
    assert torch.equal(blind(words, starts, images), blind(words, starts, -images))
    seeing = Answerer(3, 5, 4).eval()
    question = torch.stack([seeing.question.weight[[0, 1]].mean(0), seeing.question.weight[[2, 1]].mean(0)])
    product = torch.tanh(4 * question) * torch.tanh(seeing.image(images))
    sums = torch.stack([seeing.by_words.weight[[0, 1]].sum(0), seeing.by_words.weight[[2, 1]].sum(0)])
    expected = sums + product @ seeing.by_both.weight.T + seeing.by_both.bias
    torch.testing.assert_close(seeing(words, starts, images), expected)


@pytest.mark.parametrize("kind", ["map", "tokens"])
def test_features_are_the_mean_over_the_encoder_s_last_output_of_each_record_s_image(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "map":
        model = ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ).eval()
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vision")
    processor = MobileNetV2ImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "vision")
    found = pooled_features(written(tmp_path, "train", 18), str(tmp_path / "vision"))  # more than a batch
    for index in (0, 1, 17):
        pixels = processor(Image.open(tmp_path / f"train{index}.png"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(pixels).last_hidden_state[0]
        expected = output.mean((1, 2)) if kind == "map" else output.mean(0)
        torch.testing.assert_close(found[index], expected, atol=1e-4, rtol=0)
    assert not torch.allclose(found[0], found[1])
    if kind == "map":
        seen = pooled_features(
            load_task("local", "train", str(tmp_path / "train.jsonl")), str(tmp_path / "vision"), 64, 2
        )
        larger = MobileNetV2ImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
        pixels = larger(Image.open(tmp_path / "train1.png"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            (output,) = model(pixels).last_hidden_state
        half = output.shape[-1] // 2
        corners = torch.stack(
            [output[:, y : y + half, x : x + half].mean((1, 2)) for y in (0, half) for x in (0, half)], dim=1
        )
        torch.testing.assert_close(seen[1], corners.flatten(), atol=1e-4, rtol=0)


def test_another_image_is_never_the_own_and_all_questions_of_an_image_share_it(tmp_path):
    questions = Questions(written(tmp_path, "test", 6))
    assert len(questions.asked) == 18  # the same question with the same answer is asked once
    assert (questions.images != questions.others).all()
    for image in range(6):
        assert len(set(questions.others[questions.images == image].tolist())) == 1
