"""The processor: placeholders, padding, pictures of every kind, and the dense mask."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_alignvlm import TokenLayout, dense_mask, to_rgb
from modeling_alignvlm.configuration_alignvlm import MASK_TYPES


RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour=RED, size=(16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_placeholders_become_image_tokens(processor):
    batch = processor(images=[[picture()], []], text=["a <image> b", "c"], padding=True, return_tensors="pt")
    counts = (batch["input_ids"] == processor.image_token_id).sum(-1)
    assert counts.tolist() == [4, 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_unequal_image_counts(processor, side):
    images = [[picture(RED)], [picture(BLUE), picture(RED)]]
    batch = processor(
        images=images, text=["<image> a", "<image><image> bb cc"], padding=True, padding_side=side, return_tensors="pt"
    )
    first = batch["attention_mask"][0].tolist()
    assert 0 in first and first == sorted(first, reverse=side == "right")
    flat = processor(
        images=[images[0][0], *images[1]],
        text=["<image> a", "<image><image> bb cc"],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    assert torch.equal(batch["pixel_values"], flat["pixel_values"])


def test_chat_template_with_images_in_every_form(processor, tmp_path):
    path = tmp_path / "red.png"
    picture().save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    ids = []
    for image in ({"image": picture()}, {"path": str(path)}, {"url": f"data:image/png;base64,{encoded}"}):
        messages = [
            {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "What colour is it?"}]}
        ]
        batch = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert batch["pixel_values"].shape == (1, 3, 16, 16)
        assert torch.allclose(batch["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
        ids.append(batch["input_ids"][0].tolist())
    assert ids[0] == ids[1] == ids[2]
    assert processor.decode(ids[0]) == "User:" + "<image>" * 4 + " What colour is it?\nAssistant:"


def test_assistant_tokens_are_marked_for_multi_turn_chats(processor):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    batch = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [t for t, m in zip(batch["input_ids"][0], batch["assistant_masks"][0]) if m]
    assert processor.decode(marked) == " two</s> four</s>"


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_dense_mask_on_request_is_the_one_the_model_builds(processor, make_model, mask_type):
    arguments = {
        "images": [picture(RED), picture(BLUE)],
        "text": ["<image> a b c d", "<image> c"],
        "padding": True,
        "return_tensors": "pt",
    }
    plain, dense = processor(**arguments), processor(**arguments, dense_mask_type=mask_type)
    length = plain["input_ids"].shape[1]
    assert dense["attention_mask"].shape == (2, 1, length, length) and dense["attention_mask"].dtype == torch.bool
    real = plain["attention_mask"].bool()
    layout = TokenLayout.from_input_ids(
        plain["input_ids"], processor.image_token_id, 4, attention_mask=real, prompt_mask=real
    )
    assert torch.equal(dense["attention_mask"], dense_mask(layout, mask_type))
    model = make_model(mask_type)
    with torch.no_grad():
        expected = model(**plain, prompt_mask=real).logits[real]
        torch.testing.assert_close(model(**dense).logits[real], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="return_tensors"):
        processor(text="a", dense_mask_type=mask_type)


def test_pictures_of_every_mode_become_the_same_rgb():
    grey = Image.new("L", (4, 4), 128)
    sixteen = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    for image in (
        grey,
        grey.convert("LA"),
        grey.convert("RGBA"),
        grey.convert("P"),
        sixteen,
        Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.int32)),
        Image.fromarray(np.full((4, 4), 128 / 255, dtype=np.float32)),
        Image.fromarray(np.full((4, 4), 128.0, dtype=np.float32)),
        grey.convert("RGB").convert("CMYK"),
        grey.convert("RGB").convert("YCbCr"),
    ):
        rgb = np.asarray(to_rgb(image)).astype(int)
        assert rgb.shape == (4, 4, 3) and abs(rgb - 128).max() <= 2, image.mode
    assert set(np.unique(to_rgb(Image.fromarray(np.eye(4, dtype=bool))))) == {0, 255}  # mode 1


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    assert [to_rgb(palette).getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_exif_rotation_is_honoured(processor, tmp_path):
    image = picture(BLUE, (16, 8))
    image.paste(RED, (0, 0, 8, 8))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by 90 degrees clockwise: the left becomes the top
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    upright = to_rgb(Image.open(path))
    assert upright.size == (8, 16) and upright.getpixel((4, 2)) == RED and upright.getpixel((4, 14)) == BLUE
    pixels = processor(images=str(path), text="<image>", return_tensors="pt")["pixel_values"][0]
    assert pixels[0, 2].mean() > 0.9 and pixels[2, 14].mean() > 0.9


def test_animations_give_their_current_frame(tmp_path):
    path = tmp_path / "two.gif"
    picture(RED).save(path, save_all=True, append_images=[picture(BLUE)])
    assert to_rgb(Image.open(path)).getpixel((3, 3)) == RED


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"images": [picture(), picture()], "text": "<image> a"},
            r"Found 1 '<image>' placeholder\(s\) in the text but 2",
        ),
        ({"images": [picture()], "text": "is <image> <image> a tag?"}, "Found 2 .* but 1 image.*a user typed"),
        ({"images": [[picture()], [picture()]], "text": ["<image><image>", "a"]}, r"Found 2 .* in text 0 but 1 image"),
        ({"text": "<image>"}, r"Found 1 .* but 0 image"),
        ({"images": [], "text": []}, "The batch is empty"),
    ],
)
def test_miscounted_images_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments, return_tensors="pt")


def test_damaged_and_missing_files_are_named(processor, tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    for name, content in (("cut.jpg", whole.getvalue()[:400]), ("text.jpg", b"not a picture"), ("empty.jpg", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            processor(images=str(path), text="<image>", return_tensors="pt")
    with pytest.raises(ValueError, match=r"nowhere\.jpg"):
        processor(images=str(tmp_path / "nowhere.jpg"), text="<image>", return_tensors="pt")


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match="'<picture>'"):
        type(processor)(processor.image_processor, processor.tokenizer, image_token="<picture>")
