"""Chooses the characters of `data=glyphs` and writes `glyphs.tsv`: `python -m concentration.data.sources.glyph_selection`.

Nothing imports this at run time. The choice depends on Python's Unicode tables and on pixels drawn by FreeType, so it is
made once and kept as a file: the classes are then the same with every version of Python, Pillow and matplotlib.
"""

import collections
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from fontTools.ttLib import TTFont

from concentration.data.sources.glyphs import FACES, SELECTION_PATH, draw_master, face_path, load_font
from concentration.data.split_assignment import SPLITS

#: Side of the bitmaps that are compared, in pixels.
MASTER_SIZE = 64
#: Two bitmaps are one drawing where their squared distance is under this share of the smaller one's squared length.
TWIN_DISTANCE = 0.02
#: A face that draws this many characters alike draws a placeholder.
PLACEHOLDER_COUNT = 5
#: A drawing that loses more of its ink than this at the edge of the em square is not used.
CLIPPED_SHARE = 0.02
#: A class needs this many training faces that draw it differently from one another and from the held-out faces.
MIN_TRAINING_FACES = 2
#: Few symbols are drawn for more than one face: these verticals, small otherwise, also take those drawn once.
SPARSE_VERTICALS = ("numbers", "letterlike", "supplemental_math", "symbols")

_BLOCKS = (
    (0x0000, "basic-latin"), (0x0080, "latin-1"), (0x0100, "latin-extended-a"), (0x0180, "latin-extended-b"),
    (0x0250, "ipa"), (0x02B0, "spacing-modifiers"), (0x0300, "combining"), (0x0370, "greek"), (0x0400, "cyrillic"),
    (0x0500, "other"), (0x1D00, "phonetic-extensions"), (0x1DC0, "other"), (0x1E00, "latin-extended-additional"),
    (0x1F00, "other"), (0x2000, "general-punctuation"), (0x2070, "superscripts"), (0x20A0, "currency"),
    (0x20D0, "other"), (0x2100, "letterlike"), (0x2150, "number-forms"), (0x2190, "arrows"), (0x2200, "operators"),
    (0x2300, "technical"), (0x2400, "other"), (0x2460, "enclosed"), (0x2500, "box-drawing"), (0x2580, "blocks"),
    (0x25A0, "geometric"), (0x2600, "miscellaneous"), (0x2700, "dingbats"), (0x27C0, "math-a"), (0x27F0, "arrows-a"),
    (0x2800, "other"), (0x2900, "arrows-b"), (0x2980, "math-b"), (0x2A00, "supplemental-operators"),
    (0x2B00, "symbols-and-arrows"), (0x2C00, "other"), (0xFB00, "ligatures"), (0xFB07, "other"),
)  # fmt: skip

#: Verticals in the order of the taxonomy. Of characters that look alike the first in this order is kept.
_VERTICAL_OF_BLOCK = {
    "latin": ("basic-latin", "latin-1", "latin-extended-a"),
    "greek": ("greek",),
    "cyrillic": ("cyrillic",),
    "punctuation": ("general-punctuation", "currency"),
    "numbers": ("superscripts", "number-forms", "enclosed"),
    "operators": ("operators",),
    "arrows": ("arrows", "arrows-a", "arrows-b", "symbols-and-arrows"),
    "latin_extended": ("latin-extended-b", "ipa", "phonetic-extensions", "latin-extended-additional", "ligatures"),
    "letterlike": ("letterlike",),
    "modifiers": ("spacing-modifiers",),
    "supplemental_math": ("supplemental-operators", "math-a", "math-b"),
    "symbols": ("technical", "miscellaneous", "dingbats", "geometric", "box-drawing", "blocks"),
}
VERTICALS = tuple(_VERTICAL_OF_BLOCK)
_ALPHABETS = ("latin", "greek", "cyrillic")

#: Inner classes told by the character's Unicode name; `a/b` lies under `a`.
_WORDS = {
    "punctuation": {
        "bracket": "PARENTHESIS|BRACKET|BRACE", "quotation": "QUOTATION|APOSTROPHE|PRIME",
        "dash": "HYPHEN|DASH|MINUS",
        "currency": "(DOLLAR|CENT|POUND|YEN|EURO|FRANC|LIRA|PESETA|CURRENCY|SHEQEL|WON|DONG|RUPEE) SIGN",
        "mathematical": "PLUS|EQUALS|LESS|GREATER|MULTIPL|DIVISION|NOT SIGN|FRACTION SLASH|MINUS",
        "accent": "ACUTE|GRAVE|CIRCUMFLEX|DIAERESIS|CEDILLA|MACRON|TILDE", "inverted": "INVERTED|TURNED|REVERSED",
        "double": "DOUBLE|DIAERESIS", "dot": "DOT|FULL STOP|COLON|ELLIPSIS|BULLET|LEADER|SEMICOLON",
        "line": "SOLIDUS|BAR|LINE|SLASH", "mark": "EXCLAMATION|QUESTION|COMMA|STOP|COLON|INTERROBANG",
        "sign": "SECTION|PILCROW|DAGGER|SIGN",
    },
    "numbers": {
        "fraction": "FRACTION", "roman": "ROMAN", "digit": "^DIGIT", "superscript": "SUPERSCRIPT",
        "circled": "CIRCLED", "fraction/third": "THIRD", "fraction/fifth": "FIFTH", "fraction/eighth": "EIGHTH",
        "fraction/quarter": "QUARTER", "one": r"\bONE\b", "two": r"\bTWO\b", "three": r"\bTHREE\b",
        "four": r"\bFOUR\b", "five": r"\bFIVE\b",
    },
    "operators": {
        "relation": "EQUAL|LESS-THAN|GREATER-THAN|SUBSET|SUPERSET|PRECEDE|SUCCEED|TILDE|EQUIVALENT|ELEMENT"
            "|CONTAINS|MEMBER|TACK|TURNSTILE|PARALLEL|DIVIDES|NORMAL SUBGROUP|PROPORTION|ORIGINAL|IMAGE"
            "|FORCES|APPROACHES|CORRESPONDS",
        "relation/equality": "EQUAL|EQUIVALENT", "relation/less-than": "LESS-THAN", "relation/tilde": "TILDE",
        "relation/greater-than": "GREATER-THAN", "relation/subset": "SUBSET", "relation/superset": "SUPERSET",
        "relation/order": "PRECEDE|SUCCEED", "relation/membership": "ELEMENT|CONTAINS|MEMBER",
        "relation/turnstile": "TACK|TURNSTILE|FORCES", "relation/subgroup": "NORMAL SUBGROUP", "integral": "INTEGRAL",
        "logic": "LOGICAL|FOR ALL|EXIST|XOR|NAND|NOR$|^AND|^OR", "circled": "CIRCLED", "squared": "SQUARED",
        "negated": r"\bNOT\b|NEITHER|DOES NOT|THERE DOES NOT",
        "set": "UNION|INTERSECTION|EMPTY SET|SET MINUS|COMPLEMENT", "n-ary": "N-ARY",
        "dotted": r"\bDOTS?\b|ELLIPSIS|PROPORTION", "arithmetic": "PLUS|MINUS|TIMES|DIVISION|PRODUCT|ROOT|SUM",
        "angle": "ANGLE|TRIANGLE", "square": "SQUARE (IMAGE|ORIGINAL|CAP|CUP)", "double": "DOUBLE|MUCH|VERY",
    },
    "arrows": {
        "single": "^(LEFTWARDS|RIGHTWARDS|UPWARDS|DOWNWARDS)", "leftwards": "LEFTWARDS|LEFT ARROW|LEFT BARB|WEST",
        "rightwards": "RIGHTWARDS|RIGHT ARROW|RIGHT BARB|EAST", "upwards": "UPWARDS|UP ARROW|UP BARB|^UP|NORTH",
        "downwards": "DOWNWARDS|DOWN ARROW|DOWN BARB|SOUTH|^DOWN", "two-way": "LEFT RIGHT|UP DOWN| OVER ",
        "diagonal": "EAST|WEST", "harpoon": "HARPOON", "harpoon/leftwards": "^LEFTWARDS.*HARPOON",
        "harpoon/rightwards": "^RIGHTWARDS.*HARPOON", "double": "DOUBLE ARROW|PAIRED", "triple": "TRIPLE",
        "dashed": "DASH", "white": "WHITE", "turning": "HOOK|LOOP|CURV|CIRCLE ARROW|TIP|CORNER", "stroke": "STROKE",
        "bar": r"\bBAR\b|FROM BAR", "wave": "WAVE|SQUIGGLE", "tail": "TAIL", "headed": "TWO HEADED",
    },
    "latin_extended": {
        "turned": "TURNED", "reversed": "REVERSED", "small-capital": "SMALL CAPITAL", "hook": "HOOK",
        "stroke": "STROKE|BAR", "digraph": "DIGRAPH|LIGATURE", "click": "CLICK", "curl": "CURL",
        "tail": "TAIL|RETROFLEX|LEG", "caron": "CARON", "open": "OPEN",
        "vowel": "LETTER (TURNED |REVERSED |OPEN |CLOSED |SMALL CAPITAL |DOTLESS )*(A|E|I|O|U|Y|ALPHA"
            r"|UPSILON|IOTA|SCHWA)\b",
    },
    "letterlike": {
        "script": "SCRIPT", "black-letter": "BLACK-LETTER", "double-struck": "DOUBLE-STRUCK",
        "hebrew": "ALEF|BET|GIMEL|DALET", "turned": "TURNED|REVERSED|INVERTED", "sign": "SIGN|SYMBOL",
        "unit": "DEGREE|OHM|MHO|KELVIN|ANGSTROM|OUNCE|PLANCK",
        "abbreviation": "ACCOUNT|ADDRESSED|CARE OF|CADA|NUMERO|TELEPHONE|TRADE|SERVICE|PRESCRIPTION|RECORDING"
            "|FACSIMILE",
        "capital": "CAPITAL", "small": "SMALL",
    },
    "modifiers": {
        "letter": "LETTER SMALL|LETTER CAPITAL",
        "accent": "ACUTE|GRAVE|BREVE|CARON|CIRCUMFLEX|OGONEK|TILDE|MACRON|DIAERESIS|RING",
        "tone": "TONE|EXTRA-|RISING|FALLING", "arrowhead": "ARROWHEAD", "glottal": "GLOTTAL", "low": r"\bLOW\b",
        "double": "DOUBLE", "reversed": "REVERSED|TURNED", "quotation": "COMMA|APOSTROPHE|PRIME|RING", "tack": "TACK",
        "line": "LINE|MACRON|MINUS|PLUS", "half-ring": "HALF RING|COLON|TRIANGULAR",
    },
    "supplemental_math": {
        "integral": "INTEGRAL", "order": "LESS-THAN|GREATER-THAN|PRECEDES|SUCCEEDS", "order/less-than": "LESS-THAN",
        "order/greater-than": "GREATER-THAN", "order/precedes": "PRECEDES", "order/succeeds": "SUCCEEDS",
        "set": "SUBSET|SUPERSET|UNION|INTERSECTION", "logic": "LOGICAL",
        "sum": "SUM|PLUS|MINUS|PRODUCT|TIMES|AMALGAMATION", "bracket": "BRACKET|PARENTHESIS",
        "circled": "CIRCLE|CIRCLED", "equality": "EQUAL", "slanted": "SLANTED", "negated": r"\bNOT\b|PERPENDICULAR",
        "lozenge": "LOZENGE|DIAMOND|TRIANGLE", "n-ary": "N-ARY", "similar": "SIMILAR|APPROXIMATE|TILDE",
    },
    "symbols": {
        "bracket": "CEILING|FLOOR|BRACKET|CROP|CORNER|PARENTHESIS", "apl": "APL", "black": "BLACK", "white": "WHITE",
        "suit": "SUIT", "music": "NOTE|MUSIC",
        "zodiac": "ARIES|TAURUS|GEMINI|CANCER|LEO|VIRGO|LIBRA|SCORPIUS|SAGITTARIUS",
        "star": "STAR|ASTERISK|SNOWFLAKE|FLORETTE", "square": "SQUARE|RECTANGLE|PARALLELOGRAM",
        "circle": "CIRCLE|CIRCLED", "triangle": "TRIANGLE|POINTER", "diamond": "DIAMOND|LOZENGE",
        "arc": "ARC|FROWN|SMILE|CURVE", "cross": "CROSS|MARK|BALLOT|SALTIRE", "person": "FACE|FEMALE|MALE",
    },
}  # fmt: skip


@dataclass(frozen=True)
class _Character:
    codepoint: int
    vertical: str
    block: str

    @property
    def name(self) -> str:
        return unicodedata.name(chr(self.codepoint))


def select_characters() -> Iterator[tuple[_Character, list[int]]]:
    """The characters that are kept, in the order of the taxonomy, each with the numbers of the faces that draw it."""
    characters = sorted(_list_candidates(), key=lambda c: (VERTICALS.index(c.vertical), c.codepoint))
    drawings = _draw(characters)
    _drop_placeholders(drawings)
    _drop_look_alikes(characters, drawings)
    for character in characters:
        faces = _tell_faces_apart(drawings[character.codepoint])
        per_split = collections.Counter(FACES[face].split for face in faces)
        min_training = 1 if character.vertical in SPARSE_VERTICALS else MIN_TRAINING_FACES
        if per_split["train"] >= min_training and per_split["val"] and per_split["test"]:
            yield character, faces


def write_selection() -> None:
    """Writes `glyphs.tsv`: code point, vertical, inner classes, faces, name."""
    selected = list(select_characters())
    groups = _groups_with_company([(c, _find_groups(c)) for c, _ in selected])
    lines = [
        "# Written by `python -m concentration.data.sources.glyph_selection`; order and content define the classes."
    ]
    for character, faces in selected:
        columns = (
            f"{character.codepoint:04X}", character.vertical, ",".join(groups[character.codepoint]),
            ",".join(map(str, faces)), character.name,
        )  # fmt: skip
        lines.append("\t".join(columns))
    SELECTION_PATH.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _list_candidates() -> Iterator[_Character]:
    """Characters of the chosen blocks in at least one face, without controls, spaces and combining marks."""
    vertical_of = {block: vertical for vertical, blocks in _VERTICAL_OF_BLOCK.items() for block in blocks}
    for codepoint in sorted(set().union(*(_load_cmap(face) for face in range(len(FACES))))):
        category = unicodedata.category(chr(codepoint))
        block = next(name for start, name in reversed(_BLOCKS) if codepoint >= start)
        vertical = vertical_of.get(block)
        if vertical is None or category[0] in "CZM":
            continue
        if vertical == "latin" and category[0] != "L":
            vertical = "numbers" if category[0] == "N" else "punctuation"
        # The alphabets hold letters only: the Greek question mark is the semicolon, the micro sign the letter mu.
        is_letter = category[0] == "L" and chr(codepoint) != "µ"
        if vertical in _ALPHABETS and not is_letter:
            continue
        yield _Character(codepoint, vertical, block)


def _load_cmap(face: int) -> set[int]:
    with TTFont(face_path(face), lazy=True) as font:
        return set(font.getBestCmap())


def _draw(characters: Sequence[_Character]) -> dict[int, dict[int, np.ndarray]]:
    """By code point and face, the master bitmap; without those that are empty or cut off by the em square."""
    drawings: dict[int, dict[int, np.ndarray]] = {c.codepoint: {} for c in characters}
    for face in range(len(FACES)):
        font, cmap = load_font(face, MASTER_SIZE), _load_cmap(face)
        for codepoint in (c.codepoint for c in characters if c.codepoint in cmap):
            # A margin of half the side on every side shows what the square would cut off.
            wide = np.asarray(draw_master(font, codepoint, MASTER_SIZE, margin=MASTER_SIZE // 2), dtype=np.float32)
            inner = wide[MASTER_SIZE // 2 : -MASTER_SIZE // 2, MASTER_SIZE // 2 : -MASTER_SIZE // 2]
            if inner.sum() > 0 and inner.sum() >= (1 - CLIPPED_SHARE) * wide.sum():
                drawings[codepoint][face] = inner.ravel() / 255
    return drawings


def _drop_placeholders(drawings: dict[int, dict[int, np.ndarray]]) -> None:
    count = collections.Counter((face, d.tobytes()) for faces in drawings.values() for face, d in faces.items())
    for faces in drawings.values():
        for face in [face for face, d in faces.items() if count[face, d.tobytes()] >= PLACEHOLDER_COUNT]:
            del faces[face]


def _drop_look_alikes(characters: Sequence[_Character], drawings: dict[int, dict[int, np.ndarray]]) -> None:
    """Removes a character's drawings that an earlier one shares, and all of them where most training ones are shared.

    Latin A and Greek Alpha are one class; an italic Cyrillic te, which looks like a Latin m, only loses its italic.
    """
    capacity = sum(map(len, drawings.values()))
    kept, moments = np.empty((capacity, MASTER_SIZE**2), np.float32), np.empty((capacity, 3), np.float32)
    num_kept = 0
    for character in characters:
        faces = drawings[character.codepoint]
        shared = {face for face, d in faces.items() if _has_twin(d, kept[:num_kept], moments[:num_kept])}
        training = {face for face in faces if FACES[face].split == "train"}
        if 2 * len(shared & training) >= len(training):
            shared = set(faces)
        for face in shared:
            del faces[face]
        for d in faces.values():
            kept[num_kept], moments[num_kept] = d, _compute_moments(d)
            num_kept += 1


def _compute_moments(drawing: np.ndarray) -> np.ndarray:
    """(3,) the ink of a bitmap and its centre of gravity, in pixels."""
    square = drawing.reshape(MASTER_SIZE, MASTER_SIZE)
    place = np.arange(MASTER_SIZE, dtype=np.float32)
    return np.array(
        [square.sum(), square.sum(axis=1) @ place / square.sum(), square.sum(axis=0) @ place / square.sum()]
    )


def _has_twin(drawing: np.ndarray, kept: np.ndarray, moments: np.ndarray) -> bool:
    """Whether one of `kept`, (N, pixels), is the same drawing; only those of like moments, (N, 3), are compared."""
    gap = np.abs(moments - _compute_moments(drawing)) <= (0.05 * drawing.sum(), 1.0, 1.0)
    return bool(_are_twins(drawing, kept[gap.all(axis=1)]).any())


def _are_twins(drawing: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) whether each of `others`, (N, pixels), is the same drawing as `drawing`, (pixels,)."""
    distance = ((others - drawing) ** 2).sum(axis=1)
    return distance <= TWIN_DISTANCE * np.minimum((others**2).sum(axis=1), (drawing**2).sum())


def _tell_faces_apart(drawings: dict[int, np.ndarray]) -> list[int]:
    """The faces that draw one character differently. Of faces that draw it alike a held-out one is kept.

    In DejaVu the bold oblique of most symbols is the bold one: without this, `val` would be drawings of `train`.
    """
    held_out_first = sorted(drawings, key=lambda face: (SPLITS[::-1].index(FACES[face].split), face))
    kept: list[int] = []
    for face in held_out_first:
        if not kept or not _are_twins(drawings[face], np.stack([drawings[k] for k in kept])).any():
            kept.append(face)
    return sorted(kept)


def _find_groups(character: _Character) -> list[str]:
    """The inner classes of a character, below its vertical: block, case, base letter, diacritic, words of its name."""
    groups = []
    if len(_VERTICAL_OF_BLOCK[character.vertical]) > 1:
        groups.append(f"block/{character.block}")
    category = unicodedata.category(chr(character.codepoint))
    if category in ("Lu", "Ll") and character.vertical in (*_ALPHABETS, "latin_extended"):
        groups.append("uppercase" if category == "Lu" else "lowercase")
    if character.vertical in _ALPHABETS:
        groups.extend(_find_letter_groups(character))
    words_of = _WORDS.get(character.vertical, {})
    groups.extend(group for group, words in words_of.items() if re.search(words, character.name))
    return groups


def _find_letter_groups(character: _Character) -> list[str]:
    groups = []
    letter = re.search(r"LETTER (?:(?:ARCHAIC|UKRAINIAN) )?([A-Z-]+(?: (?:SIGN|YUS|[IU])\b)?)", character.name)
    if letter:
        groups.append(f"letter/{_slug(letter.group(1))}")
    for mark in unicodedata.normalize("NFD", chr(character.codepoint))[1:]:
        name = unicodedata.name(mark).removeprefix("COMBINING ").removesuffix(" ACCENT")
        groups.append(f"accent/{_slug(name)}")
    if "WITH STROKE" in character.name:
        groups.append("accent/stroke")
    return groups


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _groups_with_company(found: Sequence[tuple[_Character, list[str]]]) -> dict[int, list[str]]:
    """By code point, the groups that hold at least two characters, but not all, of their vertical."""
    size = collections.Counter((c.vertical, group) for c, groups in found for group in groups)
    total = collections.Counter(c.vertical for c, _ in found)
    return {c.codepoint: [g for g in groups if 2 <= size[c.vertical, g] < total[c.vertical]] for c, groups in found}


if __name__ == "__main__":
    write_selection()
