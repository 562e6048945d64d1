"""Hydra composes a verb's config; pydantic checks it; what is wrong becomes one line with the nearest valid key."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concentration.errors import ConfigError
from concentration.schema import Config, flatten, parse_config, suggest, write_override, write_value
from concentration.stages.verbs import STAGE_VERBS, Verb

VERBS: Mapping[str, Verb] = {
    **STAGE_VERBS,
    "run": Verb("all of the above, skipping what is done", "concentration.pipeline.run", "run", "RunConfig"),
    "status": Verb(
        "what stands where in a working directory", "concentration.pipeline.status", "status", "StatusConfig"
    ),
    "predict": Verb(
        "the most probable classes of images: concentrate predict PATH...",
        "concentration.stages.predict",
        "predict",
        "PredictConfig",
        positional="paths",
    ),
    "demo": Verb(
        "a local web page: drop an image, see the answer by vertical", "concentration.stages.demo", "demo", "DemoConfig"
    ),
}


def find_config_directory() -> Path:
    """`conf/`: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def list_options(group: str, chosen: str | None) -> list[str]:
    """The options of a group that may stand where `chosen` does.

    Some change the whole config and are taken on top of nothing (a row of a table), some are a part of it: `method` has both,
    for `run` and for `group`.
    """
    paths = {path.stem: path for path in (find_config_directory() / group).glob("*.yaml")}
    is_whole = {name: "@package _global_" in path.read_text(encoding="utf-8") for name, path in paths.items()}
    return sorted(name for name in paths if is_whole[name] == is_whole.get(chosen, True))


def check_config(verb: str, composed: Any, words: Sequence[str] = ()) -> Config:
    """The checked config of a verb from what Hydra composed, and from the words that are for its positional key.

    Raises:
        ConfigError: a value is missing or wrong, or a key is unknown.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(describe_composition_error(error, verb)) from None
    if words:
        values[VERBS[verb].positional] = list(words)
    _, config_class = VERBS[verb].load()
    return parse_config(config_class, values)


def describe_composition_error(error: Exception, verb: str, overrides: Sequence[str] = ()) -> str:
    """Hydra's message in one line, with the nearest key that is valid with the choices among the overrides."""
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return f"a config file is not UTF-8 ({text}); save it as UTF-8"
    if text.startswith("Config group override must be a string or a list"):
        groups = _list_groups()
        given = [word for word in overrides if word.partition("=")[0].partition("@")[0] in (*groups, "")]
        return f"{given[-1] if given else text}: expected one of its choices (`concentrate {verb} --help` shows all)"
    if (override := getattr(error, "override", None)) is not None:  # of Hydra's grammar, which may not read a letter
        return _describe_unread(override)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: 1\. | requires)", text):
        return _describe_several(match[1])
    if match := re.search(r"Missing mandatory value:.*full_key: (\S+)", text):
        return f"'{match[1]}' is missing: give {match[1]}=VALUE"
    if match := re.search(r"Interpolation key '(.*?)' not found full_key: (\S+)", text):
        key, text = match[2], f"${{{match[1]}}}"
        return f"{key}: there is no key '{match[1]}' for {text}; a text with it: {write_override(key, text)}"
    if match := re.search(r"No match in the defaults list\. To append to your default list use \+(\S+)", text):
        return f"{match[1]}: `concentrate {verb}` has no such choice to make (`concentrate {verb} --help` shows all)"
    if match := re.search(r"Could not (?:override|append).*?'([\w@./]+)(?:=.*?)?'\.", text):
        key = match[1]
        if key in _known_keys(_compose_choices(verb)):
            return f"{key} has no effect with the choices that were made; leave it out"
        values = _compose_choices(verb, overrides)
        advice = _describe_borrowed(key, values, overrides) or suggest(key, _known_keys(values))
        return f"unknown key '{key}'{advice} (`concentrate {verb} --help` shows all)"
    if match := re.search(
        r"In '[^']*': Could not find '([^']+)'.*?Available options in '[^']+':(.*?)(?:Config search path|$)", text
    ):
        group, _, option = match[1].rpartition("/")
        return f"{group or 'config'}={option}: no such choice{suggest(option, match[2].split())}"
    return text


def _describe_unread(override: str) -> str:
    key, has_value, value = override.partition("=")
    if not has_value:
        return f"'{override}': expected KEY=VALUE"
    if value.startswith("[") and value.endswith("]"):
        texts = [text.strip(" '\"") for text in value[1:-1].split(",")]
        example = f"write its texts with special characters in quotes: {write_override(key, texts)}"
    else:
        text = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
        example = f"a text with special characters is put in quotes: {write_override(key, text)}"
    return f"'{override}': cannot be read; {example}"


def _describe_several(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"{override}: several values, expected one; a text with commas or brackets is put in quotes: "
        f'{write_override(key, value)}, a list is "{key}=[A,B]", and with -m each is a run of its own'
    )


def list_values(verb: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The dotted keys of a verb's config and their values, with the choices and working directory among the overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    known = [word for word in overrides if re.match(r"[\w@/]+=.", word)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        try:
            composed = compose(verb, known)
        except (HydraException, ValueError):  # a word that is not finished, or not understood
            composed = compose(verb)
    return flatten(OmegaConf.to_container(composed, resolve=False))


def _compose_choices(verb: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A verb's config; of the overrides only those count that choose an option of a group."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    groups = _list_groups()
    choices = [override for override in overrides if re.split("[@=]", override, maxsplit=1)[0] in groups]
    try:
        composed = compose(config_name=verb, overrides=choices)
    except HydraException:  # the mistake is in a choice itself
        composed = compose(config_name=verb)
    return OmegaConf.to_container(composed, resolve=False)


def _known_keys(values: Mapping[str, Any]) -> list[str]:
    keys = flatten(values)
    return [*keys, *_list_groups(), *{key.rpartition(".")[0] for key in keys if "." in key}]


def _describe_borrowed(key: str, values: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """What to type for a key inside of what is another's as a whole, `generalist.optimizer: ${optimizer}`; "" for other keys."""
    whole, _, inner = key.rpartition(".")
    lender = re.fullmatch(r"\$\{(\w+)\}", str(flatten(values).get(whole)))
    given = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == key]
    lent = values.get(lender[1]) if lender else None
    if not given or not isinstance(lent, Mapping) or inner not in lent:
        return ""
    known = ", ".join(f"{k}: {given[-1] if k == inner else write_value(v)}" for k, v in lent.items())
    override = shlex.quote(f"{whole}={{{known}}}")
    return f": {whole} is {lender[0]} as a whole; give another whole one, {override}"


def _list_groups() -> list[str]:
    """The groups of choices."""
    return [path.name for path in find_config_directory().iterdir() if path.is_dir()]
