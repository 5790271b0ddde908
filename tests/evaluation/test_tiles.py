"""Answers, likelihoods and heat maps of images cut into tiles equal those of plain `generate` and `forward`."""

from dataclasses import replace

import pytest
import torch

from alignvlm.data import signs
from alignvlm.data.record import one_turn
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.attention import attention_to_images
from alignvlm.evaluation.choices import measure
from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, main, parser
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import grids_of
from modeling_alignvlm import IMAGE_BLOCKS
from tests.evaluation.test_answer import alone
from tests.modeling_alignvlm.test_tiles import picture, tiled


IMAGES = [picture((40, 20), 1), picture((16, 16), 2), picture((33, 50), 3)]
PROMPTS = [["What is it?", "What is at the left?"], ["Why?"], ["Is it red?", "a"]]
OPTIONS = {"max_new_tokens": 5, "eos_token_id": None}


@pytest.mark.parametrize("mask_type, block", [*(("image", block) for block in IMAGE_BLOCKS), ("mutual", "image")])
@pytest.mark.parametrize("tile_marks", [False, True])
def test_answers_about_tiles_are_those_of_plain_generate(processor, make_model, mask_type, block, tile_marks):
    own, model = tiled(processor, tile_marks=tile_marks), make_model(mask_type, image_block=block).double()
    expected = [[alone(model, own, image, text, **OPTIONS) for text in group] for image, group in zip(IMAGES, PROMPTS)]
    assert answer(model, own, IMAGES, PROMPTS, **OPTIONS) == expected


def test_an_answer_about_two_images_that_prompts_begin_with_apart(processor, make_model):
    """The second prompt has text between the images, so that the trunk ends before the second one."""
    own, model = tiled(processor), make_model(image_block="image").double()
    part = {"type": "image"}

    def ask(*content) -> list[dict]:
        return [
            {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}
        ]

    prompts = [ask(part, part, "a"), ask(part, "b", part, "c")]
    found = answer(model, own, [IMAGES[:1] + IMAGES[2:]], [prompts], **OPTIONS)[0]
    for messages, text in zip(prompts, found):
        assert answer(model, own, [IMAGES[:1] + IMAGES[2:]], [[messages]], **OPTIONS) == [[text]]


def test_choices_about_tiles_have_the_likelihood_of_a_plain_forward(processor, make_model):
    own, model = tiled(processor), make_model(image_block="image").double()
    conversation = replace(one_turn("What is it?", ["a square"], 1), choices=["a red circle", "a square"])
    (found,) = measure(model, own, IMAGES[:1], [conversation])
    for choice, one in zip(conversation.choices, found["likelihoods"], strict=True):
        asked = type(conversation)(conversation.messages, [choice])
        (branch,) = Encoder(own).encode(asked, grids_of(own, IMAGES[:1]))
        pixel_values = own.process_images(IMAGES[:1], return_tensors="pt")["pixel_values"]
        ids = torch.tensor([branch.input_ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values=pixel_values, image_ids=torch.tensor([branch.image_ids])
            ).logits[0]
        scores = logits[:-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = sum(score.item() for score, trained in zip(scores, branch.trained[1:]) if trained)
        assert one["sum"] == pytest.approx(expected, abs=1e-5)


def test_heat_maps_show_the_overview(processor, make_model):
    """Its tokens are the first of each image; the maps are their attention weights."""
    own, model = tiled(processor), make_model(image_block="image")
    looked = attention_to_images(model, own, IMAGES[:2], "What is it?", "a red circle")
    assert looked.layers.shape[2:] == (2, 2, 2)
    batch = own(
        images=IMAGES[:2],
        text=own.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "What is it?"}]}],
            add_generation_prompt=True,
        ),
        return_tensors="pt",
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    image_ids = batch["image_ids"][0].tolist()
    for layer, weights in enumerate(attentions):
        for image in range(2):
            first = image_ids.index(image)
            expected = weights[0, :, -1, first : first + 4].mean(0).view(2, 2)
            torch.testing.assert_close(looked.layers[layer, 0, image], expected)


def test_an_evaluation_says_how_many_tiles_it_showed(make_model, processor, tmp_path, capsys):
    own, model = tiled(processor), make_model(image_block="tile")
    model.save_pretrained(tmp_path / "checkpoint")
    own.save_pretrained(tmp_path / "checkpoint")
    signs.make_signs(2, "test", image_size=40).to_parquet(tmp_path / "test.parquet")
    given = [
        str(tmp_path / "checkpoint"),
        "--task",
        "scene_signs",
        "--data",
        str(tmp_path / "test.parquet"),
        "--use_cpu",
    ]
    given += [
        "--output_dir",
        str(tmp_path / "results"),
        "--max_new_tokens",
        "2",
        "--bootstrap_samples",
        "5",
        "--tag",
        "",
    ]
    found = {}
    for most in (None, 2, 1):
        more = [] if most is None else ["--max_tiles", str(most), "--name", f"of_{most}"]
        result = evaluate_checkpoint(parser().parse_args([*given, *more]))
        found[most] = [result.get(name) for name in ("max_tiles", "tile_marks", "image_block")]
        kinds = {prediction["kind"] for prediction in result["predictions"]}
        assert {"find", "count"} <= kinds <= {"find", "count", "read_number", "read_word"}
        assert "pathvqa_accuracy" in result["metrics"]
    assert found == {None: [4, True, "tile"], 2: [2, True, "tile"], 1: [1, None, None]}
    capsys.readouterr()
    main(["--compare", str(tmp_path / "results/scene_signs.json"), str(tmp_path / "results/of_1.json")])
    told = "B differs from A in how it was asked: image_block None, not 'tile'; max_tiles 1, not 4; tile_marks None, not True"
    assert capsys.readouterr().out.startswith(told + "\n")
    with pytest.raises(SystemExit, match="--max_tiles: '0' is no whole number of 1 or more"):
        evaluate_checkpoint(parser().parse_args([*given, "--max_tiles", "0"]))
