"""`benchmarks/alignment_options.py`: a checkpoint under another mask, the arms and their table."""

import torch

from alignvlm.evaluation.load import load_checkpoint
from benchmarks.alignment_options import findings_of, table, under
from benchmarks.findings import Scenes, summarise


def test_a_checkpoint_is_asked_under_another_mask_with_the_same_weights(checkpoint, tmp_path):
    before, *_ = load_checkpoint(str(checkpoint), torch.device("cpu"), dtype="fp32")
    for mask in ("causal", "image"):
        found, *_ = load_checkpoint(str(under(mask, checkpoint, tmp_path / mask)), torch.device("cpu"), dtype="fp32")
        assert found.config.attention_mask_type == mask
        assert all(map(torch.equal, found.state_dict().values(), before.state_dict().values()))


def test_arms_differ_by_their_option_alone(tmp_path):
    arms = findings_of(Scenes(tmp_path), seed=0)
    plain = dict(arms["image"][1].arms["image"])
    differences = {
        arm: {
            (number, field)
            for number, values in finding.arms[arm]
            for field in values
            if values[field] != plain[number].get(field)
        }
        for arm, (_, finding) in arms.items()
    }
    everywhere = {name: {(number, name) for number in (1, 2, 3)} for name in ("attention_mask_type", "embedding_loss")}
    assert differences == {
        "image": set(),
        "causal": everywhere["attention_mask_type"],
        "image and causal": everywhere["attention_mask_type"],
        "embedding_loss": everywhere["embedding_loss"],
        "least squares": {(1, "projector_start")},
    }


def test_the_table_shows_means_and_paired_differences():
    runs = {"image": {0: {"values": {"CIDEr": 1.0}}, 1: {"values": {"CIDEr": 3.0}}}}
    runs["causal"] = {0: {"values": {"CIDEr": 1.5}}, 1: {"values": {"CIDEr": 3.5}}}
    *_, baseline, other = table(summarise(runs)).splitlines()
    assert baseline == "| image | 2.000 |" and other == "| causal | 2.500 (+0.500: +0.500 to +0.500) |"
