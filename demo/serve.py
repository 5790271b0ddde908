"""`transformers serve` for AlignVLM checkpoints: an OpenAI-compatible server on this machine.

    python demo/serve.py user/my-alignvlm --port 8000      # or a checkpoint folder; all options of `transformers serve`

The command itself (transformers 5.23, 5.24) serves only classes it has by name, with `--trust-remote-code` too, and opens every path
and address that a message names. This tells it of our classes, serves one checkpoint at the addresses in `SERVED`, and lets only
through what `visitors.py` has checked; then it is that command. The code is this package's, not the repository's.
"""

import argparse
import asyncio
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.cli.serving import model_manager, server
from transformers.cli.serving.utils import BaseHandler, GenerateManager
from transformers.cli.transformers import main as transformers_command
from transformers.models.auto import modeling_auto
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python demo/serve.py`

from alignvlm.evaluation.answer import context_of
from demo.visitors import QUESTIONS, Limits, check_request, messages_with_images
from modeling_alignvlm import AlignVLMForConditionalGeneration


logger = logging.get_logger("transformers.alignvlm")
build_server = server.build_server
# The others of `transformers serve` load any model that a visitor names, unload this one, or open what a message names.
SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
COLDEST = 1e-5  # A temperature below it is 0: logits divided by it could be infinite.


class Gate:
    """ASGI middleware: lets a request through if the server has its address and room for it, and if its body is small enough."""

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
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def again():
                return next(messages, None) or await receive()

            await self.app(scope, again, send)
        except TimeoutError:
            await refuse(send, 408, f"The request did not arrive within {self.limits.request_seconds:g} seconds.")
        finally:
            self.open -= 1

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
    for handler, asks in zip(handlers.values(), QUESTIONS):
        handler.handle_request = checked(handler.handle_request, limits, asks)
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


def with_room(generate):
    """A manager's method that refuses a prompt that leaves the model no room for the answer, and draws with the request's seed. It also hands
    on the tokenizer: `transformers serve` gives `generate` the processor, which knows nothing of `stop` texts."""

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
        return generate(self, model, getattr(processor, "tokenizer", processor), inputs, gen_config, *args, **kwargs)

    return checked_generate


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
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
    p.add_argument("--max_image_mb", type=int, default=20, help="The most megabytes of an image. Default: 20.")
    p.add_argument("--max_new_tokens", type=int, default=1024, help="The longest answer. Default: 1024.")
    p.add_argument("--max_requests", type=int, default=16, help="Requests held at a time. Default: 16.")
    return p


def main() -> None:
    options, rest = parser().parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(parser().format_help())
    limits = replace(
        Limits(),
        url_images=options.allow_url_images,
        image_bytes=options.max_image_mb << 20,
        request_bytes=max(32, 2 * options.max_image_mb) << 20,
        new_tokens=options.max_new_tokens,
        requests=options.max_requests,
    )
    name = AlignVLMForConditionalGeneration.__name__
    setattr(model_manager.transformers, name, AlignVLMForConditionalGeneration)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["alignvlm"] = name
    server.build_server = functools.partial(build_checked_server, limits)
    BaseHandler.get_processor_inputs_from_messages = staticmethod(
        lambda messages, modality: messages_with_images(messages)
    )
    GenerateManager.generate_streaming = with_room(GenerateManager.generate_streaming)
    GenerateManager.generate_non_streaming = with_room(GenerateManager.generate_non_streaming)
    sys.argv = ["transformers", "serve", *rest]
    transformers_command()


if __name__ == "__main__":
    main()
