"""`concentrate mixture`: a gater and the experts of a grouping become one network that is served.

The gater is the grouping's nearest centroid, or a router that learns it. Every expert keeps its own decoder, or ONE decoder is
trained over the features of all (Gross, Ranzato and Szlam 2017; what their abstract leaves open is decided in docs/mixture.md).

Shapes: N samples, B batch, E experts, C all classes.
"""

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic
import torch

from concentration import distributed
from concentration.data.order import SequentialOrder
from concentration.data.sample_targets import LabelTargets
from concentration.errors import ConfigError, DataError
from concentration.files import hash_file, write_atomically
from concentration.grouping.sample_groups import CentroidRouter
from concentration.metrics.gater_quality import GaterQuality, measure_gater
from concentration.networks.cost import without_pretrained
from concentration.networks.gater import CentroidRuleConfig, GaterConfig, RouterRuleConfig, TrunkConfig
from concentration.networks.mixture import Mixture, MixtureNetworkConfig, load_mixture
from concentration.networks.pace import PaceConfig
from concentration.networks.routed_base import RoutedConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy
from concentration.progress import Progress
from concentration.schema import Config, FolderName, hash_values
from concentration.stages.expert import name_expert
from concentration.stages.folders import STUDENTS, TEACHERS
from concentration.stages.groupings import find_grouping, identify_sample_groups, load_router, load_sample_groups
from concentration.stages.prepared import (
    DataOverrides,
    PreparedData,
    has_split,
    load_prepared,
    load_prepared_split,
)
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory, StageConfig
from concentration.stages.sample_stream import SampleStream
from concentration.stages.train_network import Task, TrainingStageConfig, load_network, train_built_network
from concentration.taxonomy import Taxonomy
from concentration.training.configs import CHECKPOINTS, LoggerConfig, TrainerConfig
from concentration.training.optimizers import OptimizerConfig
from concentration.training.router import RouterTrainingConfig, fit_router

#: In the run directory: until it is finished, gater and experts with their own decoders; and how good the gater is on the
#: validation samples.
ASSEMBLED_FILE, GATER_FILE = f"{CHECKPOINTS}/assembled.safetensors", "gater.json"


class RouterConfig(RouterTrainingConfig):
    """A router with one hidden layer of `hidden` units (None for no hidden layer), and its training.

    hidden: units of the hidden layer; None for no hidden layer.
    """

    kind: Literal["router"] = "router"
    hidden: pydantic.PositiveInt | None = 64


class OwnDecoderConfig(Config):
    """Each expert's own top layers, as it was trained."""

    kind: Literal["own"] = "own"


class SharedDecoderConfig(Config):
    """One set of top layers over the frozen features of all experts, and its training on the labels.

    smear: smear labels to their ancestors inside the vertical.
    """

    kind: Literal["shared"] = "shared"
    top: TopConfig
    pace: PaceConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    smear: bool = True


class MixtureConfig(StageConfig):
    """Writes `students/NAME/`.

    seed: of the initial weights and of what is drawn in training.
    name: the name of the mixture, by which it is evaluated and exported.
    grouping: the grouping whose experts (`teachers/GROUPING-NUMBER`) are mixed.
    gater: what chooses an image's experts.
    decoder: what turns an expert's features into logits.
    top_experts: how many experts see an image when the mixture is served.
    accelerator: the kind of device that runs the network.
    batch_size: how many images the network sees at a time.
    num_workers: processes that decode images; 0 decodes in the process itself.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {
        "logger", "accelerator", "batch_size", "num_workers"
    }  # fmt: skip

    seed: int = 0
    name: FolderName = "mixture"
    grouping: FolderName = "features"
    gater: Annotated[CentroidRuleConfig | RouterConfig, pydantic.Field(discriminator="kind")]
    decoder: Annotated[OwnDecoderConfig | SharedDecoderConfig, pydantic.Field(discriminator="kind")]
    top_experts: Literal[1, 2] = 1
    data: DataOverrides = DataOverrides()
    logger: LoggerConfig = LoggerConfig()
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        if self.name == "specialists":
            raise ValueError("name=specialists means the teachers as an ensemble; give the mixture another name")
        return self


def mixture(config: MixtureConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: the grouping or an expert is not there, or the experts differ in what they must have in common.
        DataError: a file has changed.
        DivergedError, Preempted: as `training.fit.fit`.
    """
    if isinstance(config.decoder, SharedDecoderConfig):
        distributed.start(config.decoder.trainer.accelerator, config.decoder.trainer.timeout_seconds)
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    router = load_router(config.workdir, config.grouping)
    directory = RunDirectory(config.workdir / STUDENTS / config.name)
    groups = identify_sample_groups(config.workdir, config.grouping)
    upstream = {"data": fingerprint, "grouping": groups, "experts": _identify_experts(config, router.num_groups)}
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        assembled = directory.path / ASSEMBLED_FILE
        if distributed.rank() == 0 and not assembled.exists():
            _assemble(config, router, taxonomy, prepared, directory)
        distributed.wait_for_all()
        if isinstance(config.decoder, SharedDecoderConfig):
            _train_decoder(config, config.decoder, load_mixture(assembled), taxonomy, prepared, directory)
            return
        path = directory.path / NETWORK_FILE
        load_mixture(assembled).save(path, {"taxonomy": taxonomy.fingerprint})
        directory.finish({"step": 0, "checkpoint": hash_file(path)})


def _identify_experts(config: MixtureConfig, num_experts: int) -> str:
    """A hash of all experts' files. Raises: ConfigError where one has not finished."""
    checkpoints = {}
    for number in range(num_experts):
        directory = RunDirectory(config.workdir / TEACHERS / name_expert(config.grouping, number))
        done = directory.load_done(f"concentrate teacher group={config.grouping}/{number}")
        checkpoints[str(number)] = done["checkpoint"]
    return hash_values(checkpoints)


def _assemble(
    config: MixtureConfig, router: CentroidRouter, taxonomy: Taxonomy, prepared: PreparedData, directory: RunDirectory
) -> None:
    """Puts gater and experts together, trains the router if there is to be one, and measures the gater."""
    teachers = config.workdir / TEACHERS
    numbers = range(router.num_groups)
    experts = [load_network(teachers / name_expert(config.grouping, number), taxonomy) for number in numbers]
    network = _load_grouping_network(config, router, taxonomy)
    sizes = {config.grouping: network.image_size} | {
        name_expert(config.grouping, n): experts[n].image_size for n in numbers
    }
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"image sizes differ: {sizes}; train gater and experts with one data.image_size")
    torch.manual_seed(config.seed)
    built = Mixture(_describe(config, router, network, experts))
    built.gater.trunk.take(network.base, network.top)
    for expert, trained in zip(built.experts, experts, strict=True):
        expert.load_state_dict(trained.state_dict())
    built = built.eval().to(distributed.choose_device(config.accelerator))
    if isinstance(config.gater, RouterConfig):
        _train_router(config, config.gater, built, taxonomy, prepared, directory)
    else:
        built.gater.take_centroids(router)
    if has_split(config.workdir, "val"):
        quality = _measure_gater(config, built, taxonomy, directory)
        write_atomically(directory.path / GATER_FILE, asdict(quality))
        print(f"{directory.path}: {_describe_quality(quality)}")
    built.save(directory.path / ASSEMBLED_FILE, {"taxonomy": taxonomy.fingerprint})


def _load_grouping_network(config: MixtureConfig, router: CentroidRouter, taxonomy: Taxonomy) -> Student:
    """The network whose features were grouped.

    Raises:
        ConfigError: it is itself made of several networks.
        DataError: it is not the one that was grouped by.
    """
    name = find_grouping(config.workdir, config.grouping).load_config()["method"]["network"]
    path = config.workdir / STUDENTS / name
    network = load_network(path, taxonomy)
    if hash_file(path / NETWORK_FILE) != router.network:
        raise DataError(f"{path}: not the network that {config.grouping!r} was made with; group again")
    if not isinstance(network, Student) or isinstance(network.config.base, RoutedConfig):
        raise ConfigError(f"{path}: is a mixture; group by the features of a student or generalist")
    return network


def _describe(
    config: MixtureConfig, router: CentroidRouter, network: Student, experts: list[Student]
) -> MixtureNetworkConfig:
    form = without_pretrained(network.config)
    trunk = TrunkConfig(
        base=form.base,
        image_size=form.image_size,
        num_verticals=len(form.verticals),
        top=form.top if router.layer == "top1" else None,
    )
    is_router = isinstance(config.gater, RouterConfig)
    gater = GaterConfig(
        trunk=trunk,
        rule=RouterRuleConfig(hidden=config.gater.hidden) if is_router else CentroidRuleConfig(),
        num_experts=router.num_groups,
        normalise=router.normalise,
        top_experts=config.top_experts,
    )
    return MixtureNetworkConfig(gater=gater, experts=tuple(without_pretrained(expert.config) for expert in experts))


def _train_router(
    config: MixtureConfig,
    training: RouterConfig,
    built: Mixture,
    taxonomy: Taxonomy,
    prepared: PreparedData,
    directory: RunDirectory,
) -> None:
    split = load_prepared_split(config.workdir, "train", taxonomy)
    group_N = load_sample_groups(config.workdir, config.grouping, split)
    total = training.max_epochs * int((group_N >= 0).sum())
    with Progress(f"router of {config.name}", total, "images", directory.path) as progress:
        fit_router(built.gater, split, group_N, prepared.view, training, config.seed, config.num_workers, progress)


@torch.inference_mode()
def _measure_gater(config: MixtureConfig, built: Mixture, taxonomy: Taxonomy, directory: RunDirectory) -> GaterQuality:
    """On the validation samples, each of which all experts see."""
    split = load_prepared_split(config.workdir, "val", taxonomy)
    group_N = load_sample_groups(config.workdir, config.grouping, split)
    targets = LabelTargets(split, smear=True)
    stream = SampleStream(built, config.batch_size, config.num_workers)
    chosen, seen, losses = [], [], []
    with Progress(f"gater of {config.name}", len(split), "images", directory.path) as progress:
        for batch in stream.read(split, SequentialOrder(np.arange(len(split)))):
            wanted = targets.lookup(batch.ordinal_B).to(built.device)
            chosen.append(built.gater(batch.images).expert_BR[:, 0].cpu().numpy())
            of_experts = [sigmoid_cross_entropy([expert(batch.images)], wanted) for expert in built.experts]
            losses.append(torch.stack(of_experts, dim=1).cpu().numpy())
            seen.append(batch.ordinal_B)
            progress.advance(batch.global_count)
    return measure_gater(np.concatenate(chosen), group_N[np.concatenate(seen)], np.concatenate(losses))


def _describe_quality(quality: GaterQuality) -> str:
    num_experts = len(quality.load)
    return (
        f"of {num_experts} experts {quality.effective_experts:.1f} are used in effect, the busiest sees "
        f"{quality.largest_load:.2f} times its even share; the gater sends {quality.agreement:.1%} of the validation images to "
        f"their own group, {quality.best_expert:.1%} to the expert of the lowest loss (chance {1 / num_experts:.1%})"
    )


def _train_decoder(
    config: MixtureConfig,
    decoder: SharedDecoderConfig,
    assembled: Mixture,
    taxonomy: Taxonomy,
    prepared: PreparedData,
    directory: RunDirectory,
) -> None:
    """Trains one set of top layers over the experts' base networks."""
    forms = {(expert.base, expert.image_size) for expert in assembled.config.experts}
    if len(forms) > 1:
        raise ConfigError("decoder=shared: the experts' base networks differ; train them alike, or use decoder=own")
    [(base, image_size)] = forms
    split = load_prepared_split(config.workdir, "train", taxonomy)
    counts_C = split.count_smeared() if decoder.smear else split.count_labels()
    task = Task(
        title=f"decoder of {config.name}",
        taxonomy=taxonomy,
        split=split,
        ordinals=range(len(split)),
        targets=LabelTargets(split, decoder.smear),
        counts_C=counts_C,
        frequency_C=counts_C / len(split),
    )
    verticals = dict(zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True))
    expert = TrunkConfig(base=base, image_size=image_size, num_verticals=len(verticals))
    routed = RoutedConfig(gater=assembled.config.gater, expert=expert)
    parts = {"top": decoder.top, "pace": decoder.pace, "image_size": image_size, "verticals": verticals}
    torch.manual_seed(config.seed)
    student = Student(NetworkConfig(base=routed, **parts))
    student.base.gater.load_state_dict(assembled.gater.state_dict())
    for trunk, trained in zip(student.base.experts, assembled.experts, strict=True):
        trunk.take(trained.base, trained.top)
    training = TrainingStageConfig(
        workdir=config.workdir,
        seed=config.seed,
        optimizer=decoder.optimizer,
        trainer=decoder.trainer,
        logger=config.logger,
    )
    train_built_network(student, training, directory, task, prepared)
