"""Writes docs/models.md: which language models and vision encoders of transformers AlignVLM can be assembled from.

    python docs/write_models_page.py

A tiny model with random weights is made of every registered type and goes through what assembly does: language models are
tried (`alignvlm.stages.language_trial`), encoders measured (`alignvlm.stages.encoder_measure`). `tests/stages/test_models_page.py` repeats it for a
selection of types.
"""

import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig, set_seed
from transformers.models.auto import modeling_auto
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm.stages.backbones import join
from alignvlm.stages.encoder_measure import EncoderMeasure, has_native_shapes, measure_encoder
from alignvlm.stages.language_trial import try_language_model
from modeling_alignvlm.masking_alignvlm import MASK_TYPES


PAGE = Path(__file__).parent / "models.md"
MOST_PARAMETERS = 70e6
SECONDS = 30  # for one type
IMAGE_SIZE = 64
VOCABULARY = 99

# Names that configs use for the same few things, and tiny values.
TINY = {
    **dict.fromkeys("hidden_size d_model n_embd embed_dim dim word_embed_proj_dim embedding_size".split(), 32),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads linear_num_value_heads mamba_n_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads linear_num_key_heads attn_layer_period".split(), 2),
    **dict.fromkeys(
        "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff".split(), 64
    ),
    **dict.fromkeys(
        "moe_intermediate_size expert_dim shared_expert_intermediate_size moe_ffn_hidden_size".split(), 32
    ),
    **dict.fromkeys("head_dim qk_nope_head_dim v_head_dim d_kv linear_key_head_dim linear_value_head_dim".split(), 8),
    **dict.fromkeys("global_head_dim kv_channels".split(), 8),
    **dict.fromkeys("qk_rope_head_dim rotary_dim index_head_dim".split(), 4),
    **dict.fromkeys("kv_lora_rank q_lora_rank".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts n_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token".split(), 2),
    **dict.fromkeys("first_k_dense_replace attn_layer_offset moe_layer_start_index".split(), 1),
    **dict.fromkeys("n_group topk_group n_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCABULARY),
    **dict.fromkeys("sliding_window_pattern full_attention_interval global_attn_every_n_layers".split(), 2),
    **dict.fromkeys("max_position_embeddings max_seq_len n_positions".split(), 256),
    **dict.fromkeys("sliding_window attention_window_size window_size index_topk".split(), 64),
    **dict.fromkeys("bos_token_id decoder_start_token_id".split(), 1),
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mamba_d_state": 4,
    "mamba_d_head": 16,
    "state_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "is_decoder": True,
}
TINY_VISION = {
    **{name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": IMAGE_SIZE,
}
# Tried one after the other until a model can be made and runs: changes of the sizes above, None for the type's own value.
VARIANTS = (
    {},
    {"num_hidden_layers": 4, "num_layers": 4},
    {"head_dim": None},
    {"head_dim": None, "num_hidden_layers": 4},
    {"num_key_value_heads": 4},
    {"head_dim": None, "v_head_dim": None, "max_position_embeddings": None, "num_key_value_heads": 4},
)
# What a type needs besides, or instead.
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "donut-swin": {"window_size": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "swin": {"window_size": 2},
}
VISION_VARIANTS = (
    {},
    {"num_attention_heads": None, "num_hidden_layers": None},
    dict.fromkeys(("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size")),
    dict.fromkeys(TINY_VISION),
)


@dataclass
class Finding:
    """What was seen of one model type: for a language model the mask types it keeps, for an encoder what it makes of an image."""

    model_type: str
    kept: list[str] = field(default_factory=list)
    packing: bool = False
    features: str = ""
    tried: bool = True
    reason: str = ""


class NoTinyModel(Exception):
    """A type of which the generic sizes make no model."""


class CompositeModel(Exception):
    """A type whose parts are models of their own, with types of their own."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TimeoutError(f"takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny_config(model_type: str, sizes: dict) -> PreTrainedConfig:
    """The type's configuration with those of `sizes` that it knows.

    Raises:
        NoTinyModel, CompositeModel: if there is none, or it holds whole models.
    """
    config_class = CONFIG_MAPPING[model_type]
    try:
        if parts := [name for name in ("text_config", "vision_config") if hasattr(config_class(), name)]:
            raise CompositeModel(f"holds whole models: {' and '.join(parts)}")
        return config_class(**{name: value for name, value in sizes.items() if hasattr(config_class(), name)})
    except CompositeModel:
        raise
    except Exception as error:  # whatever a config of others raises
        raise NoTinyModel(f"no tiny configuration: {_first_line(error)}") from error


def tiny_model(make: Callable, config: PreTrainedConfig):
    """A model with random weights, biases and scales too, that are large enough for wrong masks and left out parts to show."""
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make(config).parameters())
    except Exception as error:  # some compute at construction
        raise NoTinyModel(f"cannot be made: {_first_line(error)}") from error
    if count > MOST_PARAMETERS:
        raise NoTinyModel(f"no tiny configuration: {count / 1e6:.0f}M parameters")
    set_seed(0)
    model = make(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def first_that_can_be_made(attempt: Callable, model_type: str, sizes: dict, variants: tuple[dict, ...]):
    """`attempt(sizes)` with the first variant of the sizes of which a tiny model can be made; else the first one's error."""
    first_error = None
    for variant in variants:
        changed = {**sizes, **variant, **SPECIAL.get(model_type, {})}
        try:
            return attempt({name: value for name, value in changed.items() if value is not None})
        except NoTinyModel as error:
            first_error = first_error or error
    raise first_error


def language_finding(model_type: str) -> Finding:
    """What a language model of this type keeps."""
    finding = Finding(model_type)

    def attempt(sizes: dict):
        language = tiny_model(AutoModelForCausalLM.from_config, tiny_config(model_type, sizes))
        try:
            with torch.no_grad():
                language(torch.arange(3, 20)[None])
        except Exception as error:
            raise NoTinyModel(f"does not run by itself: {_first_line(error)}") from error
        return join(tiny_encoder(), language, VOCABULARY - 1, EncoderMeasure((16, 16), (2, 2), 32))

    try:
        with time_limit(SECONDS):
            model = first_that_can_be_made(attempt, model_type, TINY, VARIANTS)
            trial = try_language_model(model)
    except Exception as error:
        finding.tried = not isinstance(error, (NoTinyModel, CompositeModel, TimeoutError))
        finding.reason = _without_subject(_first_line(error))
        return finding
    finding.kept, finding.packing = trial.mask_types, trial.packing
    whats: dict[str, list[str]] = {}
    for what, reason in trial.reasons.items():
        reason = _without_subject(reason.replace(f"'{what}'", "it"))
        whats.setdefault(reason.split(", which no attention mask")[0], []).append(what)
    finding.reason = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in whats.items())
    return finding


def tiny_encoder():
    """An encoder that any language model can be joined with."""
    sizes = {**TINY_VISION, "image_size": 16, "patch_size": 8}
    return AutoModel.from_config(CONFIG_MAPPING["siglip_vision_model"](**sizes))


def encoder_finding(model_type: str) -> Finding:
    """What an encoder of this type makes of an image."""
    finding = Finding(model_type)
    squares = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})

    def attempt(sizes: dict):
        encoder = tiny_model(AutoModel.from_config, tiny_config(model_type, sizes))
        try:
            native = has_native_shapes(encoder)
            patches = Siglip2ImageProcessorPil(patch_size=encoder.config.patch_size) if native else None
            return measure_encoder(model_type, encoder, patches or squares)
        except ValueError as error:
            refusals.append(error)
            raise NoTinyModel(str(error)) from error

    refusals: list[ValueError] = []
    try:
        with time_limit(SECONDS):
            measure = first_that_can_be_made(attempt, model_type, TINY_VISION, VISION_VARIANTS)
    except Exception as error:
        finding.tried = bool(refusals)
        finding.reason = _without_subject(_first_line(refusals[0] if refusals else error))
        return finding
    native = measure.max_num_patches
    finding.features = "{} x {}".format(*measure.grid) if native is None else f"at most {native}, in native shape"
    return finding


def language_types() -> list[str]:
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def encoder_types() -> list[str]:
    """Types that transformers lists as models of images and that AutoModel can make."""
    listed = {
        *modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
        *(name for name in modeling_auto.MODEL_MAPPING_NAMES if name.endswith(("vision_model", "vision", "vit"))),
    }
    return sorted(name for name in listed if name in CONFIG_MAPPING and CONFIG_MAPPING[name] in MODEL_MAPPING)


def _without_subject(reason: str) -> str:
    """A sentence about the model that the row is about."""
    return re.sub(r"[Tt]he (language model|vision encoder) '[^']*'( \([^)]*\))? ", "it ", reason)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or "nothing more is known"
    name = "" if isinstance(error, (NoTinyModel, CompositeModel, ValueError)) else f"{type(error).__name__}: "
    return f"{name}{text.splitlines()[0][:200].rstrip(':')}"


LANGUAGE_HEADER = f"| type | {' | '.join(f'`{name}`' for name in MASK_TYPES)} | packing | why not |\n|{'---|' * (len(MASK_TYPES) + 3)}"
ENCODER_HEADER = f"| type | image tokens of {IMAGE_SIZE} x {IMAGE_SIZE} pixels | why not |\n|---|---|---|"


def language_row(finding: Finding) -> str:
    """A line of the table of language models."""
    marks = ["yes" if mask_type in finding.kept else "-" for mask_type in MASK_TYPES]
    marks.append("yes" if finding.packing else "-")
    return f"| {finding.model_type} | {' | '.join(marks)} | {_cell(finding.reason)} |"


def encoder_row(finding: Finding) -> str:
    """A line of the table of encoders."""
    return f"| {finding.model_type} | {finding.features or '-'} | {_cell(finding.reason)} |"


def _cell(text: str) -> str:
    """Without the sizes of differences, which depend on the machine."""
    return re.sub(r" \((largest difference|by) [^)]*\)", "", text).replace("|", "\\|")


def page(languages: list[Finding], encoders: list[Finding]) -> str:
    """The text of docs/models.md."""
    lines = [INTRODUCTION.format(transformers=transformers.__version__)]
    for title, findings, header, row in (
        ("Language models", languages, LANGUAGE_HEADER, language_row),
        ("Vision encoders", encoders, ENCODER_HEADER, encoder_row),
    ):
        tried = [finding for finding in findings if finding.tried]
        good = [finding for finding in tried if finding.features or len(finding.kept) == len(MASK_TYPES)]
        lines += [
            f"## {title}",
            "",
            f"{len(good)} of {len(tried)} types that were tried can be used"
            + (" with every mask type." if row is language_row else "."),
            "",
            header,
            *map(
                row, sorted(tried, key=lambda finding: (not finding.features and not finding.kept, finding.model_type))
            ),
            "",
            "Not tried, because no tiny model of the type could be made here; assembly tries the real one:",
            "",
            *(f"- {finding.model_type}: {finding.reason}" for finding in findings if not finding.tried),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """\
# Which language models and vision encoders can be used

`alignvlm assemble` sends pictures through the image processor and the encoder to measure how many tokens an image takes,
and tries the language model inside AlignVLM: text as before, who sees whom under each mask type, generation with a cache from
padded rows against rows alone without, packed rows against separate ones, questions behind a prefilled image. What does not hold is
refused, with a sentence that names it and what works instead; a language model that holds all but packing is used without it (one
annotation per row, one whole prompt per question), and `config.json` says `"packing": false`.

The tables come from tiny models with random weights of each type registered in transformers {transformers}, made and tried by
[`write_models_page.py`](write_models_page.py); [`tests/stages/test_models_page.py`](../tests/stages/test_models_page.py) repeats a selection. A real
checkpoint may differ from its type's tiny model (Falcon with ALiBi, for instance, keeps only `causal`, without packing): assembly tries
the checkpoint itself.

Of an image-text model (CLIP, SigLIP and so on) the vision half is taken. Encoders that make a map of features (ResNet, ConvNeXt) are
flattened, one token per place. Every picture must take equally many tokens: where an image processor keeps the form of pictures, or makes
another size than the encoder takes, give `--image_size`. SigLIP 2 NaFlex alone takes images [in their native shape](native_shapes.md). A language model that looks its positions up in a table (GPT-2, OPT) needs
enough of them for an image and some text, and a stage of it needs a `max_length` that is no larger.

timm's encoders go through transformers' wrapper (`timm_wrapper`), which needs timm and torchvision; resnet18, vit_tiny_patch16_224,
mobilenetv3_small_100 and convnext_atto of timm 1.0.31 were assembled and answered. Their images are then prepared by an image processor of transformers
that is saved with the checkpoint, since the wrapper's is not: equal to timm's, but for one pixel where a crop leaves an odd rest.
"""


def main() -> None:
    """Writes the page; a line per type on the way."""
    found = []
    for make, names in ((language_finding, language_types()), (encoder_finding, encoder_types())):
        found.append([])
        for name in names:
            found[-1].append(make(name))
            print(asdict(found[-1][-1]), flush=True)
    PAGE.write_text(page(*found))


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    main()
