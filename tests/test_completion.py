"""Completion: what it offers, and that bash, zsh and fish put it on the line."""

import json
import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from concentration.completion import complete, get_script
from concentration.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("concentrate ex", ["export"]),
        ("concentrate p", ["predict", "prepare"]),
        ("concentrate student trai", ["trainer.", "trainer="]),
        ("concentrate student trainer.max_s", ["trainer.max_skipped_share=", "trainer.max_steps="]),
        ("concentrate student top=sc", ["top=sc_sc"]),
        ("concentrate student smear=", []),
        ("concentrate export overwrite=t", ["overwrite=true"]),
        ("concentrate student top=fc_sc_generic top.gen", ["top.generic="]),
        ("concentrate student unfinished.word= pac", ["pace.", "pace="]),
        ("concentrate stduent to", []),
    ],
)
def test_verbs_keys_and_values_are_offered(line, expected):
    assert complete(line) == expected


def test_names_and_verticals_of_the_working_directory_are_offered(tmp_path):
    for part in ("students/small", "students/large", "teachers/birds", "exports/small", "shards"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "shards/taxonomy.json").write_text(
        json.dumps({"classes": [{"vertical": "birds"}, {"vertical": "cars"}]})
    )
    where = f"workdir={tmp_path}"
    assert complete(f"concentrate export {where} name=") == ["name=large", "name=small"]
    assert complete(f"concentrate predict {where} name=") == ["name=small"]
    assert complete(f"concentrate evaluate {where} name=") == ["name=birds", "name=large", "name=small"]
    assert complete(f"concentrate teacher {where} vertical=c") == ["vertical=cars"]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With a command `concentrate` on the path."""
    command = tmp_path / "concentrate"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m concentration.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root, "HOME": str(tmp_path)}


def find_shell(name: str) -> str:
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"NOT TESTED: no {name} here")
    return shell


def run_script(command: list[str], environment: dict[str, str]) -> list[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout.split()


def test_bash_puts_it_on_the_line(environment):
    """The script in a real bash."""
    ask = 'COMP_LINE="$1"; COMP_POINT=${#1}; _concentrate 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'

    def type_in(line: str) -> list[str]:
        return run_script([find_shell("bash"), "-c", f"{get_script('bash')}\n{ask}", "bash", line], environment)

    assert type_in("concentrate prep") == ["prepare"]
    assert type_in("concentrate student top=sc") == ["sc_sc"], "bash has the part before '=' on the line already"


def test_fish_puts_it_on_the_line(environment):
    """What a real fish offers for a line."""

    def type_in(line: str) -> list[str]:
        script = f"{get_script('fish')}\ncomplete -C '{line}'"
        return run_script([find_shell("fish"), "--no-config", "-c", script], environment)

    assert type_in("concentrate prep") == ["prepare"]
    assert type_in("concentrate student top=sc") == ["top=sc_sc"]


def test_zsh_puts_it_on_the_line(environment, tmp_path):
    """A real zsh on a terminal: its completion works nowhere else."""
    typed, shell = pty.openpty()
    zsh = subprocess.Popen(
        [find_shell("zsh"), "-f", "-i"], stdin=shell, stdout=shell, stderr=shell, env={**environment, "TERM": "dumb"},
        start_new_session=True,
    )  # fmt: skip
    (tmp_path / "completion.zsh").write_text(get_script("zsh"))
    try:
        start = f"unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -u -D; source {tmp_path}/completion.zsh"
        os.write(typed, f"PS1=; {start}; print LOA''DED\n".encode())
        read_until(typed, "\nLOADED")
        for line, whole in (("prep", "prepare"), ("student top=sc", "student top=sc_sc")):
            os.write(typed, f"concentrate {line}\t".encode())
            read_until(typed, f"concentrate {whole}")
            os.write(typed, b"\x15")  # Control-U: an empty line again
    finally:
        zsh.kill()
        zsh.wait()


def read_until(terminal: int, text: str, timeout_seconds: float = 60) -> None:
    shown, deadline = "", time.monotonic() + timeout_seconds
    while text not in shown.replace("\r", ""):
        assert time.monotonic() < deadline, f"{text!r} was not shown, but {shown!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="completion dash: no such shell; did you mean 'bash'"):
        get_script("dash")
