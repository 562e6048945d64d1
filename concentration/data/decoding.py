"""Encoded images become pixels: every stage, `predict` and exports decode them here, and nowhere else."""

import io
import math
import struct

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

#: What `open_image` and Pillow raise for a damaged or hostile image.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error, Image.DecompressionBombError)

# What Pillow raises for EXIF that is none.
_NO_EXIF = (*UNDECODABLE, LookupError, ArithmeticError)

# What may stand behind a name in .jpg, .png or .webp. NOTE: of Pillow's other formats some start programs (EPS), and many
# raise anything at all for a damaged file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Of an image that is decoded whole: WebP takes 15 bytes a pixel, so a file of 30 bytes could fill the memory. JPEGs, which
# large photographs are, are decoded at a fraction of their size.
_MOST_PIXELS = 64_000_000
# What no camera or scanner exceeds; a WebP of 16 million pixels by ten is decoded for a minute.
_LONGEST_SIDE = 65_535

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
        return "cannot be decoded (no image of a known format)"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def open_image(content: bytes) -> Image.Image:
    """The image, of which only the header has been read.

    Raises:
        one of UNDECODABLE: it is no image of a format that we take, or is too large.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        # It may be a JPEG whose resolution Pillow looked up in EXIF that is none: again, with nothing called EXIF.
        if not content.startswith(b"\xff\xd8") or b"Exif\0" not in content:
            raise
        image = Image.open(io.BytesIO(content.replace(b"Exif\0", b"None\0")), formats=_FORMATS)
    width, height = image.size
    if max(width, height) > _LONGEST_SIDE or (image.format != "JPEG" and width * height > _MOST_PIXELS):
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
    """Upright, of 8 bits. A JPEG is decoded at a half, quarter or eighth where that shrinks it by no more than this."""
    if image.format == "JPEG":
        image.draft("RGB", (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
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


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey or RGB, 8 bits a channel; what is transparent lies on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, all of which Pillow would turn white, but for the darkest
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        seen = image if image.mode == "RGBA" else image.convert("RGBA")
        opacity = seen.getchannel("A")
        if opacity.getextrema()[0] < 255:
            # Without it, drawings would be blank: under what is transparent all is black in most files, and so are strokes.
            on_white = Image.new("RGB", image.size, "white")
            on_white.paste(seen, mask=opacity)
            return on_white
    return image if image.mode in ("RGB", "L") else image.convert("RGB")
