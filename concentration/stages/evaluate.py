"""`concentrate evaluate name=NAME`: the metrics of a student, a generalist, one teacher, or the teachers as an ensemble.

`name=[a,b]` averages over several networks, and `crops=10` or 144 over several crops of each image.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from torch import Tensor

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.data.crops import NumCrops
from concentration.data.mapped_labels import load_class_map, map_labels
from concentration.data.reader import explain_skipped
from concentration.data.split import Split, describe_missing_split
from concentration.distributed import choose_device
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.metrics.agreement import LeafAnswers, select_leaf_answers
from concentration.metrics.ensembles import Combination
from concentration.metrics.evaluation import Evaluator, measure_kept_bytes
from concentration.metrics.vertical_answers import VerticalAnswers
from concentration.networks.augmented import ConditionalHeads
from concentration.networks.classifier import Classifier
from concentration.networks.cost import count_active_parameters, count_multiply_adds, count_parameters
from concentration.progress import Progress
from concentration.schema import FolderName, hash_values, parse_json
from concentration.stages.folders import EVALUATIONS, STUDENTS, TEACHERS
from concentration.stages.gallery import build_gallery
from concentration.stages.identities import SPECIALISTS, find_checkpoint
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.report_values import as_mapping, as_number
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.subject import Subject
from concentration.stages.teacher import load_teachers
from concentration.stages.train_network import load_network
from concentration.taxonomy import Taxonomy

#: In the evaluation's directory: the best leaf of every sample.
ANSWERS_FILE = "answers.safetensors"


class SubjectConfig(StageConfig):
    """Which network is asked, and on what device.

    name: the name of a student, or of a vertical for its teacher; `specialists` is all teachers as one ensemble.
    accelerator: the kind of device that runs the network.
    batch_size: how many images the network sees at a time.
    num_workers: processes that decode images; 0 decodes in the process itself.
    """

    runtime_fields = StageConfig.runtime_fields | {"batch_size", "num_workers", "accelerator"}

    name: FolderName = "student"
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


class EvaluateConfig(SubjectConfig):
    """Writes `evaluations/NAME.json`, or `evaluations/NAME.val.json` for the validation split.

    NAME is a+b for several networks, followed by `.144-crops` where there are several crops, and by `.max`.

    name: a list names several networks, whose answers are combined.
    crops: the crops of each image, whose answers are combined; 1 is the square in the middle, `data/crops.py` has the others.
    combination: how probabilities are combined: by their mean, or by the largest.
    head_threshold: for an augmented network: a head is evaluated only for images that without it give a class of its group at
        least this probability; None always evaluates all heads. `.heads-THRESHOLD` is added to NAME.
    images_of: another working directory, whose images are evaluated instead; `.on-DIRECTORY` is added to NAME. Their labels count
        where they name a class here; images without such a label are left out.
    class_map: a JSON file that maps class ids there to class ids here; None takes the ids that both have.
    split: `test`, or `val` to choose by.
    save_scores: also write `evaluations/NAME.safetensors` with `scores` (N, C) and unsmeared `labels` (N, C); all are held in
        memory until then, whatever `memory_gib` says.
    gallery: how many images to show with their top-3 predictions.
    memory_gib: how much memory the samples' scores in their own verticals may take, 4 bytes each. If they would take more, none
        is kept (except for 1 GiB of them at a time) and the network sees all images twice; the results are the same.
    """

    runtime_fields = SubjectConfig.runtime_fields | {"memory_gib"}

    name: FolderName | Annotated[tuple[FolderName, ...], pydantic.Field(min_length=1)] = "student"
    crops: NumCrops = 1
    combination: Combination = "mean"
    head_threshold: float | None = pydantic.Field(default=None, gt=0, lt=1)
    images_of: Path | None = None
    class_map: Path | None = None
    split: Literal["val", "test"] = "test"
    save_scores: bool = False
    gallery: pydantic.NonNegativeInt = 24
    memory_gib: pydantic.NonNegativeFloat = 8.0

    @pydantic.model_validator(mode="after")
    def _check_combination(self):
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"name={list(self.names)}: a name comes twice; give each once")
        if self.combination != "mean" and len(self.names) * self.crops == 1:
            raise ValueError(
                f"combination={self.combination} with one network and one crop: there is nothing to combine; remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_class_map(self):
        if self.class_map is not None and self.images_of is None:
            raise ValueError(f"class_map={self.class_map} has no effect without images_of; remove it")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def title(self) -> str:
        """The name of the evaluation."""
        crops = "" if self.crops == 1 else f".{self.crops}-crops"
        heads = "" if self.head_threshold is None else f".heads-{self.head_threshold:g}"
        combination = "" if self.combination == "mean" else f".{self.combination}"
        images = "" if self.images_of is None else f".on-{self.images_of.resolve().name}"
        return "+".join(self.names) + crops + combination + heads + images

    @property
    def output(self) -> Path:
        """Where the evaluation goes, without its suffix."""
        return self.workdir / EVALUATIONS / (self.title if self.split == "test" else f"{self.title}.val")


def evaluate(config: EvaluateConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: nothing finished has this name.
        DataError: the split is missing, none of its images can be decoded, or a network was made for another taxonomy.
    """
    _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
    split, made_from = _load_images(config, taxonomy)
    checkpoint = find_checkpoint(config.workdir, config.name, taxonomy.verticals)
    directory, result_path = RunDirectory(config.output), config.output.with_name(f"{config.output.name}.json")
    upstream = {"data": split.fingerprint, "checkpoint": checkpoint, **made_from}
    with directory.begin(config, upstream, is_growing=not result_path.exists()) as is_due:
        if not is_due:
            _print(config, result_path, as_mapping(parse_json(result_path.read_bytes(), str(result_path))))
            return
        subject = load_subject(config, taxonomy, split, checkpoint)
        subject = replace(subject, num_crops=config.crops, combination=config.combination)
        if config.head_threshold is not None:
            models = [[ConditionalHeads(network, config.head_threshold) for network in m] for m in subject.models]
            subject = replace(subject, models=tuple(map(tuple, models)))
        train = load_prepared_split(config.workdir, "train", taxonomy)
        outputs = slice(subject.first_output, subject.first_output + subject.taxonomy.num_classes)
        counts = {"num_train": train.count_smeared()[outputs], "num_test": split.count_smeared()[outputs]}
        evaluator = Evaluator(
            subject.taxonomy, counts["num_train"], _choose_num_passes(config, subject), finds_map_at_50=True
        )
        ordinals, scores_NC, answers = _score_samples(config, subject, evaluator, directory.path)
        skipped = np.setdiff1d(subject.ordinals, ordinals)
        _tell_skipped(subject, skipped)
        content = evaluator.compute(subject.networks[0].device).to_json()
        content["classes"] = _describe_classes(subject.taxonomy, content.pop("ap_of_class"), counts)
        content |= _describe_cost(config, subject)
        content["num_samples_skipped"] = len(skipped)
        content["split"] = config.split
        content["num_passes"] = evaluator.num_passes
        content["gallery"] = build_gallery(subject, config.gallery)
        if config.save_scores:
            _save_scores(config, subject, ordinals, scores_NC)
        save_answers(directory.path, answers, split.fingerprint)
        write_atomically(result_path, content)
        directory.finish({"mpvap": content["mpvap"]})
    _print(config, result_path, content)


def _tell_skipped(subject: Subject, skipped: np.ndarray) -> None:
    """Says how many images are left out, given their ordinals. Raises: DataError where all are."""
    if not len(skipped):
        return
    split, number = subject.split, len(subject.ordinals)
    first = f"the first: {split.key(int(skipped[0]))}: {explain_skipped(split, int(skipped[0]))}"
    if len(skipped) == number:
        raise DataError(
            f"{split.directory}: none of the {number} {split.name} images can be decoded, so nothing can be measured; bring "
            f"the shards back, or prepare again with overwrite=true; {first}"
        )
    are = "is" if len(skipped) == 1 else "are"
    print(
        f"evaluate: {len(skipped)} of {number} images cannot be decoded, and {are} left out; {first}", file=sys.stderr
    )


def _print(config: EvaluateConfig, path: Path, found: Mapping) -> None:
    mpvap, top1, num_samples = (as_number(found.get(key)) for key in ("mpvap", "top1", "num_samples"))
    values = [f"{name} {100 * value:.1f} %" for name, value in (("mpvap", mpvap), ("top-1", top1)) if value is not None]
    print(f"{path}: {', '.join(values)} of {num_samples or 0:,.0f} {config.split} images")


def _load_images(config: EvaluateConfig, taxonomy: Taxonomy) -> tuple[Split, dict[str, str]]:
    """The samples with labels of this taxonomy, and, where a class map gave those, its hash as an upstream result.

    Raises:
        DataError: as `load_prepared_split` and `map_labels`.
    """
    if config.images_of is None:
        return load_prepared_split(config.workdir, config.split, taxonomy), {}
    _, theirs, _ = load_prepared(config.images_of, DataOverrides())
    split = load_prepared_split(config.images_of, config.split, theirs)
    class_map = None if config.class_map is None else load_class_map(config.class_map)
    mapped = map_labels(split, taxonomy, class_map, str(config.class_map or f"images_of={config.images_of}"))
    return mapped, {} if class_map is None else {"class_map": hash_values(class_map)}


def load_subject(config: SubjectConfig, taxonomy: Taxonomy, split: Split, checkpoint: str) -> Subject:
    """The networks that `config` names, and the samples of the split that they are asked about.

    Raises:
        ConfigError: the teacher of one vertical is to be combined with networks that answer for other classes.
        DataError: no sample has a label in the teacher's vertical; or as `load_network`.
    """
    first_output, ordinals = 0, np.flatnonzero(np.diff(split.label_start))
    for name in config.names:
        if is_model_of_all(config.workdir, name):
            continue
        if len(config.names) > 1:
            raise ConfigError(
                f"name={list(config.names)}: {name} is the teacher of one vertical, and the others answer for other classes; "
                "leave it out, or evaluate it alone"
            )
        first_output, ordinals = taxonomy.vertical_slice(name).start, split.routed(name)
        if not len(ordinals):
            raise DataError(
                f"{split.directory}: no {split.name} image has a label of the vertical '{name}', so its teacher cannot be asked; "
                f"{describe_missing_split(split.name)}, and prepare again with overwrite=true"
            )
        taxonomy = taxonomy.restrict(name)
    device = choose_device(config.accelerator)
    loaded = [_load_model(config.workdir, name, taxonomy) for name in config.names]
    models = tuple(tuple(network.to(device) for network in networks) for networks in loaded)
    return Subject(models, checkpoint, taxonomy, first_output, split, ordinals)


def is_model_of_all(workdir: Path, name: str) -> bool:
    """Whether what has this name answers for the whole taxonomy; otherwise it is a vertical's teacher."""
    return name == SPECIALISTS or (workdir / STUDENTS / name).is_dir()


def _load_model(workdir: Path, name: str, taxonomy: Taxonomy) -> list[Classifier]:
    if name == SPECIALISTS:
        return load_teachers(workdir, taxonomy)
    kind = STUDENTS if is_model_of_all(workdir, name) else TEACHERS
    return [load_network(workdir / kind / name, taxonomy)]


def _choose_num_passes(config: EvaluateConfig, subject: Subject) -> Literal[1, 2]:
    num_samples = [len(subject.split.routed(vertical)) for vertical in subject.taxonomy.verticals]
    kept_bytes = measure_kept_bytes(subject.taxonomy.vertical_sizes, num_samples)
    return 1 if kept_bytes <= config.memory_gib * 2**30 else 2


def _score_samples(
    config: EvaluateConfig, subject: Subject, evaluator: Evaluator, path: Path
) -> tuple[np.ndarray, np.ndarray | None, LeafAnswers]:
    """Shows all samples to the evaluator, in one pass or two.

    Returns:
        The ordinals (N,) of the samples whose image can be decoded; their scores (N, C) in float32 if these are to be saved,
        else None; and their answers.
    """
    seen, kept, answered = [], [], []
    finder, whole = VerticalAnswers(subject.taxonomy), subject.split.taxonomy
    position_C = whole.position_of_output[subject.first_output :]
    first_vertical = int(whole.vertical_of_output[subject.first_output])
    title = f"evaluate {config.title}" + (" in two passes" if evaluator.num_passes == 2 else "")
    with Progress(title, evaluator.num_passes * len(subject.ordinals), "images", path) as progress:
        for scores_BC, labels, ordinal_B in _run_pass(config, subject, evaluator, progress):
            seen.append(ordinal_B)
            found = finder.find(scores_BC, labels, ordinal_B)
            answered.append(select_leaf_answers(found, position_C, first_vertical))
            if config.save_scores:
                kept.append(scores_BC.float().cpu().numpy())
        if evaluator.num_passes == 2:
            evaluator.begin_second_pass()
            for _ in _run_pass(config, subject, evaluator, progress):
                pass
    return np.concatenate(seen), np.concatenate(kept) if kept else None, LeafAnswers.join(answered)


def _run_pass(
    config: EvaluateConfig, subject: Subject, evaluator: Evaluator, progress: Progress
) -> Iterator[tuple[Tensor, list[list[int]], np.ndarray]]:
    """Shows the evaluator all samples; yields scores, labels and ordinals, batch by batch."""
    for scores_BC, ordinal_B in subject.score_all(config.batch_size, config.num_workers, progress):
        labels = [subject.labels(int(ordinal)) for ordinal in ordinal_B]
        evaluator.update(scores_BC, labels)
        yield scores_BC, labels, ordinal_B


def _describe_classes(taxonomy: Taxonomy, ap_C: list, counts: Mapping[str, np.ndarray]) -> list[dict]:
    described = []
    for output, ap in enumerate(ap_C):
        c = taxonomy.class_of_output(output)
        numbers = {name: int(counts_C[output]) for name, counts_C in counts.items()}
        leaf = {"is_leaf": bool(taxonomy.is_leaf[output])}
        described.append({"id": c.id, "name": c.name, "vertical": c.vertical, "ap": ap, **numbers, **leaf})
    return described


def _describe_cost(config: EvaluateConfig, subject: Subject) -> dict:
    """Multiply-adds are of one image: those of all its crops, by all networks; of heads the mean of what was evaluated."""
    conditional = [network for network in subject.networks if isinstance(network, ConditionalHeads)]
    networks = [network.student for network in conditional] or subject.networks
    counts = [count_parameters(network) for network in networks]
    active = _sum_known(count_active_parameters(network) for network in networks)
    of_crop = _sum_known(count_multiply_adds(network) for network in networks)
    heads = {}
    if conditional:
        saved = sum(network.count_saved() for network in conditional)
        of_crop, active = of_crop - saved, active - sum(n.count_left_out_parameters() for n in conditional)
        heads = {"num_heads": sum(n.num_heads for n in conditional), "saved_multiply_adds": saved * config.crops,
                 "mean_heads_evaluated": round(sum(n.mean_heads() for n in conditional), 4)}  # fmt: skip
    return {
        "num_parameters": {part: _sum_known(count[part] for count in counts) for part in counts[0]},
        "multiply_adds": None if of_crop is None else of_crop * config.crops,
        "num_active_parameters": active,
        "num_networks": len(counts),
        "models": list(config.names),
        "num_crops": config.crops,
        "combination": config.combination,
        "checkpoint": subject.checkpoint,
        **heads,
    }


def _sum_known(numbers: Iterable[int | None]) -> int | None:
    """The sum, or None where one of the numbers is not known."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def save_answers(path: Path, answers: LeafAnswers, data: str) -> None:
    """Keeps a network's answers about the samples of the split with fingerprint `data`, for comparisons between networks."""
    save_arrays(path / ANSWERS_FILE, answers.arrays(), {"data": data})


def load_answers(workdir: Path, name: str) -> tuple[LeafAnswers, str] | None:
    """The answers of an evaluation, and the fingerprint of their split; None where there are none."""
    path = workdir / EVALUATIONS / name / ANSWERS_FILE
    if not path.exists():
        return None
    return LeafAnswers(**load_arrays(path, list(LeafAnswers.__dataclass_fields__))), load_metadata(path)["data"]


def _save_scores(config: EvaluateConfig, subject: Subject, ordinals: np.ndarray, scores_NC: np.ndarray) -> None:
    """Writes scores and labels for the user's own metrics; columns are in the order of the output index."""
    taxonomy = subject.taxonomy
    label_NC = np.zeros((len(ordinals), taxonomy.num_classes), dtype=np.uint8)
    for row, ordinal in enumerate(ordinals):
        label_NC[row, subject.labels(int(ordinal))] = 1
    ids = {"class_ids": "\n".join(taxonomy.class_of_output(output).id for output in range(taxonomy.num_classes))}
    path = config.output.with_name(f"{config.output.name}.safetensors")
    save_arrays(path, {"scores": scores_NC, "labels": label_NC}, ids)
