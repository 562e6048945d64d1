"""Nearest neighbours among the features of images whose class is known, which can answer with classes the network never saw.

Shapes: N images in the index, B batch, T features before the classifiers, K neighbours.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from concentration.errors import DataError, unloadable
from concentration.schema import parse_json
from concentration.serving.answers import NeighbourAnswer

INDEX_FILE, LABELS_FILE = "index.faiss", "labels.json"
#: Features with more than so many numbers are projected onto their principal components.
MOST_COMPONENTS = 256
#: About how many images the principal components are computed from, at most.
_MOST_TRAINED = 4096
#: How many links each image has in the graph of the index (M of HNSW).
_NUM_LINKS = 32


class NeighbourIndex:
    """Finds the images whose features have the highest cosine similarity. Images may be added at any time.

    Args:
        index: faiss's index of the features.
        labels: (N,) the name of the class of each image in the index.
        num_neighbours: K, how many neighbours vote.
        num_answers: how many classes are named.

    Source: Malkov and Yashunin 2016, "Efficient and robust approximate nearest neighbor search using hierarchical navigable small
    world graphs", as faiss implements it.
    """

    def __init__(self, index, labels: Sequence[str], num_neighbours: int = 10, num_answers: int = 3):
        self._index = index
        self._labels = list(labels)
        self._num_neighbours = num_neighbours
        self._num_answers = num_answers

    @classmethod
    def build(cls, features_NT: np.ndarray, labels: Sequence[str]) -> "NeighbourIndex":
        """An index of images with these features (float) and these names of classes. Raises: ConfigError if faiss is missing."""
        faiss = _import_faiss()
        num_features = features_NT.shape[1]
        num_components = min(MOST_COMPONENTS, num_features, len(features_NT))
        projection = f"PCA{num_components}," if num_components < num_features else ""
        index = faiss.index_factory(num_features, f"{projection}L2norm,HNSW{_NUM_LINKS}", faiss.METRIC_INNER_PRODUCT)
        index.train(_contiguous(features_NT[:: max(1, len(features_NT) // _MOST_TRAINED)]))
        built = cls(index, [])
        built.add(features_NT, labels)
        return built

    def add(self, features_NT: np.ndarray, labels: Sequence[str]) -> None:
        """Adds images; their classes may be new."""
        self._index.add(_contiguous(features_NT))
        self._labels += labels

    def __len__(self) -> int:
        return len(self._labels)

    def search(self, features_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cosine similarities of the nearest images, (B, K) float32 descending, and their numbers in the index, (B, K)."""
        return self._index.search(_contiguous(features_BT), min(self._num_neighbours, len(self)))

    def answer(self, features_BT: np.ndarray) -> list[tuple[NeighbourAnswer, ...]]:
        """For each image the classes of its neighbours with the largest shares of the votes. A vote weighs as its similarity."""
        similarity_BK, number_BK = self.search(features_BT)
        return [
            self._count_votes(similarity_K, number_K)
            for similarity_K, number_K in zip(similarity_BK, number_BK, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Writes the index and the labels of its images."""
        folder.mkdir(parents=True, exist_ok=True)
        _import_faiss().write_index(self._index, str(folder / INDEX_FILE))
        (folder / LABELS_FILE).write_text(json.dumps(self._labels, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "NeighbourIndex":
        """Reads what `save` wrote. Raises: ConfigError if faiss is missing; DataError if a file is missing or damaged."""
        faiss = _import_faiss()
        advice = "export again with overwrite=true and neighbours=10"
        try:
            labels = parse_json((folder / LABELS_FILE).read_bytes(), str(folder / LABELS_FILE))
            index = faiss.read_index(str(folder / INDEX_FILE))
        except OSError:
            raise DataError(f"{folder}: no neighbours of this export; {advice}") from None
        except RuntimeError:
            raise DataError(f"{folder / INDEX_FILE}: missing, damaged, or no index of faiss; {advice}") from None
        if not isinstance(labels, list) or len(labels) != index.ntotal:
            raise DataError(f"{folder}: {index.ntotal} images and the labels of others; {advice}")
        return cls(index, labels)

    def _count_votes(self, similarity_K: np.ndarray, number_K: np.ndarray) -> tuple[NeighbourAnswer, ...]:
        votes: dict[str, float] = defaultdict(float)
        nearest: dict[str, float] = {}
        for similarity, number in zip(similarity_K, number_K, strict=True):
            if number < 0:  # faiss fills up with -1 if it finds fewer neighbours
                continue
            label = self._labels[number]
            votes[label] += max(float(similarity), 0.0)
            nearest.setdefault(label, float(similarity))
        total = sum(votes.values()) or 1.0
        best = sorted(votes, key=lambda label: (-votes[label], label))[: self._num_answers]
        return tuple(NeighbourAnswer(label, nearest[label], votes[label] / total) for label in best)


def _contiguous(features_NT: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features_NT, dtype=np.float32)


def _import_faiss():
    try:
        import faiss  # a quarter of a second, and only those who ask for neighbours need it
    except ImportError as error:
        raise unloadable("faiss, which finds neighbours,", error, "faiss-cpu") from None
    return faiss
