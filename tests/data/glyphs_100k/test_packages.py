"""Font packages: .deb files made by hand, and an apt-get that is a shell script."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from concentration.data.sources.glyphs_100k.packages import Package, fetch_packages, load_packages, unpack_deb
from concentration.errors import DataError

FILES = {
    "./usr/share/fonts/truetype/tiny/Tiny.ttf": b"a font",
    "./usr/share/fonts/opentype/tiny/Tiny.OTF": b"another",
    "./usr/share/doc/tiny/copyright": b"free",
    "./usr/share/doc/tiny/changelog.gz": b"old",
    "./usr/share/fonts/tiny/Tiny.pfb": b"postscript",
}


def write_ar(members: dict[str, bytes]) -> bytes:
    written = b"!<arch>\n"
    for name, content in members.items():
        written += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return written


def write_deb(compression: str = "xz", files: dict[str, bytes] = FILES) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return write_ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": buffer.getvalue()})


def describe(name: str, deb: bytes) -> Package:
    return Package(name, "1:2.0-3", hashlib.sha256(deb).hexdigest(), len(deb), "OFL-1.1")


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """(script): the only program that is found is an apt-get that does this; it may count its calls in `calls`."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        calls = folder / "calls"
        (folder / "apt-get").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\necho $@ >> {calls}\n{script}\n")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return calls

    return install


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_fonts_and_the_licence_are_unpacked(tmp_path, compression):
    unpack_deb(write_deb(compression), tmp_path, "tiny")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "Tiny.ttf": b"a font",
        "Tiny.OTF": b"another",
        "copyright": b"free",
    }


def test_packages_are_fetched_once_and_together(tmp_path, apt_get):
    debs = {name: write_deb(files={f"./x/{name}.ttf": name.encode()}) for name in ("one", "two", "three")}
    store = tmp_path / "store"
    store.mkdir()
    for name, deb in debs.items():
        (store / f"{name}_1%3a2.0-3_all.deb").write_bytes(deb)
    calls = apt_get(f'shift\nfor wanted in "$@"; do cp {store}/${{wanted%%=*}}_* .; done')
    packages = [describe(name, deb) for name, deb in debs.items()]
    fonts = tmp_path / "fonts"
    fetch_packages(packages[:1], fonts)
    fetch_packages(packages, fonts)
    fetch_packages(packages, fonts)
    assert calls.read_text().splitlines() == ["download one=1:2.0-3", "download two=1:2.0-3 three=1:2.0-3"]
    for package in packages:
        assert (package.folder(fonts) / f"{package.name}.ttf").read_text() == package.name
    assert sorted(path.name for path in fonts.iterdir()) == [f"{name}_1%3a2.0-3" for name in ("one", "three", "two")]


def test_a_deb_file_that_lies_there_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    deb = write_deb()
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    (fonts / "tiny_1%3a2.0-3_all.deb").write_bytes(deb)
    package = describe("tiny", deb)
    fetch_packages([package], fonts)
    assert (package.folder(fonts) / "Tiny.ttf").read_bytes() == b"a font"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'E: Unable to locate package tiny' >&2; exit 100", "Unable to locate package tiny.*apt-get update"),
        ("exit 0", "no file came.*lay the .deb files"),
        ("echo other > tiny_1_all.deb", "6 bytes with SHA-256.*expected .* damaged or another version than 1:2.0-3"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path, apt_get, script, expected):
    apt_get(script)
    fonts = tmp_path / "fonts"
    with pytest.raises(DataError, match=expected):
        fetch_packages([describe("tiny", write_deb())], fonts)
    assert list(fonts.iterdir()) == []


def test_without_apt_get_the_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"tiny=1:2.0-3: cannot be fetched, for there is no apt-get here; prepare once"):
        fetch_packages([describe("tiny", write_deb())], tmp_path / "fonts")


@pytest.mark.parametrize(
    "deb",
    [
        b"",
        b"text",
        write_deb()[:-300],
        write_ar({"debian-binary": b"2.0\n"}),
        write_ar({"data.tar.zst": b"\x28\xb5\x2f\xfd"}),
    ],
)
def test_what_is_no_deb_file_is_one_line(tmp_path, deb):
    with pytest.raises(DataError, match=r"tiny: its .deb file cannot be read"):
        unpack_deb(deb, tmp_path, "tiny")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        fetch_packages([describe("tiny", write_deb())], tmp_path / "file" / "fonts")


def test_the_shipped_list_has_a_version_checksum_and_licence_of_every_package():
    packages = load_packages()
    assert len(packages) > 60
    for package in packages.values():
        assert len(package.sha256) == 64
        assert package.size_bytes > 1000
        assert package.licence not in ("", "?")
        assert package.version[0].isdigit()
