"""Muon for the matrices of hidden layers and AdamW for the rest, as one optimizer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# Of the quintic Newton-Schulz iteration, from Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of each matrix `(..., rows, columns)`: singular values of 0.7 to 1.2.

    `torch.optim.Muon` does this in bf16, which a processor without bf16 instructions has to emulate; here it keeps the dtype.
    """
    a, b, c = COEFFICIENTS
    x = matrix.reshape(-1, *matrix.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


# Of `nn.MultiheadAttention`, whose projections are no layers of their own.
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def hidden_matrices(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Lists the weights of linear layers between others, `(rows, columns)` or, of `Conv1D`, `(columns, rows)`: by what a layer is and not by
    what it is called, no embedding (also where it is the head), no head, no table of positions or biases."""
    found: dict[int, nn.Parameter] = {}
    others: set[int] = set()
    for layer in (layer for module in modules for layer in module.modules()):
        weights: list[nn.Parameter | None] = []
        if isinstance(layer, (nn.Linear, Conv1D)):
            weights = [layer.weight]
        elif isinstance(layer, nn.MultiheadAttention):
            weights = [getattr(layer, name) for name in ATTENTION_WEIGHTS]
        found |= {id(weight): weight for weight in weights if weight is not None}
        if isinstance(layer, nn.Embedding):
            others.add(id(layer.weight))
        if isinstance(layer, PreTrainedModel) and (head := layer.get_output_embeddings()) is not None:
            others.add(id(head.weight))
    return [weight for key, weight in found.items() if key not in others]


class MuonAdamW(torch.optim.Optimizer):
    """Muon in groups with `muon=True`, AdamW in the others.

    Muon's step is scaled to the root mean square of AdamW's, 0.2 (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982,
    section 2.2), so that both take the same learning rates and weight decay.

    Args:
        params: parameters or groups of them; those of a group with `muon=True` are matrices `(rows, columns)`.
        lr, weight_decay: of both.
        momentum: of Muon, with Nesterov's look ahead.
        betas, eps: of AdamW.

    Raises:
        ValueError: if a group with `muon=True` holds what is no matrix.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, muon=False):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "muon": muon,
            "fused": True,  # by which torch loads `step` to where its kernel reads it
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if group["muon"] and parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices; got a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                (self._muon_step if group["muon"] else self._adamw_step)(group, trained)
        return loss

    def _muon_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for shape, same in by_shape.items():
            ahead = torch.stack([p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"]) for p in same])
            scale = 0.2 * max(shape) ** 0.5 * group["lr"]
            for parameter, update in zip(same, orthogonalized(ahead)):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _adamw_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_groups(modules: Sequence[nn.Module]) -> list[dict]:
    """Groups for `MuonAdamW`: the hidden matrices of some modules, and their other parameters; empty ones left out."""
    hidden = {id(parameter) for parameter in hidden_matrices(modules)}
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        groups[id(parameter) in hidden].append(parameter)
    return [{"params": parameters, "muon": muon} for muon, parameters in groups.items() if parameters]
