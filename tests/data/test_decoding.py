"""What encoded images become, and that `prepare` takes what is decoded later; more is in `test_views.py`, where they are seen."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concentration.data.decoding import UNDECODABLE, decode_shrunk
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
