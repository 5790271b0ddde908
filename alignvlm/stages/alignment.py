"""Metrics of how well the modalities are aligned, measured before and after a stage."""

import math

import torch
from torch import Tensor

from alignvlm.rows.collator import AlignVLMCollator


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of vectors `(count, size)`.

    The trace of the matrix root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric and has the
    eigenvalues of C_a C_b. Computed in float64.
    """
    a, b = a.double(), b.double()
    covariances = [(x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1) for x in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * cross
    return max(distance.item(), 0.0)


def modality_integration_rate(image_states: list[Tensor], text_states: list[Tensor]) -> float:
    """MIR, the logarithm of the Fréchet distances between image and text tokens summed over layers: the lower, the closer.

    In each layer both are divided by the mean norm of the text tokens, and tokens whose norm is more than three standard deviations
    from their modality's mean are left out. ("Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality
    Integration Rate", arXiv 2410.07167, section 3.2.)

    Args:
        image_states, text_states: per layer, hidden states `(tokens, hidden)`.
    """
    total = 0.0
    for image, text in zip(image_states, text_states, strict=True):
        image, text = image.double(), text.double()
        scale = text.norm(dim=-1).mean()
        total += frechet_distance(_without_outliers(image / scale), _without_outliers(text / scale))
    return math.log(total)


def _without_outliers(states: Tensor) -> Tensor:
    norms = states.norm(dim=-1)
    return states[(norms - norms.mean()).abs() <= 3 * norms.std()]


@torch.no_grad()
def alignment_metrics(model, collator: AlignVLMCollator, records: list[dict], batch_size: int = 8) -> dict[str, float]:
    """Computes MIR over the language model's layers, and the mean norms of image and text embeddings, on records with an image.

    Returns:
        `mir`, `image_embedding_norm` (image tokens as they enter the language model), `text_embedding_norm`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    image_layers: list[list[Tensor]] = []
    text_layers: list[list[Tensor]] = []
    norms: dict[bool, list[Tensor]] = {True: [], False: []}
    for start in range(0, len(records), batch_size):
        batch = collator(records[start : start + batch_size])
        batch = {
            name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"
        }
        outputs = model(**batch, output_hidden_states=True, use_cache=False)
        is_image = batch["input_ids"] == collator.processor.image_token_id
        is_text = ~is_image & (batch["attention_mask"] == 1)
        for found, chosen in ((image_layers, is_image), (text_layers, is_text)):
            states = [layer[chosen].float().cpu() for layer in outputs.hidden_states]
            found.append(states[1:])
            norms[found is image_layers].append(states[0].norm(dim=-1))
    model.train(was_training)
    return {
        "mir": modality_integration_rate(
            *([torch.cat(layer) for layer in zip(*found)] for found in (image_layers, text_layers))
        ),
        "image_embedding_norm": torch.cat(norms[True]).mean().item(),
        "text_embedding_norm": torch.cat(norms[False]).mean().item(),
    }
