"""Completion: what it offers, and that bash, zsh and fish put it on the line."""

import json
import os
import pty
import select
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from concentration.completion import complete, get_script
from concentration.config import check_config, find_config_directory, list_values
from concentration.errors import ConfigError
from concentration.verb_help import list_alternatives


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("concentrate ex", ["export"]),
        ("concentrate p", ["predict", "prepare"]),
        ("concentrate student trai", ["trainer.", "trainer="]),
        ("concentrate student trainer.max_s", ["trainer.max_skipped_share=", "trainer.max_steps="]),
        ("concentrate student top=sc", ["top=sc_sc"]),
        ("concentrate student smear=", []),
        ("concentrate export overwrite=", ["overwrite=changed", "overwrite=false", "overwrite=true"]),
        ("concentrate targets verify=", ["verify=false", "verify=true"]),
        ("concentrate run gate.action=", ["gate.action=off", "gate.action=report", "gate.action=stop"]),
        ("concentrate run teacher.top.norm=", [f"teacher.top.norm={norm}" for norm in ("batch", "layer", "none")]),
        ("concentrate student outside=z", ["outside=zero"]),
        ("concentrate student trainer.batch_size=", []),
        ("concentrate student name='my own' top=sc", ["top=sc_sc"]),
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


def test_a_name_is_offered_as_hydra_takes_it(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/taxonomy.json").write_text(
        json.dumps({"classes": [{"vertical": "song birds"}, {"vertical": "café"}]})
    )
    where = f"'workdir={tmp_path}'"
    for start in ("so", "'so", '"so', "\\'so", "song\\ b", '"song b'):
        assert complete(f"concentrate teacher {where} vertical={start}") == ["vertical='song birds'"]
    assert complete(f"concentrate teacher {where} \"vertical='caf") == ["vertical='café'"]


@pytest.mark.parametrize("verb", ["run", "targets", "predict"])
def test_what_a_comment_lists_may_be_given(verb):
    """Completion reads the comments of conf/: a class imports torch."""
    with initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        composed = compose(verb)
    refused = {}
    for key, value in list_values(verb).items():
        for alternative in list_alternatives(verb, key, value) if not isinstance(value, bool) else ():
            changed = OmegaConf.merge(composed, OmegaConf.from_dotlist([f"{key}={alternative}"]))
            refused[f"{key}={alternative}"] = ""
            try:
                check_config(verb, changed)
            except ConfigError as error:  # another key may have to go with it
                refused[f"{key}={alternative}"] = str(error)
    assert len(refused) >= 2
    assert [given for given, error in refused.items() if f"{given}: expected" in error] == []


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With a command `concentrate` on the path, which completes, and else writes its arguments to a file."""
    command = tmp_path / "concentrate"
    command.write_text(
        f'#!/bin/sh\n[ "$1" = --complete ] && exec "{sys.executable}" -m concentration.cli "$@"\n'
        f'echo "$@" > {tmp_path}/.part; mv {tmp_path}/.part {tmp_path}/arguments\n'
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root, "HOME": str(tmp_path)}


def find_shell(name: str) -> str:
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"NOT TESTED: no {name} here")
    return shell


#: What is typed before the tabulator, and the arguments that the command then has.
TYPED = {
    "concentrate prep": "prepare",
    "concentrate student trainer.max_st": "student trainer.max_steps=",
    "concentrate teacher vertical=so": "teacher vertical='song birds'",
    "concentrate teacher \"vertical='so": "teacher vertical='song birds'",
    "concentrate prepare data.path=imag": "prepare data.path=images",
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_on_a_terminal_puts_it_on_the_line(shell, environment, tmp_path):
    """And hands the whole word on, however a name has to be quoted."""
    (tmp_path / "runs/demo/shards").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "runs/demo/shards/taxonomy.json").write_text(json.dumps({"classes": [{"vertical": "song birds"}]}))
    (tmp_path / "completion").write_text(get_script(shell))
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    start = {
        "bash": "PS1=; bind 'set enable-bracketed-paste off'",
        "zsh": "PS1=; autoload -Uz compinit; compinit -u -D",
        "fish": "true",
    }[shell]
    command = [find_shell(shell), *options, "-i"]
    process, typed = pty.fork()  # fish reads from nothing but the terminal that is its own
    if not process:
        os.chdir(tmp_path)
        os.execve(command[0], command, {**environment, "TERM": "xterm", "LC_ALL": "C.UTF-8"})
    try:
        type_in(typed, f"{start}; source ./completion; touch loaded\n", tmp_path / "loaded")
        for line, expected in TYPED.items():
            type_in(typed, f"{line}\t\n", tmp_path / "arguments")
            assert (tmp_path / "arguments").read_text().rstrip("/\n") == expected, line
            (tmp_path / "arguments").unlink()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def type_in(terminal: int, text: str, written: Path, timeout_seconds: float = 60) -> None:
    """Waits until there is the file that the typed line writes."""
    os.write(terminal, text.encode())
    shown, deadline = "", time.monotonic() + timeout_seconds
    while not written.exists():
        assert time.monotonic() < deadline, f"{text!r} wrote no {written}, and {shown!r} was shown"
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="completion dash: no such shell; did you mean 'bash'"):
        get_script("dash")
