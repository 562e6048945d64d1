"""Building an index, and seeking to the middle of an epoch of 100 million samples.

python tests/benchmarks/order.py
"""

import tempfile
from pathlib import Path

import numpy as np
import webdataset
from data import TAXONOMY, draw_photograph, encode_jpeg, write_split
from measure import Comparison, measure_mb, publish, time_in_turns, time_once

from concentration.data.index import index_shard
from concentration.data.order import WindowOrder

NUM_SHARDS, SAMPLES_PER_SHARD = 10_000, 10_000
EPOCH, BATCH_SIZE = 3, 1024


def main() -> None:
    comparisons = [compare_indexing(), *compare_seeking()]
    publish("order", "The index and the order", comparisons)


def compare_indexing() -> Comparison:
    """Walking a shard's headers and labels, against reading all of it."""
    with tempfile.TemporaryDirectory() as folder:
        images = [encode_jpeg(draw_photograph((500, 375), seed, 3.2)) for seed in range(8)]
        split = write_split(Path(folder, "shards"), images, num_samples=2_000, num_shards=1)
        path = split.shards[0].path
        seconds = time_in_turns(
            {
                "ours": lambda: index_shard(path, TAXONOMY, path.name),
                "webdataset": lambda: sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False).decode()),
            }
        )
    ours, reference = (len(split) / seconds[name] for name in ("ours", "webdataset"))
    return Comparison("index of a shard", "samples/s", ours, reference, "WebDataset(...) over the whole shard")


def compare_seeking() -> list[Comparison]:
    """The first batch that a run resumed in the middle of an epoch asks for, with the order built anew."""
    num_samples = NUM_SHARDS * SAMPLES_PER_SHARD
    shards = [range(n * SAMPLES_PER_SHARD, (n + 1) * SAMPLES_PER_SHARD) for n in range(NUM_SHARDS)]
    places = np.arange(num_samples // 2, num_samples // 2 + BATCH_SIZE)

    def seek_with_ours() -> np.ndarray:
        return WindowOrder(shards, seed=0, window_shards=16).take(EPOCH, places)

    def seek_with_a_permutation() -> np.ndarray:
        return np.random.default_rng(EPOCH).permutation(num_samples)[places]

    ours = time_in_turns({"ours": seek_with_ours}, num_turns=5)["ours"]
    order = WindowOrder(shards, seed=0, window_shards=16)
    order.take(EPOCH, places)
    next_ms = 1000 * time_once(lambda: order.take(EPOCH, places + BATCH_SIZE))
    seek_ms, permute_ms = 1000 * ours, 1000 * time_once(seek_with_a_permutation)
    reference_is = "numpy's permutation of all samples"
    return [
        Comparison(f"seeking into {num_samples:,} samples", "ms", seek_ms, permute_ms, reference_is),
        Comparison("its memory", "MB", measure_mb(seek_with_ours), measure_mb(seek_with_a_permutation), reference_is),
        Comparison(f"the next {BATCH_SIZE} samples", "ms", next_ms, seek_ms, "our seeking"),
    ]


if __name__ == "__main__":
    main()
