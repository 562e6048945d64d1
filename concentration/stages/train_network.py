"""What all verbs that train a network share: their config, their data, and the file that they write.

Shapes: C outputs of the network.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic
import torch

from concentration import distributed
from concentration.array_files import load_metadata
from concentration.data.order import ClassBalancedOrder, Order, WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.resident import ResidentReader, load_resident
from concentration.data.sample_targets import LabelTargets, SampleTargets
from concentration.data.split import Split
from concentration.data.view_records import encode_views
from concentration.errors import ConfigError, DataError
from concentration.files import check_unchanged, hash_file
from concentration.networks.bases import BaseConfig
from concentration.networks.classifier import Classifier
from concentration.networks.external.teacher import load_external_teacher
from concentration.networks.mixture import HEADER as MIXTURE_HEADER
from concentration.networks.mixture import load_mixture
from concentration.networks.pace import PaceConfig
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.networks.student import LossKind, NetworkConfig, Student, load_student
from concentration.networks.top_layers import TopConfig
from concentration.schema import Config
from concentration.stages.prepared import DataOverrides, PreparedData, has_split, load_prepared_split
from concentration.stages.run_directory import HOW_TO_GROW, NETWORK_FILE, RunDirectory, StageConfig
from concentration.taxonomy import Taxonomy
from concentration.training.configs import LoggerConfig, TrainerConfig
from concentration.training.optimizers import OptimizerConfig
from concentration.training.training_data import TrainingData

#: The best network, beside the last one in NETWORK_FILE, with `trainer.keep_best`.
BEST_FILE = "best.safetensors"


class TrainingStageConfig(StageConfig):
    """How a network is trained, whichever it is.

    seed: of the initial weights, the order of the samples and the augmentation.
    optimizer: how a step changes the weights.
    trainer: how long, on what and with which schedule it is trained.
    logger: where the training is recorded.
    """

    runtime_fields = StageConfig.runtime_fields | {"logger"}

    seed: int = 0
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig = LoggerConfig()


class LabelsConfig(Config):
    """Which images are seen in training on labels.

    coarse_labels: what becomes of images that have no leaf among their labels: `use` trains on them, with all leaves absent;
        `skip` leaves them out. Teachers can say their leaves, so a student of soft targets sees all images.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"coarse_labels"})

    coarse_labels: Literal["use", "skip"] = "use"


def find_fine(split: Split, vertical: str | None = None) -> np.ndarray:
    """Ordinals, rising, of the samples that remain with `coarse_labels=skip`: those of all verticals, or of the given one.

    Raises:
        DataError: a vertical has none.
    """
    taxonomy, counts_C = split.taxonomy, split.count_labels()
    missing = []
    for name in taxonomy.verticals if vertical is None else (vertical,):
        if not counts_C[taxonomy.vertical_slice(name)][taxonomy.restrict(name).is_leaf].any():
            missing.append(name)
    if missing:
        raise DataError(
            f"coarse_labels=skip: no training image has a leaf of {', '.join(missing)} among its labels; set it to use"
        )
    return split.with_leaf(vertical)


class NetworkStageConfig(TrainingStageConfig):
    """The parts of a network and of its training.

    data: image size and augmentation where they differ from those of the prepared data.
    loss: `sigmoid` for independent classes; with `softmax` they exclude each other, and a sample's targets are divided by their
        sum.
    base: the convolutional network, whose output the top layers share.
    top: the top layers, Figure 3 of Gao et al.
    pace: how a vertical's logits are scaled, section 3.3 of Gao et al.
    plan: print the network's parameters and what a training step needs, and train nothing.
    """

    runtime_fields = TrainingStageConfig.runtime_fields | {"plan"}

    data: DataOverrides = DataOverrides()
    loss: LossKind = "sigmoid"
    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    plan: bool = False

    @pydantic.model_validator(mode="after")
    def _check_loss(self):
        if self.loss == "softmax" and self.trainer.shard_head:
            raise ValueError(
                "loss=softmax with trainer.shard_head=true: a softmax needs all classes in one process; set one of them back"
            )
        return self


# A balanced order that shows one image more often than this in an epoch says so.
_MANY_TIMES = 20


@dataclass(frozen=True)
class Task:
    """What a network learns: which samples, with which targets, over which classes.

    Attributes:
        title: for the progress bar.
        taxonomy: the taxonomy of the network's outputs.
        split: the training split.
        ordinals: which of its samples take part, rising; a range where all do.
        targets: the targets of each sample.
        counts_C: the number of training samples of every output, for the class weights.
        frequency_C: the share of the samples in which every output is present, for the prior.
        vertical: the vertical of a teacher; None for other networks.
        val_ordinals: the validation samples that measure the network; None takes those of the vertical, or all.
        teachers: they are asked for targets in every step, and `targets` are then the samples' own labels; None where targets
            are stored.
    """

    title: str
    taxonomy: Taxonomy
    split: Split
    ordinals: np.ndarray | range
    targets: SampleTargets
    counts_C: np.ndarray
    frequency_C: np.ndarray
    vertical: str | None = None
    val_ordinals: np.ndarray | None = None
    teachers: RoutedTeachers | None = None


def identify_base_checkpoint(config: NetworkStageConfig) -> dict[str, str]:
    """The hash of the file that `base.checkpoint` names, as an upstream result; empty where none is given.

    Raises:
        ConfigError: as `find_base_checkpoint`.
    """
    path = find_base_checkpoint(config)
    return {} if path is None else {"base": hash_file(path)}


def find_base_checkpoint(config: NetworkStageConfig) -> Path | None:
    """The network file that `base.checkpoint` names, by a run's name or a path; None where it is not given.

    Raises:
        ConfigError: there is no such finished run, and no such file.
    """
    name = config.base.checkpoint
    if name is None:
        return None
    candidates = [config.workdir / kind / name / NETWORK_FILE for kind in ("students", "teachers")]
    candidates += [Path(name) / NETWORK_FILE, Path(name)]
    for path in candidates:
        if path.is_file():
            return path
    tried = ", ".join(str(path) for path in candidates)
    raise ConfigError(
        f"base.checkpoint={name}: no finished run or file of that name (tried {tried}); train it first or correct the name"
    )


def train_network(config: NetworkStageConfig, directory: RunDirectory, task: Task, prepared: PreparedData) -> None:
    """Builds and trains the config's network, and writes `model.safetensors` and `DONE.json`. Call it in `RunDirectory.begin`.

    Raises:
        As `training.fit.fit`.
    """
    torch.manual_seed(config.seed)
    student = build_network(config, task.taxonomy, prepared.image_size)
    if checkpoint := find_base_checkpoint(config):
        student.load_base(checkpoint)
    train_built_network(student, config, directory, task, prepared)


def train_built_network(
    student: Student, config: TrainingStageConfig, directory: RunDirectory, task: Task, prepared: PreparedData
) -> None:
    """The same for a network that is already built."""
    if config.trainer.prior:
        student.set_prior(torch.from_numpy(task.frequency_C))
    train_from_here(student, config, directory, task, prepared)


def train_from_here(
    student: Student,
    config: TrainingStageConfig,
    directory: RunDirectory,
    task: Task,
    prepared: PreparedData,
    judge: Callable[[Student, int], Mapping[str, Any]] = lambda student, num_steps: {},
) -> None:
    """The same for a network whose outputs start as they are, whatever `config.trainer.prior` says.

    `judge` is given the trained network and its number of steps before the stage counts as finished. What it returns is written
    into DONE.json; if it raises, the stage stays unfinished.
    """
    # NOTE: imported here because Lightning takes seconds, and verbs that only read a network do not need it.
    from concentration.training.checkpoints import CheckpointDirectory
    from concentration.training.fit import fit

    if config.trainer.class_weight == "inverse_sqrt":
        student.class_weight_C = compute_class_weights(task.counts_C)
    data = _build_training_data(config, task, prepared, directory)
    fitted = fit(
        student, data, config.trainer, config.optimizer, config.logger, directory.path, config.seed, task.title
    )
    if distributed.rank() == 0:
        path = directory.path / NETWORK_FILE
        metadata = {"taxonomy": task.taxonomy.fingerprint}
        student.save(path, metadata)
        checkpoints = CheckpointDirectory(directory.path, config.trainer.keep_checkpoints)
        if config.trainer.keep_best and checkpoints.load_best(student):
            student.save(directory.path / BEST_FILE, metadata)
        directory.save_speed(fitted.images_per_second)
        facts = judge(student, fitted.num_steps)
        directory.finish({"step": fitted.num_steps, "checkpoint": hash_file(path), **facts})
        validated = "" if math.isnan(fitted.mpvap) else f"; mpvap on val {100 * fitted.mpvap:.1f} %"
        print(f"{directory.path}: {fitted.num_steps} steps{validated}")


def load_network(path: Path, taxonomy: Taxonomy) -> Classifier:
    """The finished network of a run directory, in eval mode, checked against its record and its outputs' taxonomy.

    Raises:
        ConfigError: the run has not finished.
        DataError: a file has changed, or the network was made for another taxonomy.
    """
    done = RunDirectory(path).load_done(f"concentrate {path.parent.name.rstrip('s')}")
    if isinstance(done.get("files"), dict):  # a teacher that was made elsewhere
        for name, expected in done["files"].items():
            check_unchanged(
                path / name,
                expected,
                "this teacher was taken over; restore it, or take it over again with overwrite=true",
            )
        return load_external_teacher(path, taxonomy)
    file = path / NETWORK_FILE
    check_unchanged(file, done.get("checkpoint"), "training finished; restore it, or train again with overwrite=true")
    made_for = load_metadata(file).get("taxonomy")
    if made_for != taxonomy.fingerprint:
        raise DataError(
            f"{file}: made for another taxonomy ({made_for!r}, here {taxonomy.fingerprint!r}); train it again, or, {HOW_TO_GROW}"
        )
    return load_mixture(file) if MIXTURE_HEADER in load_metadata(file) else load_student(file)


def build_network(config: NetworkStageConfig, taxonomy: Taxonomy, image_size: int) -> Student:
    """The untrained network of a config."""
    return Student(describe_network(config, taxonomy, image_size))


def describe_network(config: NetworkStageConfig, taxonomy: Taxonomy, image_size: int) -> NetworkConfig:
    """The architecture of a config's network."""
    verticals = dict(zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True))
    parts = {name: getattr(config, name) for name in ("loss", "base", "top", "pace")}
    return NetworkConfig(**parts, image_size=image_size, verticals=verticals)


def compute_class_weights(counts_C: np.ndarray) -> torch.Tensor:
    """1/sqrt(count), scaled to mean 1, (C,) float32; a class without images counts as one with a single image."""
    weight_C = 1 / np.sqrt(np.maximum(counts_C, 1))
    return torch.from_numpy(weight_C / weight_C.mean()).float()


def _build_training_data(
    config: TrainingStageConfig, task: Task, prepared: PreparedData, directory: RunDirectory
) -> TrainingData:
    split = task.split
    size = prepared.image_size
    val_reader, val_ordinals = None, None
    if has_split(config.workdir, "val"):
        val = load_prepared_split(config.workdir, "val", split.taxonomy)
        val_ordinals = _choose_val_ordinals(task, val)
        if len(val_ordinals):
            hard = LabelTargets(val, smear=False, vertical=task.vertical)
            val_reader = SampleReader(val, hard, size, views=None, seed=config.seed)
    reader = SampleReader(split, task.targets, size, prepared.view, config.seed)
    resident, resident_reader = None, None
    if config.trainer.resident:
        # Refuses views that cannot be made on the device before all images are decoded.
        encode_views(reader.choose_views(np.array(task.ordinals[:1]), epoch=0), 1)
        resident = load_resident(split, task.ordinals, size, config.trainer.num_workers, task.title, directory.path)
        resident_reader = ResidentReader(reader, resident)
    return TrainingData(
        split=split,
        order=_build_order(config, task),
        reader=resident_reader or reader,
        val_reader=val_reader,
        val_ordinals=val_ordinals,
        taxonomy=task.taxonomy,
        teachers=task.teachers,
        resident=resident,
    )


def _choose_val_ordinals(task: Task, val: Split) -> np.ndarray:
    if task.val_ordinals is not None:
        return task.val_ordinals
    return np.arange(len(val)) if task.vertical is None else val.routed(task.vertical)


def _build_order(config: TrainingStageConfig, task: Task) -> Order:
    split = task.split
    if config.trainer.sampling == "natural":
        return WindowOrder(split.by_shard(task.ordinals), config.seed, config.trainer.window_shards)
    takes_part = np.isin(split.sample_of_label, task.ordinals)
    if task.vertical is not None:  # a teacher does not learn the samples' labels in other verticals
        number = split.taxonomy.vertical_number(task.vertical)
        takes_part &= split.taxonomy.vertical_of_output[split.label_output] == number
    outputs, samples = split.label_output[takes_part], split.sample_of_label[takes_part]
    if distributed.rank() == 0:
        _note_balance(task, outputs)
    by_class = np.argsort(outputs, kind="stable")
    bounds = np.flatnonzero(np.diff(outputs[by_class])) + 1
    return ClassBalancedOrder(np.split(samples[by_class], bounds), len(task.ordinals), config.seed)


def _note_balance(task: Task, output_L: np.ndarray) -> None:
    """Prints which leaves a balanced order never draws, and which classes' few images it shows over and over.

    output_L: the outputs of the labels that it draws by.
    """
    taxonomy = task.split.taxonomy
    own = slice(None) if task.vertical is None else taxonomy.vertical_slice(task.vertical)
    leaves = np.arange(taxonomy.num_classes)[own][taxonomy.is_leaf[own]]
    counts_C = np.bincount(output_L, minlength=taxonomy.num_classes)
    drawn = np.flatnonzero(counts_C)
    times_C = len(task.ordinals) / (len(drawn) * np.maximum(counts_C, 1))
    often = drawn[times_C[drawn] > _MANY_TIMES]
    ids = [c.id for c in map(taxonomy.class_of_output, range(taxonomy.num_classes))]
    never = [ids[output] for output in leaves[counts_C[leaves] == 0]]
    shown = [
        f"{ids[output]} ({times_C[output]:.0f} times)" for output in often[np.argsort(-times_C[often], kind="stable")]
    ]
    for names, what in (
        (never, f"of {len(leaves)} leaves have no training image here, and are never drawn"),
        (
            shown,
            f"classes have so few images that an epoch shows each over {_MANY_TIMES} times; class_weight is milder",
        ),
    ):
        if names:
            more = ", ..." * (len(names) > 5)
            print(f"{task.title}: sampling=class_balanced: {len(names)} {what}: {', '.join(names[:5])}{more}")
