"""Rows of records: what is trained is exactly what separate sequences would train."""

import pickle

import pytest
import torch
from PIL import Image

from alignvlm.data import scenes
from alignvlm.rows.collator import AlignVLMCollator
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests.records import of_exchanges


def record(*annotations, images=1) -> dict:
    pictures = [Image.new("RGB", (16, 16), (60 * i, 200, 30)) for i in range(images)]
    return of_exchanges(pictures, annotations)


QUESTIONS = (("Is there a circle?", "yes"), ("What colour is it?", "red"), ("How many shapes are there?", "two"))


def test_a_row_holds_the_trunk_once_and_each_annotation_as_a_branch(processor):
    collator = AlignVLMCollator(processor)
    batch = collator([record(*QUESTIONS)])
    ids, branches = batch["input_ids"][0], batch["branch_ids"][0]
    trunk = ids[branches == 0]
    assert processor.decode(trunk) == "User:" + "<image>" * 4 + " "  # all three questions begin with a space
    for index, (prompt, response) in enumerate(QUESTIONS, 1):
        whole = processor.decode(torch.cat([trunk, ids[branches == index]]))
        assert whole == "User:" + "<image>" * 4 + f" {prompt}\nAssistant: {response}</s>"
        positions = batch["position_ids"][0][branches == index]
        assert positions.tolist() == list(range(len(trunk), len(trunk) + len(positions)))
    assert batch["pixel_values"].shape[0] == 1


def test_only_responses_and_their_end_carry_labels(processor):
    batch = AlignVLMCollator(processor)([record(*QUESTIONS)])
    labelled = batch["labels"][0] != -100
    assert torch.equal(batch["labels"][0][labelled], batch["input_ids"][0][labelled])
    assert processor.decode(batch["labels"][0][labelled]) == "".join(f" {response}</s>" for _, response in QUESTIONS)
    assert not (batch["prompt_mask"][0] & labelled).any()


def test_prompts_have_the_tokens_they_have_at_inference(processor):
    collator = AlignVLMCollator(processor)
    for prompt, response in QUESTIONS:
        batch = collator([record((prompt, response))])
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inference = processor(images=Image.new("RGB", (16, 16)), text=text, return_tensors="pt")["input_ids"][0]
        assert torch.equal(batch["input_ids"][0][: len(inference)], inference)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_packed_row_gives_loss_and_gradients_of_separate_rows(processor, make_model, mask_type):
    """The split by mask type included: `prefix` and `mutual` cannot share a trunk and get one row per annotation."""
    records = [record(*QUESTIONS), record(QUESTIONS[1], images=2), record(("Say something.", "Fine."), images=0)]
    packed = AlignVLMCollator(processor, mask_type)(records)
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)(records)
    rows = 3 if MASK_TYPES[mask_type].shares_trunk else 5
    assert len(packed["input_ids"]) == rows and len(separate["input_ids"]) == 5
    gradients, losses = [], []
    for batch in (packed, separate):
        model = make_model(mask_type).double().train()  # the loss itself is taken in float32
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    largest = max(gradient.norm() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        if gradient.norm() > 1e-6 * largest:  # the bias of a key projection, say, has no gradient but rounding
            assert (gradients[0][name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_text_records_and_padding(processor, make_model):
    batch = AlignVLMCollator(processor, pad_to_multiple_of=32)(
        [record(("Say something.", "Fine."), images=0), record(*QUESTIONS)]
    )
    assert batch["input_ids"].shape[1] % 32 == 0
    assert torch.equal(batch["record_ids"] == -1, batch["attention_mask"] == 0)
    text_only = AlignVLMCollator(processor)([record(("Say something.", "Fine."), images=0)])
    assert "pixel_values" not in text_only
    assert make_model()(**text_only).loss.isfinite()


def test_annotations_that_do_not_fit_make_further_rows_and_long_ones_lose_the_end_of_a_response(processor):
    whole = AlignVLMCollator(processor)([record(*QUESTIONS)])
    length = whole["input_ids"].shape[1]
    divided = AlignVLMCollator(processor, max_length=length - 1)([record(*QUESTIONS)])
    assert divided["branch_ids"].amax(1).tolist() == [2, 0] and len(divided["pixel_values"]) == 2
    assert divided["input_ids"].shape[1] < length and "losses_of_data" not in divided
    up_to_image = int((whole["input_ids"][0] == processor.image_token_id).nonzero().max()) + 1
    long = ("What is it?", "red " * 50)
    cut = AlignVLMCollator(processor, max_length=40)([record(long)])
    assert cut["input_ids"].shape[1] == 40 and (cut["input_ids"] == processor.image_token_id).sum() == 4
    assert [loss["kind"] for loss in cut["losses_of_data"]] == ["cut_response"]
    beside = AlignVLMCollator(processor, max_length=40)([record(long, QUESTIONS[0], ("red " * 50, "no"))])
    assert [loss["kind"] for loss in beside["losses_of_data"]] == ["cut_response", "dropped_annotation"]
    assert len(beside["input_ids"]) == 2 and torch.equal(beside["input_ids"][0], cut["input_ids"][0])
    assert "yes" in processor.decode(beside["input_ids"][1])
    nothing = AlignVLMCollator(processor, max_length=up_to_image + 2)([record(long)])
    assert [loss["kind"] for loss in nothing["losses_of_data"]] == ["dropped_record"]
    with pytest.raises(ValueError, match=f"max_length={up_to_image + 1} leaves no room"):
        AlignVLMCollator(processor, max_length=up_to_image + 1)([record(long)])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"images": [], "conversations": []}, "no conversations"),
        (record(("What is <image>?", "a tag")), r"'What is <image>\?' holds the placeholder"),
        (record(("What?", "an <image>")), "'an <image>' holds the placeholder"),
    ],
)
def test_bad_records_are_named(processor, bad, message):
    with pytest.raises(ValueError, match=message):
        AlignVLMCollator(processor)([bad])


def test_real_scenes_do_not_leak_under_any_mask(processor):
    dataset = scenes.make_scenes(4, annotations=("short_caption", "detailed_caption", "questions"))
    for mask_type in MASK_TYPES:
        batch = AlignVLMCollator(processor, mask_type)([dataset[i] for i in range(4)])
        assert (batch["labels"] != -100).any(-1).all()


def test_a_collator_can_be_sent_to_a_worker_that_is_not_forked(processor):
    records = [scenes.make_scenes(3)[i] for i in range(3)]
    collator = AlignVLMCollator(processor, max_length=90)
    expected = collator(records)
    found = pickle.loads(pickle.dumps(collator))(records)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if torch.is_tensor(value))
