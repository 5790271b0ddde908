"""Writes a checkpoint as ONNX graphs, which onnxruntime runs without torch and transformers.js in a browser.

Three graphs under `onnx/`, with the names that transformers.js gives them: `vision_encoder` (pixel values to image features, projector
included), `embed_tokens` (token ids to embeddings) and `decoder_model_merged` (embeddings and a cache, which may be empty, to logits and
the longer cache). Who may attend to whom is decided in the decoder, by the rule of training. It knows the image tokens by a mark:
encoder and embeddings give one value more per token than the language model is wide, 1 for an image and 0 for a text. A program that puts
features in the place of embeddings carries the mark along without knowing of it; `config.json` names LLaVA, whose steps these are.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, LlavaProcessor
from transformers.modeling_outputs import CausalLMOutput

from alignvlm.export.homes import Home
from alignvlm.export.onnx_model import OnnxModel
from alignvlm.export.stock import compare, plain_parts
from modeling_alignvlm import (
    CACHE_NAME,
    AlignVLMConfig,
    AlignVLMForConditionalGeneration,
    AlignVLMProcessor,
    TokenLayout,
    attention_rule,
    get_mask_type,
)


CARD = """\
# {title}

The checkpoint `{checkpoint}`, trained with AlignVLM (a recipe after [arXiv 2503.19508](https://arxiv.org/abs/2503.19508)), as ONNX: three
graphs for transformers.js and onnxruntime.

```js
import {{ AutoProcessor, AutoModelForImageTextToText, env, load_image }} from "@huggingface/transformers";

env.localModelPath = "./"; // where the folder lies
const name = "{title}"; // the folder; of the Hub the repository, "user/{title}"
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, {{ dtype: "fp32" }});
const prompt = processor.apply_chat_template(
    [{{ role: "user", content: [{{ type: "image" }}, {{ type: "text", text: "{question}" }}] }}],
    {{ add_generation_prompt: true }},
);
const add_special_tokens = !prompt.startsWith(processor.tokenizer.bos_token);
const inputs = await processor(await load_image("photo.jpg"), prompt, {{ add_special_tokens }});
const tokens = await model.generate({{ ...inputs, max_new_tokens: 40 }});
console.log(processor.batch_decode(tokens.slice(null, [inputs.input_ids.dims.at(-1), null]), {{ skip_special_tokens: true }})[0]);
```

Give RGB images, upright and without transparency. Logits in float32 equal those of the checkpoint (`alignvlm export` compared them, and a greedy text).
"""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of logits, relative to the largest: onnxruntime adds in another order
TOLERANCE_INT8 = 0.5  # of logits, relative to the largest: a rounded graph still computes the same thing
# What our extension of a language model's template (`stages/chat_templates.py`) says with `dict`, which the Jinja of JavaScript has not.
PLAIN_MESSAGE = "{'role': message.role, 'content': joined.text}"
OTHER_CACHE = "The language model {!r} keeps another cache than keys and values, which the export does not write."
INLINE_BYTES = 1 << 30  # a file of protocol buffers holds 2 GiB at most: larger weights lie in a file of their own


class Encoder(nn.Module):
    """`pixel_values` `(images, channels, height, width)` to `image_features` `(images, image_seq_length, hidden + 1)`: the last is 1."""

    def __init__(self, model: AlignVLMForConditionalGeneration):
        super().__init__()
        self.model = model.model
        self.marks = marks_images(model.config)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.model.get_image_features(pixel_values).pooler_output
        return {"image_features": nn.functional.pad(features, (0, 1), value=1.0) if self.marks else features}


class Embeddings(nn.Module):
    """`input_ids` `(batch, length)` to `inputs_embeds` `(batch, length, hidden + 1)`: the last is 0."""

    def __init__(self, model: AlignVLMForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.marks = marks_images(model.config)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        embeddings = self.embed_tokens(input_ids)
        return {"inputs_embeds": nn.functional.pad(embeddings, (0, 1)) if self.marks else embeddings}


class Decoder(nn.Module):
    """Embeddings behind a cache of any length, zero included, to logits and the longer cache."""

    def __init__(self, model: AlignVLMForConditionalGeneration):
        super().__init__()
        self.config = model.config
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        past_key_values: list[dict[str, Tensor]],
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """
        Args:
            inputs_embeds: `(batch, length, hidden + 1)`, marked; without the mark where no token looks ahead.
            attention_mask: `(batch, cached + length)`, 0 at padding.
            position_ids: `(batch, length)`.
            num_logits_to_keep: a scalar; logits for that many last positions, 0 for all.
            past_key_values: per layer `key` and `value`, `(batch, heads, cached, head_dim)`.

        Returns:
            `logits` `(batch, kept, vocabulary)` and `present`, per layer `key` and `value`, `(batch, heads, cached + length, head_dim)`.
        """
        is_image = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool)
        if marks_images(self.config):
            is_image, inputs_embeds = inputs_embeds[..., -1] > 0.5, inputs_embeds[..., :-1]
        cache = DynamicCache()
        for index, layer in enumerate(past_key_values):
            cache.update(layer["key"], layer["value"], index)
        hidden_states = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self.masks(is_image, attention_mask, position_ids, past_key_values[0]["key"].shape[2]),
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE_NAME: cache},
        ).last_hidden_state
        kept = torch.arange(inputs_embeds.shape[1]) >= inputs_embeds.shape[1] - num_logits_to_keep
        kept = (kept | (num_logits_to_keep == 0)).nonzero().squeeze(1)
        logits = self.lm_head(hidden_states.index_select(1, kept))
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return {"logits": logits, "present": [{"key": layer.keys, "value": layer.values} for layer in cache.layers]}

    def masks(
        self, is_image: Tensor, attention_mask: Tensor, position_ids: Tensor, past_length: int
    ) -> Tensor | dict[str, Tensor]:
        """The masks that `AlignVLMModel` makes of the same tokens, bool `(batch, 1, length, cached + length)`: all tokens are prompt if
        nothing is cached, as in `generate`."""
        batch, length = is_image.shape
        queries = past_length + torch.arange(length)
        positions = torch.arange(past_length + length)
        layout = TokenLayout.from_image_mask(
            is_image,
            self.config.image_seq_length,
            attention_mask[:, past_length:],
            prompt_mask=(queries[:1] == 0).expand(batch, length),
        ).placed_in_cache(past_length, past_length + length, attention_mask)
        rows, q, k = torch.arange(batch)[:, None, None, None], queries[:, None], positions[None]
        full = attention_rule(layout, self.config.attention_mask_type)(rows, 0, q, k)
        masks = {"full_attention": full}
        kinds = layer_types(self.config)
        if "sliding_attention" in kinds:  # the window is counted in positions, and padding has none
            counted = (layout.record_ids >= 0).long().cumsum(-1) - 1
            distance = position_ids[:, :, None] - counted[:, None]
            masks["sliding_attention"] = full & (distance < self.config.text_config.sliding_window)[:, None]
        if self.language_model.config._attn_implementation == "eager":  # it adds its mask
            lowest = torch.finfo(torch.float32).min
            masks = {kind: torch.zeros(()).masked_fill(~mask, lowest) for kind, mask in masks.items()}
        return {kind: masks[kind] for kind in kinds} if len(kinds) > 1 else masks[kinds[0]]


def marks_images(config: AlignVLMConfig) -> bool:
    """Whether the decoder must know the image tokens: not where no token looks ahead."""
    return get_mask_type(config.attention_mask_type).looks_ahead is not None


def layer_types(config: AlignVLMConfig) -> list[str]:
    """The kinds of attention among the language model's layers, each once."""
    text = config.text_config
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    return kinds or ["full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"]


@dataclass(frozen=True)
class Graph:
    """A module, inputs to trace it with, and the axes that vary: `{input: {axis: name}}`; an output's name: those of its axes."""

    module: nn.Module
    inputs: dict[str, Any]
    axes: dict[str, dict[int, str]]
    output_axes: dict[str, dict[int, str]]


def graphs(model: AlignVLMForConditionalGeneration) -> dict[str, Graph]:
    """The three graphs, by the names of their files.

    Raises:
        ValueError: if the language model keeps another cache than keys and values.
    """
    config = model.config
    channels, width = getattr(config.vision_config, "num_channels", 3), config.text_config.hidden_size
    batch, past, length = 2, 3, 5
    language_model, cache = model.model.language_model, DynamicCache()
    try:
        with torch.no_grad():
            language_model(inputs_embeds=torch.zeros(batch, past, width), use_cache=True, **{CACHE_NAME: cache})
    except (AttributeError, IndexError, TypeError) as error:  # it asks the cache for something else
        raise ValueError(OTHER_CACHE.format(config.text_config.model_type)) from error
    if not cache.layers or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers):
        raise ValueError(OTHER_CACHE.format(config.text_config.model_type))
    rows, total = {0: "batch_size"}, "total_sequence_length"
    tokens, cached = rows | {1: "sequence_length"}, rows | {2: "past_sequence_length"}
    names = [f"{index}.{kind}" for index in range(len(cache.layers)) for kind in ("key", "value")]
    return {
        "vision_encoder": Graph(
            Encoder(model),
            {"pixel_values": torch.zeros(2, channels, *config.input_size)},
            {"pixel_values": {0: "num_images"}},
            {"image_features": {0: "num_images"}},
        ),
        "embed_tokens": Graph(
            Embeddings(model),
            {"input_ids": torch.zeros(batch, length, dtype=torch.long)},
            {"input_ids": tokens},
            {"inputs_embeds": tokens},
        ),
        "decoder_model_merged": Graph(
            Decoder(model),
            {
                "inputs_embeds": torch.zeros(batch, length, width + marks_images(config)),
                "attention_mask": torch.ones(batch, past + length, dtype=torch.long),
                "position_ids": torch.arange(past, past + length).expand(batch, length).contiguous(),
                "num_logits_to_keep": torch.tensor(0),
                "past_key_values": [{"key": layer.keys, "value": layer.values} for layer in cache.layers],
            },
            {"inputs_embeds": tokens, "attention_mask": rows | {1: total}, "position_ids": tokens}
            | {f"past_key_values.{name}": cached for name in names},
            {"logits": rows | {1: "num_logits"}} | {f"present.{name}": rows | {2: total} for name in names},
        ),
    }


def trace(graph: Graph):
    """The `onnx_ir.Model` of a graph, in float32, its axes named."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    def shapes(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {name: shapes(part, f"{path}{name}.") for name, part in value.items()}
        if isinstance(value, list):
            return [shapes(part, f"{path}{index}.") for index, part in enumerate(value)]
        return dict.fromkeys(graph.axes.get(path[:-1], {}), Dim.DYNAMIC) or None

    options = OnnxConfig(dynamic_shapes=shapes(graph.inputs, ""), prefer_deferred_runtime_asserts_over_guards=True)
    with _quiet():
        program, _ = OnnxExporter().export_program(graph.module.eval(), dict(graph.inputs), options)
    import onnx_ir

    for values, axes in ((program.graph.inputs, graph.axes), (program.graph.outputs, graph.output_axes)):
        for value in values:
            named = axes.get(value.name, {})
            value.shape = onnx_ir.Shape([named.get(axis, size) for axis, size in enumerate(value.shape)])
    return program


@contextlib.contextmanager
def _quiet():
    """Keeps the exporter's progress and its remarks on versions and functions that we do not use from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def save(program, path: Path) -> bool:
    """Writes a graph; the weights of a large one lie beside it, as transformers.js looks for them. Returns whether they do."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    apart = weights > INLINE_BYTES
    onnx_ir.save(program, path, external_data=f"{path.name}_data" if apart else None)
    return apart


def quantize(program):
    """A copy of a graph with 8-bit weights of its matrices and embeddings; activations are rounded while it runs.

    Weights are unsigned: with signed ones, sums of two products overflow on processors without VNNI instructions
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "U8S8").
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters import ExportFormat, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    options = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, weight_type=QuantType.QUInt8
    )
    with _quiet():
        return OnnxRuntimeQuantizer(options).quantize(program, {}, ExportFormat.ONNX)


def llava_processor(processor: AlignVLMProcessor, config: AlignVLMConfig) -> LlavaProcessor:
    """LLaVA's processor, which counts an image's tokens by the size of a patch: here that of what one token stands for."""
    image_processor, tokenizer = plain_parts(processor)
    height, width = config.input_size
    patch, more = height * config.pixel_shuffle_factor // config.feature_grid[0], 0
    if (height // patch) * (width // patch) != config.image_seq_length:  # no patch is as large as this one
        patch, more = max(height, width) + 1, config.image_seq_length
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        num_additional_image_tokens=more,
        vision_feature_select_strategy="full",
        chat_template=processor.chat_template,
        image_token=processor.image_token,
    )


def write_javascript_files(
    processor: LlavaProcessor, config: AlignVLMConfig, folder: Path, apart: dict[str, int]
) -> None:
    """What transformers.js reads and `save_pretrained` does not write: `config.json`, `preprocessor_config.json` and the chat template
    among the tokenizer's settings."""

    def dump(name: str, values: dict) -> None:
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    dump(
        "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_id": config.image_token_id,
            "image_token_index": config.image_token_id,
            "image_seq_length": config.image_seq_length,
            "text_config": config.text_config.to_dict(),
            "vision_config": config.vision_config.to_dict(),
            "transformers.js_config": {"use_external_data_format": apart},
        },
    )
    kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    values = processor.image_processor.to_dict() | {"image_processor_type": kind, "processor_class": "LlavaProcessor"}
    dump("preprocessor_config.json", values)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = processor.chat_template.replace("dict(message, content=joined.text)", PLAIN_MESSAGE)
    dump("tokenizer_config.json", settings | {"chat_template": template})


class OnnxGraphs:
    """An exported folder that takes and gives torch's tensors, as a model of transformers does."""

    def __init__(self, model: OnnxModel):
        self.model = model

    def __call__(self, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.from_numpy(self.model.logits(**_arrays(inputs))))

    def generate(self, max_new_tokens: int, do_sample: bool = False, **inputs: Tensor) -> Tensor:
        tokens = self.model.generate(**_arrays(inputs), max_new_tokens=max_new_tokens)
        return torch.cat([inputs["input_ids"], torch.from_numpy(tokens)], dim=1)


def _arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


def compare_int8(exact: OnnxModel, rounded: OnnxModel, processor: LlavaProcessor) -> None:
    """Compares the graphs with 8-bit weights with the others, on a question about an image of noise.

    Raises:
        ValueError: if their logits differ by more than rounding explains.
    """
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    inputs = dict(processor(images=image, text=f"{processor.image_token} What is it?", return_tensors="np"))
    expected, actual = (model.logits(**inputs) for model in (exact, rounded))
    difference = float(np.abs(actual - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE_INT8:
        raise ValueError(
            f"With 8-bit weights the logits differ by {difference:.0%} of the largest, more than rounding explains. Leave out --int8."
        )


def check_packages() -> None:
    """Raises a ValueError that says what to install if a package is missing that the export needs."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'alignvlm[export]'")


def write_graphs(model: AlignVLMForConditionalGeneration, folder: Path, int8: bool) -> dict[str, int]:
    """Writes the graphs of a model in float32. Returns the names of those whose weights lie beside them, for transformers.js.

    Raises:
        ValueError: if the exporter does not take one of them.
    """
    apart = {}
    for name, graph in graphs(model).items():
        try:
            program = trace(graph)
        except Exception as error:  # the exporter raises what it likes for what it does not know
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"The exporter to ONNX does not take the {name} of this checkpoint: {reason}") from error
        for suffix in ("", "_quantized") if int8 else ("",):
            program = quantize(program) if suffix else program
            if save(program, folder / f"{name}{suffix}.onnx"):
                apart[f"{name}{suffix}.onnx"] = 1
    return apart


def write(
    model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor, home: Home, folder: Path, int8: bool = False
) -> None:
    """Writes the new folder, runs it with onnxruntime and compares it with `model`, which is in float32.

    Args:
        int8: write files with 8-bit weights too, `*_quantized.onnx`.

    Raises:
        ValueError: if a package is missing, a part cannot be exported, or what was written is not what was given.
    """
    check_packages()
    (folder / "onnx").mkdir(parents=True)
    apart = write_graphs(model, folder / "onnx", int8)
    theirs = llava_processor(processor, model.config)
    theirs.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_javascript_files(theirs, model.config, folder, apart)
    exact = OnnxModel(folder)
    compare(model, processor, OnnxGraphs(exact), LlavaProcessor.from_pretrained(folder), tolerance=TOLERANCE)
    if int8:
        compare_int8(exact, OnnxModel(folder, "_quantized"), theirs)
