"""`concentrate teacher vertical=NAME`: a specialist of one vertical, trained here or taken over (Gao et al., section 3.1).

`concentrate teacher group=ID` trains the expert of one group of samples (`stages/expert.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from concentration import distributed
from concentration.data.sample_targets import LabelTargets
from concentration.files import hash_file
from concentration.networks.classifier import Classifier
from concentration.networks.external import ExternalConfig, find_external_files
from concentration.networks.external.teacher import ExternalTeacher, take_over
from concentration.progress import Progress
from concentration.schema import Config, hash_values, write_override
from concentration.stages.expert import ExpertConfig, train_expert
from concentration.stages.folders import TEACHERS
from concentration.stages.plan import count_most_labels, print_training_plan
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory, StageConfig
from concentration.stages.train_network import (
    LabelsConfig,
    NetworkStageConfig,
    Task,
    find_fine,
    identify_base_checkpoint,
    load_network,
    train_network,
)
from concentration.stages.verbs import write_command
from concentration.taxonomy import Taxonomy
from concentration.training.memory import StepShape


class TeacherConfig(NetworkStageConfig, LabelsConfig):
    """Trains on the samples with a label in `vertical`; writes `teachers/VERTICAL/`.

    vertical: the vertical's name.
    smear: smear labels to their ancestors inside the vertical.
    """

    vertical: str
    smear: bool = True

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type[Config]:
        if values.get("external") is not None:
            return ExternalTeacherConfig
        return cls if values.get("group") is None else ExpertConfig

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_group(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The composed config has both `vertical` and `group`, of which one is None."""
        _require_vertical(values)
        return {name: value for name, value in values.items() if name != "group"}


class ExternalTeacherConfig(StageConfig):
    """Takes over a model that was made elsewhere; writes `teachers/VERTICAL/`."""

    vertical: str
    external: ExternalConfig

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_training(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keys that only training has must be None or absent: `conf/external/` takes them out of the composed config."""
        _require_vertical(values)
        trainings = (TeacherConfig.model_fields.keys() | {"group"}) - cls.model_fields.keys()
        given = sorted(name for name in trainings if values.get(name) is not None)
        if given:
            raise ValueError(f"{', '.join(given)}: no effect with external, since nothing is trained; leave it out")
        return {name: value for name, value in values.items() if name not in trainings}


def teacher(config: TeacherConfig | ExternalTeacherConfig | ExpertConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError, DataError, DivergedError, Preempted.
    """
    if isinstance(config, ExternalTeacherConfig):
        _take_over(config)
    elif isinstance(config, ExpertConfig):
        train_expert(config)
    else:
        _train(config)


def load_teachers(workdir: Path, taxonomy: Taxonomy) -> list[Classifier]:
    """All verticals' teachers, in the order of the verticals. Raises: as `load_network`."""
    return [load_network(workdir / TEACHERS / v, taxonomy.restrict(v)) for v in taxonomy.verticals]


def measure_teachers(workdir: Path, taxonomy: Taxonomy) -> int:
    """Bytes of the files of all verticals' teachers.

    Raises:
        ConfigError: one has not finished.
    """
    num_bytes = 0
    for vertical in taxonomy.verticals:
        directory = RunDirectory(workdir / TEACHERS / vertical)
        files = directory.load_done(write_command("teacher", vertical)).get("files", (NETWORK_FILE,))
        num_bytes += sum((directory.path / name).stat().st_size for name in files)
    return num_bytes


def _require_vertical(values: Mapping[str, Any]) -> None:
    if values.get("vertical") is None:
        null = write_override("vertical", "null")
        raise ValueError(
            f"'vertical' is missing: give vertical=VALUE, or group=ID of a grouping for its expert; for one named null, {null}"
        )


def _train(config: TeacherConfig) -> None:
    """Trains the specialist of one vertical on smeared labels (Equation 1)."""
    if config.plan:
        _print_plan(config)
        return
    distributed.start(config.trainer.accelerator, config.trainer.timeout_seconds)
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    outputs = taxonomy.vertical_slice(config.vertical)
    directory = RunDirectory(config.workdir / TEACHERS / config.vertical)
    upstream = {"data": fingerprint, **identify_base_checkpoint(config)}
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        split = load_prepared_split(config.workdir, "train", taxonomy)
        if config.coarse_labels == "skip":
            ordinals = find_fine(split, config.vertical)
            counts_C = split.count_in(ordinals, config.smear)[outputs]
        else:
            ordinals = split.routed(config.vertical)
            counts_C = (split.count_smeared() if config.smear else split.count_labels())[outputs]
        task = Task(
            title=f"teacher {config.vertical}",
            taxonomy=taxonomy.restrict(config.vertical),
            split=split,
            ordinals=ordinals,
            targets=LabelTargets(split, config.smear, config.vertical),
            counts_C=counts_C,
            frequency_C=counts_C / len(ordinals),
            vertical=config.vertical,
        )
        train_network(config, directory, task, prepared)


def describe_step(config: TeacherConfig, restricted: Taxonomy) -> StepShape:
    """What a step's memory depends on besides the network; `restricted` is the taxonomy of the teacher's vertical."""
    return StepShape(count_most_labels(restricted, config.smear))


def _print_plan(config: TeacherConfig) -> None:
    prepared, taxonomy, _ = load_prepared(config.workdir, config.data)
    restricted = taxonomy.restrict(config.vertical)
    shape = describe_step(config, restricted)
    print_training_plan(config, f"teacher {config.vertical}", restricted, prepared.image_size, shape)


def _take_over(config: ExternalTeacherConfig) -> None:
    """Copies the model and the map of its outputs. No image is read, so the teacher does not depend on the data."""
    _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
    restricted = taxonomy.restrict(config.vertical)
    directory = RunDirectory(config.workdir / TEACHERS / config.vertical)
    content = hash_values({str(n): hash_file(path) for n, path in enumerate(find_external_files(config.external))})
    with directory.begin(config, {"taxonomy": restricted.fingerprint, "files": content}) as is_due:
        if not is_due:
            return
        found = take_over(config.external, taxonomy, config.vertical)
        with Progress(f"teacher {config.vertical}", 1, "models", directory.path) as progress:
            files = {name: hash_file(directory.path / name) for name in found.save(directory.path)}
            progress.advance()
        directory.finish({"checkpoint": hash_values(files), "files": files, **_describe_missing(found, directory)})


def _describe_missing(found: ExternalTeacher, directory: RunDirectory) -> dict[str, int]:
    """The number of classes that the teacher does not know, which it also prints."""
    missing = [found.taxonomy.class_of_output(output).id for output in found.class_map.find_missing()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        print(
            f"{directory.path}: {len(missing)} of {found.num_outputs} classes have no output of the model and get "
            f"probability 0: {shown}"
        )
    return {"num_classes_without_output": len(missing)}
