"""Muon beside AdamW: the step it takes, what it takes it on, and that a stage resumes with it."""

import pytest
import torch
from torch import nn

from alignvlm.stages import optimizers
from alignvlm.stages.flops import FlopCounter
from alignvlm.stages.optimizers import MuonAdamW, hidden_matrices, muon_groups, orthogonalized
from alignvlm.stages.stage import main
from tests.running import arguments_for


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8), (3, 8, 24)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalized(matrix)
    assert found.shape == matrix.shape and found.dtype == torch.float64
    # "Something like US'V^T where S' is diagonal with values of about 0.5 to 1.5": Keller Jordan.
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.5
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.mT @ found @ vh.mT
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)), atol=1e-6, rtol=0)


def test_it_is_the_step_of_torch_muon():
    """PyTorch's rounds to bf16, hence the tolerance: 2^-8 in each of fifteen products."""
    ours, theirs = (nn.Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    start = ours.detach().clone()
    a = MuonAdamW([{"params": [ours], "muon": True}], lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.03 * expected.norm()


def test_the_rest_takes_the_step_of_adamw():
    parameters = [nn.Parameter(torch.arange(6.0).double().requires_grad_()) for _ in range(2)]
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizers = [MuonAdamW([parameters[0]], **options), torch.optim.AdamW([parameters[1]], **options)]
    for step in range(3):
        for parameter, optimizer in zip(parameters, optimizers):
            parameter.grad = torch.full((6,), 1.0 + step, dtype=torch.float64)
            optimizer.step()
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-12, atol=0)


def test_steps_lie_where_a_fused_kernel_reads_them(monkeypatch):
    """On the parameter's device, and there again when a run is resumed; what torch's own fused AdamW does."""
    parameter = nn.Parameter(torch.zeros(6, device="meta"))
    parameter.grad = torch.zeros(6, device="meta")
    optimizer = MuonAdamW([parameter])
    monkeypatch.setattr(optimizers, "adamw", lambda *args, **options: None)
    optimizer.step()
    assert optimizer.state[parameter]["step"].device == parameter.device
    state = optimizer.state_dict()
    state["state"][0]["step"] = torch.zeros(())
    optimizer.load_state_dict(state)
    assert optimizer.state[parameter]["step"].device == parameter.device


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": None}
SWIN = {
    "model_type": "swin",
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1],
    "num_heads": [2],
    "window_size": 2,
}


@pytest.mark.parametrize(
    ("parts", "taken_too"),
    [
        ({}, "q_proj.weight"),
        ({"text": {"tie_word_embeddings": True}}, "q_proj.weight"),
        ({"text": GPT2}, "attn.c_attn.weight"),  # whose embeddings are called `wte` and `wpe`
        ({"vision": SWIN}, "q_proj.weight"),  # with a table of relative positions
    ],
    ids=["untied", "tied", "gpt2", "swin"],
)
def test_muon_takes_the_matrices_of_hidden_layers_only(make_model, parts, taken_too):
    model = make_model(**parts)
    named = dict(model.named_parameters())
    hidden = {id(parameter) for parameter in hidden_matrices([model])}
    taken = {name for name, parameter in named.items() if id(parameter) in hidden}
    assert any(name.endswith(taken_too) for name in taken) and any("projector" in name for name in taken)
    left = ("embed", "lm_head", "norm", "bias", "wte", "wpe")
    assert not any(part in name for part in left for name in taken)
    matrices = {name for name, p in named.items() if p.ndim == 2 and not any(part in name for part in left)}
    assert taken == matrices - {name for name in matrices if "position" in name}
    muon, rest = muon_groups([model])
    assert len(muon["params"]) == len(taken) and len(rest["params"]) == len(named) - len(taken)
    with pytest.raises(ValueError, match=r"Muon takes matrices; got a parameter of shape \(3,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


def test_a_stage_with_muon_resumes(checkpoint, tmp_path):
    fields = {"projector_learning_rate": 1e-2, "language_learning_rate": 1e-3, "muon": True}
    fields |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = main(arguments_for(checkpoint, tmp_path / "whole", **fields))
    assert whole["muon"] is True
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "again/checkpoint-2")
    again = main([*arguments_for(checkpoint, tmp_path / "again", **fields), "--resume_from_checkpoint"])
    assert again["logged_losses"] == whole["logged_losses"]
    plain = main(arguments_for(checkpoint, tmp_path / "plain", **{**fields, "muon": False}))
    assert plain["logged_losses"][0] == whole["logged_losses"][0]
    assert plain["logged_losses"][-1] != whole["logged_losses"][-1]


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(16, 5))
    images = torch.randn(2, 3, 8, 8)

    def work():
        (model(images) @ torch.randn(2, 5, 6)).sum().backward()
        with torch.inference_mode():
            model(images) @ torch.randn(2, 5, 6)

    with FlopCounterMode(display=False) as theirs:
        work()
    with FlopCounter() as ours:
        work()
    assert ours.total == theirs.get_total_flops() > 0
