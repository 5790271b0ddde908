"""What llama.cpp makes of exported checkpoints: builds it once, runs its server, and asks it what the checkpoint is asked.

    python benchmarks/llama_cpp.py build llama.cpp                            # a quarter of an hour on two cores
    python benchmarks/llama_cpp.py photos llama.cpp --language SMOLLM2 --photos FOLDER
    python benchmarks/llama_cpp.py converter llama.cpp --language SMOLLM2
    python benchmarks/llama_cpp.py scenes llama.cpp --checkpoint out/quickstart/stage4

`build` takes the sources from the archive of PyPI's `llama-cpp-python`. `photos` compares greedy texts about photos in 32 bit, for both of
llama.cpp's projectors, with a small encoder of random weights before a language model, and files that are wrong on purpose.
`converter` compares the language model's file with the one that llama.cpp's own converter writes. `scenes` prints what each number format
loses on the quickstart's scenes, with sizes and speeds.
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

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/llama_cpp.py`

from alignvlm.export.gguf_prompt import MARKER


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
        self.log = tempfile.TemporaryFile("w+")
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

    def answer(self, messages: list[dict], max_tokens: int) -> dict:
        """The greedy answer to messages with PIL images, as the server returns it."""
        body = {
            "messages": openai_messages(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "cache_prompt": False,
        }
        return self.post("v1/chat/completions", body)

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
