"""Asks a server that speaks the OpenAI protocol: `transformers serve`, `demo/serve.py`, vLLM's, llama.cpp's.

Images go as PNG in data URIs, so a server gets the very pixels that a local evaluation reads. Each image's questions are asked one
after the other, and several images at once.
"""

import base64
import io
import os
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from alignvlm.data.record import Conversation


# Of a request that met no server, status 408, 409, 429 or 5xx: after 0.5, 1, 2, 4 and 8 s, unless the server says when.
RETRIES = 5
FIRST_RETRIES = 2  # of the first request, before anything has been asked
SHOWN = 300  # characters of what a server says
GIVEN = "What was answered is kept: the same command goes on from there."


class Server:
    """A model behind an address, as an evaluation asks it. `Checkpoint` of `one_task.py` is the same for a model in this process.

    Args:
        url: where the protocol begins, such as `http://localhost:8000/v1`; `/v1` may be left out.
        name: the model's name there; None: the only one that the server lists. A server that lists several may load others on demand.
        requests: asked at once.

    Raises:
        ValueError: if the server does not answer, or does not have the model.
    """

    batch_size = 1  # images: the answers about each are on disk as soon as they are there
    listed: tuple[str, ...] = ()  # models that it says it has
    tag = ""  # the run record, which names a checkpoint's tag, is not served
    measure_choices = None  # the protocol does not tell how likely a given answer is
    processor = None  # nor how many tokens a prompt has

    def __init__(self, url: str, name: str | None = None, requests: int = 8):
        try:
            import openai
        except ImportError as error:
            raise ValueError("--server needs the openai package: pip install 'alignvlm[openai]'.") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--server {url!r} is no address. Give one such as http://localhost:8000/v1.")
        if requests < 1:
            raise ValueError(f"--server_requests {requests}: at least one request must be under way.")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.at_once = requests
        self._openai = openai
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=RETRIES)
        self.listed = self._models()
        if name is None and len(self.listed) != 1:
            what = f"lists {', '.join(self.listed)}" if self.listed else "lists no model"
            raise ValueError(f"{self.url} {what}. Name one with --server_model.")
        if name is not None and len(self.listed) == 1 and name != self.listed[0]:  # it may answer by any name
            raise ValueError(
                f"{self.url} has no model {name!r}, but {self.listed[0]!r}: name that, or leave --server_model out."
            )
        self.name = name or self.listed[0]
        self.identity = {"name": self.name, "server": self.url}
        self.computing: dict = {}
        self.results = Path("results") / self.name.rstrip("/").split("/")[-1]

    def answer(
        self,
        images: list[list[Image.Image]],
        prompts: list[list[list[dict]]],
        num_beams: int,
        max_new_tokens: int,
        **_,
    ) -> list[list[str]]:
        """Answers conversations about images greedily; arguments and result as of `alignvlm.evaluation.answer.answer`.

        Raises:
            ValueError: for an answer that could not be had, naming address, status and remedy.
        """
        found = []
        for shown, group in zip(images, prompts, strict=True):
            uris = [png_uri(image) for image in shown]
            found.append([self._ask(as_openai(messages, uris), max_new_tokens, bool(uris)) for messages in group])
        return found

    def _ask(self, messages: list[dict], max_tokens: int, has_images: bool) -> str:
        given = {"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        try:
            reply: Any = self._client.chat.completions.create(**given)
            choice = reply.choices[0]
            text, why = choice.message.content, choice.finish_reason
        except self._openai.APIError as error:
            raise ValueError(f"{self._explained(error, has_images)} {GIVEN}") from error
        except (JSONDecodeError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.url} answered status 200, but no chat completion ({error}). Is it the address of an OpenAI-compatible server? {GIVEN}"
            ) from error
        if not isinstance(text, str):
            raise ValueError(
                f"{self.url} answered status 200 without a text (it ended by {why!r}). A model that thinks first needs more "
                f"--max_new_tokens than {max_tokens}. {GIVEN}"
            )
        return text.encode(errors="replace").decode().strip()  # half of a pair of surrogates could not be written

    def _models(self) -> tuple[str, ...]:
        """Returns the names of the models that the server lists; none if it has no list."""
        try:
            client = self._client.with_options(max_retries=FIRST_RETRIES)
            return tuple(str(model.id) for model in client.models.list().data)
        except self._openai.NotFoundError:
            return ()
        except self._openai.APIError as error:
            raise ValueError(self._explained(error, has_images=False, tries=FIRST_RETRIES + 1)) from error
        except (JSONDecodeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.url}/models answered status 200, but no list of models ({error}). Is it the address of an OpenAI-compatible server?"
            ) from error

    def _explained(self, error: Exception, has_images: bool, tries: int = RETRIES + 1) -> str:
        """Returns a sentence with the address, the status, what the server said, and what to do."""
        status = getattr(error, "status_code", None)
        said = " ".join(str(getattr(error, "message", error)).split())[:SHOWN]
        if status is None:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            return (
                f"{self.url} was asked {tries} times and did not answer ({said}{cause}). Is the server running there?"
            )
        if status in (401, 403):
            remedy = "Put the server's key into the environment variable OPENAI_API_KEY."
        elif status == 404:
            has = f" It lists {', '.join(self.listed)}." if self.listed else ""
            remedy = f"Does the address end as the server's does, mostly in /v1, and does it have the model?{has}"
        elif status in (408, 409, 429) or status >= 500:
            remedy = f"It was asked {tries} times. Ask fewer at once with --server_requests, or later."
        else:
            remedy = "The server refuses the request itself."
        if has_images and status not in (401, 403, 429):
            remedy += " If its model takes no images, ask with --question_only."
        return f"{self.url} answered status {status} ({said}). {remedy}"


def png_uri(image: Image.Image) -> str:
    """Returns an image, unchanged, as a `data:` address."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def as_openai(messages: Sequence[dict], uris: Sequence[str]) -> list[dict]:
    """Returns messages as OpenAI writes them; their k-th image part shows the k-th of `uris`. Words alone are a text, which every server takes."""
    images = iter(uris)
    found = []
    for message in messages:
        parts = [
            {"type": "image_url", "image_url": {"url": next(images)}}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"]}
            for part in Conversation.parts(message)
        ]
        words = [part["text"] for part in parts if part["type"] == "text"]
        content = words[0] if len(parts) == len(words) == 1 else parts
        found.append({"role": message["role"], "content": content})
    return found
