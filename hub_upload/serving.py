"""Makes a packaged folder one that vLLM's transformers backend can serve, or says why not: `package --for vllm`.

vLLM builds the model as `AutoModel`, gives it embeddings with the image features in place, computes attention itself and puts its own
head on the hidden states. So `AutoModel` must name the base model there, and the mask type be one that vLLM makes.
"""

import json
from pathlib import Path


SERVERS = ("vllm",)
BASE_MODEL = "modeling_alignvlm.AlignVLMModel"
# Without an image's tokens that see each other (`config.is_mm_prefix_lm`), and with them; vLLM makes no other masks.
MASK_TYPES = ("causal", "image")
# What vLLM calls, and the file that has had it since the release that this module came with.
CALLED = {"configuration_alignvlm.py": "is_mm_prefix_lm", "processing_alignvlm.py": "_get_num_multimodal_tokens"}


def is_for_vllm(config: dict) -> bool:
    """Whether a config.json is that of a folder made for vLLM."""
    return config.get("auto_map", {}).get("AutoModel") == BASE_MODEL


def check_for_vllm(folder: Path) -> None:
    """Raises a `ValueError` if vLLM could not run the checkpoint in `folder`, or would compute something else."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mask_type = config.get("attention_mask_type", "image")
    if mask_type not in MASK_TYPES:
        raise ValueError(
            f"vLLM cannot serve {folder}: it makes the masks of {' and '.join(MASK_TYPES)}, and this checkpoint was trained with "
            f"attention_mask_type {mask_type!r}. Use `transformers`, or train with another mask type."
        )
    if config.get("modality_calibration"):
        raise ValueError(
            f"vLLM cannot serve {folder}: its language models have no place for modality_calibration. Use `transformers`, or train without."
        )
    if config.get("max_num_patches") is not None:
        raise ValueError(
            f"vLLM cannot serve {folder}: it was not tried with images in their native shape. Use `transformers`, or an encoder of squares."
        )
    window = config.get("text_config", {}).get("sliding_window")
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    tokens, block = processor.get("image_seq_length", 1), config.get("image_block")
    if mask_type == "image" and block is not None:
        made = "tile" if processor.get("tile_marks") else "image"  # image tokens without text between them are a block
        if block != made:
            raise ValueError(
                f"vLLM cannot serve {folder}: with tile_marks {'on' if made == 'tile' else 'off'} it makes the masks of image_block "
                f"{made!r}, and this checkpoint was trained with {block!r}. Use `transformers`, or train with the other."
            )
        tokens *= processor.get("max_tiles", 1) + 1 if block == "image" else 1
    if mask_type == "image" and window is not None and tokens > window:
        raise ValueError(
            f"vLLM cannot serve {folder}: it keeps the mask of an image whole only within the sliding window, and an image has {tokens} "
            f"tokens, the window {window}. Use `transformers`, or fewer tokens an image (pixel_shuffle_factor, merge_image_tokens)."
        )
    for name, called in CALLED.items():
        if not (folder / name).is_file() or called not in (folder / name).read_text(encoding="utf-8"):
            raise ValueError(
                f"vLLM cannot serve {folder}: its {name} is of an older release and has no `{called}`. Copy the four code files of the "
                "installed `modeling_alignvlm` over those in the folder."
            )


def prepare_for_vllm(folder: Path) -> None:
    """Makes `AutoModel` name the base model in the config.json of `folder`, and the language model tie its head as the model does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoModel"] = BASE_MODEL
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"]  # vLLM ties if either says so
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
