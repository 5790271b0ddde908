"""What sharper images cost at fewer tokens: FLOPs of a record in stages 1 to 3 of the big recipes, counted without weights or data.

    python benchmarks/resolutions.py

A record is one of COCO's: an image and five captions in a row, 103 tokens of text of which 55 are labels. `alignvlm plan` counts in the
same way for your data; here the same record meets other encoders and `pixel_shuffle_factor`s. Counted, not timed: attention computes all
pairs of tokens, as SDPA does.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/resolutions.py`

from alignvlm.tools.plan import ImageCost, step_flops
from benchmarks import models
from modeling_alignvlm.configuration_alignvlm import AlignVLMConfig
from modeling_alignvlm.modeling_alignvlm import AlignVLMForConditionalGeneration


TEXT_TOKENS, LABELS = 103, 55
TRAINS = {1: {"projector"}, 2: {"projector", "vision"}, 3: {"projector", "language"}}  # as the recipes say
# recipe: its backbones' dimensions, and pairs of an image's pixels a side and `pixel_shuffle_factor`; the recipe's own comes first
VARIANTS = {
    "alignvlm_220m": ("b16-224+135m", ((224, 1), (224, 2), (384, 2), (384, 3), (512, 2), (512, 4))),
    "alignvlm_900m": ("so400m-384+0.5b", ((384, 1), (384, 3), (448, 2), (512, 3))),
}


def count(shape: str, pixels: int, factor: int) -> dict[str, float]:
    """The image tokens of a variant, and the FLOPs of a record by stage.

    Args:
        shape: one of `models.SHAPES`.
    """
    vision, text = models.configs(shape)
    vision["image_size"] = pixels
    config = AlignVLMConfig(
        vision_config=vision, text_config=text, image_token_id=models.IMAGE_TOKEN_ID, pixel_shuffle_factor=factor
    )
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config)
    modules = (model.model.vision_tower, model.model.projector, model.model.language_model)
    tokens = config.image_seq_length
    image = ImageCost.of(config)
    flops = {
        f"stage {stage}": step_flops(modules, trains, 1, 1, tokens + TEXT_TOKENS, LABELS, image=image)
        for stage, trains in TRAINS.items()
    }
    return {"tokens": tokens, "encoder": image.flops, **flops}


def table() -> str:
    """The counts as Markdown, each beside its ratio to the recipe's own."""
    lines = [
        "| recipe | pixels | `pixel_shuffle_factor` | image tokens | encoder, GFLOP | "
        + " | ".join(f"stage {stage}" for stage in TRAINS)
        + " |"
    ]
    lines.append("|" + "---|" * (5 + len(TRAINS)))
    for recipe, (shape, variants) in VARIANTS.items():
        own = None
        for pixels, factor in variants:
            found = count(shape, pixels, factor)
            own = own or found
            stages = " | ".join(
                f"{found[name] / 1e9:,.0f} ({found[name] / own[name]:.2f})"
                for name in found
                if name.startswith("stage")
            )
            lines.append(
                f"| {recipe} | {pixels} | {factor} | {found['tokens']} | {found['encoder'] / 1e9:,.0f} | {stages} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(table())
