"""Pictures as they come from the wild: each kind is read as it should look, or refused by name."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from alignvlm.data import images
from alignvlm.data.images import BadImage, inside, read_image
from alignvlm.rows.collator import AlignVLMCollator
from tests.records import of_exchanges


RED, GREEN = (200, 30, 30), (30, 160, 60)


def halves(size=(8, 8), mode="RGB") -> Image.Image:
    """The left half red, the right half green."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def assert_halves(image: Image.Image, tolerance: int = 12):
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[:, : image.width // 2 - 1] - RED).max() <= tolerance
    assert np.abs(pixels[:, image.width // 2 + 1 :] - GREEN).max() <= tolerance


def rotated() -> dict:
    """Stored lying on its side, with the EXIF note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    return encoded(halves().rotate(90, expand=True), "PNG", exif=exif)


def animated() -> dict:
    return encoded(halves((64, 64)), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), "white")])


def palette_with_transparency() -> dict:
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    image = image.quantize(8)
    return encoded(image, "PNG")


@pytest.mark.parametrize(
    "value",
    [
        encoded(halves((64, 64), "CMYK"), "JPEG", quality=98),
        encoded(halves((64, 64), "CMYK"), "TIFF"),
        encoded(halves(), "PNG"),
        encoded(halves().quantize(16), "PNG"),
        encoded(halves(mode="RGBA"), "WEBP", lossless=True),
        rotated(),
        animated(),
        halves(),
    ],
    ids=["cmyk jpeg", "cmyk tiff", "rgb", "palette", "webp", "exif", "animated", "in memory"],
)
def test_colours_and_orientation_survive(value):
    assert_halves(read_image(value), tolerance=45)


def test_transparency_is_laid_on_white_and_sixteen_bits_are_scaled():
    pixels = np.asarray(read_image(palette_with_transparency())).astype(int)
    assert np.abs(pixels[:, :4] - RED).max() <= 8 and (pixels[:, 4:] == 255).all()
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(read_image(encoded(grey, "PNG")))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 50), (50, 3), (1, 3), (3, 1)])
def test_thin_images_are_not_mistaken_for_channels(processor, size):
    """An array of shape (1, N, 3) could be taken for one channel of N x 3; the picture's mean colour would tell."""
    record = of_exchanges([Image.new("RGB", size, RED)], [("What?", "red")])
    pixels = AlignVLMCollator(processor)([record])["pixel_values"][0]
    expected = (np.array(RED) / 255 - 0.5) / 0.5
    assert np.abs(pixels.mean((1, 2)).numpy() - expected).max() < 0.01


def big_png(width: int, height: int) -> dict:
    """A valid PNG of one grey value: small as a file whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    line = bytes([0]) + bytes([128]) * width
    data = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return {
        "bytes": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""),
        "path": None,
    }


def test_fifty_megapixels_pass_and_a_decompression_bomb_does_not():
    assert read_image(big_png(10_000, 5_000)).size == (10_000, 5_000)
    jpeg = read_image(encoded(halves((9_000, 5_600)), "JPEG"))
    assert min(jpeg.size) >= images.DRAFT_SIDE and max(jpeg.size) < 9_000  # decoded at reduced scale
    assert_halves(jpeg)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(BadImage, match="10000 x 10000 pixels, more than"),
    ):
        read_image(big_png(10_000, 10_000))
    with pytest.raises(BadImage, match="decompression bomb"):
        read_image(big_png(20_000, 20_000))


BAD = {
    "corrupt": b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
    "not an image": b"<html>404</html>",
    "empty": b"",
    "truncated png": encoded(halves((200, 200)), "PNG", compress_level=0)["bytes"][:5000],
    "truncated jpeg": encoded(halves((200, 200)), "JPEG", quality=98)["bytes"][:900],
    "truncated gif": animated()["bytes"][:40],
    "truncated tiff": encoded(halves((64, 64)), "TIFF")["bytes"][:300],
    "truncated webp": encoded(Image.effect_noise((64, 64), 50), "WEBP", lossless=True)["bytes"][:500],
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_files_are_refused_by_name(kind, tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(BAD[kind])
    with pytest.raises(BadImage, match=r"photo\.jpg: (?!.* object at )"):
        read_image(file)
    with pytest.raises(BadImage):
        read_image({"bytes": BAD[kind], "path": None})


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_damage_anywhere_in_a_file_is_a_bad_image_or_an_image_and_nothing_else():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = bytearray(encoded(halves((32, 32)), kind)["bytes"])
        for _ in range(60):
            damaged = whole.copy()
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(256)
            part = {"bytes": bytes(damaged[: rng.integers(1, len(damaged) + 1)]), "path": None}
            with contextlib.suppress(BadImage):
                assert read_image(part).mode == "RGB"


def test_missing_files_and_paths_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    halves().save(tmp_path / "secret.png")
    halves().save(folder / "a.png")
    assert read_image({"bytes": None, "path": "a.png", "folder": str(folder)}).size == (8, 8)
    with pytest.raises(BadImage, match=r"missing\.png"):
        read_image({"bytes": None, "path": "missing.png", "folder": str(folder)})
    for path in ("../secret.png", str(tmp_path / "secret.png"), "sub/../../secret.png", "."):
        with pytest.raises(BadImage, match="leads out of the folder"):
            read_image({"bytes": None, "path": path, "folder": str(folder)})
    with pytest.raises(BadImage, match="neither bytes nor a path"):
        read_image({"bytes": None, "path": None})


@pytest.mark.parametrize("folder", [".", "./photos", "photos/..", "/"])
def test_paths_may_start_at_the_current_folder(folder):
    """A data file that lies there has the folder `.`."""
    assert inside(folder, "sub/../a.png") == os.path.normpath(os.path.join(folder, "a.png"))
    for path in ("../a.png", "..", "."):
        with pytest.raises(BadImage, match="leads out of the folder"):
            inside(folder, path)
    with pytest.raises(BadImage, match="is absolute" if folder == "/" else "leads out of the folder"):
        inside(folder, "/a.png")


def test_an_absolute_path_within_the_folder_is_told_how_to_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "."):
        for path in (f"{tmp_path}/sub/a.png", f"{tmp_path}/b/../sub/a.png"):
            with pytest.raises(
                BadImage, match=r"is absolute\. Write it as it starts from the folder .*: 'sub/a\.png'"
            ):
                inside(folder, path)
    for path in (f"{tmp_path}/../a.png", f"{tmp_path}-2/a.png"):
        with pytest.raises(BadImage, match="leads out of the folder"):
            inside(tmp_path, path)
