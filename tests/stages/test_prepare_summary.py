"""The summary of a prepared data set against counts by hand and one sample at a time, and a picture that can be looked at."""

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concentration.data.index import ShardIndex
from concentration.data.split import Split
from concentration.stages.prepare_summary import draw_summary, summarise_splits
from concentration.taxonomy import Taxonomy, TaxonomyClass

TRAIN = [["gull"]] * 5 + [["osprey", "taxi"], ["taxi"], ["egg", "gull"], ["ramen"], ["raptor"], ["gull", "osprey"]]
TEST = [["taxi"], ["soup", "ramen"]]

TEXT = """\
vertical  classes  leaves  train  test  min  median  max  no image
------------------------------------------------------------------
birds           5       2      9     0    1       2    7         0
cars            3       2      2     1    0       1    2         1
dishes          3       2      2     1    1       1    1         0
------------------------------------------------------------------
all            11       6     11     2    0       1    7         1

Training images of a class: min, median, max; no image: neither its own nor a descendant's.
The largest 10% of the classes have 50.0% of the training labels.
"""


def build_split(taxonomy: Taxonomy, labels: list[list[str]], name: str = "train") -> Split:
    positions = [sorted(taxonomy.position[label] for label in ids) for ids in labels]
    starts = np.cumsum([0] + [len(ids) for ids in labels])
    return index_labels(taxonomy, starts, np.array(list(itertools.chain(*positions)), dtype=np.int32), name)


def index_labels(taxonomy: Taxonomy, starts: np.ndarray, positions: np.ndarray, name: str = "train") -> Split:
    """A split of one shard of which nothing is known but its labels."""
    nowhere = np.zeros(len(starts) - 1, dtype=np.int64)
    keys = np.empty(0, dtype=np.uint8)
    index = ShardIndex(Path("a.tar"), 0, keys, nowhere, nowhere, nowhere.astype(np.uint32), starts, positions)
    return Split(name, [index], [f"{name}-000000"], taxonomy, Path())


def build_taxonomy(names: list[str], size: int = 12) -> Taxonomy:
    return Taxonomy([TaxonomyClass(f"{name}{n}", f"{n}", (), name) for name in names for n in range(size)])


def look_at(content: bytes) -> np.ndarray:
    """(height, width, 3) pixels of a PNG."""
    assert content.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def count_color(content: bytes, color: tuple[int, int, int]) -> int:
    return int((look_at(content) == color).all(2).sum())


def test_the_text_holds_the_numbers(taxonomy):
    """Counted by hand: raptor is an inner node with an image of its own; bird, seabird, car and soup have none.

    The counted classes have 7, 2, 2, 1, 1, 1 and 0 (tram) images: the first of seven has 7 of 14 labels.
    """
    splits = {"train": build_split(taxonomy, TRAIN), "test": build_split(taxonomy, TEST, "test")}
    assert summarise_splits(splits).to_text() == TEXT


def test_on_a_terminal_the_largest_of_many_verticals_are_shown():
    taxonomy = build_taxonomy([f"v{n}-" for n in range(30)] + ["n" * 200], 2)
    labels = [[c.id] for n, c in enumerate(taxonomy.classes) for _ in range(62 - n)]
    summary = summarise_splits({"train": build_split(taxonomy, labels)})
    lines = summary.to_text(20).splitlines()
    assert [line.split()[0] for line in lines[2:22]] == [f"v{n}-" for n in range(20)]
    assert lines[22] == "(11 more verticals)"
    assert max(map(len, lines)) <= 100
    whole = summary.to_text().splitlines()
    assert "n" * 200 in whole[32]
    assert [line for line in whole if "more" in line] == []
    assert summary.to_text(31).splitlines()[32].startswith("n" * 27 + "… ")


@given(st.integers(0, 2**31), st.booleans())
def test_counts_are_those_of_looking_at_every_sample(taxonomy, seed, has_one_label):
    generator = np.random.default_rng(seed)
    ids = [c.id for c in taxonomy.classes]
    kept = generator.choice(ids, generator.integers(1, len(ids)), replace=False)  # the others have no image

    def draw() -> list[str]:
        count = 1 if has_one_label else generator.integers(1, min(4, len(kept)) + 1)
        return generator.choice(kept, count, replace=False).tolist()

    labels = {name: [draw() for _ in range(generator.integers(1, 12))] for name in ("train", "val")}
    summary = summarise_splits({name: build_split(taxonomy, drawn, name) for name, drawn in labels.items()})
    parents = {parent for c in taxonomy.classes for parent in c.parents}
    vertical_of = {c.id: c.vertical for c in taxonomy.classes}
    counts = {class_id: sum(class_id in drawn for drawn in labels["train"]) for class_id in ids}
    smeared = {
        taxonomy.class_of_output(output).id
        for drawn in labels["train"]
        for output in taxonomy.smear([taxonomy.output(label) for label in drawn])
    }
    for group in [*summary.verticals, summary.total]:
        inside = [class_id for class_id in ids if group.name in ("all", vertical_of[class_id])]
        assert group.num_leaves == sum(class_id not in parents for class_id in inside)
        assert group.num_classes == len(inside)
        for name, drawn in labels.items():
            assert group.num_samples[name] == sum(bool(set(of_sample) & set(inside)) for of_sample in drawn)
        counted = [counts[class_id] for class_id in inside if class_id not in parents or counts[class_id]]
        assert group.train_counts.tolist() == sorted(counted, reverse=True)
        assert group.num_without_image == sum(class_id not in smeared for class_id in inside)
    assert [group.name for group in summary.verticals] == list(taxonomy.verticals)


@pytest.mark.parametrize(
    ("counts", "share"), [([1] * 20, 0.1), ([100] + [1] * 9, 100 / 109), ([3, 2, 1], 0.5), ([50, 50] + [0] * 18, 1.0)]
)
def test_the_imbalance_is_the_share_of_the_largest_tenth(counts, share):
    taxonomy = build_taxonomy(["a"], len(counts) + (len(counts) < 2))
    labels = [[f"a{n}"] for n, count in enumerate(counts) for _ in range(count)]
    assert summarise_splits({"train": build_split(taxonomy, labels)}).total.largest_share == pytest.approx(share)


@pytest.mark.parametrize("num_verticals", [1, 2, 7, 8, 30])
def test_a_picture_has_a_bar_for_every_vertical(num_verticals):
    taxonomy = build_taxonomy([f"v{n}-" for n in range(num_verticals)])
    labels = [[c.id] for n, c in enumerate(taxonomy.classes) for _ in range(1 + n % 5)]
    content = draw_summary(summarise_splits({"train": build_split(taxonomy, labels)}))
    left = look_at(content)[:, :720]
    paper = left[0, 0]
    assert paper.tolist() == [0xFC, 0xFC, 0xFA]
    bar_column = left[:, 150].astype(int)  # all bars start left of it, since names are short
    is_bar = np.abs(bar_column - paper).max(1) > 60
    is_bar[:30] = False  # the title
    assert np.count_nonzero(np.diff(is_bar.astype(int)) == 1) == num_verticals
    assert count_color(content, (0x1C, 0x1F, 0x26)) > 500, "the line of all classes"


def test_a_picture_of_many_verticals_fits_a_screen_and_has_the_largest():
    def draw(names: list[str]) -> np.ndarray:
        taxonomy = build_taxonomy(names)
        labels = [[c.id] for c in taxonomy.classes for _ in range(3 if c.vertical.startswith("large") else 1)]
        return look_at(draw_summary(summarise_splits({"train": build_split(taxonomy, labels)})))

    names = [f"large {n:02}-" for n in range(40)]
    many = draw([*(f"small {n}-" for n in range(160)), *names])
    assert many.shape == draw(names).shape
    assert many.shape[0] < 1600


@pytest.mark.parametrize("counts", [[1, 1], [0, 1], [0, 10**6], [10, 10], [999, 1000], [7, 0]])
def test_any_counts_can_be_drawn(counts):
    taxonomy = build_taxonomy(["a"], 2)
    positions = np.repeat([0, 1], counts).astype(np.int32)
    summary = summarise_splits({"train": index_labels(taxonomy, np.arange(len(positions) + 1), positions)})
    assert count_color(draw_summary(summary), (0x1C, 0x1F, 0x26)) > 500
    assert summary.total.num_without_image == counts.count(0)


def test_names_are_drawn_as_they_are():
    """Not as mathematics, where one dollar is an error, nor hidden for an underscore, nor as a warning about fonts."""
    pictures = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a$b$ $", "鳥類", "_private", "n" * 200, "private"):
            taxonomy = build_taxonomy([name, "z"])
            content = draw_summary(
                summarise_splits({"train": build_split(taxonomy, [[c.id] for c in taxonomy.classes])})
            )
            pictures.append(look_at(content))
    assert {picture.shape for picture in pictures} == {pictures[0].shape}
    is_bar = (pictures[3] == (0x35, 0x53, 0xC9)).all(2)
    assert is_bar.any(0).sum() > 150, "a long name leaves room for its bar"


def test_a_hundred_thousand_classes_and_a_million_labels_are_counted_at_once():
    taxonomy = build_taxonomy([f"v{n}-" for n in range(20)], 5_000)
    positions = np.random.default_rng(0).integers(0, 90_000, 10**6).astype(np.int32)
    starts = np.concatenate([np.arange(0, 10**6, 2), [10**6]])
    summary = summarise_splits({"train": index_labels(taxonomy, starts, positions)})
    assert summary.total.train_counts.sum() == 10**6
    assert summary.total.num_samples == {"train": 500_000}
    assert summary.verticals[19].num_without_image == 5_000
    vertical_L = positions.astype(int) // 5_000
    pair_S2 = vertical_L.reshape(-1, 2)
    expected = [int((pair_S2 == number).any(1).sum()) for number in range(20)]
    assert [group.num_samples["train"] for group in summary.verticals] == expected
