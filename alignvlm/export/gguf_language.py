"""The language model as llama.cpp reads it: what its GGUF file says, and its weights under llama.cpp's names.

The keys are those of llama.cpp's own converter, written by the `gguf` package.
"""

import math

import torch
from transformers import PreTrainedConfig

from alignvlm.export.gguf_prompt import Prompt
from alignvlm.export.gguf_tokenizer import Vocabulary
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


# Architectures whose rotary embeddings llama.cpp applies to neighbouring values, where transformers pairs the two halves of a head.
PAIRS_NEIGHBOURS = ("llama", "smollm3")
PREFIX = "model.language_model."


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_keys(writer, config: PreTrainedConfig) -> None:
    """Writes the sizes and constants of the language model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def end_ids(model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor) -> list[int]:
    """The tokens that end an answer, the tokenizer's own end token first if it is one of them.

    Raises:
        ValueError: if there are none, or more than llama.cpp has names for.
    """
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    ends.sort(key=lambda token: (token != processor.tokenizer.eos_token_id, token))
    if not 1 <= len(ends) <= 3:
        raise ValueError(f"A GGUF file names one to three tokens that end an answer; this checkpoint has {len(ends)}.")
    return ends


def add_tokenizer(
    writer, vocabulary: Vocabulary, processor: AlignVLMProcessor, ends: list[int], prompt: Prompt
) -> None:
    """Writes the tokenizer, the chat template, and the tokens that end an answer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends):
        add(token)
    tokenizer = processor.tokenizer
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(prompt.adds_bos)
    writer.add_chat_template(prompt.template)


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Sorts the rows of each head of a query or key matrix so that what the rotary embedding turns together stands together."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _frequency_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """By what Llama 3 divides the frequency of each pair of values (`rope_type` llama3); None for plain rotary embeddings."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = (
        rope["original_max_position_embeddings"]
        * rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        / (2 * math.pi)
    )
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def tensors(model: AlignVLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights by llama.cpp's names.

    Raises:
        ValueError: for a weight that llama.cpp has no name for.
    """
    import gguf

    config = model.config.text_config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name, weight in model.state_dict().items():
        if name.startswith(PREFIX):
            name = f"model.{name.removeprefix(PREFIX)}"
        elif name != "lm_head.weight" or model.config.tie_word_embeddings:
            continue
        if config.model_type in PAIRS_NEIGHBOURS:
            if "q_proj" in name:
                weight = _paired(weight, config.num_attention_heads)
            elif "k_proj" in name:
                weight = _paired(weight, config.num_key_value_heads)
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise ValueError(f"llama.cpp's {config.model_type} has no weight {name!r}.")
        found[named] = weight
    if (factors := _frequency_factors(config)) is not None:
        found["rope_freqs.weight"] = factors
    return found
