"""`group method=confusion|co_detection|random`: groups of classes by a network's detections on held-out images, and the control.

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


#: The groups that `eigengap` looks for at most, or half as many as there are classes.
MAX_GROUPS = 20


class RandomGroupsConfig(Config):
    """The sizes of another grouping, with the classes drawn at random (Warde-Farley et al., section 5.2: the control).

    of: the name of that grouping; None takes the sizes of the data's own verticals.
    """

    kind: Literal["random"] = "random"
    of: str | None = "confusion"


class FoundGroups(NamedTuple):
    """Groups of classes, what they were found from (None for a control), and facts for the record."""

    groups: ClassGroups
    similarity: Similarity | None
    facts: dict[str, Any]


def check_top_k(method: DetectionGroupsConfig, num_classes: int, key: str = "method") -> None:
    """Raises: ConfigError where every class would be detected in every image; `key` is where the method stands."""
    if method.top_k >= num_classes:
        raise ConfigError(
            f"{key}.top_k={method.top_k} of {num_classes} classes: every class would be detected in every image; give "
            f"fewer, {max(1, num_classes // 10)} say"
        )


def group_by_detections(
    method: DetectionGroupsConfig, stream: SampleStream, split: Split, path: Path, seed: int
) -> FoundGroups:
    """Looks at the split once, its batches shared by the ranks.

    Raises:
        ConfigError: as `check_top_k`.
        DataError: too few classes have anything in common.
    """
    check_top_k(method, split.taxonomy.num_classes)
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
