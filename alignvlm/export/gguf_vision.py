"""Vision encoder and projector as llama.cpp's `mtmd` reads them: the mmproj file.

Which graph llama.cpp runs hangs on the projector's type alone. `gemma3` takes the encoder's final output, averages squares of patches,
applies an RMS norm and a matrix, and lets the tokens of an image see each other; `mlp` takes the states after any number of layers,
applies two layers with GELU, and stays causal.
"""

import torch

from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


TOWER, PROJECTOR = "model.vision_tower.", "model.projector."
EXACT = ("v.patch_embd.", "v.position_embd.")  # never quantised
NOT_QUANTISED = "mm.input_projection."  # llama.cpp transposes it, which quantised values do not take


def layers_used(config: AlignVLMConfig) -> int:
    """How many of the encoder's layers the features have gone through."""
    count, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return layer if layer >= 0 else count + 1 + layer


def add_keys(writer, config: AlignVLMConfig, processor: AlignVLMProcessor, projector_type: str) -> None:
    """Writes the sizes and constants of encoder and projector, and what happens to pixel values."""
    vision, images = config.vision_config, processor.image_processor
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector_type)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(config.input_size[0])
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers_used(config))
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean(list(images.image_mean) if images.do_normalize else [0.0] * 3)
    writer.add_vision_image_std(list(images.image_std) if images.do_normalize else [1.0] * 3)
    if projector_type == "gemma3":
        writer.add_vision_projector_scale_factor(config.pixel_shuffle_factor)
    else:
        writer.add_array("clip.vision.feature_layer", [layers_used(config)])


def tensors(model: AlignVLMForConditionalGeneration, projector_type: str) -> dict[str, torch.Tensor]:
    """The weights by llama.cpp's names, without layers and norms that the features do not go through.

    Raises:
        ValueError: for a weight that llama.cpp has no name for.
    """
    import gguf

    config = model.config
    used = layers_used(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision_config.num_hidden_layers)
    found = {}
    for name, weight in model.model.vision_tower.state_dict().items():
        named = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if named is None:
            raise ValueError(f"llama.cpp's vision encoder has no weight {name!r}.")
        if named.startswith("v.post_ln.") and config.vision_feature_layer != -1:
            continue
        if named.startswith("v.blk.") and int(named.split(".")[2]) >= used:
            continue
        found[named] = weight
    projector = {
        name.removeprefix(PROJECTOR): value for name, value in model.state_dict().items() if name.startswith(PROJECTOR)
    }
    if projector_type == "gemma3":
        found["mm.soft_emb_norm.weight"] = projector["layers.0.weight"]
        found["mm.input_projection.weight"] = projector["layers.1.weight"].T.contiguous()
    else:
        for index in (0, 2):
            for kind in ("weight", "bias"):
                found[f"mm.{index}.{kind}"] = projector[f"layers.{index}.{kind}"]
    return found
