"""Spectral clustering of classes by the similarity B = A^T A, where A is the matrix of `detections`.

B is never formed, since it may be dense even if A is sparse: the eigenvectors need no more than products B v = A^T (A v).

Shapes: C all classes, S connected classes (those with any similarity to another class), G groups, E eigenvectors, N columns.

Source: Ng, Jordan and Weiss 2002, "On spectral clustering"; Warde-Farley et al. 2014, section 4.
"""

from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from concentration.errors import DataError
from concentration.grouping.class_groups import NO_GROUP
from concentration.grouping.detections import Matrix
from concentration.grouping.kmeans import fit_kmeans

#: Below so many classes all eigenvectors are computed directly, since the iterative solver needs more than it is asked for.
_SMALL = 64
_TOLERANCE = 1e-6
#: How many starts k-means makes; in the few dimensions of the eigenvectors they are cheap.
_NUM_STARTS = 10


class SpectralGroups(NamedTuple):
    """What the clustering found.

    group_C: int64, the group of each class; NO_GROUP for a class without similarity to any other.
    eigenvalues: (E,) float64, the largest eigenvalues of the normalised similarity, descending: one more than the most groups.
    """

    group_C: np.ndarray
    eigenvalues: np.ndarray


class Similarity:
    """B = A^T A with its diagonal set to zero, as a linear operator.

    B_ij is large if the same classes are detected in images that are annotated with i and in images that are annotated with j.
    """

    def __init__(self, a_CC: Matrix):
        self._a_CC = a_CC
        squares = a_CC.multiply(a_CC) if scipy.sparse.issparse(a_CC) else None
        #: (C,) float64, the diagonal of A^T A.
        self.diagonal_C = (
            _sum_squares(a_CC) if squares is None else np.asarray(squares.sum(0, dtype=np.float64)).ravel()
        )
        #: (C,) float64, the sum of each row of B: the degree of a class in the graph of similarities.
        self.degree_C = np.maximum(self.multiply(np.ones((a_CC.shape[1], 1)))[:, 0], 0)
        # Sums this small are only what rounding leaves when the diagonal is subtracted.
        self.degree_C[self.degree_C <= 1e-6 * self.diagonal_C] = 0

    def multiply(self, value_CN: np.ndarray) -> np.ndarray:
        """B @ value, (C, N) float64."""
        product_CN = self._a_CC.T @ (self._a_CC @ value_CN.astype(np.float32))
        return product_CN.astype(np.float64) - self.diagonal_C[:, None] * value_CN


def cluster_classes(
    similarity: Similarity, num_groups: int | Literal["eigengap"], max_groups: int, seed: int
) -> SpectralGroups:
    """Clusters the classes: k-means of the rows, scaled to length 1, of the leading eigenvectors of D^-1/2 B D^-1/2.

    D is the diagonal matrix of the degrees.

    Args:
        similarity: the operator B.
        num_groups: G; `eigengap` takes the number from 2 to `max_groups` after which the eigenvalues fall most.
        max_groups: the largest G that `eigengap` may take.
        seed: the seed of k-means and of the iterative solver.

    Raises:
        DataError: there are no more connected classes than groups.
    """
    connected_S = np.flatnonzero(similarity.degree_C > 0)
    most = max_groups if num_groups == "eigengap" else num_groups
    if len(connected_S) <= most:
        raise DataError(
            f"spectral clustering: only {len(connected_S)} classes have anything in common, for up to {most} groups; "
            "look at more images, or ask for fewer groups"
        )
    values, vector_SE = _find_leading(similarity, connected_S, most + 1, seed)
    if num_groups == "eigengap":
        num_groups = 2 + int(np.argmax(values[1:-1] - values[2:]))
    leading_SG = vector_SE[:, :num_groups]
    leading_SG = leading_SG / np.maximum(np.linalg.norm(leading_SG, axis=1, keepdims=True), 1e-12)
    points = torch.from_numpy(leading_SG)
    group_C = np.full(len(similarity.degree_C), NO_GROUP)
    group_C[connected_S] = (
        fit_kmeans(points, num_groups, seed, num_starts=_NUM_STARTS).assign(points.float())[0].numpy()
    )
    return SpectralGroups(group_C, values)


def _find_leading(
    similarity: Similarity, connected_S: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of D^-1/2 B D^-1/2 of the connected classes, (count,) descending, and their vectors (S, count)."""
    num_classes = len(similarity.degree_C)
    scale_S1 = similarity.degree_C[connected_S, None] ** -0.5

    def multiply(value_SN: np.ndarray) -> np.ndarray:
        value_CN = np.zeros((num_classes, value_SN.shape[1]))
        value_CN[connected_S] = scale_S1 * value_SN
        return scale_S1 * similarity.multiply(value_CN)[connected_S]

    size = len(connected_S)
    if size < _SMALL or count > size // 2:
        whole_SS = multiply(np.eye(size))
        values, vectors = scipy.linalg.eigh((whole_SS + whole_SS.T) / 2, subset_by_index=[size - count, size - 1])
    else:
        operator = scipy.sparse.linalg.LinearOperator(
            (size, size), lambda v: multiply(v.reshape(-1, 1))[:, 0], matmat=multiply, dtype=np.float64
        )
        start = np.random.default_rng(seed).normal(size=size)
        values, vectors = scipy.sparse.linalg.eigsh(operator, count, which="LA", v0=start, tol=_TOLERANCE)
    order = np.argsort(-values)
    return values[order], vectors[:, order]


def _sum_squares(a_CC: np.ndarray) -> np.ndarray:
    """(C,) float64: the sum of the squares of each column. Row by row, so that no second matrix is needed."""
    total_C = np.zeros(a_CC.shape[1])
    for row_C in a_CC:
        total_C += row_C.astype(np.float64) ** 2
    return total_C
