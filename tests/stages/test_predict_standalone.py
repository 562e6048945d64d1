"""`predict.pyz` of an export, as its own Python runs it: its command line, and what is told in one line."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import list_examples
from PIL import ExifTags, Image
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


@pytest.mark.parametrize("kind", ["rotated.jpg", "large.jpg", "transparent.png"])
def test_a_program_of_ones_own_gets_what_predict_says(kind, exported, tmp_path):
    """As docs/serving.md shows it, in a process that has no `concentration` but the one in the file."""
    (tmp_path / "runs/mine/exports").mkdir(parents=True)
    (tmp_path / "runs/mine/exports/student").symlink_to(exported)
    image, photo = Image.open(io.BytesIO(draw_image("hammer", 1))).convert("RGB"), tmp_path / "photo.jpg"
    if kind == "rotated.jpg":
        orientation = Image.Exif()
        orientation[ExifTags.Base.Orientation] = 6
        image.resize((130, 131)).save(photo, exif=orientation)
    elif kind == "large.jpg":
        image.resize((777, 333)).save(photo)
    else:
        image.putalpha(image.convert("L"))
        image.save(photo, format="PNG")
    [example] = list_examples("docs/serving.md", "From your own program")
    run_here = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-I", "-c", example], **run_here, check=False)
    assert done.returncode == 0, done.stderr
    class_id, vertical, probability = done.stdout.split()
    [answer] = json.loads(run_alone(exported, str(photo), "format=jsonl", "best=1", "classes=all", code=0))["classes"]
    assert (answer["id"], answer["vertical"]) == (class_id, vertical)
    assert answer["probability"] == pytest.approx(float(probability), abs=1e-5)


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


def test_answers_that_nobody_reads_to_their_end_end_without_a_word(exported, photos):
    """`predict.pyz ... | head -1`: the first answer fills the pipe, and the reader is gone."""
    many = [str(photos / "hammer.png")] * 3000
    command = [sys.executable, "-I", exported / "predict.pyz", *many, "format=jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert json.loads(running.stdout.readline())["path"] == many[0]
        running.stdout.close()
        said = running.stderr.read()
        assert running.wait(timeout=60) == 0
    assert all(line.startswith("predict: ") and "/3000 images" in line for line in said.splitlines()), said


@pytest.mark.parametrize("format", ["table", "jsonl", "csv"])
def test_answers_that_nobody_reads_end_without_a_word(format, exported, photos):
    line = f'"{sys.executable}" -I "{exported}/predict.pyz" "{photos}" format={format} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("format", ["table", "jsonl", "csv"])
@pytest.mark.parametrize("times", [1, 100], ids=["once", "often"])
def test_answers_that_cannot_be_written_are_one_line(format, times, exported, photos):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-I", exported / "predict.pyz", *[str(photos)] * times, f"format={format}"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "predict: standard output: No space left on device; free some, or send it elsewhere, and run again\n"
    )


def test_streams_that_are_closed_are_none_of_its_business(exported, photos, tmp_path):
    command = (
        f'"{sys.executable}" -I "{exported}/predict.pyz" "{photos}" format=csv output="{tmp_path}/a.csv" <&- >&- 2>&-'
    )
    assert subprocess.run(["sh", "-c", command], timeout=120, check=False).returncode == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 6


def test_a_link_to_the_file_finds_the_export_and_an_export_of_links_is_one(exported, photos, tmp_path):
    expected = run_alone(exported, str(photos), code=0)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/predict.pyz").symlink_to(exported / "predict.pyz")
    assert run_alone(tmp_path / "bin", str(photos), code=0) == expected
    (tmp_path / "store").mkdir()  # as those who keep large files by their hashes have it
    (tmp_path / "links").mkdir()
    for number, file in enumerate(exported.iterdir()):
        shutil.copy(file, tmp_path / f"store/{number}")
        (tmp_path / "links" / file.name).symlink_to(tmp_path / f"store/{number}")
    assert run_alone(tmp_path / "links", str(photos), code=0) == expected


@pytest.mark.parametrize("library", ["onnxruntime", "numpy", "faiss"])
def test_a_library_of_another_processor_is_one_line_with_the_reason(library, exported, photos, tmp_path):
    (tmp_path / f"{library}.py").write_text("raise ImportError('x.so: wrong ELF class\\n\\nsee the manual')")
    shutil.copytree(exported, tmp_path / "export")
    shutil.copytree(photos, tmp_path / "new" / "class")
    command = [sys.executable, "export/predict.pyz", "new", "neighbours=true", "examples=new"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert "cannot be loaded (x.so: wrong ELF class see the manual); here, pip install --force-reinstall" in line


def test_ctrl_c_while_it_imports_is_one_line(exported, photos, tmp_path):
    # A process that was started in the background, as these tests may be, ignores SIGINT.
    interrupt = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "numpy.py").write_text(f"import os, signal\n{interrupt}")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"}
    command = [sys.executable, exported / "predict.pyz", photos]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "predict: stopped from the keyboard\n")


def test_links_between_folders_are_followed_and_links_to_nowhere_are_answered_as_that(exported, photos, tmp_path):
    (tmp_path / "asked/inside").mkdir(parents=True)
    (tmp_path / "asked/more").symlink_to(photos)
    (tmp_path / "asked/inside/back").symlink_to(tmp_path / "asked")
    (tmp_path / "asked/gone.png").symlink_to(tmp_path / "nothing")
    answers = run_alone(exported, str(tmp_path / "asked"), "format=jsonl", code=0)
    found = {
        Path(a["path"]).relative_to(tmp_path).as_posix(): a.get("error") for a in map(json.loads, answers.splitlines())
    }
    assert found == {"asked/gone.png": "is missing", "asked/more/hammer.png": None}


def test_a_name_cannot_tell_the_terminal_what_to_do(exported, photos, tmp_path):
    name = "\x1b[31m\x07new\nline\u202egnp.png"
    shutil.copy(photos / "hammer.png", tmp_path / name)
    shown = run_alone(exported, str(tmp_path), code=0)
    assert "/?[31m?new?line?gnp.png" in "".join(line[:40].strip() for line in shown.splitlines()[1:])
    assert not set("\x1b\x07\u202e") & set(shown)
    [answer] = run_alone(exported, str(tmp_path), "format=jsonl", code=0).splitlines()
    assert Path(json.loads(answer)["path"]).name == name, "for programs it is what it is"
    export = shutil.copytree(exported, tmp_path / "exported")
    taxonomy = export / "taxonomy.json"
    joined = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # Persian, with a joiner that is a part of its spelling
    taxonomy.write_text(taxonomy.read_text().replace('"Hammer"', json.dumps(f"\x1b[31m{joined}\u202e")))
    assert f"?[31m{joined}?" in run_alone(export, str(photos / "hammer.png"), code=0)
