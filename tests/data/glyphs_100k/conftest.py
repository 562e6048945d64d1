"""A shipped set of eleven characters in three verticals.

Its "packages" hold fonts of matplotlib's wheel.
"""

import shutil
from pathlib import Path

import matplotlib
import pytest

from concentration.data.sources.glyphs_100k import classes, packages, source
from concentration.data.sources.glyphs_100k.classes import Character, Face
from concentration.data.sources.glyphs_100k.packages import Package

FACES = (
    Face("fonts-sans", "DejaVuSans.ttf", 0, "Sans", "train"),
    Face("fonts-sans", "DejaVuSans-Bold.ttf", 0, "Sans", "train"),
    Face("fonts-serif", "DejaVuSerif.ttf", 0, "Serif", "train"),
    Face("fonts-mono", "DejaVuSansMono.ttf", 0, "Mono", "val"),
    Face("fonts-stix", "STIXGeneral.ttf", 0, "STIX", "test"),
)


def _character(letter: str, vertical: str, group: str, faces=(0, 2, 3, 4, 1)) -> Character:
    return Character(ord(letter), vertical, group, f"LETTER {letter}", faces, ())


CHARACTERS = (
    *(_character(letter, "latin", "capitals") for letter in "ABDEF"),
    *(_character(letter, "latin", "small") for letter in "ab"),
    *(_character(letter, "greek", "capitals") for letter in "ΓΔ"),
    *(_character(letter, "digits", "digits") for letter in "12"),
)


@pytest.fixture
def fonts(tmp_path, monkeypatch) -> Path:
    """The folder of the unpacked packages, and the small set in place of the shipped one, in this process alone."""
    folder = tmp_path / "fonts"
    names = dict.fromkeys(face.package for face in FACES)
    listed = {name: Package(name, "1.0", "0" * 64, 1, "OFL-1.1") for name in names}
    for face in FACES:
        listed[face.package].folder(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(matplotlib.get_data_path(), "fonts/ttf", face.file), listed[face.package].folder(folder))
    monkeypatch.setattr(packages, "load_packages", lambda: listed)
    monkeypatch.setattr(source, "load_packages", lambda: listed)
    for module in (classes, source):
        monkeypatch.setattr(module, "load_faces", lambda: FACES)
        monkeypatch.setattr(module, "load_characters", lambda: CHARACTERS)
    return folder
