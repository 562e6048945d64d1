"""The exact average precision of every class in two passes over the scores, which are not kept.

    metric = StreamingAveragePrecision(num_classes)
    for scores_BV, row_P, column_P in read_batches():
        metric.update(scores_BV, row_P, column_P)
    metric.begin_second_pass()
    for scores_BV, row_P, column_P in read_batches():  # the same samples, in any order and batches
        metric.update(scores_BV, row_P, column_P)
    ap_V = metric.compute()

AP asks of every positive how many samples score at least as high as it. The first pass gathers the scores of the positives; the
second counts, for each of them, the samples that reach it. Kept are a few numbers for each positive, however many
samples and classes there are.

A positive is counted by what it is, not by comparing its score with itself: in the second pass the other samples alone are
compared, and the positives among themselves are counted with the scores of the first. Where a network's scores are
rounded otherwise in the second pass (another split into batches is enough), a positive so never misses itself; only a negative
that lies within the rounding of a positive may change sides. Where the scores are the same, the result is exact.

Shapes: B samples of a batch, V classes, P positive (sample, class) pairs.
"""

from collections.abc import Mapping

import numpy as np

from concentration.errors import DataError
from concentration.metrics.average_precision import check_not_nan, count_at_least

#: Scores that are looked at together, so that they stay in the processor's cache while they are turned, compared and sorted.
ROWS_PER_BLOCK, COLUMNS_PER_BLOCK = 4096, 64

#: Rows that are turned together: more of them, a wide row apart each, miss the cache (5x slower at 4,096 rows of 5,000 columns).
ROWS_PER_TURN = 256

#: Below this share of scores that reach a class's lowest positive, they are picked out, and they alone are sorted.
FEW = 1 / 8

#: How far a positive's score may be from that of the first pass, as a share of the mean size of the positives' scores: far above
#: the rounding of float32 and bfloat16, far below what other weights or another image do to one of thousands of positives.
ROUNDING = 0.05

#: Parts of positives that are gathered before they become one: bounds the number of small arrays.
MAX_PARTS = 1024


class StreamingAveragePrecision:
    """`average_precision_of_pairs` of all samples seen, in two passes; parts of both passes can be merged.

    Several processes: each sees its samples, their parts are merged, and each sees its samples again in a copy (`from_state`)
    of what the merged one is after `begin_second_pass`; the copies are merged again.

    Args:
        dtype: in which scores are compared. float32 is exact for logits of any smaller type; float64 for what an offset is
            subtracted from.
    """

    def __init__(self, num_classes: int, dtype: type[np.floating] = np.float32):
        self.num_classes = num_classes
        self.dtype = np.dtype(dtype)
        self._first = _Positives(self.dtype)
        #: None until the second pass begins.
        self._second: _Positives | None = None

    def update(
        self,
        scores_BV: np.ndarray,
        row_P: np.ndarray,
        column_P: np.ndarray,
        is_direct_P: np.ndarray | None = None,
        offset_B: np.ndarray | None = None,
    ) -> None:
        """Adds samples to the pass that has begun. The second is fast in batches of a thousand samples and more.

        Args:
            scores_BV: (B, V) numbers; infinities are ordinary values.
            row_P, column_P: (P,) sample `row_P[i]` is positive for class `column_P[i]`; no pair may come twice.
            is_direct_P: (P,) bool, the positives that `compute_direct` looks at; by default all.
            offset_B: (B,) subtracted from all scores of a sample; the same in both passes.

        Raises:
            DataError: a score is NaN. The first pass looks at those of positives alone.
        """
        assert scores_BV.shape[1] == self.num_classes, (scores_BV.shape, self.num_classes)
        score_P = scores_BV[row_P, column_P].astype(self.dtype)
        if offset_B is not None:
            score_P -= offset_B[row_P]
        if np.isnan(score_P).any():
            worst = int(np.isnan(score_P).argmax())
            check_not_nan(score_P[None, worst : worst + 1], int(row_P[worst]), int(column_P[worst]))
        is_direct_P = np.ones(len(score_P), dtype=bool) if is_direct_P is None else is_direct_P
        (self._second or self._first).add(len(scores_BV), column_P, score_P, is_direct_P)
        if self._second is not None:
            for first in range(0, len(scores_BV), ROWS_PER_BLOCK):
                block = slice(first, first + ROWS_PER_BLOCK)
                self._count(scores_BV[block], None if offset_B is None else offset_B[block], first)

    def begin_second_pass(self) -> None:
        """Sorts what the first pass, with all its parts merged, has gathered."""
        assert self._second is None, "the second pass has begun already"
        self._start_V = self._first.sort_by_class(self.num_classes)
        self._second = _Positives(self.dtype)
        #: (P,) samples of the second pass that score at least as high as each positive, which lie by class and rising.
        self._num_at_least_P = np.zeros(self._start_V[-1], dtype=np.int64)

    def merge(self, other: "StreamingAveragePrecision") -> None:
        """Adds what another one has seen of other samples in the same pass.

        Raises:
            DataError: the two have begun their second passes with other positives.
        """
        assert (self.num_classes, self.dtype) == (other.num_classes, other.dtype), "merged metrics must have one form"
        assert (self._second is None) == (other._second is None), "merged metrics must be in one pass"
        if self._second is None:
            self._first.merge(other._first)
            return
        mine, theirs = self._first.arrays(), other._first.arrays()
        if not all(np.array_equal(mine[name], theirs[name]) for name in mine):
            raise DataError(
                "average precision: two parts of the second pass began with other positives; merge the parts of the first "
                "pass, begin the second, and give each process the state of that"
            )
        self._second.merge(other._second)
        self._num_at_least_P += other._num_at_least_P

    def state(self) -> dict[str, np.ndarray]:
        """Everything seen, as plain arrays, for another process: see `from_state`."""
        state = {f"first/{name}": array for name, array in self._first.state().items()}
        if self._second is not None:
            state |= {f"second/{name}": array for name, array in self._second.state().items()}
            state["num_at_least_P"] = self._num_at_least_P.copy()
        return state

    @classmethod
    def from_state(cls, num_classes: int, state: Mapping[str, np.ndarray]) -> "StreamingAveragePrecision":
        """One that has seen what `state` describes."""
        metric = cls(num_classes, state["first/score_P"].dtype)
        metric._first.add(**take_prefixed(state, "first/"))
        if "num_at_least_P" in state:
            metric.begin_second_pass()
            metric._second.add(**take_prefixed(state, "second/"))
            metric._num_at_least_P += state["num_at_least_P"]
        return metric

    def compute(self) -> np.ndarray:
        """(V,) float64 in (0, 1]; NaN for a class without a positive.

        Raises:
            DataError: the two passes have not seen the same samples, labels and scores.
        """
        return self._compute_ap(np.ones_like(self._first.arrays()["is_direct_P"]))

    def compute_direct(self) -> np.ndarray:
        """`compute` with the direct positives as the only ones; the others count as negatives."""
        return self._compute_ap(self._first.arrays()["is_direct_P"])

    def _count(self, scores_BV: np.ndarray, offset_B: np.ndarray | None, first_row: int) -> None:
        """Adds a block of samples to `_num_at_least_P`."""
        positive_P, start_V = self._first.arrays()["score_P"], self._start_V.tolist()
        for first in range(0, self.num_classes, COLUMNS_PER_BLOCK):
            block_BV = scores_BV[:, first : first + COLUMNS_PER_BLOCK]
            scores_VB = np.empty(block_BV.shape[::-1], dtype=self.dtype)
            for row in range(0, len(block_BV), ROWS_PER_TURN):
                scores_VB[:, row : row + ROWS_PER_TURN] = block_BV[row : row + ROWS_PER_TURN].T
            if offset_B is not None:
                scores_VB -= offset_B
            check_not_nan(scores_VB, first_row, first)
            for column, scores_B in enumerate(scores_VB, start=first):
                own = slice(start_V[column], start_V[column + 1])
                if own.start == own.stop:
                    continue
                reaches_B = scores_B >= positive_P[own.start]
                if np.count_nonzero(reaches_B) < FEW * len(scores_B):
                    scores_B = scores_B[reaches_B]
                scores_B.sort()
                self._num_at_least_P[own] += count_at_least(scores_B, positive_P[own])

    def _compute_ap(self, is_chosen_P: np.ndarray) -> np.ndarray:
        again_P = self._check_passes()
        score_P = self._first.arrays()["score_P"]
        ap_V = np.full(self.num_classes, np.nan)
        for column in np.flatnonzero(np.diff(self._start_V)):
            own = slice(self._start_V[column], self._start_V[column + 1])
            is_chosen, score = is_chosen_P[own], score_P[own]
            if is_chosen.any():
                negatives = self._num_at_least_P[own] - count_at_least(again_P[own], score)
                num_at_least = negatives + count_at_least(score, score)
                num_right = count_at_least(score[is_chosen], score[is_chosen])
                ap_V[column] = np.mean(num_right / num_at_least[is_chosen])
        return ap_V

    def _check_passes(self) -> np.ndarray:
        """The (P,) scores of the positives in the second pass, in the order of the first's."""
        num_again = 0 if self._second is None else self._second.num_samples
        if num_again != self._first.num_samples:
            raise DataError(
                f"average precision: the second pass saw {num_again} samples and the first {self._first.num_samples}; "
                "show it the same samples"
            )
        start_V = self._second.sort_by_class(self.num_classes)
        if not np.array_equal(start_V, self._start_V):
            column = int(np.flatnonzero(start_V != self._start_V)[0]) - 1
            counts = [int(start[column + 1] - start[column]) for start in (start_V, self._start_V)]
            raise DataError(
                f"average precision: class {column} had {counts[0]} positives in the second pass and {counts[1]} in the "
                "first; were labels or batches changed in between?"
            )
        score_P, again_P = (positives.arrays()["score_P"] for positives in (self._first, self._second))
        size_P = np.abs(score_P[np.isfinite(score_P)])
        tolerance = ROUNDING * size_P.mean(dtype=np.float64) if len(size_P) else 0.0
        with np.errstate(invalid="ignore"):  # infinities that are equal
            is_far_P = (score_P != again_P) & ~(np.abs(score_P - again_P) <= tolerance)
        if is_far_P.any():
            place = int(is_far_P.argmax())
            column = int(np.searchsorted(self._start_V, place, side="right")) - 1
            raise DataError(
                f"average precision: a positive of class {column} scored {score_P[place]:.6g} in the first pass and "
                f"{again_P[place]:.6g} in the second, which is no rounding; both passes need the same network and images"
            )
        return again_P


class _Positives:
    """The scores of positives, part by part or sorted by class, and the number of samples that they are from."""

    def __init__(self, dtype: np.dtype):
        self.num_samples = 0
        nothing = np.zeros(0, dtype=np.int32)
        self._parts = [{"column_P": nothing, "score_P": nothing.astype(dtype), "is_direct_P": nothing.astype(bool)}]

    def add(self, num_samples: int, column_P: np.ndarray, score_P: np.ndarray, is_direct_P: np.ndarray) -> None:
        self.num_samples += int(num_samples)
        self._parts.append({"column_P": column_P.astype(np.int32), "score_P": score_P, "is_direct_P": is_direct_P})
        if len(self._parts) > MAX_PARTS:
            self.arrays()

    def merge(self, other: "_Positives") -> None:
        self.add(**other.state())

    def arrays(self) -> dict[str, np.ndarray]:
        """(P,) int32 `column_P`, `score_P`, bool `is_direct_P`."""
        if len(self._parts) > 1:
            self._parts = [{name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}]
        return self._parts[0]

    def state(self) -> dict[str, np.ndarray]:
        """The arguments of `add`."""
        return {"num_samples": np.array(self.num_samples), **self.arrays()}

    def sort_by_class(self, num_classes: int) -> np.ndarray:
        """Sorts the positives by class and rising score. Returns (V + 1,) where each class's begin, and P."""
        arrays = self.arrays()
        order = np.lexsort((arrays["score_P"], arrays["column_P"]))
        self._parts = [{name: array[order] for name, array in arrays.items()}]
        return np.concatenate([[0], np.cumsum(np.bincount(arrays["column_P"], minlength=num_classes))])


def take_prefixed(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
