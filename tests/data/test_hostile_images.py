"""Images that are made to harm: each is decoded as what it shows, or is undecodable, soon and in little memory.

What is damaged by chance is in `test_views.py`.
"""

import io
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
from labelled_shards import encode_labels
from PIL import Image

from concentration.data.decoding import UNDECODABLE, decode_shrunk, open_image
from concentration.data.index import index_shard
from concentration.data.loader import StepBatches
from concentration.data.order import SequentialOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.sources.image_files import read_image_file
from concentration.data.split import Split
from concentration.data.views import CentreView, decode_view

MOST_SECONDS = 5


def look(content: bytes, size: int = 8) -> np.ndarray:
    """The centre view, uint8 (3, size, size)."""
    start = time.monotonic()
    try:
        view = decode_view(content, CentreView(), 0, size)[0]
    finally:
        assert time.monotonic() - start < MOST_SECONDS
    assert view.shape == (3, size, size)
    assert view.dtype == np.uint8
    return view


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    width: int, height: int, rows: bytes, *chunks: bytes, depth: int = 8, color: int = 0, interlace: int = 0
) -> bytes:
    """A PNG by hand: every checksum is right, whatever stands in it. Colour 0 is grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


def replaced(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


SMALL = Image.fromarray(np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8))
JPEG_SIZE = encode(SMALL, "jpeg").find(b"\xff\xc0") + 5
BOMBS = {
    "png 60,000 x 60,000": png(60_000, 60_000, b"", color=2),
    "png of the largest width": png(2**31 - 1, 1, bytes(1000)),
    "gif 65,535 x 65,535": replaced(encode(SMALL, "gif"), 6, struct.pack("<HH", 65_535, 65_535)),
    "jpeg 65,535 x 65,535": replaced(encode(SMALL, "jpeg"), JPEG_SIZE, struct.pack(">HH", 65_535, 65_535)),
    "bmp of the largest size": replaced(encode(SMALL, "bmp"), 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
    "bmp of a negative width": replaced(encode(SMALL, "bmp"), 18, struct.pack("<ii", -8, 8)),
    "webp with a canvas of 16,777,216 x 16,777,216": replaced(
        encode(SMALL, "webp", save_all=True, append_images=[SMALL.rotate(90)]), 24, b"\xff" * 6
    ),
    "bmp with rows that are not there": replaced(encode(SMALL, "bmp"), 18, struct.pack("<ii", 7000, 7000)),
    "text of 100 MB in a chunk": png(4, 4, bytes(20), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))),
    "an international text of 100 MB": png(
        4, 4, bytes(20), chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10**8), 9))
    ),
    "a colour profile of 100 MB": png(4, 4, bytes(20), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8), 9))),
    "pixels that are not there": png(7000, 7000, bytes(1000)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_undecodable(name):
    with pytest.raises(UNDECODABLE):
        look(BOMBS[name])


@pytest.mark.parametrize(
    "content",
    [
        png(0, 5, bytes(5)),
        png(5, 0, b""),
        replaced(encode(SMALL, "bmp"), 18, struct.pack("<ii", 0, 8)),
        replaced(encode(SMALL, "jpeg"), JPEG_SIZE, struct.pack(">HH", 0, 8)),
    ],
    ids=["png without width", "png without height", "bmp without width", "jpeg without height"],
)
def test_an_image_without_pixels_is_undecodable(content):
    with pytest.raises(UNDECODABLE):
        look(content)


def test_more_pixels_than_are_there_are_ignored():
    """The rest of the stream, 50 MB of zeros, is not even unpacked."""
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    assert (look(png(4, 4, rows + bytes(50_000_000)), 4) == grey).all()


@pytest.mark.parametrize(
    "content",
    [
        replaced(encode(SMALL, "gif"), 6, struct.pack("<HH", 9000, 9000)),
        replaced(encode(SMALL, "webp", lossless=True), 21, struct.pack("<I", 8999 | 8999 << 14)),
    ],
    ids=["gif", "webp"],
)
def test_a_small_file_that_fills_memory_is_undecodable(content):
    """9,000 x 9,000 pixels in some hundred bytes. Photographs of that size are JPEGs, which are decoded small."""
    assert len(content) < 2000
    with pytest.raises(UNDECODABLE, match="9000 x 9000 pixels"):
        look(content)


def test_an_absurdly_long_side_is_undecodable():
    """No camera and no scanner has made an image of a million pixels by one."""
    assert (look(png(65_535, 1, bytes(65_536))) == 0).all()
    for width in (65_536, 1_000_000):
        with pytest.raises(UNDECODABLE, match=r"expected at most 64,000,000 .*65,535"):
            look(png(width, 1, bytes(width + 1)))


@pytest.mark.filterwarnings("error")
def test_64_million_pixels_are_decoded_and_more_are_not():
    """Of any format but JPEG."""
    zeros = bytes(8001 * 8000)
    assert (look(png(8000, 8000, zeros)) == 0).all()
    with pytest.raises(UNDECODABLE, match="8001 x 8000 pixels"):
        look(png(8001, 8000, zeros))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif", "bmp"])
def test_an_image_that_is_thin_or_tiny_is_decoded(format, size):
    assert np.abs(look(encode(Image.new("RGB", size, (200, 200, 200)), format)).astype(int) - 200).max() <= 2


@pytest.mark.filterwarnings("error")
def test_a_huge_photograph_is_decoded_small(tmp_path):
    """200 million pixels, more than Pillow takes: an eighth by an eighth is decoded, and never more than a half by a half."""
    content = encode(Image.new("L", (20_001, 9_999), 77), "jpeg")
    assert (look(content) == 77).all()
    assert decode_shrunk(content, 8).size == (2501, 1250)
    assert decode_shrunk(content, 9_999).size == (10_001, 5000)
    (tmp_path / "1.jpg").write_bytes(content)
    assert read_image_file(tmp_path / "1.jpg") == ("jpg", content)


def test_a_huge_photograph_in_several_scans_is_undecodable():
    """It would be held whole, of whatever size it is decoded: a progressive one, or one of which each colour comes by itself."""
    huge = struct.pack(">HH", 20_000, 10_000)
    progressive = encode(SMALL, "jpeg", progressive=True)
    progressive = replaced(progressive, progressive.find(b"\xff\xc2") + 5, huge)
    baseline = replaced(encode(SMALL, "jpeg"), JPEG_SIZE, huge)
    start = baseline.find(b"\xff\xda")
    by_colour = baseline[:start] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + baseline[start + 14 :]
    for content in (progressive, by_colour):
        with pytest.raises(UNDECODABLE, match="10000 x 20000 pixels in several scans, expected at most 178,956,970"):
            look(content)
    assert open_image(baseline).size == (10_000, 20_000)


def test_a_jpeg_that_draws_itself_a_hundred_times_is_decoded_in_time():
    """A progressive JPEG whose last scan comes again and again, and asks for as much work each time."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise).resize((1000, 1000)), "jpeg", progressive=True)
    last = content.rfind(b"\xff\xda")
    look(content[:-2] + content[last:-2] * 100 + content[-2:])


@pytest.mark.parametrize("format", ["gif", "webp", "png"])
def test_of_a_thousand_pictures_the_first_is_decoded(format):
    pictures = [Image.new("RGB", (8, 8), (number % 256, number // 256, 100)) for number in range(1000)]
    content = encode(pictures[0], format, save_all=True, append_images=pictures[1:], lossless=True)
    assert Image.open(io.BytesIO(content)).n_frames == 1000
    assert look(content).reshape(3, -1).T.tolist() == [[0, 0, 100]] * 64


DEEP = np.random.default_rng(3).integers(0, 2**16, (8, 8, 4), dtype=np.uint16)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_become_the_upper_8(color, channels):
    """Of grey and RGB, with alpha, all of it opaque, and without."""
    pixels = DEEP[..., :channels].copy()
    if color in (4, 6):
        pixels[..., -1] = 2**16 - 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    view = look(png(8, 8, rows, depth=16, color=color))
    expected = (pixels >> 8)[..., :3] if channels > 2 else (pixels >> 8)[..., :1].repeat(3, axis=2)
    assert np.abs(view.transpose(1, 2, 0).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_fills_the_range(depth):
    row = np.arange(8) % 2**depth
    packed = np.packbits(((row[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)).tobytes()
    view = look(png(8, 8, (b"\0" + packed) * 8, depth=depth))
    assert view[0, 0].tolist() == (row * 255 // (2**depth - 1)).tolist()


def test_an_interlaced_png_is_as_any_other():
    """Adam7: seven small images that lie in each other."""
    grey = np.random.default_rng(4).integers(0, 256, (8, 8), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + line.tobytes() for top, left, down, across in passes for line in grey[top::down, left::across]
    )
    assert (look(png(8, 8, rows, interlace=1)) == grey).all()


def test_an_exif_that_points_to_itself_ends():
    """The place of the inner directory is that of the outer one, and so is the place of the next."""
    entries = struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2) + entries + struct.pack("<I", 8)
    plain = encode(SMALL, "jpeg", quality=95)
    view = look(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:])
    assert (view == np.rot90(look(plain), -1, axes=(1, 2))).all(), "and the orientation in it counts"


class Trap:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "content",
    [
        b"<html>404 Not Found</html>",
        b"%PDF-1.7\n",
        b"PK\x03\x04" + bytes(100),
        b"\x7fELF" + bytes(100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"P6 9 9 255\n" + bytes(243),
        encode(SMALL, "tiff"),
        encode(SMALL, "ico"),
        encode(SMALL, "tga"),
        encode(SMALL, "pdf"),
    ],
    ids=["html", "pdf head", "zip", "elf", "postscript", "svg", "ppm", "tiff", "ico", "tga", "pdf"],
)
def test_another_type_behind_an_images_name_is_undecodable(content):
    with pytest.raises(UNDECODABLE):
        look(content)


def test_nothing_behind_an_images_name_is_unpickled(tmp_path):
    with pytest.raises(UNDECODABLE):
        look(pickle.dumps(Trap(tmp_path / "trapped")))
    assert not (tmp_path / "trapped").exists()


def test_hostile_images_of_a_shard_are_skipped_and_counted_and_their_neighbours_are_not_touched(
    taxonomy, write_tar, tmp_path
):
    good = encode(SMALL, "png")
    images = [content for bomb in BOMBS.values() for content in (good, bomb)]
    members = []
    for number, content in enumerate(images):
        members += [(f"{number}.png", content), (f"{number}.json", encode_labels("gull"))]
    shard = write_tar(tmp_path / "train-000000.tar", members)
    index = index_shard(shard, taxonomy, str(shard))
    split = Split("train", [index], ["train-000000"], taxonomy, tmp_path)
    reader = SampleReader(split, LabelTargets(split, smear=False), 8, views=None, seed=0)
    order = SequentialOrder(np.arange(len(split)))
    batch = StepBatches(reader, order, len(split), accumulate=1, rank=0, world_size=1)[0]
    is_bomb = [number % 2 == 1 for number in range(len(images))]
    assert batch.skipped_B.tolist() == is_bomb
    assert batch.weight_B.tolist() == [0.0 if bomb else 1.0 for bomb in is_bomb]
    expected = np.asarray(SMALL).transpose(2, 0, 1)
    assert all(
        (image.numpy() == (0 if bomb else expected)).all() for image, bomb in zip(batch.images, is_bomb, strict=True)
    )
