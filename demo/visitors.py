"""What a visitor of the server may send: images as data URIs (addresses only if allowed, and only public ones), within limits.

A request's images are decoded here (`read_images`), so that nothing behind it sees a path or an address.
"""

import base64
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from PIL import Image

from alignvlm.data.images import MAX_PIXELS, read_sent_image
from alignvlm.evaluation.load import with_tag


IMAGE_PARTS = ("image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text")
# What asks, at each of the server's addresses: its types, what to call them, and the field that limits the answer there.
QUESTIONS = {
    "messages": (list, "a list of messages", "max_completion_tokens"),
    "prompt": (str, "a text", "max_tokens"),
    "input": ((str, list), "a text or a list of messages", "max_output_tokens"),
}
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
EFFORTS = ("none", "medium")
# Fields that are taken only with these values, which ask for nothing. The first two would let a visitor write the prompt's template or name
# any option of generation; `transformers serve` takes the others, and does not do what they say.
TAKEN_VALUES = {
    "chat_template_kwargs": (),
    "generation_config": (),
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),  # transformers fails on integers, which OpenAI's clients send
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),  # of /v1/responses: a stored template
    "reasoning": {"effort": EFFORTS},
    "reasoning_effort": EFFORTS,
    "response_format": {"type": ("text",)},
    "suffix": ("",),
    "text": {"format": {"type": ("text",)}, "verbosity": ("medium",)},
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
FLAGS = ("stream", "parallel_tool_calls")
# Of items of /v1/responses that are no messages.
ITEM_FIELDS = {"function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id", "output")}
NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-0.99, 2), "seed": (-(2**63), 2**63 - 1)}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
SHOWN = 100  # characters of an address in a message


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and how many the server holds at a time."""

    request_bytes: int = 32 << 20
    request_seconds: float = 60
    image_bytes: int = 20 << 20
    images: int = 16
    pixels: int = MAX_PIXELS  # of all images of a request
    characters: int = 100_000
    new_tokens: int = 1024
    requests: int = 16
    url_images: bool = False
    url_seconds: float = 10


def is_public(address: str) -> bool:
    """Whether an IP address, as `socket.getaddrinfo` writes it, belongs to the public internet, and so does an IPv4 address inside it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6 and found.ipv4_mapped is not None:
        return is_public(str(found.ipv4_mapped))
    inside = [found.sixtofour, *(found.teredo or ())] if found.version == 6 else []
    return all(
        each.is_global and not each.is_multicast and not each.is_reserved for each in (found, *filter(None, inside))
    )


def fetch(url: str, limit: int, seconds: float, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """Returns what an address holds; connects only to addresses that were checked, and checks each redirect again.

    Args:
        limit: of bytes.
        seconds: for all of it.
        is_allowed: of an IP address.

    Raises:
        ValueError: for any other scheme than http and https, a host one of whose IP addresses is not allowed, an error of the
            network, a status other than 200, and more than `limit` bytes or `seconds`.
    """
    deadline, shown = time.monotonic() + seconds, url[:SHOWN]
    for _ in range(MAX_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as error:
            raise ValueError(f"{shown!r} is no address: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(
                f"The image {shown!r} is not fetched. Give an http:// or https:// address, or a data: URI."
            )
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"Cannot read the image {shown!r}: its host is unknown ({error}).") from error
        if not all(is_allowed(each[4][0]) for each in found):
            raise ValueError(
                f"The image {shown!r} is not fetched: it is not at a public address. Send it as a data: URI."
            )
        content, location = _get(parts, found[0][4][:2], limit, deadline, shown)
        if location is None:
            return content
        url = urljoin(url, location)
    raise ValueError(f"Cannot read the image {shown!r}: it redirects more than {MAX_REDIRECTS} times.")


def _get(parts, address: tuple[str, int], limit: int, deadline: float, shown: str) -> tuple[bytes, str | None]:
    """Makes one request of the server at `address`; returns its content, or where it redirects to."""
    left = deadline - time.monotonic()
    connection = http.client.HTTPConnection(parts.hostname, parts.port or address[1], timeout=max(left, 0.1))
    timer = None
    try:
        plain = socket.create_connection(address, timeout=max(left, 0.1))
        # A server that sends a byte now and then never runs into the socket's timeout.
        timer = threading.Timer(max(left, 0.1), lambda: _shut(plain))
        timer.daemon = True
        timer.start()
        secure = parts.scheme == "https"
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname) if secure else plain
        )
        default_port = address[1] == (443 if secure else 80)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": host if default_port else f"{host}:{address[1]}", "Accept": "image/*"}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status in REDIRECTS and response.headers.get("Location"):
            return b"", response.headers["Location"]
        if response.status != 200:
            raise ValueError(f"Cannot read the image {shown!r}: its server answered {response.status}.")
        content = response.read(limit + 1)
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
        if len(content) > limit:
            raise ValueError(f"The image {shown!r} has more than {limit:,} bytes.")
        return content, None
    except (OSError, http.client.HTTPException) as error:
        slow = time.monotonic() > deadline
        raise ValueError(f"Cannot read the image {shown!r}: {'it took too long' if slow else error}.") from error
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def read_visitors_image(url: str, limits: Limits) -> Image.Image:
    """Decodes an image that a visitor gave as a data: URI or, if allowed, by a public address.

    Raises:
        ValueError: saying what was wrong. No file is opened.
    """
    if url[:5].lower() == "data:":
        found = re.match(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*;base64,", url[:SHOWN], re.IGNORECASE)
        if found is None:
            raise ValueError("An image's data: URI must begin like data:image/png;base64, and go on with base64.")
        if len(url) - found.end() > limits.image_bytes * 4 // 3 + 4:
            raise ValueError(f"An image has more than {limits.image_bytes:,} bytes. Make it smaller.")
        try:
            content = base64.b64decode(unquote_to_bytes(url[found.end() :]), validate=True)
        except ValueError as error:
            raise ValueError(f"Cannot read the image: its data: URI is no base64 ({error}).") from error
    elif limits.url_images:
        content = fetch(url, limits.image_bytes, limits.url_seconds)
    else:
        raise ValueError(
            f"The image {url[:SHOWN]!r} is not fetched: this server takes images as data: URIs only "
            "(data:image/png;base64,...)."
        )
    return read_sent_image(content)


def _parts(items: list | str) -> Iterator[dict]:
    """The parts of all messages of a request, for chat completions and responses."""
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, dict):
            raise ValueError(f"A message is a {type(item).__name__}. Give objects with a role and a content.")
        content = item.get("content")
        if "role" not in item and item.get("type") in (*IMAGE_PARTS, *TEXT_PARTS):  # the short form of /v1/responses
            yield item
        if missing := [name for name in ITEM_FIELDS.get(str(item.get("type")), ()) if name not in item]:
            raise ValueError(f"An item of type {item['type']!r} has no {missing[0]!r}.")
        if item.get("type") == "reasoning" and "role" not in item and content:
            raise ValueError(
                "An item of type 'reasoning' has a content, which this model does not read. Leave it out."
            )
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict):
                raise ValueError(f"A part of a message is a {type(part).__name__}. Give objects with a type.")
            yield part


def check_request(body: dict, limits: Limits, asks: str) -> dict:
    """Checks a request's fields, and decodes its images in place: `image_url` holds a PIL image from then on. Fields that are null or ask for
    nothing are left out, and what a client leaves out becomes OpenAI's default: no stream (`transformers serve` streams responses unasked).

    Args:
        asks: the field of `QUESTIONS` that this address needs.

    Returns:
        The fields that are served.

    Raises:
        ValueError: for whatever is wrong with it.
    """
    body = {name: value for name, value in body.items() if value is not None}
    types, what, max_tokens_field = QUESTIONS[asks]
    if not isinstance(body.get(asks), types) or not body[asks]:
        found = f"is {body[asks]!r:.50}" if asks in body else "is missing"
        raise ValueError(f"{asks!r} {found}. Give {what}.")
    for name in [name for name in TAKEN_VALUES if name in body and name != asks]:
        value = body.pop(name)
        if not _asks_nothing(value, TAKEN_VALUES[name]):
            raise ValueError(f"This server does not take {name!r} with {value!r:.50}. Leave it out.")
    for name in FLAGS:
        if not isinstance(body.get(name, False), bool):
            raise ValueError(f"{name!r} is {body[name]!r:.50}. Give true or false.")
    for name in TOKEN_FIELDS:
        value = body.get(name, 1)
        if not _is_int(value) or not 1 <= value <= limits.new_tokens:
            raise ValueError(f"{name} is {value!r:.50}. Give a number from 1 to {limits.new_tokens}.")
    if not any(name in body for name in TOKEN_FIELDS):
        body[max_tokens_field] = limits.new_tokens
    body.setdefault("stream", False)
    for name, (low, high) in NUMBERS.items():
        value = body.get(name, low)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (name == "seed" and not _is_int(value)):
            raise ValueError(f"{name} is {value!r:.50}. Give a number from {low} to {high}.")
    if body.get("stop") in ("", []):
        del body["stop"]
    texts = body.get("stop", [])
    texts = [texts] if isinstance(texts, str) else texts
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(t, str) and 0 < len(t) < 100 for t in texts)
    ):
        raise ValueError("stop takes one to four texts of less than 100 characters.")
    _check_texts(body, limits)
    parts = list(_parts(body[asks]))
    if "instructions" in body:
        _check_instructions(body["instructions"], body[asks])
    pixels = 0
    images = [part for part in parts if part.get("type") in IMAGE_PARTS]
    if len(images) > limits.images:
        raise ValueError(f"There are {len(images)} images, more than the {limits.images} that are read.")
    for part in images:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise ValueError(f"A part of type {part['type']!r} has no image_url with a data: URI.")
        image = read_visitors_image(url, limits)
        pixels += image.width * image.height
        if pixels > limits.pixels:
            raise ValueError(f"The images have more than {limits.pixels:,} pixels together. Make them smaller.")
        part["image_url"] = image
    return body


def _asks_nothing(value, taken: tuple | dict) -> bool:
    """Whether a field's value is one that is taken; in a mapping, every value that is not null."""
    if isinstance(taken, dict):
        return isinstance(value, dict) and all(
            each is None or _asks_nothing(each, taken.get(name, ())) for name, each in value.items()
        )
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in taken)


def _check_instructions(instructions, messages: list | str) -> None:
    if not isinstance(instructions, str):
        raise ValueError(f"'instructions' is a {type(instructions).__name__}. Give a text.")
    if isinstance(messages, list) and messages[0].get("role") == "system":  # which transformers would drop
        raise ValueError("Give 'instructions' or a message of the system, not both.")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_texts(body: dict, limits: Limits) -> None:
    """Checks all texts of a request but its images' addresses: how long they are together, and that they are texts."""
    length, waiting = 0, [body]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            length += len(each)
            try:
                each.encode()
            except UnicodeEncodeError as error:
                near = each[max(error.start - 20, 0) : error.start + 20]
                raise ValueError(
                    f"The text {near!r} holds half of a character that was cut in two. Remove it."
                ) from error
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            waiting += [item for name, item in each.items() if name != "image_url"]
    if length > limits.characters:
        raise ValueError(f"The texts have {length:,} characters, more than the {limits.characters:,} that are read.")


def messages_with_images(messages: list[dict]) -> list[dict]:
    """OpenAI's messages, whose images `check_request` has decoded, as the processor takes them.

    Raises:
        ValueError: naming a part that has no place in the model, and whatever is not as OpenAI writes it.
    """
    converted = []
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"Message {index} has no role.")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise ValueError(
                f"Message {index} has a {type(content).__name__} as its content. Give a text or a list of parts."
            )
        if content in (None, []) and message["role"] != "assistant":  # whose calls of tools have none
            raise ValueError(f"Message {index} has no content. Give a text or a list of parts.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else []
        for part in content if isinstance(content, list) else []:
            kind = part.get("type")
            if kind in TEXT_PARTS and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind in IMAGE_PARTS and isinstance(part.get("image_url"), Image.Image):
                parts.append({"type": "image", "image": part["image_url"]})
            else:
                types = ", ".join(repr(each.get("type")) for each in content)
                raise ValueError(
                    f"Message {index} has parts of the types {types:.300}, not all of which this model takes. Give 'text' with a text "
                    "and 'image_url' with a data: URI (of /v1/responses: 'input_text' and 'input_image')."
                )
        # Other fields, such as tool_calls, go on to the processor, which refuses what the chat template does not read. Clients send
        # the server's own messages back with fields that are null, and may name who speaks.
        further = {name: value for name, value in message.items() if name not in ("role", "content", "name")}
        further = {name: value for name, value in further.items() if value is not None}
        role = "system" if message["role"] == "developer" else message["role"]  # its name since 2024
        converted.append({**further, "role": role, "content": parts})
        texts = [part for part in parts if part["type"] == "text"]
        if role == "assistant" and texts:  # as the answers in training data
            texts[0]["text"] = texts[0]["text"].lstrip()
            texts[-1]["text"] = texts[-1]["text"].rstrip()
    return converted


def with_source_tag(tag: str, messages: list[dict]) -> list[dict]:
    """The messages that the processor takes, as the checkpoint's recipe wants them at evaluation: with its source tag before the user's first
    text, as in training, unless the visitor has written it there."""
    first = next((message["content"] for message in messages if message["role"] == "user"), None)
    if not tag or first is None:
        return messages
    text = next((part for part in first if part["type"] == "text"), None)
    if text is None:
        first.append({"type": "text", "text": tag})
    elif not f"{text['text']} ".startswith(f"{tag} "):
        text["text"] = with_tag(tag, text["text"])
    return messages
