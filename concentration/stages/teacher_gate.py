"""Whether a teacher is fit to be asked: what it knows of val, beside the generalist, and on how many images it was trained.

Shapes: V classes of the teacher's vertical.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from concentration.data.index import Split, load_split
from concentration.errors import ConfigError, DataError
from concentration.metrics.average_precision import mean_average_precision
from concentration.metrics.evaluation import Evaluator
from concentration.networks.classifier import Classifier
from concentration.progress import Progress
from concentration.schema import Config, FolderName
from concentration.stages.prepare import SHARDS
from concentration.stages.run_directory import RunDirectory
from concentration.stages.subject import Subject
from concentration.stages.teacher import TEACHERS
from concentration.stages.train_network import NETWORK_FILE, load_network
from concentration.targets import load_metadata, write_atomically
from concentration.taxonomy import Taxonomy
from concentration.training.loggers import load_metrics

GATES = "gates"

#: Less of the way from what a constant answer reaches to 1 is knowing nothing.
LEAST_GAIN = 0.05


class GateConfig(Config):
    """What a teacher must be before its targets are made; `gates/VERTICAL.json` says what it is.

    action: `report` says what is wrong with a teacher and goes on, `stop` ends with it, `off` does not look.
    generalist: the network in `students/` that a teacher must not be worse than on its own vertical; no comparison where it is
        not finished, or was made for another taxonomy.
    tolerance: by which its AP may lie below.
    min_images: training images that a leaf class has at the median.
    """

    action: Literal["off", "report", "stop"] = "report"
    generalist: FolderName = "generalist"
    tolerance: float = pydantic.Field(default=0.0, ge=0, lt=1)
    min_images: pydantic.NonNegativeInt = 5


@dataclass(frozen=True)
class Gate:
    """What is known of a teacher.

    Attributes:
        vertical: its own.
        images_per_class: training images of a leaf class at the median.
        num_val: validation images of the vertical.
        ap: mean AP of its classes on them, labels smeared; None where there is no such image or its answers are not finite.
        constant_ap: of a constant answer, which knows nothing.
        generalist_ap: of the generalist's outputs of the vertical; None where it is not finished.
        problems: what is wrong with it, a sentence each.
    """

    vertical: str
    images_per_class: float
    num_val: int
    ap: float | None
    constant_ap: float | None
    generalist_ap: float | None
    problems: tuple[str, ...]


class TeacherGate:
    """Measures the teachers of one process; what all of them are held against is read once.

    Args:
        config: which is not off.
        workdir: where the generalist and the shards are.
        split: the training samples.
    """

    def __init__(self, config: GateConfig, workdir: Path, split: Split):
        self._config = config
        self._workdir = workdir
        self._split = split
        self._generalist: Classifier | None = None

    def check(self, vertical: str, teacher: Classifier) -> Gate:
        """Measures a teacher, writes what came out, and says what is wrong.

        Args:
            vertical: the teacher's.
            teacher: on its device, where the generalist is taken, too.

        Raises:
            ConfigError: the teacher is not fit, and `config.action` is `stop`.
        """
        config, taxonomy, val = self._config, self._split.taxonomy, self._val
        outputs = taxonomy.vertical_slice(vertical)
        counts_V = self._count_C[outputs][taxonomy.is_leaf[outputs]]
        images_per_class = float(np.median(counts_V)) if len(counts_V) else 0.0
        num_val, ap, constant_ap, generalist_ap, problems = 0, None, None, None, []
        if val is not None and (num_val := len(val.routed(vertical))):
            constant_ap = self._measure_constant(vertical, num_val)
            try:
                ap = mean_average_precision(measure_vertical(teacher, 0, taxonomy.restrict(vertical), val))
            except DataError as error:
                problems.append(f"its answers are no numbers ({error})")
            generalist_ap = self._measure_generalist(vertical, teacher)
        problems += _find_problems(config, images_per_class, ap, constant_ap, generalist_ap)
        problems += _look_at_loss(self._workdir / TEACHERS / vertical)
        gate = Gate(vertical, images_per_class, num_val, ap, constant_ap, generalist_ap, tuple(problems))
        write_atomically(self._workdir / GATES / f"{vertical}.json", dataclasses.asdict(gate))
        if problems:
            said = f"teacher of {vertical}: {'; '.join(problems)}"
            if config.action == "stop":
                raise ConfigError(f"{said}; train it longer or on more images, or go on with gate.action=report")
            print(f"NOTE: {said}")
        return gate

    @functools.cached_property
    def _count_C(self) -> np.ndarray:
        """Training samples of every class."""
        return self._split.count_labels()

    @functools.cached_property
    def _val(self) -> Split | None:
        shards = self._workdir / SHARDS
        return load_split(shards, "val", self._split.taxonomy) if any(shards.glob("val-*.index")) else None

    @functools.cached_property
    def _val_count_C(self) -> np.ndarray:
        """Validation samples of every class, labels smeared."""
        return self._val.count_smeared()

    def _measure_constant(self, vertical: str, num_val: int) -> float:
        """The mean AP of an answer that is always the same: the share of the samples that a class is present in."""
        count_V = self._val_count_C[self._split.taxonomy.vertical_slice(vertical)]
        return float((count_V[count_V > 0] / num_val).mean())

    def _measure_generalist(self, vertical: str, teacher: Classifier) -> float | None:
        taxonomy, path = self._split.taxonomy, self._workdir / "students" / self._config.generalist
        if self._generalist is None:  # it may be finished while teachers are asked
            metadata = load_metadata(path / NETWORK_FILE) if RunDirectory(path).is_finished else {}
            if metadata.get("taxonomy") != taxonomy.fingerprint:
                return None
            self._generalist = load_network(path, taxonomy).to(teacher.device)
        first_column = taxonomy.vertical_slice(vertical).start
        return mean_average_precision(
            measure_vertical(self._generalist, first_column, taxonomy.restrict(vertical), self._val)
        )


def measure_vertical(
    network: Classifier, first_column: int, taxonomy: Taxonomy, split: Split, batch_size: int = 256
) -> np.ndarray:
    """(V,) AP of the classes of one vertical on its own samples, labels smeared, NaN without a positive.

    Args:
        network: its logits from `first_column` on are those of the classes.
        first_column: where they begin.
        taxonomy: of the vertical alone; perhaps of its first classes, where later ones came since the network was trained.
        split: of the samples, with a whole taxonomy.
        batch_size: of images that are looked at together.

    Raises:
        DataError: a score is not finite.
    """
    [vertical] = taxonomy.verticals
    first_output, columns = split.taxonomy.vertical_slice(vertical).start, slice(first_column, None)
    ordinals = split.routed(vertical)
    subject = Subject(((network,),), "", taxonomy, first_output, split, ordinals)
    evaluator = Evaluator(taxonomy)
    with Progress(vertical, len(ordinals), "images", quiet=True) as progress:  # the caller shows its own
        for scores_BC, ordinal_B in subject.score_all(batch_size, 0, progress):
            scores_BV = scores_BC[:, columns][:, : taxonomy.num_classes]
            evaluator.update(scores_BV, [subject.labels(int(ordinal)) for ordinal in ordinal_B])
    return evaluator.compute(network.device).ap_of_class


def _find_problems(
    config: GateConfig, images_per_class: float, ap: float | None, constant: float | None, generalist: float | None
) -> list[str]:
    problems = []
    if images_per_class < config.min_images:
        problems.append(
            f"a class has {images_per_class:g} training images at the median, expected {config.min_images} (gate.min_images)"
        )
    if ap is not None and ap < constant + LEAST_GAIN * (1 - constant):
        problems.append(f"it knows nothing: AP {ap:.3f} on val, where a constant answer has {constant:.3f}")
    if ap is not None and generalist is not None and ap < generalist - config.tolerance:
        problems.append(
            f"it is worse than {config.generalist}: AP {ap:.3f} on val against {generalist:.3f} "
            f"(gate.tolerance={config.tolerance:g})"
        )
    return problems


#: Points of a loss curve that are enough to see where it goes.
_LEAST_LOSSES = 5


def _look_at_loss(path: Path) -> list[str]:
    """Whether the training loss of our own teacher ended above its start; single batches of a short run say nothing."""
    losses = [line["train/loss"] for line in load_metrics(path) if "train/loss" in line]
    if len(losses) < _LEAST_LOSSES:
        return []
    # The first line is of one batch alone: two lines at least.
    num_lines = max(2, len(losses) // 10)
    first, last = (float(np.mean(part)) for part in (losses[:num_lines], losses[-num_lines:]))
    return [f"it diverged: its loss rose from {first:.4g} to {last:.4g}"] if last > first else []
