"""A mask type is a row of one table: types added to it at run time train, prefill and decode as a definition in loops says."""

import pytest
import torch
from PIL import Image

from alignvlm.evaluation.answer import answer
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.packing import IGNORED
from alignvlm.stages.language_trial import try_language_model
from modeling_alignvlm import AlignVLMConfig, MaskType, TokenLayout, same_image
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, both_before_response, describe_mask_types
from tests.modeling_alignvlm import test_masking
from tests.modeling_alignvlm.test_masking import oracle
from tests.records import of_exchanges


def same_image_or_images_of_the_prompt(layout, b, q, k):
    images = (layout.image_ids[b, q] >= 0) & (layout.image_ids[b, k] >= 0)
    return same_image(layout, b, q, k) | (images & both_before_response(layout, b, q, k))


# Each with its rule, written once more for single tokens. No two make the same demands.
NEW = {
    "album": (
        MaskType(
            "as `image`, and images before the first response see each other",
            looks_ahead=same_image_or_images_of_the_prompt,
            needs_prompt=True,
            text_looks_ahead=False,
            shares_trunk=False,
        ),
        lambda q, k: q.image != -1 and (q.image == k.image or (k.image != -1 and q.prompt and k.prompt)),
    ),
    "window": (
        MaskType(
            "the next two before the first response",
            looks_ahead=lambda layout, b, q, k: both_before_response(layout, b, q, k) & (k - q <= 2),
            needs_prompt=True,
            text_looks_ahead=True,
            shares_trunk=False,
        ),
        lambda q, k: q.prompt and k.prompt and k.index - q.index <= 2,
    ),
    "near": (
        MaskType(
            "the next one of the same image",
            looks_ahead=lambda layout, b, q, k: same_image(layout, b, q, k) & (k - q <= 1),
            needs_prompt=False,
            text_looks_ahead=False,
            shares_trunk=True,
        ),
        lambda q, k: q.image != -1 and q.image == k.image and k.index - q.index <= 1,
    ),
}


@pytest.fixture(params=NEW)
def mask_type(request, monkeypatch) -> str:
    """The name of a mask type that is in the table while the test runs."""
    row, rule = NEW[request.param]
    monkeypatch.setitem(MASK_TYPES, request.param, row)
    monkeypatch.setitem(test_masking.LOOKS_AHEAD, request.param, rule)
    return request.param


def picture(seed: int) -> Image.Image:
    return Image.new("RGB", (16, 16), ((60 * seed) % 256, 200, (90 * seed) % 256))


def record(*annotations: tuple[str, str], images: int = 1) -> dict:
    return of_exchanges([picture(seed) for seed in range(images)], list(annotations))


RECORDS = [
    record(("Is there a circle?", "yes"), ("What colour is it?", "red"), ("How many?", "two")),
    record(("What differs between them?", "the colour"), ("Why?", "It is so."), images=3),
    record(("Say something.", "Fine."), images=0),
]


def test_the_dense_mask_is_the_definition_and_the_row_says_what_the_rule_does(mask_type):
    for name in test_masking.LAYOUTS:
        test_masking.test_mask_equals_the_written_definition(name, mask_type)
    test_masking.test_the_table_says_what_the_rules_do(mask_type)


def test_configuration_and_messages_know_it(processor, mask_type, tmp_path):
    AlignVLMConfig(attention_mask_type=mask_type).save_pretrained(tmp_path)
    assert AlignVLMConfig.from_pretrained(tmp_path).attention_mask_type == mask_type
    with pytest.raises(ValueError, match=f"Valid values: {', '.join(MASK_TYPES)}"):
        AlignVLMConfig(attention_mask_type="sideways")
    with pytest.raises(ValueError, match="Unknown mask type 'sideways'"):
        AlignVLMCollator(processor, "sideways", shared_image=False)
    assert f"`{mask_type}`: {MASK_TYPES[mask_type].explanation}" in describe_mask_types()


@pytest.mark.parametrize("row_length", [None, 96])
def test_training_applies_the_definition(make_model, processor, mask_type, row_length):
    """Logits are those under the definition as a ready mask; loss and gradients are those of one row per annotation."""
    packed = AlignVLMCollator(processor, mask_type, row_length=row_length)(RECORDS)
    separate = AlignVLMCollator(processor, mask_type, shared_image=False)(RECORDS)
    if row_length is None:
        assert len(packed["input_ids"]) == (3 if MASK_TYPES[mask_type].shares_trunk else 6)
    model = make_model(mask_type).double()
    layout = TokenLayout.from_input_ids(
        packed["input_ids"],
        processor.image_token_id,
        processor.image_seq_length,
        **{name: packed[name] for name in ("record_ids", "branch_ids", "prompt_mask")},
    )
    real = packed["attention_mask"].bool()
    with torch.no_grad():
        found = model(**packed).logits
        given = {name: packed[name] for name in ("input_ids", "pixel_values", "position_ids")}
        expected = model(**given, attention_mask=oracle(layout, mask_type)).logits
        causal = make_model("causal").double()(**packed).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    assert (found - causal)[real].abs().max() > 1e-3  # so that the comparison says something

    gradients = []
    for batch in (packed, separate):
        model.zero_grad()
        model.train()(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    largest = max(gradient.norm() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        if gradient.norm() > 1e-6 * largest:
            assert (gradients[0][name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_no_answer_reaches_its_own_prediction(make_model, processor, mask_type):
    """A changed response token moves no logit that predicts it or an earlier one."""
    model = make_model(mask_type).double()
    batch = AlignVLMCollator(processor, mask_type, shared_image=False)(RECORDS)
    row = 3  # three images and a question
    place = int((batch["labels"][row] != IGNORED).nonzero()[0])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][row, place] += 1
    with torch.no_grad():
        before, after = (model(**inputs).logits[row] for inputs in (batch, changed))
    torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-12)
    assert not torch.allclose(after[place], before[place])


def test_prefill_and_decoding_apply_the_definition(make_model, processor, mask_type):
    """From left-padded prompts, with a cache: each step has the logits of a pass over all tokens under the definition."""
    model = make_model(mask_type).double()
    texts = ["<image><image> What differs?", "<image> Why is there a circle at the top?", "Say something."]
    images = [[picture(1), picture(2)], [picture(3)], []]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    found = model.generate(**inputs, **options)
    logits = torch.stack(found.logits, dim=1)  # (rows, new tokens, vocabulary)

    new = found.sequences[:, -4:]
    tokens = torch.cat([inputs["input_ids"], new[:, :-1]], dim=1)
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    prompt_mask = torch.cat([inputs["attention_mask"].bool(), torch.zeros(3, 3, dtype=torch.bool)], dim=1)
    layout = TokenLayout.from_input_ids(
        tokens, processor.image_token_id, 4, attention_mask=attention_mask, prompt_mask=prompt_mask
    )
    with torch.no_grad():
        expected = model(
            input_ids=tokens,
            pixel_values=inputs["pixel_values"],
            attention_mask=oracle(layout, mask_type),
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        ).logits[:, -4:]
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)  # `generate` gives float32
    assert torch.equal(new, expected.argmax(-1))


def test_the_processor_gives_the_definition_as_a_dense_mask(processor, mask_type):
    arguments = {"images": [[picture(1), picture(2)], []], "text": ["<image><image> a b", "c"], "padding": True}
    plain = processor(**arguments, return_tensors="pt")
    dense = processor(**arguments, return_tensors="pt", dense_mask_type=mask_type)["attention_mask"]
    real = plain["attention_mask"].bool()
    layout = TokenLayout.from_input_ids(
        plain["input_ids"], processor.image_token_id, 4, attention_mask=real, prompt_mask=real
    )
    assert torch.equal(dense, oracle(layout, mask_type))


def test_questions_about_an_image_have_the_answers_they_have_alone(make_model, processor, mask_type):
    model = make_model(mask_type)
    images, prompts = [picture(1), picture(2)], [["What colour is it?", "Why?"], ["How many circles are there?"]]
    together = answer(model, processor, images, prompts, batch_size=8, max_new_tokens=6)
    single = [
        [answer(model, processor, [image], [[prompt]], max_new_tokens=6)[0][0] for prompt in group]
        for image, group in zip(images, prompts)
    ]
    assert together == single


def test_needed_prompts_and_prefills_in_pieces_are_checked_by_the_row(make_model, processor, mask_type):
    row, model = MASK_TYPES[mask_type], make_model(mask_type)
    inputs = processor(images=[picture(1)], text="<image> a b c", return_tensors="pt")
    if row.needs_prompt:
        with pytest.raises(ValueError, match=f"'{mask_type}' needs `prompt_mask`"):
            model(**inputs)
    else:
        assert model(**inputs).logits.isfinite().all()
    text = processor(text="a b c d e", return_tensors="pt")
    options = {"max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": 2}
    if row.text_looks_ahead:
        with pytest.raises(ValueError, match=f"mask type '{mask_type}' lets text do so"):
            model.generate(**text, **options)
    else:
        model.generate(**text, **options)
    with pytest.raises(ValueError, match=f"cannot apply the mask type '{mask_type}'"):
        make_model(mask_type, attn_implementation="flash_attention_2")


def test_language_models_are_tried_under_it(make_model, mask_type):
    trial = try_language_model(make_model())
    assert trial.mask_types == list(MASK_TYPES) and mask_type in trial.mask_types and trial.packing


def test_a_checkpoint_assembled_before_it_says_so(mask_type):
    with pytest.raises(ValueError, match="assembled before that mask type existed"):
        AlignVLMConfig(attention_mask_type=mask_type, supported_mask_types=["causal", "image"])
