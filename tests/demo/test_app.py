"""The demo: what visitors get from the real app over HTTP, as the page asks for it, and what they do not get."""

import argparse
import io
import json
import pickle
import socket
import threading
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.evaluation.answer import answer
from alignvlm.tools import demo as page
from alignvlm.tools import demo_model
from alignvlm.tools.demo_model import Decoding, DemoModel, Talk, heat_map


SETTINGS = ["the checkpoint's own", "greedy", 0.7, 4, 8]


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def model(make_model, processor) -> DemoModel:
    torch.manual_seed(0)
    made = make_model().eval()
    with torch.no_grad():  # so that answers depend on the images
        for parameter in made.model.projector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return DemoModel("tiny", made, processor, "fp32", tag="VQA:")


def conversation(*texts: str) -> Talk:
    talk = Talk(("photo.png",))
    for index, text in enumerate(texts):
        talk = talk.with_answer(text) if index % 2 else talk.with_user(text)
    return talk


def expected(model: DemoModel, images: list, *texts: str, **options) -> str:
    """The greedy answer to the last text of a conversation, by the code that evaluates."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]
    messages[0]["content"] = [{"type": "image"}] * len(images) + messages[0]["content"]
    return answer(model.model, model.processor, [images], [[messages]], **{"max_new_tokens": 8, **options})[0][0]


@pytest.mark.parametrize("mask_type", ["causal", "image", "prefix", "mutual"])
def test_answers_come_in_pieces_and_are_those_of_the_mask_type(model, mask_type):
    pieces = list(
        model.stream(conversation("What?", "a b", "Why?"), [photo(1)], Decoding(mask_type, max_new_tokens=8))
    )
    assert model.model.config.attention_mask_type == "image"
    model.model.config.attention_mask_type = mask_type
    try:
        assert pieces[-1] == expected(model, [photo(1)], "What?", "a b", "Why?")
    finally:
        model.model.config.attention_mask_type = "image"
    assert all(after.startswith(before) for before, after in pairwise(pieces))


def test_beams_and_sampling(model):
    talk = conversation("What?")
    (found,) = model.stream(talk, [photo(1)], Decoding("image", "beam search", beams=3, max_new_tokens=8))
    assert found == expected(model, [photo(1)], "What?", num_beams=3)
    texts = {
        list(model.stream(talk, [photo(1)], Decoding("image", "sampling", 2.0, max_new_tokens=8)))[-1]
        for _ in range(5)
    }
    assert len(texts) > 1
    for wrong in (Decoding("image", "magic"), Decoding("none"), Decoding("image", max_new_tokens=10**6)):
        with pytest.raises(ValueError, match=r"There is no|too long"):
            next(model.stream(talk, [photo(1)], wrong))


def test_a_visitor_who_leaves_frees_the_model(model):
    leaving = model.stream(conversation("What?"), [photo(1)], Decoding("image", max_new_tokens=20_000))
    next(leaving)
    leaving.close()
    assert model.lock.acquire(timeout=20)
    model.lock.release()
    assert model.model.config.attention_mask_type == "image"


def test_heat_maps_are_bright_where_the_model_looked(model):
    looked = model.look(conversation("What?"), [photo(1)], "a b", "image")
    assert [word.text for word in looked.words] == ["a", "b"] and looked.of_word(0).ndim == 3
    values = torch.zeros(2, 4, 4)
    values[1, 0, 0] = 1
    joined = np.asarray(heat_map([photo(1), photo(2)], values)).astype(float)
    height, width = joined.shape[:2]
    assert width == 512 * 2 + 8
    corner = joined[: height // 4, 520 : 520 + 128].mean()
    assert corner > joined[: height // 4, :128].mean() + 30 and corner > joined[-height // 4 :, -128:].mean() + 30
    assert model.look(Talk().with_user("What?"), [], "a b", "image") is None


class Running(NamedTuple):
    """The app: its address, Gradio's object and the folder of uploads."""

    url: str
    blocks: object
    folder: Path


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    """The running app."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        options = page.launch_options(argparse.Namespace(host="127.0.0.1", port=None, share="off"))
        built = page.build(page.Demo([model], page.example_images(None)))
        _, url, _ = built.launch(prevent_thread_lock=True, quiet=True, **options)
        yield Running(url.rstrip("/"), built, folder)
        built.close()


class Visitor:
    """Does over HTTP what the page does in a browser."""

    def __init__(self, app: Running):
        self.url, self.session = app.url, uuid.uuid4().hex
        self.config = json.loads(self.get("/config"))
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def post(self, path: str, content: bytes, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, content, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def upload(self, name: str, content: bytes) -> dict:
        start = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = start + content + b"\r\n--x--\r\n"
        (path,) = json.loads(self.post("/gradio_api/upload", body, "multipart/form-data; boundary=x"))
        return self.file(path)

    def file(self, path: str) -> dict:
        return {"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}

    def event(self, part: str, kind: str) -> dict:
        return next(each for each in self.config["dependencies"] if [self.ids[part], kind] in each["targets"])

    def join(self, part: str, kind: str, *values) -> list[dict]:
        """Starts an event of a part with the values of its inputs that are no state; returns all messages about it."""
        event, given = self.event(part, kind), iter(values)
        kinds = {each["id"]: each["type"] for each in self.config["components"]}
        data = [None if kinds[each] == "state" else next(given) for each in event["inputs"]]
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": None}
        self.post("/gradio_api/queue/join", json.dumps(body).encode())
        messages = []
        with urllib.request.urlopen(
            f"{self.url}/gradio_api/queue/data?session_hash={self.session}", timeout=120
        ) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] in ("process_completed", "close_stream"):
                        return messages
        return messages

    def show(self, *images: dict) -> list[dict]:
        return self.join("uploads", "change", list(images), *SETTINGS)

    def ask(self, text: str) -> list[dict]:
        return self.join("ask", "click", text, *SETTINGS)


def test_an_image_is_described_and_a_second_question_answered_in_its_context(app, model):
    first, second = Visitor(app), Visitor(app)
    shown = {
        visitor: visitor.show(visitor.upload("a.png", png(photo(seed))))
        for seed, visitor in enumerate((first, second))
    }
    for seed, visitor in enumerate((first, second)):
        assert shown[visitor][-1]["success"], shown[visitor][-1]
        caption = expected(model, [photo(seed)], f"VQA: {CAPTION_PROMPT}")
        reply = expected(model, [photo(seed)], f"VQA: {CAPTION_PROMPT}", caption, "Why?")
        text = json.dumps(visitor.ask("Why?"), ensure_ascii=False)
        assert json.dumps(reply, ensure_ascii=False)[1:-1] in text and "Why?" in text and "VQA:" not in text


def warning_of(messages: list[dict]) -> str:
    (warning,) = [message for message in messages if message["msg"] == "log" and message["level"] == "warning"]
    return warning["log"]


def test_what_a_visitor_does_wrong_is_told_in_a_sentence(app):
    visitor = Visitor(app)

    def told(messages: list[dict]) -> str:
        if messages[-1]["success"]:  # a conversation goes on
            return warning_of(messages)
        return messages[-1]["output"]["error"]

    assert "Add an image first" in told(visitor.ask("Why?"))
    assert "bad.png cannot be read: image file is truncated" in told(
        visitor.show(visitor.upload("bad.png", png(photo(1))[:300]))
    )
    assert "notes.txt cannot be read: it is none of AVIF" in told(visitor.show(visitor.upload("notes.txt", b"hello")))
    assert "9 images" in told(visitor.show(*[visitor.upload("a.png", png(photo(1)))] * 9))
    assert visitor.show(visitor.upload("a.png", png(photo(1))))[-1]["success"]
    assert "2,001 characters" in told(visitor.ask("a" * 2001))
    assert "Type a question" in told(visitor.ask(" "))
    assert "'&lt;image&gt;'" in told(visitor.ask("What is <image>?"))  # the page shows it as HTML
    assert "greater than maximum" in told(visitor.join("ask", "click", "Why?", *SETTINGS[:-1], 10**6))
    with pytest.raises(urllib.error.HTTPError) as error:
        visitor.upload("large.png", bytes((page.MAX_FILE_MB << 20) + 1))
    assert error.value.code == 413


def test_of_a_visitor_who_is_silent_only_words_are_in_memory_and_the_image_is_deleted_with_its_file(app):
    visitor = Visitor(app)
    large = Image.effect_noise((1500, 1000), 50).convert("RGB")
    assert visitor.show(visitor.upload("large.png", png(large)))[-1]["success"]
    kept = app.blocks.state_holder[visitor.session]
    states = [kept[part["id"]] for part in visitor.config["components"] if part["type"] == "state"]
    assert any(isinstance(each, list) and each and isinstance(each[0], tuple) for each in states)
    assert len(pickle.dumps(states)) < 200_000 < 1500 * 1000 * 3
    for file in app.folder.rglob("large.png"):
        file.unlink()
    assert "large.png is no longer here" in warning_of(visitor.ask("Why?"))


def test_attention_that_would_take_too_much_memory_is_not_kept(model, monkeypatch):
    assert model.look(conversation("What?"), [photo(1)], "a b", "image").layers.dtype == torch.float16
    monkeypatch.setattr(demo_model, "KEPT_BYTES", 8)
    assert model.look(conversation("What?"), [photo(1)], "a b", "image") is None


def test_no_file_and_no_address_is_opened(app, tmp_path):
    visitor, asked = Visitor(app), []
    (tmp_path / "secret.png").write_bytes(png(photo(1)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        paths = [str(tmp_path / "secret.png"), __file__, "/etc/passwd", "../../etc/passwd", "pyproject.toml", address]
        for path in (*paths, f"file://{paths[0]}"):
            (message,) = visitor.show(visitor.file(path))[-1:]
            assert not message["success"], path
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/proxy=", "/static/", "/assets/"):
                with pytest.raises(urllib.error.HTTPError) as error:
                    visitor.get(route + path)
                assert 400 <= error.value.code < 500, route + path
        assert not asked
        for route in ("/gradio_api/file=", "/gradio_api/proxy="):  # Gradio itself would fetch a public one
            with pytest.raises(urllib.error.HTTPError) as error:
                visitor.get(f"{route}https://example.com/a.png")
            assert error.value.read() == b"This demo does not fetch addresses."
    finally:
        server.shutdown()
        server.server_close()


def test_where_nothing_can_be_served_is_told_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, message in (
            (["--port", str(port)], f"Nothing can be served at 127.0.0.1:{port}: .*Name another than --port {port}"),
            (
                ["--host", "300.1.1.1"],
                "Nothing can be served at 300.1.1.1:any port: .*Name another than --host 300.1.1.1",
            ),
            (["--port", "99999"], "'99999' is no port"),
        ):
            with pytest.raises(SystemExit, match=message):
                page.main(["no/such/checkpoint", *options])
    with pytest.raises(SystemExit, match="No such folder: 'no/such/checkpoint'"):
        page.main(["no/such/checkpoint", "--host", "[::1]" if socket.has_dualstack_ipv6() else "localhost"])
    with pytest.raises(FileNotFoundError, match=r"No such folder: 'nowhere' .*--examples"):
        page.example_images("nowhere")
