"""Tiny real models for all tests: a few thousand parameters, every class as in real use."""

import gc
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.data import scenes
from alignvlm.stages.chat_templates import PLAIN_TEMPLATE
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.records import exchanges_of


torch.set_num_threads(1)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
IMAGE_TOKEN = "<image>"
IMAGE_SIZE, PATCH_SIZE = 16, 8  # four image tokens

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # so that wrong masks change the outputs visibly
}


def pytest_collection_finish(session):
    """Keeps what was imported out of later garbage collections: every stage asks for one, and it takes a quarter of a second."""
    gc.freeze()


def make_tokenizer(special_tokens: tuple[str, ...] = (IMAGE_TOKEN,)) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [" ".join(exchange) for record in scenes.make_scenes(100, seed=9) for exchange in exchanges_of(record)]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<pad>", "</s>", *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", additional_special_tokens=list(special_tokens)
    )


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each test as in a fresh process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def library_warnings():
    """The messages that transformers and TRL log as warnings or worse while the test runs."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, libraries = Keep(logging.WARNING), [logging.getLogger(name) for name in ("transformers", "trl")]
    for library in libraries:
        library.addHandler(handler)
    yield messages
    for library in libraries:
        library.removeHandler(handler)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer) -> AlignVLMProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return AlignVLMProcessor(image_processor, tokenizer, image_seq_length=4, chat_template=PLAIN_TEMPLATE)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A function that makes a tiny model: `make_model(mask_type="image", vision={...}, text={...}, **config)`."""

    def make(mask_type: str = "image", vision=None, text=None, seed: int = 0, attn_implementation="sdpa", **config):
        set_seed(seed)
        text_config = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **(text or {})}
        config = AlignVLMConfig(
            vision_config=vision or VISION,
            text_config=text_config,
            attention_mask_type=mask_type,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            **config,
        )
        config._attn_implementation = attn_implementation
        model = AlignVLMForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, make_model, processor) -> Path:
    """A saved stage-0 folder of the tiny model."""
    from alignvlm.stages.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "stage0"
    free = {"license": "apache-2.0"}
    backbones = {"vision": "tiny", "vision_licence": free, "language": "tiny", "language_licence": free}
    save_checkpoint(make_model(), processor, folder, {"backbones": backbones, "stages": []})
    return folder


@pytest.fixture(scope="session")
def speaking(checkpoint, tmp_path_factory) -> Path:
    """The tiny model after a short stage 3: what it says of scenes resembles captions and answers, and is mostly wrong."""
    from alignvlm.stages.stage import main
    from tests.running import arguments_for

    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("speaking") / "stage3"
    rates = {f"{module}_learning_rate": 1e-2 for module in ("projector", "vision", "language")}
    sources = [{"name": "scenes", "annotations": ["short_caption", "questions"], "count": 64}]
    fields = {"sources": sources, "max_steps": 60, "per_device_train_batch_size": 16, "num_train_epochs": 20}
    main(arguments_for(checkpoint, folder, **rates, **fields))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def skip_or_fail(variable: str, reason: str):
    """Skips a test that lacks something, but fails it if the environment variable says that it is there: where the variable is set,
    nothing is skipped silently."""
    if os.environ.get(variable):
        pytest.fail(f"{reason}, but {variable} is set: {os.environ[variable]}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program that ALIGNVLM_CHROMIUM names, or the one on the path."""
    found = shutil.which(os.environ.get("ALIGNVLM_CHROMIUM") or "chromium")
    return found or skip_or_fail("ALIGNVLM_CHROMIUM", "there is no chromium")


@pytest.fixture(scope="session")
def node_package():
    """A function that gives the folder of a package of npm, in the one that ALIGNVLM_NODE_MODULES names."""

    def folder(name: str) -> Path:
        found = Path(os.environ.get("ALIGNVLM_NODE_MODULES") or "nowhere", name)
        return found if found.is_dir() else skip_or_fail("ALIGNVLM_NODE_MODULES", f"there is no package {name} of npm")

    return folder


@pytest.fixture(scope="module")
def browser(chromium):
    """Debian's Chromium, driven by Playwright, with a camera that shows a drawing."""
    try:
        from playwright import sync_api
    except ImportError:
        skip_or_fail("ALIGNVLM_CHROMIUM", "Playwright for Python is not installed")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data that ALIGNVLM_TEST_DATA names; tests that need it are skipped without."""
    folder = os.environ.get("ALIGNVLM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ALIGNVLM_TEST_DATA names no folder of real photos, captions and pretrained weights")
    return Path(folder)


def lose_tokenizer(checkpoint: Path) -> None:
    """Removes a checkpoint's tokenizer, whose class is one that transformers then makes without words, and says nothing."""
    (checkpoint / "tokenizer.json").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
