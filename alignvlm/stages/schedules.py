"""Learning-rate schedules that transformers does not have."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def infinite_factor(
    step: int,
    total: int,
    warmup: int,
    cooldown: float = 0.25,
    anneal: float = 0.15,
    constant: float = 0.5,
    final: float = 0.01,
) -> float:
    """The factor of the peak learning rate at a step: warm-up, cooldown, constant, anneal.

    The rate rises linearly from 0 to the peak, falls by a half cosine to `constant` times the peak, stays there, and in the end falls
    exponentially to `final` times the peak. A later stage can go on from the constant phase, which forgets less than a new cosine.
    (After "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training", arXiv 2503.02844.)

    Args:
        step, total, warmup: in optimizer steps.
        cooldown, anneal: shares of the steps after the warm-up.
        constant, final: factors of the peak.
    """
    if step < warmup:
        return step / warmup
    rest = max(total - warmup, 1)
    done = min((step - warmup) / rest, 1.0)
    if done < cooldown:
        return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * done / cooldown))
    if done <= 1 - anneal:
        return constant
    return constant * (final / constant) ** ((done - (1 - anneal)) / anneal)


def check_phases(**phases: float) -> None:
    """Raises a ValueError for phases that `infinite_factor` does not know, or that do not fit into a stage."""
    known = {"cooldown": 0.25, "anneal": 0.15, "constant": 0.5, "final": 0.01}
    if unknown := sorted(set(phases) - set(known)):
        raise ValueError(f"infinite_schedule does not know {unknown}; it has {', '.join(known)}.")
    given = {**known, **phases}
    if not (given["cooldown"] > 0 and given["anneal"] > 0 and given["cooldown"] + given["anneal"] <= 1):
        raise ValueError(
            f"infinite_schedule: cooldown={given['cooldown']:g} and anneal={given['anneal']:g} must be positive and sum to at most 1."
        )
    for name in ("constant", "final"):
        if not 0 < given[name] <= 1:
            raise ValueError(f"infinite_schedule: {name}={given[name]:g} must be above 0 and at most 1.")


def infinite_schedule(optimizer: Optimizer, total: int, warmup: int, **phases: float) -> LambdaLR:
    """`infinite_factor` as a scheduler; for its `phases` see `check_phases`."""
    check_phases(**phases)
    return LambdaLR(optimizer, lambda step: infinite_factor(step, total, warmup, **phases))
