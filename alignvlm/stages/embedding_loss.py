"""The stage option `embedding_loss`: what the vision encoder saw must stay readable in the language model's hidden states.

A small head predicts, from the hidden states of a middle layer at the image tokens, the encoder's features of these places; its error is
added to the loss, and the head is thrown away after training (after OLA-VLM, "Elevating Visual Perception in Multimodal LLMs with Visual
Embedding Distillation", arXiv 2412.09585). The paper's targets are several expert encoders, predicted through further tokens and also
contrasted among images; here the target is the model's own encoder, and the error the paper's smooth L1 distance alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration
from modeling_alignvlm.modeling_alignvlm import group_means


HEAD = "embedding_head"  # name of the head in the model while it trains


class EmbeddingHead(nn.Sequential):
    """Predicts features `(tokens, vision_hidden)` from hidden states `(tokens, hidden)` of the layer `layer`.

    Args:
        layer: index of the language model's hidden states; 0 are the embeddings, the last is its output.
        seed: of its initial weights, which take no random numbers from training.
    """

    def __init__(self, config: AlignVLMConfig, layer: int, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden = config.text_config.hidden_size
            super().__init__(nn.LayerNorm(hidden), nn.Linear(hidden, config.feature_size))
        self.layer = layer

    def loss(self, model: AlignVLMForConditionalGeneration, seen: dict[str, Any], input_ids: Tensor) -> Tensor:
        """The smooth L1 distances of predicted and true features, which are averaged over the square of places of their image token (of
        merged tokens, over the squares they are made of) and normed to mean 0 and variance 1: the mean of each token, summed over tokens.

        Args:
            seen: `features` and `hidden_states` of a forward pass, as `with_head` notes them.
            input_ids: `(rows, length)`, those of that pass.

        Returns:
            a scalar in float32; zero where no row has an image.
        """
        is_image = input_ids == model.config.image_token_id
        if not is_image.any():  # with a gradient all the same
            return 0.0 * sum(parameter.sum() for parameter in self.parameters())
        projector = model.model.projector
        features = projector.average(seen["features"].detach().float())
        if model.config.merge_image_tokens is not None:
            groups = projector.tokens_of_squares(seen["features"])
            features = group_means(features, groups, model.config.image_seq_length)
        target = nn.functional.layer_norm(features, features.shape[-1:]).flatten(0, 1)
        states = seen["hidden_states"][self.layer][is_image].float()  # of a model that may compute in 16 bits
        return nn.functional.smooth_l1_loss(self(states).float(), target, reduction="sum") / target.shape[-1]


@contextmanager
def with_head(model: AlignVLMForConditionalGeneration) -> Iterator[None]:
    """Puts the head's loss into `outputs.loss` of the first forward pass in the block, which must have `output_hidden_states=True`.

    DDP waits for gradients of the parameters that the outputs of its forward pass depend on: the head must be among them.
    """
    seen: dict[str, Any] = {}

    def note_states(module, inputs, outputs):
        seen.setdefault("hidden_states", outputs.hidden_states)

    def note_features(module, inputs):
        seen.setdefault("features", inputs[0])

    def add_loss(module, inputs, keywords, outputs):
        if not seen.get("is_done"):
            seen["is_done"] = True
            outputs.loss = getattr(model, HEAD).loss(model, seen, keywords["input_ids"])

    handles = [
        model.model.language_model.register_forward_hook(note_states),
        model.model.projector.register_forward_pre_hook(note_features),
        model.register_forward_hook(add_loss, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_of(config: AlignVLMConfig, given: int | None) -> int:
    """The layer whose hidden states are read: the one given, or the middle one.

    Raises:
        ValueError: if the language model has no such layer.
    """
    layers = config.text_config.num_hidden_layers
    layer = (layers + 1) // 2 if given is None else given
    if not 1 <= layer <= layers:
        raise ValueError(f"embedding_loss_layer={given} must be from 1 to {layers}, the number of layers.")
    return layer
