"""What the card says of a model is true of it: of an untrained one, a causal one, one of tiles, and of how each stage trained."""

import pytest
import yaml

from hub_upload.card import PLACEHOLDER, make_card
from hub_upload.card_text import split_card
from hub_upload.package import renewed_card


CONFIG = {"vision_config": {"image_size": 64}}
STAGE = {
    "stage": 3,
    "learning_rates": {"language": 0.001},
    "attention_mask_type": "image",
    "sources": [{"data": "photos.jsonl"}],
    "records": 10,
    "steps": 4,
    "precision": "bf16",
}
RESULT = {"task": "photos", "metrics": {"cider": {"cider": 0.5}}, "definitions": {}}
DESCRIBES = "It describes pictures and answers questions about them, in the words of its training data."
RULE = "rule that image tokens need no causal mask"


def card(record: dict, config: dict = CONFIG, repository: str = PLACEHOLDER) -> str:
    return make_card({"stages": [], **record}, config, 10, repository)


def words(text: str) -> str:
    """A card without its line breaks."""
    return " ".join(text.split())


def row(**fields) -> list[str]:
    """The cells of a stage in the table of training."""
    line = next(line for line in card({"stages": [{**STAGE, **fields}]}).splitlines() if line.startswith("| 3 |"))
    return line.strip("| ").split(" | ")


@pytest.mark.parametrize("results", [[], [RESULT]], ids=["no results", "results"])
@pytest.mark.parametrize("repository", [PLACEHOLDER, "user/mine"])
def test_the_placeholder_is_no_name_and_a_written_name_stays(results, repository):
    fresh = card({"results": results}, repository=repository)
    expected = split_card(fresh)[0]
    there = card({})
    assert yaml.safe_load(there.split("---")[1])["model_name"] == "REPOSITORY"
    assert split_card(renewed_card(there, fresh, repository))[0] == expected
    named = there.replace("model_name: REPOSITORY", "model_name: My cats")
    assert split_card(renewed_card(named, fresh, repository))[0] == {**expected, "model_name": "My cats"}


def test_every_mask_type_of_a_stage_is_shown_with_its_share():
    assert row()[2] == "`image`"
    shares = {"image": 0.5, "causal": 0.375, "prefix": 0.125}
    mixed = row(attention_mask_type_shares=shares, steps_by_mask_type={"image": 2, "causal": 2, "prefix": 0})
    assert mixed[2] == "`image` (50%), `causal` (37.5%), `prefix` (12.5%)"


def test_a_trained_projector_at_the_start_is_not_called_random():
    projector = {"from": "user/projector", "stages": [1, 2], "converted": None}
    text = words(card({"projector": projector}))
    of = "its projector is that of [user/projector](https://huggingface.co/user/projector) after stages 1 and 2"
    assert f"None yet: {of}." in text and "random weights" not in text
    assert "It is untrained but for its projector (see Training)." in text
    converted = words(card({"projector": {**projector, "stages": [1], "converted": {"tokens": 9, "explained": 0.5}}}))
    assert "after stage 1, followed by a linear map to the embeddings of this language model." in converted
    untrained = {"projector": {**projector, "stages": []}}  # of a checkpoint that no stage has trained
    assert "None yet: its projector has random weights." in card(untrained)


def test_an_untrained_model_is_called_untrained():
    text = words(card({}))
    assert "It is untrained: it does not describe pictures or answer questions about them yet." in text
    assert DESCRIBES not in text and "0 stages" not in text
    assert f"assembled under [AlignVLM](https://arxiv.org/abs/2503.19508)'s {RULE}" in text
    trained = words(card({"stages": [STAGE]}))
    assert f"aligned in 1 stage with [AlignVLM](https://arxiv.org/abs/2503.19508)'s {RULE}" in trained
    assert DESCRIBES in trained and "untrained" not in trained


@pytest.mark.parametrize("stages", [[], [STAGE]], ids=["untrained", "trained"])
def test_image_tokens_of_a_causal_model_are_said_to_be_under_the_causal_mask(stages):
    causal = words(card({"stages": stages}, {**CONFIG, "attention_mask_type": "causal"}))
    assert "Its image tokens are under the causal mask, as its text is (`attention_mask_type: causal`)." in causal
    assert RULE not in causal
    for mask_type in ("image", "prefix", "mutual"):
        text = words(card({"stages": stages}, {**CONFIG, "attention_mask_type": mask_type}))
        assert f"{RULE} (`attention_mask_type: {mask_type}`)." in text


@pytest.mark.parametrize(
    "stages, image_block, expected",
    [
        ([], None, "at 64 x 64 pixels, so"),
        ([], "image", "cut into tiles of 64 x 64 pixels beside an overview, so"),
        ([{**STAGE, "max_tiles": 4}], "tile", "cut into up to 4 tiles of 64 x 64 pixels beside an overview, so"),
        ([{**STAGE, "max_tiles": 4}, STAGE], None, "at 64 x 64 pixels, so"),
    ],
    ids=["not cut", "of no stage", "cut", "cut no longer"],
)
def test_a_model_of_tiles_is_said_to_see_tiles(stages, image_block, expected):
    text = words(card({"stages": stages}, {**CONFIG, "image_block": image_block}))
    assert f"It sees pictures {expected} small text and distant things are lost." in text


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, "language (0.001)"),
        ({"lora": {"r": 4}}, "language (0.001); LoRA of rank 4"),
        ({"keep_language": {"share": 0.3}}, "language (0.001); keeps 30% of the untouched language model"),
        ({"keep_language": {"share": 0.0}}, "language (0.001)"),
        ({"averaged": ["checkpoint-2", "checkpoint-4"]}, "language (0.001); mean of the last 2 checkpoints"),
        ({"averaged": ["checkpoint-4"]}, "language (0.001)"),
        ({"method": "grpo", "rewards": ["cider", "anls"]}, "language (0.001); GRPO with rewards cider, anls"),
        ({"method": "grpo", "rewards": ["cider"]}, "language (0.001); GRPO with reward cider"),
        ({"method": "dpo"}, "language (0.001); DPO"),
        ({"method": "dpo", "rewards": ["cider"]}, "language (0.001); DPO"),  # which only judge its answers
        (
            {"averaged": ["a", "b"], "lora": {"rank": 2}, "method": "dpo", "keep_language": {"share": 0.125}},
            "language (0.001); DPO; LoRA of rank 2; mean of the last 2 checkpoints; "
            "keeps 12.5% of the untouched language model",
        ),
    ],
)
def test_how_a_stage_trained_stands_in_its_row(fields, expected):
    assert row(**fields)[1] == expected
