"""Tiles in a stage and in an assembled checkpoint: one line turns them on, and everything after knows of them."""

import json
import re

import pytest

from alignvlm.evaluation.answer import answer
from alignvlm.export.homes import HOMES, obstacles
from alignvlm.rows.encode import Encoder
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.stage import main
from alignvlm.tools.plan import describe, plan_stages
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.modeling_alignvlm.test_tiles import picture
from tests.running import arguments_for, parse


SIGNS = [{"name": "scene_signs", "count": 8, "image_size": 40}]
TILES = {"sources": SIGNS, "max_tiles": 6, "tile_marks": True, "projector_learning_rate": 1e-3, "max_steps": 1}


def test_one_line_of_a_recipe_cuts_images_from_then_on(checkpoint, tmp_path, make_model):
    first = arguments_for(checkpoint, tmp_path / "one", **TILES)
    second = arguments_for(tmp_path / "one", tmp_path / "two", **{**TILES, "max_tiles": None, "tile_marks": None})
    third = arguments_for(tmp_path / "two", tmp_path / "three", **{**TILES, "max_tiles": 1, "tile_marks": None})
    plans = plan_stages(list(map(parse, (first, second, third))), processes=1, sample=3)
    assert [plan.max_tiles for plan in plans] == [6, 6, 1]
    for plan in plans[:2]:  # every scene has four or six cells, and the overview
        assert all(5 * batch.whole_images <= batch.images <= 7 * batch.whole_images for batch in plan.batches)
        assert re.search(r"max_tiles 6: [56]\.\d\d encoded for each image", describe(plan, "H100", 0.4))
        assert 20 < plan.mixture.parts[0].image_tokens < 28 == 7 * plans[2].mixture.parts[0].image_tokens
    assert plans[1].step_flops > plans[2].step_flops

    for given in (first, second, third):
        main(given)
    entries = read_run_record(tmp_path / "three")["stages"]
    tiles = {"max_tiles": 6, "tile_marks": True, "image_block": "image"}
    assert [{name: entry.get(name) for name in tiles} for entry in entries] == [tiles, tiles, dict.fromkeys(tiles)]
    processor = AlignVLMProcessor.from_pretrained(tmp_path / "two")
    assert (processor.max_tiles, processor.tile_marks) == (6, True)
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert model.config.image_block == "image"
    assert answer(model, processor, [picture((40, 20))], [["What?"]], max_new_tokens=2)
    assert "image_block" not in json.loads((tmp_path / "three" / "config.json").read_text())
    for home in HOMES:
        assert any("tiles" in obstacle.reason for obstacle in obstacles(model.config, home, processor)), home


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"max_tiles": 0}, "max_tiles=0 must be at least 1"),
        ({"max_tiles": 10**6}, r"max_tiles=1000000: an image of so many tiles.* holds [\d,]+\. At most \d+ fit"),
        (
            {"max_tiles": None},
            "tile_marks=True is for images that are cut into tiles, and max_tiles=1 cuts none. Leave out tile_marks",
        ),
        ({"image_block": "row"}, "image_block='row'. Valid values: tile, image"),
        ({"cache_features": True}, "one feature map an image, and max_tiles=6 cuts images"),
        ({"max_length": 20}, "max_length=20 leaves no room"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_runs(checkpoint, tmp_path, fields, sentence):
    given = arguments_for(checkpoint, tmp_path / "run", **{**TILES, **fields})
    for start in (main, lambda given: plan_stages([parse(given)], processes=1, sample=2)):
        with pytest.raises((ValueError, SystemExit), match=sentence):
            start(given)


def test_the_context_holds_tiles_of_merged_tokens(make_model, processor, tmp_path):
    """Thirty tiles and an overview are 124 tokens before the tokens of a tile are merged, and 62 after."""
    start = tmp_path / "start"
    model = make_model(text={"max_position_embeddings": 120})
    save_checkpoint(model, processor, start, {"backbones": {}, "stages": []})
    fields = {**TILES, "max_tiles": 30, "sources": [{**SIGNS[0], "count": 2}], "tile_marks": None, "max_length": 120}
    merged = arguments_for(start, tmp_path / "merged", **fields, merge_image_tokens=2)
    again = arguments_for(tmp_path / "merged", tmp_path / "again", **fields, merge_image_tokens=0)
    (plan,) = plan_stages([parse(merged)], processes=1, sample=2)
    main(merged)
    assert plan.max_tiles == 30 and read_run_record(tmp_path / "merged")["stages"][-1]["merge_image_tokens"] == 2
    for start in (main, lambda given: plan_stages([parse(given)], processes=1, sample=2)):
        with pytest.raises(
            ValueError, match="max_tiles=30: an image of so many tiles, with its overview, has 124 tokens"
        ):
            start(again)


@pytest.mark.parametrize("marks", [True, False])
def test_the_most_tokens_of_an_image_are_those_of_its_largest_grid(checkpoint, marks):
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    processor.tile_marks = marks
    for count in range(2, 20):
        processor.max_tiles = count
        encoder = Encoder(processor)
        grids = [(rows, columns) for rows in range(1, count + 1) for columns in range(1, count // rows + 1)]
        assert encoder.most_image_tokens == max(len(encoder.image_tokens(grid)) for grid in grids)


def test_an_assembled_checkpoint_cuts_images(vision, tmp_path, tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from alignvlm.stages.backbones import BackboneArguments, assemble
    from tests.conftest import TEXT

    config = {name: value for name, value in TEXT.items() if name != "model_type"}
    Qwen2ForCausalLM(Qwen2Config(**config, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    folder = str(tmp_path / "stage0")
    assemble(BackboneArguments(vision, str(tmp_path / "language"), folder, max_tiles=6, image_block="tile"))
    processor = AlignVLMProcessor.from_pretrained(folder)
    config = AlignVLMForConditionalGeneration.from_pretrained(folder).config
    assert (processor.max_tiles, processor.tile_marks, config.image_block) == (6, False, "tile")
    assert Encoder(processor).most_image_tokens == 7 * config.image_seq_length
