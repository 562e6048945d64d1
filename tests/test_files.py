"""Files that are written whole or not at all."""

import contextlib
import json
import os

import pytest

from concentration.errors import DataError
from concentration.files import write_atomically


@pytest.mark.parametrize("stops_in", ["fsync", "replace"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, stops_in, interruption):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def stop(*_):
        raise interruption

    monkeypatch.setattr(os, stops_in, stop)
    with contextlib.suppress(KeyboardInterrupt, DataError):
        write_atomically(path, "new")
        pytest.fail("the write was not interrupted")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]  # no litter


def test_a_write_that_the_system_refuses_is_an_error_that_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"x\.json: cannot be written \((File exists|Not a directory)\)"):
        write_atomically(tmp_path / "file" / "x.json", {})

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"x\.json: cannot be written \(No space left on device\); free space"):
        write_atomically(tmp_path / "x.json", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]  # no half file, and no temporary one


def test_bytes_text_and_mappings_are_written_into_new_directories(tmp_path):
    for content, expected in ((b"\x00\xff", b"\x00\xff"), ("größe", "größe".encode())):
        write_atomically(tmp_path / "new" / "deep" / "file", content)
        assert (tmp_path / "new" / "deep" / "file").read_bytes() == expected
    write_atomically(tmp_path / "file.json", {"a": ["größe"]})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": ["größe"]}
