"""`concentrate student`: one network over all verticals, on soft targets or, as the generalist, on labels."""

from typing import Annotated, Literal

import pydantic

from concentration import distributed
from concentration.data.index import load_split
from concentration.data.sample_targets import LabelTargets, SampleTargets, StoredTargets
from concentration.errors import ConfigError
from concentration.schema import Config, hash_values
from concentration.stages.prepare import SHARDS, load_prepared
from concentration.stages.run_directory import RunDirectory
from concentration.stages.targets import TARGETS, SoftTargetsConfig
from concentration.stages.teacher import TEACHERS
from concentration.stages.train_network import NetworkStageConfig, Task, identify_base_checkpoint, train_network
from concentration.taxonomy import Taxonomy

STUDENTS = "students"


class HardTargetsConfig(Config):
    """The samples' own labels."""

    kind: Literal["labels"] = "labels"


TargetsChoice = Annotated[HardTargetsConfig | SoftTargetsConfig, pydantic.Field(discriminator="kind")]


class StudentConfig(NetworkStageConfig):
    """Writes `students/NAME/`. `smear` is for labels, true where not given: soft targets carry their teachers' smearing."""

    name: str = "student"
    targets: TargetsChoice
    smear: bool | None = None

    @pydantic.model_validator(mode="after")
    def _check_smear(self):
        if self.smear and self.targets.kind == "soft":
            raise ValueError(
                "smear=true with targets=soft: soft targets are never smeared; remove it (Gao et al., section 3.1)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        if self.name == "specialists":
            raise ValueError("name=specialists means the teachers as an ensemble; give the student another name")
        return self


def student(config: StudentConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError, DataError, DivergedError, Preempted.
    """
    distributed.start("nccl" if config.trainer.accelerator == "gpu" else "gloo")
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    directory = RunDirectory(config.workdir / STUDENTS / config.name)
    upstream = {"data": fingerprint, **identify_base_checkpoint(config)}
    if config.targets.kind == "soft":
        upstream["targets"] = _identify_targets(config, taxonomy)
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        split = load_split(config.workdir / SHARDS, "train", taxonomy)
        smear = config.smear is not False
        targets: SampleTargets
        if config.targets.kind == "soft":
            targets = StoredTargets(config.workdir / TARGETS / config.targets.name, split)
        else:
            targets = LabelTargets(split, smear)
        task = Task(
            title=f"student {config.name}",
            taxonomy=taxonomy,
            split=split,
            ordinals=range(len(split)),
            targets=targets,
            counts_C=split.count_smeared() if smear else split.count_labels(),
        )
        train_network(config, directory, task, prepared)


def _identify_targets(config: StudentConfig, taxonomy: Taxonomy) -> str:
    """A hash of all verticals' targets.

    Raises:
        ConfigError: those of a vertical are not there, or its teacher has been trained again since.
    """
    root = config.workdir / TARGETS / config.targets.name
    if not root.is_dir():
        have = sorted(path.name for path in root.parent.glob("*")) or ["none"]
        raise ConfigError(
            f"targets.name={config.targets.name}: no such targets (there: {', '.join(have)}); run `concentrate targets` first"
        )
    directories = {vertical: RunDirectory(root / vertical) for vertical in taxonomy.verticals}
    done = {v: d.load_done(f"concentrate targets vertical={v}") for v, d in directories.items()}
    for vertical, directory in directories.items():
        _check_teacher(config, vertical, done[vertical]["teacher"])
        made_with = directory.load_config()["targets"]["top_k"]
        if made_with != config.targets.top_k:
            raise ConfigError(
                f"targets.top_k={config.targets.top_k}, but {directory.path} was made with {made_with}; "
                "give that number, or make other targets under another targets.name"
            )
    return hash_values({vertical: facts["targets"] for vertical, facts in done.items()})


def _check_teacher(config: StudentConfig, vertical: str, made_by: str) -> None:
    """Raises: ConfigError where the teacher is there, and is not the one that made the targets."""
    path = config.workdir / TEACHERS / vertical
    if not (path / "DONE.json").exists():
        return  # a teacher may be removed once its targets are made
    now = RunDirectory(path).load_done(f"concentrate teacher vertical={vertical}")["checkpoint"]
    if made_by != now:
        raise ConfigError(
            f"targets.name={config.targets.name}: made by another teacher of {vertical} ({made_by}) than {path} holds now "
            f"({now}); run `concentrate targets vertical={vertical} overwrite=true`, or make targets of another name"
        )
