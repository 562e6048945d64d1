"""Completion of the command line: what may stand where the cursor is, and what makes a shell ask.

eval "$(concentrate completion bash)"        # in ~/.bashrc; zsh and fish alike
"""

from collections.abc import Sequence
from pathlib import Path

from concentration.config import VERBS, find_config_directory, list_values
from concentration.errors import ConfigError
from concentration.schema import parse_json, suggest

#: What the scripts call, with the line up to the cursor.
OPTION = "--complete"

_BASH = f"""\
_concentrate() {{
    local IFS=$'\\n' line="${{COMP_LINE:0:COMP_POINT}}"
    local word="${{line##* }}"
    COMPREPLY=($(concentrate {OPTION} "$line" 2>/dev/null))
    [[ ${{COMPREPLY[0]}} == *[=.] ]] && compopt -o nospace
    [[ $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%%=*}}="}}")  # bash takes '=' for a word's end
    return 0
}}
complete -o default -F _concentrate concentrate
"""
_ZSH = f"""\
_concentrate() {{
    local -a found
    found=("${{(@f)$(concentrate {OPTION} "$LBUFFER" 2>/dev/null)}}")
    compadd -Q -S '' -- ${{(@)found:#}} || _files
}}
compdef _concentrate concentrate
"""
_FISH = f"""\
complete -c concentrate -a '(concentrate {OPTION} (commandline -cp | string collect) 2>/dev/null)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def get_script(shell: str) -> str:
    """Raises: ConfigError where the shell is none of these."""
    if shell not in SCRIPTS:
        raise ConfigError(f"completion {shell}: no such shell{suggest(shell, SCRIPTS)}")
    return SCRIPTS[shell]


def complete(line: str) -> list[str]:
    """The words that may stand at the end of a line; of keys those parts up to the next dot.

    Raises:
        ConfigError: the words before are wrong.
    """
    _, *words = line.split(" ")
    if len(words) <= 1:
        return _starting_with(words[-1] if words else "", VERBS)
    verb, *before, word = words
    if verb not in VERBS:
        return []
    key, has_value, start = word.partition("=")
    if has_value:
        return [f"{key}={option}" for option in _starting_with(start, _list_choices(verb, key, before))]
    keys = [f"{name}=" for name in (*list_values(verb, before), *_list_groups())]
    short = {name if "." not in name[len(word) :] else name[: name.index(".", len(word)) + 1] for name in keys
             if name.startswith(word)}  # fmt: skip
    return sorted(short)


def _list_choices(verb: str, key: str, before: Sequence[str]) -> list[str]:
    """The options of a group; the names that there are in the working directory; true or false."""
    group = key.partition("@")[0]
    if group in _list_groups():
        return [path.stem for path in (find_config_directory() / group).glob("*.yaml")]
    values = list_values(verb, before)
    workdir = Path(str(values.get("workdir", ".")))
    if key == "name":
        kinds = {"predict": ("exports",), "demo": ("exports",), "evaluate": ("students", "teachers")}
        return [path.name for kind in kinds.get(verb, ("students",)) for path in workdir.glob(f"{kind}/*")]
    if key == "vertical" and (workdir / "shards/taxonomy.json").exists():
        content = parse_json((workdir / "shards/taxonomy.json").read_bytes(), "taxonomy.json")
        return [c["vertical"] for c in content["classes"]]
    return ["true", "false"] if isinstance(values.get(key), bool) else []


def _list_groups() -> list[str]:
    return [path.name for path in find_config_directory().iterdir() if path.is_dir() and path.name != "hydra"]


def _starting_with(start: str, words: object) -> list[str]:
    return sorted({word for word in words if word.startswith(start)})
