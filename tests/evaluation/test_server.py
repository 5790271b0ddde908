"""A server that speaks the OpenAI protocol is evaluated like a checkpoint, and what it answered survives what it does wrong."""

import base64
import io
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from alignvlm.data import scenes
from alignvlm.evaluation.evaluate_model import main
from alignvlm.evaluation.server import FIRST_RETRIES, RETRIES
from tests.demo.test_serving import serving


pytest.importorskip("openai")
COUNT = 6


def completion(text) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


def failing(status: int, sentence: str):
    """What a server does that fails; it says that one may ask again at once."""
    return lambda body: (status, {"retry-after-ms": "1"}, json.dumps({"error": {"message": sentence}}).encode())


def seen(body: dict) -> str:
    """What the images of a request show, and its words."""
    (message,) = body["messages"]
    parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
    found = []
    for part in parts:
        if "image_url" in part:
            content = part["image_url"]["url"].removeprefix("data:image/png;base64,")
            found.append(str(Image.open(io.BytesIO(base64.b64decode(content))).getpixel((0, 0))[0]))
        else:
            found.append(part["text"])
    return " ".join(found)


class Scripted(ThreadingHTTPServer):
    """A server with the model `tiny` that answers what it sees, unless `does` is set: a function from a request to status, headers and body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models, self.asked, self.does = ["tiny"], [], None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models", self.path
        if self.server.models is None:
            return self.reply(404, {}, b"{}")
        self.reply(200, {}, json.dumps({"object": "list", "data": [{"id": n} for n in self.server.models]}).encode())

    def do_POST(self):
        assert self.path == "/v1/chat/completions", self.path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        does = self.server.does or (lambda body: (200, {}, completion(seen(body))))
        self.reply(*does(body))

    def reply(self, status: int, headers: dict, body: bytes):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def scripted():
    server = Scripted()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with scripted() as running:
        yield running


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """As many images as `COUNT`, each of its own shade and with a question."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for index in range(COUNT):
        Image.new("RGB", (8, 6), (40 * index, 7, 0)).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": f"Which shade is {index}?", "answer": str(40 * index)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def options(server, rows: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--server", server.url, "--task", "local", "--data", str(rows), "--output_dir", str(output)),
        *("--bootstrap_samples", "20", "--max_new_tokens", "9", "--use_cpu", *more),
    ]


@pytest.mark.slow
def test_a_real_server_gives_what_the_checkpoint_gives(checkpoint, tmp_path):
    """Captions, short answers and multiple choice, all controls, one table."""
    data = tmp_path / "data"
    (data / "scenes").mkdir(parents=True)
    scenes.make_scenes(4, "test", ("short_caption", "questions"), seed=3).to_parquet(data / "scenes/test.parquet")
    Image.new("RGB", (8, 8), (200, 0, 0)).save(data / "a.png")
    row = {"image": "a.png", "question": "How red?", "options": ["not", "very much"], "answer": "1"}
    (data / "ai2d.jsonl").write_text(json.dumps(row) + "\n")
    common = ["--tasks", "scenes,ai2d", "--data_dir", str(data), "--use_cpu", "--controls"]
    common += ["--max_new_tokens", "4", "--bootstrap_samples", "20"]
    main([str(checkpoint), *common, "--output_dir", str(tmp_path / "local")])
    with serving(checkpoint, tmp_path) as post:
        main(["--server", post.url, *common, "--output_dir", str(tmp_path / "served"), "--server_requests", "3"])
    names = {file.name for file in (tmp_path / "local").iterdir()}
    assert names == {file.name for file in (tmp_path / "served").iterdir()} and len(names) == 2 * 5 + 1
    for name in names - {"tasks.md"}:
        here, there = (json.loads((tmp_path / where / name).read_text()) for where in ("local", "served"))
        answers = [[(p["id"], p["prompt"], p["prediction"]) for p in found["predictions"]] for found in (here, there)]
        assert answers[0] == answers[1] and any(text for *_, text in answers[0])
        assert there["model"] == {"name": str(checkpoint), "server": f"{post.url}/v1"} and "dtype" not in there
        assert not any("likelihoods" in p for p in there["predictions"])
        if name.startswith("scenes"):
            assert here["metrics"] == there["metrics"]


def test_the_server_gets_images_words_and_greedy_decoding(server, rows, tmp_path):
    main(options(server, rows, tmp_path))
    result = json.loads((tmp_path / "local.json").read_text())
    assert [p["prediction"] for p in result["predictions"]] == [f"{40 * i} Which shade is {i}?" for i in range(COUNT)]
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in server.asked} == {("tiny", 0, 9)}
    main(options(server, rows, tmp_path, "--question_only", "--tag", "[a]"))
    result = json.loads((tmp_path / "local-question_only.json").read_text())
    assert [p["prediction"] for p in result["predictions"]] == [f"[a] Which shade is {i}?" for i in range(COUNT)]
    assert all(
        isinstance(b["messages"][0]["content"], str) for b in server.asked[COUNT:]
    )  # as servers without images take it


def test_results_lie_in_a_folder_called_like_the_model(server, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.models = ["somebody/tiny"]
    arguments = options(server, rows, tmp_path)
    at = arguments.index("--output_dir")
    main([*arguments[:at], *arguments[at + 2 :]])
    assert json.loads((tmp_path / "results/tiny/local.json").read_text())["model"]["name"] == "somebody/tiny"


def test_half_a_pair_of_surrogates_is_written_as_a_question_mark(server, rows, tmp_path):
    """No file can hold it: a finished evaluation could not be judged."""
    server.does = lambda body: (200, {}, completion("a dog \ud83d"))
    main(options(server, rows, tmp_path))
    result = json.loads((tmp_path / "local.json").read_text())
    assert [p["prediction"] for p in result["predictions"]] == ["a dog ?"] * COUNT


def test_a_busy_server_is_asked_again(server, rows, tmp_path):
    """The first answer to each image is a refusal."""
    refused = set()

    def does(body):
        if seen(body) in refused:
            return 200, {}, completion(seen(body))
        refused.add(seen(body))
        return failing((429, 503)[len(refused) % 2], "busy")(body)

    server.does = does
    main(options(server, rows, tmp_path))
    assert (
        len(server.asked) == 2 * COUNT
        and len(json.loads((tmp_path / "local.json").read_text())["predictions"]) == COUNT
    )


@pytest.mark.parametrize(("status", "tries"), [(500, RETRIES + 1), (422, 1)])
def test_what_was_answered_is_kept_when_a_server_gives_up(status, tries, server, rows, tmp_path):
    whole = tmp_path / "whole"
    main(options(server, rows, whole))
    server.asked.clear()
    begun, refused = threading.Event(), threading.Semaphore(0)

    def does(body):
        if "3?" in seen(body):  # fails when the fourth is under way, which ends after that
            assert begun.wait(timeout=60)
            refused.release()
            return failing(status, "out of memory")(body)
        if "4?" in seen(body):
            begun.set()
            for _ in range(tries):
                assert refused.acquire(timeout=60)
            time.sleep(1)
        return 200, {}, completion(seen(body))

    server.does = does
    arguments = options(server, rows, tmp_path / "kept", "--server_requests", "2")
    remedy = f"It was asked {RETRIES + 1} times" if tries > 1 else "The server refuses the request itself"
    with pytest.raises(SystemExit, match=rf"{server.url} answered status {status} \(.*out of memory.*\)\. {remedy}"):
        main(arguments)
    assert sum("3?" in seen(body) for body in server.asked) == tries
    (kept,) = (tmp_path / "kept").glob(".local-*/0.jsonl")
    before = kept.read_text().count("\n")
    assert before == 4 < COUNT - 1  # the last image was not asked about any more
    server.does = None
    server.asked.clear()
    main(arguments)
    assert len(server.asked) == COUNT - before
    assert (tmp_path / "kept/local.json").read_bytes() == (whole / "local.json").read_bytes()


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (failing(400, "tiny is no multimodal model"), r"status 400 \(.*no multimodal model.*takes no images, ask with --question_only"),
        (failing(404, "no model tiny"), r"status 404 \(.*no model tiny.*mostly in /v1.* It lists tiny"),
        (failing(401, "key?"), r"status 401 \(.*key\?.*OPENAI_API_KEY"),
        (lambda body: (200, {"Content-Type": "text/html"}, b"<html>hello"), "answered status 200, but no chat completion"),
        (lambda body: (200, {}, b'{"choices": []}'), "answered status 200, but no chat completion"),
        (lambda body: (200, {}, b'{"choi'), "answered status 200, but no chat completion"),
        (lambda body: (200, {}, completion(None)), r"without a text \(it ended by 'stop'\).*more --max_new_tokens than 9"),
    ],
)  # fmt: skip
def test_a_sentence_says_what_a_server_did_wrong(does, message, server, rows, tmp_path):
    server.does = does
    with pytest.raises(SystemExit, match=f"{re.escape(server.url)} .*{message}.*What was answered is kept"):
        main(options(server, rows, tmp_path, "--server_requests", "1"))
    assert len(server.asked) == 1 and not (tmp_path / "local.json").exists()


def test_a_model_that_is_not_there_is_named_before_anything_is_asked(server, rows, tmp_path):
    for models, more, message in (
        (["tiny"], ["--server_model", "large"], "has no model 'large', but 'tiny': name that"),
        (["a", "b"], [], "lists a, b. Name one with --server_model"),
        (None, [], "lists no model. Name one with --server_model"),
    ):
        server.models = models
        with pytest.raises(SystemExit, match=f"{re.escape(server.url)} {message}"):
            main(options(server, rows, tmp_path, *more))
    assert not server.asked and not list(tmp_path.iterdir())
    for models, name in ((None, "any"), (["a", "b"], "c")):  # servers that may have others than they list
        server.models = models
        main(options(server, rows, tmp_path / name, "--server_model", name))
        assert server.asked[-1]["model"] == name


def test_an_address_without_a_server_is_named(rows, tmp_path):
    with scripted() as server:
        pass
    with pytest.raises(SystemExit, match=rf"{server.url} was asked {FIRST_RETRIES + 1} times and did not answer"):
        main(options(server, rows, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "localhost:8000"], "'localhost:8000' is no address. Give one such as http://"),
        (["--server", "URL", "--server_requests", "0"], "--server_requests 0: at least one"),
        (["--server", "URL", "--num_beams", "3", "--dtype", "fp32"], "leave out --dtype and --num_beams"),
        (["CHECKPOINT", "--server", "URL"], "leave out the checkpoint"),
        (["CHECKPOINT", "--server_model", "a"], "--server_model is the model of a --server"),
    ],
)
def test_options_that_a_server_does_not_take_are_named(arguments, message, checkpoint, server, rows, tmp_path):
    known = {"URL": server.url, "CHECKPOINT": str(checkpoint)}
    given = [known.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main([*given, "--task", "local", "--data", str(rows), "--output_dir", str(tmp_path)])


def test_what_a_server_cannot_tell_is_said(server, rows, tmp_path):
    given = ["--server", server.url, "--task", "text_perplexity", "--data", str(rows), "--output_dir", str(tmp_path)]
    with pytest.raises(
        SystemExit, match="text_perplexity needs the likelihood of a given text, which a server does not"
    ):
        main(given)
