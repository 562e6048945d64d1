"""The counts of Equations 3 and 4 against loops over images, sparse and dense, and what they take at the paper's size."""

import numpy as np
import pytest
import scipy.sparse
import torch

from concentration.grouping import detections
from concentration.grouping.detections import DetectionCounts, find_detections

NUM_CLASSES, TOP_K = 30, 4


def draw(num_images=400, num_classes=NUM_CLASSES, seed=0) -> tuple[torch.Tensor, list[list[int]]]:
    """Scores, and one or two annotated classes of each image, out of a third of the classes."""
    rng = np.random.default_rng(seed)
    labels = [rng.choice(num_classes // 3, size=rng.integers(1, 3), replace=False).tolist() for _ in range(num_images)]
    return torch.from_numpy(rng.normal(size=(num_images, num_classes))), labels


def as_pairs(labels: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    row_P, output_P = np.array([(row, output) for row, outputs in enumerate(labels) for output in sorted(outputs)]).T
    return row_P, output_P


def by_the_equations(scores_NC: torch.Tensor, labels: list[list[int]], kind: str) -> np.ndarray:
    """E[M_i g_j] or E[M_i M_j], one image after the other."""
    total = np.zeros((scores_NC.shape[1], scores_NC.shape[1]))
    for scores_C, outputs in zip(scores_NC.numpy(), labels, strict=True):
        detected = np.argsort(-scores_C)[:TOP_K]
        for i in detected:
            for j in outputs if kind == "confusion" else detected:
                total[i, j] += 1
    return total / len(labels)


@pytest.mark.parametrize("kind", ["confusion", "co_detection"])
@pytest.mark.parametrize("pairs_per_product", [50, 1 << 23])
def test_the_counts_are_those_of_the_equations(kind, pairs_per_product, monkeypatch):
    monkeypatch.setattr(detections, "_PAIRS_PER_PRODUCT", pairs_per_product)
    scores_NC, labels = draw()
    counts = DetectionCounts(NUM_CLASSES)
    for first in range(0, 400, 37):
        rows = slice(first, first + 37)
        counts.update(find_detections(scores_NC[rows], TOP_K), as_pairs(labels[rows]) if kind == "confusion" else None)
    a_CC = counts.compute()
    assert a_CC.dtype == np.float32
    assert isinstance(a_CC, np.ndarray) == (kind == "co_detection"), "more than half of the pairs have occurred"
    dense = a_CC.toarray() if scipy.sparse.issparse(a_CC) else a_CC
    np.testing.assert_allclose(dense, by_the_equations(scores_NC, labels, kind), rtol=1e-6)


def test_what_never_occurs_together_takes_no_memory():
    """17,000 classes: images of class c detect classes near c only, and A stays sparse."""
    num_classes, rng = 17_000, np.random.default_rng(0)
    counts = DetectionCounts(num_classes)
    for _ in range(4):
        label_B = rng.integers(0, num_classes, 256)
        detected_BK = (label_B[:, None] // 100 * 100 + np.arange(100)) % num_classes
        counts.update(detected_BK, (np.arange(256), label_B))
    a_CC = counts.compute()
    assert a_CC.nnz < 1024 * 100
    assert a_CC.data.nbytes + a_CC.indices.nbytes + a_CC.indptr.nbytes < 2**20


def test_detections_are_the_k_best():
    assert set(find_detections(torch.tensor([[0.1, 3.0, 2.0, -1.0]]), 2)[0].tolist()) == {1, 2}
