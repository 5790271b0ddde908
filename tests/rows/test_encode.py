"""Conversations to tokens: what is trained of them, what branches share, and that packed rows of them train what separate rows do."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alignvlm.data.record import Conversation, Record
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Branch, Encoder
from alignvlm.rows.packing import IGNORED, shortened, trunk_length
from modeling_alignvlm import AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests import examples
from tests.records import of_exchanges
from tests.rows.test_packing import WORDS, assert_same, loss_and_gradients


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def image(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (16, 16), tuple(rng.choices(range(256), k=3)))


def random_conversation(rng: random.Random, opening: list[dict], images: int) -> dict:
    """A conversation that goes on from some messages with one to four exchanges, `images` images anywhere in the user's turns."""
    turns = rng.randint(1, 4)
    where = [rng.randrange(turns) for _ in range(images)]
    messages = list(opening)
    for turn in range(turns):
        parts = [{"type": "text", "text": words(rng)} for _ in range(rng.randint(1, 2))]
        for _ in range(where.count(turn)):
            parts.insert(rng.randint(0, len(parts)), {"type": "image"})
        messages.append({"role": "user", "content": parts})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": words(rng)})
    responses = [words(rng) for _ in range(rng.randint(1, 3))]
    return {"messages": messages, "responses": responses, "train_on": rng.choice(("last", "all"))}


def random_record(rng: random.Random) -> dict:
    """Up to three images and one to three conversations, which may begin alike."""
    images = [image(rng) for _ in range(rng.randint(0, 3))]
    opening = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    used = 0
    if rng.random() < 0.5:
        used = rng.randint(0, len(images))
        content = [{"type": "image"}] * used + [{"type": "text", "text": words(rng)}]
        opening += [{"role": "user", "content": content}, {"role": "assistant", "content": words(rng)}]
    later = len(images) - used
    conversations = [random_conversation(rng, opening, rng.randint(0, later)) for _ in range(rng.randint(1, 3))]
    return {"images": images, "conversations": conversations}


@settings(max_examples=examples(8), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(MASK_TYPES)), st.sampled_from(("sdpa", "eager")))
def test_packed_equals_separate_for_random_conversations(processor, make_model, seed, mask_type, kernel):
    """In float64, but for the loss itself, and under eager attention for its softmax, which transformers takes in float32."""
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(2)]
    model = make_model(mask_type, attn_implementation=kernel).double().train()
    packed = AlignVLMCollator(processor, mask_type, row_length=rng.choice((None, 250)))(records)
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)(records)
    assert (packed["labels"] != IGNORED).sum() == (separate["labels"] != IGNORED).sum()
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_same(gradients, expected, tolerance=1e-4 if kernel == "eager" else 5e-6)


@pytest.mark.slow
def test_packed_equals_separate_under_a_compiled_flex_kernel(processor, make_model):
    rng = random.Random(4)
    records = [random_record(rng) for _ in range(3)]
    packed = AlignVLMCollator(processor, "image", row_length=512, pad_to_multiple_of=128)(records)
    separate = AlignVLMCollator(processor, "image", shared_image=False)(records)
    model = make_model("image").eval()
    with torch.no_grad():
        expected = model(**separate, use_cache=False).loss
        torch.compiler.reset()
        model.set_attn_implementation("flex_attention")
        found = model(**packed, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 10**6))
def test_the_assistants_turns_are_trained_and_all_is_written_as_the_template_does(processor, seed):
    rng = random.Random(seed)
    conversation = Conversation(**random_record(rng)["conversations"][0])
    for response, branch in zip(conversation.responses, Encoder(processor).encode(conversation), strict=True):
        messages = [*conversation.messages, {"role": "assistant", "content": response}]
        text = processor.apply_chat_template(messages).rstrip("\n")
        expanded = text.replace("<image>", "<image>" * processor.image_seq_length)
        assert processor.decode(branch.input_ids) == expanded
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        trained = answers if conversation.train_on == "all" else answers[-1:]
        labelled = [token for token, is_trained in zip(branch.input_ids, branch.trained) if is_trained]
        assert processor.decode(labelled) == "".join(f" {answer}</s>" for answer in trained)
        assert branch.prompt_length == branch.trained.index(True)


def brute_force_trunk(branches: list[Branch], image_token: int, image_length: int) -> int:
    """The longest prefix that keeps every rule, by trying all of them."""
    best = 0
    for length in range(1, min(map(len, branches)) + 1):
        prefix = branches[0].input_ids[:length]
        alike = all(branch.input_ids[:length] == prefix for branch in branches)
        before_the_last_of_a_prompt = all(length <= branch.trained.index(True) - 1 for branch in branches)
        if alike and before_the_last_of_a_prompt and prefix.count(image_token) % image_length == 0:
            best = length
    return best


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10**6))
def test_the_trunk_is_the_longest_that_may_be_shared(processor, seed):
    record = Record.from_row(random_record(random.Random(seed)))
    encoder = Encoder(processor)
    branches = [branch for conversation in record.conversations for branch in encoder.encode(conversation)]
    rules = (processor.image_token_id, processor.image_seq_length)
    assert trunk_length(branches) == brute_force_trunk(branches, *rules)


def test_a_trunk_never_ends_inside_an_image():
    ids = [7, 1, 1, 1, 1, 8, 9]
    image_ids = (-1, 0, 0, 0, 0, -1, -1)
    branches = [
        Branch(tuple(ids), (False,) * 6 + (True,), 6, image_ids),
        Branch((7, 1, 1, 5, 9), (False,) * 4 + (True,), 4, (-1, 0, 0, -1, -1)),
    ]
    assert trunk_length(branches) == 1
    assert trunk_length([branches[0], branches[0]]) == 5


def test_captions_share_their_prompt(processor):
    rng = random.Random(0)
    prompt = "how many shapes"
    captions = ["a red circle", "two squares", "no green at the left"]
    record = of_exchanges([image(rng)], [(prompt, caption) for caption in captions])
    batch = AlignVLMCollator(processor)([record])
    ids, branches = batch["input_ids"][0], batch["branch_ids"][0]
    trunk = processor.decode(ids[branches == 0])
    prompt_ids = processor.tokenizer(f"User:<image> {prompt}\nAssistant:")["input_ids"]
    assert len(ids[branches == 0]) == len(prompt_ids) - 1 + processor.image_seq_length - 1
    assert prompt in trunk
    for index, caption in enumerate(captions, 1):
        assert processor.decode(ids[branches == index]).endswith(f": {caption}</s>")


def test_an_image_after_an_answer_stays_in_its_branch(processor):
    """Two conversations about the same second image: the row holds it twice, each before what is said of it."""
    rng = random.Random(1)
    first, second = image(rng), image(rng)

    def conversation(*middle):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]
        for answer in middle:
            content = [{"type": "text", "text": "green"}, {"type": "image"}]
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": content}]
        return {"messages": messages, "responses": ["yes"], "train_on": "all"}

    record = {"images": [first, second], "conversations": [conversation("a"), conversation("two"), conversation()]}
    collator = AlignVLMCollator(processor)
    (row,) = collator.rows(record)
    assert [id(shown) for shown in row.images] == [id(first), id(second), id(second)]
    numbers = [n for n, token in zip(row.branch_ids, row.input_ids) if token == processor.image_token_id]
    assert numbers == [0] * 4 + [1] * 4 + [2] * 4
    assert collator([record])["pixel_values"].shape[0] == 3


def test_a_long_text_before_an_image_costs_the_record_and_not_the_run(processor):
    """The image stands behind more words than fit: its row ends before it, or is dropped where nothing is trained by then."""
    rng = random.Random(2)
    long = {"role": "user", "content": [{"type": "text", "text": "red " * 60}, {"type": "image"}]}
    early = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "yes"}, long]
    collator = AlignVLMCollator(processor, max_length=40)
    found = []
    for messages in ([long], early):
        conversation = {"messages": messages, "responses": ["no"], "train_on": "all"}
        batch = collator([{"images": [image(rng)], "conversations": [conversation]}])
        assert "pixel_values" not in batch
        found.append(([loss["kind"] for loss in batch["losses_of_data"]], int((batch["labels"] != IGNORED).sum())))
    answer = len(processor.tokenizer(" yes</s>")["input_ids"])
    assert found == [(["dropped_record"], 0), (["cut_response"], answer)]


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120))
def test_a_shortened_branch_ends_in_an_answer_and_cuts_no_image(processor, seed, length):
    conversation = Conversation(**random_record(random.Random(seed))["conversations"][0])
    branch = Encoder(processor).encode(conversation)[0]
    image_token, image_length = processor.image_token_id, processor.image_seq_length
    cut = shortened(branch, length)
    if cut is None:
        assert not any(branch.trained[:length])
        return
    assert len(cut) <= length and cut.input_ids == branch.input_ids[: len(cut)] and cut.trained[-1]
    assert cut.input_ids.count(image_token) % image_length == 0
    assert not any(branch.trained[len(cut) : length])


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    """As those that drop the thoughts of all answers but the last."""
    template = processor.chat_template.replace(
        "{%- generation -%}", "{%- if loop.last -%}{{ ' (thought)' }}{%- endif -%}{%- generation -%}"
    )
    forgetful = AlignVLMProcessor(
        processor.image_processor, processor.tokenizer, processor.image_seq_length, chat_template=template
    )
    one = {"role": "user", "content": "red"}
    assert len(Encoder(forgetful).encode(Conversation([one], ["yes"]))) == 1
    several = Conversation([one, {"role": "assistant", "content": "no"}, one], ["yes"])
    with pytest.raises(ValueError, match="writes what stands before message 1 otherwise"):
        Encoder(forgetful).encode(several)


def test_what_a_template_writes_at_the_very_end_is_no_part_of_answers(processor):
    """Phi-3's ends a finished conversation with one more token."""
    template = processor.chat_template + "{%- if not add_generation_prompt -%}{{ '<pad>' }}{%- endif -%}"
    phi = AlignVLMProcessor(processor.image_processor, processor.tokenizer, 4, chat_template=template)
    one = {"role": "user", "content": "red"}
    conversation = Conversation([one, {"role": "assistant", "content": "no"}, one], ["yes"], train_on="all")
    (branch,) = Encoder(phi).encode(conversation)
    assert phi.decode(branch.input_ids) == "User: red\nAssistant: no</s>\nUser: red\nAssistant: yes</s>"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"messages": [], "responses": []}, "no response"),
        ({"messages": [{"role": "tool", "content": "x"}], "responses": ["y"]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}], "responses": ["y"]}, "type 'video'"),
        ({"messages": [{"role": "assistant", "content": "x"}], "responses": ["y"]}, "from the assistant"),
        ({"messages": [], "responses": ["y"], "train_on": "none"}, "train_on='none'"),
    ],
)
def test_a_malformed_conversation_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Conversation(**fields)


def test_an_image_part_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"1 image part\(s\), its record 0 image"):
        Record([], [Conversation([{"role": "user", "content": [{"type": "image"}]}], ["y"])])
