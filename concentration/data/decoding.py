"""Decodes images. Every stage and `predict` decode here, so that training and serving see the same pixels."""

import io
import math
import struct

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

#: What `open_image` and Pillow raise for a damaged or hostile image.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error, Image.DecompressionBombError)

# What Pillow raises for invalid EXIF data.
_NO_EXIF = (*UNDECODABLE, LookupError, ArithmeticError)

# The formats that are decoded, whatever a file's suffix says; JPEG, which `_open_jpeg` opens, is one more.
# NOTE: some of Pillow's other formats start programs (EPS), and many raise exceptions of any kind for a damaged file.
_FORMATS = ("PNG", "WEBP", "GIF", "BMP")
_JPEG_START = b"\xff\xd8\xff"

# The most pixels of an image that has to be decoded at its full size. Decoding WebP takes 15 bytes per pixel, so without a limit
# a file of 30 bytes could fill the memory. Large photographs are JPEGs, which can be decoded at a fraction of their size.
_MOST_PIXELS = 64_000_000
# The most pixels that are held in memory of a JPEG. In a JPEG of one scan these are the pixels that are decoded; in one of
# several scans (a progressive one) they are all its pixels, since all its frequencies are held however few are decoded.
# The number is Pillow's own limit for any image.
_MOST_JPEG_PIXELS = 178_956_970
# The longest side of an image in pixels; no camera or scanner exceeds it. Without this limit a hostile file, such as a WebP of
# 16 million pixels by ten, would be decoded for a minute.
_LONGEST_SIDE = 65_535

# The value of white in a grey PNG of 2 or 4 bits, by Pillow's name of its pixel format.
_WHITE_OF_FEW_BITS = {"L;2": 3, "L;4": 15}

#: The transposition that makes an image upright, by the orientation in its EXIF data.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: The orientations for which the upright image has width and height exchanged.
SIDEWAYS = (5, 6, 7, 8)


def describe_undecodable(error: Exception) -> str:
    """Says in one line why an image could not be read or decoded; `error` is one of UNDECODABLE."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, UnidentifiedImageError):  # whose own text names an object in memory
        return "cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def open_image(content: bytes) -> Image.Image:
    """Opens an encoded image and reads its header only.

    Raises:
        one of UNDECODABLE: the content is not an image of an accepted format, or the image is too large.
    """
    if content.startswith(_JPEG_START):
        return _open_jpeg(content)
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    width, height = image.size
    if max(width, height) > _LONGEST_SIDE or width * height > _MOST_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels, expected at most {_MOST_PIXELS:,} (but of a JPEG) and sides of at most {_LONGEST_SIDE:,}"
        )
    return image


def decode_shrunk(content: bytes, shorter_side: int) -> Image.Image:
    """The decoded image, upright, grey or RGB, at its full size or smaller.

    A JPEG may be decoded at a half, quarter or eighth of its size, but its shorter side keeps at least `shorter_side` pixels.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    image = open_image(content)
    return load_upright(image, read_orientation(image), min(image.size) / shorter_side)


def load_upright(image: Image.Image, orientation: int | None, shrink: float) -> Image.Image:
    """The decoded image, upright, grey or RGB with 8 bits per channel.

    A JPEG is decoded at a half, quarter or eighth of its size if that shrinks it by no more than the factor `shrink`, or if it
    would otherwise have more than `_MOST_JPEG_PIXELS`.
    """
    if image.format == "JPEG":
        num_pixels = image.width * image.height
        needed = next((step for step in (1, 2, 4) if num_pixels <= _MOST_JPEG_PIXELS * step**2), 8)
        image.draft("RGB", tuple(min(math.ceil(side / shrink), side // needed) for side in image.size))
    _scale_transparent_colour(image)
    image.load()
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return _reduce_to_8_bits(image)


def read_orientation(image: Image.Image) -> int | None:
    """The orientation in the image's EXIF data; None if it has none. Invalid EXIF data counts as none: the pixels may be sound.

    NOTE: `ImageOps.exif_transpose` is not used, since it also rewrites the other tags, and fails if it cannot.
    """
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would read the whole file to look for it
        return None
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _NO_EXIF:
        return None


def _open_jpeg(content: bytes) -> Image.Image:
    """Opens a JPEG.

    NOTE: `Image.open` is not used, since it refuses images with many pixels even if only a fraction of them will be decoded.
    """
    try:
        image = JpegImageFile(io.BytesIO(content))
    except SyntaxError:
        # Pillow fails if it looks up the resolution in invalid EXIF data. A second try, with the EXIF marker overwritten.
        try:
            image = JpegImageFile(io.BytesIO(content.replace(b"Exif\0", b"None\0")))
        except SyntaxError as error:
            raise UnidentifiedImageError(str(error)) from None
    width, height = image.size
    if width * height > _MOST_JPEG_PIXELS and not _has_one_scan(image, content):
        raise ValueError(
            f"{width} x {height} pixels in several scans, expected at most {_MOST_JPEG_PIXELS:,}: save it as a baseline JPEG"
        )
    return image


def _has_one_scan(image: JpegImageFile, content: bytes) -> bool:
    """Whether the first scan of a JPEG, whose header has just been read, holds all components and all frequencies."""
    header_bytes = 6 + 2 * image.layers
    header = content[: image.fp.tell()][-header_bytes - 2 :]
    return "progressive" not in image.info and header[:5] == bytes([0xFF, 0xDA, 0, header_bytes, image.layers])


def _scale_transparent_colour(image: Image.Image) -> None:
    """Converts the one colour that a PNG may declare transparent from the file's bit depth to that of the pixels Pillow loads."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    raw_mode = image.tile[0][3] if image.tile else None
    if raw_mode in _WHITE_OF_FEW_BITS:
        image.info["transparency"] = colour * 255 // _WHITE_OF_FEW_BITS[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """The image as grey or RGB with 8 bits per channel, and white where it was transparent."""
    if image.mode.startswith("I"):  # grey of 16 bits; Pillow's own conversion turns all but the darkest pixels white
        wide = np.asarray(image)
        grey = (wide >> 8).clip(0, 255).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey)
    if image.has_transparency_data:
        seen = image if image.mode == "RGBA" else image.convert("RGBA")
        opacity = seen.getchannel("A")
        if opacity.getextrema()[0] < 255:
            # Most files are black under transparent pixels: a drawing with black strokes would be blank without a white ground.
            on_white = Image.new("RGB", image.size, "white")
            on_white.paste(seen, mask=opacity)
            return on_white
    return image if image.mode in ("RGB", "L") else image.convert("RGB")
