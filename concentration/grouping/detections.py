"""How often a network detects one class where another is annotated, or detected: the matrix A of Equations 3 and 4.

Shapes: B images of a batch, C all classes, K detections of an image, P pairs of an image and a class.

Source: Warde-Farley et al. 2014, section 4. A detection is a class among the K that score highest.
"""

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from concentration.distributed import is_distributed, sum_over_ranks

#: Pairs of a detection and a class that are counted together: some 100 MB while they are sorted.
_PAIRS_PER_PRODUCT = 1 << 23
#: Numbers of the matrix that are summed over ranks together.
_SUMMED_TOGETHER = 1 << 24

Matrix = scipy.sparse.csr_array | np.ndarray


class DetectionCounts:
    """Counts, image by image, the pairs (detected class i, other class j).

    The sum is sparse, 8 bytes for each pair that ever occurred, until a dense matrix (4 bytes a pair) takes no more: at most
    4 C^2 bytes however many images there are, 1.2 GB for 17,000 classes. What was counted lately is kept apart until it has
    a quarter of the sum's size, since adding to a sparse sum copies it.
    """

    def __init__(self, num_classes: int):
        self.num_images = 0
        self._num_classes = num_classes
        self._sum: Matrix = _empty(num_classes)
        self._recent = _empty(num_classes)
        self._waiting: list[tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]] = []
        self._num_waiting_pairs = 0

    def update(self, detected_BK: np.ndarray, annotated: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Adds a batch.

        Args:
            detected_BK: the outputs that were detected, each once in a row.
            annotated: rows and outputs of the annotations, rising, each pair once (Equation 3); None takes the detected ones
                (Equation 4).
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
        """A, (C, C) float32: a_ij is the share of the images, over all ranks, in which i was detected and j annotated (detected).

        Ends the counting: a dense sum becomes A in its own memory. All ranks call it, and get the same.
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
        """Some rows at a time, which are dense meanwhile; ranks need not agree on what is sparse."""
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
    """(B, K) the outputs that score highest, M_i,K(x) of Equation 2."""
    return logits_BC.topk(top_k, dim=1, sorted=False).indices.cpu().numpy()


def _empty(num_classes: int) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((num_classes, num_classes), dtype=np.int32)


def _as_rows(row_P: np.ndarray, output_P: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """(B, C) with a 1 for each pair; the rows rise."""
    # NOTE: one 64-bit index would make those of all sums 64 bits wide.
    starts = np.searchsorted(row_P, np.arange(shape[0] + 1)).astype(np.int32)
    return scipy.sparse.csr_array((np.ones(len(row_P), np.int32), output_P.astype(np.int32), starts), shape)


def _add_to_dense(dense: np.ndarray, part: scipy.sparse.csr_array) -> None:
    part = part.tocoo()
    dense[part.coords] += part.data
