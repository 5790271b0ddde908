"""`merge_image_tokens` in a stage, in its plan, and at inference of a checkpoint that was trained without."""

import pytest
import torch

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import load_checkpoint
from alignvlm.export.homes import HOMES, obstacles
from alignvlm.stages.stage import main
from alignvlm.tools.plan import plan_stages
from modeling_alignvlm import AlignVLMConfig, AlignVLMProcessor
from tests.running import arguments_for, parse


def test_a_stage_trains_on_merged_tokens_and_hands_them_on(checkpoint, tmp_path):
    fields = {"projector_learning_rate": 1e-3, "max_steps": 2}
    merged = arguments_for(checkpoint, tmp_path / "merged", merge_image_tokens=2, **fields)
    kept = arguments_for(tmp_path / "merged", tmp_path / "kept", **fields)
    whole = arguments_for(tmp_path / "kept", tmp_path / "whole", merge_image_tokens=0, **fields)
    plans = plan_stages([parse(merged), parse(kept), parse(whole)], processes=1)  # before any of them is there
    assert [plan.mixture.parts[0].image_tokens for plan in plans] == [2, 2, 4]
    longest = [max(batch.length for batch in plan.batches) for plan in plans]
    assert longest[0] == longest[1] == longest[2] - 2

    assert main(merged)["merge_image_tokens"] == 2
    config, processor = (
        AlignVLMConfig.from_pretrained(tmp_path / "merged"),
        AlignVLMProcessor.from_pretrained(tmp_path / "merged"),
    )
    assert (config.merge_image_tokens, config.image_seq_length, processor.image_seq_length) == (2, 2, 2)
    assert "merge_image_tokens" not in main(
        arguments_for(tmp_path / "merged", tmp_path / "whole", merge_image_tokens=0, **fields)
    )
    assert AlignVLMProcessor.from_pretrained(tmp_path / "whole").image_seq_length == 4


def test_a_checkpoint_trained_without_it_answers_from_fewer_tokens(checkpoint):
    cpu, image = (
        torch.device("cpu"),
        torch.randint(0, 255, (3, 16, 16), generator=torch.Generator().manual_seed(0)).byte().numpy(),
    )
    counts = {}
    for count in (None, 1, 4):
        model, processor, _ = load_checkpoint(str(checkpoint), cpu, merge_image_tokens=count)
        batch = processor(images=image, text="<image> One", return_tensors="pt")
        counts[count] = int((batch["input_ids"] == model.config.image_token_id).sum())
        with torch.no_grad():
            counts[count, "logits"] = model(**batch).logits[:, -1]
        assert len(answer(model, processor, [[image]], [["What is it?"]], max_new_tokens=2)[0]) == 1
    assert (counts[None], counts[1], counts[4]) == (4, 1, 4)
    assert torch.equal(counts[None, "logits"], counts[4, "logits"])  # every position is a group of its own
    assert not torch.allclose(counts[None, "logits"], counts[1, "logits"])
    with pytest.raises(ValueError, match="merge_image_tokens=5 must be from 1 to 4"):
        load_checkpoint(str(checkpoint), cpu, merge_image_tokens=5)


def test_homes_that_merge_nothing_say_so(make_model):
    llava = {"mask_type": "causal", "vision_feature_layer": -2}
    config = make_model(merge_image_tokens=2, **llava).config
    home = next(home for home in HOMES if home.name == "LLaVA")
    assert not obstacles(make_model(**llava).config, home)
    (found,) = obstacles(config, home)
    assert found.reason == "it merges no image tokens, as merge_image_tokens=2 asks for"
    assert found.change == "merge_image_tokens: 0"
