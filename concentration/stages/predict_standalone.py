"""What `predict.pyz` of an export runs: `predict` with its keys, without Hydra.

python exports/student/predict.pyz photo.jpg holiday/ best=3 format=jsonl
"""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from concentration.errors import ConcentrationError
from concentration.schema import parse_config
from concentration.stages.predict import PredictConfig, ServingConfig, predict
from concentration.stages.verbs import split_words


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers with the export that this file lies in, unless another one is named."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else ConcentrationError.exit_code)
    values, paths = split_words(arguments)
    try:
        given = {"export": str(Path(sys.argv[0]).absolute().parent)}
        given |= {key: _parse_value(value) for key, value in (override.split("=", 1) for override in values)}
        predict(parse_config(PredictConfig, {**given, "paths": tuple(paths)}))
    except ConcentrationError as error:
        print(f"predict: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _parse_value(text: str) -> object:
    if text.startswith("[") and text.endswith("]"):
        return tuple(part.strip() for part in text[1:-1].split(",") if part.strip())
    return None if text == "null" else text


def _usage() -> str:
    keys = [f"  {key}={field.default}" for key, field in PredictConfig.model_fields.items() if key != "paths"]
    words = "\n".join(inspect.cleandoc(config.__doc__) for config in (PredictConfig, ServingConfig))
    return "\n\n".join(
        ["python predict.pyz PATH... [KEY=VALUE ...]", words, "Keys and their values:\n" + "\n".join(keys)]
    )
