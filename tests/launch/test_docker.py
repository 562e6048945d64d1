"""The image: linted by hadolint, and installed as a checkout is. It is not built here: that needs a daemon and 5 GB."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(text: str) -> list[list[str]]:
    """[name, word, ...] of every instruction; continued lines are joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


INSTRUCTIONS = instructions(DOCKERFILE.read_text())


def words_of(name: str) -> list[list[str]]:
    return [words for instruction, *words in INSTRUCTIONS if instruction == name]


def lint(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing():
    linted = lint(DOCKERFILE)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("found", "replacement", "rule"),
    [("FROM python:", "FROM python AS runtime", "DL3006"), ("WORKDIR /app", "WORKDIR app", "DL3000")],
)
def test_hadolint_would_find_something(tmp_path, found, replacement, rule):
    text = DOCKERFILE.read_text()
    assert found in text
    (tmp_path / "Dockerfile").write_text(re.sub(f"{found}.*", replacement, text, count=1))
    assert rule in lint(tmp_path / "Dockerfile").stdout


def test_everything_is_installed_by_the_makefile_in_the_place_where_it_installs():
    """What the Makefile has pip install, stage by stage, is what the image has; nothing is installed beside it."""
    text = DOCKERFILE.read_text()
    runtime, dev = text.split("FROM runtime AS dev")
    assert "make .venv/installed\n" in runtime
    assert "make .venv/installed-dev" in dev
    assert "pip install" not in text
    assert "PATH=/app/.venv/bin:$PATH" in words_of("ENV")[0]
    steps = subprocess.run(
        ["make", "--dry-run", "--always-make", "VENV=.venv", ".venv/installed-dev"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.findall(r"pip install.*", steps) == [
        "pip install --quiet --editable .",
        'pip install --quiet --editable ".[dev]"',
    ]


def test_the_folders_for_the_first_installation_are_those_of_the_packages(tmp_path):
    pyproject = ROOT / "pyproject.toml"
    (tmp_path / "pyproject.toml").write_bytes(pyproject.read_bytes())
    subprocess.run([sys.executable, ROOT / "docker/package_folders.py"], cwd=tmp_path, check=True)
    packages = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["packages"]
    made = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("__init__.py")}
    assert made == {path.parent.relative_to(ROOT) for path in (ROOT / "concentration").rglob("__init__.py")} | {
        Path("conf")
    }
    assert len(made) == len(packages)


def test_it_does_not_run_as_root_and_its_base_is_pinned():
    user = [words[0] for words in words_of("USER")]
    assert user == ["1000:1000"]
    [base, _] = words_of("FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", base[0])
    assert [words[2] for words in words_of("FROM")] == ["runtime", "dev"]


def test_the_context_is_small_and_holds_all_that_is_copied():
    ignore = [line for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "*", "what is not named stays outside"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for words in words_of("COPY") for source in words[:-1] if not source.startswith("--")}
    assert {source.partition("/")[0] for source in copied} == allowed
    if not shutil.which("git"):
        return  # inside the image there is nothing else than this context
    tracked = subprocess.run(
        ["git", "ls-files", *allowed], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    files = [ROOT / line for line in tracked.splitlines()]
    sizes = [path.stat().st_size for path in files if path.exists()]
    assert max(sizes) < 0.5e6, "sources and pages, and neither data nor networks"
    assert sum(sizes) < 8e6
