"""Counts how often a network detects class i in images that are annotated with class j, or in which it also detects class j.

These shares are the matrix A: Equation 3 for annotations (a confusion matrix), Equation 4 for other detections. A class is
detected in an image if it is among the K classes with the highest scores.

Shapes: B images of a batch, C all classes, K detections of an image, P pairs of an image and a class.

Source: Warde-Farley et al. 2014, section 4.
"""

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from concentration.distributed import is_distributed, sum_over_ranks

#: How many pairs (detected class, other class) are counted at once; sorting them takes about 100 MB.
_PAIRS_PER_PRODUCT = 1 << 23
#: How many elements of the matrix are summed over ranks at once.
_SUMMED_TOGETHER = 1 << 24

Matrix = scipy.sparse.csr_array | np.ndarray


class DetectionCounts:
    """Counts in how many images each pair (detected class i, other class j) occurs.

    The counts are a sparse matrix, with 8 bytes for each pair that ever occurred, until a dense one with 4 bytes for every pair
    takes no more. So they take at most 4 C^2 bytes (1.2 GB for 17,000 classes), however many images there are. Adding to a sparse
    matrix copies it; therefore recent counts are collected in a second matrix until that has a quarter of the elements.
    """

    def __init__(self, num_classes: int):
        self.num_images = 0
        self._num_classes = num_classes
        self._sum: Matrix = _empty(num_classes)
        self._recent = _empty(num_classes)
        self._waiting: list[tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]] = []
        self._num_waiting_pairs = 0

    def update(self, detected_BK: np.ndarray, annotated: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Adds the images of a batch.

        Args:
            detected_BK: integers, the outputs that were detected in each image, from `find_detections`.
            annotated: the annotations of the images as rows (P,) and outputs (P,), ascending by row, each pair once (Equation 3);
                None counts pairs of detected classes (Equation 4).
        """
        num_images, top_k = detected_BK.shape
        shape = num_images, self._num_classes
        detected = _as_rows(np.repeat(np.arange(num_images), top_k), detected_BK.ravel(), shape)
        annotated = detected if annotated is None else _as_rows(*annotated, shape)
        self.num_images += num_images
        self._waiting.append((detected, annotated))
        self._num_waiting_pairs += top_k * int(annotated.nnz)
        if self._num_waiting_pairs >= _PAIRS_PER_PRODUCT:
            self._count_waiting()

    def compute(self) -> Matrix:
        """The matrix A, (C, C) float32.

        a_ij is the share of the images, over all ranks, in which class i was detected and class j annotated (or detected). All
        ranks have to call this, and get the same matrix. It ends the counting: dense counts are turned into shares in place.
        """
        self._count_waiting()
        self._take_in_recent()
        num_images = int(sum_over_ranks(torch.tensor(self.num_images)))
        if is_distributed():
            self._sum_over_ranks()
        counts, self._sum = self._sum, _empty(self._num_classes)
        if isinstance(counts, np.ndarray):
            share_CC = counts.view(np.float32)
            for row in range(len(counts)):
                share_CC[row] = counts[row] / num_images
            return share_CC
        return scipy.sparse.csr_array(
            ((counts.data / num_images).astype(np.float32), counts.indices, counts.indptr), counts.shape
        )

    def _count_waiting(self) -> None:
        """Counts the pairs of the batches that `update` has collected, in one product of sparse matrices."""
        if not self._waiting:
            return
        detected, annotated = (scipy.sparse.vstack(parts, format="csr") for parts in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting_pairs = [], 0
        product = scipy.sparse.csr_array(detected.T @ annotated)
        if isinstance(self._sum, np.ndarray):
            _add_to_dense(self._sum, product)
            return
        self._recent = self._recent + product
        if self._recent.nnz > self._sum.nnz / 4:
            self._take_in_recent()

    def _take_in_recent(self) -> None:
        """Adds the recent counts to the sum, which becomes dense if that takes no more memory."""
        recent, self._recent = self._recent, _empty(self._num_classes)
        if isinstance(self._sum, np.ndarray):
            _add_to_dense(self._sum, recent)
            return
        self._sum = self._sum + recent
        if 2 * self._sum.nnz >= self._num_classes**2:
            dense = np.zeros((self._num_classes, self._num_classes), dtype=np.int32)
            _add_to_dense(dense, self._sum)
            self._sum = dense

    def _sum_over_ranks(self) -> None:
        """Adds up the counts of all ranks, some rows at a time. These are made dense, since not all ranks need be sparse."""
        height = max(1, _SUMMED_TOGETHER // self._num_classes)
        blocks = []
        for first in range(0, self._num_classes, height):
            block = self._sum[first : first + height]
            dense = block if isinstance(block, np.ndarray) else block.toarray()
            summed = sum_over_ranks(torch.from_numpy(np.ascontiguousarray(dense))).numpy()
            blocks.append(scipy.sparse.csr_array(summed))
        self._sum = scipy.sparse.vstack(blocks, format="csr")
        if 2 * self._sum.nnz >= self._num_classes**2:
            self._sum = self._sum.toarray()


def find_detections(logits_BC: Tensor, top_k: int) -> np.ndarray:
    """(B, K) int64: the outputs with the highest scores of each image, in any order. Source: M_i,K(x) of Equation 2."""
    return logits_BC.topk(top_k, dim=1, sorted=False).indices.cpu().numpy()


def _empty(num_classes: int) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((num_classes, num_classes), dtype=np.int32)


def _as_rows(row_P: np.ndarray, output_P: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """A matrix (B, C) with a 1 for each pair of a row and an output. The rows must be ascending."""
    # NOTE: the indices are made 32 bits wide; if those of one matrix had 64 bits, those of every sum would have, too.
    starts = np.searchsorted(row_P, np.arange(shape[0] + 1)).astype(np.int32)
    return scipy.sparse.csr_array((np.ones(len(row_P), np.int32), output_P.astype(np.int32), starts), shape)


def _add_to_dense(dense: np.ndarray, part: scipy.sparse.csr_array) -> None:
    part = part.tocoo()
    dense[part.coords] += part.data
