"""`group method=confusion|co_detection|random`: groups of classes from a network's detections, or at random as a control.

Shapes: B batch, C all classes.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch

from concentration import distributed
from concentration.data.order import SequentialOrder
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.grouping.class_groups import ClassGroups
from concentration.grouping.detections import DetectionCounts, find_detections
from concentration.grouping.spectral import Similarity, cluster_classes
from concentration.progress import Progress
from concentration.schema import Config
from concentration.stages.sample_stream import SampleStream


class DetectionGroupsConfig(Config):
    """Spectral clustering of the classes by what a network detects.

    kind: `confusion` counts where class i is detected and class j annotated (Equation 3), `co_detection` where both are detected
        (Equation 4).
    network: the name of a student or generalist.
    split: the split of the held-out images.
    top_k: how many classes, those with the highest scores, are detected in an image.
    num_groups: `eigengap` takes the number, up to `max_groups`, after which the eigenvalues fall most.
    max_groups: the most groups that `eigengap` may take; None is 20, or half the number of classes if that is less.
    smear: annotate images with the ancestors of their labels too, as in training.

    Source: Warde-Farley et al. 2014, section 4.
    """

    kind: Literal["confusion", "co_detection"]
    network: str = "generalist"
    split: Literal["train", "val", "test"] = "val"
    top_k: pydantic.PositiveInt = 100
    num_groups: int | Literal["eigengap"] = "eigengap"
    max_groups: int | None = None
    smear: bool | None = None

    @pydantic.model_validator(mode="after")
    def _check_groups(self):
        if self.num_groups != "eigengap" and self.num_groups < 2:
            raise ValueError(f"method.num_groups={self.num_groups}: expected at least 2, or eigengap")
        if self.num_groups != "eigengap" and self.max_groups is not None:
            raise ValueError(f"method.max_groups={self.max_groups} has no effect with a number of groups; remove it")
        if self.max_groups is not None and self.max_groups < 2:
            raise ValueError(f"method.max_groups={self.max_groups}: expected at least 2")
        return self

    @pydantic.model_validator(mode="after")
    def _check_smear(self):
        if self.kind == "co_detection" and self.smear is not None:
            raise ValueError(f"method.smear={self.smear} has no effect with co_detection, which looks at no annotation")
        return self


#: The largest number of groups that `eigengap` considers by default; with fewer than twice as many classes, half of those.
MAX_GROUPS = 20


class RandomGroupsConfig(Config):
    """Random groups with the sizes of another grouping: the control experiment of Warde-Farley et al., section 5.2.

    of: the name of the grouping whose sizes are taken; None takes the sizes of the data's own verticals.
    """

    kind: Literal["random"] = "random"
    of: str | None = "confusion"


class FoundGroups(NamedTuple):
    """The result of a method.

    groups: the groups of classes.
    similarity: the similarity of the classes that the groups were found from; None if another method found them.
    facts: what `DONE.json` records of the method.
    """

    groups: ClassGroups
    similarity: Similarity | None
    facts: dict[str, Any]


def check_groups(method: DetectionGroupsConfig, num_classes: int, key: str = "method") -> None:
    """Raises: ConfigError if every class would be detected in every image, or there are too few classes for the groups.

    `key` is the option that holds the method.
    """
    if method.num_groups != "eigengap" and 2 * method.num_groups > num_classes:
        raise ConfigError(
            f"{key}.num_groups={method.num_groups} of {num_classes} classes: a group has at least two; ask for at most "
            f"{num_classes // 2}"
        )
    if method.top_k >= num_classes:
        raise ConfigError(
            f"{key}.top_k={method.top_k} of {num_classes} classes: every class would be detected in every image; give "
            f"fewer, {max(1, num_classes // 10)} say"
        )


def group_by_detections(
    method: DetectionGroupsConfig, stream: SampleStream, split: Split, path: Path, seed: int
) -> FoundGroups:
    """Groups the classes by a network's detections in one pass over a split, whose batches the ranks share.

    Args:
        method: how detections are counted and clustered.
        stream: the network, and how images are read for it.
        split: the held-out images.
        path: the folder of the grouping, where progress is recorded.
        seed: the seed of the clustering.

    Raises:
        ConfigError: as `check_groups`.
        DataError: too few classes have any similarity to another.
    """
    check_groups(method, split.taxonomy.num_classes)
    counts = DetectionCounts(split.taxonomy.num_classes)
    order = SequentialOrder(np.arange(len(split)))
    title = f"group {method.kind}"
    with Progress(title, len(order), "images", path, quiet=distributed.rank() != 0) as progress:
        for batch in stream.read(split, order, rank=distributed.rank(), world_size=distributed.world_size()):
            with torch.inference_mode():
                detected_BK = find_detections(stream.network(batch.images), method.top_k)
            is_confusion, smear = method.kind == "confusion", method.smear is not False
            counts.update(detected_BK, split.label_pairs(batch.ordinal_B, smear) if is_confusion else None)
            progress.advance(batch.global_count)
    similarity = Similarity(counts.compute())
    max_groups = method.max_groups or min(MAX_GROUPS, split.taxonomy.num_classes // 2)
    found = cluster_classes(similarity, method.num_groups, max_groups, seed)
    facts = {"num_images": len(split), "eigenvalues": [round(float(value), 6) for value in found.eigenvalues]}
    return FoundGroups(ClassGroups.build(found.group_C, split.taxonomy), similarity, facts)
