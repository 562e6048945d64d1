"""Reads the name, script and block of each character from the tables in Debian's `unicode-data`, and derives its classes.

Python's own tables are not used, since they change with its version. Nothing imports this module at run time, since
`classes.tsv.xz` has its results.
"""

import bisect
import bz2
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: The scripts of each vertical that consists of scripts; those that are not named here are `brahmic`.
SCRIPTS = {
    "alphabets": "Latin Greek Cyrillic Armenian Georgian",
    "arabic_hebrew": "Arabic Hebrew Syriac Samaritan Mandaic Thaana Nko Adlam Hanifi_Rohingya Yezidi",
    "syllabaries": "Cherokee Canadian_Aboriginal Ethiopic Vai Braille Bamum Mende_Kikakui Tifinagh Osmanya Lisu Miao Osage "
    "Pahawh_Hmong Bassa_Vah Mongolian Ol_Chiki Duployan Deseret Shavian Vithkuqi Elbasan Medefaidrin Mro Nyiakeng_Puachue_Hmong "
    "Wancho Toto Sora_Sompeng Warang_Citi Pau_Cin_Hau Nag_Mundari SignWriting",
    "ancient": "Egyptian_Hieroglyphs Cuneiform Linear_A Linear_B Cypriot Cypro_Minoan Anatolian_Hieroglyphs Ugaritic Old_Persian "
    "Gothic Old_Italic Runic Ogham Phoenician Lydian Lycian Carian Old_Turkic Old_Hungarian Imperial_Aramaic Avestan "
    "Inscriptional_Pahlavi Inscriptional_Parthian Psalter_Pahlavi Meroitic_Hieroglyphs Meroitic_Cursive Glagolitic Coptic "
    "Old_Permic Caucasian_Albanian Old_North_Arabian Old_South_Arabian Palmyrene Nabataean Hatran Elymaic Chorasmian Sogdian "
    "Old_Sogdian Old_Uyghur Manichaean",
    "east_asian": "Hiragana Katakana Bopomofo Yi Nushu Tangut Khitan_Small_Script",
    "hangul": "Hangul",
}

#: The vertical of characters that are common to several scripts, from each of these code points up to the next.
_COMMON = (
    (0x0000, "punctuation"), (0x2070, "mathematics"), (0x20A0, "punctuation"), (0x2100, "mathematics"), (0x2190, "arrows"),
    (0x2200, "mathematics"), (0x2300, "arrows"), (0x2460, "punctuation"), (0x2500, "arrows"), (0x2600, "pictographs"),
    (0x27C0, "mathematics"), (0x27F0, "arrows"), (0x2800, "syllabaries"), (0x2900, "arrows"), (0x2980, "mathematics"),
    (0x2B00, "arrows"), (0x2C00, "punctuation"), (0x1D400, "mathematics"), (0x1D800, "punctuation"), (0x1F000, "pictographs"),
    (0x1F100, "punctuation"), (0x1F300, "pictographs"), (0x1F780, "arrows"), (0x1F900, "pictographs"), (0x1FB00, "arrows"),
)  # fmt: skip

#: The order of the verticals. Before them come those of Chinese characters, which `census` divides by radical.
VERTICALS = ("hangul", "alphabets", "east_asian", "ancient", "mathematics", "brahmic", "syllabaries", "punctuation",
             "pictographs", "arabic_hebrew", "arrows")  # fmt: skip

_LEADS = ["G", "GG", "N", "D", "DD", "R", "M", "B", "BB", "S", "SS", "-", "J", "JJ", "C", "K", "T", "P", "H"]
_FIRST_SYLLABLE, _SYLLABLES_A_LEAD, _NUM_SYLLABLES = 0xAC00, 588, 11172

NUM_RADICALS = 214


@dataclass(frozen=True, slots=True)
class UnicodeCharacter:
    """A character of Unicode.

    Attributes:
        script, block: their names in Unicode.
        radical: the Kangxi radical of a Chinese character, 1 to 214; 0 for any other.
    """

    codepoint: int
    name: str
    script: str
    block: str
    radical: int

    @property
    def vertical(self) -> str:
        """One of `VERTICALS`, or "han" for a character with a radical."""
        if self.radical:
            return "han"
        if self.script in ("Common", "Inherited", "Han", "Braille"):
            return _COMMON[bisect.bisect_right(_COMMON, (self.codepoint, "~")) - 1][1]
        return next((v for v, scripts in SCRIPTS.items() if self.script in scripts.split()), "brahmic")

    @property
    def group(self) -> str:
        """The class between the character and its vertical: radical, first consonant of a Korean syllable, or block."""
        if self.radical:
            return f"radical {self.radical}"
        if 0 <= self.codepoint - _FIRST_SYLLABLE < _NUM_SYLLABLES:
            return f"Hangul {_LEADS[(self.codepoint - _FIRST_SYLLABLE) // _SYLLABLES_A_LEAD]}"
        return self.block


class UnicodeTables:
    """The tables in the folder of the unpacked package `unicode-data`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def list_characters(self) -> Iterator[UnicodeCharacter]:
        """Yields all characters by code point, without controls, spaces, marks, and those that normalisation (NFC) replaces."""
        for codepoint, name, category in self._list_assigned():
            if category[0] in "CZM" or self._normalisation.find(codepoint, "Y") == "N":
                continue
            script, block = self._scripts.find(codepoint, "Common"), self._blocks.find(codepoint, "")
            radical = self._radicals.get(codepoint, 0) if script == "Han" else 0
            yield UnicodeCharacter(codepoint, name, script, block, radical)

    def _list_assigned(self) -> Iterator[tuple[int, str, str]]:
        """Yields (code point, name, category) of each character; the file lists Chinese and Korean characters as ranges."""
        first = None
        for line in self._read("UnicodeData.txt"):
            code, name, category, *_ = line.split(";")
            codepoint = int(code, 16)
            if name.endswith(", First>"):
                first = codepoint
            elif name.endswith(", Last>"):
                title = re.sub(r"^<|, Last>$", "", name)
                for inside in range(first, codepoint + 1):
                    yield inside, f"{title}-{inside:04X}", category
            else:
                yield codepoint, name, category

    @cached_property
    def _normalisation(self) -> "_Ranges":
        """Has "N" for code points that NFC replaces by others."""
        lines = self._read("DerivedNormalizationProps.txt")
        return _Ranges([line.replace("; NFC_QC;", ";") for line in lines if "; NFC_QC;" in line])

    @cached_property
    def _scripts(self) -> "_Ranges":
        return _Ranges(self._read("Scripts.txt"))

    @cached_property
    def _blocks(self) -> "_Ranges":
        return _Ranges(self._read("Blocks.txt"))

    @cached_property
    def _radicals(self) -> dict[int, int]:
        """The Kangxi radical of each code point: the first in Unihan's kRSUnicode; for radicals themselves their number."""
        found = {0x2F00 + number: number + 1 for number in range(NUM_RADICALS)}
        for line in self._read("Unihan_IRGSources.txt"):
            row = line.split("\t")
            if len(row) == 3 and row[1] == "kRSUnicode":
                found[int(row[0][2:], 16)] = int(re.match(r"\d+", row[2])[0])
        return found

    def _read(self, name: str) -> list[str]:
        path = self._folder / name
        content = path.read_bytes() if path.exists() else bz2.decompress((self._folder / f"{name}.bz2").read_bytes())
        return [line for line in content.decode().splitlines() if line.strip()]


class _Ranges:
    """The values of ranges of code points, from lines such as `0041..005A ; Latin # ...`."""

    def __init__(self, lines: list[str]):
        rows = []
        for line in lines:
            span, _, value = line.split("#")[0].partition(";")
            if value:
                first, _, last = span.strip().partition("..")
                rows.append((int(first, 16), int(last or first, 16), value.strip()))
        self._rows = sorted(rows)

    def find(self, codepoint: int, default: str) -> str:
        place = bisect.bisect_right(self._rows, (codepoint, 0x110000, "")) - 1
        if place >= 0 and self._rows[place][0] <= codepoint <= self._rows[place][1]:
            return self._rows[place][2]
        return default
