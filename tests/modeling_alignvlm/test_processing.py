"""The processor: placeholders, padding, pictures of every kind, and the dense mask."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoTokenizer, pipeline

from alignvlm.stages.chat_templates import CHATML_TEMPLATE, PLAIN_TEMPLATE
from modeling_alignvlm import TokenLayout, dense_mask, to_rgb
from modeling_alignvlm.masking_alignvlm import MASK_TYPES


WITHOUT_CHECKS = """\
{%- for message in messages -%}{{ message.role + ':' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image>{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour=RED, size=(16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_placeholders_become_image_tokens(processor):
    batch = processor(images=[[picture()], []], text=["a <image> b", "c"], padding=True, return_tensors="pt")
    counts = (batch["input_ids"] == processor.image_token_id).sum(-1)
    assert counts.tolist() == [4, 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


MIXED_IMAGES = [[picture(RED)], [], [picture(BLUE), picture(RED)]]
MIXED_PROMPTS = ["Is there a circle at the top left?", "Why?", "What colour differs between them?"]


def conversation(images: list, prompt: str) -> list[dict]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def generate(model, inputs) -> list[list[int]]:
    """New tokens of each row, up to the end."""
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    ends = (model.generation_config.eos_token_id, model.generation_config.pad_token_id)
    return [[token for token in row if token not in ends] for row in tokens.tolist()]


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_batch_is_answered_as_one_prompt_at_a_time(processor, make_model, mask_type):
    """Texts of unequal lengths, with one, no and two images: left padding by default, in all ways to make a batch."""
    model = make_model(mask_type)
    chats = [conversation(*pair) for pair in zip(MIXED_IMAGES, MIXED_PROMPTS)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    alone = [generate(model, processor.apply_chat_template(chat, **options))[0] for chat in chats]
    assert len({tuple(tokens) for tokens in alone}) == 3

    batch = processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][1, 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)
    assert generate(model, batch) == alone

    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert generate(model, processor(images=MIXED_IMAGES, text=texts, padding=True, return_tensors="pt")) == alone


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_pipeline_with_batches_answers_as_one_without(processor, make_model, mask_type):
    model = make_model(mask_type)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    images = [[picture(RED)], [picture(BLUE)], [picture(BLUE), picture(RED)], [picture(RED)]]
    chats = [conversation(shown, prompt) for shown, prompt in zip(images, [*MIXED_PROMPTS, "Why?"])]
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 6}, "return_full_text": False}
    assert pipe(text=chats, batch_size=3, **options) == pipe(text=chats, **options)

    texts = ["<image> What colour is the circle at the top left?", "<image> Why?", "<image> How many?"]
    together = pipe(images=[picture(RED)] * 3, text=texts, **options)
    single = [pipe(images=picture(RED), text=text, **options)[0] for text in texts]
    assert [answer["generated_text"] for answer in together] == [answer["generated_text"] for answer in single]


def test_padding_is_on_the_left_whatever_an_older_checkpoint_says(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"  # for those who load the tokenizer alone
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "right"}))
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "right"
    loaded = type(processor).from_pretrained(tmp_path)
    given = {"text": ["a b c d e f", "a"], "padding": True, "return_tensors": "pt"}
    assert loaded(**given)["attention_mask"].tolist() == processor(**given)["attention_mask"].tolist()
    assert loaded(**given)["attention_mask"][1, 0] == 0 and loaded.tokenizer.padding_side == "left"
    assert loaded(**given, padding_side="right")["attention_mask"][1, 0] == 1
    assert loaded(**given, text_kwargs={"padding_side": "right"})["attention_mask"][1, 0] == 1


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
        ({"images": [picture()], "text": "a"}, "Found 0 .* but 1 image.*Write '<image>' once per image"),
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


def test_every_array_gives_the_pixels_of_the_image_it_holds(processor):
    """numpy and torch, channels first and last, 8-bit, fractions and floating 0..255."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    colours[0, 0], colours[0, 1] = 0, 255

    def pixels(image, **options):
        return processor(images=image, text="<image>", return_tensors="pt", **options)["pixel_values"]

    for channels in (colours, colours[..., 0], colours[..., :1], np.dstack([colours, colours[..., :1]])):
        expected = pixels(Image.fromarray(channels.squeeze()))
        assert expected.std() > 0.1
        layouts = [channels] + ([np.moveaxis(channels, -1, 0)] if channels.ndim == 3 else [])
        for array in layouts:
            for values in (
                array,
                array.astype(np.int64),
                array / 255,
                (array / 255).astype(np.float16),
                array.astype(np.float32),
                (array.astype(np.uint16) * 257),
            ):
                for form in (values, torch.tensor(values) if values.dtype != np.uint16 else values):
                    assert torch.equal(pixels(form), expected), (form.dtype, form.shape)
    assert torch.equal(pixels([torch.tensor(colours).permute(2, 0, 1)[None] / 255]), pixels(Image.fromarray(colours)))
    black_and_white = colours[..., 0] > 127
    assert torch.equal(pixels(black_and_white), pixels(Image.fromarray(black_and_white)))
    close = pixels((torch.tensor(colours) / 255).bfloat16()) - pixels(Image.fromarray(colours))
    assert close.abs().max() < 2.1 / 127.5  # bfloat16 has 8 bits, so a value may be one or two 8-bit steps off


@pytest.mark.parametrize("brightest", [255, 256, 65535])
def test_16_bit_images_of_a_series_are_on_one_scale(brightest, tmp_path):
    """A dark one, of values up to 255, became 257 times brighter."""
    values = np.linspace(0, brightest, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / "grey.png")))[..., 0], (values / 257).round())


@pytest.mark.parametrize("kind", [list, np.stack, lambda images: torch.tensor(np.stack(images))])
def test_each_text_has_its_own_number_of_images(processor, kind):
    """Arrays of four dimensions were counted together, and a text got another's image."""
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    texts, options = ["<image> one", "<image><image> two"], {"return_tensors": "pt", "padding": True}
    with pytest.raises(ValueError, match=r"in text 0 but 2 image\(s\)"):
        processor(images=[kind([black, black]), kind([white])], text=texts, **options)
    pixels = processor(images=[kind([black]), kind([white, white])], text=texts, **options)["pixel_values"]
    assert [bool(image.mean() > 0) for image in pixels] == [False, True, True]


def test_arrays_in_a_batch_and_of_four_dimensions(processor):
    images = torch.rand(2, 3, 16, 16)
    together = processor(images=images, text=["<image> a", "<image> b"], padding=True, return_tensors="pt")
    nested = processor(
        images=[[images[0]], [images[1].numpy()]], text=["<image> a", "<image> b"], padding=True, return_tensors="pt"
    )
    assert torch.equal(together["pixel_values"], nested["pixel_values"])
    messages = conversation([images[1]], "a")
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], together["pixel_values"][1:])


def test_channels_are_first_in_tensors_and_last_in_other_arrays_where_both_could_be():
    values = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3) * 5
    last, first = Image.fromarray(values), Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
    for array, data_format, expected in (
        (values, None, last),
        (torch.tensor(values), None, first),
        (values, "channels_first", first),
        (torch.tensor(values), "channels_last", last),
    ):
        assert np.array_equal(to_rgb(array, data_format), expected)


def test_input_data_format_reaches_arrays_and_nothing_else(processor):
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    expected = processor(images=Image.fromarray(values.transpose(1, 2, 0)), text="<image>", return_tensors="pt")
    for options in (
        {"input_data_format": "channels_first"},
        {"images_kwargs": {"input_data_format": "channels_first"}},
    ):
        given = processor(images=values, text="<image>", return_tensors="pt", **options)
        assert torch.equal(given["pixel_values"], expected["pixel_values"])
        given = processor(images=Image.fromarray(values), text="<image>", return_tensors="pt", **options)
        assert given["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "array, message",
    [
        (torch.randn(3, 16, 16), r"dtype float32 from -[\d.]+ to [\d.]+ .*`pixel_values`"),
        (np.full((16, 16, 3), np.nan), "dtype float64 from nan to nan"),
        (np.linspace(-0.02, 1.03, 256).reshape(16, 16), "from -0.02 to 1.03 .*clamp"),
        (np.linspace(0, 1.03, 256).reshape(16, 16), "from 0 to 1.03"),
        (np.full((16, 16, 3), 300.0), "from 300 to 300"),
        (np.full((16, 16, 3), -1), "dtype int64 from -1 to -1"),
        (np.full((16, 16), 70000), "from 70000 to 70000"),
        (np.zeros((16, 16), dtype=complex), "dtype complex128"),
        (Image.fromarray(np.full((16, 16), -3.0, dtype=np.float32)), "dtype float32 from -3 to -3"),
        (np.zeros((16, 16, 5)), r"shape \(16, 16, 5\)"),
        (np.zeros(7), r"shape \(7,\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        ({"bytes": b"", "path": None}, "a dict for an image"),
        (7, "a int for an image"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(processor, array, message):
    """By its shape, dtype and range; the array itself is never printed."""
    with pytest.raises(ValueError, match=message) as raised:
        processor(images=array, text="<image>", return_tensors="pt")
    assert len(str(raised.value)) < 500


def test_fractions_are_not_rescaled_twice_over(processor):
    for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        with pytest.raises(ValueError, match="do_rescale=False is not for arrays"):
            processor(images=np.zeros((4, 4)), text="<image>", return_tensors="pt", **options)


PART = {"type": "text", "text": "Why?"}


@pytest.mark.parametrize(
    "message, named",
    [
        ({"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}, "Message 0 .*'input_text'"),
        ({"role": "user", "content": [{"type": "video", "path": "a.mp4"}, PART]}, "'video'"),
        ({"role": "user", "content": [{"type": "audio", "path": "a.wav"}, PART]}, "'audio'"),
        ({"role": "user", "content": [{"text": "Why?"}]}, "type None"),
        ({"role": "user", "content": ["Why?"]}, "a str as a part"),
        ({"role": "user", "content": [{"type": "text", "content": "Why?"}]}, "'text' is None"),
        ({"role": "user"}, "no content"),
        ({"role": "user", "content": None, "text": "Why?"}, "has 'text'"),
        ({"role": "user", "content": "Why?", "image": "a.png"}, "has 'image'"),
        ({"role": "user", "content": "Why?", "parts": [PART]}, "has 'parts'"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zoom"}}]}, "'tool_calls'"),
        ({"role": "tool", "content": "42", "tool_call_id": "a"}, "role 'tool'"),
        ({"role": "developer", "content": "Be brief."}, "role 'developer'.*system, user, assistant"),
        ({"content": "Why?"}, "role None"),
    ],
)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML_TEMPLATE, WITHOUT_CHECKS])
def test_parts_of_a_message_without_a_place_are_refused_by_name(processor, message, named, template):
    """Also under the templates that checkpoints were written with before the templates themselves refused anything."""
    for given in ([message], [[*conversation([], "Why?"), message], conversation([], "Why?")]):
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=named.replace("Message 0", r"Message \d")):
                processor.apply_chat_template(given, chat_template=template, tokenize=tokenize, return_dict=tokenize)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML_TEMPLATE])
def test_templates_used_by_a_tokenizer_alone_refuse_what_they_would_drop(tokenizer, template):
    for message, named in (
        ({"role": "user", "content": [{"type": "video"}]}, "video"),
        ({"role": "tool", "content": "42"}, "tool"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zoom"}}]}, "tool_calls"),
    ):
        with pytest.raises(TemplateError, match=named):
            tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
    message = {"role": "user", "content": [PART], "tool_calls": [], "name": None}
    assert "Why?" in tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)


def test_what_the_template_reads_may_be_given(processor):
    """A language model's own template may know of tools; empty fields of other libraries' messages say nothing."""
    template = (
        "{%- for message in messages -%}{{ message.role }}: {{ message.content }}"
        "{%- if message.tool_calls %} calls {{ message.tool_calls[0].function.name }}{% endif -%}"
        "{%- if message.role == 'tool' %}!{% endif -%}{%- endfor -%}{% if tools %}{{ tools | length }} tools{% endif %}"
    )
    messages = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "zoom"}}],
            "refusal": None,
            "audio": [],
        },
        {"role": "tool", "content": "42"},
    ]
    tool = {"type": "function", "function": {"name": "zoom", "parameters": {}}}
    written = processor.apply_chat_template(messages, chat_template=template, tools=[tool])
    assert written == "assistant:  calls zoomtool: 42!1 tools"
    with pytest.raises(ValueError, match="does not read `tools`"):
        processor.apply_chat_template(conversation([], "Why?"), tools=[tool])
    with pytest.raises(ValueError, match="does not read `documents`"):
        processor.apply_chat_template(conversation([], "Why?"), documents=[{"title": "a", "text": "b"}])
    with pytest.raises(ValueError, match="empty"):
        processor.apply_chat_template([])
    with pytest.raises(ValueError, match="not `videos`"):
        processor(text="a", videos=[np.zeros((2, 3, 4, 4))])


def test_image_url_parts_are_images(processor):
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(conversation([picture()], "Why?"), **options)
    for image_url in (url, {"url": url}):
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": image_url}, PART]}]
        given = processor.apply_chat_template(messages, **options)
        assert torch.equal(given["input_ids"], expected["input_ids"])
        assert torch.equal(given["pixel_values"], expected["pixel_values"])


def test_a_pipeline_without_the_placeholder_says_what_to_write(processor, make_model):
    pipe = pipeline("image-text-to-text", model=make_model(), processor=processor)
    with pytest.raises(
        ValueError, match=r"Found 0 '<image>' .* but 1 image.*Write '<image>' once per image.*messages"
    ) as raised:
        pipe(text="Describe", images=picture())
    assert "user typed" not in str(raised.value)


def test_a_typed_placeholder_can_be_sanitized(processor):
    """transformers' own way to have it as plain text."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = conversation([picture()], "What is <image>?")
    with pytest.raises(ValueError, match=r"Found 2 .* but 1 image.*a user typed"):
        processor.apply_chat_template(messages, **options)
    batch = processor.apply_chat_template(messages, **options, sanitize_control_tokens=True)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    assert "What is <image>?" in processor.decode(batch["input_ids"][0])


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match="'<picture>'"):
        type(processor)(processor.image_processor, processor.tokenizer, image_token="<picture>")
