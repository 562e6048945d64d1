"""The index of a shard for a taxonomy from which verticals were removed. The shard itself stays as it is.

Shapes: C classes of the earlier taxonomy, L labels of the earlier index, R samples of the new one.
"""

from collections.abc import Sequence

import numpy as np

from concentration.data.index import ShardIndex
from concentration.taxonomy import Taxonomy


def map_positions(before: Taxonomy, after: Taxonomy) -> np.ndarray:
    """(C,) int32: the position of each earlier class in the new taxonomy; -1 if it is not there."""
    return np.array([after.position.get(c.id, -1) for c in before.classes], dtype=np.int32)


def find_kept_rows(index: ShardIndex, position_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R,) the rows, ascending, whose samples have labels in the new taxonomy, and (R,) how many labels each has there.

    Args:
        position_C: from `map_positions`.
    """
    sample_L = np.repeat(np.arange(index.num_samples), np.diff(index.label_start))
    return np.unique(sample_L[position_C[index.label_position] >= 0], return_counts=True)


def regroup_index(index: ShardIndex, position_C: np.ndarray) -> ShardIndex | None:
    """The index of the samples that have labels in the new taxonomy, with these labels; None if there is no such sample.

    Args:
        position_C: from `map_positions`.
    """
    rows, counts = find_kept_rows(index, position_C)
    if not len(rows):
        return None
    mapped_L = position_C[index.label_position]
    keys: Sequence[bytes] = index.key_bytes.tobytes().split(b"\n")
    return ShardIndex(
        path=index.path if isinstance(index.path, str) else index.path.resolve(),
        size_bytes=index.size_bytes,
        key_bytes=np.frombuffer(b"\n".join(keys[row] for row in rows), dtype=np.uint8),
        image_offset=index.image_offset[rows],
        image_size=index.image_size[rows],
        image_crc32=index.image_crc32[rows],
        label_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        label_position=mapped_L[mapped_L >= 0],
    )
