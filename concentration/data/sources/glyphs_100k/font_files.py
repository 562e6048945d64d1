"""Lists the faces in a folder of unpacked font packages, with the typeface of each, and draws their characters.

Nothing imports this module at run time, since `faces.tsv` has its results.

Shapes: N characters that a face draws, P those of them whose bitmaps are kept, S the side of a bitmap.
"""

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import ImageFont

from concentration.data.sources.glyphs_100k.drawing import BITMAP_SIZE, draw_bitmap, open_font
from concentration.data.sources.glyphs_100k.packages import Package, load_packages

#: Faces that draw the same as another one: proportional variants of Japanese fonts, and regional variants in a collection.
_SISTERS = re.compile(
    r"^ipa[gm]p|^vl-pgothic|^bizudp|^kiloji_|^lxgwwenkaimono|^unifont_(jp|sample)| cjk (kr|sc|tc|hk)| mono cjk",
    re.IGNORECASE,
)
#: Weights beside plain and bold, and widths beside the normal one. They are left out, since training distorts drawings anyway.
_LEFT_OUT = re.compile(
    r"light|thin|hairline|black|heavy|demi|narrow|condensed|(semi|extra|ultra)[- ]?bold|ui-|caption|display|slanted|outline|"
    r"^noto.*medium",
    re.IGNORECASE,
)
_STYLE_WORDS = re.compile(
    r"\b(regular|bold|italic|oblique|book|roman|medium|light|thin|black|heavy|semi|extra|demi|ultra|condensed|narrow|[a-z]*light|"
    r"[a-z]*bold|[a-z]*condensed)\b",
    re.IGNORECASE,
)

#: The names of the plain style, the preferred one first.
_STYLES = ("Regular", "Book", "Roman", "Medium", "Normal")
#: A file of at least this size has Chinese characters or Korean syllables. Of such a family only the plain face is drawn, and of
#: a collection of regional variants only the first.
_LARGE_BYTES = 2_000_000

#: The typefaces of families with several names, by the start of the name; the first that fits counts.
_TYPEFACES = (
    "Noto Sans CJK", "Noto Sans Mono CJK", "Noto Serif CJK", "Noto Music", "Noto Sans", "Noto Mono", "Noto Serif", "TW-Kai",
    "TW-Sung", "HanaMin", "BabelStone Han", "AR PL UMing", "AR PL UKai", "Unifont", "DejaVu Sans", "DejaVu Serif",
    "LXGW WenKai", "Shimenkan", "FreeMono", "FreeSans", "FreeSerif", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "VL Gothic",
    "VL PGothic", "IPAGothic", "IPAPGothic", "IPAMincho", "IPAPMincho", "YOz", "kiloji", "Konatu", "SetoFont", "BIZ UDGothic",
    "BIZ UDPGothic", "BIZ UDMincho", "BIZ UDPMincho", "M PLUS", "Mplus", "D2Coding", "KouzanBrushFont", "UnPilgi",
    "BM Euljiro", "BM EULJIRO", "BM HANNA", "NanumBarunGothic", "NanumGothic", "NanumMyeongjo", "NanumSquare", "STIX", "Amiri",
    "PakType Naskh", "Ume P Mincho", "Ume Mincho", "Ume", "Droid Sans", "Ezra SIL", "BPG Nino", "BPG Nateli", "BPG Excelsior",
    "Khmer Mondulkiri", "Khmer Busra",
)  # fmt: skip
_ALIASES = {
    "Noto Sans Mono CJK": "Noto Sans CJK", "Noto Mono": "Noto Sans", "VL PGothic": "VL Gothic", "IPAPGothic": "IPAGothic",
    "IPAPMincho": "IPAMincho", "BIZ UDPGothic": "BIZ UDGothic", "BIZ UDPMincho": "BIZ UDMincho", "Mplus": "M PLUS",
    "BM EULJIRO": "BM Euljiro", "Ume P Mincho": "Ume Mincho", "Ume": "Ume Gothic",
}  # fmt: skip

#: One in so many characters is kept as a bitmap, to compare typefaces: of the Chinese and Korean ones, and of the others.
_KEPT_OF_MANY, _KEPT_OF_FEW = 40, 4
_MANY = (range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0x20000, 0x40000))


@dataclass(frozen=True, slots=True)
class FontFace:
    """A font: a file of a package, or one of several in a file (`index`)."""

    package: str
    file: str
    index: int
    family: str
    style: str

    @property
    def typeface(self) -> str:
        """The name of the family without words for weight and width. Families of one design for several scripts share a name."""
        name = next((start for start in _TYPEFACES if self.family.startswith(start)), None)
        if name is None:
            name = " ".join(_STYLE_WORDS.sub(" ", self.family).split()) or self.family
        return _ALIASES.get(name, name)


@dataclass(frozen=True)
class FaceDrawings:
    """The characters that a face draws.

    Attributes:
        codepoint: (N,) int64, ascending.
        digest: (N,) int64, a hash of each bitmap: two bitmaps are equal if their digests are.
        kept_codepoint: (P,) int64, ascending: the characters whose bitmaps are kept.
        kept: (P, S, S) uint8, these bitmaps.
    """

    codepoint: np.ndarray
    digest: np.ndarray
    kept_codepoint: np.ndarray
    kept: np.ndarray

    def restrict(self, codepoints: Collection[int]) -> "FaceDrawings":
        """The drawings of these characters only."""
        wanted = np.fromiter(codepoints, np.int64, len(codepoints))
        is_drawn, is_kept = np.isin(self.codepoint, wanted), np.isin(self.kept_codepoint, wanted)
        return FaceDrawings(
            self.codepoint[is_drawn], self.digest[is_drawn], self.kept_codepoint[is_kept], self.kept[is_kept]
        )


def list_faces(packages: Collection[Package], path: Path) -> list[FontFace]:
    """The faces that are used, plain, bold and italic ones of every family in every package, in a fixed order."""
    found = []
    for package in packages:
        for file in sorted(package.folder(path).iterdir()):
            if file.suffix.lower() in (".ttf", ".otf", ".ttc"):
                faces = _read_names(package.name, file)
                found.extend(face for face in faces if not _SISTERS.search(f"{face.file} {face.family}"))
    by_family: dict[tuple[str, str], list[FontFace]] = {}
    for face in found:
        by_family.setdefault((face.package, " ".join(_STYLE_WORDS.sub(" ", face.family).split())), []).append(face)
    kept = []
    for faces in by_family.values():
        plain = [face for face in faces if not _LEFT_OUT.search(f"{face.file} {face.family} {face.style}")]
        is_large = (load_packages()[faces[0].package].folder(path) / faces[0].file).stat().st_size >= _LARGE_BYTES
        ranked = sorted(plain or faces, key=lambda f: _STYLES.index(f.style) if f.style in _STYLES else len(_STYLES))
        kept.extend([face for face in ranked[:1] if face.index == 0] if is_large else plain or ranked[:1])
    return kept


def draw_face(face: FontFace, file: Path, candidates: Collection[int]) -> FaceDrawings:
    """Draws those characters of `candidates` that the face has."""
    font = open_font(file, face.index)
    codepoints, digests, kept_codepoints, kept = [], [], [], []
    for codepoint in sorted(_read_cmap(file, face.index) & set(candidates)):
        try:
            bitmap = draw_bitmap(font, codepoint)
        except OSError:  # a glyph whose outline FreeType refuses
            continue
        if bitmap is None:
            continue
        codepoints.append(codepoint)
        digests.append(int.from_bytes(hashlib.blake2b(bitmap, digest_size=8).digest(), "big", signed=True))
        every = _KEPT_OF_MANY if any(codepoint in span for span in _MANY) else _KEPT_OF_FEW
        if codepoint % every == 0:
            kept_codepoints.append(codepoint)
            kept.append(bitmap)
    pixels = np.stack(kept) if kept else np.empty((0, BITMAP_SIZE, BITMAP_SIZE), np.uint8)
    return FaceDrawings(
        np.array(codepoints, np.int64), np.array(digests, np.int64), np.array(kept_codepoints, np.int64), pixels
    )


def _read_names(package: str, file: Path) -> Iterator[FontFace]:
    for index in itertools.count() if file.suffix.lower() == ".ttc" else (0,):
        try:
            family, style = ImageFont.truetype(str(file), 16, index=index).getname()
        except OSError:
            return
        yield FontFace(package, file.name, index, family or file.stem, style or "")


def _read_cmap(file: Path, index: int) -> set[int]:
    try:
        with TTFont(file, fontNumber=index, lazy=True) as font:
            return set(font.getBestCmap() or ())
    except TTLibError:
        return set()
