"""What killed processes leave half-written is deleted, and what others write is not."""

import os

from concentration.files import write_atomically
from concentration.progress import Progress
from concentration.temporaries import ABANDONED_SECONDS, clear_temporaries, name_temporary


def test_what_nobody_can_be_writing_any_more_is_deleted(tmp_path):
    old, new = tmp_path / ".index.html.11.tmp", tmp_path / ".index.html.12.tmp"
    folder = tmp_path / ".fruit, and [more].13.tmp"
    folder.mkdir()
    for path in (old, new, folder / "model", tmp_path / "index.html", tmp_path / ".hidden.tmp"):
        path.touch()
    for path in (old, folder):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - ABANDONED_SECONDS - 1))
    clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, "index.html", ".hidden.tmp"}
    clear_temporaries(tmp_path / "nowhere")


def test_of_one_name_alone(tmp_path):
    names = (".fruit.11.tmp", ".fruit.json.11.tmp", ".tools.11.tmp", ".a.fruit.11.tmp")
    for name in names:
        (tmp_path / name).touch()
    clear_temporaries(tmp_path, "fruit", least_age_seconds=0)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {".fruit.11.tmp"}


def test_a_temporary_is_known_as_one(tmp_path):
    write_atomically(tmp_path / "a.json", "{}")
    name_temporary(tmp_path / "a.json").touch()
    clear_temporaries(tmp_path, "a.json", least_age_seconds=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_who_shows_progress_clears_what_a_kill_left_of_a_status(tmp_path):
    left, written = tmp_path / ".status.json.11.tmp", tmp_path / ".status.json.12.tmp"
    left.touch()
    written.touch()
    os.utime(left, (0, 0))
    with Progress("targets", 1, "images", tmp_path):
        assert not left.exists()
        assert written.exists()
