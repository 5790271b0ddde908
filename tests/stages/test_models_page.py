"""docs/models.md says what is found, for the release of transformers that it names."""

import importlib.util
import re
from pathlib import Path

import pytest
import transformers


DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = """
    bert-generation bert bloom cohere ctrl gemma2 gemma3_text gpt2 gpt_neo gpt_neox gpt_oss gptj jamba llama mistral mixtral mpt olmo2 opt phi
    phi3 qwen2 qwen3 qwen3_next smollm3 stablelm xglm
""".split()
ENCODERS = """
    beit bit clip_vision_model convnext deit dinov2 dinov2_with_registers dinov3_vit efficientnet mobilenet_v2 poolformer resnet sam2_vision_model
    siglip2_vision_model siglip_vision_model swin vit vit_mae
""".split()


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("write_models_page", DOCS / "write_models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    text = (DOCS / "models.md").read_text()
    (release,) = re.findall(r"registered in transformers (\S+),", text)
    if release != transformers.__version__:
        pytest.skip(f"docs/models.md tells of transformers {release}, and {transformers.__version__} is installed")
    return text


@pytest.mark.parametrize("model_type", LANGUAGES)
def test_language_models_are_as_the_page_says(sweep, page, model_type):
    assert sweep.language_row(sweep.language_finding(model_type)) in page


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_are_as_the_page_says(sweep, page, model_type):
    assert sweep.encoder_row(sweep.encoder_finding(model_type)) in page


def test_the_page_names_every_type(sweep, page):
    for model_type in (*sweep.language_types(), *sweep.encoder_types()):
        assert f"\n| {model_type} |" in page or f"\n- {model_type}: " in page, model_type
