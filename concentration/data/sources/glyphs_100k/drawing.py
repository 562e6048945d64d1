"""Characters as bitmaps: every one on the same em square, in 16 greys, as a PNG of some 300 bytes.

Shapes: S the side of a bitmap.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ImageFont

#: S, in pixels.
BITMAP_SIZE = 48

# Place in the bitmap, in shares of its side: a square of Chinese type rises 0.88 em over the baseline and falls 0.12 em below.
_EM = 0.8
_BASELINE = 0.78

#: A drawing that loses more of its ink than this at the edge of the bitmap is not used.
CLIPPED_SHARE = 0.05

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GREY_4_BITS = struct.pack(">2I5B", BITMAP_SIZE, BITMAP_SIZE, 4, 0, 0, 0, 0)


def open_font(path: Path, index: int) -> ImageFont.FreeTypeFont:
    """A font of a file, at the size at which its em square fits the bitmap."""
    return ImageFont.truetype(str(path), round(_EM * BITMAP_SIZE), index=index, layout_engine=ImageFont.Layout.BASIC)


def draw_bitmap(font: ImageFont.FreeTypeFont, codepoint: int) -> np.ndarray | None:
    """(S, S) uint8, 0 paper to 15 ink; None where it is blank, or too much of it lies outside the bitmap.

    Every character stands on the same baseline, its advance centred: a comma stays small and low.
    """
    mask, (left, top) = font.getmask2(chr(codepoint), "L", anchor="ls")  # where it lies from the start of its baseline
    width, height = mask.size
    if not width * height:
        return None
    left += round((BITMAP_SIZE - font.getlength(chr(codepoint))) / 2)
    top += round(_BASELINE * BITMAP_SIZE)
    drawn = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(height, width)
    inner = drawn[max(0, -top) : max(0, BITMAP_SIZE - top), max(0, -left) : max(0, BITMAP_SIZE - left)]
    ink = inner.sum(dtype=np.int64)
    if ink == 0 or (inner.shape != drawn.shape and ink < (1 - CLIPPED_SHARE) * drawn.sum(dtype=np.int64)):
        return None
    bitmap = np.zeros((BITMAP_SIZE, BITMAP_SIZE), dtype=np.uint8)
    bitmap[max(0, top) : max(0, top) + inner.shape[0], max(0, left) : max(0, left) + inner.shape[1]] = (
        inner.astype(np.uint16) + 8
    ) // 17
    return bitmap if bitmap.any() else None


def encode_bitmap(bitmap: np.ndarray) -> bytes:
    """A PNG of 16 greys.

    NOTE: Pillow writes 256, which takes twice the room.
    """
    rows = np.zeros((BITMAP_SIZE, 1 + BITMAP_SIZE // 2), dtype=np.uint8)  # the first byte of a row says: not filtered
    rows[:, 1:] = bitmap[:, ::2] << 4 | bitmap[:, 1::2]
    chunks = [(b"IHDR", _GREY_4_BITS), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    return _PNG_MAGIC + b"".join(_encode_chunk(kind, content) for kind, content in chunks)


def _encode_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
