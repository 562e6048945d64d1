"""What the jobs of a run have in common: the parts of a network, where it is trained, and how it is measured."""

from concentration.networks.bases import BaseConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.student import LossKind
from concentration.networks.top_layers import TopConfig
from concentration.pipeline.jobs import Job, Resources
from concentration.schema import Config
from concentration.stages.evaluate import EvaluateConfig
from concentration.stages.folders import STUDENTS
from concentration.stages.run_directory import StageConfig
from concentration.stages.student import StudentConfig, TargetsChoice
from concentration.training.configs import LoggerConfig, TrainerConfig
from concentration.training.optimizers import OptimizerConfig


class NetworkParts(Config):
    """A network and how it is trained: one of a run's networks besides the student."""

    loss: LossKind = "sigmoid"
    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig


class TrainedRun(StageConfig):
    """The part of a run's config that its trainings share.

    seed: of all networks' initial weights, of the order of the samples and the augmentation.
    """

    seed: int = 0
    logger: LoggerConfig = LoggerConfig()


def get_parts(parts: NetworkParts) -> dict[str, Config]:
    """The parts by name, for the config of a stage that trains."""
    return {name: getattr(parts, name) for name in NetworkParts.model_fields}


def get_shared(config: StageConfig) -> dict:
    """The keys that every stage of a run takes from the run's config."""
    return {"workdir": config.workdir, "overwrite": "changed" if config.overwrite else False}


def get_resources(trainer: TrainerConfig) -> Resources:
    """What a training runs on; with `auto`, where as many processes are taken as are started, a run starts one."""
    if trainer.devices == "auto" or trainer.num_nodes == "auto":
        return Resources(trainer.accelerator)
    return Resources(trainer.accelerator, trainer.num_nodes, trainer.devices)


def get_asking(trainer: TrainerConfig) -> dict:
    """For a stage that only asks networks: on what they are trained, and with as many processes that read ahead."""
    return {"accelerator": trainer.accelerator, "num_workers": trainer.num_workers}


def build_evaluate_job(
    config: StageConfig, name: str, trainer: TrainerConfig, after: tuple[str, ...], **options
) -> Job:
    """The job that measures one network, or the specialists, on the test images."""
    stage = EvaluateConfig(**get_shared(config), **get_asking(trainer), name=name, **options)
    directory = stage.output
    return Job(
        f"evaluate {name}",
        "evaluate",
        stage,
        directory,
        after,
        "measuring on the test images",
        Resources(trainer.accelerator),
    )


def build_student_job(
    config: TrainedRun, name: str, parts: NetworkParts, targets: TargetsChoice, after: tuple[str, ...], **options
) -> Job:
    """The job that trains one network over all verticals."""
    stage = StudentConfig(
        **get_shared(config),
        **get_parts(parts),
        seed=config.seed,
        logger=config.logger,
        name=name,
        targets=targets,
        **options,
    )
    learns = {"labels": "the labels", "soft": "the teachers' soft targets", "online": "what the teachers say meanwhile"}
    summary = f"training one network over all verticals on {learns[targets.kind]}"
    directory = config.workdir / STUDENTS / name
    return Job(f"student {name}", "student", stage, directory, after, summary, get_resources(parts.trainer))
