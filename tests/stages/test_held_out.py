"""The held-out loss and TRL's metrics beside it are those of all labels, whatever the batches and however many processes."""

import json

import pytest
import torch

from alignvlm.data.scenes import make_scenes
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.held_out import RepeatedToFill
from alignvlm.stages.stage import main
from alignvlm.stages.trainer import AlignVLMTrainer
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests import forked
from tests.running import arguments_for, parse


STEPS = 16  # after which some tokens are the likeliest
COUNT = 5  # fills no batch of two on two processes
ANNOTATIONS = ["detailed_caption", "questions"]
METRICS = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")


def fields(mask: str, batch: int) -> dict:
    held_out = [
        {"name": "scenes", "annotations": ANNOTATIONS[:1], "count": 3, "seed": 7},
        {"name": "scenes", "annotations": ANNOTATIONS[1:], "count": COUNT - 3, "seed": 8},
    ]
    return {
        "eval_sources": held_out,
        "per_device_eval_batch_size": batch,
        "attention_mask_type": mask,
        "max_steps": STEPS,
        "language_learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
    }


@torch.no_grad()
def by_hand(checkpoint, mask: str) -> dict[str, float]:
    """Each label's log-probability, entropy and whether it is the likeliest token, from the logits of one record after the other."""
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    model.config.attention_mask_type = mask
    collator = AlignVLMCollator(processor, mask)
    found = []
    for count, seed, annotation in ((3, 7, ANNOTATIONS[0]), (COUNT - 3, 8, ANNOTATIONS[1])):
        for row in make_scenes(count, "train", seed=seed, annotations=(annotation,)):
            batch = collator([row])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].double().log_softmax(-1)
            for at in (labels != -100).nonzero().tolist():
                values, label = logits[tuple(at)], labels[tuple(at)]
                entropy = -(values.exp() * values).sum()
                found.append((-values[label].item(), entropy.item(), float(values.argmax() == label)))
    return dict(zip(METRICS, torch.tensor(found).double().mean(0).tolist()))


def measured(folder) -> dict[str, float]:
    """What the one evaluation of the trainer on the way said."""
    state = json.loads((folder / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    (line,) = [line for line in state["log_history"] if "eval_loss" in line and line["step"] == STEPS]
    return {name: line[name] for name in METRICS}


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["image", "prefix"])
def test_the_held_out_loss_counts_every_label_once(checkpoint, tmp_path, mask):
    runs = {}
    for name, batch, processes in (("one", 2, 1), ("large", 8, 1), ("two", 2, 2)):
        given = arguments_for(
            checkpoint, tmp_path / name, **fields(mask, batch), per_device_train_batch_size=4 // processes
        )
        if processes == 1:
            main(given)
        else:
            forked.run("alignvlm.stages.stage:main", given, log=tmp_path / "log", processes=2)
        runs[name] = read_run_record(tmp_path / name)["stages"][-1]
    expected = by_hand(checkpoint, mask)["eval_loss"]
    for name, run in runs.items():
        assert run["eval_loss_before"] == pytest.approx(expected, rel=1e-5), name
        after = by_hand(tmp_path / name, mask)
        assert measured(tmp_path / name) == pytest.approx(after, rel=1e-4) and after["eval_mean_token_accuracy"] > 0, (
            name
        )


def test_no_held_out_record_is_dropped(checkpoint, tmp_path):
    """`dataloader_drop_last` is for training; 5 records fill neither a batch of 4 nor one of 8."""
    expected = by_hand(checkpoint, "image")["eval_loss"]
    for batch in (4, 8):
        given = arguments_for(checkpoint, tmp_path / str(batch), **fields("image", batch), dataloader_drop_last=True)
        assert main(given)["eval_loss_before"] == pytest.approx(expected, rel=1e-5)


def make_trainer(checkpoint, folder, given=(), **kwargs) -> AlignVLMTrainer:
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    args = parse(
        arguments_for(checkpoint, folder, projector_learning_rate=1e-3, per_device_eval_batch_size=4, **dict(given))
    )
    args.label_smoothing_factor = kwargs.pop("label_smoothing_factor", 0.0)
    return AlignVLMTrainer(
        AlignVLMForConditionalGeneration.from_pretrained(checkpoint),
        {"projector": 1e-3},
        args=args,
        train_dataset=make_scenes(4, "train", seed=1),
        data_collator=AlignVLMCollator(processor),
        processing_class=processor,
        **kwargs,
    )


def held_out_sets() -> dict:
    return {
        "captions": make_scenes(3, "train", seed=7, annotations=ANNOTATIONS[:1]),
        "questions": make_scenes(COUNT - 3, "train", seed=8, annotations=ANNOTATIONS[1:]),
    }


@pytest.mark.parametrize(
    "workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}], ids=str
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_several_held_out_sets_have_a_loss_each(checkpoint, tmp_path, drop_last, workers):
    given = {"dataloader_drop_last": drop_last, **workers}
    sets = held_out_sets()
    found = make_trainer(checkpoint, tmp_path, given, eval_dataset=sets).evaluate()
    alone = {
        name: make_trainer(checkpoint, tmp_path, eval_dataset=records).evaluate()["eval_loss"]
        for name, records in sets.items()
    }
    assert {name: found[f"eval_{name}_loss"] for name in sets} == pytest.approx(alone, rel=1e-5)
    assert len(set(alone.values())) == 2


@pytest.mark.parametrize("drop_last", [False, True])
def test_predicting_measures_the_loss_alone(checkpoint, tmp_path, drop_last):
    """The logits that the trainer has are of positions with a label, and those of whole rows would need all memory."""
    (records, _) = held_out_sets().values()
    trainer = make_trainer(checkpoint, tmp_path, {"dataloader_drop_last": drop_last}, eval_dataset=records)
    found = trainer.predict(records)
    assert found.predictions is None and found.label_ids is None
    assert found.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"compute_metrics": dict}, "`alignvlm evaluate`"),
        ({"preprocess_logits_for_metrics": max}, "Leave it out"),
        ({"compute_loss_func": max}, "token_weighting"),
        ({"label_smoothing_factor": 0.1}, "Leave it out"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_needs_the_logits_of_whole_rows_is_refused(checkpoint, tmp_path, given, remedy):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} needs the logits of whole rows.*{remedy}"):
        make_trainer(checkpoint, tmp_path, **given)


def test_records_are_repeated_without_their_labels(checkpoint):
    records = [dict(row) for row in make_scenes(3, "train", seed=1)]
    filled = RepeatedToFill(records, 4)
    assert len(filled) == 4 and [filled[index] for index in range(3)] == records
    assert len(RepeatedToFill(records, 3)) == 3
    collator = AlignVLMCollator(AlignVLMProcessor.from_pretrained(checkpoint))
    first, again = collator([filled[0]]), collator([filled[3]])
    assert (first["labels"] != -100).any() and (again["labels"] == -100).all()
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(
        first["pixel_values"], again["pixel_values"]
    )
