"""The server: a request that cannot be served is answered with status 400 and the sentence that says why, and opens nothing."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from alignvlm.evaluation.load import load_checkpoint
from alignvlm.stages import stage
from demo.serve import main
from demo.visitors import Limits, fetch, is_public, messages_with_images, read_visitors_image
from tests.forked import start
from tests.running import arguments_for


ROOT = Path(__file__).resolve().parents[2]


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png() -> bytes:
    encoded = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


PNG = png()
IMAGE = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
DAMAGED = {"type": "image_url", "image_url": {"url": data_url(png()[:200])}}
NO_IMAGE = {"type": "image_url", "image_url": {"url": data_url(b"nothing")}}
UNREACHABLE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
QUESTION = {"type": "text", "text": "Why?"}


@contextmanager
def serving(checkpoint: Path, folder: Path, *options: str):
    """Starts the real server; gives a function that posts a JSON body to a path of it and returns status and answer."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "demo/serve.py"), str(checkpoint), *options],
            cwd=folder,
            env={**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )

    def post(path: str, body: dict | bytes, seconds: float = 60) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps({"model": str(checkpoint), **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            answer = error.read().decode()
            return error.code, json.loads(answer) if answer.startswith("{") else {"error": {"message": answer}}

    post.url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{post.url}/health", timeout=10).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield post
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # it still computes
            server.kill()
            raise


@pytest.fixture(scope="module")
def ask(checkpoint, tmp_path_factory):
    """Posts to a server that takes images as data URIs only."""
    with serving(checkpoint, tmp_path_factory.mktemp("serving"), "--max_image_mb", "1", "--max_requests", "2") as post:
        yield post


@pytest.fixture(scope="module")
def ask_with_urls(checkpoint, tmp_path_factory):
    """Posts to a server that fetches images from public addresses."""
    with serving(checkpoint, tmp_path_factory.mktemp("urls"), "--allow_url_images") as post:
        yield post


@pytest.fixture(scope="module")
def apart(speaking, tmp_path_factory) -> Path:
    """A checkpoint that keeps LoRA weights apart, and whose prompts begin with a tag."""
    folder = tmp_path_factory.mktemp("apart@home") / "stage3"  # where a name on the Hub would have a revision
    fields = {"lora_r": 4, "lora_alpha": 8.0, "lora_merge": False, "evaluation_tag": "[vqa]"}
    stage.main(arguments_for(speaking, folder, **fields, language_learning_rate=1e-2, max_steps=20))
    return folder


@pytest.fixture(scope="module")
def ask_apart(apart, tmp_path_factory):
    """Posts to a server of the checkpoint with LoRA weights and a tag."""
    with serving(apart, tmp_path_factory.mktemp("lora")) as post:
        yield post


@pytest.fixture(scope="module")
def ask_endless(checkpoint, tmp_path_factory):
    """Posts to a server whose answers end only after as many tokens as were asked for."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("endless") / "stage0")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": None}))
    with serving(folder, folder.parent, "--max_new_tokens", "30000") as post:
        yield post


@pytest.fixture(scope="module")
def computed(apart):
    """A function from messages to their number of tokens and the answer as it is decoded, without a server."""
    model, processor, _ = load_checkpoint(str(apart), torch.device("cpu"))

    def compute(*messages: dict, max_new_tokens: int = 12) -> tuple[int, str]:
        inputs = processor.apply_chat_template(
            messages_with_images(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return length, processor.decode(output[0, length:], skip_special_tokens=True)

    return compute


@contextmanager
def image_server():
    """An HTTP server on this machine: /a.png is an image, /to?ADDRESS redirects, /slow drips; lists the paths it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/to?"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if self.path == "/missing":
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow":
                return self.drip()
            self.wfile.write(PNG)

        def drip(self):
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET
        daemon_threads = True

    server = Server(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        server.server_close()


HOSTS = [
    *("127.0.0.1", "127.1", "127.8.9.10", "0.0.0.0", "0", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::]"),
    *("2130706433", "0x7f000001", "0177.0.0.1", "%31%32%37.0.0.1", "user:word@127.0.0.1", "8.8.8.8@127.0.0.1"),
    *("169.254.169.254", "[fe80::1]", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[64:ff9b::7f00:1]"),
    *("[fd00::1]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255"),
]


def both_forms(url) -> list[tuple[str, dict]]:
    """A question about an image at an address, for both endpoints."""
    chat = {"messages": [user({"type": "image_url", "image_url": {"url": url}}, QUESTION)], "max_tokens": 2}
    response = [
        {"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "?"}]}
    ]
    short = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Why?"}]
    return [
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": response, "max_output_tokens": 2, "stream": False}),
        ("/v1/responses", {"input": short, "max_output_tokens": 2, "stream": False}),
    ]


def test_no_file_of_the_server_is_opened(ask, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    path = str(tmp_path / "secret.png")
    for url in (
        path,
        f"file://{path}",
        f"FILE://{path}",
        f"file:{path}",
        f"http:{path}",
        "../log",
        "log",
        "~/a.png",
        "",
    ):
        for endpoint, body in both_forms(url):
            status, answer = ask(endpoint, body)
            assert status == 400 and "data: URI" in answer["error"]["message"], (url, answer)
    for part in (
        *({"type": "image", name: path} for name in ("path", "url", "image", "base64")),
        {"type": "image_url", "url": path},
        {"type": "image_url", "image_url": {"path": path}},
        {"type": "image_url", "image_url": [path]},
        {"type": "video_url", "video_url": {"url": path}},
        {"type": "video", "path": path},
        {"type": "audio_url", "audio_url": {"url": path}},
        {"type": "audio", "path": path},
        {"type": "input_audio", "input_audio": path},
        {"type": "input_file", "file_url": path},
    ):
        status, answer = ask("/v1/chat/completions", {"messages": [user(part, QUESTION)], "max_tokens": 2})
        assert status == 400 and len(answer["error"]["message"]) > 30, (part, answer)


def test_nothing_is_fetched_from_inside_the_network(ask, ask_with_urls):
    with image_server() as (port, asked):
        for host in HOSTS:
            url = f"http://{host}:{port}/a.png"
            for post in (ask, ask_with_urls):
                status, answer = post(*both_forms(url)[0])
                assert status == 400 and "image" in answer["error"]["message"], (url, answer)
            with pytest.raises(ValueError, match=r"not fetched|unknown"):
                fetch(url, 1000, 1)
        for endpoint, body in both_forms(f"https://127.0.0.1:{port}/a.png"):
            assert "not at a public address" in ask_with_urls(endpoint, body)[1]["error"]["message"]
        status, answer = ask_with_urls(*both_forms("ftp://8.8.8.8/a.png")[0])
        assert status == 400 and "http" in answer["error"]["message"]
        assert not asked


def test_addresses_are_checked_again_after_a_redirect():
    """From an address that is taken for a public one here, as none can be reached in a test."""
    with image_server() as (port, asked):
        here = f"http://127.0.0.1:{port}"

        def stands_for_public(address):
            return address == "127.0.0.1"

        assert fetch(f"{here}/a.png", 10_000, 5, stands_for_public) == PNG
        assert fetch(f"{here}/to?/to?{here}/a.png", 10_000, 5, stands_for_public) == PNG
        for target in (
            f"http://127.0.0.2:{port}/a.png",
            f"http://[::1]:{port}/a.png",
            "file:///etc/hostname",
            "//0.0.0.0",
        ):
            asked.clear()
            with pytest.raises(ValueError, match="not fetched"):
                fetch(f"{here}/to?{target}", 10_000, 5, stands_for_public)
            assert asked == [f"/to?{target}"]
        with pytest.raises(ValueError, match="redirects more than"):
            fetch(f"{here}/to?" * 6 + here, 10_000, 5, stands_for_public)
        with pytest.raises(ValueError, match="more than 100 bytes"):
            fetch(f"{here}/a.png", 100, 5, stands_for_public)
        with pytest.raises(ValueError, match="answered 404"):
            fetch(f"{here}/missing", 100, 5, stands_for_public)
        begun = time.monotonic()
        with pytest.raises(ValueError, match="took too long"):
            fetch(f"{here}/slow", 10_000, 0.5, stands_for_public)
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are_known(address):
    assert is_public(address)


def test_images_of_other_kinds_and_sizes_are_refused():
    bomb = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(bomb, "PNG")
    with pytest.raises(ValueError, match=r"10000 x 9000 pixels"):
        read_visitors_image(data_url(bomb.getvalue()), Limits())
    with pytest.raises(ValueError, match="is none of AVIF"):  # Pillow would start Ghostscript
        read_visitors_image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), Limits())
    with pytest.raises(ValueError, match="no base64"):
        read_visitors_image("data:image/png;base64,/etc/*", Limits())
    with pytest.raises(ValueError, match="must begin like"):
        read_visitors_image("data:image/png,/etc/hostname", Limits())
    assert read_visitors_image(data_url(png()).replace("+", "%2B"), Limits()).size == (40, 30)


def test_limits_hold(ask):
    messages = [user(IMAGE, QUESTION)]
    for wrong, sentence in (
        ({"max_tokens": 1025}, "from 1 to 1024"),
        ({"max_completion_tokens": -1}, "from 1 to 1024"),
        ({"max_tokens": "9"}, "from 1 to 1024"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 10**30}, "seed"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"generation_config": '{"num_beams": 9999}'}, "'generation_config'"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "'chat_template_kwargs'"),
        ({"messages": [user(*[IMAGE] * 17, QUESTION)]}, "17 images"),
        ({"messages": [user({"type": "text", "text": "why " * 30_000})]}, "more than the 100,000 that are read"),
        ({"messages": [user({"type": "text", "text": "why " * 24_000})]}, "Shorten it"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": data_url(bytes(2 << 20))}})]},
            "1,048,576 bytes",
        ),
        ({"messages": "Why?"}, "list of messages"),
        ({"messages": ["Why?"]}, "A message is a str"),
        ({"messages": [{"role": "user", "content": ["Why?"]}]}, "A part of a message is a str"),
        ({"messages": [{"content": "Why?"}]}, "no role"),
        ({"messages": [{"role": "user", "content": {"text": "Why?"}}]}, "a dict as its content"),
    ):
        status, answer = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 2, **wrong})
        assert status == 400 and sentence in answer["error"]["message"], (wrong.keys(), answer)
    status, answer = ask("/v1/chat/completions", b" " * (33 << 20))
    assert status == 413 and "Make its images smaller" in answer["error"]["message"]
    status, answer = ask("/v1/completions", {"prompt": "What is <image>?", "max_tokens": 2})
    assert status == 400 and "image" in answer["error"]["message"], answer


ENDPOINTS = {
    "/v1/chat/completions": {"messages": [user(QUESTION)], "max_tokens": 16},
    "/v1/completions": {"prompt": "Why?", "max_tokens": 16},
    "/v1/responses": {"input": "Why?", "max_output_tokens": 16},
}


def text_of(answer: dict) -> str:
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_request_that_asks_nothing_is_refused(ask, endpoint):
    (asked, value), (limit, most) = ENDPOINTS[endpoint].items()
    for given in ({}, {asked: None}, {asked: 5}, {asked: {"text": "Why?"}}, {asked: type(value)()}):
        status, answer = ask(endpoint, {limit: most, **given})
        assert status == 400 and f"{asked!r}" in answer["error"]["message"], (given, answer)


@pytest.mark.parametrize(
    "endpoint, fields",
    [
        (endpoint, fields)
        for endpoint, every in {
            "/v1/chat/completions": [
                {"n": 2},
                {"n": True},
                {"logprobs": True},
                {"top_logprobs": 3},
                {"response_format": {"type": "json_object"}},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
                {"presence_penalty": 0.5},
                {"logit_bias": {"5": 100}},
                {"logit_bias": 5},
                {"functions": [{"name": "zoom", "parameters": {}}]},
                {"tool_choice": "required"},
                {"modalities": ["text", "audio"]},
                {"audio": {"voice": "alloy", "format": "wav"}},
                {"reasoning_effort": "high"},
                {"verbosity": "low"},
                {"web_search_options": {}},
            ],
            "/v1/completions": [
                {"n": 2},
                {"best_of": 3},
                {"echo": True},
                {"suffix": "."},
                {"logprobs": 0},
                {"logit_bias": {"5": -100}},
                {"presence_penalty": -1},
            ],
            "/v1/responses": [
                {"previous_response_id": "resp_1"},
                {"conversation": "conv_1"},
                {"prompt": {"id": "pmpt_1"}},
                {"background": True},
                {"include": ["message.output_text.logprobs"]},
                {"text": {"format": {"type": "json_object"}}},
                {"text": {"verbosity": "low"}},
                {"reasoning": {"effort": "high"}},
                {"truncation": "auto"},
                {"top_logprobs": 2},
            ],
        }.items()
        for fields in every
    ],
    ids=str,
)
def test_a_field_that_would_be_ignored_is_refused(ask, endpoint, fields):
    (name,) = fields
    status, answer = ask(endpoint, {**ENDPOINTS[endpoint], **fields})
    assert status == 400 and f"{name!r}" in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(ask):
    """OpenAI's defaults, null, and what is not about the answer."""
    plain = {endpoint: text_of(ask(endpoint, body)[1]) for endpoint, body in ENDPOINTS.items()}
    chat = [
        {"n": 1, "logprobs": False, "presence_penalty": 0.0, "tool_choice": "none", "modalities": ["text"]},
        {"response_format": {"type": "text"}, "logit_bias": {}, "stop": [], "tools": None, "seed": None},
        {"stop": "", "user": "ada", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True},
        {"chat_template_kwargs": None, "generation_config": None, "stream": None, "reasoning_effort": "none"},
    ]
    response = {"text": {"format": {"type": "text"}, "verbosity": None}, "reasoning": {"effort": None}, "include": []}
    completion = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": None, "frequency_penalty": 0}
    for endpoint, fields in [
        *(("/v1/chat/completions", each) for each in chat),
        ("/v1/completions", completion),
        ("/v1/responses", response),
        ("/v1/responses", {"truncation": "disabled", "background": False, "previous_response_id": None}),
    ]:
        status, answer = ask(endpoint, {**ENDPOINTS[endpoint], **fields})
        assert status == 200 and text_of(answer) == plain[endpoint], (fields, answer)


def test_damaged_requests_are_explained_in_openai_s_form(ask):
    for body, sentence in (
        (b'{"model": ', "Expecting value"),
        (b"[]", "dictionary"),
        (b"", "required"),
        (b'{"messages": "\xe9"}', "parsing the body"),
    ):
        status, answer = ask("/v1/chat/completions", body)
        assert status == 400 and sentence in answer["error"]["message"], (body, answer)
    chat, response = ENDPOINTS["/v1/chat/completions"], ENDPOINTS["/v1/responses"]
    for endpoint, body, sentence in (
        ("/v1/chat/completions", {**chat, "colour": "red"}, "'colour'"),
        ("/v1/chat/completions", {**chat, "stream": "no"}, "'stream' is 'no'"),
        ("/v1/chat/completions", {**chat, "messages": [user({"type": "text", "text": "Why\ud800"})]}, "'Why\\ud800'"),
        ("/v1/chat/completions", {**chat, "model": "\ud800"}, "half of a character"),
        ("/v1/chat/completions", {**chat, "stop": ["\ud800"]}, "half of a character"),
        ("/v1/chat/completions", {**chat, "messages": [{"role": "user"}]}, "Message 0 has no content"),
        ("/v1/chat/completions", {**chat, "messages": [user()]}, "Message 0 has no content"),
        ("/v1/responses", {**response, "instructions": ["Be brief."]}, "'instructions'"),
        (
            "/v1/responses",
            {**response, "input": [user(QUESTION), {"type": "reasoning", "content": [{}]}]},
            "'reasoning'",
        ),
        ("/v1/responses", {**response, "input": [user(QUESTION), {"type": ["message"]}]}, "['message']"),
        ("/v1/responses", {**response, "parallel_tool_calls": "all"}, "'parallel_tool_calls' is 'all'"),
        ("/v1/responses", {**response, "input": [user(QUESTION), {"type": "function_call"}]}, "'function_call'"),
        ("/v1/responses", {**response, "input": [user(QUESTION), {"type": "item_reference"}]}, "'item_reference'"),
        (
            "/v1/responses",
            {**response, "input": [{"role": "system", "content": "Why?"}], "instructions": "Be brief."},
            "'instructions' or a message of the system",
        ),
    ):
        status, answer = ask(endpoint, body)
        assert status == 400 and sentence in answer["error"]["message"], (body, answer)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_is_sampled_where_that_is_asked_for(ask, endpoint):
    def answer(**fields) -> str:
        status, found = ask(endpoint, {**ENDPOINTS[endpoint], **fields})
        assert status == 200, found
        return text_of(found)

    greedy = answer()
    assert answer() == answer(temperature=0) == answer(temperature=0, top_p=0.9, seed=1) == greedy
    assert answer(temperature=1e-40) == greedy  # the logits divided by it are infinite
    sampled = [answer(temperature=1.5, seed=seed) for seed in (1, 2, 3)]
    assert len({greedy, *sampled}) == 4
    assert [answer(temperature=1.5, seed=seed) for seed in (3, 1)] == [sampled[2], sampled[0]]
    assert answer(seed=1) == answer(seed=1) != greedy
    assert answer(temperature=1.5, top_p=0) == greedy  # of the likeliest token alone
    answer(seed=1)
    once = answer(top_p=0.99)
    answer(seed=1)
    assert once != answer(top_p=0.99)  # without a seed, no answer hangs on the request before it


def test_requests_at_the_same_time_keep_their_seeds(ask):
    endpoint = "/v1/chat/completions"

    def answer(seed: int) -> str:
        return text_of(ask(endpoint, {**ENDPOINTS[endpoint], "max_tokens": 64, "temperature": 1.5, "seed": seed})[1])

    alone = [answer(seed) for seed in (1, 2)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(answer, (1, 2))) == alone


def test_a_visitor_can_name_no_other_model(ask, checkpoint, tmp_path):
    for path in ("/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/openapi.json"):
        status, answer = ask(path, {"model": str(tmp_path)})
        assert status == 404 and "/v1/chat/completions" in answer["error"]["message"], (path, answer)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        body = {"model": str(tmp_path), "prompt": "a", "messages": [user(QUESTION)], "input": "a"}
        allowed = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}[path]
        status, answer = ask(path, {"model": body["model"], allowed: body[allowed]})
        assert status == 400 and "pinned" in answer["error"]["message"], answer
    with urllib.request.urlopen(f"{ask.url}/v1/models", timeout=10) as response:
        assert [model["id"] for model in json.load(response)["data"]] == [str(checkpoint)]


def test_a_full_server_says_so_and_goes_on(ask):
    host, port = ask.url.removeprefix("http://").split(":")
    waiting = [socket.create_connection((host, int(port))) for _ in range(2)]
    for each in waiting:
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
    time.sleep(0.5)
    status, answer = ask("/v1/completions", {"prompt": "a", "max_tokens": 2})
    assert status == 503 and "busy" in answer["error"]["message"], answer
    for each in waiting:
        each.close()
    time.sleep(0.5)
    assert ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


@pytest.mark.parametrize(
    "messages, sentence",
    [
        ([user(DAMAGED, QUESTION)], "truncated"),
        ([user(NO_IMAGE, QUESTION)], "Cannot read the image"),
        ([user(UNREACHABLE, QUESTION)], "The image 'http://127.0.0.1:1/a.png' is not fetched"),
        ([user(IMAGE, {"type": "text", "text": "What is <image>?"})], "a user typed '<image>'"),
        ([user({"type": "video_url", "video_url": {"url": "a.mp4"}}, QUESTION)], "'video_url'"),
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
    assert status == 400 and sentence in answer["error"]["message"], answer


def test_tools_are_refused_and_the_server_goes_on(ask):
    function = {"name": "zoom", "parameters": {"type": "object", "properties": {}}}
    messages, tools = [user(IMAGE, QUESTION)], [{"type": "function", "function": function}]
    status, answer = ask("/v1/chat/completions", {"messages": messages, "tools": tools})
    assert status == 400 and "does not read `tools`" in answer["error"]["message"]
    call = {"id": "a", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}
    called = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    status, answer = ask("/v1/chat/completions", {"messages": called})
    assert status == 400 and "'tool_calls'" in answer["error"]["message"]
    status, answer = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"


def test_the_responses_endpoint_explains_too(ask):
    def content(url: str) -> list[dict]:
        return [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Why?"}]

    for url, expected in ((data_url(png()), 200), (data_url(png()[:200]), 400)):
        body = {"input": [{"role": "user", "content": content(url)}], "max_output_tokens": 2, "stream": False}
        status, answer = ask("/v1/responses", body)
        assert status == expected, answer
    assert "truncated" in answer["error"]["message"]


def served(post, *messages: dict) -> tuple[int, str]:
    """What `computed` gives, of the server."""
    status, answer = post("/v1/chat/completions", {"messages": messages, "max_tokens": 12})
    assert status == 200, answer
    return answer["usage"]["prompt_tokens"], text_of(answer)


def of(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


ASKED = "[vqa] Write a short caption."


def test_lora_weights_that_lie_apart_are_served_too(ask_apart, computed, speaking):
    model, processor, _ = load_checkpoint(str(speaking), torch.device("cpu"))
    differ = []
    for text in (ASKED, "[vqa] What is shown?", "[vqa] Describe it.", "[vqa] What color is the circle?"):
        length, answer = computed(of("user", text))
        assert served(ask_apart, of("user", text)) == (length, answer.strip())
        inputs = processor.apply_chat_template(
            [of("user", text)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        without = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:]
        differ.append(processor.decode(without, skip_special_tokens=True) != answer)
    assert any(differ)  # or this would show nothing


def test_several_turns_give_the_prompt_of_training(ask_apart, computed):
    first, then = of("user", ASKED), of("user", "How many are red?")
    answer = computed(first)[1]
    assert answer.startswith(" ")  # or this would show nothing
    assert served(ask_apart, first)[1] == answer.strip()
    length, further = computed(first, of("assistant", answer.strip()), then)
    for sent in (answer.strip(), answer, f"{answer}\n "):
        assert served(ask_apart, first, of("assistant", sent), then) == (length, further.strip()), sent
    parts = {"role": "assistant", "content": [{"type": "text", "text": part} for part in (" two", "red ")]}
    plain = {"role": "assistant", "content": [{"type": "text", "text": part} for part in ("two", "red")]}
    assert served(ask_apart, first, parts, then) == served(ask_apart, first, plain, then)
    items = [{**first}, {"role": "assistant", "content": [{"type": "output_text", "text": answer}]}, then]
    _, response = ask_apart("/v1/responses", {"input": items, "max_output_tokens": 12})
    assert (response["usage"]["input_tokens"], text_of(response)) == (length, further.strip())


def test_a_stream_has_no_white_space_around_the_answer_and_a_continued_text_keeps_its_own(ask_apart, computed, apart):
    import openai

    answer = computed(of("user", ASKED), max_new_tokens=40)[1]
    assert answer.startswith(" ") and " " in answer.strip()
    with openai.OpenAI(base_url=f"{ask_apart.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model=str(apart), messages=[of("user", ASKED)], max_tokens=40, stream=True
        )
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == answer.strip()
        events = client.responses.create(model=str(apart), input=ASKED, max_output_tokens=40, stream=True)
        deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
        assert "".join(deltas) == answer.strip()
        given = {"model": str(apart), "prompt": "User: Which shapes are there? Assistant:", "max_tokens": 12}
        continued = client.completions.create(**given).choices[0].text
        assert continued.startswith(" ")
        chunks = client.completions.create(**given, stream=True)
        assert "".join(each.choices[0].text for each in chunks) == continued


def test_the_tag_of_the_checkpoint_stands_before_the_users_first_text(ask_apart, computed):
    shape, count = (of("user", text) for text in ("Which shape is it?", "How many?"))
    tagged = of("user", "[vqa] Which shape is it?")
    length, answer = computed(tagged)
    assert served(ask_apart, shape) == served(ask_apart, tagged) == (length, answer.strip())
    system, reply = of("system", "Be brief."), of("assistant", "two")
    for before in ([], [system]):
        length, answer = computed(*before, tagged, reply, count)
        assert served(ask_apart, *before, shape, reply, count) == (length, answer.strip())
    like_it = of("user", "[vqa]s are what?")
    assert served(ask_apart, like_it)[0] == computed(of("user", "[vqa] [vqa]s are what?"))[0]
    image = Image.open(io.BytesIO(PNG))
    shown = {"role": "user", "content": [{"type": "image_url", "image_url": image}]}
    length, answer = computed({**shown, "content": [*shown["content"], {"type": "text", "text": "[vqa]"}]})
    assert served(ask_apart, user(IMAGE)) == (length, answer.strip())


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_model_stops_when_the_visitor_leaves(ask_endless, endpoint, stream):
    """Its answer would take a minute and more, and the next one waits for it."""
    (asked, value), (limit, _) = ENDPOINTS[endpoint].items()
    host, port = ask_endless.url.removeprefix("http://").split(":")
    body = json.dumps({asked: value, limit: 30_000, "stream": stream}).encode()
    head = (
        f"POST {endpoint} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=2) as visitor:
        visitor.sendall(head.encode() + body)
        if not stream:
            with pytest.raises(TimeoutError):
                visitor.recv(1)
        elif visitor.recv(1):
            time.sleep(1)
    assert ask_endless("/v1/completions", {"prompt": "a", "max_tokens": 2}, seconds=10)[0] == 200


def test_a_checkpoint_that_cannot_be_loaded_is_told_in_a_sentence(speaking, apart, tmp_path):
    pytest.importorskip("fastapi")
    cut = shutil.copytree(speaking, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 20_000)
    lacking = shutil.copytree(speaking, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    save_file(dict(list(weights.items())[:-1]), lacking / "model.safetensors", metadata={"format": "pt"})
    for given, sentence in (
        (["no/such/folder"], "No such folder: 'no/such/folder'"),
        ([str(tmp_path)], "Models lie in its folders cut, lacking: name one."),
        ([str(cut)], "cannot be read"),
        ([str(lacking)], "lacks 1 of the model's weights"),
        ([str(speaking), "--dtype", "nothing"], "'nothing'"),
        ([str(apart), "--quantization", "bnb-4bit"], "cannot be added to rounded weights. Merge them first"),
    ):
        process = start("hub_upload.command_line:run", main, [*given, "--device", "cpu"], log=tmp_path / "log")
        process.join(120)
        told = (tmp_path / "log").read_text()
        assert process.exitcode == 2 and "Traceback" not in told, (given, told)
        last = told.splitlines()[-1]
        assert last.startswith("error: ") and sentence in last, (given, last)


@pytest.mark.parametrize(
    "option, value",
    [("--max_new_tokens", "0"), ("--max_image_mb", "-5"), ("--max_requests", "0"), ("--port", "99999")],
)
def test_limits_that_nothing_could_pass_are_refused(option, value):
    with pytest.raises(SystemExit, match=f"error: argument {option}: '{value}' is no"):
        main(["checkpoint", f"{option}={value}"])


def test_an_address_that_is_taken_is_told_before_the_model_is_looked_for():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Nothing can be served at 127.0.0.1:{port}: .*Name another than --port"):
            main(["no/such/checkpoint", "--host", "127.0.0.1", "--port", str(port)])


def test_what_openai_s_client_sends_unasked_is_taken(ask, checkpoint):
    """Texts to stop at, an answer sent back with its null fields, names, the newer name of the system; no stream unless asked for."""
    import openai

    messages = [user(IMAGE, QUESTION)]
    with openai.OpenAI(base_url=f"{ask.url}/v1", api_key="none", max_retries=0) as client:

        def answer(messages: list, **options):
            given = {"model": str(checkpoint), "max_tokens": 16, "temperature": 0, **options}
            return client.chat.completions.create(messages=messages, **given)

        first = answer(messages).choices[0].message
        stop = re.search("[a-z]{2}", first.content[:-10]).group()
        stopped = answer(messages, stop=[stop]).choices[0]
        assert stopped.finish_reason == "stop" and first.content.startswith(stopped.message.content)
        assert stop in stopped.message.content and len(stopped.message.content) < len(first.content)
        chunks = answer(messages, stop=stop, stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == stopped.message.content
        drawn = {"temperature": 1.5, "seed": 7}
        chunks = answer(messages, stream=True, **drawn)
        streamed = "".join(each.choices[0].delta.content or "" for each in chunks)
        complete = answer(messages, **drawn).choices[0].message.content
        complete = complete.removesuffix("\N{REPLACEMENT CHARACTER}")  # half a character is not streamed
        assert streamed == complete != first.content
        system = [{"role": "developer", "content": "Be brief."}]
        named = [{**messages[0], "name": "Ada"}]
        again = [*system, *named, first.model_dump(), user(QUESTION)]
        plain = [{**system[0], "role": "system"}, *messages, {"role": "assistant", "content": first.content}]
        assert answer(again).choices[0].message == answer([*plain, user(QUESTION)]).choices[0].message
        response = client.responses.create(model=str(checkpoint), input="Why?", max_output_tokens=2)
        assert response.status == "completed"  # an object, no stream
        with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
            answer(messages, max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="pinned to"):
            answer(messages, model="another")
