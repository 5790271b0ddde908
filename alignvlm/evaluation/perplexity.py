"""Perplexity of a text in windows that do not overlap, the same in evaluation and between stages.

The first token of a window is context only. The text counts as response, not as prompt, so every mask type is causal on it.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvlm.evaluation import bootstrap


DEFINITION = "exp of the mean loss per predicted token (nats); windows do not overlap, their first token is context"


def windows_of(count: int, window: int, limit: int | None = None, name: str = "The text") -> list[slice]:
    """Returns where the windows of a text of `count` tokens are: at most `limit`, each of at least two and at most `window` tokens.

    Raises:
        ValueError: if there is none; the message calls the text `name`.
    """
    if window < 2:
        raise ValueError(f"A window of {window} token(s) predicts nothing; at least two are needed.")
    starts = [start for start in range(0, count, window) if start + 1 < count][:limit]
    if not starts:
        raise ValueError(f"{name} has {count} tokens; at least two are needed.")
    return [slice(start, min(start + window, count)) for start in starts]


@torch.no_grad()
def window_loss(model: PreTrainedModel, tokens: Sequence[int]) -> float:
    """Returns the summed loss in nats of all tokens of a window but the first."""
    input_ids = torch.tensor([tokens], device=next(model.parameters()).device)
    prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    logits = model(input_ids=input_ids, prompt_mask=prompt_mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:], reduction="sum").item()


def text_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512, windows: int = 64
) -> float:
    """Returns the perplexity per token of the first `windows` windows of a text, which shows what a stage makes the model forget.

    Raises:
        ValueError: if the text has fewer than two tokens.
    """
    was_training = model.training
    model.eval()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    chosen = windows_of(len(ids), window, windows)
    loss = sum(window_loss(model, ids[each]) for each in chosen)
    model.train(was_training)
    return math.exp(loss / sum(len(ids[each]) - 1 for each in chosen))


def summarise(windows: list[dict], samples: int = 1000, seed: int = 0) -> dict:
    """Returns the metrics of a text.

    Args:
        windows: for each window, the `loss` in nats of its predicted `tokens`, and their size in `bytes`.
        samples, seed: of the bootstrap, which draws windows.

    Returns:
        `metrics`, `definitions` and `predictions` (the windows) of a result.
    """
    totals = {name: sum(window[name] for window in windows) for name in ("loss", "tokens", "bytes")}
    per_token = [window["loss"] / window["tokens"] for window in windows for _ in range(window["tokens"])]
    window_of = [index for index, window in enumerate(windows) for _ in range(window["tokens"])]
    low, high = bootstrap.interval(window_of, per_token, samples, seed)
    numbers = {
        "perplexity": math.exp(totals["loss"] / totals["tokens"]),
        "bits_per_byte": totals["loss"] / math.log(2) / totals["bytes"],
        "tokens": totals["tokens"],
        "bytes": totals["bytes"],
        "intervals": {"perplexity": [math.exp(low), math.exp(high)]},
    }
    return {"metrics": {"text": numbers}, "definitions": {"text": DEFINITION}, "predictions": windows}
