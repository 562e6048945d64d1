"""Stored soft targets: records a second and bytes, packed and plain.

python tests/benchmarks/records.py
"""

import time
from collections.abc import Callable

import numpy as np
from measure import Comparison, publish, take_best, time_in_turns

from concentration.packed_targets import PackedLayout, pack, unpack

NUM_RECORDS, NUM_KEPT, VERTICAL_SIZE, BATCH_SIZE = 4000, 100, 5000, 128


def main() -> None:
    layout = PackedLayout(VERTICAL_SIZE, NUM_KEPT)
    index_RK, probability_RK, tail_R = draw_teacher()
    record_RB = pack(layout, index_RK, probability_RK, tail_R)
    plain = narrow(index_RK, probability_RK, tail_R)
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, NUM_RECORDS, BATCH_SIZE) for _ in range(50)]
    whole = [np.arange(NUM_RECORDS)]

    def unpack_rows(rows: np.ndarray) -> None:
        unpack(layout, record_RB[rows])

    def widen_rows(rows: np.ndarray) -> None:
        _ = [array[rows].astype(kind) for array, kind in zip(plain, (np.uint32, np.float32, np.float32), strict=True)]

    comparisons = []
    for what, lists in (("a shard of 4,000 records", whole), (f"{BATCH_SIZE} rows anywhere in it", batches)):
        seconds = take_best(
            {
                "ours": lambda lists=lists: time_each(unpack_rows, lists),
                "plain": lambda lists=lists: time_each(widen_rows, lists),
            },
            num_turns=20,
        )
        rates = {name: len(lists[0]) / value for name, value in seconds.items()}
        comparisons.append(
            Comparison(f"reading {what}", "records/s", rates["ours"], rates["plain"], "plain arrays, widened")
        )
    seconds = time_in_turns(
        {
            "ours": lambda: pack(layout, index_RK, probability_RK, tail_R),
            "plain": lambda: narrow(index_RK, probability_RK, tail_R),
        }
    )
    rates = {name: NUM_RECORDS / value for name, value in seconds.items()}
    comparisons += [
        Comparison("writing a shard", "records/s", rates["ours"], rates["plain"], "plain arrays, narrowed"),
        Comparison("a record", "bytes", layout.record_bytes, sum(a[0].nbytes for a in plain), "plain arrays"),
        *compare_errors(layout, record_RB, index_RK, probability_RK),
    ]
    publish("records", f"Soft targets of K={NUM_KEPT} of {VERTICAL_SIZE:,} classes, one thread", comparisons)


def draw_teacher() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K best sigmoids of a teacher that is sure of a class or two, and knows a hundred that it could be."""
    generator = np.random.default_rng(0)
    logit_RV = generator.normal(-9, 2, (NUM_RECORDS, VERTICAL_SIZE))
    logit_RV[np.arange(NUM_RECORDS), generator.integers(0, VERTICAL_SIZE, NUM_RECORDS)] = generator.normal(
        3, 2, NUM_RECORDS
    )
    probability_RV = 1 / (1 + np.exp(-logit_RV))
    index_RK = np.argpartition(-probability_RV, NUM_KEPT, axis=1)[:, :NUM_KEPT]
    probability_RK = np.take_along_axis(probability_RV, index_RK, axis=1)
    return index_RK, probability_RK.astype(np.float32), probability_RV.sum(1) - probability_RK.sum(1)


def narrow(*arrays: np.ndarray) -> list[np.ndarray]:
    """As `codec=plain` keeps indices, probabilities and tails."""
    return [array.astype(kind) for array, kind in zip(arrays, (np.uint16, np.float16, np.float16), strict=True)]


def compare_errors(
    layout: PackedLayout, record_RB: np.ndarray, index_RK: np.ndarray, probability_RK: np.ndarray
) -> list[Comparison]:
    true_RK = np.take_along_axis(probability_RK, np.argsort(index_RK, axis=1), axis=1).astype(np.float64)
    packed_RK = np.abs(unpack(layout, record_RB)[1] - true_RK)
    plain_RK = np.abs(true_RK.astype(np.float16) - true_RK)
    return [
        Comparison(f"{name} error of a probability", "1", float(fold(packed_RK)), float(fold(plain_RK)), "float16")
        for name, fold in (("largest", np.max), ("mean", np.mean))
    ]


def time_each(call: Callable[[np.ndarray], object], lists: list[np.ndarray]) -> float:
    """Seconds of one call in the mean."""
    started = time.perf_counter()
    for rows in lists:
        call(rows)
    return (time.perf_counter() - started) / len(lists)


if __name__ == "__main__":
    main()
