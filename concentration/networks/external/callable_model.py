"""A model that a Python function of the user's returns.

Shapes: B batch, O outputs of the model.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import Tensor, nn

from concentration.errors import ConfigError, DataError, one_line
from concentration.networks.external.model import ExternalModel, ExternalModelConfig, check_is_file, copy_file
from concentration.schema import suggest


class CallableModelConfig(ExternalModelConfig):
    """A model that a Python function of your own returns."""

    kind: Literal["callable"] = "callable"
    image_size: pydantic.PositiveInt

    function: str
    """`package.module:function`, importable from the working directory or the Python path. It is called once, with `path` as its
    argument if that is given, and returns the model: a callable from float images (B, 3, H, W) to a tensor (B, O)."""

    path: Path | None = None
    """A file that the function reads, such as its weights."""

    source: Path | None = None
    """Set by `concentrate teacher`: the file of the module. It is not copied, and must not change."""


class CallableModel(ExternalModel):
    """The model that the configured function returned.

    A torch module is put into eval mode and moved to the device. Any other callable gets images on the CPU.
    """

    def __init__(self, config: CallableModelConfig):
        source, *given = self.find_files(config)
        function = _import_function(config.function, source)
        try:
            self._model = function(*given)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"external.function={config.function}: {_describe_failure(error, source)}") from error
        if not callable(self._model):
            raise ConfigError(
                f"external.function={config.function}: returned {type(self._model).__name__}, expected the model, which is "
                "called with images"
            )
        self.module = self._model.eval() if isinstance(self._model, nn.Module) else None
        self.config = config.model_copy(update={"source": source})

    @property
    def where(self) -> str:
        return f"external.function={self.config.function}"

    @classmethod
    def find_files(cls, config: CallableModelConfig) -> tuple[Path, ...]:
        source = _find_module(config)
        return (source,) if config.path is None else (source, check_is_file(config.path, "external.path"))

    def __call__(self, images: Tensor) -> Tensor:
        outputs = self._model(images if self.module is not None else images.cpu())
        return outputs.to(self.device) if isinstance(outputs, Tensor) else outputs

    def save(self, directory: Path) -> ExternalModelConfig:
        if self.config.path is None:
            return self.config
        copy_file(self.config.path, directory / self.config.path.name)
        return self.config.model_copy(update={"path": Path(self.config.path.name)})


def _find_module(config: CallableModelConfig) -> Path:
    """The file of the module that the function is in. Puts the folder to import it from on the Python path.

    Raises:
        ConfigError: the name is not of the form package.module:function, or there is no such module.
        DataError: the module is another file than when the teacher was made.
    """
    module, _, name = config.function.partition(":")
    parts = module.split(".")
    if not all(part.isidentifier() for part in (*parts, name)):
        raise ConfigError(f"external.function={config.function}: expected package.module:function")
    folder = Path.cwd()
    if config.source is not None:
        is_package = config.source.name == "__init__.py"
        folder = config.source.parents[len(parts) - 1 + is_package]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # the package that it should be in cannot be imported
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"external.function={config.function}: no module {module} in {folder} or on the Python path")
    found = Path(spec.origin).resolve()
    if config.source is not None and found != config.source:
        raise DataError(
            f"external.function={config.function}: {module} is {found} here, and was {config.source}; rename one of the two"
        )
    return found


def _import_function(function: str, source: Path) -> Callable[..., Any]:
    """The function `package.module:function`. Raises: ConfigError if the module cannot be imported, fails, or lacks it."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"external.function={function}: {source} cannot be imported ({error})") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"external.function={function}: {_describe_failure(error, source)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [word for word, value in vars(module).items() if callable(value)]
        raise ConfigError(f"external.function={function}: {source} has no function {name}{suggest(name, functions)}")
    return found


def _describe_failure(error: BaseException, source: Path) -> str:
    """What the user's own code raised, and where, if that was in the module itself."""
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if Path(at.filename).resolve() == source]
    place = f", line {lines[-1]}," if lines else ""
    return f"{source}{place} fails ({type(error).__name__}: {one_line(error)}); correct it"
