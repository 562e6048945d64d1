"""The metrics of one network: pvap and mpvap, top-1 and top-5, mAP@50, and AP by class frequency.

    evaluator = Evaluator(taxonomy, train_counts_C, finds_map_at_50=True)
    for scores_BC, labels in batches:
        evaluator.update(scores_BC, labels)
    print(evaluator.compute().mpvap)

Shapes: B samples of a batch, C all classes, V classes of one vertical, N samples labelled in one vertical, P positive
(sample, class) pairs, L leaves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from concentration.errors import DataError
from concentration.metrics.average_precision import (
    Frequency,
    FrequencyGroup,
    average_precision_by_frequency,
    mean_average_precision,
)
from concentration.metrics.ranking import MeanAveragePrecisionAtK, rank_labels, rank_of_best_label
from concentration.metrics.scores import Scores, place
from concentration.metrics.streaming_average_precision import take_prefixed
from concentration.metrics.vertical_samples import CPU, KeptSamples, StreamedSamples
from concentration.taxonomy import Taxonomy

#: In two passes, samples wait so that many of a vertical are counted together; the waiting ones may take so much memory.
WAITING_BYTES = 1 << 30
#: How many samples of a vertical are counted together, if that allows it: more are not faster, fewer are slow.
MIN_WAITING_ROWS, MAX_WAITING_ROWS = 256, 4096
#: k of precision and recall at k.
CUTOFFS = (1, 3, 5, 10)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All metrics, as fractions in [0, 1]; NaN where nothing could be measured.

    A sample with labels in several verticals counts in each of them. "Smeared" means that the ancestors of a label,
    inside its vertical, are positives too.
    """

    #: Mean of `pvap` over the verticals that have a sample.
    mpvap: float
    #: By vertical: mean AP over its classes with a positive, on its own samples and outputs, with smeared positives.
    pvap: dict[str, float]
    #: The same after log-softmax over the vertical's outputs: without the calibration of samples against each other.
    mpvap_log_softmax: float
    pvap_log_softmax: dict[str, float]
    #: The same as `mpvap` with the direct labels as the only positives.
    mpvap_unsmeared: float
    #: Fraction of the samples with a leaf label that have one among the best 1 or 5 leaves of the whole taxonomy.
    top1: float
    top5: float
    #: By k: the mean over the samples with a leaf label of (labels among the best k leaves) / k, and / (leaf labels). The
    #: usual metrics of hashtags; with one label a sample, recall is top-k accuracy and precision a k-th of it.
    precision_at_k: dict[str, float]
    recall_at_k: dict[str, float]
    #: The mean number of leaf labels of the samples that have one.
    labels_per_sample: float
    #: Fraction of the (sample, vertical of one of its leaf labels) pairs with such a label as the vertical's best leaf.
    top1_in_vertical: float
    #: Over all classes and all samples, with smeared positives: see MeanAveragePrecisionAtK; NaN also where nobody asked for it.
    map_at_50: float
    num_classes: int
    num_samples: int
    #: Samples that top1, top5 and top1_in_vertical leave out.
    num_samples_without_leaf: int
    #: Verticals that have no sample and are in no mean.
    num_verticals_without_sample: int
    #: By vertical: classes that no sample has, after smearing, and that pvap leaves out.
    num_classes_without_positive: dict[str, int]
    #: Mean of `ap_of_class` over classes with few, some and many training images; None where these are not known.
    ap_by_frequency: dict[Frequency, FrequencyGroup] | None
    #: (C,) by output: what pvap averages.
    ap_of_class: np.ndarray

    def to_json(self) -> dict:
        """The same as plain numbers, lists and dictionaries; NaN becomes None, since JSON has no NaN."""
        return _to_json(asdict(self))


class Evaluator:
    """Collects scores and labels batch by batch, in parts that can be merged, and computes an Evaluation.

    In one pass it keeps, as float32, the scores of every sample in those verticals in which it has a label: see
    `measure_kept_bytes`. With two passes it is shown all samples, `begin_second_pass` is called, and it is shown them again: that
    takes only a few numbers for each positive, with the same result. Besides, it keeps counts, and for mAP@50 the 50 best samples
    of a class. The order of samples does not matter. Work on all scores is done where they are: on the GPU of a network there.

    Args:
        train_counts_C: (C,) by output, the number of training images of every class, for AP by frequency.
        num_passes: over the samples.
        finds_map_at_50: each score is compared with the 50 best of its class, which are kept.

    Raises:
        DataError: there is not one training count per class.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        train_counts_C: np.ndarray | None = None,
        num_passes: Literal[1, 2] = 1,
        finds_map_at_50: bool = False,
    ):
        if train_counts_C is not None and np.shape(train_counts_C) != (taxonomy.num_classes,):
            raise DataError(
                f"evaluation: training counts of the shape {np.shape(train_counts_C)}, expected one per class: "
                f"({taxonomy.num_classes},)"
            )
        self.taxonomy = taxonomy
        self.train_counts_C = train_counts_C
        self.num_passes = num_passes
        self._is_second_pass = False
        self._samples: list[KeptSamples] | list[StreamedSamples]
        if num_passes == 1:
            self._samples = [KeptSamples(size) for size in taxonomy.vertical_sizes]
        else:
            rows = min(max(WAITING_BYTES // (4 * taxonomy.num_classes), MIN_WAITING_ROWS), MAX_WAITING_ROWS)
            self._samples = [StreamedSamples(size, rows) for size in taxonomy.vertical_sizes]
        self._best = MeanAveragePrecisionAtK(taxonomy.num_classes, k=50) if finds_map_at_50 else None
        self._counts: Counter[str] = Counter()
        self._leaves_L = torch.from_numpy(np.flatnonzero(taxonomy.is_leaf))
        #: (C,) the number of an output among the leaves, where it is one.
        self._leaf_number_C = np.cumsum(taxonomy.is_leaf) - 1

    def update(self, scores_BC: Scores, label_outputs: Sequence[Sequence[int]]) -> None:
        """Adds a batch to the pass that has begun.

        Args:
            scores_BC: (B, C) logits by output: a numpy array, or a tensor on any device. The specialists as an ensemble put
                the logits of every teacher side by side. -inf says that a class was not computed for a sample.
            label_outputs: the direct labels of every sample, as outputs: without their ancestors.

        Raises:
            DataError: a score is NaN or +inf, a label is no output, or the shapes do not fit.
        """
        scores_BC = torch.as_tensor(scores_BC).detach().float()
        _check_batch(scores_BC, label_outputs, self.taxonomy.num_classes)
        if not len(scores_BC):
            return
        row_P, output_P, is_direct_P = self._label_pairs(label_outputs)
        if not self._is_second_pass:
            if self._best is not None:
                self._best.update(scores_BC, row_P, output_P)
            self._count_top_k(scores_BC, row_P, output_P)
        vertical_P = self.taxonomy.vertical_of_output[output_P]
        for number in np.unique(vertical_P):
            start, stop = self.taxonomy.vertical_starts[number], self.taxonomy.vertical_starts[number + 1]
            inside_P = vertical_P == number
            rows, row_in_vertical_P = np.unique(row_P[inside_P], return_inverse=True)
            scores_NV = scores_BC[:, start:stop].index_select(0, place(rows, scores_BC))
            column_P = output_P[inside_P] - start
            self._samples[number].add(scores_NV.cpu().numpy(), row_in_vertical_P, column_P, is_direct_P[inside_P])
            if not self._is_second_pass:
                self._count_top1_in_vertical(scores_NV, row_in_vertical_P, column_P, self.taxonomy.is_leaf[start:stop])

    def begin_second_pass(self) -> None:
        """To be called when all samples were seen once, and all parts of the first pass are merged, if there are two."""
        assert self.num_passes == 2, "this evaluator keeps all scores in its one pass"
        self._is_second_pass = True
        for samples in self._samples:
            samples.begin_second_pass()

    def merge(self, other: "Evaluator") -> None:
        """Adds what another evaluator has seen of other samples of the same split, in the same pass.

        In the second, both are copies (`from_state`) of the one that all parts of the first were merged into.
        """
        assert self.taxonomy.fingerprint == other.taxonomy.fingerprint, "evaluators of two taxonomies cannot be merged"
        passes = [(evaluator.num_passes, evaluator._is_second_pass) for evaluator in (self, other)]
        assert passes[0] == passes[1], "merged evaluators must be in one pass"
        assert (self._best is None) == (other._best is None), "merged evaluators must find the same metrics"
        if not self._is_second_pass:
            self._counts.update(other._counts)
            if self._best is not None:
                self._best.merge(other._best)
        for mine, theirs in zip(self._samples, other._samples, strict=True):
            mine.merge(theirs)

    def state(self) -> dict[str, np.ndarray]:
        """Everything seen, as plain arrays, for another process: see `from_state`."""
        state = {"num_passes": np.array(self.num_passes), "is_second_pass": np.array(self._is_second_pass)}
        state |= {f"counts/{name}": np.array(count) for name, count in self._counts.items()}
        if self._best is not None:
            state |= {f"best/{name}": array for name, array in self._best.state().items()}
        for number, samples in enumerate(self._samples):
            state.update({f"samples/{number}/{name}": array for name, array in samples.state().items()})
        return state

    @classmethod
    def from_state(
        cls, taxonomy: Taxonomy, state: Mapping[str, np.ndarray], train_counts_C: np.ndarray | None = None
    ) -> "Evaluator":
        """An evaluator that has seen what `state` describes."""
        best = take_prefixed(state, "best/")
        evaluator = cls(taxonomy, train_counts_C, int(state["num_passes"]), finds_map_at_50=bool(best))
        evaluator._is_second_pass = bool(state["is_second_pass"])
        # By vertical in one walk: there may be thousands of verticals, with some arrays each.
        of_samples: dict[str, dict[str, np.ndarray]] = {}
        for key, array in state.items():
            part, _, name = key.partition("/")
            if part == "counts":
                evaluator._counts[name] = int(array)
            elif part == "samples":
                number, _, name = name.partition("/")
                of_samples.setdefault(number, {})[name] = array
        if evaluator._best is not None:
            evaluator._best.load_state(best)
        for number, samples in enumerate(evaluator._samples):
            samples.load_state(of_samples[str(number)])
        return evaluator

    def compute(self, device: torch.device = CPU) -> Evaluation:
        """Everything that was measured.

        device: where the kept scores of one pass are compared, a vertical after the other.

        Raises:
            DataError: no sample was seen, or the second of two passes did not see what the first saw.
        """
        num_samples = self._counts["samples"]
        if not num_samples:
            raise DataError("evaluation: the split has no sample; prepare it, or evaluate another split")
        raw, log_softmax, unsmeared = {}, {}, {}
        for name, samples in zip(self.taxonomy.verticals, self._samples, strict=True):
            raw[name], log_softmax[name], unsmeared[name] = samples.compute_ap(device)
        pvap, pvap_log_softmax, pvap_unsmeared = (
            # A vertical with a sample has a class with a positive, so NaN means: without a sample.
            {name: mean for name, ap_V in ap.items() if not np.isnan(mean := mean_average_precision(ap_V))}
            for ap in (raw, log_softmax, unsmeared)
        )
        ap_C = np.concatenate([raw[name] for name in self.taxonomy.verticals])
        counts_C = self.train_counts_C
        return Evaluation(
            mpvap=_mean(pvap),
            pvap=pvap,
            mpvap_log_softmax=_mean(pvap_log_softmax),
            pvap_log_softmax=pvap_log_softmax,
            mpvap_unsmeared=_mean(pvap_unsmeared),
            top1=_fraction(self._counts["right_at_1"], self._counts["samples_with_leaf"]),
            top5=_fraction(self._counts["right_at_5"], self._counts["samples_with_leaf"]),
            **self._compute_at_k(),
            top1_in_vertical=_fraction(self._counts["right_in_vertical"], self._counts["verticals_with_leaf"]),
            map_at_50=float("nan") if self._best is None else self._best.compute(),
            num_classes=self.taxonomy.num_classes,
            num_samples=num_samples,
            num_samples_without_leaf=num_samples - self._counts["samples_with_leaf"],
            num_verticals_without_sample=self.taxonomy.num_verticals - len(pvap),
            num_classes_without_positive={name: int(np.isnan(ap_V).sum()) for name, ap_V in raw.items()},
            ap_by_frequency=None if counts_C is None else average_precision_by_frequency(ap_C, counts_C),
            ap_of_class=ap_C,
        )

    def _label_pairs(self, label_outputs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(P,) rows, (P,) outputs and (P,) is_direct of the smeared labels, each pair once."""
        rows, outputs, is_direct = [], [], []
        for row, labels in enumerate(label_outputs):
            direct = {int(label) for label in labels}
            smeared = self.taxonomy.smear(direct)
            rows.extend([row] * len(smeared))
            outputs.extend(smeared)
            is_direct.extend(output in direct for output in smeared)
        return np.array(rows, dtype=np.int64), np.array(outputs, dtype=np.int64), np.array(is_direct, dtype=bool)

    def _count_top_k(self, scores_BC: Tensor, row_P: np.ndarray, output_P: np.ndarray) -> None:
        # NOTE: the pairs are smeared, but an ancestor is somebody's parent and so never a leaf.
        leaf_P = self.taxonomy.is_leaf[output_P]
        row_P, leaf_number_P = row_P[leaf_P], self._leaf_number_C[output_P[leaf_P]]
        self._leaves_L = self._leaves_L.to(scores_BC.device)
        rank_P = rank_labels(scores_BC.index_select(1, self._leaves_L), row_P, leaf_number_P)
        num_labels_B = np.bincount(row_P, minlength=len(scores_BC))
        num_labels_P = num_labels_B[row_P]
        rank_B = np.full(len(scores_BC), np.iinfo(np.int64).max)  # without a leaf: right at no k
        np.minimum.at(rank_B, row_P, rank_P)
        self._counts.update(
            samples=len(scores_BC),
            samples_with_leaf=int((num_labels_B > 0).sum()),
            leaf_labels=len(row_P),
            right_at_1=int((rank_B <= 1).sum()),
            right_at_5=int((rank_B <= 5).sum()),
        )
        # Whole numbers, so that merged parts give the same fractions in whatever order: hits by the labels of their sample.
        for k in CUTOFFS:
            for num_labels, hits in enumerate(np.bincount(num_labels_P[rank_P <= k]).tolist()):
                if hits:
                    self._counts[f"hits_at_{k}_of_{num_labels}"] += hits

    def _compute_at_k(self) -> dict[str, dict[str, float] | float]:
        num_samples = self._counts["samples_with_leaf"]
        precision, recall = {}, {}
        for k in CUTOFFS:
            prefix = f"hits_at_{k}_of_"
            hits = {int(n.removeprefix(prefix)): hits for n, hits in self._counts.items() if n.startswith(prefix)}
            precision[str(k)] = _fraction(sum(hits.values()), k * num_samples)
            recall[str(k)] = _fraction(sum(hits[n] / n for n in sorted(hits)), num_samples)
        labels_per_sample = _fraction(self._counts["leaf_labels"], num_samples)
        return {"precision_at_k": precision, "recall_at_k": recall, "labels_per_sample": labels_per_sample}

    def _count_top1_in_vertical(
        self, scores_NV: Tensor, row_P: np.ndarray, column_P: np.ndarray, is_leaf_V: np.ndarray
    ) -> None:
        leaf_P = is_leaf_V[column_P]
        leaf_number_V = np.cumsum(is_leaf_V) - 1
        leaves_L = place(np.flatnonzero(is_leaf_V), scores_NV)
        rank_N = rank_of_best_label(scores_NV.index_select(1, leaves_L), row_P[leaf_P], leaf_number_V[column_P[leaf_P]])
        rank_N = rank_N[np.unique(row_P[leaf_P])]
        self._counts.update(verticals_with_leaf=rank_N.size, right_in_vertical=int((rank_N <= 1).sum()))


def measure_kept_bytes(vertical_sizes: Sequence[int], num_samples: Sequence[int]) -> int:
    """The scores that an Evaluator holds at most in one pass, given how many samples each vertical has."""
    kept = [4 * size * count for size, count in zip(vertical_sizes, num_samples, strict=True)]
    return sum(kept) + max(kept)  # the parts of one vertical at a time are put together


def _check_batch(scores_BC: Tensor, label_outputs: Sequence[Sequence[int]], num_classes: int) -> None:
    if scores_BC.shape != (len(label_outputs), num_classes):
        raise DataError(
            f"evaluation: scores of the shape {tuple(scores_BC.shape)} for {len(label_outputs)} samples and a taxonomy of "
            f"{num_classes} classes; was the network trained with another taxonomy?"
        )
    if scores_BC.numel() and not scores_BC.max() < torch.inf:  # the largest of anything with NaN is NaN
        row, output = (~(scores_BC < torch.inf)).nonzero()[0].tolist()
        raise DataError(
            f"evaluation: the score of sample {row} of the batch for output {output} is {scores_BC[row, output]}; "
            "the network diverged or its checkpoint is damaged"
        )
    for row, labels in enumerate(label_outputs):
        for label in labels:
            if not 0 <= label < num_classes:
                raise DataError(
                    f"evaluation: sample {row} of the batch has the label {label}, expected an output in "
                    f"[0, {num_classes}); is its shard older or newer than the taxonomy?"
                )


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _fraction(count: float, total: int) -> float:
    return count / total if total else float("nan")


def _to_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_to_json(inner) for inner in value.tolist()]
    return None if isinstance(value, float) and np.isnan(value) else value
