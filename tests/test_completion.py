"""Completion: what it offers, and that bash puts it on the line."""

import json
import os
import shutil
import stat
import subprocess
import sys
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


def test_bash_puts_it_on_the_line(tmp_path):
    """The script in a real bash, with a command of this name on the path."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("NOT TESTED: no bash here")
    command = tmp_path / "concentrate"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m concentration.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    ask = 'COMP_LINE="$1"; COMP_POINT=${#1}; _concentrate 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def type_in(line: str) -> list[str]:
        script = f"{get_script('bash')}\n{ask}"
        done = subprocess.run(
            [bash, "-c", script, "bash", line], env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout.split()

    assert type_in("concentrate prep") == ["prepare"]
    assert type_in("concentrate student top=sc") == ["sc_sc"], "bash has the part before '=' on the line already"


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="completion dash: no such shell; did you mean 'bash'"):
        get_script("dash")
