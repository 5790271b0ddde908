"""`transformers serve` for AlignVLM checkpoints: an OpenAI-compatible server on this machine.

    python demo/serve.py user/my-alignvlm --port 8000      # or a checkpoint folder; all options of `transformers serve`

The command itself (transformers 5.23, 5.24) serves only classes it has by name, with `--trust-remote-code` too, and opens every path
and address that a message names. This tells it of our classes, loads one checkpoint as `alignvlm ask` does (`Manager`), serves it at the
addresses in `SERVED`, and lets only through what `visitors.py` has checked; then it is that command. The code is this package's, not the
repository's.
"""

import argparse
import asyncio
import functools
import json
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.cli.serving import model_manager, server, utils
from transformers.cli.transformers import main as transformers_command
from transformers.models.auto import modeling_auto
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python demo/serve.py`

from alignvlm.evaluation.answer import context_of
from alignvlm.evaluation.load import LORA_FILES, check_checkpoint, check_image_token, evaluation_tag, load_weights
from alignvlm.stages.lora import merge_saved_lora
from alignvlm.tools.demo_model import StopWhen
from demo.visitors import QUESTIONS, Limits, check_request, messages_with_images, with_source_tag
from hub_upload.command_line import ArgumentParser, check_address, port, positive, run
from hub_upload.repository import file_of
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


logger = logging.get_logger("transformers.alignvlm")
build_server = server.build_server
# The others of `transformers serve` load any model that a visitor names, unload this one, or open what a message names.
SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
COLDEST = 1e-5  # A temperature below it is 0: logits divided by it could be infinite.
CONTINUED = "/v1/completions"  # Here a text is continued, without a chat template; its first space belongs to it.


@dataclass(frozen=True)
class Visit:
    """The request under way.

    Args:
        path: the address it asks.
        left: set when the visitor has gone, or has the complete answer.
    """

    path: str
    left: threading.Event


VISIT: ContextVar[Visit] = ContextVar("VISIT")


class Gate:
    """ASGI middleware: lets a request through if the server has its address and room for it, and if its body is small enough. Watches
    whether the visitor is still there, which transformers does only while it streams."""

    def __init__(self, app, limits: Limits):
        self.app, self.limits, self.open = app, limits, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] not in SERVED:
            served = ", ".join(SERVED)
            return await refuse(send, 404, f"This server has no {scope['path']:.100}, only {served}.")
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.open >= self.limits.requests:
            return await refuse(send, 503, f"The server is busy with {self.open} requests. Try again in a moment.")
        self.open += 1
        try:
            body = await asyncio.wait_for(self.read(receive), self.limits.request_seconds)
            if body is None:
                most = self.limits.request_bytes
                return await refuse(send, 413, f"The request has more than {most:,} bytes. Make its images smaller.")
            await self.answer(body, scope, receive, send)
        except TimeoutError:
            await refuse(send, 408, f"The request did not arrive within {self.limits.request_seconds:g} seconds.")
        finally:
            self.open -= 1

    async def answer(self, body: bytes, scope, receive, send) -> None:
        """Hands on a request that has been read; `VISIT` tells those behind whether its visitor is still there."""
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        visit = Visit(scope["path"], threading.Event())
        VISIT.set(visit)

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            visit.left.set()

        watching = asyncio.create_task(watch())

        async def again():
            if message := next(messages, None):
                return message
            await asyncio.wait([watching])
            return {"type": "http.disconnect"}

        try:
            await self.app(scope, again, send)
        finally:
            watching.cancel()

    async def read(self, receive) -> bytes | None:
        """Returns the body of a request; None if it is too large."""
        content = bytearray()
        while True:
            message = await receive()
            content += message.get("body", b"")
            if len(content) > self.limits.request_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body"):
                return bytes(content)


def explained(status: int, sentence: str) -> dict:
    """The body of an answer with this status, in the form from which OpenAI's clients show the sentence."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}


async def refuse(send, status: int, sentence: str) -> None:
    """Answers a request with a sentence, as JSON."""
    body = json.dumps(explained(status, sentence)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def checked(handle_request, limits: Limits, asks: str):
    """A handler that gets only requests that pass `check_request`, with decoded images."""

    @functools.wraps(handle_request)
    async def handle(body: dict, request_id: str):
        body = await asyncio.to_thread(check_request, body, limits, asks)
        return await handle_request(body, request_id)

    return handle


def sampled(build_generation_config):
    """A handler's method that samples if a request has a temperature, `top_p` or a seed, and is greedy at temperature 0. `transformers serve`
    sets these numbers and leaves `do_sample` off. The config holds the seed for `with_room`."""

    @functools.wraps(build_generation_config)
    def build(body: dict, *args, **kwargs):
        greedy = body.get("temperature", 1) < COLDEST
        left_out = ("temperature", "top_p", "seed") if greedy else ("seed",)
        fields = {name: value for name, value in body.items() if name not in left_out}
        config = build_generation_config(fields, *args, **kwargs)
        if greedy:
            config.do_sample = False
        elif {"temperature", "top_p", "seed"} & body.keys():
            config.do_sample = True
        config.seed = body.get("seed")
        return config

    return build


def build_checked_server(limits: Limits, manager, chat_handler, completion_handler, response_handler, **others):
    """The application of `transformers serve` behind the gate. A `ValueError` (a damaged image, a typed placeholder, a part of a
    message that has no place) is answered with status 400 and its sentence instead of a bare 500."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse  # the command has said by now what to install if it is missing
    from starlette.exceptions import HTTPException

    name = manager.force_model
    if name is None:
        raise SystemExit("error: name the checkpoint to serve: python demo/serve.py CHECKPOINT [options]")
    handlers = {
        "chat_handler": chat_handler,
        "completion_handler": completion_handler,
        "response_handler": response_handler,
    }
    tag = evaluation_tag(*parts_of(name))
    for handler, asks in zip(handlers.values(), QUESTIONS):
        handler.handle_request = checked(handler.handle_request, limits, asks)
        handler.get_processor_inputs_from_messages = lambda messages, modality: with_source_tag(
            tag, messages_with_images(messages)
        )
        handler._build_generation_config = sampled(handler._build_generation_config)
    app = build_server(manager, **handlers, **others)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != "/v1/models"]

    @app.get("/v1/models")
    def list_models() -> dict:
        """The one model; transformers lists all that this machine has ever downloaded."""
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": ""}]}

    @app.exception_handler(ValueError)
    async def explain(request, error: ValueError) -> JSONResponse:
        logger.warning(f"Refused {request.method} {request.url.path}: {error}", exc_info=error)
        return JSONResponse(explained(400, str(error)), status_code=400)

    @app.exception_handler(HTTPException)
    async def reword(request, error: HTTPException) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code  # as OpenAI answers an unknown field
        return JSONResponse(explained(status, str(error.detail)), status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_body(request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        reason = found.get("ctx", {}).get("error", found["msg"])
        sentence = f"The body is no JSON object ({reason}). Send one, with the header Content-Type: application/json."
        return JSONResponse(explained(400, sentence), status_code=400)

    app.add_middleware(Gate, limits=limits)
    return app


def parts_of(name: str) -> tuple[str, str | None]:
    """Returns checkpoint and revision of a model as `transformers serve` names it, such as `user/my-alignvlm@main`."""
    path = name.removesuffix("@main")  # which it appends to a name without "@"
    if Path(path).is_dir():
        return path, None
    checkpoint, _, revision = name.partition("@")
    return checkpoint, None if revision in ("", "main") else revision


class Manager(model_manager.ModelManager):
    """Loads one of our checkpoints, complete and with its LoRA weights, or says why not as `alignvlm ask` does. transformers draws weights
    that are missing at random, and knows nothing of LoRA weights that a stage has saved apart (`lora/`)."""

    def _load_processor(self, model_id_and_revision: str, **_):
        checkpoint, revision = parts_of(model_id_and_revision)
        check_checkpoint(checkpoint, revision)
        processor = AlignVLMProcessor.from_pretrained(checkpoint, revision=revision)
        check_image_token(checkpoint, AlignVLMConfig.from_pretrained(checkpoint, revision=revision), processor)
        return processor

    def _load_model(self, model_id_and_revision: str, **_):
        checkpoint, revision = parts_of(model_id_and_revision)
        apart = all(file_of(checkpoint, f"lora/{name}", revision) for name in LORA_FILES)
        if apart and self.quantization:
            raise ValueError(
                f"--quantization {self.quantization}: the LoRA weights of {checkpoint!r} lie apart, and cannot be added to rounded weights. Merge "
                f"them first: python -m hub_upload.package {checkpoint} OUT"
            )
        options = {
            "revision": revision,
            "attn_implementation": self.attn_implementation,
            "dtype": self.dtype,
            "device_map": self.device,
            "quantization_config": self.get_quantization_config(),
        }
        model = load_weights(AlignVLMForConditionalGeneration, checkpoint, **options)
        if apart:
            merge_saved_lora(model, checkpoint, revision)
        return model


class Streamer(utils.DirectStreamer):
    """Streams an answer without the white space around it, which no answer in the training data has; a text that is continued keeps it."""

    def __init__(self, *args, **kwargs):
        self.begun, self.space = False, ""
        self.keeps_space = VISIT.get().path == CONTINUED
        super().__init__(*args, **kwargs)

    def _enqueue(self, item) -> None:
        if isinstance(item, str) and not self.keeps_space:
            text = self.space + item if self.begun else item.lstrip()
            item = text.rstrip()
            self.begun, self.space = self.begun or bool(item), text[len(item) :]
            if not item:
                return
        super()._enqueue(item)


def stripped(generate_non_streaming):
    """A manager's method whose answers have no white space around them, as `Streamer`'s."""

    @functools.wraps(generate_non_streaming)
    async def generate(*args, **kwargs):
        text, *others = await generate_non_streaming(*args, **kwargs)
        return (text if VISIT.get().path == CONTINUED else text.strip(), *others)

    return generate


def with_room(generate):
    """A manager's method that refuses a prompt that leaves the model no room for the answer, draws with the request's seed, and stops when the
    visitor has gone. It also hands on the tokenizer: `transformers serve` gives `generate` the processor, which knows nothing of `stop` texts."""

    @functools.wraps(generate)
    def checked_generate(self, model, processor, inputs, gen_config, *args, **kwargs):
        length = inputs["input_ids"].shape[-1]
        most = context_of(model)
        if most is not None and length + 1 > most:
            raise ValueError(
                f"The conversation has {length} tokens; the model takes {most} with its answer. Shorten it."
            )
        if most is not None:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, most - length)
        seed = vars(gen_config).pop("seed")
        if gen_config.do_sample:
            # In the thread that generates, directly before it does: so no other request draws in between.
            self.submit(*((torch.seed,) if seed is None else (torch.manual_seed, seed)))
        inputs = {**inputs, "stopping_criteria": [StopWhen(VISIT.get().left)]}
        return generate(self, model, getattr(processor, "tokenizer", processor), inputs, gen_config, *args, **kwargs)

    return checked_generate


class Parser(argparse.ArgumentParser):
    """Leaves options that it does not know to `transformers serve`, and tells a mistake in one sentence."""

    error = ArgumentParser.error


def parser() -> argparse.ArgumentParser:
    p = Parser(
        description="Limits on what a visitor may send, beside all options of `transformers serve`:",
        usage="python demo/serve.py CHECKPOINT [options]",
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument(
        "--allow_url_images",
        action="store_true",
        help="Fetch images from http(s) addresses, if public. Default: only data: URIs.",
    )
    p.add_argument("--max_image_mb", type=positive, default=20, help="The most megabytes of an image. Default: 20.")
    p.add_argument("--max_new_tokens", type=positive, default=1024, help="The longest answer. Default: 1024.")
    p.add_argument("--max_requests", type=positive, default=16, help="Requests held at a time. Default: 16.")
    p.add_argument("--host", default="localhost", help="The address to listen on. Default: localhost.")
    p.add_argument("--port", type=port, default=8000, help="The port to listen on. Default: 8000.")
    return p


def main(argv: list[str] | None = None) -> None:
    """Serves until it is interrupted; a checkpoint that cannot be loaded ends the program with one sentence."""
    options, rest = parser().parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(parser().format_help())
    else:
        check_address(options.host, options.port)
    limits = replace(
        Limits(),
        url_images=options.allow_url_images,
        image_bytes=options.max_image_mb << 20,
        request_bytes=max(32, 2 * options.max_image_mb) << 20,
        new_tokens=options.max_new_tokens,
        requests=options.max_requests,
    )
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["alignvlm"] = AlignVLMForConditionalGeneration.__name__
    model_manager.ModelManager = Manager
    server.build_server = functools.partial(build_checked_server, limits)
    utils.DirectStreamer = Streamer
    manager = utils.GenerateManager
    manager.generate_streaming = with_room(manager.generate_streaming)
    manager.generate_non_streaming = with_room(stripped(manager.generate_non_streaming))
    sys.argv = ["transformers", "serve", "--host", options.host, "--port", str(options.port), *rest]
    try:
        transformers_command()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run(main)
