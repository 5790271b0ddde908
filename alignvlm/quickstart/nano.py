"""Trains nano backbones from nothing, so that the quickstart needs no download.

A SigLIP-type encoder learns to say what is where in drawn scenes. A Qwen2-type language model learns to read descriptions of scenes and
to answer questions about them. Neither has met the other: the four stages bring them together. Both are saved in Hugging Face form, as
`alignvlm.stages.backbones` takes them.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.data import scenes
from alignvlm.evaluation.precision import choose_precision
from alignvlm.stages.chat_templates import PLAIN_TEMPLATE
from alignvlm.stages.log_lines import say
from alignvlm.stages.optimizers import MuonAdamW, muon_groups


IMAGE_SIZE, PATCH_SIZE = 64, 16
SCENE_COUNT = 12_000  # scenes the vision encoder sees
# On a CPU the backward pass of PyTorch's SDPA kernel is slower than plain products for models this small.
ATTENTION = "eager"


def train_nano_backbones(folder: Path, seed: int, vision_steps: int, language_steps: int) -> tuple[Path, Path]:
    """Trains both backbones on the training split, saves them under `folder` and returns their two folders."""
    vision, language = Path(folder) / "vision", Path(folder) / "language"
    train_vision_encoder(vision, seed, vision_steps)
    train_language_model(language, seed, language_steps)
    return vision, language


def train_loop(name: str, modules: list[nn.Module], learning_rate: float, steps: int, loss_of_step) -> None:
    """Runs a plain loop of Muon and AdamW with warm-up and cosine decay, in what the processor computes natively."""
    precision = choose_precision()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = MuonAdamW(muon_groups(modules), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    progress = tqdm(range(steps), desc=name, disable=None)  # a bar in a terminal, lines elsewhere
    for step in progress:
        with precision.autocast():
            loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 19:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if progress.disable and ((step + 1) % 100 == 0 or step + 1 == steps):
            say(f"{name}  {step + 1}/{steps}  loss {loss.item():.4f}")


def train_vision_encoder(folder: Path, seed: int, steps: int, batch_size: int = 128) -> None:
    """Trains the encoder to tell of every patch its quadrant, and the colour, kind and size of the shape there, if any."""
    set_seed(seed)
    rng = np.random.default_rng([seed, 10])
    drawn = [scenes.random_scene(rng, "train") for _ in range(SCENE_COUNT)]
    pixels = np.stack(
        [np.asarray(scenes.draw(scene, rng, IMAGE_SIZE)) for scene in tqdm(drawn, desc="drawing scenes", disable=None)]
    )
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    vocabularies = (list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.SIZES))
    targets = torch.zeros(SCENE_COUNT, len(scenes.POSITIONS), 3, dtype=torch.long)  # 0: nothing there
    for index, scene in enumerate(drawn):
        for shape in scene:
            values = (shape.colour, shape.kind, shape.size)
            places = [1 + vocabulary.index(value) for vocabulary, value in zip(vocabularies, values)]
            targets[index, list(scenes.POSITIONS).index(shape.position)] = torch.tensor(places)

    config = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    encoder = SiglipVisionModel._from_config(config, attn_implementation=ATTENTION)
    classes = [*(len(vocabulary) + 1 for vocabulary in vocabularies), len(scenes.POSITIONS)]
    head = nn.Linear(config.hidden_size, sum(classes))
    side = torch.arange(IMAGE_SIZE // PATCH_SIZE) * 2 * PATCH_SIZE // IMAGE_SIZE  # 0 or 1: which half of the image
    quadrant_of_patch = (2 * side[:, None] + side).flatten()

    def loss_of_step(step: int) -> torch.Tensor:
        chosen = torch.from_numpy(rng.choice(SCENE_COUNT, batch_size, replace=False))
        images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2) / 127.5 - 1  # as the image processor does
        features = encoder(images).last_hidden_state
        predictions = head(features).float().split(classes, dim=-1)
        seen = targets[chosen][:, quadrant_of_patch]  # (batch, patches, 3)
        wanted = torch.cat([seen, quadrant_of_patch.expand(batch_size, -1).unsqueeze(-1)], dim=-1)
        return sum(F.cross_entropy(p.flatten(0, 1), wanted[..., i].flatten()) for i, p in enumerate(predictions))

    train_loop("vision encoder", [encoder, head], 5e-3, steps, loss_of_step)
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)
    _write_card(folder, "image-feature-extraction", "A nano vision encoder, trained from nothing on drawn scenes.")


def train_tokenizer(texts: list[str], vocab_size: int = 512, split_digits: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: complete words for the scenes, smaller pieces for any other text; with `split_digits`, a token
    for each digit of a number."""
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_digits, by_bytes]) if split_digits else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def scene_dialogue(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prompts and responses about a scene that is not drawn; the first prompt describes it."""
    scene = scenes.random_scene(rng, "train")
    asked = scenes.annotate(scene, ("short_caption", "detailed_caption", "questions"), rng)
    turns = [asked[i][:2] for i in rng.permutation(len(asked))]
    first, response = turns[0]
    return [(f"{scenes.detailed_caption(scene)} {first}", response), *turns[1:]]


def train_language_model(
    folder: Path,
    seed: int,
    steps: int,
    batch_size: int = 24,
    draw_dialogue: Callable[[np.random.Generator], list[tuple[str, str]]] = scene_dialogue,
    split_digits: bool = False,
) -> None:
    """Trains the LM on dialogues: a description of a scene, then questions about it; the loss is on descriptions and answers.
    `split_digits` is as for `train_tokenizer`."""
    set_seed(seed)
    rng = np.random.default_rng([seed, 11])

    sample = [
        text
        for _ in range(2000)
        for prompt, response in draw_dialogue(rng)
        for text in (f"User: {prompt}\n", f"Assistant: {response}")
    ]
    tokenizer = train_tokenizer(sample, split_digits=split_digits)
    tokenizer.chat_template = PLAIN_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        initializer_range=0.07,  # about hidden_size ** -0.5: with the usual 0.02 attention starts flat and learns late,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION)

    @cache
    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    def tokens_and_labels() -> tuple[list[int], list[int]]:
        input_ids, labels = [], []
        for asked, answered in draw_dialogue(rng):
            prompt = encode(f"User: {asked}\nAssistant:")
            response = encode(f" {answered}{tokenizer.eos_token}")
            line_end = encode("\n")
            input_ids += prompt + response + line_end
            labels += [-100] * len(prompt) + response + [-100] * len(line_end)
        return input_ids, labels

    def loss_of_step(step: int) -> torch.Tensor:
        rows = [tokens_and_labels() for _ in range(batch_size)]
        length = max(len(input_ids) for input_ids, _ in rows)
        input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
        return model(input_ids=input_ids, labels=labels).loss

    train_loop("language model", [model], 5e-3, steps, loss_of_step)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_card(folder, "text-generation", "A nano language model, trained from nothing on texts about drawn scenes.")


def _write_card(folder: Path, task: str, text: str) -> None:
    """Writes a README.md that states the licence, so that models made of these weights may be as free as they are."""
    metadata = f"license: apache-2.0\nlibrary_name: transformers\npipeline_tag: {task}"
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n{text}\n", encoding="utf-8")
