"""Weights of response tokens in the loss, off by default. A stage's `token_weighting` names them."""

import torch
from torch import Tensor


TOKEN_WEIGHTINGS = ("none", "length", "contrast")


def response_segments(record_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """A number for each token of rows `(rows, length)` that is the same for the tokens of one branch, and only for them.

    All that is trained of a conversation counts as its response; it stands in one branch, or in the trunk of a record without branches.
    """
    rows = torch.arange(record_ids.shape[0], device=record_ids.device)[:, None]
    records, branches = int(record_ids.max()) + 2, int(branch_ids.max()) + 1
    return (rows * records + record_ids + 1) * branches + branch_ids


def length_weights(segments: Tensor) -> Tensor:
    """Each token of a response of n tokens weighs 4 / sqrt(n), so that long responses do not drown short ones.

    (After Molmo 2, arXiv 2601.10611.)

    Args:
        segments: `(tokens,)`, of labelled tokens, from `response_segments`.

    Returns:
        float32 `(tokens,)`.
    """
    _, inverse, counts = segments.unique(return_inverse=True, return_counts=True)
    return 4 / counts[inverse].float().sqrt()


def contrast_weights(
    with_image: Tensor, without_image: Tensor, segments: Tensor, low: float = 1.0, high: float = 5.0
) -> Tensor:
    """Tokens weigh by how much the image speaks for them: log p(token | image) - log p(token | no image), clamped to [low, high]
    and averaged over a token and its neighbours in the response.

    (After CAL, "Seeing the Image: Prioritizing Visual Correlation by Contrastive Alignment", arXiv 2405.17871, which takes the
    difference of logits; that of log-probabilities does not change when all logits shift together.)

    Args:
        with_image, without_image: `(tokens,)`, log-probabilities of labelled tokens in the order of the tokens.
        segments: `(tokens,)`, from `response_segments`.

    Returns:
        float32 `(tokens,)`.
    """
    weights = (with_image - without_image).float().clamp(low, high)
    total, count = weights.clone(), torch.ones_like(weights)
    same = segments[1:] == segments[:-1]
    total[1:] += torch.where(same, weights[:-1], 0.0)
    total[:-1] += torch.where(same, weights[1:], 0.0)
    count[1:] += same
    count[:-1] += same
    return total / count
