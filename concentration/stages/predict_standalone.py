"""What `predict.pyz` of an export runs: `predict` with its keys, without Hydra.

python exports/student/predict.pyz photo.jpg holiday/ best=3 format=jsonl
"""

import inspect
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from concentration.errors import ConcentrationError, ConfigError
from concentration.schema import parse_config
from concentration.serving.export_folder import PREPROCESSING_FILE
from concentration.stages.predict import PredictConfig, ServingConfig, predict
from concentration.stages.verbs import split_words
from concentration.streams import open_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers with the export that this file lies in, unless another one is named."""
    open_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else ConcentrationError.exit_code)
    values, paths = split_words(arguments)
    try:
        if removed := [word for word in values if "=" not in word]:
            raise ConfigError(f"{removed[0]}: no such file, and no KEY=VALUE; correct the path or give a value")
        given = {"export": str(_find_export(Path(sys.argv[0])))}
        given |= {key: _parse_value(value) for key, value in (override.split("=", 1) for override in values)}
        predict(parse_config(PredictConfig, {**given, "paths": tuple(paths)}))
    except ConcentrationError as error:
        print(f"predict: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("predict: stopped from the keyboard", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _find_export(file: Path) -> Path:
    """The folder of this file, or of what it is a link to: a link on the PATH, say; but a store may hold all files as links."""
    folder = file.absolute().parent
    return folder if (folder / PREPROCESSING_FILE).exists() else file.resolve().parent


def _parse_value(text: str) -> object:
    if text.startswith("[") and text.endswith("]"):
        return tuple(_unquote(part.strip()) for part in _ITEM.findall(text[1:-1]) if part.strip())
    return None if text == "null" else text


#: Of a list: quoted, so that commas may be inside, or not.
_ITEM = re.compile(r"""\s*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")\s*(?=,|$)|[^,]+""")


def _unquote(text: str) -> str:
    """As `concentrate` reads it: what is quoted is a text as it stands, but for a quote behind a backslash."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return text
    return text[1:-1].replace(f"\\{text[0]}", text[0])


def _usage() -> str:
    keys = [f"  {key}={field.default}" for key, field in PredictConfig.model_fields.items() if key != "paths"]
    words = "\n".join(inspect.cleandoc(config.__doc__) for config in (PredictConfig, ServingConfig))
    return "\n\n".join(
        ["python predict.pyz PATH... [KEY=VALUE ...]", words, "Keys and their values:\n" + "\n".join(keys)]
    )
