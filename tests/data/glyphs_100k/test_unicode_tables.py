"""Tables of a few lines each: what is a character, and where it belongs."""

import bz2

import pytest

from concentration.data.sources.glyphs_100k.unicode_tables import SCRIPTS, VERTICALS, UnicodeTables

TABLES = {
    "UnicodeData.txt": """0000;<control>;Cc;0;BN;;;;;N;NULL;;;;
0020;SPACE;Zs;0;WS;;;;;N;;;;;
0041;LATIN CAPITAL LETTER A;Lu;0;L;;;;;N;;;;0061;
0301;COMBINING ACUTE ACCENT;Mn;230;NSM;;;;;N;;;;;
0905;DEVANAGARI LETTER A;Lo;0;L;;;;;N;;;;;
212B;ANGSTROM SIGN;Lu;0;L;00C5;;;;N;ANGSTROM UNIT;;;00E5;
2192;RIGHTWARDS ARROW;Sm;0;ON;;;;;N;RIGHT ARROW;;;;
2200;FOR ALL;Sm;0;ON;;;;;N;;;;;
2801;BRAILLE PATTERN DOTS-1;So;0;L;;;;;N;;;;;
2F00;KANGXI RADICAL ONE;So;0;ON;<compat> 4E00;;;;N;;;;;
4E00;<CJK Ideograph, First>;Lo;0;L;;;;;N;;;;;
4E02;<CJK Ideograph, Last>;Lo;0;L;;;;;N;;;;;
AC00;<Hangul Syllable, First>;Lo;0;L;;;;;N;;;;;
AE4C;<Hangul Syllable, Last>;Lo;0;L;;;;;N;;;;;
""",
    "DerivedNormalizationProps.txt": "212B ; NFC_QC; N # ANGSTROM\n0301 ; NFC_QC; M\n2F00 ; NFKC_QC; N\n",
    "Scripts.txt": """# a comment
0041..005A ; Latin # L&
0905 ; Devanagari
2801 ; Braille
2F00 ; Han
4E00..4E02 ; Han
AC00..AE4C ; Hangul
""",
    "Blocks.txt": """0000..007F; Basic Latin
0900..097F; Devanagari
2190..21FF; Arrows
4E00..9FFF; CJK Unified Ideographs
AC00..D7AF; Hangul Syllables
""",
}
UNIHAN = """# Unihan
U+4E00\tkRSUnicode\t1.0
U+4E01\tkIRG\tx
U+4E01\tkRSUnicode\t1.1
U+4E02\tkRSUnicode\t2'.3 9.1
"""


@pytest.fixture
def characters(tmp_path) -> dict:
    for name, text in TABLES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "Unihan_IRGSources.txt.bz2").write_bytes(bz2.compress(UNIHAN.encode()))
    return {c.codepoint: c for c in UnicodeTables(tmp_path).list_characters()}


def test_controls_spaces_marks_and_what_nfc_replaces_are_no_characters(characters):
    assert not {0x00, 0x20, 0x301, 0x212B} & set(characters)
    assert {0x41, 0x905, 0x2192, 0x2F00, 0x4E00, 0x4E01, 0x4E02, 0xAC00, 0xAE4C} <= set(characters)


def test_characters_have_verticals_and_groups(characters):
    where = {f"{codepoint:04X}": (c.vertical, c.group) for codepoint, c in characters.items()}
    assert where["0041"] == ("alphabets", "Basic Latin")
    assert where["0905"] == ("brahmic", "Devanagari")
    assert where["2192"] == ("arrows", "Arrows")
    assert where["2200"][0] == "mathematics"
    assert where["2801"][0] == "syllabaries"
    assert where["2F00"] == where["4E00"] == ("han", "radical 1")
    assert where["4E02"] == ("han", "radical 2")
    assert (where["AC00"], where["AE4C"]) == (("hangul", "Hangul G"), ("hangul", "Hangul GG"))


def test_names_of_ranges_are_made(characters):
    assert characters[0x4E01].name == "CJK Ideograph-4E01"
    assert characters[0x41].name == "LATIN CAPITAL LETTER A"


def test_no_script_is_in_two_verticals():
    scripts = [script for text in SCRIPTS.values() for script in text.split()]
    assert len(scripts) == len(set(scripts))
    assert set(SCRIPTS) <= set(VERTICALS)
