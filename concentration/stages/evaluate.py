"""`concentrate evaluate name=NAME`: the metrics of a student, a generalist, one teacher, or the teachers as an ensemble."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor

from concentration.data.index import Split, load_split
from concentration.data.loader import SampleReader, StepBatches, build_loader
from concentration.data.order import SequentialOrder, permutation
from concentration.data.sample_targets import LabelTargets
from concentration.data.views import centre_views, decode_view
from concentration.errors import ConfigError
from concentration.metrics.evaluation import Evaluator
from concentration.networks.cost import count_multiply_adds, count_parameters
from concentration.networks.student import Student
from concentration.progress import Progress
from concentration.schema import hash_values
from concentration.stages.prepare import SHARDS, DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.student import STUDENTS
from concentration.stages.teacher import TEACHERS
from concentration.stages.train_network import load_network
from concentration.targets import write_atomically
from concentration.taxonomy import Taxonomy

EVALUATIONS = "evaluations"
SPECIALISTS = "specialists"
#: Pixels of a picture in the report's gallery, at most.
GALLERY_PIXELS = 96


class EvaluateConfig(StageConfig):
    """Writes `evaluations/NAME.json`.

    name: of a student, of a vertical's teacher, or `specialists` for all teachers as one ensemble.
    split: `test`; `val` is for choices.
    save_scores: also writes `evaluations/NAME.safetensors` with `scores` (N, C) and `labels` (N, C), unsmeared.
    gallery: pictures with their top-3 predictions.
    """

    runtime_fields = StageConfig.runtime_fields | {"batch_size", "num_workers", "accelerator"}

    name: str = "student"
    split: Literal["val", "test"] = "test"
    save_scores: bool = False
    gallery: pydantic.NonNegativeInt = 24
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0


@dataclass(frozen=True)
class Scorer:
    """Networks that together give scores over the whole taxonomy.

    Attributes:
        networks: by the outputs that they fill.
        checkpoint: a hash of their files.
    """

    networks: tuple[tuple[slice, Student], ...]
    checkpoint: str

    @torch.inference_mode()
    def score(self, images: Tensor, num_classes: int) -> Tensor:
        """Logits, (B, C) on the CPU; -inf where no network has an output."""
        scores_BC = torch.full((len(images), num_classes), -math.inf)
        for outputs, network in self.networks:
            scores_BC[:, outputs] = network(images.to(network.mean.device)).cpu()
        return scores_BC


def evaluate(config: EvaluateConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: nothing finished has this name.
        DataError: the split is not there, or a network was made for another taxonomy.
    """
    _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
    split = load_split(config.workdir / SHARDS, config.split, taxonomy)
    checkpoint = _find_checkpoint(config.workdir, config.name, taxonomy)
    directory = RunDirectory(config.workdir / EVALUATIONS / config.name)
    with directory.begin(config, {"data": split.fingerprint, "checkpoint": checkpoint}) as is_due:
        if not is_due:
            return
        scorer = _load_scorer(config, taxonomy, checkpoint)
        train = load_split(config.workdir / SHARDS, "train", taxonomy)
        evaluator = Evaluator(taxonomy, train.count_smeared())
        scores_NC = _score_split(config, scorer, split, evaluator, directory.path)
        content = evaluator.compute().to_json()
        content["classes"] = _describe_classes(taxonomy, content.pop("ap_of_class"), train, split)
        content |= _describe_cost(scorer)
        content["split"] = config.split
        content["gallery"] = _build_gallery(config, scorer, split)
        if config.save_scores:
            _save_scores(config, scores_NC, split)
        write_atomically(config.workdir / EVALUATIONS / f"{config.name}.json", content)
        directory.finish({"mpvap": content["mpvap"]})


def _find_checkpoint(workdir: Path, name: str, taxonomy: Taxonomy) -> str:
    """A hash of the networks' files.

    Raises:
        ConfigError: they are not finished, or nothing has this name.
    """
    if name == SPECIALISTS:
        directories = {v: RunDirectory(workdir / TEACHERS / v) for v in taxonomy.verticals}
        return hash_values(
            {v: d.load_done(f"concentrate teacher vertical={v}")["checkpoint"] for v, d in directories.items()}
        )
    for kind in (STUDENTS, TEACHERS):
        if (workdir / kind / name).is_dir():
            return RunDirectory(workdir / kind / name).load_done(f"concentrate {kind[:-1]}")["checkpoint"]
    have = sorted(path.name for kind in (STUDENTS, TEACHERS) for path in (workdir / kind).glob("*"))
    raise ConfigError(f"name={name}: no such run in {workdir}; valid: {', '.join([SPECIALISTS, *have])}")


def _load_scorer(config: EvaluateConfig, taxonomy: Taxonomy, checkpoint: str) -> Scorer:
    workdir, name = config.workdir, config.name
    if (workdir / STUDENTS / name).is_dir():
        parts = [(slice(0, taxonomy.num_classes), load_network(workdir / STUDENTS / name, taxonomy))]
    else:
        verticals = taxonomy.verticals if name == SPECIALISTS else (name,)
        parts = [
            (taxonomy.vertical_slice(v), load_network(workdir / TEACHERS / v, taxonomy.restrict(v))) for v in verticals
        ]
    device = "cuda" if config.accelerator == "gpu" else "cpu"
    return Scorer(tuple((outputs, network.to(device)) for outputs, network in parts), checkpoint)


def _score_split(
    config: EvaluateConfig, scorer: Scorer, split: Split, evaluator: Evaluator, path: Path
) -> np.ndarray | None:
    """Feeds the evaluator; returns all scores (N, C) float32 where they are to be saved."""
    num_classes = split.taxonomy.num_classes
    image_size = scorer.networks[0][1].config.image_size
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size, views=None, seed=0)
    batch_size = min(config.batch_size, len(split))
    batches = StepBatches(
        reader, SequentialOrder(np.arange(len(split))), batch_size, accumulate=1, rank=0, world_size=1
    )
    kept = []
    with Progress(f"evaluate {config.name}", len(split), "images", path) as progress:
        for batch in build_loader(batches, range(batches.steps_per_epoch), config.num_workers):
            is_real_B = batch.weight_B > 0
            scores_BC = scorer.score(batch.images, num_classes)[is_real_B]
            evaluator.update(scores_BC, [split.labels(int(ordinal)) for ordinal in batch.ordinal_B[is_real_B]])
            if config.save_scores:
                kept.append(scores_BC.numpy())
            progress.advance(batch.global_count)
    return np.concatenate(kept) if kept else None


def _describe_classes(taxonomy: Taxonomy, ap_C: list, train: Split, split: Split) -> list[dict]:
    num_train, num_test = train.count_smeared(), split.count_smeared()
    described = []
    for output, ap in enumerate(ap_C):
        c = taxonomy.class_of_output(output)
        counts = {"num_train": int(num_train[output]), "num_test": int(num_test[output])}
        leaf = {"is_leaf": bool(taxonomy.is_leaf[output])}
        described.append({"id": c.id, "name": c.name, "vertical": c.vertical, "ap": ap, **counts, **leaf})
    return described


def _describe_cost(scorer: Scorer) -> dict:
    counts = [count_parameters(network) for _, network in scorer.networks]
    return {
        "num_parameters": {part: sum(count[part] for count in counts) for part in counts[0]},
        "multiply_adds": sum(count_multiply_adds(network) for _, network in scorer.networks),
        "num_networks": len(counts),
        "checkpoint": scorer.checkpoint,
    }


def _build_gallery(config: EvaluateConfig, scorer: Scorer, split: Split) -> list[dict]:
    """Samples drawn evenly over the verticals, with the three best leaves of each."""
    taxonomy = split.taxonomy
    queues = [split.routed(vertical) for vertical in taxonomy.verticals]
    queues = [ordinals[permutation(len(ordinals), number)] for number, ordinals in enumerate(queues)]
    turns = range(max((len(queue) for queue in queues), default=0))
    drawn = list(dict.fromkeys(int(queue[turn]) for turn in turns for queue in queues if turn < len(queue)))
    image_size = scorer.networks[0][1].config.image_size
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size, views=None, seed=0)
    entries = []
    for ordinal in drawn[: config.gallery]:
        images, _, skipped = reader.read(np.array([ordinal]), epoch=0)
        if not skipped[0]:
            scores_C = scorer.score(images, taxonomy.num_classes)[0]
            entries.append(_describe_sample(split, ordinal, scores_C, reader.read_encoded(ordinal)))
    return entries


def _describe_sample(split: Split, ordinal: int, scores_C: Tensor, encoded: bytes) -> dict:
    taxonomy, labels = split.taxonomy, split.labels(ordinal)
    leaf_scores_C = scores_C.masked_fill(~torch.from_numpy(taxonomy.is_leaf), -math.inf)
    best = [int(output) for output in leaf_scores_C.topk(min(3, int(taxonomy.is_leaf.sum()))).indices]
    return {
        "key": split.key(ordinal),
        "image": _to_data_uri(encoded),
        "labels": [taxonomy.class_of_output(output).name for output in labels],
        "vertical": taxonomy.class_of_output(labels[0]).vertical,
        "top3": [
            {
                "name": taxonomy.class_of_output(output).name,
                "vertical": taxonomy.class_of_output(output).vertical,
                "probability": round(float(scores_C[output].sigmoid()), 4),
                "lineage": list(taxonomy.lineage(output)),
                "correct": output in labels,
            }
            for output in best
        ],
    }


def _to_data_uri(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        size = min(GALLERY_PIXELS, max(image.size))
    pixels = decode_view(encoded, centre_views(1), 0, size)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _save_scores(config: EvaluateConfig, scores_NC: np.ndarray, split: Split) -> None:
    """For anyone's own metrics: scores, and which classes each sample is labelled with; columns by output index."""
    label_NC = np.zeros((len(split), split.taxonomy.num_classes), dtype=np.uint8)
    label_NC[split.sample_of_label, split.label_output] = 1
    ids: Mapping[str, str] = {
        "class_ids": "\n".join(split.taxonomy.class_of_output(o).id for o in range(label_NC.shape[1]))
    }
    content = safetensors.numpy.save({"scores": scores_NC, "labels": label_NC}, dict(ids))
    write_atomically(config.workdir / EVALUATIONS / f"{config.name}.safetensors", content)
