"""`predict.pyz`: what answers with an export, as one file that Python runs without this package installed."""

import io
import zipfile
from pathlib import Path

import concentration
from concentration.targets import write_atomically

STANDALONE_FILE = "predict.pyz"
#: What has to be installed for it; faiss-cpu beside them for neighbours.
REQUIREMENTS = ("onnxruntime", "numpy", "pillow", "pydantic", "rich")

#: The modules that `predict` imports, by pattern.
_MODULES = (
    "__init__.py",
    "errors.py",
    "packed_targets.py",
    "preemption.py",
    "processes.py",
    "progress.py",
    "schema.py",
    "taxonomy.py",
    "data/__init__.py",
    "data/order.py",
    "data/views.py",
    "serving/*.py",
    "stages/__init__.py",
    "stages/predict*.py",
    "stages/verbs.py",
)
_MAIN = "from concentration.stages.predict_standalone import main\n\nmain()\n"


def write_standalone(path: Path) -> None:
    """Writes the archive; the same bytes for the same code."""
    package = Path(concentration.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted({found for pattern in _MODULES for found in package.glob(pattern)}):
            _add(archive, file.relative_to(package.parent).as_posix(), file.read_text(encoding="utf-8"))
        _add(archive, "__main__.py", _MAIN)
    write_atomically(path, buffer.getvalue())


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
