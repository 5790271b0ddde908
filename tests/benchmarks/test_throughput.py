"""The old trunk that throughput.py compares with, and the work it counts."""

import json

import pytest
import torch

from alignvlm.data.formats import CAPTION_PROMPT, annotations, captions
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.chat_templates import IMAGE_TOKEN, chat_template
from benchmarks import models, throughput
from modeling_alignvlm import AlignVLMProcessor
from tests.conftest import TEXT, VISION


SHAPE = {"vision": {**VISION, "vision_use_head": False}, "text": {**TEXT, "vocab_size": 64}}
IMAGE_TOKENS, BEFORE_IMAGE, BEHIND_PROMPT = 4, 24, 5


@pytest.fixture
def options(monkeypatch) -> dict:
    """Those of a comparison, in tiny."""
    monkeypatch.setitem(models.SHAPES, "tiny", SHAPE)
    names = ("annotations", "prompt_tokens", "response_tokens", "vision_layers", "text_layers", "row_length")
    given = {"shape": "tiny", "workload": "captions", "stage": "all", "device": "cpu", "dtype": "fp32", "steps": 2}
    return {**dict.fromkeys(names), **given, "attn_implementation": "eager", "images": 3}


def rows_of(collator_class: type[AlignVLMCollator], processor, workload: str, **given):
    made = models.records(workload, 2, 16, 64, **given)
    return collator_class(processor)([annotations(record).to_row() for record in made])


def test_the_old_trunk_ends_with_the_image_and_trains_the_same(options):
    model, processor = models.alignvlm(*models.configs("tiny"))
    old, new = (rows_of(each, processor, "captions") for each in (models.ImageTrunkCollator, AlignVLMCollator))
    trunk = BEFORE_IMAGE + IMAGE_TOKENS
    assert ((old["branch_ids"] == 0).sum(-1) == trunk).all()
    shared = models.WORKLOADS["captions"][1] + BEHIND_PROMPT - 1  # the last token of each predicts its response
    assert ((new["branch_ids"] == 0).sum(-1) == trunk + shared).all()
    old_loss, new_loss = (model(**batch).loss for batch in (old, new))
    torch.testing.assert_close(old_loss, new_loss)


def test_a_shared_prompt_is_counted_once(options):
    rows = throughput.compare_counts(options, throughput.SYSTEMS)
    lengths = {row["system"]: row["length"] for row in rows}
    prompt = models.WORKLOADS["captions"][1] + BEHIND_PROMPT
    trunk = BEFORE_IMAGE + IMAGE_TOKENS
    assert lengths["image trunk"] == trunk + 5 * (prompt + 20)
    assert lengths["packed"] == trunk + (prompt - 1) + 5 * (1 + 20)
    assert lengths["unpacked"] == trunk + prompt + 20
    assert lengths["llava"] == lengths["unpacked"] + 1  # TRL trains the line break behind a turn
    packed, old, unpacked, llava = rows
    assert packed["flops"] < old["flops"] < unpacked["flops"] < llava["flops"]
    assert packed["bare_tflop"] == old["bare_tflop"] < packed["tflop"]
    assert packed["flops_to_image_trunk"] == packed["flops"] / old["flops"]
    assert len(throughput.table(rows).split("\n")) == 1 + len(rows)


def test_questions_that_share_nothing_cost_the_same(options):
    packed, old = throughput.compare_counts({**options, "workload": "questions"}, ("packed", "image trunk"))
    assert packed["flops"] == old["flops"]


@pytest.fixture(scope="module")
def qwen(shared_data) -> AlignVLMProcessor:
    """A processor with the tokenizer and template of Qwen2.5."""
    from transformers import AutoTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/qwen2.5")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    template, own = chat_template(tokenizer)
    assert own
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return AlignVLMProcessor(
        images,
        tokenizer,
        image_seq_length=IMAGE_TOKENS,
        chat_template=template,
        template_writes_special_tokens=own,
    )


def test_rows_are_as_long_as_qwens(qwen, options):
    """The recipes' prompt for captions, with responses as long as the benchmark's; and a question with an answer."""
    _, processor = models.alignvlm(*models.configs("tiny"))
    text = "dog " * 18 + "dog"
    assert len(qwen.tokenizer(text)["input_ids"]) == 19
    image = models.records("captions", 1, 16, 64)[0]["images"][0]
    for collator in (models.ImageTrunkCollator, AlignVLMCollator):
        real = collator(qwen)([captions({"image": image, "captions": [text] * 5}).to_row()])
        made = rows_of(collator, processor, "captions")
        for name in ("branch_ids", "position_ids", "prompt_mask"):
            torch.testing.assert_close(real[name][0], made[name][0])
        where = (batch["input_ids"][0] == each.image_token_id for batch, each in ((real, qwen), (made, processor)))
        torch.testing.assert_close(*where)
    assert len(qwen.tokenizer(CAPTION_PROMPT)["input_ids"]) == models.WORKLOADS["captions"][1]


def test_questions_are_as_long_as_pathvqas_and_share_nothing(qwen, shared_data):
    rows = [json.loads(line)["questions"] for line in (shared_data / "pathvqa/train.jsonl").open()]
    tokens = iter(qwen.tokenizer([asked["question"] for row in rows for asked in row])["input_ids"])
    asked = [[next(tokens) for _ in row] for row in rows]
    answered = qwen.tokenizer([asked["answer"] for row in rows for asked in row])["input_ids"]
    count = len(answered)
    _, prompt, response = models.WORKLOADS["questions"]
    assert round(sum(len(question) for row in asked for question in row) / count) == prompt
    assert round(sum(map(len, answered)) / count + 1) == response  # the token that ends an answer is one more
    alike = [len({question[0] for question in row}) == 1 for row in asked if len(row) > 1]
    assert sum(alike) < 0.02 * len(alike)


def test_captions_are_shorter_than_20_tokens(qwen, shared_data):
    with (shared_data / "text/flickr30k_train_captions.jsonl").open() as file:
        captions_of = [json.loads(line)["captions"] for _, line in zip(range(2000), file)]
    tokens = qwen.tokenizer([caption for row in captions_of for caption in row])["input_ids"]
    assert round(sum(map(len, tokens)) / len(tokens) + 1) == 15
