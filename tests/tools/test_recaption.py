"""`alignvlm recaption` with real tiny models: ours, LLaVA, BLIP-2, GIT, BLIP; what it writes is a source that trains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl import TrlParser

from alignvlm.data import scenes
from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.data.record import Record
from alignvlm.data.sources import read_source
from alignvlm.evaluation.answer import answer
from alignvlm.export.export import export
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.stage import run_stage
from alignvlm.tools.caption_filters import Limits, measure, most_agreed, rejection, repetition, similarity
from alignvlm.tools.captioner import Caption, Captioner, Scorer
from alignvlm.tools.recaption import main
from tests.conftest import TEXT, VISION, make_tokenizer
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
FEW = ("--use_cpu", "--max_new_tokens", "8", "--batch_size", "3", "--keep_unfinished")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SIZES, "image_size": 16, "patch_size": 8, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Seven images, some in a folder below, beside files that are none."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    (folder / "below").mkdir(parents=True)
    for index, record in enumerate(scenes.make_scenes(7, seed=4)):
        record["images"][0].save(folder / ("below" if index > 4 else "") / f"{index}.png")
    (folder / "readme.txt").write_text("Not an image.\n")
    (folder / ".hidden.png").write_bytes(b"thumbnail")
    return folder


def shown(photos: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(photos.rglob("*/[0-9].png")) + sorted(photos.glob("[0-9].png"))]


def bert_like(*special: str):
    """A tokenizer that begins and ends every text, as GIT's and BLIP's."""
    tokenizer = make_tokenizer(("[CLS]", "[SEP]", *special))
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.bos_token = tokenizer.cls_token = "[CLS]"
    tokenizer.eos_token = tokenizer.sep_token = "[SEP]"
    return tokenizer


def tokens_of(tokenizer) -> dict[str, int]:
    """What a text configuration says of a tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
    given = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return {"vocab_size": len(tokenizer), **given, "initializer_range": 0.3, **SIZES}


def git() -> tuple:
    tokenizer = bert_like()
    config = GitConfig(vision_config=EYES, **tokens_of(tokenizer), num_image_with_embedding=None)
    return GitForCausalLM(config), GitProcessor(CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), tokenizer)


def blip() -> tuple:
    tokenizer = bert_like()
    text = {**tokens_of(tokenizer), "encoder_hidden_size": 32}
    config = BlipConfig(vision_config=EYES, text_config=text, initializer_range=0.3)
    return BlipForConditionalGeneration(config), BlipProcessor(pil(), tokenizer)


def blip2() -> tuple:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "</s>"  # as OPT's
    text = {"model_type": "opt", **tokens_of(tokenizer), "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
    qformer = {**SIZES, "encoder_hidden_size": 32, "vocab_size": 50, "initializer_range": 0.3}
    config = Blip2Config(
        vision_config=EYES, qformer_config=qformer, text_config=text, num_query_tokens=4, initializer_range=0.3
    )
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return Blip2ForConditionalGeneration(config), Blip2Processor(pil(), tokenizer, num_query_tokens=4)


def pil():
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def models(tmp_path_factory, checkpoint, make_model, processor) -> dict[str, Path]:
    """The folders of tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(make_model("causal", vision_feature_layer=-2), processor, folder / "causal", {"stages": []})
    export(str(folder / "causal"), folder / "llava")
    for make in (git, blip, blip2):
        set_seed(5)
        model, own_processor = make()
        model.save_pretrained(folder / make.__name__)
        own_processor.save_pretrained(folder / make.__name__)
    return {"ours": checkpoint, **{name: folder / name for name in ("llava", "git", "blip", "blip2")}}


CASES = [("ours", CAPTION_PROMPT), ("llava", CAPTION_PROMPT), *((name, p) for name in ("git", "blip", "blip2") for p in ("", "a red"))]


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_a_batch_gives_the_captions_of_one_by_one(name, prompt, models, photos):
    model = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    captioner = Captioner(model, AutoProcessor.from_pretrained(models[name]), prompt)
    images = shown(photos)
    decoding = {"max_new_tokens": 8, "do_sample": False}
    batch = captioner(images, **decoding)
    print([c[0].text for c in batch])
    assert batch == [captioner([image], **decoding)[0] for image in images]
    texts = [captions[0].text for captions in batch]
    assert all(texts) and len(set(texts)) > 1 and not any(prompt and prompt in text for text in texts)
