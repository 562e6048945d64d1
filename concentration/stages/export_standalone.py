"""`predict.pyz`: what answers with an export, as one file that Python runs without this package installed."""

import ast
import io
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import concentration
from concentration.files import write_atomically

STANDALONE_FILE = "predict.pyz"
#: What has to be installed for it; faiss-cpu beside them for neighbours.
REQUIREMENTS = ("onnxruntime", "numpy", "pillow", "pydantic", "rich")

_START = "concentration.stages.predict_standalone"
# NOTE: in words that Python 2 understands, too, so that it says what is wrong.
_MAIN = f"""\
import sys

if sys.version_info < (3, 11):
    sys.stderr.write("predict: Python %d.%d is too old; run it with 3.11 or later\\n" % sys.version_info[:2])
    sys.exit(2)
try:
    from {_START} import main
except ImportError as error:
    from concentration.errors import unloadable
    library = (error.name or "what this needs").partition(".")[0]
    sys.stderr.write("predict: %s\\n" % unloadable(library, error, "{" ".join(REQUIREMENTS)}"))
    sys.exit(2)
except KeyboardInterrupt:
    sys.stderr.write("predict: stopped from the keyboard\\n")
    sys.exit({128 + signal.SIGINT})
main()
"""


def write_standalone(path: Path) -> None:
    """Writes the archive; the same bytes for the same code."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted({**dict(_collect_modules()), "__main__.py": _MAIN}.items()):
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    write_atomically(path, buffer.getvalue())


def _collect_modules() -> Iterator[tuple[str, str]]:
    """(file, source) of every module that `predict` imports, and of the packages that they are in."""
    root = Path(concentration.__file__).parents[1]
    waiting, seen = [_START], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = root.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():  # a name inside a module
            continue
        source = file.read_text(encoding="utf-8")
        yield file.relative_to(root).as_posix(), source
        waiting += [module.rpartition(".")[0], *_list_imports(source)] if "." in module else []


def _list_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "concentration":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
