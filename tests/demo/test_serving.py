"""The server: a request that cannot be served is answered with status 400 and the sentence that says why."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png() -> bytes:
    encoded = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


IMAGE = {"type": "image_url", "image_url": {"url": data_url(png())}}
DAMAGED = {"type": "image_url", "image_url": {"url": data_url(png()[:200])}}
NO_IMAGE = {"type": "image_url", "image_url": {"url": data_url(b"nothing")}}
UNREACHABLE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
QUESTION = {"type": "text", "text": "Why?"}


@pytest.fixture(scope="module")
def ask(checkpoint, tmp_path_factory):
    """A function that posts a JSON body to a path of the real server and returns status and answer."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    folder = tmp_path_factory.mktemp("serving")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "demo/serve.py"), str(checkpoint), *options],
            cwd=folder,
            env={**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )

    def post(path: str, body: dict) -> tuple[int, dict]:
        data = json.dumps({"model": str(checkpoint), **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            answer = error.read().decode()
            return error.code, json.loads(answer) if answer.startswith("{") else {"error": answer}

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield post
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize(
    "messages, sentence",
    [
        ([user(DAMAGED, QUESTION)], "image file is truncated"),
        ([user(NO_IMAGE, QUESTION)], "Cannot read the image"),
        ([user(UNREACHABLE, QUESTION)], "Cannot read the image 'http://127.0.0.1:1/a.png'"),
        ([user(IMAGE, {"type": "text", "text": "What is <image>?"})], "a user typed '<image>'"),
        ([user({"type": "video_url", "video_url": {"url": "a.mp4"}}, QUESTION)], "'video'"),
        ([user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, QUESTION)], "'input_audio'"),
        ([user({"type": "file", "file": {"file_id": "a"}}, QUESTION)], "'file'"),
        ([{"role": "tool", "tool_call_id": "a", "content": "42"}], "role 'tool'"),
    ],
    ids=["damaged", "no image", "unreachable", "placeholder", "video", "audio", "file", "tool"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_answered_with_400_and_a_sentence(ask, messages, sentence, stream):
    body = {"messages": messages, "max_tokens": 2, "stream": stream}
    status, answer = ask("/v1/chat/completions", body)
    assert status == 400 and sentence in answer["error"], answer


def test_tools_are_refused_and_the_server_goes_on(ask):
    function = {"name": "zoom", "parameters": {"type": "object", "properties": {}}}
    messages, tools = [user(IMAGE, QUESTION)], [{"type": "function", "function": function}]
    status, answer = ask("/v1/chat/completions", {"messages": messages, "tools": tools})
    assert status == 400 and "does not read `tools`" in answer["error"]
    call = {"id": "a", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}
    called = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    status, answer = ask("/v1/chat/completions", {"messages": called})
    assert status == 400 and "'tool_calls'" in answer["error"]
    status, answer = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"


def test_the_responses_endpoint_explains_too(ask):
    def content(url: str) -> list[dict]:
        return [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Why?"}]

    for url, expected in ((data_url(png()), 200), (data_url(png()[:200]), 400)):
        body = {"input": [{"role": "user", "content": content(url)}], "max_output_tokens": 2, "stream": False}
        status, answer = ask("/v1/responses", body)
        assert status == expected, answer
    assert "truncated" in answer["error"]
