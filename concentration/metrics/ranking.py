"""Metrics that rank: the place of a sample's best label among classes, and a class's best 50 samples in one pass.

Shapes: B samples, C all classes, L leaves (or any classes that are ranked), K kept samples of a class, P positive
(sample, class) pairs, N candidates for the kept.
"""

import numpy as np

from concentration.metrics.average_precision import mean_average_precision

#: Scores looked at together by MeanAveragePrecisionAtK.update: bounds what a wide batch needs beside itself.
SCORES_PER_BLOCK = 1 << 22


def rank_of_best_label(scores_BL: np.ndarray, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """The place, from 1, of the best scored label of every sample; top-k is right where it is at most k.

    A wrong class with the same score counts as better, so a network that says nothing is never right by luck. The
    other labels of a sample are never in each other's way.

    Args:
        scores_BL: (B, L) without NaN.
        row_P, column_P: (P,) the labels; no pair may come twice.

    Returns:
        (B,) int64; L + 1 for a sample without a label.
    """
    best_B = np.full(len(scores_BL), -np.inf, dtype=scores_BL.dtype)
    np.maximum.at(best_B, row_P, scores_BL[row_P, column_P])
    num_at_least_B = (scores_BL >= best_B[:, None]).sum(axis=1)
    is_best_P = scores_BL[row_P, column_P] == best_B[row_P]
    return num_at_least_B - np.bincount(row_P[is_best_P], minlength=len(scores_BL)) + 1


def rank_labels(scores_BL: np.ndarray, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """The place, from 1, of every label among the classes of its sample: precision and recall at k count those up to k.

    A sample's labels stand in the order of their scores; a wrong class with the same score counts as better. The best
    label's place is `rank_of_best_label`.

    Args:
        scores_BL: (B, L) without NaN.
        row_P, column_P: (P,) the labels; no pair may come twice.

    Returns:
        (P,) int64.
    """
    rank_P = rank_of_best_label(scores_BL, row_P, column_P)[row_P]
    several = np.flatnonzero(np.bincount(row_P, minlength=len(scores_BL))[row_P] > 1)
    if not len(several):
        return rank_P
    several = several[np.lexsort((-scores_BL[row_P, column_P][several], row_P[several]))]
    row_S, score_S = row_P[several], scores_BL[row_P, column_P][several]
    is_label_BL = np.zeros(scores_BL.shape, dtype=bool)
    is_label_BL[row_P, column_P] = True
    place_S = np.arange(len(several)) - np.searchsorted(row_S, row_S) + 1
    size = max(1, SCORES_PER_BLOCK // scores_BL.shape[1])
    for first in range(0, len(several), size):
        block = slice(first, first + size)
        is_before = (scores_BL[row_S[block]] >= score_S[block, None]) & ~is_label_BL[row_S[block]]
        rank_P[several[block]] = place_S[block] + is_before.sum(axis=1)
    return rank_P


class MeanAveragePrecisionAtK:
    """The mean over classes of the average precision among the K samples that score highest for the class.

    For class c with R_c positives in the whole split, and its samples by falling score:

        AP@K(c) = 1 / min(K, R_c) * sum over i = 1..K of [sample i is positive] * (positives among the first i) / i

    so a perfect ranking gives 1 whether c has fewer or more positives than K. Classes without a positive are left out.
    Among equal scores the negatives come first: never optimistic, and the same in whatever order samples arrive. A
    sample with the score -inf (its class was not computed, as for the experts that an image is not routed to) is in no
    list. Everything kept is (C, K), so batches of a split of any size pass through it once, and parts can be merged.

    Source: "mAP @ top 50" of Warde-Farley et al. 2014, Table 2. The paper gives no formula; a mean over classes of
        per-class lists is what makes its test set, balanced between classes, matter, and the formula is that of the
        same company's YouTube-8M code (`AveragePrecisionCalculator.ap_at_n`, normalised by min(n, positives)).
    """

    def __init__(self, num_classes: int, k: int = 50):
        self.num_classes = num_classes
        self.k = k
        #: (C, K) float32, falling along K; -inf where there is no sample yet.
        self.score_CK = np.full((num_classes, k), -np.inf, dtype=np.float32)
        #: (C, K) bool: whether the kept sample is a positive.
        self.positive_CK = np.zeros((num_classes, k), dtype=bool)
        #: (C,) positives seen, kept or not.
        self.num_positives_C = np.zeros(num_classes, dtype=np.int64)

    def update(self, scores_BC: np.ndarray, row_P: np.ndarray, column_P: np.ndarray) -> None:
        """Adds a batch.

        Args:
            scores_BC: (B, C) without NaN; compared as float32.
            row_P, column_P: (P,) sample `row_P[i]` is positive for class `column_P[i]`; no pair may come twice.
        """
        assert scores_BC.shape[1] == self.num_classes, (scores_BC.shape, self.num_classes)
        self.num_positives_C += np.bincount(column_P, minlength=self.num_classes)
        width = max(1, SCORES_PER_BLOCK // max(1, len(scores_BC)))
        for first in range(0, self.num_classes, width):
            block = slice(first, first + width)
            block_BC = scores_BC[:, block].astype(np.float32, copy=False)
            positive_BC = np.zeros(block_BC.shape, dtype=bool)
            inside_P = (column_P >= first) & (column_P < first + width)
            positive_BC[row_P[inside_P], column_P[inside_P] - first] = True
            # NOTE: a tie with the last kept score is a candidate, since a negative takes the place of a positive. -inf
            # would lose to every empty place; leaving it out here only saves the sort.
            last_kept_C = self.score_CK[block, -1]
            row_N, column_N = np.nonzero((block_BC >= last_kept_C) & (block_BC > -np.inf))
            self._keep_best(column_N + first, block_BC[row_N, column_N], positive_BC[row_N, column_N])

    def merge(self, other: "MeanAveragePrecisionAtK") -> None:
        """Adds what another one has seen, of other samples of the same split."""
        assert (self.num_classes, self.k) == (other.num_classes, other.k), "merged metrics must have one form"
        self.num_positives_C += other.num_positives_C
        column_N, place_N = np.nonzero(other.score_CK > -np.inf)
        self._keep_best(column_N, other.score_CK[column_N, place_N], other.positive_CK[column_N, place_N])

    def compute_per_class(self) -> np.ndarray:
        """(C,) float64 AP@K; NaN for a class without a positive."""
        precision_CK = np.cumsum(self.positive_CK, axis=1) / np.arange(1, self.k + 1)
        total_C = np.where(self.positive_CK, precision_CK, 0.0).sum(axis=1)
        possible_C = np.minimum(self.num_positives_C, self.k)
        return np.divide(total_C, possible_C, out=np.full(self.num_classes, np.nan), where=possible_C > 0)

    def compute(self) -> float:
        """The mean over the classes with a positive; NaN where there is none."""
        return mean_average_precision(self.compute_per_class())

    def _keep_best(self, column_N: np.ndarray, score_N: np.ndarray, positive_N: np.ndarray) -> None:
        """Lets candidates compete with what is kept; only the classes with a candidate are sorted again."""
        touched = np.unique(column_N)
        kept = np.repeat(touched, self.k)
        key_N = np.concatenate(
            [
                _pack(kept, self.score_CK[touched].ravel(), self.positive_CK[touched].ravel()),
                _pack(column_N, score_N, positive_N),
            ]
        )
        key_N.sort()
        first_of_class = np.searchsorted(key_N, touched.astype(np.uint64) << np.uint64(33))
        # Every touched class brings its K kept places, so the first K of its run always exist.
        best = first_of_class[:, None] + np.arange(self.k)
        self.score_CK[touched], self.positive_CK[touched] = _unpack(key_N[best])


def _pack(column_N: np.ndarray, score_N: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """(N,) uint64 that sort by class, then falling score, then negatives first: one plain sort, 3x faster than a lexsort."""
    bits_N = (np.float32(0) - score_N).view(np.uint32)  # NOTE: not `-score_N`, which tells 0.0 from -0.0
    # The bits of positive floats sort like the floats, after the negative ones, which sort backwards.
    is_negative_N = bits_N >> np.uint32(31) == 1
    bits_N = np.where(is_negative_N, ~bits_N, bits_N | np.uint32(1 << 31)).astype(np.uint64)
    return column_N.astype(np.uint64) << np.uint64(33) | bits_N << np.uint64(1) | positive_N.astype(np.uint64)


def _unpack(key_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores and positives of packed keys."""
    bits_N = (key_N >> np.uint64(1)).astype(np.uint32)  # drops the class
    was_negative_N = bits_N >> np.uint32(31) == 0
    bits_N = np.where(was_negative_N, ~bits_N, bits_N & np.uint32((1 << 31) - 1))
    return np.float32(0) - bits_N.view(np.float32), (key_N & np.uint64(1)).astype(bool)
