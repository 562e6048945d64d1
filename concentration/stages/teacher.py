"""`concentrate teacher vertical=NAME`: a specialist of one vertical (Gao et al., section 3.1, Equation 1)."""

import numpy as np

from concentration import distributed
from concentration.data.index import load_split
from concentration.data.sample_targets import LabelTargets
from concentration.stages.prepare import SHARDS, load_prepared
from concentration.stages.run_directory import RunDirectory
from concentration.stages.train_network import NetworkStageConfig, Task, identify_base_checkpoint, train_network

TEACHERS = "teachers"


class TeacherConfig(NetworkStageConfig):
    """Trains on the samples with a label in `vertical`; writes `teachers/VERTICAL/`."""

    vertical: str
    smear: bool = True


def teacher(config: TeacherConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError, DataError, DivergedError, Preempted.
    """
    distributed.start("nccl" if config.trainer.accelerator == "gpu" else "gloo")
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    outputs = taxonomy.vertical_slice(config.vertical)
    directory = RunDirectory(config.workdir / TEACHERS / config.vertical)
    upstream = {"data": fingerprint, **identify_base_checkpoint(config)}
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        split = load_split(config.workdir / SHARDS, "train", taxonomy)
        counts_C: np.ndarray = (split.count_smeared() if config.smear else split.count_labels())[outputs]
        ordinals = split.routed(config.vertical)
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
