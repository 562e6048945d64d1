"""Completion of the command line: what may stand where the cursor is, and what makes a shell ask.

eval "$(concentrate completion bash)"        # in ~/.bashrc; zsh and fish alike
"""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from concentration.config import VERBS, find_config_directory, list_values
from concentration.errors import ConfigError
from concentration.schema import parse_json, quote, suggest
from concentration.verb_help import list_alternatives

#: What the scripts call, with the line up to the cursor.
OPTION = "--complete"

_BASH = f"""\
_concentrate() {{
    local word quote="${{COMP_WORDS[COMP_CWORD]:0:1}}"
    COMPREPLY=()
    while IFS= read -r word && [[ $word ]]; do
        [[ $word == *[=.] ]] && compopt -o nospace
        [[ $2 == *=* || $word == *= ]] || word="${{word#*=}}"  # bash takes '=' for a word's end
        case $quote in
            [\\"\\']) [[ $word == *"$quote"* ]] || COMPREPLY+=("$word") ;;  # which bash closes
            *) COMPREPLY+=("$(printf %q "$word")") ;;
        esac
    done < <(concentrate {OPTION} "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null)
}}
complete -o default -F _concentrate concentrate
"""
_ZSH = f"""\
_concentrate() {{
    local -a found
    found=("${{(@f)$(concentrate {OPTION} "${{(j: :)words[1,CURRENT-1]}} $QIPREFIX$PREFIX" 2>/dev/null)}}")
    compadd -U -S '' -- ${{(M)found:#*[=.]}}
    compadd -U -- ${{found:#(|*[=.])}}
    (( compstate[nmatches] )) || {{ compset -P '*='; _files }}
}}
compdef _concentrate concentrate
"""
_FISH = f"""\
function _concentrate
    set -g _concentrate_found (concentrate {OPTION} (commandline -cp | string collect) 2>/dev/null | string match -v '')
    set -q _concentrate_found[1]
end
complete -c concentrate -n _concentrate -f -a '$_concentrate_found'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def get_script(shell: str) -> str:
    """Raises: ConfigError where the shell is none of these."""
    if shell not in SCRIPTS:
        raise ConfigError(f"completion {shell}: no such shell{suggest(shell, SCRIPTS)}")
    return SCRIPTS[shell]


def complete(line: str) -> list[str]:
    """The words that may stand at the end of a line, as programs are given them; of keys those parts up to the next dot.

    Raises:
        ConfigError: the words before are wrong.
    """
    _, *words = _split(line)
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


def _split(line: str) -> list[str]:
    """The words of a line, the last of which may be empty or in quotes that are not closed yet."""
    for end in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            *before, last = shlex.split(f"{line}.{end}")
            return [*before, last[:-1]]
    return []


def _list_choices(verb: str, key: str, before: Sequence[str]) -> list[str]:
    """The options of a group; the names that there are in the working directory; what the key may be."""
    group = key.partition("@")[0]
    if group in _list_groups():
        return [path.stem for path in (find_config_directory() / group).glob("*.yaml")]
    values = list_values(verb, before)
    workdir = Path(str(values.get("workdir", ".")))
    if key == "name":
        kinds = {"predict": ("exports",), "demo": ("exports",), "evaluate": ("students", "teachers")}
        return [quote(path.name) for kind in kinds.get(verb, ("students",)) for path in workdir.glob(f"{kind}/*")]
    if key == "vertical" and (workdir / "shards/taxonomy.json").exists():
        content = parse_json((workdir / "shards/taxonomy.json").read_bytes(), "taxonomy.json")
        return [quote(c["vertical"]) for c in content["classes"]]
    if key == "overwrite" and key in values:
        return ["true", "false", "changed"]
    value = values.get(key)
    return ["true", "false"] if isinstance(value, bool) else list_alternatives(verb, key, value)


def _list_groups() -> list[str]:
    return [
        path.name for path in find_config_directory().iterdir() if any(path.glob("*.yaml")) and path.name != "hydra"
    ]


def _starting_with(start: str, words: object) -> list[str]:
    """The words among `words`, where quotes of Hydra's do not count: who looks for a name does not know that it needs them."""
    return sorted({word for word in words if word.lstrip("'\"").startswith(start.lstrip("'\""))})
