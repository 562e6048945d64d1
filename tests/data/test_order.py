"""The order is a pure function of seed and epoch: against a slow reference, by properties, and by golden values."""

import collections
import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concentration.data.order import (
    ClassBalancedOrder,
    SequentialOrder,
    WindowOrder,
    permutation,
    random_bits,
    uniforms,
)

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)
SEEDS = st.integers(0, 2**31)
EPOCHS = st.integers(0, 1000)

GOLDEN_BITS = [4601426282380248549, 7383581503616084783, 15724360586833778554]
GOLDEN_PERMUTATION = [8, 1, 7, 11, 0, 2, 6, 10, 5, 3, 9, 4]
GOLDEN_UNIFORMS = [0.9803820160630934, 0.09521124783056711, 0.7739363138136303]
GOLDEN_ORDER = [[12, 7, 10, 8, 13, 9, 11, 3, 4, 1, 0, 5, 6, 2], [8, 13, 10, 12, 9, 7, 11, 4, 2, 6, 1, 0, 5, 3]]
GOLDEN_BALANCED = [5, 7, 5, 1, 5, 7, 0, 2, 7, 8, 6, 5]


def number_through(sizes: list[int], first: int = 0) -> list[np.ndarray]:
    """The ordinals of shards of these sizes."""
    bounds = np.cumsum([first, *sizes])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(bounds)]


def mix_slowly(*keys: int) -> int:
    """SplitMix64's finaliser after each key, in Python's integers."""
    mask = 2**64 - 1
    bits = 0x9E3779B97F4A7C15
    for key in keys:
        bits = ((bits ^ (key & mask)) + 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        bits = bits ^ (bits >> 31)
    return bits


def order_slowly(shards: list[np.ndarray], seed: int, window_shards: int, epoch: int) -> list[int]:
    """A whole epoch as the docstring tells it: shards permuted, windows of a few, samples permuted inside."""
    shards = [list(shard) for shard in shards if len(shard)]
    shards = [shards[n] for n in sorted(range(len(shards)), key=lambda n: mix_slowly(seed, 1, epoch, n))]
    epoch_order = []
    for window, first in enumerate(range(0, len(shards), window_shards)):
        samples = list(itertools.chain(*shards[first : first + window_shards]))
        places = sorted(range(len(samples)), key=lambda n: mix_slowly(seed, 1, epoch, window, n))
        epoch_order.extend(int(samples[place]) for place in places)
    return epoch_order


def take_all(order, epoch: int) -> list[int]:
    return order.take(epoch, np.arange(len(order))).tolist()


@given(SIZES, SEEDS, st.integers(1, 9), EPOCHS)
def test_every_sample_comes_exactly_once_an_epoch(sizes, seed, window_shards, epoch):
    order = WindowOrder(number_through(sizes, first=3), seed, window_shards)
    assert len(order) == sum(sizes)
    assert sorted(take_all(order, epoch)) == list(range(3, 3 + sum(sizes)))


@given(SIZES, SEEDS, st.integers(1, 9), EPOCHS)
def test_the_order_is_the_slow_one(sizes, seed, window_shards, epoch):
    shards = number_through(sizes)
    assert take_all(WindowOrder(shards, seed, window_shards), epoch) == order_slowly(shards, seed, window_shards, epoch)


@given(SIZES, SEEDS, st.integers(1, 9), st.data())
def test_the_order_does_not_depend_on_how_it_is_asked_for(sizes, seed, window_shards, data):
    """Any places, in any batches, of epochs in any turn, give what a fresh object gives for the whole epoch."""
    shards = number_through(sizes)
    asked = WindowOrder(shards, seed, window_shards)
    whole = {epoch: take_all(WindowOrder(shards, seed, window_shards), epoch) for epoch in (0, 1)}
    for _ in range(4):
        epoch = data.draw(st.integers(0, 1))
        places = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12))
        taken = asked.take(epoch, np.array(places, dtype=np.int64))
        assert taken.tolist() == [whole[epoch][place] for place in places]


@given(SIZES, SEEDS, st.integers(1, 4), EPOCHS)
def test_a_window_holds_all_samples_of_its_shards_and_no_other(sizes, seed, window_shards, epoch):
    shards = number_through(sizes)
    owner = {ordinal: number for number, shard in enumerate(shards) for ordinal in shard.tolist()}
    left = take_all(WindowOrder(shards, seed, window_shards), epoch)
    num_left = sum(size > 0 for size in sizes)
    seen = set()
    while left:
        # The window's shards are those of its samples: read on until as many shards are complete.
        counts: collections.Counter = collections.Counter()
        window = set()
        while len(window) < min(window_shards, num_left) or any(counts[n] < sizes[n] for n in window):
            number = owner[left.pop(0)]
            assert number not in seen
            counts[number] += 1
            window.add(number)
            assert len(window) <= window_shards
        seen |= window
        num_left -= len(window)


def test_epochs_and_seeds_differ():
    shards = number_through([40, 40, 40])
    orders = [
        tuple(take_all(WindowOrder(shards, seed, 2), epoch)) for seed, epoch in itertools.product(range(4), range(4))
    ]
    assert len(set(orders)) == len(orders)
    first_shards = {order[0] // 40 for order in orders}
    assert first_shards == {0, 1, 2}, "the order of shards differs, too"


def test_seeking_touches_one_window_alone():
    class Watched:
        """Stands for a shard's ordinals; remembers that it was read."""

        def __init__(self, start: int):
            self.ordinals = np.arange(start, start + 10)
            self.was_read = False

        def __len__(self) -> int:
            return 10

        def __array__(self, dtype=None, copy=None):
            self.was_read = True
            return self.ordinals

    expected = take_all(WindowOrder(number_through([10] * 500), 7, 4), 5)
    for place in (0, 2345, 4999):
        shards = [Watched(10 * number) for number in range(500)]
        order = WindowOrder(shards, 7, 4)
        assert not any(shard.was_read for shard in shards)
        assert order.take(5, np.array([place])).tolist() == [expected[place]]
        assert sum(shard.was_read for shard in shards) == 4


@given(SIZES, SEEDS, st.integers(1, 9), EPOCHS)
def test_ranges_are_ordered_as_the_arrays_of_their_samples(sizes, seed, window_shards, epoch):
    arrays = number_through(sizes)
    ranges = [range(int(bound), int(bound) + size) for bound, size in zip(np.cumsum([0, *sizes]), sizes, strict=False)]
    expected = take_all(WindowOrder(arrays, seed, window_shards), epoch)
    assert take_all(WindowOrder(ranges, seed, window_shards), epoch) == expected


def test_seeking_in_100_million_samples_takes_milliseconds_and_megabytes():
    """25,000 shards of 4,000; the bounds are ten times what was measured."""
    tracemalloc.start()
    started = time.process_time()
    shards = [range(start, start + 4000) for start in range(0, 100_000_000, 4000)]
    order = WindowOrder(shards, seed=3, window_shards=16)
    built = time.process_time()
    taken = order.take(7, np.arange(50_000_000, 50_000_256))
    seconds = time.process_time() - built
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) == 100_000_000
    assert len(set(taken.tolist())) == 256
    assert len({ordinal // 4000 for ordinal in taken.tolist()}) <= 16
    print(f"built in {built - started:.4f} s, sought in {seconds:.4f} s, {peak_bytes / 2**20:.1f} MiB")
    assert seconds < 0.5
    assert peak_bytes < 100 * 2**20


@given(SIZES, SEEDS, st.integers(1, 4), st.integers(0, 3))
def test_stretches_follow_each_other_and_hold_the_shards_of_their_samples(sizes, seed, window_shards, epoch):
    shard_start = np.cumsum([0, *sizes])
    orders = [
        WindowOrder(number_through(sizes), seed, window_shards),
        SequentialOrder(np.arange(sum(sizes))),
        SequentialOrder(permutation(sum(sizes), seed)),
        ClassBalancedOrder(number_through(sizes), sum(sizes), seed),
    ]
    for order, at_once in zip(orders, (window_shards, 1, 1, len(sizes)), strict=True):
        ordinals, place = take_all(order, epoch), 0
        while place < len(order):
            stretch = order.stretch_at(epoch, place, shard_start)
            assert place < stretch.stop <= len(order)
            assert len(set(stretch.shards)) == len(stretch.shards) <= at_once
            read = np.searchsorted(shard_start, ordinals[place : stretch.stop], side="right") - 1
            if isinstance(order, ClassBalancedOrder):
                assert set(read.tolist()) <= set(stretch.shards)
            else:
                assert set(read.tolist()) == set(stretch.shards)
            for inside in range(place, stretch.stop):
                assert order.stretch_at(epoch, inside, shard_start).stop == stretch.stop
            place = stretch.stop


def test_random_bits_are_splitmix64_of_the_keys():
    keys = [(0,), (1, 2, 3), (2**31, 0, 5), (2**62, 7), (-1, 4)]
    assert [int(random_bits(*key)) for key in keys] == [mix_slowly(*key) for key in keys]
    counters = np.arange(50)
    assert random_bits(9, counters, 4).tolist() == [mix_slowly(9, n, 4) for n in range(50)]
    assert random_bits(9, counters, counters[::-1]).tolist() == [mix_slowly(9, n, 49 - n) for n in range(50)]


def test_golden_values_hold_for_ever():
    """Whoever changes these changes the samples of every run that is to be resumed, and the splits of every source."""
    assert [int(bits) for bits in random_bits(0, 1, np.arange(3))] == GOLDEN_BITS
    assert permutation(12, 3, 1).tolist() == GOLDEN_PERMUTATION
    assert uniforms(5, 100, 0, np.arange(3)).tolist() == GOLDEN_UNIFORMS
    order = WindowOrder(number_through([4, 3, 5, 2]), seed=11, window_shards=2)
    assert [take_all(order, epoch) for epoch in (0, 1)] == GOLDEN_ORDER
    balanced = ClassBalancedOrder(number_through([5, 1, 3]), length=12, seed=11)
    assert take_all(balanced, 0) == GOLDEN_BALANCED


def test_permutations_are_even():
    counts = collections.Counter(tuple(permutation(4, 17, key).tolist()) for key in range(4800))
    assert len(counts) == 24
    assert is_even(np.array(list(counts.values())))


@pytest.mark.parametrize("varied", range(4))
def test_uniforms_are_even_along_every_key(varied):
    keys = [3, 1, 4, 1]
    keys[varied] = np.arange(16_000)
    drawn = uniforms(*keys)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert is_even(np.bincount((drawn * 64).astype(int), minlength=64))
    # Neighbours are independent: pairs fill the square evenly.
    cells = (drawn[:-1] * 8).astype(int) * 8 + (drawn[1:] * 8).astype(int)
    assert is_even(np.bincount(cells, minlength=64))


def test_uniforms_of_two_purposes_are_independent():
    ordinals = np.arange(16_000)
    cells = (uniforms(0, 100, 2, ordinals) * 8).astype(int) * 8 + (uniforms(0, 101, 2, ordinals) * 8).astype(int)
    assert is_even(np.bincount(cells, minlength=64))


def test_class_balanced_draws_classes_evenly_and_each_its_own_samples_evenly():
    ordinals_by_class = [np.arange(100), np.array([], dtype=np.int64), np.array([100]), np.arange(101, 105)]
    order = ClassBalancedOrder(ordinals_by_class, length=9000, seed=2)
    assert len(order) == 9000
    counts = np.bincount(take_all(order, 0), minlength=105)
    assert is_even(np.array([counts[:100].sum(), counts[100], counts[101:].sum()]))
    assert is_even(counts[:100])
    assert is_even(counts[101:])
    assert counts.sum() == 9000, "no other sample is drawn"


@given(SIZES, SEEDS, st.data())
def test_class_balanced_does_not_depend_on_how_it_is_asked_for(sizes, seed, data):
    ordinals_by_class = number_through(sizes)
    whole = take_all(ClassBalancedOrder(ordinals_by_class, 50, seed), 3)
    places = data.draw(st.lists(st.integers(0, 49), max_size=12))
    taken = ClassBalancedOrder(ordinals_by_class, 50, seed).take(3, np.array(places, dtype=np.int64))
    assert taken.tolist() == [whole[place] for place in places]


def test_class_balanced_epochs_differ():
    order = ClassBalancedOrder(number_through([30, 30]), length=40, seed=0)
    assert take_all(order, 0) != take_all(order, 1)


def test_sequential_keeps_the_order_that_it_is_given():
    ordinals = np.array([4, 9, 2])
    order = SequentialOrder(ordinals)
    assert len(order) == 3
    assert take_all(order, 0) == take_all(order, 8) == [4, 9, 2]
    assert order.take(0, np.array([2, 0])).tolist() == [2, 4]


def is_even(counts: np.ndarray) -> bool:
    """Whether counts fit a uniform distribution: chi-square within five standard deviations of its mean."""
    expected = counts.sum() / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
