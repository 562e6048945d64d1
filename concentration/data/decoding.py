"""Encoded images become pixels: every stage, `predict` and exports decode them here, and nowhere else."""

import io
import math
import struct

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

#: What `open_image` and Pillow raise for a damaged or hostile image.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error, Image.DecompressionBombError)

# What Pillow raises for EXIF that is none.
_NO_EXIF = (*UNDECODABLE, LookupError, ArithmeticError)

# What may stand behind a name in .jpg, .png or .webp. NOTE: of Pillow's other formats some start programs (EPS), and many
# raise anything at all for a damaged file.
_FORMATS = ("PNG", "WEBP", "GIF", "BMP")  # and JPEG
_JPEG_START = b"\xff\xd8\xff"

# Of an image that is decoded whole: WebP takes 15 bytes a pixel, so a file of 30 bytes could fill the memory. JPEGs, which
# large photographs are, are decoded at a fraction of their size.
_MOST_PIXELS = 64_000_000
# Of what is held of a JPEG: the pixels that are decoded, or all its frequencies, however few are decoded, where it comes in
# several scans, as progressive ones do. It is Pillow's own limit for any image.
_MOST_JPEG_PIXELS = 178_956_970
# What no camera or scanner exceeds; a WebP of 16 million pixels by ten is decoded for a minute.
_LONGEST_SIDE = 65_535

# By Pillow's name of a grey PNG's pixels: what white is among them.
_WHITE_OF_FEW_BITS = {"L;2": 3, "L;4": 15}

#: By EXIF's orientation: what makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: The orientations with which width and height change places.
SIDEWAYS = (5, 6, 7, 8)


def describe_undecodable(error: Exception) -> str:
    """What is wrong with an image that could not be read or decoded, of one of UNDECODABLE; on one line."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, UnidentifiedImageError):  # it names an object in memory
        return "cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def open_image(content: bytes) -> Image.Image:
    """The image, of which only the header has been read.

    Raises:
        one of UNDECODABLE: it is no image of a format that we take, or is too large.
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
    """The upright image, grey or RGB. A large photograph may be smaller than it was, not than this shorter side.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    image = open_image(content)
    return load_upright(image, read_orientation(image), min(image.size) / shorter_side)


def load_upright(image: Image.Image, orientation: int | None, shrink: float) -> Image.Image:
    """Upright, of 8 bits.

    A JPEG is decoded at a half, quarter or eighth where that shrinks it by no more than this, or is needed for the memory.
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
    """EXIF's orientation; None also where what stands for EXIF is none, which is no reason to do without the image.

    NOTE: not `ImageOps.exif_transpose`, which also writes the other tags anew, and fails where it cannot.
    """
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would read the whole file to look for it
        return None
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _NO_EXIF:
        return None


def _open_jpeg(content: bytes) -> Image.Image:
    """NOTE: not by `Image.open`, which refuses what has many pixels, however few of them are decoded."""
    try:
        image = JpegImageFile(io.BytesIO(content))
    except SyntaxError:
        # Pillow may have looked up the resolution in EXIF that is none: again, with nothing called EXIF.
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
    """Whether the first scan, whose header has just been read, has all of a JPEG: all components, and all frequencies."""
    header_bytes = 6 + 2 * image.layers
    header = content[: image.fp.tell()][-header_bytes - 2 :]
    return "progressive" not in image.info and header[:5] == bytes([0xFF, 0xDA, 0, header_bytes, image.layers])


def _scale_transparent_colour(image: Image.Image) -> None:
    """Makes the one colour that a PNG may call transparent, which has the file's bits, one of the pixels as Pillow loads them."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    raw_mode = image.tile[0][3] if image.tile else None
    if raw_mode in _WHITE_OF_FEW_BITS:
        image.info["transparency"] = colour * 255 // _WHITE_OF_FEW_BITS[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey or RGB, 8 bits a channel; what is transparent lies on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, all of which Pillow would turn white, but for the darkest
        wide = np.asarray(image)
        grey = (wide >> 8).clip(0, 255).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey)
    if image.has_transparency_data:
        seen = image if image.mode == "RGBA" else image.convert("RGBA")
        opacity = seen.getchannel("A")
        if opacity.getextrema()[0] < 255:
            # Without it, drawings would be blank: under what is transparent all is black in most files, and so are strokes.
            on_white = Image.new("RGB", image.size, "white")
            on_white.paste(seen, mask=opacity)
            return on_white
    return image if image.mode in ("RGB", "L") else image.convert("RGB")
