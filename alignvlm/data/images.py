"""Decodes images from files, bytes or memory to upright RGB, and refuses what cannot or should not be decoded."""

import hashlib
import io
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from modeling_alignvlm import to_rgb


MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb; a phone's 50 megapixels pass
DRAFT_SIDE = 2048  # a JPEG more than twice as large is decoded at reduced scale, which is all an encoder will see

EXIF_ORIENTATION = 0x0112  # a tag whose values from 5 on turn an image by a quarter

SENT_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none for which Pillow starts a program


class BadImage(ValueError):
    """An image that cannot be read; the message names it."""


def inside(folder: str | os.PathLike, path: str) -> str:
    """Returns the path of an image below `folder`.

    Raises:
        BadImage: if `path` is absolute or leads out of the folder.
    """
    relative = os.path.normpath(path)
    if os.path.isabs(path) and Path(relative).is_relative_to(os.path.abspath(folder)):
        below = os.path.relpath(relative, os.path.abspath(folder))
        raise BadImage(
            f"The image path {path!r} is absolute. Write it as it starts from the folder {folder}: {below!r}."
        )
    if os.path.isabs(path) or relative.split(os.sep)[0] in (os.curdir, os.pardir):
        raise BadImage(f"The image path {path!r} leads out of the folder {folder}.")
    return os.path.normpath(os.path.join(folder, relative))


def read_image(value: Image.Image | dict | str | os.PathLike) -> Image.Image:
    """Decodes one image to upright RGB: see `modeling_alignvlm.to_rgb` for rotation, transparency, grey values and animations.

    Args:
        value: a PIL image, a path, or `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives it. The dict may also
            hold `"folder"`, below which `path` must lie.

    Raises:
        BadImage: if the file is missing, empty, damaged or truncated, leads out of its folder, or has more than
            `MAX_PIXELS` pixels.
    """
    if not isinstance(value, (Image.Image, dict)):
        value = {"bytes": None, "path": None if value is None else os.fspath(value)}
    name = describe_image(value)
    try:
        if isinstance(value, dict):
            value = _open(value)
        if value.width * value.height > MAX_PIXELS:
            raise BadImage(
                f"{name} has {value.width} x {value.height} pixels, more than the {MAX_PIXELS:,} that are decoded."
            )
        if value.format == "JPEG" and min(value.size) > 2 * DRAFT_SIDE:
            value.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))
        return to_rgb(value)
    except BadImage:
        raise
    # Pillow's decoders raise what their format's parser happens to raise on damaged data.
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from error


def image_size(value: Image.Image | dict | str | os.PathLike) -> tuple[int, int]:
    """Returns height and width of what `read_image` makes of an image, from its header alone (of a JPEG that is decoded at reduced scale
    those of the file).

    Raises:
        BadImage: if there is no such file, it leads out of its folder, or it is no image.
    """
    if not isinstance(value, Image.Image | dict):
        value = {"bytes": None, "path": None if value is None else os.fspath(value)}
    try:
        image = _open(value) if isinstance(value, dict) else value
        # Of a TIFF Pillow gives the size that it has when it is turned.
        turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise _unreadable(describe_image(value), error) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _unreadable(name: str, error: Exception) -> BadImage:
    is_windows_path = isinstance(error, FileNotFoundError) and "\\" in name and os.sep == "/"
    return BadImage(f"Cannot read {name}: {error}" + ("; write / between folders, not \\" if is_windows_path else ""))


def read_sent_image(content: bytes) -> Image.Image:
    """Decodes the bytes that a stranger sent, as `read_image` does, if they are of a format in `SENT_FORMATS`.

    Raises:
        BadImage: as for `read_image`, and for any other format.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[name for name in SENT_FORMATS if name in Image.OPEN])
    except Exception as error:  # of a format's parser
        raise BadImage(f"Cannot read the image: it is none of {', '.join(SENT_FORMATS)}, or it is damaged.") from error
    return read_image(image)


def image_hash(value: Image.Image | dict | str | os.PathLike) -> str:
    """Returns a hash of an image's content: of a file's bytes, undecoded, or of the pixels of an image in memory.

    Raises:
        BadImage: if the file is missing or leads out of its folder, or if an image in memory cannot be read. That a file has a key does
            not mean that it can be decoded.
    """
    if isinstance(value, Image.Image):
        image = read_image(value)
        content = b"%d x %d RGB" % image.size + image.tobytes()
    else:
        if not isinstance(value, dict):
            value = {"bytes": None, "path": None if value is None else os.fspath(value)}
        try:
            content = _content(value)
        except OSError as error:
            raise _unreadable(describe_image(value), error) from error
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def describe_image(value: Image.Image | dict) -> str:
    """Returns a name for messages: the path, or that there is none."""
    path = getattr(value, "filename", None) if isinstance(value, Image.Image) else value.get("path")
    return f"the image {path}" if path else "an image without a path"


def _open(value: dict) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_content(value)))
    except UnidentifiedImageError as error:  # whose text names an object in memory
        raise ValueError("it is of no format that Pillow knows, or damaged") from error


def _content(value: dict) -> bytes:
    if value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path")
    if path is None:
        raise BadImage("A record has an image with neither bytes nor a path.")
    if value.get("folder") is not None:
        path = inside(value["folder"], path)
    return Path(path).read_bytes()
