"""Exported folders in other people's programs: transformers' pipeline and server, and TRL's trainer with its own collator."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from trl import SFTConfig, SFTTrainer

from alignvlm.evaluation.answer import answer
from alignvlm.export.export import export
from alignvlm.stages.checkpoint import save_checkpoint
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


# home: what `make_model` takes
HOMES = {
    "LLaVA": {"mask_type": "causal", "vision_feature_layer": -2},
    "DeepSeek-VL": {"mask_type": "causal"},
    "Gemma 3": {"projector_type": "pool"},
    "PaliGemma": {"mask_type": "prefix", "projector_type": "linear"},
}
PHOTO = Image.effect_noise((40, 30), 80).convert("RGB")
QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, processor) -> dict[str, tuple[Path, Path]]:
    """For each home a checkpoint and its export."""
    made = {}
    for home, values in HOMES.items():
        folder = tmp_path_factory.mktemp("doors")
        save_checkpoint(make_model(**values), processor, folder / "given", {"backbones": {}, "stages": []})
        assert export(str(folder / "given"), folder / "out").name == home
        made[home] = (folder / "given", folder / "out")
    return made


def message(image: dict, text: str = QUESTION) -> dict:
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def our_answer(checkpoint: Path) -> str:
    """Ours, by greedy decoding; another than that about a blank image, so that it tells whether the image arrived."""
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    images = [PHOTO, Image.new("RGB", PHOTO.size)]
    (about_photo,), (about_nothing,) = answer(model, processor, images, [[QUESTION]] * 2, max_new_tokens=8)
    assert about_photo != about_nothing
    return about_photo.strip()


@pytest.mark.parametrize("home", HOMES)
def test_pipeline(folders, home):
    checkpoint, out = folders[home]
    ask = pipeline("image-text-to-text", model=str(out))
    found = ask(
        text=[message({"type": "image", "image": PHOTO})],
        max_new_tokens=8,
        generate_kwargs={"do_sample": False},
        return_full_text=False,
    )
    assert found[0]["generated_text"].strip() == our_answer(checkpoint)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* deprecated:FutureWarning")  # TRL's own default
@pytest.mark.parametrize("home", HOMES)
def test_trl_trains_it_and_what_it_saves_loads(folders, tmp_path, home):
    out = folders[home][1]
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    rows = [{"messages": [message({"type": "image"}), said], "images": [PHOTO]}] * 4
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(out),
        processing_class=AutoProcessor.from_pretrained(out),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            max_length=None,
            report_to="none",
        ),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses)
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    for part in ("language_model", "vision", "projector|aligner"):
        assert any(re.search(part, name) for name in moved), part
    trainer.save_model(str(tmp_path / "saved"))
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


@pytest.fixture(scope="module")
def ask_server(tmp_path_factory):
    """A function that asks an unpatched `transformers serve` about the photo, through the `openai` client."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("serving")
    (folder / "hub").mkdir()  # a cache, whose models the server lists
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"],
            cwd=folder,
            env={**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
    encoded = io.BytesIO()
    PHOTO.save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            deadline = time.monotonic() + 120
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                    time.sleep(0.2)

            def ask(model: Path) -> str:
                messages = [message({"type": "image_url", "image_url": {"url": url}})]
                try:
                    made = client.chat.completions.create(
                        model=str(model), messages=messages, max_tokens=8, temperature=0
                    )
                except openai.APIError as error:
                    raise AssertionError((folder / "log").read_text()[-3000:]) from error
                return made.choices[0].message.content

            yield ask
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize("home", HOMES)
def test_transformers_serve_answers_the_openai_client(folders, ask_server, home):
    checkpoint, out = folders[home]
    assert ask_server(out).strip() == our_answer(checkpoint)
