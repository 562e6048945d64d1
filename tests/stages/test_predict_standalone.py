"""`predict.pyz` of an export, as its own Python runs it: its command line, and what is told in one line."""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import draw_image
from serving_exports import write_export

from concentration.stages.export_standalone import write_standalone


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = write_export(tmp_path_factory.mktemp("export") / "fruit and tools")
    write_standalone(folder / "predict.pyz")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "hammer.png").write_bytes(draw_image("hammer", 1))
    return folder


def run_alone(exported: Path, *arguments: str, code: int, flags=("-I",)) -> str:
    command = [sys.executable, *flags, exported / "predict.pyz", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    if code == 0:
        return done.stdout
    [line] = done.stderr.splitlines()
    return line


def test_the_file_alone_says_which_library_is_missing(exported, photos):
    message = run_alone(exported, str(photos), flags=("-I", "-S"), code=2)  # without what is installed
    assert "is not installed; pip install onnxruntime numpy pillow pydantic rich" in message


@pytest.mark.parametrize("given", ["[fruit, tools]", """['fruit', "tools"]""", "['fruit']", "[fruit]"])
def test_the_file_alone_takes_lists_as_the_command_does(given, exported, photos):
    answers = run_alone(exported, str(photos / "hammer.png"), f"verticals={given}", "format=csv", "best=9", code=0)
    found = {row["vertical"] for row in csv.DictReader(io.StringIO(answers))}
    assert found == {vertical for vertical in ("fruit", "tools") if vertical in given}


def test_the_file_alone_takes_commas_and_quotes_inside_of_quotes(exported, photos):
    message = run_alone(exported, str(photos), r"verticals=['it\'s, a=b', fruit]", code=2)
    assert message.startswith("predict: verticals=it's, a=b: no such vertical")


def test_a_home_that_is_not_there_is_one_line_of_the_file_alone(exported):
    assert "~nobody/photo.jpg: no such file" in run_alone(exported, "~nobody/photo.jpg", code=2)


@pytest.mark.parametrize("name", ["taxonomy.json", "calibration.json"])
def test_a_file_of_an_export_that_cannot_be_read_is_one_line(name, exported, photos, tmp_path):
    shutil.copytree(exported, tmp_path / "moved")
    (tmp_path / "moved" / name).unlink(missing_ok=True)
    (tmp_path / "moved" / name).mkdir()  # which root cannot read either
    assert f"{name}: cannot be read (Is a directory)" in run_alone(tmp_path / "moved", str(photos), code=2)
