"""What the README shows works: its library example runs, and its commands compose."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from concentration.config import VERBS, find_config_directory
from concentration.stages.verbs import split_words

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    """Lines, and code in lines, that start with `concentrate VERB`; lines that end in a backslash are joined."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"^    (concentrate \w+ .*)$", text, re.MULTILINE) + re.findall(
        r"`(concentrate \w+ [^`]*)`", text
    )
    return [command for command in found if "KEY=" not in command and command.split()[1] in VERBS]


def test_the_library_example_runs():
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    variables: dict = {}
    exec(compile(example, "README.md", "exec"), variables)
    assert variables["loss"].isfinite()
    assert variables["top"].classifiers[0].weight.grad is not None


def test_the_readme_names_the_two_commands_that_the_makefile_has():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^    make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", _commands())
def test_a_command_of_the_readme_composes(command):
    _, verb, *words = shlex.split(command, comments=True)
    overrides = [word.replace("FOLDER", "/images") for word in words if word not in ("-m", "--help")]
    if VERBS[verb].positional:
        overrides, _ = split_words(overrides)
    if "-m" in words:  # the first job of a multirun stands for all
        overrides = [re.sub(r"=([^\[,]+),.*$", r"=\1", override) for override in overrides]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        composed = hydra.compose(verb, overrides)
    assert OmegaConf.to_container(composed, resolve=True)


def test_the_readme_has_commands_to_compose():
    assert len(_commands()) >= 3
