"""What `prepare` says of images that lie in two splits, nearly: a network is then tested on what it was trained on.

Shapes: N samples of all splits, P pairs.
"""

import csv
import functools
import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from concentration.data.image_hashes import hash_shard, load_hashes, read_images
from concentration.data.near_duplicates import HASH_BITS, NearDuplicates, WholeImage, find_near_duplicates
from concentration.data.shard_cache import load_cache
from concentration.data.split import Split
from concentration.data.views import decode_view
from concentration.files import write_atomically
from concentration.progress import Progress
from concentration.stages.task_pool import run_tasks

#: In `shards/`: the pairs, and the first of them side by side.
PAIRS_TABLE, PAIRS_PICTURE = "near_duplicates.csv", "near_duplicates.png"

NUM_PAIRS_DRAWN = 12

# The report's colours on paper.
_PAPER, _INK, _SOFT = "#fcfcfa", "#1c1f26", "#5c636e"
_PAIRS_A_ROW = 3
_PAIR_INCHES, _IMAGE_INCHES, _IMAGE_PIXELS = (4.1, 3.0), 1.9, 192
_KEY_WIDTH, _KEY_LINES = 27, 4
_DPI = 120


class Sample(NamedTuple):
    """One side of a pair."""

    split: Split
    ordinal: int

    @property
    def key(self) -> str:
        return self.split.key(self.ordinal)


class Pair(NamedTuple):
    """Two samples of different splits whose hashes differ in `distance` bits."""

    left: Sample
    right: Sample
    distance: int


def forget_near_duplicates(directory: Path) -> None:
    """Removes what an earlier look found."""
    for name in (PAIRS_TABLE, PAIRS_PICTURE):
        (directory / name).unlink(missing_ok=True)


def hash_splits(splits: Mapping[str, Split], num_processes: int | None) -> None:
    """Makes the hashes that are not there: those of shards that were prepared without them."""
    tasks, sizes = [], []
    for split in splits.values():
        cache = load_cache(split)
        for name, size in zip(split.index_names, np.diff(split.shard_start).tolist(), strict=True):
            if not (split.directory / f"{name}.hashes").exists():
                tasks.append(functools.partial(hash_shard, split.directory / f"{name}.index", cache))
                sizes.append(size)
    if tasks:
        with Progress("hash", sum(sizes), "images") as progress:
            run_tasks(tasks, sizes, num_processes, progress)


def report_near_duplicates(splits: Mapping[str, Split], max_distance: int, advice: str) -> dict:
    """Looks for near-duplicates, says what was found, writes it, and returns the facts.

    Args:
        splits: all of a prepared set; their images are hashed.
        max_distance: see `find_near_duplicates`.
        advice: what may be done about them.
    """
    names, directory = list(splits), splits["train"].directory
    hashes = [load_hashes(split) for split in splits.values()]
    is_hashed_N = np.concatenate([is_hashed for _, is_hashed in hashes])
    split_N = np.repeat(np.arange(len(names)), [len(split) for split in splits.values()])
    hash_N = np.concatenate([hashed for hashed, _ in hashes])
    sample_of_hashed = np.flatnonzero(is_hashed_N)
    found = find_near_duplicates(hash_N[is_hashed_N], split_N[is_hashed_N], max_distance)
    pairs = _list_pairs(sample_of_hashed[found.sample_P2], found.distance_P, list(splits.values()))
    if pairs:
        write_atomically(directory / PAIRS_TABLE, _write_table(pairs))
        write_atomically(directory / PAIRS_PICTURE, draw_pairs(_choose_drawn(pairs)))
    num_unhashed = int(np.count_nonzero(~is_hashed_N))
    for line in _describe(found, list(splits.values()), len(pairs), num_unhashed, max_distance, advice):
        print(f"prepare: {line}")
    twins: dict[str, dict[str, int]] = {}
    for (left, right), (_, num_right) in found.num_twins.items():
        twins.setdefault(names[right], {})[names[left]] = num_right
    return {
        "max_distance": max_distance,
        "pairs": found.num_pairs,
        "images_with_twin": twins,
        "images_without_hash": num_unhashed,
        "comparisons_left_out": found.num_left_out,
    }


def draw_pairs(pairs: Sequence[Pair]) -> bytes:
    """A PNG of pairs side by side with their keys; images are square, as they were compared.

    Raises:
        DataError: a shard cannot be read.
    """
    import matplotlib.figure  # here, because it takes long and is needed once

    width, height = _PAIRS_A_ROW * _PAIR_INCHES[0], -(-len(pairs) // _PAIRS_A_ROW) * _PAIR_INCHES[1]
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=_DPI, facecolor=_PAPER)
    for number, pair in enumerate(pairs):
        row, column = divmod(number, _PAIRS_A_ROW)
        left, top = column * _PAIR_INCHES[0] + 0.15, height - row * _PAIR_INCHES[1] - 0.1
        style = {"va": "top", "parse_math": False, "fontsize": 8}
        bits = f"{pair.distance} of {HASH_BITS} bits differ"
        figure.text(left / width, top / height, bits, color=_INK, weight="bold", **style)
        for sample in (pair.left, pair.right):
            box = (left / width, (top - 0.2 - _IMAGE_INCHES) / height, _IMAGE_INCHES / width, _IMAGE_INCHES / height)
            axes = figure.add_axes(box)
            axes.imshow(_read_pixels(sample))
            axes.axis("off")
            text = f"{sample.split.name}\n{_break_lines(sample.key)}"
            figure.text(left / width, box[1] - 0.04 / height, text, color=_SOFT, family="monospace", **style)
            left += _IMAGE_INCHES + 0.05
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font has all scripts: some keys become boxes
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _list_pairs(sample_P2: np.ndarray, distance_P: np.ndarray, splits: Sequence[Split]) -> list[Pair]:
    """Samples are numbered through all splits."""
    start = np.cumsum([0, *(len(split) for split in splits)])

    def find(sample: int) -> Sample:
        number = int(np.searchsorted(start, sample, side="right")) - 1
        return Sample(splits[number], sample - int(start[number]))

    rows = zip(sample_P2.tolist(), distance_P.tolist(), strict=True)
    return [Pair(find(left), find(right), distance) for (left, right), distance in rows]


def _choose_drawn(pairs: Sequence[Pair]) -> list[Pair]:
    """The nearest of every two splits, in turn."""
    by_splits = [
        list(group) for _, group in itertools.groupby(pairs, lambda p: (p.left.split.name, p.right.split.name))
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_splits))
    return list(itertools.islice(filter(None, turns), NUM_PAIRS_DRAWN))


def _write_table(pairs: Sequence[Pair]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["split_1", "key_1", "split_2", "key_2", "distance"])
    for left, right, distance in pairs:
        writer.writerow([left.split.name, left.key, right.split.name, right.key, distance])
    return table.getvalue()


def _describe(
    found: NearDuplicates, splits: Sequence[Split], num_listed: int, num_unhashed: int, max_distance: int, advice: str
) -> list[str]:
    lines = [
        f"{num_right} of {len(splits[right])} images of {splits[right].name} have a near copy in {splits[left].name}"
        for (left, right), (_, num_right) in found.num_twins.items()
        if num_right
    ]
    if lines:
        listed = f"{num_listed} of {found.num_pairs} pairs" if num_listed < found.num_pairs else "the pairs"
        lines.append(f"{listed} are in {splits[0].directory / PAIRS_TABLE}, some drawn beside it; {advice}")
    else:
        lines.append(f"no image has a near copy in another split (data.near_duplicates={max_distance})")
    if num_unhashed:
        lines.append(f"{num_unhashed} images were not compared: they are blank, or cannot be decoded")
    if found.num_left_out:
        lines.append(
            f"some near copies may not be found: too many images look alike, and {found.num_left_out} comparisons were "
            "left out; a smaller data.near_duplicates needs fewer"
        )
    return lines


def _read_pixels(sample: Sample) -> np.ndarray:
    number = sample.split.shard_of(sample.ordinal)
    row = sample.ordinal - int(sample.split.shard_start[number])
    (content,) = read_images(sample.split.shards[number], range(row, row + 1), load_cache(sample.split))
    return decode_view(content, WholeImage(), 0, _IMAGE_PIXELS)[0].transpose(1, 2, 0)


def _break_lines(key: str) -> str:
    kept = key if len(key) <= _KEY_WIDTH * _KEY_LINES else f"{key[: _KEY_WIDTH * _KEY_LINES - 1]}…"
    return "\n".join(kept[start : start + _KEY_WIDTH] for start in range(0, len(kept), _KEY_WIDTH))
