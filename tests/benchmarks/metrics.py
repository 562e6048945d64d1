"""Average precision in two passes: time at a million samples of 5,000 classes, memory at 100,000 classes, and the paper's size.

python tests/benchmarks/metrics.py

One thread, in seconds of the processor, which others on the machine do not lengthen as much as those of the clock. Scores are
drawn block by block; what drawing takes is measured apart and taken off. Nothing here has been run at the paper's size
(5 million test images, 20 verticals of 5,000 classes): such rows say that they are extrapolated.
"""

from collections.abc import Callable, Iterator

import numpy as np
from measure import Comparison, cpu_seconds, measure_mb, publish, take_best

from concentration.metrics.average_precision import average_precision_of_pairs
from concentration.metrics.evaluation import CPU, measure_kept_bytes
from concentration.metrics.ranking import MeanAveragePrecisionAtK
from concentration.metrics.streaming_average_precision import StreamingAveragePrecision
from concentration.metrics.vertical_samples import KeptSamples, StreamedSamples

NUM_SAMPLES, NUM_CLASSES, BLOCK = 1_000_000, 5_000, 4_000
#: What fits in memory twice.
NUM_KEPT = 20_000
PAPER_SAMPLES, PAPER_VERTICALS = 5_000_000, 20
PAPER_CLASSES = PAPER_VERTICALS * NUM_CLASSES
#: By how many standard deviations a positive scores higher: of a good network, and of one that knows nothing.
GOOD, USELESS = 4.0, 0.0

Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    seconds = time_two_passes()
    good, useless = compare_kept(GOOD, "a good network"), compare_kept(USELESS, "one that knows nothing")
    all_three, best_50 = compare_all_three(), compare_best_50()
    num_scores = NUM_SAMPLES * NUM_CLASSES
    kept_seconds = good.reference * num_scores / 1e9
    comparisons = [
        Comparison(f"{NUM_SAMPLES:,} samples of {NUM_CLASSES:,} classes", "s", seconds, kept_seconds,
                   f"EXTRAPOLATED: 20 GB of scores kept, from {NUM_KEPT:,} samples"),
        good,
        useless,
        all_three,
        best_50,
        compare_memory(),
        extrapolate("all that `evaluate` asks of 20 verticals", PAPER_SAMPLES * NUM_CLASSES, all_three.ours),
        extrapolate("mAP@50, all classes of all samples", PAPER_SAMPLES * PAPER_CLASSES, best_50.ours),
        extrapolate("AP, all classes of all samples", PAPER_SAMPLES * PAPER_CLASSES, 1e9 * seconds / num_scores),
    ]  # fmt: skip
    publish("metrics", "Average precision of every class, one thread", comparisons)


class Drawing:
    """Scores of any number of samples, the same in every pass: fixed noise, a level for each sample, and its positive on top."""

    def __init__(self, good_by: float):
        self._good_by = np.float32(good_by)
        self._noise_BV = np.random.default_rng(0).standard_normal((BLOCK, NUM_CLASSES), dtype=np.float32)
        self._scores_BV = np.empty_like(self._noise_BV)

    def blocks(self, num_samples: int) -> Iterator[Block]:
        """Scores (B, V), in an array that the next block is drawn into, and pairs: one class of each sample."""
        row_B = np.arange(BLOCK)
        for number in range(num_samples // BLOCK):
            generator = np.random.default_rng([1, number])
            level_B1 = generator.normal(0, 0.3, (BLOCK, 1)).astype(np.float32)
            column_B = generator.integers(0, NUM_CLASSES, BLOCK)
            np.add(self._noise_BV, level_B1, out=self._scores_BV)
            self._scores_BV[row_B, column_B] += self._good_by
            yield self._scores_BV, row_B, column_B


def time_two_passes() -> float:
    """Seconds of both passes over a million samples of a good network, without drawing them."""
    drawing = Drawing(GOOD)

    def draw() -> None:
        for _ in drawing.blocks(NUM_SAMPLES):
            pass

    def see_twice() -> None:
        metric = StreamingAveragePrecision(NUM_CLASSES)
        for block in drawing.blocks(NUM_SAMPLES):
            metric.update(*block)
        metric.begin_second_pass()
        for block in drawing.blocks(NUM_SAMPLES):
            metric.update(*block)
        assert np.isfinite(metric.compute()).all()

    return cpu_seconds(see_twice) - 2 * cpu_seconds(draw)


def compare_kept(good_by: float, whose: str) -> Comparison:
    """What fits in memory, both ways, on the same arrays."""
    scores_NV, row_N, column_N = keep(good_by)

    def see_twice() -> np.ndarray:
        metric = StreamingAveragePrecision(NUM_CLASSES)
        metric.update(scores_NV, row_N, column_N)
        metric.begin_second_pass()
        metric.update(scores_NV, row_N, column_N)
        return metric.compute()

    def look_at_kept() -> np.ndarray:
        return average_precision_of_pairs(scores_NV, row_N, column_N)

    np.testing.assert_array_equal(see_twice(), look_at_kept())
    ours, kept = time_both(see_twice, look_at_kept, scores_NV.size)
    return Comparison(f"{NUM_KEPT:,} x {NUM_CLASSES:,}, {whose}", "ns a score", ours, kept, "scores kept, in turns")


def keep(good_by: float) -> Block:
    blocks = [tuple(array.copy() for array in block) for block in Drawing(good_by).blocks(NUM_KEPT)]
    rows = [row + BLOCK * number for number, (_, row, _) in enumerate(blocks)]
    return (
        np.concatenate([scores for scores, _, _ in blocks]),
        np.concatenate(rows),
        np.concatenate([column for *_, column in blocks]),
    )


def compare_all_three() -> Comparison:
    """What `evaluate` computes of a vertical: AP, AP of the log-softmax in float64, AP of direct labels; batches of 256."""
    scores_NV, row_N, column_N = keep(GOOD)
    is_direct = np.ones(256, dtype=bool)

    def show(samples: KeptSamples | StreamedSamples) -> None:
        for first in range(0, len(scores_NV), 256):
            batch = slice(first, first + 256)
            scores_BV = scores_NV[batch].copy()
            samples.add(scores_BV, row_N[batch] - first, column_N[batch], is_direct[: len(scores_BV)])

    def see_twice() -> None:
        samples = StreamedSamples(NUM_CLASSES, rows_per_block=2048)
        show(samples)
        samples.begin_second_pass()
        show(samples)
        samples.compute_ap(CPU)

    def see_once() -> None:
        samples = KeptSamples(NUM_CLASSES)
        show(samples)
        samples.compute_ap(CPU)

    ours, kept = time_both(see_twice, see_once, scores_NV.size)
    return Comparison("all that `evaluate` asks of a vertical", "ns a score", ours, kept, "scores kept, in turns")


def compare_best_50() -> Comparison:
    """mAP@50, which takes one pass and every class of every sample."""
    drawing, num_samples = Drawing(GOOD), NUM_SAMPLES // 5
    metric = MeanAveragePrecisionAtK(NUM_CLASSES, k=50)

    def draw(update: Callable[..., None]) -> None:
        for block in drawing.blocks(num_samples):
            update(*block)

    drawing_seconds = cpu_seconds(lambda: draw(lambda *_: None))
    seconds = cpu_seconds(lambda: draw(metric.update)) - drawing_seconds
    num_scores = num_samples * NUM_CLASSES
    return Comparison("mAP@50 beside it, one pass", "ns a score", 1e9 * seconds / num_scores,
                      1e9 * drawing_seconds / num_scores, "drawing the scores")  # fmt: skip


def compare_memory() -> Comparison:
    """5 million positives of 100,000 classes; they lie in few samples here, whose number memory does not know."""
    num_rows, num_batches = 1000, 2
    generator = np.random.default_rng(0)
    scores_BC = generator.standard_normal((num_rows, PAPER_CLASSES), dtype=np.float32)
    pairs = [
        np.unique(generator.integers(0, scores_BC.size, int(1.026 * PAPER_SAMPLES / num_batches)))
        for _ in range(num_batches)
    ]
    num_positives = sum(len(pair) for pair in pairs)
    assert num_positives > 0.99 * PAPER_SAMPLES

    def see_twice() -> None:
        metric = StreamingAveragePrecision(PAPER_CLASSES)
        for number in range(2 * num_batches):
            if number == num_batches:
                metric.begin_second_pass()
            metric.update(scores_BC, *np.divmod(pairs[number % num_batches], PAPER_CLASSES))
        metric.compute()

    per_vertical = [PAPER_SAMPLES // PAPER_VERTICALS] * PAPER_VERTICALS
    kept_mb = measure_kept_bytes([NUM_CLASSES] * PAPER_VERTICALS, per_vertical) / 1e6
    return Comparison(f"memory, {PAPER_CLASSES:,} classes, {num_positives:,} positives", "MB", measure_mb(see_twice), kept_mb,
                      "scores of 5M samples kept in their verticals (computed)")  # fmt: skip


def extrapolate(what: str, num_scores: int, ns_per_score: float) -> Comparison:
    minutes, measured_minutes = (ns_per_score * count / 60e9 for count in (num_scores, NUM_SAMPLES * NUM_CLASSES))
    return Comparison(f"EXTRAPOLATED to 5M images: {what}", "minutes", minutes, measured_minutes,
                      f"the rate measured above, for {NUM_SAMPLES:,} x {NUM_CLASSES:,}")  # fmt: skip


def time_both(ours: Callable[[], object], reference: Callable[[], object], num_scores: int) -> tuple[float, float]:
    """Nanoseconds a score, taking turns."""
    sides = {"ours": lambda: cpu_seconds(ours), "reference": lambda: cpu_seconds(reference)}
    best = take_best(sides, num_turns=2)
    return 1e9 * best["ours"] / num_scores, 1e9 * best["reference"] / num_scores


if __name__ == "__main__":
    main()
