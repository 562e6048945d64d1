"""Metrics that rank: the place of a sample's best label among classes, and a class's best 50 samples in one pass.

Shapes: B samples, C all classes, L leaves (or any classes that are ranked), K kept samples of a class, P positive
(sample, class) pairs, N candidates for the kept.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from concentration.metrics.average_precision import mean_average_precision
from concentration.metrics.scores import Scores, count_reaching, find_reaching, pick, place

#: Scores looked at together, by kind of device: bounds what a wide batch needs beside itself, some 60 bytes each while all are
#: candidates; on a CPU it stays in the cache.
SCORES_PER_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 24}
#: Candidates of 8 bytes that may wait at most.
MOST_WAITING = 1 << 24


def rank_of_best_label(scores_BL: Scores, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """The place, from 1, of the best scored label of every sample; top-k is right where it is at most k.

    A wrong class with the same score counts as better, so a network that says nothing is never right by luck. The
    other labels of a sample are never in each other's way.

    Args:
        scores_BL: (B, L) without NaN.
        row_P, column_P: (P,) the labels; no pair may come twice.

    Returns:
        (B,) int64; L + 1 for a sample without a label.
    """
    scores_BL = torch.as_tensor(scores_BL)
    score_P = pick(scores_BL, row_P, column_P)
    best_B = np.full(len(scores_BL), -np.inf, dtype=score_P.dtype)
    np.maximum.at(best_B, row_P, score_P)
    num_at_least_B = count_reaching(scores_BL, best_B)
    is_best_P = score_P == best_B[row_P]
    return num_at_least_B - np.bincount(row_P[is_best_P], minlength=len(scores_BL)) + 1


def rank_labels(scores_BL: Scores, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """The place, from 1, of every label among the classes of its sample: precision and recall at k count those up to k.

    A sample's labels stand in the order of their scores; a wrong class with the same score counts as better. The best
    label's place is `rank_of_best_label`.

    Args:
        scores_BL: (B, L) without NaN.
        row_P, column_P: (P,) the labels; no pair may come twice.

    Returns:
        (P,) int64.
    """
    scores_BL = torch.as_tensor(scores_BL)
    rank_P = rank_of_best_label(scores_BL, row_P, column_P)[row_P]
    several = np.flatnonzero(np.bincount(row_P, minlength=len(scores_BL))[row_P] > 1)
    if not len(several):
        return rank_P
    score_P = pick(scores_BL, row_P, column_P)
    several = several[np.lexsort((-score_P[several], row_P[several]))]
    row_S, score_S = row_P[several], score_P[several]
    others_BL = scores_BL.clone()
    # A label is in no label's way. NaN is never at least as large as anything, and scores have none.
    others_BL[place(row_P, scores_BL), place(column_P, scores_BL)] = torch.nan
    place_S = np.arange(len(several)) - np.searchsorted(row_S, row_S) + 1
    size = max(1, SCORES_PER_BLOCK[scores_BL.device.type] // scores_BL.shape[1])
    for first in range(0, len(several), size):
        block = slice(first, first + size)
        num_before_B = count_reaching(others_BL[place(row_S[block], scores_BL)], score_S[block])
        rank_P[several[block]] = place_S[block] + num_before_B
    return rank_P


class MeanAveragePrecisionAtK:
    """The mean over classes of the average precision among the K samples that score highest for the class.

    For class c with R_c positives in the whole split, and its samples by falling score:

        AP@K(c) = 1 / min(K, R_c) * sum over i = 1..K of [sample i is positive] * (positives among the first i) / i

    so a perfect ranking gives 1 whether c has fewer or more positives than K. Classes without a positive are left out.
    Among equal scores the negatives come first: never optimistic, and the same in whatever order samples arrive. A
    sample with the score -inf (its class was not computed, as for the experts that an image is not routed to) is in no
    list. Everything kept is (C, K), so batches of a split of any size pass through it once, and parts can be merged. It is
    kept where the scores are, so that a GPU compares and sorts them itself. Candidates wait until there are as many of them as
    are kept: to sort what is kept of 200,000 classes takes a second, and almost every batch has some candidate for them.

    Source: "mAP @ top 50" of Warde-Farley et al. 2014, Table 2. The paper gives no formula; a mean over classes of
        per-class lists is what makes its test set, balanced between classes, matter, and the formula is that of the
        same company's YouTube-8M code (`AveragePrecisionCalculator.ap_at_n`, normalised by min(n, positives)).
    """

    def __init__(self, num_classes: int, k: int = 50):
        self.num_classes = num_classes
        self.k = k
        #: (C, K) float32, falling along K; -inf where there is no sample yet.
        self.score_CK = torch.full((num_classes, k), -torch.inf)
        #: (C, K) bool: whether the kept sample is a positive.
        self.positive_CK = torch.zeros((num_classes, k), dtype=torch.bool)
        #: (C,) positives seen, kept or not.
        self.num_positives_C = np.zeros(num_classes, dtype=np.int64)
        #: Packed keys of candidates that have not competed yet.
        self._waiting: list[Tensor] = []
        self._num_waiting = 0

    def update(self, scores_BC: Scores, row_P: np.ndarray, column_P: np.ndarray) -> None:
        """Adds a batch.

        Args:
            scores_BC: (B, C) without NaN; compared as float32.
            row_P, column_P: (P,) sample `row_P[i]` is positive for class `column_P[i]`; no pair may come twice.
        """
        assert scores_BC.shape[1] == self.num_classes, (scores_BC.shape, self.num_classes)
        scores_BC = torch.as_tensor(scores_BC)
        self._move(scores_BC.device)
        self.num_positives_C += np.bincount(column_P, minlength=self.num_classes)
        width = max(1, SCORES_PER_BLOCK[scores_BC.device.type] // max(1, len(scores_BC)))
        for first in range(0, self.num_classes, width):
            block_BC = scores_BC[:, first : first + width].float()
            positive_BC = torch.zeros_like(block_BC, dtype=torch.bool)
            inside_P = (column_P >= first) & (column_P < first + width)
            positive_BC[place(row_P[inside_P], scores_BC), place(column_P[inside_P] - first, scores_BC)] = True
            # NOTE: a tie with the last kept score is a candidate, since a negative takes the place of a positive. -inf
            # would lose to every empty place; leaving it out here only saves the sort.
            last_kept_C = self.score_CK[first : first + width, -1]
            row_N, column_N = find_reaching(block_BC, last_kept_C)
            self._wait(_pack(column_N + first, block_BC[row_N, column_N], positive_BC[row_N, column_N]))

    def merge(self, other: "MeanAveragePrecisionAtK") -> None:
        """Adds what another one has seen, of other samples of the same split."""
        assert (self.num_classes, self.k) == (other.num_classes, other.k), "merged metrics must have one form"
        other._settle()
        self.num_positives_C += other.num_positives_C
        score_CK, positive_CK = (kept_CK.to(self.score_CK.device) for kept_CK in (other.score_CK, other.positive_CK))
        column_N, place_N = (score_CK > -torch.inf).nonzero(as_tuple=True)
        self._wait(_pack(column_N, score_CK[column_N, place_N], positive_CK[column_N, place_N]))

    def compute_per_class(self) -> np.ndarray:
        """(C,) float64 AP@K; NaN for a class without a positive."""
        self._settle()
        positive_CK = self.positive_CK.cpu().numpy()
        precision_CK = np.cumsum(positive_CK, axis=1) / np.arange(1, self.k + 1)
        total_C = np.where(positive_CK, precision_CK, 0.0).sum(axis=1)
        possible_C = np.minimum(self.num_positives_C, self.k)
        return np.divide(total_C, possible_C, out=np.full(self.num_classes, np.nan), where=possible_C > 0)

    def compute(self) -> float:
        """The mean over the classes with a positive; NaN where there is none."""
        return mean_average_precision(self.compute_per_class())

    def state(self) -> dict[str, np.ndarray]:
        """Everything seen, as plain arrays, for `load_state` in another process."""
        self._settle()
        kept = {"score_CK": self.score_CK, "positive_CK": self.positive_CK}
        arrays = {name: array.cpu().numpy().copy() for name, array in kept.items()}
        return arrays | {"num_positives_C": self.num_positives_C.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._waiting, self._num_waiting = [], 0
        self.score_CK, self.positive_CK = (torch.tensor(state[name]) for name in ("score_CK", "positive_CK"))
        self.num_positives_C = np.array(state["num_positives_C"])

    def _move(self, device: torch.device) -> None:
        if device != self.score_CK.device:
            self._settle()
            self.score_CK, self.positive_CK = self.score_CK.to(device), self.positive_CK.to(device)

    def _wait(self, key_N: Tensor) -> None:
        self._waiting.append(key_N)
        self._num_waiting += len(key_N)
        if self._num_waiting >= min(self.score_CK.numel(), MOST_WAITING):
            self._settle()

    def _settle(self) -> None:
        """Lets the waiting candidates compete with what is kept, some classes at a time to bound the memory."""
        if not self._num_waiting:
            return
        key_N = torch.cat(self._waiting)
        self._waiting, self._num_waiting = [], 0
        key_N = _sort(key_N)
        width = max(1, SCORES_PER_BLOCK[key_N.device.type] // self.k)
        first_C = torch.arange(0, self.num_classes + width, width, device=key_N.device)
        for start, stop in itertools.pairwise(torch.searchsorted(key_N, first_C << 33).tolist()):
            if start < stop:
                self._keep_best(key_N[start:stop])

    def _keep_best(self, key_N: Tensor) -> None:
        """Lets sorted candidates compete; only the classes with a candidate are sorted again."""
        touched = (key_N >> 33).unique_consecutive()
        kept = touched.repeat_interleave(self.k)
        key_N = torch.cat([_pack(kept, self.score_CK[touched].flatten(), self.positive_CK[touched].flatten()), key_N])
        key_N = _sort(key_N)
        first_of_class = torch.searchsorted(key_N, touched << 33)
        # Every touched class brings its K kept places, so the first K of its run always exist.
        best = first_of_class[:, None] + torch.arange(self.k, device=key_N.device)
        self.score_CK[touched], self.positive_CK[touched] = _unpack(key_N[best])


def _sort(key_N: Tensor) -> Tensor:
    """Rising. On a CPU by numpy, which is several times faster at whole numbers than torch."""
    if key_N.device.type != "cpu":
        return key_N.sort().values
    key_N.numpy().sort()
    return key_N


def _pack(column_N: Tensor, score_N: Tensor, positive_N: Tensor) -> Tensor:
    """(N,) int64 that sort by class, then falling score, then negatives first: one plain sort, 3x faster than a lexsort."""
    bits_N = (0 - score_N).view(torch.int32)  # NOTE: not `-score_N`, which tells 0.0 from -0.0
    # The bits of positive floats sort like the floats, after the negative ones, which sort backwards.
    bits_N = torch.where(bits_N < 0, ~bits_N, bits_N | _SIGN).long() & _LOW_BITS
    return column_N << 33 | bits_N << 1 | positive_N


def _unpack(key_N: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and positives of packed keys."""
    bits_N = (key_N >> 1).int()  # drops the class
    bits_N = torch.where(bits_N < 0, bits_N & ~_SIGN, ~bits_N)
    return 0 - bits_N.view(torch.float32), (key_N & 1).bool()


_SIGN, _LOW_BITS = -(1 << 31), (1 << 32) - 1
