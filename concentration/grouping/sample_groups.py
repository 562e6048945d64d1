"""Groups of samples: the group of every sample of the data, and the rule that assigns any image to a group.

    groupings/NAME/centroids.safetensors     `centroid` (K, D) and `price` (K,); the header says of which features
    groupings/NAME/SHARD.safetensors         `group` (S,) int32, of each sample of a shard; -1 if its image cannot be decoded

Shapes: B batch, D features, K groups, S samples of a shard, N samples of a split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.errors import DataError
from concentration.grouping.class_groups import NO_GROUP
from concentration.grouping.kmeans import Centroids

CENTROIDS_FILE = "centroids.safetensors"


@dataclass(frozen=True)
class CentroidRouter:
    """Assigns features to the group k with the smallest cost |x - c_k|^2 + p_k.

    Attributes:
        centroids: the centroids c_k of the groups, and their prices p_k.
        layer: the layer of the network whose features were grouped.
        normalise: whether features are first scaled to length 1.
        network: a hash of that network's file.
    """

    centroids: Centroids
    layer: str
    normalise: bool
    network: str

    @property
    def num_groups(self) -> int:
        return len(self.centroids.price_K)

    def compute_costs(self, feature_BD: Tensor) -> Tensor:
        """(B, K) float32: the cost of each sample in each group. The group with the smallest cost is the sample's."""
        return self.centroids.compute_costs(prepare_features(feature_BD, self.normalise))

    def route(self, feature_BD: Tensor) -> Tensor:
        """(B,) int64: the group of each sample."""
        return self.centroids.assign(prepare_features(feature_BD, self.normalise))[0]

    def to(self, device: torch.device) -> "CentroidRouter":
        """A copy on another device."""
        return replace(self, centroids=Centroids(*(tensor.to(device) for tensor in self.centroids)))

    def save(self, path: Path) -> None:
        """Writes the centroids with what they are of, whole or not at all."""
        arrays = {"centroid": self.centroids.centroid_KD.cpu().numpy(), "price": self.centroids.price_K.cpu().numpy()}
        header = {"layer": self.layer, "normalise": str(self.normalise).lower(), "network": self.network}
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: Path) -> "CentroidRouter":
        """The router that `save` wrote. Raises: DataError if the file is missing or damaged."""
        header, arrays = load_metadata(path), load_arrays(path, ("centroid", "price"))
        centroid_KD, price_K = (torch.from_numpy(arrays[name]) for name in ("centroid", "price"))
        is_known = "layer" in header and header.get("normalise") in ("true", "false")
        if not is_known or centroid_KD.ndim != 2 or price_K.shape != centroid_KD.shape[:1]:
            raise DataError(f"{path}: damaged, or no file of centroids; make the grouping again")
        return cls(
            Centroids(centroid_KD, price_K), header["layer"], header["normalise"] == "true", header.get("network", "")
        )


def prepare_features(feature_BD: Tensor, normalise: bool) -> Tensor:
    """(B, D) float32: the features, scaled to length 1 if `normalise`."""
    feature_BD = feature_BD.float()
    return torch.nn.functional.normalize(feature_BD) if normalise else feature_BD


def save_group_ids(path: Path, group_S: np.ndarray) -> None:
    """Writes the groups of one shard's samples, whole or not at all."""
    save_arrays(path, {"group": group_S.astype(np.int32)})


def load_group_ids(
    directory: Path, index_names: Sequence[str], num_samples: Sequence[int], num_groups: int
) -> np.ndarray:
    """The group of every sample of a split, (N,) int32, in the order of its shards.

    Args:
        directory: the folder of the grouping.
        index_names: the name of each shard's index (`Split.index_names`).
        num_samples: the number of samples of each shard.
        num_groups: K.

    Raises:
        DataError: the groups of a shard are missing, or do not fit its number of samples or K.
    """
    groups = []
    for name, expected in zip(index_names, num_samples, strict=True):
        path = directory / f"{name}.safetensors"
        group_S = load_arrays(path, ("group",))["group"]
        if group_S.shape != (expected,):
            raise DataError(f"{path}: groups of {group_S.shape} samples, but the shard has {expected}; group again")
        if len(group_S) and not (group_S.min() >= NO_GROUP and group_S.max() < num_groups):
            raise DataError(f"{path}: damaged (groups {group_S.min()} to {group_S.max()} of {num_groups}); group again")
        groups.append(group_S)
    return np.concatenate(groups)


def hash_group_ids(group_N: np.ndarray) -> str:
    """A hash of the groups of all samples of a split, (N,) int32; 16 hex digits of SHA-256."""
    return hashlib.sha256(group_N.astype("<i4").tobytes()).hexdigest()[:16]


def count_by_group(groups: Mapping[str, np.ndarray], num_groups: int) -> dict[str, list[int]]:
    """The number of samples of every group, for each split; samples without a group are not counted.

    Args:
        groups: for each split the group of every sample, (N,) integers.
        num_groups: K.
    """
    return {
        split: np.bincount(group_N[group_N != NO_GROUP], minlength=num_groups).tolist()
        for split, group_N in groups.items()
    }
