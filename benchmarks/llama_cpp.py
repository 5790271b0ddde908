"""What llama.cpp makes of exported checkpoints: builds it once, runs its server, and asks it what the checkpoint is asked.

    python benchmarks/llama_cpp.py build llama.cpp                            # a quarter of an hour on two cores
    python benchmarks/llama_cpp.py photos llama.cpp --language SMOLLM2 --photos FOLDER
    python benchmarks/llama_cpp.py photos llama.cpp --checkpoint out/quickstart/stage4 --photos FOLDER
    python benchmarks/llama_cpp.py converter llama.cpp --language SMOLLM2
    python benchmarks/llama_cpp.py scenes llama.cpp --checkpoint out/quickstart/stage4

`build` takes the sources from the archive of PyPI's `llama-cpp-python`. `photos` compares greedy texts about photos in 32 bit, for both of
llama.cpp's projectors, with a small encoder of random weights before a language model, and files that are wrong on purpose; or of one
trained checkpoint, for photos as they are and for photos of the encoder's size.
`converter` compares the language model's file with the one that llama.cpp's own converter writes. `scenes` prints what each number format
loses on the quickstart's scenes.
"""

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from PIL import Image
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/llama_cpp.py`

from alignvlm.data.scenes import make_scenes
from alignvlm.evaluation.judge import judge
from alignvlm.export.export import export
from alignvlm.export.gguf import OUTTYPES
from alignvlm.export.gguf_prompt import MARKER
from alignvlm.stages.backbones import BackboneArguments, assemble
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


SOURCES = "llama-cpp-python==0.3.36"
TARGETS = ("llama-server", "llama-mtmd-cli", "llama-quantize")
OFF = ("LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")
# Everything in 32 bit: attention without kernels that round, and the cache
EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")


def build(folder: Path) -> float:
    """Builds llama.cpp from the source archive of PyPI's llama-cpp-python into `folder`; returns the seconds that the compiler took.

    Raises:
        SystemExit: if there is no compiler.
    """
    missing = [name for name in ("cmake", "ninja", "c++") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"llama.cpp cannot be built: {', '.join(missing)} not found.")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "llama.cpp").is_dir():
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", place]
            subprocess.run([*command, SOURCES], check=True)
            with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
                archive.extractall(place, filter="data")
            shutil.move(next(Path(place).glob("*/vendor/llama.cpp")), folder / "llama.cpp")
    started = time.perf_counter()
    off = [f"-D{name}=OFF" for name in OFF]
    command = [
        "cmake",
        "-S",
        folder / "llama.cpp",
        "-B",
        folder / "build",
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    subprocess.run([*command, *off], check=True)
    subprocess.run(["cmake", "--build", folder / "build", "--target", *TARGETS], check=True)
    return time.perf_counter() - started


class Server:
    """llama-server with the two files of an exported folder.

    Args:
        folder: of an export.
        binaries: the folder with `llama-server`.
        options: more of the command line.
    """

    def __init__(self, folder: Path, binaries: Path, *options: str):
        vision = next(Path(folder).glob("mmproj-*.gguf"))
        language = next(path for path in Path(folder).glob("*.gguf") if path != vision)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        files = ["-m", str(language), "--mmproj", str(vision)]
        here = ["--port", self.address.rpartition(":")[2], "--threads", "1", "--parallel", "1", "--ctx-size", "2048"]
        self.process = subprocess.Popen(
            [str(Path(binaries) / "llama-server"), *files, *here, *options], stdout=self.log, stderr=self.log
        )

    def __enter__(self) -> "Server":
        while True:
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"llama-server ended:\n{self.log.read()[-3000:]}")
            try:
                urllib.request.urlopen(f"{self.address}/health")
                return self
            except OSError:
                time.sleep(0.1)

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"{self.address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def answer(self, messages: list[dict], max_tokens: int, **options) -> dict:
        """The greedy answer to messages with PIL images, as the server returns it."""
        body = {
            "messages": openai_messages(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "cache_prompt": False,
        }
        return self.post("v1/chat/completions", {**body, **options})

    def text(self, messages: list[dict], max_tokens: int) -> str:
        return self.answer(messages, max_tokens)["choices"][0]["message"]["content"]

    def pieces(self, messages: list[dict]) -> list[list[int]]:
        """The tokens of a conversation as the server writes it, cut where an image stands."""
        prompt = self.post("apply-template", {"messages": openai_messages(messages)})["prompt"]
        marker = os.environ.get("LLAMA_MEDIA_MARKER") or self.marker()
        return [self.tokens(piece, first=index == 0) for index, piece in enumerate(prompt.split(marker))]

    def marker(self) -> str:
        with urllib.request.urlopen(f"{self.address}/props") as answer:
            return json.loads(answer.read()).get("media_marker", MARKER)

    def tokens(self, text: str, first: bool = False) -> list[int]:
        return self.post("tokenize", {"content": text, "add_special": first, "parse_special": True})["tokens"]


def openai_messages(messages: list[dict]) -> list[dict]:
    """Messages with PIL images in OpenAI's form, the images as PNG."""

    def part(given: dict) -> dict:
        if given["type"] != "image":
            return given
        png = io.BytesIO()
        given["image"].save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**message, "content": [part(each) for each in message["content"]]} for message in messages]


def question(image, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@torch.no_grad()
def our_text(model, processor, messages: list[dict], max_tokens: int) -> str:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def make_checkpoint(language: Path, folder: Path, **fields) -> Path:
    """A checkpoint of a small encoder and a projector of random weights before a language model; image tokens are as large as those of
    words, so that images change what it writes."""
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=96,
        patch_size=16,
        vision_use_head=False,
    )
    set_seed(0)
    encoder = SiglipVisionModel(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    encoder.save_pretrained(folder / "encoder")
    resample = 2 if fields.get("projector_type") == "pool" else 3  # bilinear, bicubic: as llama.cpp resizes for each
    SiglipImageProcessorPil(size={"height": 96, "width": 96}, resample=resample).save_pretrained(folder / "encoder")
    checkpoint = folder / "checkpoint"
    model, _ = assemble(BackboneArguments(str(folder / "encoder"), str(language), str(checkpoint), **fields))
    features = model.get_image_features(torch.randn(4, 3, 96, 96)).pooler_output
    last = [parameter for parameter in model.model.projector.parameters() if parameter.ndim == 2][-1]
    last.mul_(1.5 * model.get_input_embeddings().weight.std() / features.std())
    model.save_pretrained(checkpoint)
    return checkpoint


@torch.no_grad()
def margin(model, processor, messages: list[dict], ours: str, theirs: str) -> float:
    """By how much our model prefers its token where two texts part, as a difference of log probabilities."""
    tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs)]
    common = next((index for index, pair in enumerate(zip(*tokens)) if pair[0] != pair[1]), min(map(len, tokens)))
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = torch.cat([inputs["input_ids"], torch.tensor([tokens[0][:common]], dtype=torch.long)], dim=1)
    best = model(input_ids=prompt, pixel_values=inputs["pixel_values"]).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def same_texts(
    model, processor, folder: Path, binaries: Path, images: list, max_tokens: int, asked: str = "What is it?"
) -> str:
    """Compares greedy texts with those of llama.cpp, in 32 bit."""
    texts, margins = [], []
    with Server(folder, binaries, *EXACT) as server:
        for image in images:
            messages = question(image, asked)
            texts.append(our_text(model, processor, messages, max_tokens))
            if texts[-1] != (theirs := server.text(messages, max_tokens)):
                margins.append(margin(model, processor, messages, texts[-1], theirs))
    parts = f"; the others part where our margin is at most {max(margins):.4f}" if margins else ""
    return f"{len(images) - len(margins)} of {len(images)} texts equal ({len(set(texts))} different ones){parts}"


def size_and_speed(checkpoint: Path, outtype: str, binaries: Path, images: list) -> str:
    """MB of both files, and the fastest of the answers, in tokens a second on one core."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "export"
        export(str(checkpoint), out, "gguf", outtype=outtype)
        sizes = " + ".join(f"{path.stat().st_size / 1e6:.1f}" for path in sorted(out.glob("*.gguf")))
        with Server(out, binaries) as server:
            answers = [server.answer(question(image, "What is it?"), 64, ignore_eos=True) for image in images]
    return f"{sizes} MB, {max(answer['timings']['predicted_per_second'] for answer in answers):.0f} tokens/s"


def photos_of_trained(checkpoint: Path, binaries: Path, images: list, max_tokens: int) -> None:
    """Compares greedy texts of a trained checkpoint: photos as they are, which llama.cpp resizes by itself, and resized before."""
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AlignVLMProcessor.from_pretrained(checkpoint)
    resample, (height, width) = processor.image_processor.resample, model.config.input_size
    small = [image.resize((width, height), Image.Resampling(resample)) for image in images]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "export"
        home = export(str(checkpoint), out, "gguf", outtype="f32")
        for asked in ("What is it?", "Write a short caption.", "Write a detailed caption."):
            for name, given in (("as they are", images), (f"of {width} x {height} pixels", small)):
                found = same_texts(model, processor, out, binaries, given, max_tokens, asked)
                print(f"{home.class_name}, {asked!r}, photos {name}: {found}", flush=True)


def photos(arguments: argparse.Namespace) -> None:
    binaries = arguments.folder / "build/bin"
    files = sorted(path for path in arguments.photos.rglob("*") if path.suffix in (".jpg", ".png"))
    images = [Image.open(path).convert("RGB") for path in files[:: max(1, len(files) // arguments.count)]]
    images = images[: arguments.count]
    if arguments.checkpoint:
        return photos_of_trained(arguments.checkpoint, binaries, images, arguments.max_tokens)
    cases = {
        "gemma3": {"projector_type": "pool", "pixel_shuffle_factor": 2},
        "mlp": {"attention_mask_type": "causal", "vision_feature_layer": -2},
    }
    for name, fields in cases.items():
        with tempfile.TemporaryDirectory() as place:
            checkpoint, out = make_checkpoint(arguments.language, Path(place), **fields), Path(place) / "export"
            export(str(checkpoint), out, "gguf", outtype="f32")
            model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
            processor = AlignVLMProcessor.from_pretrained(checkpoint)
            compared = (model, processor, out, binaries, images, arguments.max_tokens)
            print(f"{name}: {same_texts(*compared)}", flush=True)
            if name == "gemma3":
                path = next(out.glob("mmproj-*"))
                factor = GGUFReader(path, "r+").fields["clip.vision.projector.scale_factor"]
                factor.parts[factor.data[0]][:] = 1
                del factor
                print(f"wrong: patches averaged by 1, not 2: {same_texts(*compared)}", flush=True)
                for outtype in OUTTYPES:
                    print(f"{outtype}: {size_and_speed(checkpoint, outtype, binaries, images)}", flush=True)
            else:
                model.config.attention_mask_type = "image"
                print(f"wrong: causal where the mask is `image`: {same_texts(*compared)}", flush=True)


def converter(arguments: argparse.Namespace) -> None:
    """Compares the language model's file with that of llama.cpp's converter (which needs the package sentencepiece)."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint = make_checkpoint(arguments.language, Path(place), projector_type="pool")
        model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
        alone = AutoModelForCausalLM.from_config(model.config.text_config)
        alone.base_model.load_state_dict(model.model.language_model.state_dict())
        alone.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
        alone.save_pretrained(Path(place) / "alone")
        AlignVLMProcessor.from_pretrained(checkpoint).tokenizer.save_pretrained(Path(place) / "alone")
        for outtype in ("f32", "f16", "q8_0"):
            theirs, out = Path(place) / f"{outtype}.gguf", Path(place) / f"export-{outtype}"
            script = arguments.folder / "llama.cpp/convert_hf_to_gguf.py"
            command = [sys.executable, script, Path(place) / "alone", "--outfile", theirs, "--outtype", outtype]
            subprocess.run(command, check=True, capture_output=True)
            export(str(checkpoint), out, "gguf", outtype=outtype)
            readers = [GGUFReader(path) for path in (theirs, next(out.glob("export-*.gguf")))]
            fields = [{name: field.contents() for name, field in reader.fields.items()} for reader in readers]
            other = sorted(
                name for name in fields[0].keys() | fields[1].keys() if fields[0].get(name) != fields[1].get(name)
            )
            weights = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
            equal = sum(
                name in weights[1] and np.array_equal(tensor.data, weights[1][name].data)
                for name, tensor in weights[0].items()
            )
            print(
                f"{outtype}: {equal} of {len(weights[0])} tensors equal, {len(weights[1])} written; keys that differ: {other}"
            )


def scenes(arguments: argparse.Namespace) -> None:
    """Prints accuracy and CIDEr on held-out scenes, size and speed of each number format."""
    model = AlignVLMForConditionalGeneration.from_pretrained(arguments.checkpoint).float().eval()
    processor = AlignVLMProcessor.from_pretrained(arguments.checkpoint)
    asked = [
        (index, record["images"][0].convert("RGB"), conversation)
        for index, record in enumerate(make_scenes(arguments.count, "test", seed=0))
        for conversation in record["conversations"]
    ]

    def row(name: str, texts: list[str], size: float | None = None) -> None:
        predictions = []
        for (index, _, conversation), text in zip(asked, texts):
            prompt = conversation["messages"][-1]["content"][-1]["text"]
            metric = "cider" if conversation["kind"].endswith("caption") else "pathvqa_accuracy"
            found = {"id": index, "prompt": prompt, "prediction": text.strip(), "metric": metric}
            predictions.append({**found, "references": conversation["responses"]})
        metrics = judge(predictions, samples=10)["metrics"]
        same = sum(text == first for text, first in zip(texts, originals))
        numbers = f"{metrics['pathvqa_accuracy']['accuracy']:.3f} | {metrics['cider']['cider']:.3f}"
        print(f"| {name} | {size or ''} | {numbers} | {same} of {len(texts)} |", flush=True)

    print("| files | MB | accuracy | CIDEr | texts as ours |\n|---|---|---|---|---|")
    messages = [
        [*given["messages"][:-1], *question(image, given["messages"][-1]["content"][-1]["text"])]
        for _, image, given in asked
    ]
    originals = [our_text(model, processor, each, 40) for each in messages]
    row("checkpoint, float32", originals)
    for outtype in OUTTYPES:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "export"
            export(str(arguments.checkpoint), out, "gguf", outtype=outtype)
            size = round(sum(path.stat().st_size for path in out.glob("*.gguf")) / 1e6, 2)
            with Server(out, arguments.folder / "build/bin", *(EXACT if outtype == "f32" else ())) as server:
                row(outtype, [server.text(each, 40) for each in messages], size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("build", "photos", "converter", "scenes"))
    parser.add_argument("folder", type=Path, help="Where llama.cpp is, or is built.")
    parser.add_argument("--language", type=Path, help="Folder of a language model.")
    parser.add_argument("--photos", type=Path, help="Folder of square photos.")
    parser.add_argument("--checkpoint", type=Path, help="A trained checkpoint; for `scenes` of the quickstart.")
    parser.add_argument("--count", type=int, default=20, help="Photos or scenes.")
    parser.add_argument("--max_tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "build":
        print(f"built in {build(arguments.folder):.0f} seconds: {arguments.folder / 'build/bin'}")
    else:
        {"photos": photos, "converter": converter, "scenes": scenes}[arguments.what](arguments)


if __name__ == "__main__":
    main()
