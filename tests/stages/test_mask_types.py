"""Mask types mixed in a stage: every step is one of a single type, drawn by seed and step."""

import json

import pytest
from accelerate.state import AcceleratorState

from alignvlm.data.scenes import make_scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.mask_types import drawn_mask_type, mask_type_shares
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.plan import describe, plan_stages
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import AlignVLMConfig
from tests.modeling_alignvlm.test_tiles import tiled
from tests.running import arguments_for
from tests.stages.test_weights import parsed


MIX = {"image": 0.5, "causal": 0.5}
STEPS = 6
DRAWN = [drawn_mask_type(MIX, 42, step) for step in range(STEPS)]  # 42: the seed of a stage
STILL = 1e-30  # a learning rate that moves no weight


def run(checkpoint, folder, mask_type, **fields) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"attention_mask_type": mask_type, "max_steps": STEPS, "projector_learning_rate": 1e-2, **fields}
    return run_stage(arguments_for(checkpoint, folder, **given))


def test_draws_depend_on_seed_and_step_and_keep_the_shares():
    assert set(DRAWN) == set(MIX)
    assert [drawn_mask_type(MIX, 42, step) for step in range(STEPS)] == DRAWN
    assert [drawn_mask_type(MIX, 43, step) for step in range(40)] != [
        drawn_mask_type(MIX, 42, step) for step in range(40)
    ]
    drawn = [drawn_mask_type({"prefix": 0.1, "image": 0.6, "causal": 0.3}, 0, step) for step in range(2000)]
    for name, share in (("prefix", 0.1), ("image", 0.6), ("causal", 0.3)):
        assert abs(drawn.count(name) - share * 2000) < 4 * (2000 * share * (1 - share)) ** 0.5, name


@pytest.mark.parametrize("second", ["causal", "prefix"])
def test_every_step_has_the_loss_of_its_type_alone(checkpoint, tmp_path, second):
    """`prefix` shares no trunk: rows of the mixed run then hold one annotation each under both types."""
    shares = json.dumps({"image": 0.5, second: 0.5})
    alone = {
        name: run(checkpoint, tmp_path / name, name, projector_learning_rate=STILL)["logged_losses"]
        for name in ("image", second)
    }
    entry = run(checkpoint, tmp_path / "mixed", shares, projector_learning_rate=STILL)
    drawn = ["image" if name == "image" else second for name in DRAWN]
    expected = [alone[name][step] for step, name in enumerate(drawn)]
    tolerance = {"rel": 0, "abs": 0} if second == "causal" else {"rel": 1e-5}
    assert entry["logged_losses"] == pytest.approx(expected, **tolerance)
    apart = [abs(a - b) > 1e-3 for a, b in zip(alone["image"], alone[second])]
    assert all(any(one for one, own in zip(apart, drawn) if own == name) for name in alone)  # so the draw matters
    assert entry["attention_mask_type"] == "image"
    assert entry["attention_mask_type_shares"] == {"image": 0.5, second: 0.5}
    assert entry["steps_by_mask_type"] == {name: drawn.count(name) for name in ("image", second)}
    assert AlignVLMConfig.from_pretrained(tmp_path / "mixed").attention_mask_type == "image"
    assert "attention_mask_type_shares" not in read_run_record(tmp_path / "image")["stages"][-1]


@pytest.mark.parametrize(
    "fields",
    [{"row_length": 300, "max_length": 300}, {"max_tiles": 4, "tile_marks": True}, {"merge_image_tokens": 2}],
    ids=str,
)
def test_filled_rows_tiles_and_merged_tokens_have_several_types_too(checkpoint, tmp_path, fields):
    scenes = {"name": "scenes", "annotations": ["questions"], "count": 24, "image_size": 40}
    fields = {"sources": [scenes], "projector_learning_rate": STILL, "max_steps": 3, **fields}
    fields["per_device_train_batch_size"] = 2
    losses = {name: run(checkpoint, tmp_path / name, name, **fields)["logged_losses"] for name in ("image", "causal")}
    entry = run(checkpoint, tmp_path / "mixed", json.dumps(MIX), **fields)
    assert len(set(DRAWN[:3])) == 2
    assert entry["logged_losses"] == [losses[name][step] for step, name in enumerate(DRAWN[:3])]
    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses.values()))


def test_every_type_is_checked_for_leaks(processor, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "alignvlm.rows.collator.check_no_leak", lambda layout, name, **_: checked.append((name, layout))
    )
    record = next(iter(make_scenes(1, image_size=40)))
    AlignVLMCollator(tiled(processor), ["image", "mutual"])([record])
    assert {name for name, _ in checked} == {"image", "mutual"}
    assert all(int(layout.image_ids.max()) == 0 for _, layout in checked)  # all tiles are one image


def test_a_resumed_run_draws_the_same(checkpoint, tmp_path):
    given = {"eval_sources": [{"name": "scenes", "annotations": ["questions"], "count": 4, "seed": 5}]}
    given |= {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    mix = '{"causal": 0.5, "image": 0.5}'
    whole = run(checkpoint, tmp_path / "whole", mix, **given)
    run(checkpoint, tmp_path / "pieces", mix, **{**given, "max_steps": 4})
    with pytest.raises(ValueError, match="with other settings: seed_of_mask_types was 42 and is 3"):
        run(checkpoint, tmp_path / "pieces", mix, **given, seed=3, data_seed=42, resume_from_checkpoint="last")
    resumed = run(checkpoint, tmp_path / "pieces", mix, **given, resume_from_checkpoint="last")
    assert resumed["resumed_at"] == [4] and resumed["logged_losses"] == whole["logged_losses"]
    causal = run(tmp_path / "whole", tmp_path / "next", "causal", **{**given, "max_steps": 1})
    assert (
        whole["eval_loss_after"] == causal["eval_loss_before"]
    )  # measured under the first type, which the checkpoint has


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sideways", "Unknown attention_mask_type 'sideways'. Valid values: causal, image"),
        ({"image": 0.5, "sideways": 0.5}, "'sideways'. Valid"),
        ({"image": 0.5, "causal": "half"}, "the share of 'causal' is 'half'; expected a number between 0 and 1"),
        ({"image": 1.0}, "the share of 'image' is 1.0; .* write its name"),
        ({"image": 0.5, "causal": -0.5}, "the share of 'causal' is -0.5"),
        ({"image": 0.5, "causal": 0.4}, "add up to 0.9, not to 1"),
        ('{"image": 0.5', "is not valid JSON"),
        (["image", "causal"], r"=\['image', 'causal'\] must be a name, or names with shares"),
        ({}, "must be a name"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        mask_type_shares(given)


def test_what_cannot_be_kept_is_refused_before_weights_are_read(make_model, processor, tmp_path):
    make_model(supported_mask_types=["causal", "image"]).config.save_pretrained(tmp_path / "stage0")
    processor.save_pretrained(tmp_path / "stage0")
    with pytest.raises(
        ValueError, match="cannot keep attention_mask_type='prefix'"
    ):  # not: no file named model.safetensors
        run(tmp_path / "stage0", tmp_path / "out", '{"image": 0.5, "prefix": 0.5}')
    with pytest.raises(ValueError, match="knows the mask type 'causal' alone"):
        run(
            tmp_path / "stage0",
            tmp_path / "out",
            '{"image": 0.5, "causal": 0.5}',
            attn_implementation="flash_attention_2",
        )
    assert not (tmp_path / "out" / RUN_RECORD).exists()


def test_the_plan_tells_of_it(checkpoint, tmp_path):
    fields = {"projector_learning_rate": 1e-3, "language_learning_rate": 1e-3, "keep_language": 0.25}
    fields |= {"attention_mask_type": '{"image": 0.75, "causal": 0.25}', "projector_start": "least_squares"}
    fields |= {"embedding_loss": 0.5}
    (plan,) = plan_stages([parsed(checkpoint, tmp_path, **fields)], processes=1, sample=2)
    text = describe(plan, "H100", 0.4)
    assert "  mask types 'image' in 75% of the steps, 'causal' in 25% of the steps\n" in text
    assert f"  keep_language: 0.75 of the trained language model, 0.25 of that of {checkpoint}\n" in text
    assert "  embedding_loss: 0.5 x the error of a head" in text
    assert "  projector_start: 24 records with an image, " in text and plan.start_flops > 0
    plain = {name: value for name, value in fields.items() if name.endswith("rate")}
    (other,) = plan_stages([parsed(checkpoint, tmp_path, **plain)], processes=1, sample=2)
    assert other.start_flops == 0 and not {"mask types", "keep_language"} & set(
        describe(other, "H100", 0.4).split(":")
    )
