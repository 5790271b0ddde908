"""Several mask types in one stage, `attention_mask_type: {image: 0.5, causal: 0.5}`: every step draws its own.

A model trained under several rules of attention can serve under each of them, as UL2 (arXiv 2205.05131) trains prefix and causal language
modelling in one run. The first type named is the checkpoint's, used in evaluation and at inference.
"""

import json
from collections import Counter
from math import isclose
from typing import Any

import numpy as np

from modeling_alignvlm.masking_alignvlm import MASK_TYPES


def mask_type_shares(given: str | dict[str, float]) -> dict[str, float]:
    """Returns the share of each mask type that `attention_mask_type` names: a name, or names with shares (also as JSON).

    Raises:
        ValueError: for an unknown name, one name with a share, and shares that are no numbers between 0 and 1 or do not add up to 1.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"attention_mask_type={given!r} is not valid JSON: {error}.") from error
    shares = {given: 1.0} if isinstance(given, str) else given
    if not isinstance(shares, dict) or not shares:
        raise ValueError(
            f"attention_mask_type={given!r} must be a name, or names with shares such as {{image: 0.5, causal: 0.5}}."
        )
    for name in shares:
        if name not in MASK_TYPES:
            raise ValueError(f"Unknown attention_mask_type {name!r}. Valid values: {', '.join(MASK_TYPES)}.")
    if isinstance(given, str):
        return shares
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            alone = " For one type alone, write its name." if len(shares) == 1 else ""
            raise ValueError(
                f"attention_mask_type: the share of {name!r} is {share!r}; expected a number between 0 and 1.{alone}"
            )
    if not isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"attention_mask_type: the shares {shares} add up to {sum(shares.values()):g}, not to 1.")
    return shares


def drawn_mask_type(shares: dict[str, float], seed: int, step: int) -> str:
    """Draws the mask type of a step, for all its rows: by seed and step alone, so the same in every process and after resuming."""
    if len(shares) == 1:
        return next(iter(shares))
    total = sum(shares.values())
    return str(
        np.random.default_rng([seed, step]).choice(list(shares), p=[share / total for share in shares.values()])
    )


def mask_types_record(shares: dict[str, float], seed: int, steps: int) -> dict[str, Any]:
    """What the run record says of mixed mask types: the shares, and how many steps were taken under each; {} for one alone."""
    if len(shares) == 1:
        return {}
    drawn = Counter(drawn_mask_type(shares, seed, step) for step in range(steps))
    return {"attention_mask_type_shares": shares, "steps_by_mask_type": {name: drawn[name] for name in shares}}


def described(shares: dict[str, float]) -> str:
    """The mask types of a stage in words."""
    if len(shares) == 1:
        return f"mask type {next(iter(shares))!r}"
    return "mask types " + ", ".join(f"{name!r} in {share:.0%} of the steps" for name, share in shares.items())
