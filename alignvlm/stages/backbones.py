"""Assembles a stage-0 checkpoint from a pretrained vision encoder and a pretrained language model.

    alignvlm assemble --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen2.5-0.5B --output_dir out/stage0

Both are kept as they are; the image token is added to the tokenizer, the embeddings are resized if it does not fit, the language
model's chat template is extended by image parts (`alignvlm.stages.chat_templates`), and the projector between them is new. What the encoder makes of an image is measured (`alignvlm.stages.encoder_measure`), and what the language model
keeps inside AlignVLM is tried (`alignvlm.stages.language_trial`), not assumed; docs/models.md lists what was seen of which model.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
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

from alignvlm.evaluation.answer import stated_positions
from alignvlm.rows.encode import Encoder
from alignvlm.stages.chat_templates import (
    IMAGE_BEGIN,
    IMAGE_END,
    IMAGE_TOKEN,
    chat_template,
    end_of_turn_ids,
)
from alignvlm.stages.checkpoint import check_no_other_model, check_writable, save_checkpoint
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.encoder_measure import (
    EncoderMeasure,
    has_native_shapes,
    measure_encoder,
    set_image_size,
    set_max_num_patches,
    without_timm,
)
from alignvlm.stages.language_trial import TRIAL_LENGTH, try_language_model
from alignvlm.stages.projector_checkpoint import SavedProjector, start_projector
from alignvlm.stages.tiles import TileArguments, cut_images
from hub_upload.command_line import run
from hub_upload.licences import read_licence
from hub_upload.repository import check_model, commit_of
from hub_upload.run_record import library_versions, read_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import describe_mask_types


RESAMPLES = ("bilinear", "bicubic", "lanczos")  # names of `PIL.Image.Resampling`, in lower case
# Fields of `AlignVLMConfig` that can be refused by themselves, and those that depend on the features of the encoder.
WORDS = ("projector_type", "vision_feature_layer", "vision_layer_fusion", "attention_mask_type")
COUNTS = ("pixel_shuffle_factor", "merge_image_tokens")
logger = logging.get_logger(__name__)


@dataclass
class BackboneArguments(TileArguments):
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
    projector_type: str = field(
        default="mlp", metadata={"help": "`mlp`, `linear` or `pool` (averages of patches, as in Gemma 3)."}
    )
    pixel_shuffle_factor: int = field(
        default=1,
        metadata={
            "help": "Merge squares with this number of patches a side into one token: `pool` averages them, the others stack them."
        },
    )
    vision_feature_layer: list[int] = field(
        default_factory=lambda: [-1],
        metadata={
            "help": "-1: the encoder's output; else an index of its hidden states. Several: all of these, from one pass."
        },
    )
    vision_layer_fusion: str = field(
        default="concatenate",
        metadata={
            "help": "Several layers: `concatenate` their channels (as LLaVA), or `weighted_sum` with learned weights."
        },
    )
    merge_image_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Merge similar tokens of an image until this number is left (ToMe, arXiv 2210.09461). 0, or left out: none."
        },
    )
    modality_calibration: bool = field(
        default=False,
        metadata={
            "help": "Scale and shift image tokens behind each layer of the language model (MoCa, arXiv 2410.07167)."
        },
    )
    attention_mask_type: str = field(
        default="image", metadata={"help": f"Which later tokens a token sees. {describe_mask_types()}."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the square that images become. Left out: as the encoder's image processor says."
        },
    )
    max_num_patches: int | None = field(
        default=None,
        metadata={
            "help": "The most patches of an image, for an encoder that takes images in their native shape (SigLIP 2 NaFlex). Left out: as its "
            "image processor says."
        },
    )
    image_resample: str | None = field(
        default=None,
        metadata={
            "help": f"How images are resized: {', '.join(RESAMPLES)}. Left out: as the encoder's image processor says. llama.cpp has "
            "bilinear with the projector `pool`, bicubic with `mlp`."
        },
    )
    image_begin: str | None = field(
        default=None,
        metadata={
            "help": f"Special token that the chat template writes before an image, '' for none. Left out: {IMAGE_BEGIN} with the "
            "projector `pool`, as Gemma 3 and llama.cpp have it, else none."
        },
    )
    image_end: str | None = field(
        default=None, metadata={"help": f"The same behind an image; {IMAGE_END} with the projector `pool`."}
    )
    projector: str | None = field(
        default=None,
        metadata={
            "help": "Begin with this projector: a checkpoint, or what `alignvlm projector` wrote, as folder or Hub id. Left out: a new one."
        },
    )
    projector_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a projector on the Hub."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the projector's initial weights."})

    def __post_init__(self):
        self.check_tiles()
        self.merge_image_tokens = self.merge_image_tokens or None
        if isinstance(self.vision_feature_layer, int):
            self.vision_feature_layer = [self.vision_feature_layer]
        if self.image_resample not in (None, *RESAMPLES):
            raise ValueError(f"image_resample={self.image_resample!r} is unknown. Known: {', '.join(RESAMPLES)}.")
        pools = self.projector_type == "pool"
        for name, usual in (("image_begin", IMAGE_BEGIN), ("image_end", IMAGE_END)):
            token = getattr(self, name)
            if token is None:
                setattr(self, name, usual if pools else "")
            elif IMAGE_TOKEN in token or len(token.split()) > 1 or token != token.strip():
                raise ValueError(
                    f"{name}={token!r} cannot be the token around an image: give one word other than {IMAGE_TOKEN}."
                )


def load_vision_encoder(name: str, revision: str | None = None) -> PreTrainedModel:
    """A vision encoder in float32; of an image-text model (SigLIP, CLIP) its vision half."""
    config = AutoConfig.from_pretrained(name, revision=revision)
    config = getattr(config, "vision_config", config)
    encoder_class = type(AutoModel.from_config(config))
    return encoder_class.from_pretrained(name, config=config, revision=revision, dtype=torch.float32)


@torch.no_grad()
def join(
    vision: PreTrainedModel, language: PreTrainedModel, image_token_id: int, measure: EncoderMeasure, **fields
) -> AlignVLMForConditionalGeneration:
    """An AlignVLM model with the weights of a vision encoder and a causal language model, and a new projector.

    Args:
        measure: of the vision encoder.
        **fields: further fields of `AlignVLMConfig`.

    Raises:
        ValueError: if either has weights that do not fit, if images and some text need more positions than the language model has,
            or if it answers text otherwise than alone (a head this package does not rebuild).
    """
    kind = f"The language model {language.name_or_path!r} ({language.config.model_type})"
    config = AlignVLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_id=image_token_id,
        **measure.fields(),
        **fields,
    )
    if language.config.is_encoder_decoder:
        raise ValueError(f"{kind} has an encoder of its own. Use a decoder alone.")
    model = AlignVLMForConditionalGeneration(config).eval()
    model.generation_config.use_cache = True  # MPT's config says no
    base = language.base_model if language.base_model is not language else language.get_decoder()
    try:
        model.model.language_model.load_state_dict(base.state_dict())
        model.lm_head.load_state_dict({"weight": language.get_output_embeddings().weight})
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{kind} cannot be rebuilt inside AlignVLM, as what AutoModel makes of its config ({type(model.model.language_model).__name__}) "
            f"and a matrix: {type(base).__name__} and {type(language.get_output_embeddings()).__name__} have other weights."
        ) from error
    missing = model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"The vision encoder {vision.name_or_path!r} lacks the weights {missing}.")

    needed = config.image_seq_length + TRIAL_LENGTH
    check_positions(model, needed, f"an image of {config.image_seq_length} tokens and some text need")
    words = [token for token in range(17) if token != image_token_id]
    probe = torch.tensor([words[: stated_positions(language.config)]])
    expected = language.eval()(probe).logits
    wanted = model.config.attention_mask_type
    model.config.attention_mask_type = "causal"  # as the language model alone
    try:
        actual = model(input_ids=probe).logits
        calibrates = not config.modality_calibration or _calibrates(model, probe)
    except Exception as error:  # whatever a language model of others raises
        raise ValueError(f"{kind} does not run inside AlignVLM: {type(error).__name__}: {error}") from error
    finally:
        model.config.attention_mask_type = wanted
    if not torch.allclose(actual, expected, atol=1e-4, rtol=1e-4):
        raise ValueError(
            f"Inside AlignVLM {kind[0].lower() + kind[1:]} gives other logits than alone (largest difference "
            f"{(actual - expected).abs().max():.2e}): its head does more than a matrix product, or its base model needs more than "
            "embeddings."
        )
    if not calibrates:
        raise ValueError(
            f"{kind} does not tell its layers where images are: it cannot have modality_calibration=True. Leave it out."
        )
    return model


def _calibrates(model: AlignVLMForConditionalGeneration, input_ids: torch.Tensor) -> bool:
    """Whether a shift of image tokens behind the layers reaches the tokens after them."""
    tokens = {
        "inputs_embeds": model.get_input_embeddings()(input_ids),
        "mm_token_type_ids": torch.zeros_like(input_ids),
    }
    tokens["mm_token_type_ids"][:, 0] = 1
    found = []
    for value in (1.0, 0.0):
        for calibration in model.model.projector.calibrations:
            calibration.shift.copy_(torch.linspace(-value, value, len(calibration.shift)))
        found.append(model.model(**tokens).last_hidden_state[:, -1])
    return not torch.allclose(*found)


@torch.no_grad()
def check_positions(model: AlignVLMForConditionalGeneration, needed: int, what: str) -> None:
    """Tries whether rows of `needed` tokens go through a language model whose config tells of fewer positions.

    Raises:
        ValueError: if they do not. `what` begins the sentence: "an image and some text need".
    """
    text = model.config.text_config
    positions = stated_positions(text)
    if positions is None or needed <= positions:
        return
    row = torch.zeros(1, needed, dtype=torch.long, device=model.device)
    try:
        model.model.language_model(input_ids=row, use_cache=False)
    except Exception as error:  # whatever a language model of others raises
        raise ValueError(
            f"The language model {text.model_type!r} has {positions} positions, but {what} {needed}. Take one with more, an encoder "
            "with fewer features, or a pixel_shuffle_factor of 2 or more."
        ) from error
    logger.warning(
        f"The language model {text.model_type!r} was trained on rows of up to {positions} tokens; {what} {needed}."
    )


def choose_mask_type(model: AlignVLMForConditionalGeneration, name: str) -> None:
    """Tries the language model, and writes into the config what it keeps.

    Raises:
        ValueError: if that is not `attention_mask_type`. The message says what else can be had.
    """
    config = model.config
    trial = try_language_model(model)
    wanted = config.attention_mask_type
    if wanted not in trial.mask_types:
        kept = [f"--attention_mask_type {kind}" for kind in trial.mask_types]
        offer = f"What it keeps: {', '.join(kept)}{'' if trial.packing else ' (without packing)'}." if kept else ""
        raise ValueError(
            f"The language model {name!r} ({config.text_config.model_type}) cannot keep attention_mask_type={wanted!r}: "
            f"{trial.reasons[wanted]}. {offer or 'It keeps no other either: use another language model.'}"
        )
    config.supported_mask_types, config.packing = trial.mask_types, trial.packing
    if not trial.packing:
        logger.warning(
            f"The language model {name!r} ({config.text_config.model_type}) cannot pack rows: {trial.reasons['packing']}. Each row "
            "will hold one annotation, and each question is answered from a complete prompt."
        )


def assemble(arguments: BackboneArguments) -> tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]:
    """Builds model and processor from pretrained backbones, and writes them to `output_dir`.

    Raises:
        ValueError: for an encoder whose images do not become equally many features or that lacks a layer, a tokenizer that already uses the image token
            for something else, a chat template that cannot be used, a language model that does not answer text as before or
            cannot keep the mask type, and a given projector that does not fit.
    """
    _check_words(arguments)
    for name, revision in (
        (arguments.vision, arguments.vision_revision),
        (arguments.language, arguments.language_revision),
    ):
        check_model(name, revision)
    check_no_other_model(arguments.output_dir)
    if stages := read_run_record(arguments.output_dir)["stages"] if Path(arguments.output_dir).is_dir() else []:
        raise ValueError(
            f"output_dir {arguments.output_dir!r} holds a model that stage {stages[-1]['stage']} has trained, which would be written over. "
            "Name another folder."
        )
    check_writable(arguments.output_dir, create=False)
    saved = _projector_to_start_with(arguments)
    vision = load_vision_encoder(arguments.vision, arguments.vision_revision)
    image_processor = AutoImageProcessor.from_pretrained(arguments.vision, revision=arguments.vision_revision)
    image_processor = without_timm(arguments.vision, image_processor)
    if arguments.image_size is not None:
        if has_native_shapes(vision):
            raise ValueError(
                f"image_size={arguments.image_size} is the side of a square, and the encoder {arguments.vision!r} takes images in their native "
                "shape. Leave it out; --max_num_patches sets how large they become."
            )
        set_image_size(image_processor, arguments.image_size)
    if arguments.max_num_patches is not None:
        set_max_num_patches(arguments.vision, vision, image_processor, arguments.max_num_patches)
    if arguments.image_resample is not None:
        image_processor.resample = Image.Resampling[arguments.image_resample.upper()]
    measure = measure_encoder(arguments.vision, vision, image_processor, arguments.vision_feature_layer)
    fields = {name: getattr(arguments, name) for name in (*WORDS, *COUNTS)}
    AlignVLMConfig(vision_config=vision.config, **measure.fields(), **fields)  # refuses counts before more is loaded
    language = AutoModelForCausalLM.from_pretrained(
        arguments.language, revision=arguments.language_revision, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.language, revision=arguments.language_revision)

    image_tokens = [token for token in (arguments.image_begin, IMAGE_TOKEN, arguments.image_end) if token]
    template, own_template = chat_template(tokenizer, "".join(image_tokens))
    tokenizer.chat_template = template  # one template from here on, whoever renders it

    set_seed(arguments.seed)  # before anything new is drawn
    tokenizer.add_special_tokens({"additional_special_tokens": image_tokens}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > language.get_input_embeddings().weight.shape[0]:
        language.resize_token_embeddings(len(tokenizer))
    model = join(
        vision,
        language,
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        measure,
        modality_calibration=arguments.modality_calibration,
        **fields,
    )
    choose_mask_type(model, arguments.language)
    started = start_projector(model, tokenizer, saved, _recorded_name(arguments.language)) if saved else None

    processor = AlignVLMProcessor(
        image_processor,
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        image_token=IMAGE_TOKEN,
        chat_template=template,
        template_writes_special_tokens=own_template,
        pixel_shuffle_factor=arguments.pixel_shuffle_factor,
    )
    cut_images(arguments, model.config, processor)
    if processor.max_tiles > 1:
        needed = Encoder(processor).most_image_tokens + TRIAL_LENGTH
        check_positions(model, needed, f"an image of {processor.max_tiles} tiles with its overview and some text need")
    ends = {tokenizer.eos_token_id} | end_of_turn_ids(tokenizer, template)
    if own_template:
        ends |= _token_ids(language.generation_config.eos_token_id)
    model.generation_config.eos_token_id = sorted(ends - {None})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    record = {
        "backbones": {
            "vision": _recorded_name(arguments.vision),
            "vision_revision": commit_of(arguments.vision, arguments.vision_revision),
            "vision_licence": read_licence(arguments.vision, arguments.vision_revision),
            "language": _recorded_name(arguments.language),
            "language_revision": commit_of(arguments.language, arguments.language_revision),
            "language_licence": read_licence(arguments.language, arguments.language_revision),
        },
        **({"projector": started} if started else {}),
        "versions": library_versions(),
        "stages": [],
    }
    save_checkpoint(model, processor, arguments.output_dir, record)
    return model, processor


def _check_words(arguments: BackboneArguments) -> None:
    """Raises a `ValueError` for what is wrong whatever the backbones are, which then are not loaded, nor downloaded."""
    AlignVLMConfig(**{name: getattr(arguments, name) for name in WORDS})
    arguments.check_cut(arguments.max_tiles or 1)


def _projector_to_start_with(arguments: BackboneArguments) -> SavedProjector | None:
    """Reads the projector that the arguments name, and checks that it fits before the backbones are loaded; None if they name none."""
    if arguments.projector is None:
        return None
    saved = SavedProjector.read(arguments.projector, arguments.projector_revision)
    vision = AutoConfig.from_pretrained(arguments.vision, revision=arguments.vision_revision)
    language = AutoConfig.from_pretrained(arguments.language, revision=arguments.language_revision)
    layers = arguments.vision_feature_layer
    saved.check_fits(
        getattr(vision, "vision_config", vision),
        language.get_text_config(),
        projector_type=arguments.projector_type,
        pixel_shuffle_factor=arguments.pixel_shuffle_factor,
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        vision_layer_fusion=arguments.vision_layer_fusion,
        modality_calibration=arguments.modality_calibration,
    )
    return saved


def _token_ids(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _recorded_name(name: str) -> str:
    """A Hub id, or the name of a local folder, which must not look like one."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_fields(sys.argv[1:] if argv is None else argv, BackboneArguments)
    model, _ = assemble(arguments)
    print(f"{Path(arguments.output_dir)}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    run(main)
