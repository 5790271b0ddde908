"""The chat template as llama.cpp uses it, and the tokens that llama.cpp then makes of a conversation.

llama.cpp hands a chat template messages whose content is one text. In it a marker stands for an image: `<__media__>` at the command line,
`<__media_...__>` with changing letters from the server. What is written is cut at the markers; each piece is tokenised by itself, and
llama.cpp may put tokens of its own before and behind an image. A template whose texts read otherwise than its parts is given lines that
make parts of the text again (`llama_cpp_template`).
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from alignvlm.stages.chat_templates import IMAGE_TOKEN
from modeling_alignvlm import AlignVLMProcessor


MARKER = "<__media__>"
# What llama.cpp hands to every template, and training did not: with them Llama 3.2's writes the day's date.
LLAMA_CPP_NAMES = ("date_string", "datetime")
_FORGET = "{%- set NAME = undefined -%}"
# Around a template that writes IMAGE_TEXT for an image: makes parts of a text with markers, and writes the markers in their places.
_BEFORE = """\
{%- set given = namespace(messages=[], marker='') -%}
{%- for message in messages -%}
{%- if message.content is string and '<__media_' in message.content -%}
{%- set cut = namespace(parts=[]) -%}
{%- for piece in message.content.split('<__media_') -%}
{%- if not loop.first -%}
{%- set given.marker = '<__media_' + piece.split('_>')[0] + '_>' -%}
{%- set cut.parts = cut.parts + [{'type': 'image'}] -%}
{%- endif -%}
{%- set text = piece if loop.first else piece.split('_>')[1:] | join('_>') -%}
{%- if text -%}
{%- set cut.parts = cut.parts + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set given.messages = given.messages + [{'role': message.role, 'content': cut.parts}] -%}
{%- else -%}
{%- set given.messages = given.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = given.messages -%}
{%- set written %}"""
_BEHIND = """{% endset -%}
{{- written | replace(IMAGE_TEXT, given.marker) if given.marker else written -}}
"""


def image_part() -> dict:
    return {"type": "image"}


def said(role: str, *parts: str | dict) -> dict:
    """A message of texts and images."""
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


# Conversations whose tokens must be those of training. Two texts never follow each other: llama.cpp puts a line break between them.
PROBES = [
    [said("user", image_part(), "What colour is it?")],
    [said("user", "Look:\n\n", image_part(), "\n\nwhat is it?")],
    [said("user", "Look: ", image_part(), " and at ", image_part(), " then compare 12 or 345.")],
    [said("user", image_part(), "What is it?"), said("assistant", "A square."), said("user", "And its colour?")],
    [said("system", "Answer in a word."), said("user", image_part(), "What is it?")],
    [said("user", "How are you?")],
]


@dataclass(frozen=True)
class Prompt:
    """What llama.cpp needs to know to write the tokens of a conversation.

    Args:
        template: the chat template in the file.
        adds_bos: whether the begin token is put before it.
        begin, end: what is written before and behind an image.
    """

    template: str
    adds_bos: bool
    begin: str = ""
    end: str = ""


def writes_around_images(processor: AlignVLMProcessor, begin: str, end: str) -> bool:
    """Whether the chat template writes `begin` and `end`, each one token, around an image, and nothing else between them."""
    text = processor.apply_chat_template(PROBES[0], add_generation_prompt=True)
    ids = processor.tokenizer(begin + end, add_special_tokens=False)["input_ids"]
    return begin + processor.image_token + end in text and processor.tokenizer.convert_ids_to_tokens(ids) == [
        begin,
        end,
    ]


def render(processor: AlignVLMProcessor, messages: list[dict], template: str) -> str:
    """Writes a conversation by a template as llama.cpp does: each content is one text with markers for the images."""
    texts = [
        {**message, "content": "".join(part.get("text", MARKER) for part in message["content"])}
        for message in messages
    ]
    return processor.tokenizer.apply_chat_template(
        texts, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def llama_cpp_template(processor: AlignVLMProcessor, begin: str, end: str) -> str:
    """The chat template for the file: the checkpoint's own if it writes texts with markers as it writes parts, else with lines around
    it that make parts of the texts; before it, where it would see them, what llama.cpp hands to it is forgotten.

    Args:
        begin, end: what llama.cpp writes around an image, so that the template must not.
    """
    template, image_text = processor.chat_template, begin + IMAGE_TOKEN + end
    forgotten = "".join(_FORGET.replace("NAME", name) for name in LLAMA_CPP_NAMES if name in template)
    for messages in PROBES:
        try:
            expected = processor.apply_chat_template(messages, add_generation_prompt=True)
        except Exception:  # the template's own refusal, of a system message say
            continue
        if render(processor, messages, template) != expected.replace(image_text, MARKER):
            template = _BEFORE + template.removesuffix("\n") + _BEHIND.replace("IMAGE_TEXT", repr(image_text))
            break
    return forgotten + template


def training_ids(processor: AlignVLMProcessor, messages: list[dict]) -> tuple[list[int], bool]:
    """The tokens of a conversation as training has them, an image as one image token, and whether the tokenizer put its begin token
    before them.

    Raises:
        ValueError: if the tokenizer adds anything else.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    bare = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = processor.tokenizer(text, add_special_tokens=processor.adds_special_tokens(text))["input_ids"]
    adds_bos = ids == [processor.tokenizer.bos_token_id, *bare]
    if ids != bare and not adds_bos:
        raise ValueError(
            f"The tokenizer makes {processor.tokenizer.decode(ids)!r} of {text!r}; llama.cpp can only put a begin token before it."
        )
    return ids, adds_bos


def llama_cpp_ids(
    processor: AlignVLMProcessor, messages: list[dict], prompt: Prompt, tokenizer: Tokenizer
) -> list[int]:
    """The tokens of a conversation as llama.cpp makes them, an image as one image token.

    Args:
        tokenizer: as llama.cpp makes it of the file (`gguf_tokenizer.rebuild`).
    """
    text = render(processor, messages, prompt.template)
    bos = processor.tokenizer.bos_token
    if prompt.adds_bos:
        text = bos + text.removeprefix(bos)
    ids = []
    for index, piece in enumerate(text.split(MARKER)):
        if index:
            ids += tokenizer.encode(prompt.begin).ids + [processor.image_token_id] + tokenizer.encode(prompt.end).ids
        ids += tokenizer.encode(piece).ids
    return ids
