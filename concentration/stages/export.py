"""`concentrate export name=NAME`: a student as the one folder that is enough to predict, with what was measured of it."""

import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pydantic

from concentration.data.order import permutation
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.files import write_atomically
from concentration.networks.classifier import Exportable
from concentration.progress import Progress
from concentration.schema import FolderName, parse_json, write_override
from concentration.serving.calibration import CALIBRATION_FILE
from concentration.serving.export_folder import (
    CHECKSUMS_FILE,
    EXPORTS,
    NEIGHBOURS_FOLDER,
    NETWORK_FILE,
    ONNX_FILES,
    PREPROCESSING_FILE,
    TAXONOMY_FILE,
    TORCH_FILE,
    Preprocessing,
    Weights,
    compute_checksum_line,
    load_export,
)
from concentration.serving.neighbours import NeighbourIndex
from concentration.serving.predictor import Predictor
from concentration.stages.export_card import CARD_FILE, MEASURES_FILE, build_card
from concentration.stages.export_measures import (
    SampledImages,
    check_agreement,
    describe_confusions,
    describe_machine,
    measure_quality,
    measure_speed,
    measure_throughput,
    read_images,
)
from concentration.stages.export_programs import (
    quantise_classifiers,
    save_onnx,
    save_torch_program,
    trace_program,
    translate_to_onnx,
)
from concentration.stages.export_standalone import STANDALONE_FILE, write_standalone
from concentration.stages.folders import CALIBRATIONS, EVALUATIONS, STUDENTS
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.train_network import load_network
from concentration.taxonomy import Taxonomy


class ExportConfig(StageConfig):
    """Writes `exports/NAME/`: programs, taxonomy, preprocessing, a standalone `predict.pyz`, and a model card, `README.md`.

    A calibration of the same network (`concentrate calibrate`) is copied too, even if the export was finished before.

    name: the name of a finished and evaluated student.
    neighbours: the number of training images, spread evenly over the classes, whose features are kept for nearest neighbours.
    num_images: the most test images on which int8 and the confusions are measured.
    speed_seconds: how long each program is timed at each batch size.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {"speed_seconds"}

    name: FolderName = "student"
    neighbours: pydantic.NonNegativeInt = 10_000
    num_images: pydantic.PositiveInt = 10_000
    speed_seconds: pydantic.PositiveFloat = 1.0


def export(config: ExportConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: nothing finished and evaluated has this name, or it cannot be exported.
        DataError: a program does not answer as the network does, or a file that is read is damaged.
    """
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    source = config.workdir / STUDENTS / config.name
    checkpoint = _find_checkpoint(config, source)
    directory = RunDirectory(config.workdir / EXPORTS / config.name)
    with directory.begin(config, {"data": fingerprint, "checkpoint": checkpoint}) as is_due:
        evaluation = _load_evaluation(config, checkpoint)
        if is_due:
            _write_export(config, taxonomy, source, directory.path)
        calibration = _load_calibration(config, checkpoint)
        if is_due or _is_new(calibration, directory.path):
            # The calibration comes last: a kill before it leaves one that is still new, and so another card, too.
            card = build_card(config.name, config.workdir, evaluation, calibration)
            write_atomically(directory.path / CARD_FILE, card)
            if calibration is not None:
                write_atomically(directory.path / CALIBRATION_FILE, calibration)
            print(f"{directory.path / CARD_FILE}: the model card")
        if is_due:
            directory.finish({"checkpoint": checkpoint})


def _write_export(config: ExportConfig, taxonomy: Taxonomy, source: Path, path: Path) -> None:
    """Everything but the card, and a calibration."""
    network = load_network(source, taxonomy)
    if not isinstance(network, Exportable):
        raise ConfigError(f"name={config.name}: a {type(network).__name__} cannot be exported; export a student")
    shutil.copyfile(source / NETWORK_FILE, path / NETWORK_FILE)
    write_atomically(path / TAXONOMY_FILE, taxonomy.to_json())
    write_atomically(path / PREPROCESSING_FILE, Preprocessing(image_size=network.image_size).model_dump(mode="json"))
    write_standalone(path / STANDALONE_FILE)
    _write_programs(network, path)
    checksums = [compute_checksum_line(file) for file in sorted(path.glob("model.*"))]
    write_atomically(path / CHECKSUMS_FILE, "".join(f"{line}\n" for line in checksums))
    predictors = {weights: Predictor(load_export(path), weights) for weights in ONNX_FILES}
    num_neighbours = _write_neighbours(config, taxonomy, predictors["float32"], path)
    measures = _measure(config, taxonomy, network, predictors, path)
    write_atomically(path / MEASURES_FILE, {**measures, "num_neighbours": num_neighbours})


def _load_calibration(config: ExportConfig, checkpoint: str) -> bytes | None:
    """The file of this network's calibration; None where there is none, or that of another training."""
    path = config.workdir / CALIBRATIONS / f"{config.name}.json"
    if not path.exists():
        return None
    content = path.read_bytes()
    return content if as_mapping(parse_json(content, str(path))).get("checkpoint") == checkpoint else None


def _is_new(calibration: bytes | None, path: Path) -> bool:
    """Whether the export does not have this calibration yet."""
    copy = path / CALIBRATION_FILE
    return calibration is not None and not (copy.exists() and copy.read_bytes() == calibration)


def _find_checkpoint(config: ExportConfig, source: Path) -> str:
    if not source.is_dir():
        have = sorted(path.name for path in source.parent.glob("*")) or ["none"]
        raise ConfigError(f"name={config.name}: no such student in {source.parent}; valid: {', '.join(have)}")
    command = f"concentrate student {write_override('name', config.name)}"
    return RunDirectory(source).load_done(command, checkpoint=str)["checkpoint"]


def _load_evaluation(config: ExportConfig, checkpoint: str) -> dict:
    """Raises: ConfigError where the network was not evaluated since it was trained."""
    path = config.workdir / EVALUATIONS / f"{config.name}.json"
    again = f"run `concentrate evaluate {write_override('name', config.name)}` first: the model card says what it found"
    try:
        evaluation = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {again}") from None
    if evaluation.get("checkpoint") != checkpoint:
        raise ConfigError(f"{path}: of another training; {again}")
    return evaluation


def _write_programs(network: Exportable, path: Path) -> None:
    names = [f"network.{name}" for name in network.classifier_weights]
    with Progress("export: programs", 3, "programs", path) as progress:
        program = trace_program(network, network.image_size)
        save_torch_program(program, path / TORCH_FILE)
        progress.advance()
        model = translate_to_onnx(program)
        save_onnx(model, path / ONNX_FILES["float32"])
        progress.advance()
        int8 = onnx.ModelProto()
        int8.CopyFrom(model)
        quantise_classifiers(int8, names)
        save_onnx(int8, path / ONNX_FILES["int8"])
        progress.advance()


def _write_neighbours(config: ExportConfig, taxonomy: Taxonomy, predictor: Predictor, path: Path) -> int:
    """The number of images in the index; there is none where none of the chosen images can be decoded."""
    if config.neighbours == 0:
        return 0
    split = load_prepared_split(config.workdir, "train", taxonomy)
    outputs, ordinals = _choose_examples(split, config.neighbours)
    reader = SampleReader(split, LabelTargets(split, smear=False), predictor.image_size, views=None, seed=0)
    features, labels = [], []
    with Progress("export: neighbours", len(ordinals), "images", path) as progress:
        for images, places in read_images(reader, ordinals, progress):
            features.append(predictor(images)[1])
            labels += [taxonomy.class_of_output(output).name for output in outputs[places]]
    if labels:
        NeighbourIndex.build(np.concatenate(features), labels).save(path / NEIGHBOURS_FOLDER)
    return len(labels)


def _choose_examples(split: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(E,) outputs and (E,) ordinals: of every class equally many of its own samples, as far as it has them."""
    order = permutation(len(split.label_output), 0)
    order = order[np.argsort(split.label_output[order], kind="stable")]
    outputs = split.label_output[order]
    # The place of each label among those of its class, in the permuted order.
    first = np.searchsorted(outputs, outputs, side="left")
    turn = np.arange(len(outputs)) - first
    chosen = np.lexsort((outputs, turn))[:most]  # every class once, then every class again
    return outputs[chosen], split.sample_of_label[order[chosen]]


def _measure(
    config: ExportConfig, taxonomy: Taxonomy, network: Exportable, predictors: dict[Weights, Predictor], path: Path
) -> dict:
    split = load_prepared_split(config.workdir, "test", taxonomy)
    images = SampledImages(split, network.image_size, config.num_images)
    first = images.read_first()
    agreement = check_agreement(network, predictors["float32"], first)
    mpvap, confusions = measure_quality(predictors, images, path)
    speeds = measure_speed(network, predictors, first[0], config.speed_seconds)
    throughput, num_threads = measure_throughput(predictors["float32"], images)
    return {
        "agreement": agreement._asdict(),
        "mpvap": mpvap,
        "num_images": len(images.ordinals),
        "confusions": describe_confusions(confusions, taxonomy),
        "speed": [speed._asdict() for speed in speeds],
        "predict_images_per_second": throughput,
        "predict_threads": num_threads,
        "machine": describe_machine(),
        "file_bytes": {file.name: file.stat().st_size for file in sorted(path.glob("model*"))},
    }
