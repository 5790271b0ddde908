"""Where the model looked: the attention from each token of an answer to the places of the images, as heat maps.

    looked = attention_to_images(model, processor, [photo], "What is it?", "A red circle.")
    looked.words[1].text             # "red"
    looked.of_word(1)                # (images, rows, columns), the mean of all layers
    looked.of_word(1, "rollout")     # attention rollout; or the number of a layer

One forward pass over prompt and answer gives everything (teacher forcing): the answer may be the model's own or any other.

Attention shows where information was read, not why a word was chosen: a layer may read a place and use nothing of it (Jain and Wallace,
2019, arXiv 1902.10186). Compare layers, and the map of the same word about another image, before believing one.

Of an image that is cut into tiles, maps show what was read of its overview, not of its tiles. Of images in native shape each has a grid of its
own; where several are shown, smaller maps are filled up with zeros at the right and below: `grids` tells how far each reaches.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import Messages
from alignvlm.rows.encode import Branch, Encoder
from alignvlm.rows.tiles import grids_of, has_grids, image_inputs_of, takes_native_shapes
from modeling_alignvlm import tiles_of, to_rgb


RESIDUAL = 0.5  # the share of a layer's output that rollout takes to come past its attention


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text without surrounding white space, and its tokens, `start` to `stop` (exclusive)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class ImageAttention:
    """What each token of an answer read of the images when it was predicted.

    A position of a causal LM predicts the token after it, so the values of a token are those of the position *before* it: of the last
    token of the prompt for the answer's first. What a token does not read of the images it reads of the text, so its values add up to less
    than 1.

    Args:
        tokens (`list[str]`): the text of each token of the answer, without the special tokens that end it.
        words (`list[Word]`): the answer's words, punctuation with the word before it; each sign of Chinese and Japanese is a word.
        layers (`torch.FloatTensor` of shape `(layers, tokens, images, rows, columns)`):
            the attention of each layer, averaged over its heads; rows and columns are those of the tokens of the image (of its overview, if
            it is cut into tiles), from the top left.
        rollout (`torch.FloatTensor` of shape `(tokens, images, rows, columns)`): see `attention_rollout`.
        grids (`list[tuple[int, int]]`): of each image, the rows and columns that it has.
    """

    tokens: list[str]
    words: list[Word]
    layers: Tensor
    rollout: Tensor
    grids: list[tuple[int, int]]

    @property
    def mean(self) -> Tensor:
        """The average of the layers: `(tokens, images, rows, columns)`."""
        return self.layers.mean(0)

    def of_word(self, word: int, layer: int | str = "mean") -> Tensor:
        """Returns the heat maps of a word, the mean over its tokens: `(images, rows, columns)`; `layer` is `mean`, `rollout` or a number.

        Raises:
            ValueError: for another `layer`.
        """
        if layer not in ("mean", "rollout", *range(len(self.layers))):
            raise ValueError(f"layer={layer!r}. Valid values: 'mean', 'rollout', 0 to {len(self.layers) - 1}.")
        values = getattr(self, layer) if isinstance(layer, str) else self.layers[layer]
        chosen = self.words[word]
        return values[chosen.start : chosen.stop].mean(0)


@torch.inference_mode()
def attention_to_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompt: str | Messages,
    answer: str | Sequence[int],
) -> ImageAttention:
    """Returns what each token of an answer read of the images.

    Sets the language model's attention to `eager` for the forward pass, because other kernels do not return their weights: no other thread
    may use the model meanwhile. The weights of all layers and heads are in memory at once: `layers * heads * length**2` numbers.

    Args:
        model, processor: an AlignVLM checkpoint's, as the Auto classes load them.
        images: PIL images or arrays (see `to_rgb`); the k-th image part of the prompt shows the k-th.
        prompt: as for `alignvlm.evaluation.answer.answer`: a text, which stands behind all images, or a list of messages.
        answer: the text that answers, or its token ids as `generate` returned them behind the prompt. Special tokens at its end are left out.

    Raises:
        ValueError: if the prompt shows no image or more than were given, if the answer has no words, and if the language model has no
            attention weights (Mamba).
    """
    messages = _messages(prompt, len(images))
    count = sum(part["type"] != "text" for message in messages for part in message["content"])
    if count == 0 or count > len(images):
        raise ValueError(f"The prompt shows {count} image(s), and {len(images)} were given. Give one image per part.")
    images = list(map(to_rgb, images[:count]))
    grids, inputs = grids_of(processor, images), image_inputs_of(processor, images)
    branch = _branch(processor, messages, answer, grids)
    attentions = _attentions(model, branch, inputs, has_grids(processor))
    predicting = slice(branch.prompt_length - 1, len(branch) - 1)
    firsts = [branch.image_ids.index(image) for image in range(count)]  # an image begins with its overview
    grids_of_tokens, shares = grids, None
    if not takes_native_shapes(processor):
        grid = tuple(side // model.config.pixel_shuffle_factor for side in model.config.feature_grid)
        grids_of_tokens, length = [grid] * count, model.config.image_seq_length
        if length < math.prod(grid):  # similar squares were merged: each has an equal share of its token's attention
            overviews = [sum(map(tiles_of, grids[:image])) for image in range(count)]
            encoded = model.model.encode_images(inputs["pixel_values"][overviews].to(model.device))
            members = nn.functional.one_hot(model.model.projector.tokens_of_squares(encoded), length).mT
            shares = (members / members.sum(-1, keepdim=True)).to(
                attentions[0]
            )  # (images, tokens of an image, squares)
    most_rows, most_columns = (max(sides) for sides in zip(*grids_of_tokens))

    def maps(values: Tensor) -> Tensor:  # (..., tokens, length) -> (..., tokens, images, rows, columns)
        found = []
        for image, (first, (rows, columns)) in enumerate(zip(firsts, grids_of_tokens)):
            length = rows * columns if shares is None else shares.shape[1]
            own = values[..., first : first + length]
            own = own if shares is None else own @ shares[image]
            margins = (0, most_columns - columns, 0, most_rows - rows)
            found.append(nn.functional.pad(own.unflatten(-1, (rows, columns)), margins))
        return torch.stack(found, dim=-3).cpu()

    tokens = list(_pieces(processor.tokenizer, branch.input_ids[branch.prompt_length :]))
    return ImageAttention(
        tokens=tokens,
        words=words_of(tokens),
        layers=maps(torch.stack([layer[predicting] for layer in attentions])),
        rollout=maps(attention_rollout(attentions, predicting)),
        grids=grids_of_tokens,
    )


def attention_rollout(attentions: Sequence[Tensor], queries: slice = slice(None)) -> Tensor:
    """Follows attention from the last layer to the first ("Quantifying Attention Flow in Transformers", Abnar and Zuidema, 2020, section 3).

    A layer's output is taken for half its input and half what its attention reads: `A = 0.5 * attention + 0.5 * identity`. The product of
    these matrices over the layers says how much of each input token is in each output. The matrices are full, not triangular: tokens of
    an image that see each other mix, and their share is that of the tokens they read.

    Args:
        attentions: per layer, the first first, the weights `(length, length)` averaged over heads, of queries to keys.
        queries: the positions to follow.

    Returns:
        `(queries, length)`; every row adds up to 1 if those of the weights do.
    """
    identity = torch.eye(attentions[0].shape[0], device=attentions[0].device, dtype=attentions[0].dtype)
    flow = identity[queries]
    for weights in reversed(attentions):
        flow = (1 - RESIDUAL) * flow @ weights + RESIDUAL * flow
    return flow


def words_of(tokens: Sequence[str]) -> list[Word]:
    """Groups the texts of tokens into words: a new one begins with white space, behind it, and at every sign of a script without spaces."""
    starts: list[int] = []
    before = " "
    for index, token in enumerate(tokens):
        if token == "":  # part of a character that a later token completes
            continue
        if token[0].isspace() or before.isspace() or _is_wide(token[0]) or _is_wide(before):
            starts.append(index)
        before = token[-1]
    found = [
        Word("".join(tokens[start:stop]).strip(), start, stop)
        for start, stop in zip(starts, [*starts[1:], len(tokens)])
    ]
    return [word for word in found if word.text]


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) == "W" and character.isalpha()


def _messages(prompt: str | Messages, image_count: int) -> Messages:
    """Returns bare messages: image parts carry no images, which could not be remembered by the encoder."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]}]
    return [
        {
            "role": message["role"],
            "content": [
                part if part["type"] == "text" else {"type": part["type"]} for part in Conversation.parts(message)
            ],
        }
        for message in prompt
    ]


def _branch(
    processor: ProcessorMixin, messages: Messages, answer: str | Sequence[int], grids: Sequence[tuple[int, int]]
) -> Branch:
    """Returns the tokens of prompt and answer, without special tokens at the end; an image token in the answer is text."""
    encoder = Encoder(processor)
    if isinstance(answer, str):
        (branch,) = encoder.encode(Conversation(messages, [answer]), grids)
        input_ids, prompt_length = list(branch.input_ids), branch.prompt_length
    else:
        branch = encoder.prompt(messages, grids)
        input_ids, prompt_length = [*branch.input_ids, *map(int, answer)], len(branch)
    special = set(processor.tokenizer.all_special_ids)
    while len(input_ids) > prompt_length and input_ids[-1] in special:
        input_ids.pop()
    written = processor.tokenizer.decode(input_ids[prompt_length:], skip_special_tokens=True)
    if not written.strip():
        raise ValueError(f"The answer {answer!r} has no words, so nothing was read for it. Give a text.")
    image_ids = [*branch.image_ids, *[-1] * len(input_ids)][: len(input_ids)]
    return Branch(tuple(input_ids), (False,) * len(input_ids), prompt_length, tuple(image_ids))


def _attentions(
    model: PreTrainedModel, branch: Branch, inputs: dict[str, Tensor], gives_image_ids: bool
) -> list[Tensor]:
    """Returns per layer the weights `(length, length)`, averaged over heads, in float32 at least."""
    tokens = torch.tensor([branch.input_ids], device=model.device)
    prompt_mask = torch.arange(len(branch), device=model.device)[None] < branch.prompt_length
    image_ids = torch.tensor([branch.image_ids], device=model.device)
    is_image = (tokens == model.config.image_token_id) & prompt_mask  # behind it: whatever a model has written
    with _eager(model.model.language_model):
        outputs = model.model(
            input_ids=tokens,
            **{name: value.to(model.device) for name, value in inputs.items()},
            mm_token_type_ids=is_image.long(),
            image_ids=image_ids if gives_image_ids else None,
            prompt_mask=prompt_mask,
            output_attentions=True,
            use_cache=False,
        )
    found = [weights for weights in outputs.attentions or () if weights is not None]
    if not found:
        raise ValueError(
            f"The language model {model.config.text_config.model_type!r} returns no attention weights, so where it looked is unknown."
        )
    return [(weights[0] if weights.dtype == torch.float64 else weights[0].float()).mean(0) for weights in found]


@contextmanager
def _eager(language_model: PreTrainedModel) -> Iterator[None]:
    """Computes attention by matrix products, which alone return the weights, and by the kernel of before afterwards."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


def _pieces(tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """Yields what each token adds to the text; nothing for those that only begin a character."""
    before = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            yield ""
        else:
            yield text[len(before) :]
            before = text
