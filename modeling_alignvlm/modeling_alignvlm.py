"""The AlignVLM model: projected image features replace the image tokens of a causal language model.

`AlignVLMModel` holds vision encoder, projector and language model and builds the attention mask from the token layout;
`AlignVLMForConditionalGeneration` adds the language modelling head, the loss and what generation needs.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested

from .configuration_alignvlm import AlignVLMConfig
from .masking_alignvlm import TokenLayout, attention_mask_for, attention_rule, get_mask_type


LAYOUT_INPUTS = ("image_ids", "record_ids", "branch_ids", "prompt_mask")
ROW_INPUTS = ("mm_token_type_ids", *LAYOUT_INPUTS)  # one value per token
IMAGE_INPUTS = ("pixel_values", "spatial_shapes")  # one entry per image or tile
WITHOUT_IMAGE_IDS = (
    "The encoder {!r} takes images in native shape, of different numbers of tokens: it needs `image_ids`, of shape (batch, length), the "
    "image of each token, as the processor gives it beside `input_ids`. Pass it on."
)
UNKNOWN_TILES = (
    "image_block='image' needs `image_ids`, of shape (batch, length): the image of each token, as the processor gives it beside `input_ids`. "
    "Pass it on; or set `config.image_block = None` if no image is cut into tiles."
)
MOST_JOINING = 1 / 8  # of the groups of an image, in a round of `similar_groups`
# What this release of transformers calls a cache: `cache` since 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class AlignVLMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: projected image features of shape `(images, image_seq_length, hidden)`, if images were given; with native
    shapes `(1, tokens of all images, hidden)`."""

    image_hidden_states: Tensor | None = None


@dataclass
class AlignVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` (scalar, if labels were given), `logits` of shape `(batch, length, vocabulary)` and the model's outputs."""

    image_hidden_states: Tensor | None = None


def chosen_layers(outputs, layers: list[int], encoder: str) -> Tensor:
    """Takes layers of a vision encoder's outputs, their channels side by side: a sequence `(images, tokens, layers * hidden)` or a map
    `(images, layers * hidden, height, width)`.

    Args:
        outputs: with `last_hidden_state`, which -1 takes, and `hidden_states`, if another layer is asked for.
        layers: as `AlignVLMConfig.feature_layers`.
        encoder: what messages call it.

    Raises:
        ValueError: for a layer that the encoder does not have, and for layers of different shapes.
    """
    states = getattr(outputs, "hidden_states", None) or ()
    for layer in layers:
        if layer != -1 and not -len(states) <= layer < len(states):
            valid = (
                f"it has the layers {-len(states)} to {len(states) - 1}" if states else "it returns no hidden states"
            )
            raise ValueError(
                f"vision_feature_layer={layer} cannot be had of the encoder {encoder!r}: {valid}; -1 is its final output."
            )
    found = [outputs.last_hidden_state if layer == -1 else states[layer] for layer in layers]
    if any(features.shape != found[0].shape for features in found):
        shapes = ", ".join(f"{layer}: {tuple(features.shape)}" for layer, features in zip(layers, found))
        raise ValueError(
            f"vision_feature_layer={layers} names layers of different shapes of the encoder {encoder!r} ({shapes}). Take layers of one."
        )
    return torch.cat(found, dim=1 if found[0].ndim == 4 else -1) if len(found) > 1 else found[0]


class AlignVLMLayerFusion(nn.Module):
    """Adds up features of several layers, each behind a layer norm of its own: one weight a layer, by softmax, all equal at first.

    This is the static manager of ManagerTower (Xu et al., 2023, arXiv 2306.00103), one scalar a layer, without its noise in training.
    """

    def __init__(self, layers: int, hidden_size: int, eps: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, eps=eps) for _ in range(layers))
        self.layer_scores = nn.Parameter(torch.zeros(layers))

    def forward(self, features: Tensor) -> Tensor:
        """Maps `(images, positions, layers * hidden)` to `(images, positions, hidden)`."""
        weights = self.layer_scores.softmax(0)
        layers = features.chunk(len(self.norms), dim=-1)
        return sum(weight * norm(layer) for weight, norm, layer in zip(weights, self.norms, layers))


def by_squares(features: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Sorts the positions of a grid, `(images, positions, hidden)`, by squares of `factor x factor`, row by row: `(images, squares,
    factor**2, hidden)`."""
    images, _, hidden = features.shape
    rows, columns = (side // factor for side in grid)
    squares = features.reshape(images, rows, factor, columns, factor, hidden).transpose(2, 3)
    return squares.reshape(images, rows * columns, factor**2, hidden)


def group_means(features: Tensor, groups: Tensor, count: int) -> Tensor:
    """Averages features `(images, positions, hidden)` over `count` groups, `(images, positions)`: `(images, count, hidden)`. By matrix
    products, which add in the same order each time."""
    members = (groups.unsqueeze(1) == torch.arange(count, device=groups.device)[:, None]).to(features.dtype)
    return members @ features / members.sum(-1, keepdim=True)


def similar_groups(features: Tensor, count: int) -> Tensor:
    """Groups similar positions of each image, as the bipartite soft matching of ToMe does (Bolya et al., 2023, arXiv 2210.09461).

    Each position is a group at first. In a round every other group, beginning with the first, finds the most similar one among those
    between, by the cosine of their means; the groups most similar to theirs join these, at most an eighth of all groups in a round.

    Args:
        features: `(images, positions, hidden)`.
        count: how many groups are left of each image.

    Returns:
        `(images, positions)`, the group of each position: 0 to `count - 1`, in the order of the positions that others have joined.
    """
    kind, (images, left, _) = features.device.type, features.shape
    if torch.is_autocast_enabled(kind):  # it would compare in 16 bit
        with torch.autocast(kind, enabled=False):
            return similar_groups(features, count)
    features = features.detach() if features.dtype == torch.float64 else features.detach().float()
    groups = torch.arange(left, device=features.device).expand(images, -1)
    while left > count:
        means = nn.functional.normalize(group_means(features, groups, left), dim=-1)
        similarity, nearest = (means[:, ::2] @ means[:, 1::2].mT).max(-1)
        joining = min(left - count, max(1, int(left * MOST_JOINING)))
        chosen = similarity.sort(dim=-1, descending=True).indices[:, :joining]
        own = torch.arange(left, device=features.device).expand(images, -1)
        joined = own.scatter(1, 2 * chosen, 2 * nearest.gather(1, chosen) + 1)
        numbers = (joined == own).cumsum(-1) - 1
        groups = numbers.gather(1, joined).gather(1, groups)
        left -= joining
    return groups


class AlignVLMCalibration(nn.Module):
    """Scales and shifts the hidden states of image tokens behind a layer of the language model: MoCa of "Deciphering Cross-Modal
    Alignment in Large Vision-Language Models" (Huang et al., 2024, arXiv 2410.07167). At first it changes nothing."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(hidden_size))  # added to 1, so that weight decay draws it there
        self.shift = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor, image_tokens: Tensor) -> Tensor:
        """Maps `(batch, length, hidden)` at the True of `image_tokens`, `(batch, length)`."""
        calibrated = (hidden_states * (1 + self.scale) + self.shift).to(hidden_states.dtype)
        return torch.where(image_tokens.unsqueeze(-1), calibrated, hidden_states)

    def behind(self, layer: nn.Module, args: tuple, kwargs: dict, output):
        """Applies it to the output of a layer that was called with `image_tokens`, as a forward hook."""
        image_tokens = kwargs.get("image_tokens")
        if image_tokens is None:
            return output
        if isinstance(output, tuple):
            return (self(output[0], image_tokens), *output[1:])
        return self(output, image_tokens)


class AlignVLMProjector(nn.Module):
    """Maps features `(images, positions, feature_size)`, as `AlignVLMModel.encode_images` makes them, to image tokens `(images,
    image_seq_length, text_hidden)`."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        self.config = config
        self.factor = config.pixel_shuffle_factor
        self.grid = None if config.native_shapes else config.feature_grid
        self.pools = config.projector_type == "pool"
        norm_eps = getattr(config.vision_config, "layer_norm_eps", 1e-6)
        hidden_size, layers = config.feature_size, len(config.feature_layers)
        self.fusion = None
        if config.vision_layer_fusion == "weighted_sum":
            hidden_size //= layers
            self.fusion = AlignVLMLayerFusion(layers, hidden_size, norm_eps)
        in_features = hidden_size * (1 if self.pools else self.factor**2)
        out_features = config.text_config.hidden_size
        if self.pools:
            self.layers = nn.Sequential(
                nn.RMSNorm(in_features, eps=norm_eps), nn.Linear(in_features, out_features, bias=False)
            )
        elif config.projector_type == "linear":
            self.layers = nn.Linear(in_features, out_features)
        else:
            self.layers = nn.Sequential(
                nn.Linear(in_features, out_features),
                ACT2FN[config.projector_hidden_act],
                nn.Linear(out_features, out_features),
            )
        if config.modality_calibration:  # here, because it trains whenever the projector does
            count = config.text_config.num_hidden_layers
            self.calibrations = nn.ModuleList(AlignVLMCalibration(out_features) for _ in range(count))

    def squares(self, features: Tensor) -> Tensor:
        """Sorts positions by squares: `(images, squares, factor**2, hidden)`. Those of native shapes come so."""
        if self.grid is None:
            return features.unflatten(1, (-1, self.factor**2))
        return by_squares(features, self.grid, self.factor)

    def pixel_shuffle(self, features: Tensor) -> Tensor:
        """Stacks each square of positions into one token."""
        return self.squares(features).flatten(2)

    def average(self, features: Tensor) -> Tensor:
        """Averages each square of positions into one token."""
        return self.squares(features).mean(2)

    def prepare(self, features: Tensor) -> Tensor:
        """Makes of features `(images, positions, feature_size)` what the layers take, `(images, squares, in_features)`."""
        if self.fusion is not None:
            features = self.fusion(features.to(self.fusion.layer_scores.dtype))
        first = self.layers[0] if isinstance(self.layers, nn.Sequential) else self.layers
        kept = first.weight if self.pools else first.bias  # which quantisation of weights leaves as they are
        features = features.to(kept.dtype)  # a frozen encoder may compute in 16 bit
        if self.factor > 1:
            features = self.average(features) if self.pools else self.pixel_shuffle(features)
        return features

    def tokens_of_squares(self, features: Tensor) -> Tensor:
        """Tells for each square of the grid which of its image's tokens it is in: `(images, squares)`."""
        return similar_groups(self.prepare(features), self.config.image_seq_length)

    def forward(self, features: Tensor) -> Tensor:
        features, count = self.prepare(features), self.config.merge_image_tokens
        if count is not None:
            features = group_means(features, similar_groups(features, count), count)
        return self.layers(features)


class AlignVLMPreTrainedModel(PreTrainedModel):
    config: AlignVLMConfig
    config_class = AlignVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True  # only for the mask type `causal`: see `_refuse_flash_attention`
    _supports_attention_backend = True

    def __init__(self, config: AlignVLMConfig, *args, **kwargs):
        self._refuse_flash_attention(config, config)
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlignVLMLayerFusion):
            init.zeros_(module.layer_scores)
        elif isinstance(module, AlignVLMCalibration):
            init.zeros_(module.scale)
            init.zeros_(module.shift)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in transformers; a kernel that the encoder does not support (convolutions have none) is set for the language model alone, as
        when the model is loaded."""
        if isinstance(attn_implementation, str):
            try:
                self.base_model.vision_tower.get_correct_attn_implementation(attn_implementation)
            except ValueError:
                attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @staticmethod
    def _refuse_flash_attention(config: AlignVLMConfig, attention_config) -> None:
        """Refuses FlashAttention kernels, which ignore mask functions: they would silently train the causal baseline."""
        looks_ahead = get_mask_type(config.attention_mask_type).looks_ahead is not None
        if looks_ahead and is_flash_attention_requested(attention_config):
            raise ValueError(
                f"attn_implementation={attention_config._attn_implementation!r} cannot apply the mask type "
                f"{config.attention_mask_type!r}. Use 'sdpa', 'flex_attention' or 'eager', or attention_mask_type='causal'."
            )


class AlignVLMModel(AlignVLMPreTrainedModel):
    """Vision encoder, projector and language model without a head."""

    def __init__(self, config: AlignVLMConfig):
        config.check_mask_type()
        config.check_merging()
        super().__init__(config)
        try:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        except ValueError:  # the attention kernel asked for is the language model's; convolutions have none
            self.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
        self.projector = AlignVLMProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.modality_calibration:
            self._calibrate_layers()
        self.post_init()
        # An encoder also names layers that it may be built without (SigLIP's pooling head), which FSDP would look for in vain.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _calibrate_layers(self) -> None:
        count, layers = len(self.projector.calibrations), getattr(self.language_model, "layers", ())
        if len(layers) != count:
            raise ValueError(
                f"modality_calibration=True needs a language model with `layers`, {count} of them, and "
                f"{self.config.text_config.model_type!r} has none of that name. Leave it out."
            )
        for index, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._calibrated, index), with_kwargs=True)

    def _calibrated(self, index: int, *call):
        """Calibrates the output of a layer. The projector is looked up at each call, since PEFT may put a copy of it in its place."""
        return self.projector.calibrations[index].behind(*call)

    def train(self, mode: bool = True) -> "AlignVLMModel":
        """As in PyTorch, but batch norms of the encoder keep their pretrained statistics: a stage that freezes it must not
        change them, and features of an image must not depend on its neighbours in the batch."""
        super().train(mode)
        for module in self.vision_tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def multi_modal_projector(self) -> AlignVLMProjector:
        """The projector, by the name that `transformers.exporters` looks for. Checkpoints store it as `projector`."""
        return self.projector

    def find_image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Finds image tokens, `(batch, length)`, by their id or, without ids, by their embedding, as transformers' own classes do."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds.dtype)).all(-1)

    def encode_images(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        """Encodes images `(images, channels, height, width)` to features `(images, positions, feature_size)`: class and register
        tokens dropped, feature maps flattened row by row, contiguous, so that kept features go through the same kernels.

        Images in native shape are patches, see `forward`, and become one sequence `(1, positions of all images, feature_size)`.
        """
        return self._encode(pixel_values, spatial_shapes)[0]

    def _encode(self, pixel_values: Tensor, spatial_shapes: Tensor | None, **asked: bool):
        """Returns what `encode_images` does, and the encoder's outputs with what is `asked` of it."""
        asked["output_hidden_states"] = asked.get("output_hidden_states", False) or self.config.feature_layers != [-1]
        if self.config.native_shapes:
            return self._encode_patches(pixel_values, spatial_shapes, **asked)
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (images, channels, height, width)."
            )
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **asked)
        features = chosen_layers(outputs, self.config.feature_layers, self.config.vision_config.model_type)
        if features.ndim == 4:  # a map (images, feature_size, height, width)
            features = features.flatten(2).transpose(1, 2)
        height, width = self.config.feature_grid
        extra_tokens = features.shape[1] - height * width  # class and register tokens stand in front
        if features.ndim != 3 or extra_tokens < 0:
            raise ValueError(
                f"The encoder {self.config.vision_config.model_type!r} made features of shape {tuple(features.shape)} of pixel "
                f"values of shape {tuple(pixel_values.shape)}; expected (images, at least {height * width} positions, hidden)."
            )
        return features[:, extra_tokens:].contiguous(), outputs

    def _encode_patches(self, pixel_values: Tensor, spatial_shapes: Tensor | None, **asked: bool):
        """Encodes images in native shape. Padding is neither seen by patches nor returned; positions come square by square."""
        given = () if spatial_shapes is None else tuple(spatial_shapes.shape)
        if pixel_values.ndim != 3 or given != (len(pixel_values), 2):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)} and `spatial_shapes` {given}; expected (images, patches, values) and "
                "(images, 2), as the processor makes them for images in native shape."
            )
        grids, factor, most = spatial_shapes.tolist(), self.config.pixel_shuffle_factor, pixel_values.shape[1]
        if any(side < 1 or side % factor for grid in grids for side in grid) or any(r * c > most for r, c in grids):
            raise ValueError(
                f"`spatial_shapes` is {grids}; expected rows and columns that pixel_shuffle_factor={factor} divides, and at most {most} "
                "patches an image."
            )
        positions = torch.arange(most, device=spatial_shapes.device)
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype),
            pixel_attention_mask=positions < spatial_shapes.prod(-1, keepdim=True),
            spatial_shapes=spatial_shapes,
            return_dict=True,
            **asked,
        )
        features = chosen_layers(outputs, self.config.feature_layers, self.config.vision_config.model_type)
        images = [
            by_squares(own[None, : rows * columns], (rows, columns), factor)
            for own, (rows, columns) in zip(features, grids)
        ]
        return torch.cat(images, dim=1).flatten(1, 2), outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images.

        Args:
            pixel_values, spatial_shapes: as in `forward`.
            **kwargs: `output_hidden_states` and `output_attentions` return those of the encoder too.

        Returns:
            `last_hidden_state`: features `(images, positions, feature_size)`, as `encode_images` returns them;
            `pooler_output`: image tokens `(images, image_seq_length, hidden)`, with native shapes `(1, tokens of all images, hidden)`.
        """
        asked = {name: True for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)}
        features, outputs = self._encode(pixel_values, spatial_shapes, **asked)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.projector(features),
            hidden_states=outputs.get("hidden_states") if "output_hidden_states" in asked else None,
            attentions=outputs.get("attentions"),
        )

    def _weightless_image(self) -> Tensor:
        """Returns zero, computed from a blank image: it keeps the image side in the graph of a training batch without images. If
        only that side trains, there would be no graph at all, and processes with images in their batches would wait for this one."""
        channels, factor = getattr(self.config.vision_config, "num_channels", 3), self.config.pixel_shuffle_factor
        device, shapes = next(self.projector.parameters()).device, None
        if self.config.native_shapes:
            size = (factor**2, channels * self.config.vision_config.patch_size**2)
            shapes = torch.full((1, 2), factor, device=device)
        else:
            size = (channels, *self.config.input_size)
        return 0.0 * self.get_image_features(torch.zeros(1, *size, device=device), shapes).pooler_output.mean()

    def _merge_image_features(self, inputs_embeds: Tensor, is_image: Tensor, features: Tensor) -> Tensor:
        """Puts image features `(images, image_seq_length, hidden)` at the image tokens of `inputs_embeds`, in order."""
        found, given = is_image.sum(), features.shape[0] * features.shape[1]
        torch_compilable_check(
            found == given,
            lambda: (
                f"Image features and image tokens do not match: `input_ids` holds {int(found)} image tokens, and {features.shape[0]} image(s) "
                f"of {features.shape[1]} tokens need {given}. Every image needs one placeholder."
            ),
        )
        return inputs_embeds.masked_scatter(
            is_image.unsqueeze(-1), features.to(inputs_embeds.device, inputs_embeds.dtype)
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        record_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        positions_to_keep: Tensor | None = None,
        image_features: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> AlignVLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): with `image_seq_length` image tokens per image or tile.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                all images of the batch, or the tiles of all images, in the order of their tokens. With native shapes, the patches of
                each image row by row, then padding: `(images, patches, patch_size**2 * channels)`.
            attention_mask (`torch.Tensor`):
                `(batch, cached + length)`, 0 at padding; or a ready bool mask of shape `(batch, 1, length, keys)`, True
                where attention is allowed, which then replaces every rule below (but not the window of a language model's sliding
                layers).
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`):
                instead of `input_ids`; without `pixel_values` the image features are taken to be in place.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, length)`):
                1 at image tokens; else read off `input_ids`, or off `inputs_embeds` with `pixel_values`. Needed where the image
                features are in place.
            image_ids, record_ids, branch_ids, prompt_mask (`(batch, length)`):
                the fields of `TokenLayout`, all optional. Without them a row is one record whose images are found by
                their tokens; where they are cut into tiles (`config.image_block`), the processor gives `image_ids`. Some mask
                types (`MaskType.needs_prompt`) need `prompt_mask`, except behind cached tokens: new tokens come after the
                first response.
            positions_to_keep (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
                return only these positions as `last_hidden_state`, in one row `(1, kept, hidden)`: a trainer that applies the
                head itself need not project positions without labels.
            image_features (`torch.Tensor` of shape `(images, positions, feature_size)`, *optional*):
                what `encode_images` made of the images, instead of `pixel_values`: a frozen encoder need not run again.
            spatial_shapes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                with native shapes, the rows and columns of patches of each image.
            cache, past_key_values (`Cache`, *optional*): two names of one argument, see `CACHE_NAME`.
        """
        cache = past_key_values if cache is None else cache
        self._refuse_flash_attention(self.config, self.language_model.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("Give only one of `pixel_values` and `image_features`, which the encoder made of them.")
        given_images = image_features if pixel_values is None else pixel_values
        gives_images = given_images is not None
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens.shape[0] == 0 or tokens.shape[1] == 0:
            raise ValueError(f"The batch is empty: the input has shape {tuple(tokens.shape)}.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        begins_rows = _begins_rows(cache, tokens.shape[1])
        is_image = None
        if mm_token_type_ids is not None:
            is_image = mm_token_type_ids == 1
        elif gives_images or (input_ids is not None and begins_rows):  # else text, whatever a model has written
            is_image = self.find_image_tokens(input_ids, inputs_embeds)
        if is_image is not None and is_image.shape != tokens.shape[:2]:
            raise ValueError(
                f"`mm_token_type_ids` has shape {tuple(is_image.shape)}, but the tokens have {tuple(tokens.shape[:2])}. With `pixel_values` it "
                "can be left out."
            )
        if is_image is None:
            has_images = image_ids is not None
        elif gives_images:
            has_images = len(given_images) > 0  # with the tokens of each: see `_merge_image_features`
        elif input_ids is not None:
            has_images = False
            torch_compilable_check(
                ~is_image.any(),
                lambda: f"`input_ids` holds {int(is_image.sum())} image tokens, but no `pixel_values` were given.",
            )
        else:
            has_images = bool(is_image.any())
        features = None
        if gives_images:
            if image_features is None:
                image_features = self.encode_images(pixel_values, spatial_shapes)
            positions = image_features.shape[1] if self.config.native_shapes else self.config.positions
            if image_features.shape[1:] != (positions, self.config.feature_size):
                raise ValueError(
                    f"`image_features` has shape {tuple(image_features.shape)}; expected (images, {positions} positions, "
                    f"{self.config.feature_size}), as `encode_images` makes them."
                )
            features = self.projector(image_features)
            inputs_embeds = self._merge_image_features(inputs_embeds, is_image, features)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._weightless_image()

        if not self.config.packing:
            record_ids = branch_ids = self._refuse_packed_rows(record_ids, branch_ids)
        layout_inputs = {"record_ids": record_ids, "branch_ids": branch_ids, "prompt_mask": prompt_mask}
        if isinstance(attention_mask, dict):
            raise TypeError(
                "`attention_mask` is a dictionary; expected one tensor, which the layers of every type share."
            )
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = self._ready_mask(attention_mask, inputs_embeds, position_ids, cache)
        elif self._needs_layout(has_images, begins_rows, **layout_inputs):
            layout = self._layout(inputs_embeds, is_image, attention_mask, cache, image_ids, **layout_inputs)
            attention_mask = self._layout_masks(layout, inputs_embeds, attention_mask, position_ids, cache)
            if position_ids is None:  # as usual; OPT would count them in a 2D mask
                past_length = 0 if cache is None else cache.get_seq_length()
                position_ids = past_length + torch.arange(tokens.shape[1], device=inputs_embeds.device)[None]
        # else: text behind text, where the language model's own causal mask is the rule

        if self.config.modality_calibration:
            image_tokens = image_ids >= 0 if is_image is None and image_ids is not None else is_image
            kwargs["image_tokens"] = image_tokens  # which language models hand on to their layers

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        last_hidden_state = outputs.last_hidden_state
        if positions_to_keep is not None:
            last_hidden_state = last_hidden_state[positions_to_keep].unsqueeze(0)
        return AlignVLMModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _refuse_packed_rows(self, record_ids: Tensor | None, branch_ids: Tensor | None) -> None:
        """Refuses packed rows. In other rows `attention_mask` says all that these two inputs do."""
        for name, value in (("record_ids", record_ids), ("branch_ids", branch_ids)):
            if value is not None and value.max() > 0:
                raise ValueError(
                    f"`{name}` describes packed rows, which the language model {self.config.text_config.model_type!r} cannot keep "
                    "apart (config.packing is False). Give one record with one annotation per row."
                )

    def _needs_layout(self, has_images: bool, begins_rows: bool, record_ids, branch_ids, prompt_mask) -> bool:
        """Whether this call needs more than the causal mask of the language model."""
        mask_type = get_mask_type(self.config.attention_mask_type)
        governs_row = has_images or mask_type.text_looks_ahead
        if mask_type.needs_prompt and governs_row and prompt_mask is None and begins_rows:
            raise ValueError(
                f"The mask type {self.config.attention_mask_type!r} needs `prompt_mask`: a bool tensor of shape (batch, length), True before the "
                "first response. (`generate` fills it in for a prompt; `AlignVLMCollator` for training rows.)"
            )
        if record_ids is not None or branch_ids is not None:
            return True
        return mask_type.looks_ahead is not None and (has_images or prompt_mask is not None)

    def _layout(self, inputs_embeds, is_image, attention_mask, cache, image_ids, **layout_inputs) -> TokenLayout:
        """Builds the layout of this call's tokens, `(batch, length)`, from the given inputs and the image tokens."""
        shape = inputs_embeds.shape[:2]
        for name, value in {"image_ids": image_ids, **layout_inputs}.items():
            if value is not None and value.shape != shape:
                raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but the tokens have {tuple(shape)}.")
        if attention_mask is not None:
            past_length = 0 if cache is None else cache.get_seq_length()
            if attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1] + int(past_length):
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected ({shape[0]}, "
                    f"{shape[1] + int(past_length)}): one value for each cached and each new token."
                )
            attention_mask = attention_mask[:, past_length : past_length + shape[1]]
        if is_image is None:
            if image_ids is not None and self.config.image_block == "tile":
                raise ValueError(
                    "image_block='tile' needs `mm_token_type_ids` (1 at image tokens) with `inputs_embeds`."
                )
            is_image = torch.zeros(shape, dtype=torch.bool, device=inputs_embeds.device)
        if image_ids is None and (self.config.native_shapes or self.config.image_block == "image"):
            message = WITHOUT_IMAGE_IDS if self.config.native_shapes else UNKNOWN_TILES
            torch_compilable_check(~is_image.any(), message.format(self.config.vision_config.model_type))
        if image_ids is None or self.config.image_block == "tile":
            counts = is_image.sum(-1)
            torch_compilable_check(
                counts % self.config.image_seq_length == 0,
                lambda: (
                    f"Rows hold {', '.join(map(str, counts.tolist()))} image tokens, and an image takes "
                    f"{self.config.image_seq_length}: part of an image is missing. Truncate before or behind images."
                ),
            )
        return TokenLayout.from_image_mask(
            is_image,
            self.config.image_seq_length,
            attention_mask,
            image_ids=image_ids,
            image_block=self.config.image_block,
            **layout_inputs,
        )

    def _ready_mask(self, mask: Tensor, inputs_embeds: Tensor, position_ids: Tensor | None, cache: Cache | None):
        """Converts a dense mask given by the caller to the form that the attention kernel reads, for each attention type."""
        batch, length = inputs_embeds.shape[:2]
        sizes = self._mask_sizes(length, cache)
        total_length = _total_length(sizes)
        if mask.shape != (batch, 1, length, total_length) or mask.dtype != torch.bool:
            raise ValueError(
                f"A ready `attention_mask` must be bool of shape {(batch, 1, length, total_length)}, True where attention is "
                f"allowed; got {mask.dtype} of shape {tuple(mask.shape)}. (For an additive mask pass `mask == 0`.)"
            )
        past_length = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(total_length, device=mask.device).expand(batch, -1)
        if position_ids is not None and _begins_rows(cache, length):
            positions = _with_new_positions(positions, position_ids, past_length)
        return self._masks(
            lambda b, h, q, k: mask[b, 0, q - past_length, k], positions, inputs_embeds, sizes, past_length
        )

    def _layout_masks(self, layout, inputs_embeds, attention_mask, position_ids, cache):
        """Makes the layout's mask for the language model: one tensor, or one per attention type where its layers differ."""
        config = self.language_model.config
        if is_flash_attention_requested(config):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} cannot keep the records or branches of a packed row "
                "apart. Use 'sdpa', 'flex_attention' or 'eager', or one annotation per row."
            )
        length, past_length = inputs_embeds.shape[1], 0
        sizes = self._mask_sizes(length, cache)
        if cache is not None:
            past_length = cache.get_seq_length()
            total_length = max(_total_length(sizes), int(past_length) + length)
            layout = layout.placed_in_cache(past_length, total_length, attention_mask)
        positions = (layout.record_ids >= 0).long().cumsum(-1) - 1
        if position_ids is not None:
            positions = _with_new_positions(positions, position_ids, past_length)
        rule = attention_rule(layout, self.config.attention_mask_type)
        return self._masks(rule, positions, inputs_embeds, sizes, past_length)

    def _mask_sizes(self, length: int, cache: Cache | None) -> dict[str, tuple[int, int]]:
        """Returns, for each attention type of the language model's layers, the number of keys and the index of the first."""
        config = self.language_model.config
        layer_types = list(getattr(config, "layer_types", None) or [])
        if not layer_types:
            layer_types = [
                "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
            ]
        sizes = {}
        for layer_type in dict.fromkeys(layer_types):
            if layer_type not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"The language model {config.model_type!r} has layers of type {layer_type!r}, which no attention mask "
                    f"can govern. Use attention_mask_type='causal' without packed rows, or another language model."
                )
            index = layer_types.index(layer_type)
            sizes[layer_type] = (length, 0) if cache is None else cache.get_mask_sizes(length, index)
        return sizes

    def _masks(self, rule, positions, inputs_embeds, sizes, past_length):
        """Makes the rule's mask of each attention type: a sliding layer sees keys less than a window of `positions` behind the query."""
        config = self.language_model.config

        def within_window(b, h, q, k):
            return rule(b, h, q, k) & (positions[b, q] - positions[b, k] < config.sliding_window)

        masks = {}
        for layer_type, (kv_length, kv_offset) in sizes.items():
            layer_rule = within_window if layer_type == "sliding_attention" else rule
            masks[layer_type] = attention_mask_for(
                layer_rule, config, inputs_embeds, kv_length, past_length, kv_offset
            )
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _begins_rows(cache: Cache | None, length: int) -> bool:
    """Whether `length` new tokens are the first of their rows. A single token behind a cache is the next step of a generation: the
    cache's length, which may lie on the device, is not read for it."""
    if cache is None or not cache.is_initialized:
        return True
    return length > 1 and int(cache.get_seq_length()) == 0


def _total_length(sizes: dict[str, tuple[int, int]]) -> int:
    """Returns how many tokens, cached and new, the masks of these sizes are about: a sliding layer may keep fewer than a full one."""
    return max(kv_length + kv_offset for kv_length, kv_offset in sizes.values())


def _with_new_positions(positions: Tensor, position_ids: Tensor, past_length: int | Tensor) -> Tensor:
    """Puts the positions of the new tokens (those of branches go on from the trunk) behind those of `past_length` cached ones."""
    own = past_length + torch.arange(position_ids.shape[-1], device=positions.device)
    return positions.index_copy(1, own, position_ids.expand(positions.shape[0], -1))


class AlignVLMForConditionalGeneration(AlignVLMPreTrainedModel, GenerationMixin):
    """AlignVLM with a language modelling head: answers about images, and trains on labels."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__(config)
        self.model = AlignVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, spatial_shapes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        record_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        spatial_shapes: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> AlignVLMCausalLMOutputWithPast:
        """As `AlignVLMModel.forward`, and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`): the token at each position, or -100 where nothing is to be
                predicted; the shift by one happens inside. The loss is the mean over labels, or their sum divided by
                `num_items_in_batch` if that is given.
            logits_to_keep (`int` or `torch.Tensor`): compute logits only for the last `logits_to_keep` positions (0: all), or for these.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            image_ids=image_ids,
            record_ids=record_ids,
            branch_ids=branch_ids,
            prompt_mask=prompt_mask,
            spatial_shapes=spatial_shapes,
            return_dict=True,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:  # Gemma 2
            logits = torch.tanh(logits / softcap) * softcap

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AlignVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict:
        """Passes token types and layout inputs to the prefill, or without a cache to every step.

        New tokens behind a kept cache take the last values of each row; images whose tokens are in the cache are left out.
        Candidates behind the prompt (prompt lookup, an assistant) are text.
        """
        cache = kwargs.get(CACHE_NAME)
        is_first_iteration = is_first_iteration or cache is None or not cache.is_initialized  # of an assistant too
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration:
            return {name: value for name, value in inputs.items() if name not in (*ROW_INPUTS, *IMAGE_INPUTS)}
        embedded = inputs.get("input_ids") is None
        total = (inputs_embeds if embedded else input_ids).shape[1]
        length = inputs["inputs_embeds" if embedded else "input_ids"].shape[1]
        rows = {name: _extended(name, kwargs[name], total) for name in ROW_INPUTS if kwargs.get(name) is not None}
        if inputs.get("pixel_values") is not None and "mm_token_type_ids" in rows:
            cached, given = (self._images_per_row(rows, tokens) for tokens in (total - length, total))
            if sum(given) == len(inputs["pixel_values"]):  # else only the new ones were given
                for name in (name for name in IMAGE_INPUTS if inputs.get(name) is not None):
                    rows_of_images = inputs[name].split(given)
                    inputs[name] = torch.cat([row[skip:] for row, skip in zip(rows_of_images, cached)])
            if len(inputs["pixel_values"]) == 0:
                inputs = {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
        return inputs | {name: value[:, -length:] for name, value in rows.items()}

    def _images_per_row(self, rows: dict[str, Tensor], tokens: int | None = None) -> list[int]:
        """Counts the images or tiles among the first `tokens` of each row, from the row inputs."""
        if not self.config.native_shapes:
            return ((rows["mm_token_type_ids"][:, :tokens] == 1).sum(-1) // self.config.image_seq_length).tolist()
        if rows.get("image_ids") is None:
            raise ValueError(WITHOUT_IMAGE_IDS.format(self.config.vision_config.model_type))
        return [1 + max(row[:tokens], default=-1) for row in rows["image_ids"].tolist()]

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Notes once where the prompt's images are, and that an uncached prompt comes before the first response."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        ids = inputs if name == "input_ids" else model_kwargs.get("input_ids")
        knows_ids = ids is not None and ids.shape[:2] == inputs.shape[:2]
        if model_kwargs.get("mm_token_type_ids") is None and (
            knows_ids or model_kwargs.get("pixel_values") is not None
        ):
            tokens = self.model.find_image_tokens(ids if knows_ids else None, inputs)
            model_kwargs["mm_token_type_ids"] = tokens.long()
        needs_prompt = get_mask_type(self.config.attention_mask_type).needs_prompt
        if (
            needs_prompt
            and model_kwargs.get("prompt_mask") is None
            and _begins_rows(model_kwargs.get(CACHE_NAME), inputs.shape[1])
        ):
            model_kwargs["prompt_mask"] = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return inputs, name, model_kwargs

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if model_kwargs.get("inputs_embeds") is not None and generation_config.use_cache is False:
            raise ValueError(
                "`generate` gives `inputs_embeds` to the first step only, so without a cache later steps would not see the prompt. "
                "Leave out use_cache=False, or pass `input_ids`."
            )
        mask_type = self.config.attention_mask_type
        if generation_config.prefill_chunk_size is not None and get_mask_type(mask_type).text_looks_ahead:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} cuts the prompt into pieces that cannot look ahead, and the "
                f"mask type {mask_type!r} lets text do so. Leave it out."
            )
        if generation_config.guidance_scale not in (None, 1) and get_mask_type(mask_type).text_looks_ahead:
            raise ValueError(
                f"guidance_scale={generation_config.guidance_scale} compares the answer with one to a prompt without images, whose tokens "
                f"cannot look ahead there, and the mask type {mask_type!r} lets text do so. Leave it out."
            )
        return generation_config, model_kwargs

    def _get_candidate_generator(self, assistant_model=None, model_kwargs=None, **kwargs):
        """Gives an assistant that takes no images the text alone."""
        if assistant_model is not None and "image" not in assistant_model.input_modalities:
            model_kwargs = {
                name: value for name, value in model_kwargs.items() if name not in (*ROW_INPUTS, *IMAGE_INPUTS)
            }
        return super()._get_candidate_generator(assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **kwargs
    ):
        """Repeats images row by row for beams and several samples, since rows may hold different numbers of them."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        if images and expand_size > 1:
            counts = self._images_per_row(kwargs)
            for name, value in images.items():
                images[name] = torch.cat([row for row in value.split(counts) for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **images}

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask=None, **kwargs):
        """Returns the 2D mask, from which `AlignVLMModel` builds its own. `generate` would build a causal one for compilable caches."""
        return attention_mask


def _extended(name: str, value: Tensor, length: int) -> Tensor:
    """Extends a row input to `length` tokens: the new ones are text behind the prompt, in the record and branch of the last one."""
    missing = max(length - value.shape[1], 0)
    if name == "image_ids":
        tail = value.new_full((value.shape[0], missing), -1)
    elif name in ("prompt_mask", "mm_token_type_ids"):
        tail = value.new_zeros((value.shape[0], missing))
    else:
        tail = value[:, -1:].expand(-1, missing)
    return torch.cat([value, tail], dim=1)


__all__ = [
    "CACHE_NAME",
    "AlignVLMForConditionalGeneration",
    "AlignVLMModel",
    "AlignVLMPreTrainedModel",
    "chosen_layers",
    "group_means",
    "similar_groups",
]
