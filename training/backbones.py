"""Assembles a stage-0 checkpoint from a pretrained vision encoder and a pretrained language model.

    python -m training.backbones --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen2.5-0.5B --output_dir out/stage0

Both are kept as they are; the image token is added to the tokenizer, the embeddings are resized if it does not fit, and the
projector between them is new. That the language model still answers text as before is checked, not assumed.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging
from trl import TrlParser

from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from training.checkpoint import check_model, commit_of, library_versions, save_checkpoint


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
# Both write the parts of a message in order, an image as its placeholder; `generation` marks what the assistant says.
_PARTS = """\
{%- macro parts(message, gap) -%}
{%- if message.content is string -%}{{ gap + message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image>{%- elif part.type == 'text' -%}{{ gap + part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
CHATML_TEMPLATE = (
    _PARTS
    + """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ parts(message, '') + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ parts(message, '') + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)
# For language models without chat tokens: plain words that any tokenizer can write, each text behind a space, so that its
# first word has the same tokens behind an image and behind words.
PLAIN_TEMPLATE = (
    _PARTS
    + """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'Assistant:' }}{%- generation -%}{{ parts(message, ' ') + eos_token }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ message.role | capitalize + ':' + parts(message, ' ') + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
)


@dataclass
class BackboneArguments:
    """What a stage-0 checkpoint is assembled from."""

    vision: str = field(metadata={"help": "Vision encoder: local folder or Hub id."})
    language: str = field(metadata={"help": "Causal language model: local folder or Hub id."})
    output_dir: str = field(metadata={"help": "Where the stage-0 checkpoint is written."})
    vision_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of the vision encoder."}
    )
    language_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of the language model."}
    )
    projector_type: str = field(default="mlp", metadata={"help": "`mlp` or `linear`."})
    pixel_shuffle_factor: int = field(
        default=1, metadata={"help": "Merge squares of so many patches a side into one token."}
    )
    vision_feature_layer: int = field(
        default=-1, metadata={"help": "-1: the encoder's output; else an index of its hidden states."}
    )
    attention_mask_type: str = field(default="image", metadata={"help": "`causal`, `image`, `prefix` or `mutual`."})
    seed: int = field(default=0, metadata={"help": "Seed of the projector's initial weights."})


def load_vision_encoder(name: str, revision: str | None = None) -> PreTrainedModel:
    """A vision encoder in float32; of an image-text model (SigLIP, CLIP) its vision half.

    Raises:
        ValueError: if the model yields feature maps or one vector instead of a sequence of patches.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ValueError(
            f"The vision encoder {name!r} of type {config.model_type!r} does not cut images into patches, and AlignVLM needs "
            "one feature per patch. Use a SigLIP, CLIP, DINOv2 or ViT type encoder."
        )
    encoder_class = type(AutoModel.from_config(config))
    return encoder_class.from_pretrained(name, config=config, revision=revision, dtype=torch.float32)


def assemble(arguments: BackboneArguments) -> tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]:
    """Builds model and processor from pretrained backbones, and writes them to `output_dir`.

    Raises:
        ValueError: if the vision encoder has no patches, the tokenizer already uses the image token for something else, or
            the language model does not answer text as before (a head this package does not rebuild).
    """
    for name, revision in (
        (arguments.vision, arguments.vision_revision),
        (arguments.language, arguments.language_revision),
    ):
        check_model(name, revision)
    vision = load_vision_encoder(arguments.vision, arguments.vision_revision)
    language = AutoModelForCausalLM.from_pretrained(
        arguments.language, revision=arguments.language_revision, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.language, revision=arguments.language_revision)
    image_processor = AutoImageProcessor.from_pretrained(arguments.vision, revision=arguments.vision_revision)

    known_image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    probe = torch.tensor([[token for token in range(17) if token != known_image_token]])
    with torch.no_grad():
        expected = language.eval()(probe).logits
    set_seed(arguments.seed)  # before anything new is drawn
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > language.get_input_embeddings().weight.shape[0]:
        language.resize_token_embeddings(len(tokenizer))

    config = AlignVLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        projector_type=arguments.projector_type,
        pixel_shuffle_factor=arguments.pixel_shuffle_factor,
        vision_feature_layer=arguments.vision_feature_layer,
        attention_mask_type=arguments.attention_mask_type,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = AlignVLMForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.lm_head.load_state_dict({"weight": language.get_output_embeddings().weight})
    missing = model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"The vision encoder {arguments.vision!r} lacks the weights {missing}.")
    with torch.no_grad():
        actual = model.eval()(probe).logits[..., : expected.shape[-1]]
    if not torch.allclose(actual, expected, atol=1e-4, rtol=1e-4):
        raise ValueError(
            f"Inside AlignVLM the language model {arguments.language!r} ({language.config.model_type}) gives other logits than "
            f"alone (largest difference {(actual - expected).abs().max():.2e}): its head does more than a matrix product."
        )

    chatml = "<|im_end|>" in tokenizer.get_vocab()
    processor = AlignVLMProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        image_token=IMAGE_TOKEN,
        chat_template=CHATML_TEMPLATE if chatml else PLAIN_TEMPLATE,
    )
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")} if chatml else set()
    model.generation_config.eos_token_id = sorted(ends | {tokenizer.eos_token_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    record = {
        "backbones": {
            "vision": _recorded_name(arguments.vision),
            "vision_revision": commit_of(arguments.vision, arguments.vision_revision),
            "language": _recorded_name(arguments.language),
            "language_revision": commit_of(arguments.language, arguments.language_revision),
        },
        "versions": library_versions(),
        "stages": [],
    }
    save_checkpoint(model, processor, arguments.output_dir, record)
    return model, processor


def _recorded_name(name: str) -> str:
    """A Hub id, or the name of a local folder, which must not look like one."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def main(argv: list[str] | None = None) -> None:
    (arguments,) = TrlParser(BackboneArguments).parse_args_and_config(argv)
    model, _ = assemble(arguments)
    print(f"{Path(arguments.output_dir)}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main(sys.argv[1:])
