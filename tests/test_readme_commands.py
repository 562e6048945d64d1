"""The README's commands about a user's own images, run one after the other as they stand there, on very few images."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from real_runs import concentrate_here, draw_image, load_json

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CLASSES = {"birds": ("gull", "owl", "wren"), "cars": ("taxi", "van", "truck"), "boats": ("canoe", "ferry", "raft")}
FISH = {"fish": ("carp", "eel", "ray")}
SMALL = ("base.channels=[4,8]", "base.norm=group", "top.top1=12", "top.top2=8", "top.norm=layer")
SHORT = ("trainer.num_workers=0", "trainer.batch_size=16", "trainer.max_epochs=1")
#: What makes a verb's networks so small that the test ends.
TINY = {
    "run": (*SMALL, *SHORT, *(f"teacher.{word}" for word in (*SHORT, *SMALL[2:4])), "num_processes=1"),
    "student": (*SMALL, *SHORT),
    "add": (*SHORT, *(f"teacher.{word}" for word in (*SMALL, *SHORT)), "tolerance=0.99"),
    "export": ("speed_seconds=0.01", "neighbours=20"),
}  # fmt: skip


def find_command(start: str) -> str:
    """The first line of the README that starts so, whole."""
    return next(line for line in re.findall(r"^    (concentrate .*)$", README, re.MULTILINE) if line.startswith(start))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def draw(root: Path, classes: dict[str, tuple[str, ...]]) -> None:
    for vertical, names in classes.items():
        for name in names:
            (root / "images" / vertical / name).mkdir(parents=True)
            for number in range(20):
                (root / "images" / vertical / name / f"{number}.png").write_bytes(draw_image(name, number))


@pytest.fixture
def type_in(root, monkeypatch):
    monkeypatch.chdir(root)

    def run(command: str, *more: str) -> str:
        _, verb, *words = shlex.split(command, comments=True)
        return concentrate_here(verb, *words, *TINY.get(verb, ()), *more)

    return run


@pytest.mark.long
def test_own_images_from_a_folder_to_an_export_and_next_months_verticals(root, type_in):
    draw(root, CLASSES)
    [command] = re.findall(r"`(concentrate run data=image_folder [^`]*)`", README)
    folder = ("data.near_duplicates=null",)
    type_in(command.replace("FOLDER", "images").replace("data.image_size=64", "data.image_size=16"), *folder)
    assert (root / "runs/mine/report/index.html").exists()

    assert "finished already" in type_in(find_command("concentrate targets workdir=runs/mine gate.action=stop"),
                                         "gate.action=report")  # fmt: skip
    type_in(find_command("concentrate targets workdir=runs/mine verify=true"))
    type_in(find_command("concentrate student workdir=runs/mine targets=online"))
    type_in(find_command("concentrate targets workdir=runs/mine targets.name=packed"))
    type_in(find_command("concentrate calibrate name=student workdir=runs/mine"))

    without = type_in(find_command("concentrate remove vertical=cars"))
    assert "outputs by vertical, in order: " in without
    merged = type_in(find_command("concentrate merge 'verticals=[cars,boats]'"))
    [then] = re.findall(r"(concentrate add vertical=vehicles .*)$", merged, re.MULTILINE)
    type_in(then)

    draw(root, FISH)
    same = [word for word in shlex.split(command)[2:] if word.startswith("data")]
    append = " ".join(["concentrate prepare append=true workdir=runs/mine", *same]).replace("FOLDER", "images")
    type_in(append.replace("data.image_size=64", "data.image_size=16"), *folder)
    type_in(find_command("concentrate add vertical=fish workdir=runs/mine"))
    assert load_json(root / "runs/mine/students/next/DONE.json")["ap_after"].keys() == CLASSES.keys()
    shutil.rmtree(root / "runs/mine/evaluations")
    type_in("concentrate evaluate name=next workdir=runs/mine")

    for verb in ("evaluate", "export"):  # of a student that nothing was trained for
        type_in(f"concentrate {verb} name=student workdir=runs/without_cars")
    assert "concentrated from a specialist" in (root / "runs/without_cars/exports/student/README.md").read_text()
    type_in("concentrate predict paths=[images/birds/owl/3.png] workdir=runs/without_cars output=a.csv")
    answered = (root / "a.csv").read_text()
    assert "birds" in answered
    assert "cars" not in answered
