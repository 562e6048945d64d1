"""`concentrate predict PATH...`: the most probable classes of images, by an exported network.

Everything that this imports is carried by every export (`predict.pyz`), so it needs neither torch nor Hydra.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import pydantic

from concentration.errors import ConfigError, DataError
from concentration.processes import count_cores
from concentration.progress import Progress
from concentration.schema import Config, FolderName, write_override
from concentration.serving.answering import Answerer, answer_all, decode_images
from concentration.serving.answers import Ranking
from concentration.serving.calibration import load_calibration
from concentration.serving.export_folder import EXPORTS, NEIGHBOURS_FOLDER, ExportFolder, Weights, load_export
from concentration.serving.inputs import ImageOnDisk, list_inputs
from concentration.serving.neighbours import NeighbourIndex
from concentration.serving.output import TEXT_ENCODING, Format, build_writer, count_errors
from concentration.serving.predictor import Predictor
from concentration.streams import ending_with_reader

#: Answered before a bar could be read.
_FEW_IMAGES = 100


class ServingConfig(Config):
    """Which export answers, and how.

    name: the name of the export under `workdir/exports`.
    export: the folder of an export that was moved; `workdir` and `name` then have no effect.
    weights: `int8` takes the program whose classifiers have int8 weights.
    best: how many classes to name.
    verticals: the verticals whose classes may be named; none means all.
    classes: `leaves` names leaves only, `all` also inner classes, which are never less probable than the classes below them.
    neighbours: also name the classes of the nearest known images, those of the export and of `examples`.
    examples: a folder with CLASS/IMAGE, for classes that the network was never trained on.
    accelerator: the kind of device that runs the network.
    """

    workdir: Path = Path("runs/demo")
    name: FolderName = "student"
    export: Path | None = None
    weights: Weights = "float32"
    best: pydantic.PositiveInt = 5
    verticals: tuple[str, ...] = ()
    classes: Literal["leaves", "all"] = "leaves"
    neighbours: bool = False
    examples: Path | None = None
    accelerator: Literal["cpu", "gpu"] = "cpu"

    @pydantic.model_validator(mode="after")
    def _check_examples(self):
        if self.examples is not None and not self.neighbours:
            raise ValueError(f"examples={self.examples} without neighbours=true has no effect; give both")
        return self

    def load_export(self) -> ExportFolder:
        """Raises: as `export_folder.load_export`; ConfigError if the export was begun and is not finished."""
        folder = self.workdir / EXPORTS / self.name if self.export is None else self.export
        # NOTE: half of one may answer already, but without its calibration.
        if (folder / "config.json").exists() and not (folder / "DONE.json").exists():
            raise ConfigError(
                f"{folder}: is being exported, or was stopped in the middle; wait for it, or run "
                f"`concentrate export {write_override('name', folder.name)}` again"
            )
        return load_export(folder)


class PredictConfig(ServingConfig):
    """Answers about images, on the terminal or in a file.

    paths: files, folders and WebDataset shards; on the command line they are given without `paths=`.
    by_vertical: name the `best` classes of every vertical, not those over all.
    format: a table to read, JSON lines, or CSV with a row per class.
    output: write to this file instead of the terminal.
    batch_size: how many images the network sees at a time.
    num_threads: how many threads decode and answer images; null means one per core.
    """

    paths: tuple[str, ...] = ()
    by_vertical: bool = False
    format: Format = "table"
    output: Path | None = None
    batch_size: pydantic.PositiveInt = 32
    num_threads: pydantic.PositiveInt | None = None


def predict(config: PredictConfig) -> None:
    """Runs the verb.

    Raises:
        ConfigError: there is no such export, vertical, path or no image in it, the answers would overwrite an image, or a library
            is missing.
        DataError: a file of the export, or a shard, is damaged, or no image could be decoded.
    """
    warnings.filterwarnings("ignore", module="PIL")  # an image is answered or is an error
    num_threads = config.num_threads or count_cores()
    inputs = list_inputs(config.paths)
    _check_output(config.output, inputs)
    answerer = build_answerer(config, config.by_vertical)
    num_errors, is_quick = 0, len(inputs) <= _FEW_IMAGES
    with _open_output(config.output) as file, Progress("predict", len(inputs), "images", quiet=is_quick) as progress:
        writer = build_writer(config.format, file)
        for answers in answer_all(answerer, inputs, config.batch_size, num_threads):
            writer.write(answers)
            num_errors += count_errors(answers)
            progress.advance(len(answers))
        writer.close()
    if num_errors == len(inputs):
        raise DataError(f"{', '.join(config.paths)}: no image could be decoded, of {len(inputs)}; look at the answers")


def build_answerer(config: ServingConfig, is_by_vertical: bool) -> Answerer:
    """Raises: as `predict`."""
    export = config.load_export()
    calibration = load_calibration(export.path, export.taxonomy)
    ranking = Ranking(export.taxonomy, config.best, config.verticals, config.classes, is_by_vertical, calibration)
    predictor = Predictor(export, config.weights, accelerator=config.accelerator)
    index = _load_neighbours(config, export, predictor) if config.neighbours else None
    return Answerer(predictor, ranking, index)


def _load_neighbours(config: ServingConfig, export: ExportFolder, predictor: Predictor) -> NeighbourIndex:
    folder = export.path / NEIGHBOURS_FOLDER
    if config.examples is None:
        return NeighbourIndex.load(folder)
    features_NT, labels = _embed_examples(config.examples, predictor)
    if not folder.exists():
        return NeighbourIndex.build(features_NT, labels)
    index = NeighbourIndex.load(folder)
    index.add(features_NT, labels)
    return index


def _embed_examples(folder: Path, predictor: Predictor) -> tuple[np.ndarray, list[str]]:
    """Features of the images in the folders of new classes, and the class of each, VERTICAL/CLASS or CLASS."""
    if not folder.is_dir():
        raise ConfigError(f"examples={folder}: no such folder; give one with a folder of images for each new class")
    inputs = list_inputs([str(folder)])
    labels = [Path(image.path).parent.relative_to(folder).as_posix() for image in inputs]
    if "." in labels:
        raise ConfigError(f"examples={folder}: images lie beside the folders of classes; move each into its class's")
    features, kept = [], []
    for start in range(0, len(inputs), 32):
        images, is_decoded, _ = decode_images(inputs[start : start + 32], predictor.image_size)
        if is_decoded.any():
            features.append(predictor(images[is_decoded])[1])
            kept += [label for label, is_good in zip(labels[start : start + 32], is_decoded, strict=True) if is_good]
    if not features:
        raise DataError(f"examples={folder}: no image could be decoded, of {len(inputs)}")
    return np.concatenate(features), kept


def _check_output(output: Path | None, inputs: Sequence[ImageOnDisk]) -> None:
    """Raises: ConfigError if the answers would take the place of what they are about."""
    if output is not None and output.exists():
        place = os.path.realpath(output)
        if any(os.path.realpath(path) == place for path in {image.path for image in inputs}):
            raise ConfigError(f"output={output}: is among the images, and would be overwritten; give another file")


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        with ending_with_reader() as stdout:
            stdout.reconfigure(**TEXT_ENCODING)
            yield stdout
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", **TEXT_ENCODING) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"output={path}: cannot be written ({error.strerror}); give another file") from None
