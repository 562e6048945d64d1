"""An export: the folder with a network as programs, its taxonomy, and how an image becomes its input."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from concentration.errors import ConfigError, DataError, unreadable
from concentration.schema import Config, parse_config, parse_json
from concentration.taxonomy import Taxonomy

#: How the classifiers' weights are stored; everything else is float32.
Weights = Literal["float32", "int8"]

EXPORTS = "exports"
ONNX_FILES: Mapping[Weights, str] = {"float32": "model.onnx", "int8": "model.int8.onnx"}
TORCH_FILE, NETWORK_FILE = "model.pt2", "model.safetensors"
TAXONOMY_FILE, PREPROCESSING_FILE = "taxonomy.json", "preprocessing.json"
#: Of the large files, as `sha256sum --check` reads it.
CHECKSUMS_FILE = "SHA256SUMS"
#: Beside them: features of training images, for nearest neighbours; none where the export was told so.
NEIGHBOURS_FOLDER = "neighbours"
#: The names of the programs' input and outputs.
IMAGES, LOGITS, FEATURES = "images", "logits", "features"


class Preprocessing(Config):
    """How an image becomes the input (B, 3, image_size, image_size); `concentration.data.views` does it.

    The image is turned upright by its EXIF orientation, what is transparent is laid on white, and the largest square in its
    middle is resized. Mean and deviation are inside the programs.
    """

    image_size: pydantic.PositiveInt
    crop: Literal["centre_square"] = "centre_square"
    interpolation: Literal["bilinear_antialiased"] = "bilinear_antialiased"
    channels: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["BCHW"] = "BCHW"


@dataclass(frozen=True)
class ExportFolder:
    """What of an export is small: the programs are loaded by who runs them."""

    path: Path
    taxonomy: Taxonomy
    preprocessing: Preprocessing


def load_export(path: Path) -> ExportFolder:
    """Raises: ConfigError where there is no export; DataError where a file of it is damaged."""
    description = path / PREPROCESSING_FILE
    try:
        values = parse_json(description.read_bytes(), str(description))
    except PermissionError as error:
        raise unreadable(description, error) from None
    except OSError:
        have = sorted(found.parent.name for found in path.parent.glob(f"*/{PREPROCESSING_FILE}"))
        there = f" (exports beside it: {', '.join(have)})" if have else ""
        raise ConfigError(f"{path}: no export{there}; run `concentrate export name={path.name}` first") from None
    try:
        preprocessing = parse_config(Preprocessing, values if isinstance(values, dict) else {})
    except ConfigError as error:
        raise DataError(f"{description}: {error}; export again with overwrite=true") from None
    return ExportFolder(path, Taxonomy.load(path / TAXONOMY_FILE), preprocessing)


def write_checksum(path: Path) -> str:
    """The line of a file in `SHA256SUMS`."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"


def check_content(path: Path) -> None:
    """Raises: DataError where a file is not what the export wrote; an earlier version wrote no checksums."""
    checksums = path.with_name(CHECKSUMS_FILE)
    if checksums.exists() and write_checksum(path).encode() not in checksums.read_bytes().splitlines():
        raise DataError(
            f"{path}: damaged, or changed since it was exported ({CHECKSUMS_FILE} beside it has another checksum); bring it "
            "back, or export again with overwrite=true"
        )
