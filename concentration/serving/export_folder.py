"""An export: a folder with a network as programs (ONNX, torch), its taxonomy, and a description of its input."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from concentration.errors import ConfigError, DataError, unreadable
from concentration.schema import Config, parse_config, parse_json, write_override
from concentration.taxonomy import Taxonomy

#: How the classifiers' weights are stored; everything else is float32.
Weights = Literal["float32", "int8"]

EXPORTS = "exports"
ONNX_FILES: Mapping[Weights, str] = {"float32": "model.onnx", "int8": "model.int8.onnx"}
TORCH_FILE, NETWORK_FILE = "model.pt2", "model.safetensors"
TAXONOMY_FILE, PREPROCESSING_FILE = "taxonomy.json", "preprocessing.json"
#: The checksums of the large files, in the form that `sha256sum --check` reads.
CHECKSUMS_FILE = "SHA256SUMS"
#: The folder with the features of training images, for nearest neighbours; an export may be made without it.
NEIGHBOURS_FOLDER = "neighbours"
#: The names of the programs' input and outputs.
IMAGES, LOGITS, FEATURES = "images", "logits", "features"


class Preprocessing(Config):
    """How an image becomes the network's input (B, 3, image_size, image_size), as `concentration.data.views` does it.

    The image is turned upright by its EXIF orientation, transparent parts become white, and the largest square in the middle is
    resized. The programs themselves subtract the mean and divide by the standard deviation.
    """

    image_size: pydantic.PositiveInt
    crop: Literal["centre_square"] = "centre_square"
    interpolation: Literal["bilinear_antialiased"] = "bilinear_antialiased"
    channels: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["BCHW"] = "BCHW"


@dataclass(frozen=True)
class ExportFolder:
    """The small parts of an export. Its programs are loaded by those that run them (`predictor`)."""

    path: Path
    taxonomy: Taxonomy
    preprocessing: Preprocessing


def load_export(path: Path) -> ExportFolder:
    """Reads the small parts of the export in this folder.

    Raises:
        ConfigError: there is no export.
        DataError: a file of it is damaged.
    """
    description = path / PREPROCESSING_FILE
    try:
        values = parse_json(description.read_bytes(), str(description))
    except PermissionError as error:
        raise unreadable(description, error) from None
    except OSError:
        have = sorted(found.parent.name for found in path.parent.glob(f"*/{PREPROCESSING_FILE}"))
        there = f" (exports beside it: {', '.join(have)})" if have else ""
        raise ConfigError(
            f"{path}: no export{there}; run `concentrate export {write_override('name', path.name)}` first"
        ) from None
    try:
        preprocessing = parse_config(Preprocessing, values if isinstance(values, dict) else {})
    except ConfigError as error:
        raise DataError(f"{description}: {error}; export again with overwrite=true") from None
    return ExportFolder(path, Taxonomy.load(path / TAXONOMY_FILE), preprocessing)


def compute_checksum_line(path: Path) -> str:
    """The line of a file in `SHA256SUMS`: the SHA-256 of its content, and its name."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"


def check_content(path: Path) -> None:
    """Checks a file against `SHA256SUMS`, if there is one: earlier versions of this program wrote none.

    Raises:
        DataError: the file is not the one that the export wrote.
    """
    checksums = path.with_name(CHECKSUMS_FILE)
    if checksums.exists() and compute_checksum_line(path).encode() not in checksums.read_bytes().splitlines():
        raise DataError(
            f"{path}: damaged, or changed since it was exported ({CHECKSUMS_FILE} beside it has another checksum); bring it "
            "back, or export again with overwrite=true"
        )
