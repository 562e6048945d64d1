"""Whether a teacher is fit to be asked: its AP on val, compared with the generalist's, and how many images it was trained on.

Shapes: V classes of the teacher's vertical.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from concentration.array_files import load_metadata
from concentration.data.split import Split
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.metrics.average_precision import mean_average_precision
from concentration.metrics.evaluation import Evaluator
from concentration.networks.classifier import Classifier
from concentration.progress import Progress
from concentration.schema import Config, FolderName
from concentration.stages.folders import GATES, TEACHERS
from concentration.stages.prepared import has_split, load_prepared_split
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory
from concentration.stages.subject import Subject
from concentration.stages.train_network import load_network
from concentration.taxonomy import Taxonomy
from concentration.temporaries import clear_temporaries
from concentration.training.metrics_file import load_metrics

#: A teacher that goes less of the way from a constant answer's AP to 1 knows nothing.
LEAST_GAIN = 0.05


class GateConfig(Config):
    """What a teacher must be before its targets are made; the findings are written to `gates/VERTICAL.json`.

    action: `report` says what is wrong with a teacher and goes on, `stop` ends with an error, `off` does not check.
    generalist: the network in `students/` than which a teacher must not be worse on its own vertical; they are not compared if it
        is not finished, or was made for another taxonomy.
    tolerance: by how much the teacher's AP may be lower.
    min_images: the least training images of a leaf class, in the median over leaves.
    """

    action: Literal["off", "report", "stop"] = "report"
    generalist: FolderName = "generalist"
    tolerance: float = pydantic.Field(default=0.0, ge=0, lt=1)
    min_images: pydantic.NonNegativeInt = 5


@dataclass(frozen=True)
class Gate:
    """What is known of a teacher.

    Attributes:
        vertical: its vertical.
        images_per_class: training images of a leaf class, in the median over leaves.
        num_val: validation images of the vertical.
        ap: mean AP of its classes on these, labels smeared; None where there are none, or its answers are not finite.
        constant_ap: the same of a constant answer, which knows nothing.
        generalist_ap: the same of the generalist's outputs for the vertical; None where there is no comparison.
        problems: what is wrong with the teacher, one sentence each.
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
        clear_temporaries(self._workdir / GATES)
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
        if not has_split(self._workdir, "val"):
            return None
        return load_prepared_split(self._workdir, "val", self._split.taxonomy)

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
    """(V,) AP of the classes of one vertical on its own samples, labels smeared; NaN without a positive.

    Args:
        network: its logits from `first_column` on are those of the vertical's classes.
        taxonomy: the taxonomy of the vertical alone, or of its first classes, if others were added after the network was trained.
        split: the samples, with the whole taxonomy.
        batch_size: images that are shown together.

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


#: A loss curve needs so many points before its direction means anything.
_LEAST_LOSSES = 5


def _look_at_loss(path: Path) -> list[str]:
    """A sentence if the training loss ended above its start; none for a teacher that was taken over, or a very short run."""
    losses = [line["train/loss"] for line in load_metrics(path) if "train/loss" in line]
    if len(losses) < _LEAST_LOSSES:
        return []
    # At least two lines, because the first is about a single batch.
    num_lines = max(2, len(losses) // 10)
    first, last = (float(np.mean(part)) for part in (losses[:num_lines], losses[-num_lines:]))
    return [f"it diverged: its loss rose from {first:.4g} to {last:.4g}"] if last > first else []
