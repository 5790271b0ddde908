"""Tiny backbones on disk, as a stage-0 checkpoint is assembled from them."""

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)  # four image tokens


@pytest.fixture(scope="session")
def vision(tmp_path_factory) -> str:
    """The folder of an encoder with its image processor."""
    folder = tmp_path_factory.mktemp("vision")
    set_seed(2)
    SiglipVisionModel(VISION).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)
