"""The samples labelled in one vertical, from which its three APs are computed: kept, or seen twice.

Shapes: V classes of the vertical, N its samples, P positive (sample, class) pairs.
"""

from collections.abc import Mapping

import numpy as np
import torch

from concentration.metrics.average_precision import average_precision_of_pairs
from concentration.metrics.streaming_average_precision import StreamingAveragePrecision, take_prefixed

CPU = torch.device("cpu")

#: Scores that are on a GPU together, 4 bytes each.
SCORES_ON_DEVICE = 1 << 26

#: Samples whose log-sum-exp is taken together: bounds the float64 copy of a large vertical.
ROWS_PER_BLOCK = 4096


class KeptSamples:
    """All scores in memory, N * V * 4 bytes and while they are put together those of one vertical twice; one pass."""

    def __init__(self, num_classes: int):
        self.num_samples = 0
        nothing = np.zeros(0, dtype=np.int64)
        self._parts = [
            {
                "scores_NV": np.zeros((0, num_classes), dtype=np.float32),
                "row_P": nothing,
                "column_P": nothing,
                "is_direct_P": nothing.astype(bool),
            }
        ]

    def add(self, scores_NV: np.ndarray, row_P: np.ndarray, column_P: np.ndarray, is_direct_P: np.ndarray) -> None:
        """Adds N samples; `row_P` counts from the first of them."""
        row_P = row_P + self.num_samples
        self._parts.append({"scores_NV": scores_NV, "row_P": row_P, "column_P": column_P, "is_direct_P": is_direct_P})
        self.num_samples += len(scores_NV)

    def merge(self, other: "KeptSamples") -> None:
        self.add(**other.state())

    def state(self) -> dict[str, np.ndarray]:
        """All samples so far, as the arguments of `add`."""
        if len(self._parts) > 1:
            self._parts = [{name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}]
        return self._parts[0]

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.add(**state)

    def compute_ap(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three times (V,) AP: of the scores, of their log-softmax, and of the scores for direct labels only.

        device: where it is done.
        """
        scores_NV, row_P, column_P, is_direct_P = self.state().values()
        offset_N = log_sum_exp(scores_NV, device)
        found = []
        width = scores_NV.shape[1] if device.type == "cpu" else max(1, SCORES_ON_DEVICE // max(1, self.num_samples))
        for first in range(0, scores_NV.shape[1], width):
            # NOTE: a GPU has less memory than the machine, and its network there besides.
            block_NV = torch.from_numpy(scores_NV[:, first : first + width]).to(device)
            own_P = (column_P >= first) & (column_P < first + width)
            pairs, direct = ((row_P[chosen_P], column_P[chosen_P] - first) for chosen_P in (own_P, own_P & is_direct_P))
            found.append(
                (
                    average_precision_of_pairs(block_NV, *pairs),
                    average_precision_of_pairs(block_NV, *pairs, offset_B=offset_N),
                    average_precision_of_pairs(block_NV, *direct),
                )
            )
        raw_V, log_softmax_V, direct_V = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return raw_V, log_softmax_V, direct_V


class StreamedSamples:
    """A few numbers for each positive, and at most `rows_per_block` samples that wait to be counted together; two passes."""

    def __init__(self, num_classes: int, rows_per_block: int):
        self._num_classes = num_classes
        self._rows_per_block = rows_per_block
        self._waiting = KeptSamples(num_classes)
        self._raw = StreamingAveragePrecision(num_classes)
        self._log_softmax = StreamingAveragePrecision(num_classes, np.float64)

    def add(self, scores_NV: np.ndarray, row_P: np.ndarray, column_P: np.ndarray, is_direct_P: np.ndarray) -> None:
        """Adds N samples to the pass that has begun; `row_P` counts from the first of them."""
        self._waiting.add(scores_NV, row_P, column_P, is_direct_P)
        if self._waiting.num_samples >= self._rows_per_block:
            self._take_waiting()

    def begin_second_pass(self) -> None:
        self._take_waiting()
        self._raw.begin_second_pass()
        self._log_softmax.begin_second_pass()

    def merge(self, other: "StreamedSamples") -> None:
        """Adds what another one has seen of other samples in the same pass."""
        self._take_waiting()
        other._take_waiting()
        self._raw.merge(other._raw)
        self._log_softmax.merge(other._log_softmax)

    def state(self) -> dict[str, np.ndarray]:
        self._take_waiting()
        metrics = {"raw": self._raw, "log_softmax": self._log_softmax}
        return {f"{kind}/{name}": array for kind, metric in metrics.items() for name, array in metric.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._raw, self._log_softmax = (
            StreamingAveragePrecision.from_state(self._num_classes, take_prefixed(state, f"{kind}/"))
            for kind in ("raw", "log_softmax")
        )

    def compute_ap(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `KeptSamples.compute_ap`, but there is nothing left to do that a device would be faster at.

        Raises:
            DataError: the passes have not seen the same.
        """
        self._take_waiting()
        return self._raw.compute(), self._log_softmax.compute(), self._raw.compute_direct()

    def _take_waiting(self) -> None:
        scores_NV, row_P, column_P, is_direct_P = self._waiting.state().values()
        self._waiting = KeptSamples(self._num_classes)
        self._raw.update(scores_NV, row_P, column_P, is_direct_P)
        self._log_softmax.update(scores_NV, row_P, column_P, is_direct_P, offset_B=log_sum_exp(scores_NV))


def log_sum_exp(scores_NV: np.ndarray, device: torch.device = CPU) -> np.ndarray:
    """(N,) float64; 0 for a sample that has only -inf, whose log-softmax so stays -inf. `device`: where it is done."""
    total_N = np.zeros(len(scores_NV))
    for first in range(0, len(scores_NV), ROWS_PER_BLOCK):
        # NOTE: rows that lie otherwise would be summed in another order, and a sample's sum would depend on its batch.
        block_BV = torch.from_numpy(np.ascontiguousarray(scores_NV[first : first + ROWS_PER_BLOCK])).to(device)
        total_N[first : first + ROWS_PER_BLOCK] = block_BV.double().logsumexp(1).cpu().numpy()
    total_N[np.isneginf(total_N)] = 0.0
    return total_N
