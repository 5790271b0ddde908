"""`keep_language`: a share of the untouched language model in what a stage writes."""

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from alignvlm.stages.stage import main as run_stage
from alignvlm.stages.trainer import module_of
from alignvlm.tools.plan import plan_stages
from hub_upload.run_record import RUN_RECORD
from tests.running import arguments_for, weights_alone
from tests.stages.test_weights import parsed


RATES = {"projector_learning_rate": 1e-2, "language_learning_rate": 1e-2}
SHARE = 0.25


def run(checkpoint, folder, **fields) -> tuple[dict, dict]:
    """The weights that a stage wrote, and its entry in the run record."""
    AcceleratorState._reset_state(reset_partial_state=True)
    entry = run_stage(arguments_for(checkpoint, folder, **{**RATES, "max_steps": 2, **fields}))
    return load_file(folder / "model.safetensors"), entry


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A stage without the option."""
    folder = tmp_path_factory.mktemp("trained") / "stage3"
    return folder, *run(checkpoint, folder)


def test_only_the_language_model_is_mixed_and_what_is_measured_is_what_is_written(checkpoint, trained, tmp_path):
    measured = {"eval_sources": [{"name": "scenes", "annotations": ["questions"], "count": 4, "seed": 5}]}
    mixed, entry = run(checkpoint, tmp_path / "mixed", keep_language=SHARE, **measured)
    assert entry["keep_language"] == {
        "share": SHARE,
        "untouched": {"model": str(checkpoint), "revision": None},
    }
    start, moved = load_file(checkpoint / "model.safetensors"), trained[1]
    assert any(not torch.equal(start[name], moved[name]) for name in start if module_of(name) == "language")
    for name, value in mixed.items():
        share = SHARE if module_of(name) == "language" else 0.0
        expected = (1 - share) * moved[name] + share * start[name]
        tolerance = {"rtol": 1e-5, "atol": 1e-7} if share else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(value, expected, **tolerance, msg=name)
    _, again = run(tmp_path / "mixed", tmp_path / "again", max_steps=1, **measured)
    assert entry["eval_loss_after"] == again["eval_loss_before"] != entry["eval_loss_before"]
    assert "keep_language" not in trained[2] and "keep_language" not in again


def test_the_untouched_one_may_be_that_of_an_earlier_checkpoint(checkpoint, trained, tmp_path):
    (folder, stage3, _), stage0 = trained, load_file(checkpoint / "model.safetensors")
    stage4, _ = run(folder, tmp_path / "plain")
    earlier = weights_alone(checkpoint, tmp_path / "earlier")
    mixed, entry = run(folder, tmp_path / "mixed", keep_language=SHARE, keep_language_from=earlier)
    assert entry["keep_language"]["untouched"]["model"] == str(earlier)
    for name in (name for name in mixed if module_of(name) == "language"):
        expected = (1 - SHARE) * stage4[name] + SHARE * stage0[name]
        torch.testing.assert_close(mixed[name], expected, rtol=1e-5, atol=1e-7, msg=name)
        if name.endswith("q_proj.weight"):
            assert not torch.allclose(mixed[name], (1 - SHARE) * stage4[name] + SHARE * stage3[name], atol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"keep_language": 1.0}, r"keep_language=1.0 is the share .* from 0 \(off\) to below 1"),
        ({"keep_language": -0.1}, "keep_language=-0.1 is the share"),
        ({"keep_language": "nan"}, "keep_language=nan is the share"),
        ({"keep_language": 0.3, "language_learning_rate": None}, "this stage freezes it: set language_learning_rate"),
        ({"keep_language_from": "."}, "is read by keep_language only"),
        ({"keep_language": 0.3, "keep_language_from": ".", "lora_r": 2}, "With lora_r the untouched language model"),
        ({"keep_language": 0.3, "keep_language_from": "no/such/folder"}, "No such folder: 'no/such/folder'"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("alignvlm.stages.stage.load_model", lambda arguments: pytest.fail("loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(checkpoint, tmp_path, **fields)
    assert not (tmp_path / RUN_RECORD).exists()


def test_another_language_model_is_refused(checkpoint, make_model, tmp_path):
    make_model(text={"num_hidden_layers": 1}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is another one than that of .* is missing there and \(32,\) here"):
        run(checkpoint, tmp_path / "out", keep_language=0.3, keep_language_from=tmp_path / "other")


def test_the_plan_misses_the_untouched_one_unless_an_earlier_stage_writes_it(checkpoint, tmp_path):
    first = parsed(checkpoint, tmp_path / "stage3", **RATES)
    second = parsed(
        tmp_path / "stage3", tmp_path / "stage4", **RATES, keep_language=0.3, keep_language_from="no/such/folder"
    )
    with pytest.raises(ValueError, match="No such folder: 'no/such/folder'"):
        plan_stages([first, second], processes=1, sample=1)
    for there in (tmp_path / "stage3", weights_alone(checkpoint, tmp_path / "weights")):
        second.keep_language_from = str(there)
        assert len(plan_stages([first, second], processes=1, sample=1)) == 2
