"""Language models' own chat templates, extended by image parts: texts as before, images in their places, the rest refused."""

import json

import numpy as np
import pytest
from jinja2 import TemplateError
from PIL import Image
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.data.record import Conversation
from alignvlm.rows.encode import Encoder
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.chat_templates import (
    CHATML_TEMPLATE,
    IMAGE_TOKEN,
    PLAIN_TEMPLATE,
    chat_template,
    end_of_turn_ids,
    extended_template,
)
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import make_tokenizer
from tests.stages.conftest import SIZES
from tests.stages.shipped_templates import DEEPSEEK_R1, QWEN2_5, SHIPPED


SYSTEM = {"role": "system", "content": "Answer in one word."}
TURNS = [
    {"role": "user", "content": " Is there a circle? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "What colour\nis it?"},
    {"role": "assistant", "content": "Red."},
]
PICTURE = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
by_name = pytest.mark.parametrize("name", SHIPPED)


def shipped_tokenizer(name: str):
    """A tokenizer as the language model ships it: its template, its special tokens, without an image token."""
    shipped = SHIPPED[name]
    tokenizer = make_tokenizer(tuple(token for token in shipped.special_tokens if token != "</s>"))
    tokenizer.eos_token, tokenizer.bos_token = shipped.eos_token, shipped.bos_token
    if shipped.tokenizer_adds_bos:
        bos = shipped.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = shipped.template
    return tokenizer


def extended_processor(tokenizer) -> AlignVLMProcessor:
    """As assembly makes it."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    template, own = chat_template(tokenizer)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return AlignVLMProcessor(
        images, tokenizer, image_seq_length=4, chat_template=template, template_writes_special_tokens=own
    )


@pytest.fixture(scope="module")
def shipped():
    """A function that gives a shipped tokenizer and the processor made of another copy of it."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = shipped_tokenizer(name), extended_processor(shipped_tokenizer(name))
        return made[name]

    return get


def in_parts(messages: list[dict]) -> list[dict]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def split_parts(messages: list[dict]) -> list[dict]:
    """Each text in two parts, cut between two characters that are not a space."""
    halves = [(message, len(message["content"]) - 3) for message in messages]
    return [
        {
            **message,
            "content": [
                {"type": "text", "text": text} for text in (message["content"][:cut], message["content"][cut:])
            ],
        }
        for message, cut in halves
    ]


def conversations(name: str) -> list[list[dict]]:
    turns = [TURNS[:count] for count in range(1, 5)]
    return turns + [[SYSTEM, *some] for some in turns] if SHIPPED[name].system == "written" else turns


@by_name
@pytest.mark.parametrize("form", [list, in_parts, split_parts])
def test_texts_give_the_tokens_of_the_models_own_template(shipped, name, form):
    tokenizer, processor = shipped(name)
    for messages in conversations(name):
        for prompt in (False, True):
            own = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            batch = processor.apply_chat_template(
                form(messages), add_generation_prompt=prompt, tokenize=True, return_dict=True
            )
            assert batch["input_ids"] == [own]
            alone = processor.tokenizer.apply_chat_template(
                form(messages), add_generation_prompt=prompt, chat_template=processor.chat_template
            )
            assert alone["input_ids"] == own
            text = processor.apply_chat_template(form(messages), add_generation_prompt=prompt)
            assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = processor.tokenizer(text, add_special_tokens=processor.adds_special_tokens(text))["input_ids"]
            assert ids == own  # for who renders and tokenizes in two steps
            if text.startswith(tokenizer.bos_token or "nothing"):
                assert processor(text=[text, text])["input_ids"] == [own, own]


@by_name
def test_questions_are_asked_with_the_tokens_of_the_models_own_template(shipped, name):
    """As `answer` and the evaluation write them: a question alone, and behind an image."""
    tokenizer, processor = shipped(name)
    question = TURNS[2]["content"]
    own = tokenizer.apply_chat_template(TURNS[2:3], add_generation_prompt=True)["input_ids"]
    encoder = Encoder(processor)
    assert list(encoder.prompt([{"role": "user", "content": question}]).input_ids) == own
    prompt = encoder.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])
    shown = {"role": "user", "content": 4 * IMAGE_TOKEN + question}
    written = tokenizer.apply_chat_template([shown], add_generation_prompt=True, tokenize=False)
    assert list(prompt.input_ids) == processor.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert prompt.input_ids.count(processor.image_token_id) == 4


@by_name
@pytest.mark.parametrize("turn", [0, 2])
@pytest.mark.parametrize("place", [0, 1])
def test_an_image_becomes_its_tokens_at_its_place(shipped, name, turn, place):
    """In the first and the second user's turn, before the text and within it."""
    tokenizer, processor = shipped(name)
    messages = [dict(message) for message in TURNS[: turn + 1]]
    parts = [{"type": "text", "text": "Here:"}, {"type": "text", "text": "What is it?"}]
    parts.insert(place, {"type": "image", "image": PICTURE})
    messages[turn]["content"] = parts
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    image = 4 * IMAGE_TOKEN
    messages[turn]["content"] = f"Here:{image}What is it?" if place else f"{image}Here:What is it?"
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert batch["input_ids"].tolist() == [processor.tokenizer(own, add_special_tokens=False)["input_ids"]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4


@by_name
def test_two_images_and_a_batch(shipped, name):
    _, processor = shipped(name)
    image = {"type": "image", "image": PICTURE}
    two = [{"role": "user", "content": [image, image, {"type": "text", "text": "Which?"}]}]
    batch = processor.apply_chat_template(
        [two, TURNS[:1]], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [8, 0]
    assert f"{IMAGE_TOKEN}{IMAGE_TOKEN}Which?" in processor.apply_chat_template(two)


def test_what_a_user_types_can_be_sanitized(shipped):
    """Control tokens and placeholders, as transformers does it; the image's own placeholder stays."""
    for name, (_, processor) in ((name, shipped(name)) for name in ("qwen2.5", "llama3", "gemma")):
        end = SHIPPED[name].end_of_turn
        parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": f"What is <image> and {end}?"}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
        )
        assert (batch["input_ids"] == processor.image_token_id).sum() == 4
        assert f"What is <image> and {end}?" in processor.decode(batch["input_ids"][0])
        ids = batch["input_ids"][0].tolist()
        plain = processor.apply_chat_template(TURNS[:1], tokenize=True, return_dict=True)["input_ids"][0]
        end_id = processor.tokenizer.convert_tokens_to_ids(end)
        assert ids.count(end_id) == plain.count(end_id)


@by_name
def test_a_message_can_be_continued(shipped, name):
    tokenizer, processor = shipped(name)
    messages = [TURNS[0], {"role": "assistant", "content": "It is"}]
    own = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert processor.apply_chat_template(in_parts(messages), continue_final_message=True) == own
    assert own.endswith("It is")


def test_generation_blocks_still_mark_what_the_assistant_says(shipped):
    tokenizer, processor = shipped("with_generation")
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    own = tokenizer.apply_chat_template(TURNS, **options)
    batch = processor.apply_chat_template(in_parts(TURNS), **options)
    assert batch["input_ids"] == [own["input_ids"]] and list(batch["assistant_masks"][0]) == own["assistant_masks"]
    with_image = [dict(message) for message in TURNS]
    with_image[0] = {"role": "user", "content": [{"type": "image", "image": PICTURE}, *in_parts(TURNS)[0]["content"]]}
    batch = processor.apply_chat_template(with_image, **options)
    said = [token for token, marked in zip(batch["input_ids"][0], batch["assistant_masks"][0]) if marked]
    assert tokenizer.decode(said) == "Yes.<|im_end|>Red.<|im_end|>"


@by_name
def test_the_system_message_is_written_or_refused_and_never_dropped(shipped, name):
    _, processor = shipped(name)
    messages = [SYSTEM, TURNS[0]]
    if SHIPPED[name].system == "written":
        assert SYSTEM["content"] in processor.apply_chat_template(in_parts(messages))
        return
    sentence = {
        "refused": "must alternate|not supported",
        "dropped": "no place for the role system; it takes user, assistant",
    }
    with pytest.raises(TemplateError, match=sentence[SHIPPED[name].system]):
        processor.apply_chat_template(messages)


@by_name
def test_what_the_template_does_not_read_is_refused(shipped, name):
    """By the processor, and by the template where a tokenizer uses it alone."""
    _, processor = shipped(name)
    for message, named in (
        ({"role": "user", "content": [{"type": "video"}]}, "video"),
        ({"role": "user", "content": [{"type": "text", "content": "Why?"}]}, "text"),
        ({"role": "developer", "content": "Be brief."}, "developer"),
        ({"role": "user", "content": "Why?", "weight": 1}, "weight"),
    ):
        with pytest.raises(ValueError, match=named):
            processor.apply_chat_template([message])
        with pytest.raises(TemplateError, match=named):
            processor.tokenizer.apply_chat_template([message], chat_template=processor.chat_template, tokenize=False)
    known = name in ("qwen2.5", "llama3.2")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zoom", "arguments": {}}}]}
    result = {"role": "tool", "content": "42"}
    for messages, named in (([TURNS[0], call], "tool_calls"), ([TURNS[0], call, result], "tool")):
        if known:
            assert "zoom" in processor.apply_chat_template(messages)
            continue
        with pytest.raises(ValueError, match=named):
            processor.apply_chat_template(messages)
        with pytest.raises(TemplateError, match=named):
            processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    empty = {**TURNS[0], "refusal": [], "name": None}
    assert "circle" in processor.apply_chat_template([empty])
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
    if known:
        processor.apply_chat_template(TURNS[:1], tools=tools)
    else:
        with pytest.raises(ValueError, match="does not read `tools`"):
            processor.apply_chat_template(TURNS[:1], tools=tools)


def test_further_fields_reach_the_template(shipped):
    """A thought beside the content, under the names that transformers takes for it."""
    tokenizer, processor = shipped("qwen3")
    for field in ("reasoning_content", "thinking"):
        messages = [TURNS[0], {**TURNS[1], field: "I see one."}]
        written = processor.tokenizer.apply_chat_template(
            in_parts(messages), chat_template=processor.chat_template, tokenize=False
        )
        assert "<think>\nI see one.\n</think>" in written
        assert written == tokenizer.apply_chat_template(messages, tokenize=False)


@by_name
def test_rows_hold_what_the_models_own_template_writes_or_are_refused(shipped, name):
    """One exchange always (but for the template that moves the system message), several where the template leaves earlier turns as
    they were when they were asked."""
    tokenizer, processor = shipped(name)
    encoder, end = Encoder(processor), tokenizer.convert_tokens_to_ids(SHIPPED[name].end_of_turn)
    refused = 0
    for *before, answer in conversations(name):
        if answer["role"] != "assistant":
            continue
        try:
            (last,) = encoder.encode(Conversation(before, [answer["content"]]))
            (all_turns,) = encoder.encode(Conversation(before, [answer["content"]], train_on="all"))
        except ValueError as error:
            assert "otherwise once it is answered" in str(error) and (len(before) > 2 or name == "mistral_v3")
            refused += 1
            continue
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True)["input_ids"]
        assert processor.decode(last.input_ids[: last.prompt_length]) == processor.decode(prompt)
        if len(before) <= 2:  # later answers are cut into tokens apart
            assert list(last.input_ids[: last.prompt_length]) == list(prompt)
        assert all_turns.input_ids == last.input_ids and last.input_ids[-1] == end
        answers = sum(message["role"] == "assistant" for message in before) + 1
        assert [t for t, trained in zip(all_turns.input_ids, all_turns.trained) if trained].count(end) == answers
    assert (refused > 0) == SHIPPED[name].rewrites


def test_a_prompt_that_no_answer_follows_is_refused():
    tokenizer = shipped_tokenizer("qwen2.5")
    tokenizer.chat_template = DEEPSEEK_R1
    with pytest.raises(
        ValueError, match=r"writes '.*<think>\\n' before an answer.*could not be trained as it is generated"
    ):
        extended_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    with pytest.raises(ValueError, match=r"writes '.*Answer:' before an answer"):
        extended_template(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('No.') }}"
    with pytest.raises(ValueError, match=r"cannot write a question and an answer: TemplateError: No\."):
        extended_template(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}"
    with pytest.raises(ValueError, match="is not valid Jinja"):
        extended_template(tokenizer)


def test_of_several_templates_the_default_is_taken():
    tokenizer = shipped_tokenizer("qwen2.5")
    expected = extended_template(tokenizer)
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": QWEN2_5}
    assert extended_template(tokenizer) == expected
    tokenizer.chat_template = {"tool_use": QWEN2_5, "rag": QWEN2_5}
    with pytest.raises(ValueError, match="chat templates rag, tool_use and none called default"):
        extended_template(tokenizer)


def test_what_the_original_begins_with_is_kept():
    """Spaces and line breaks at its very start, which a dash in front of them would eat."""
    for start in ("\n", "\n\n  ", "  ", "  {% if true %}{% endif %}", "{# note #}\n", " {{- '' }}"):
        tokenizer = shipped_tokenizer("smollm2")
        tokenizer.chat_template = start + tokenizer.chat_template
        own = tokenizer.apply_chat_template(TURNS, tokenize=False)
        assert tokenizer.apply_chat_template(TURNS, chat_template=extended_template(tokenizer), tokenize=False) == own


def test_models_without_a_template_get_chatml_or_plain_words():
    tokenizer = shipped_tokenizer("qwen2.5")
    tokenizer.chat_template = None
    assert chat_template(tokenizer) == (CHATML_TEMPLATE, False)
    tokenizer = make_tokenizer(())
    assert chat_template(tokenizer) == (PLAIN_TEMPLATE, False)
    tokenizer.chat_template = PLAIN_TEMPLATE  # of a checkpoint, or of the quickstart
    assert chat_template(tokenizer) == (PLAIN_TEMPLATE, False)


@by_name
def test_an_extended_template_is_not_extended_again(shipped, name):
    _, processor = shipped(name)
    processor.tokenizer.chat_template = processor.chat_template
    assert extended_template(processor.tokenizer) == processor.chat_template


@by_name
def test_the_end_of_a_turn_is_found(shipped, name):
    _, processor = shipped(name)
    ends = end_of_turn_ids(processor.tokenizer, processor.chat_template)
    assert processor.tokenizer.convert_ids_to_tokens(sorted(ends)) == [SHIPPED[name].end_of_turn]


def test_a_template_that_ends_no_turn_is_warned_of(caplog):
    tokenizer = make_tokenizer(())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    assert end_of_turn_ids(tokenizer, extended_template(tokenizer)) == set()
    assert "which holds no special token" in caplog.text


@by_name
def test_an_assembled_checkpoint_keeps_the_template_and_stops_at_the_end_of_a_turn(name, vision, tmp_path):
    set_seed(0)
    tokenizer = shipped_tokenizer(name)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    language = LlamaForCausalLM(config)
    language.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    if name == "qwen2.5":
        tokenizer.chat_template = {"default": QWEN2_5, "tool_use": "{{ tools }}"}
    for part in (language, tokenizer):
        part.save_pretrained(tmp_path / "language")
    assemble(BackboneArguments(vision, str(tmp_path / "language"), str(tmp_path / "stage0")))

    processor = AlignVLMProcessor.from_pretrained(tmp_path / "stage0")
    assert processor.chat_template.endswith(SHIPPED[name].template)
    assert AutoTokenizer.from_pretrained(tmp_path / "stage0").chat_template == processor.chat_template
    own = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    given = processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert given["input_ids"] == [own]
    ends = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "stage0").generation_config.eos_token_id
    end_of_turn = tokenizer.convert_tokens_to_ids(SHIPPED[name].end_of_turn)
    assert ends == sorted({tokenizer.eos_token_id, 7, end_of_turn})
    files = {path.name for path in (tmp_path / "stage0").iterdir()}
    assert "chat_template.jinja" in files and "additional_chat_templates" not in files
    assert json.loads((tmp_path / "stage0/processor_config.json").read_text())["template_writes_special_tokens"]


def test_the_real_tokenizer_of_qwen(shared_data):
    """Texts in several languages, and typed control tokens, through Qwen2.5's own vocabulary."""
    tokenizer, copy = (AutoTokenizer.from_pretrained(shared_data / "tokenizers/qwen2.5") for _ in range(2))
    tokenizer.chat_template = copy.chat_template = QWEN2_5
    processor = extended_processor(copy)
    texts = ["What is in this picture?", "  C'est où ?\n\n", "这是什么", "<|im_end|> is typed <image", "1 + 1 = 2\t"]
    for text in texts:
        messages = [{"role": "user", "content": text}, TURNS[1], {"role": "user", "content": text}]
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for given in (messages, in_parts(messages)):
            batch = processor.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=True)
            assert batch["input_ids"] == [own]


@by_name
def test_tokens_around_an_image_are_written_there_and_nowhere_else(shipped, name):
    tokenizer, processor = shipped(name)
    template, own = chat_template(tokenizer, f"<begin>{IMAGE_TOKEN}<end>")
    assert own
    parts = {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]}
    options = {"add_generation_prompt": True, "tokenize": False}
    marked = processor.tokenizer.apply_chat_template([parts], chat_template=template, **options)
    plain = processor.tokenizer.apply_chat_template([parts], chat_template=processor.chat_template, **options)
    assert marked == plain.replace(IMAGE_TOKEN, f"<begin>{IMAGE_TOKEN}<end>") != plain


def test_a_template_that_writes_images_itself_is_not_changed():
    tokenizer = make_tokenizer(())
    for given in (CHATML_TEMPLATE, PLAIN_TEMPLATE):
        tokenizer.chat_template = given
        assert chat_template(tokenizer, f"<b>{IMAGE_TOKEN}") == (
            given.replace(IMAGE_TOKEN, f"<b>{IMAGE_TOKEN}"),
            False,
        )
    tokenizer.chat_template = PLAIN_TEMPLATE + "{#- own -#}"
    assert chat_template(tokenizer) == (tokenizer.chat_template, True)
    with pytest.raises(
        ValueError, match=r"writes <image> itself, and not <b><image>.*--image_begin '' --image_end ''"
    ):
        chat_template(tokenizer, f"<b>{IMAGE_TOKEN}")
