"""What encoded images become, and that `prepare` takes what is decoded later; more is in `test_views.py`, where they are seen."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concentration.data.decoding import UNDECODABLE, decode_shrunk, describe_undecodable
from concentration.data.sources.image_files import read_image_file
from concentration.data.views import CentreView, decode_view
from concentration.errors import DataError

PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_of(tags: dict[int, object]) -> bytes:
    exif = Image.Exif()
    exif.update(tags)
    return exif.tobytes()


ROTATED = exif_of({0x0112: 6, 0x0100: 48, 0x011A: 72.0, 0x0128: 2, 0x010F: "maker"})
GARBAGE = {
    "noise": b"Exif\0\0" + np.random.default_rng(1).bytes(40),
    "no header": b"garbage!!!",
    "half a header": b"Exif\0\0MM\0*",
    "cut": ROTATED[:16],
    # A resolution of which Pillow gives up the whole JPEG.
    "a letter for a number": ROTATED.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"),
}


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_garbage_in_place_of_exif_is_no_orientation(kind, format, tmp_path):
    plain = encode(PICTURE, format)
    content = encode(PICTURE, format, exif=GARBAGE[kind])
    path = tmp_path / f"1.{format}"
    path.write_bytes(content)
    assert read_image_file(path) == (format, content)
    expected = np.asarray(decode_shrunk(plain, 24))
    if kind == "a letter for a number":  # the rest of it may be read
        turned = np.rot90(expected, -1)
        assert any(np.array_equal(decode_shrunk(content, 24), pixels) for pixels in (expected, turned))
    else:
        np.testing.assert_array_equal(decode_shrunk(content, 24), expected)
    assert decode_view(content, CentreView(), 0, 8)[0].shape == (3, 8, 8)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_what_passes_prepare_is_decoded_later_and_what_does_not_is_not(format, tmp_path):
    """Of a thousand damaged files."""
    path = tmp_path / f"1.{format}"
    content = encode(PICTURE.quantize(16) if format == "png" else PICTURE, format, exif=ROTATED)
    generator = np.random.default_rng(3)
    outcomes = []
    for _ in range(1000):
        damaged = bytearray(content)
        for place in generator.integers(0, min(200, len(content)), generator.integers(1, 4)):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        outcomes.append((is_prepared(path), is_seen(bytes(damaged))))
    assert {(True, True), (False, False)} == set(outcomes)


def draw_transparent(mode: str) -> Image.Image:
    """Black strokes on a transparent background that is as black, as programs save them; half of an edge shows through."""
    opacity = np.zeros((24, 24), dtype=np.uint8)
    opacity[4:20, 8:12], opacity[4:20, 12] = 255, 128
    image = Image.fromarray(np.dstack([np.zeros((24, 24, 3), dtype=np.uint8), opacity]), "RGBA")
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "png"), ("RGBA", "webp"), ("LA", "png")])
def test_what_is_transparent_lies_on_white(mode, format):
    content = encode(draw_transparent(mode), format, **({"lossless": True} if format == "webp" else {}))
    expected = 255 - np.asarray(draw_transparent(mode).getchannel("A"))
    for channel in decode_view(content, CentreView(), 0, 24)[0]:
        np.testing.assert_array_equal(channel, expected)
    np.testing.assert_array_equal(np.asarray(decode_shrunk(content, 24)), expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(("mode", "format"), [("P", "png"), ("L", "png"), ("RGB", "png"), ("P", "gif")])
def test_a_colour_that_means_transparent_is_white(mode, format):
    """The background's, black, and strokes are of another dark colour."""
    pixels = np.zeros((24, 24, 3), dtype=np.uint8)
    pixels[4:20, 8:12] = 9
    image = Image.fromarray(pixels)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    background = image.getpixel((0, 0))
    view = decode_view(encode(image, format, transparency=background), CentreView(), 0, 24)[0]
    np.testing.assert_array_equal(view, np.where(pixels == 9, 9, 255).transpose(2, 0, 1))


def write_png(rows: np.ndarray, depth: int, transparent: int, num_channels=1) -> bytes:
    """By hand, since Pillow writes neither colours of 16 bits nor greys of few; the samples of a row fill whole bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    bits = ((rows[..., None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8).reshape(len(rows), -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    kind = 0 if num_channels == 1 else 2
    header = struct.pack(">IIBBBBB", rows.shape[1] // num_channels, len(rows), depth, kind, 0, 0, 0)
    colour = struct.pack(f">{num_channels}H", *[transparent] * num_channels)
    chunks = ((b"IHDR", header), (b"tRNS", colour), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(("depth", "num_channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_a_png_s_transparent_colour_is_white_whatever_its_bits(depth, num_channels):
    """A grey that is neither black nor white where there is one, and whose two bytes differ where it has two."""
    most = 2**depth - 1
    transparent = min(most // 3, 0x32C8)
    rows = np.full((24, 24), most, dtype=np.int64)
    rows[:8], rows[8:16] = transparent, 0
    content = write_png(rows.repeat(num_channels, axis=1), depth, transparent, num_channels)
    expected = np.full((24, 24), 255)
    expected[8:16] = 0 if transparent else 255
    for channel in decode_view(content, CentreView(), 0, 24)[0]:
        np.testing.assert_array_equal(channel, expected)


@pytest.mark.parametrize("size", [(24, 24), (48, 30)])
def test_partly_transparent_pixels_are_between_themselves_and_white(size):
    pixels = np.random.default_rng(8).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    shown = decode_shrunk(encode(Image.fromarray(pixels, "RGBA"), "png"), 1)
    share = pixels[..., 3:] / 255
    expected = share * pixels[..., :3] + (1 - share) * 255
    assert np.abs(np.asarray(shown) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "png"), ("LA", "png"), ("P", "png")])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_of_what_is_opaque_nothing_changes(mode, format):
    """Bit for bit; in the palette the colour that means transparent is not used."""
    image = PICTURE.quantize(16) if mode == "P" else PICTURE.convert(mode)
    content = encode(image, format, **({"transparency": 200} if mode == "P" else {}))
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_shrunk(content, 24)), np.asarray(expected))


def test_what_is_wrong_is_said_without_objects_in_memory_and_on_one_line():
    found = []
    for content in (b"<html>", b"", encode(PICTURE, "png")[:-40], encode(PICTURE, "jpeg")[:300]):
        with pytest.raises(UNDECODABLE) as caught:
            decode_shrunk(content, 1)
        found.append(describe_undecodable(caught.value))
    assert found[:2] == ["cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"] * 2
    assert all(text.startswith("cannot be decoded (") and "object at" not in text for text in found)
    assert describe_undecodable(FileNotFoundError(2, "No such file", "1.png")) == "is missing"
    assert describe_undecodable(PermissionError(13, "Permission denied")) == "cannot be read (Permission denied)"
    assert describe_undecodable(ValueError("one\n two")) == "cannot be decoded (one two)"


def test_of_a_photograph_with_a_preview_the_photograph_is_decoded():
    """An MPO, as some cameras write, is a JPEG with another one behind it, and decoded scaled as any."""
    large = PICTURE.resize((320, 240))
    content = encode(large, "mpo", save_all=True, append_images=[Image.new("RGB", (16, 12))], quality=95)
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert decode_shrunk(content, 30).size == (40, 30)
    alone = encode(large, "jpeg", quality=95)
    np.testing.assert_array_equal(np.asarray(decode_shrunk(content, 30)), np.asarray(decode_shrunk(alone, 30)))


def is_prepared(path: Path) -> bool:
    try:
        read_image_file(path)
    except DataError:
        return False
    return True


def is_seen(content: bytes) -> bool:
    try:
        decode_view(content, CentreView(), 0, 8)
    except UNDECODABLE:
        return False
    return True
