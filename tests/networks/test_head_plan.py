"""Which rank holds which classes: every class once, evenly, and the same in every process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concentration.errors import ConfigError
from concentration.networks.head_plan import Part, plan_shards


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 8))
def test_every_class_is_held_once_and_every_rank_holds_something(sizes, world_size):
    if sum(sizes) < world_size:
        return
    plan = plan_shards(sizes, world_size)
    held = [(part.vertical, place) for parts in plan for part in parts for place in range(part.start, part.stop)]
    assert sorted(held) == [(vertical, place) for vertical, size in enumerate(sizes) for place in range(size)]
    assert len(plan) == world_size
    for parts in plan:
        verticals = [part.vertical for part in parts]
        assert verticals
        assert verticals == sorted(set(verticals)), "a vertical twice, or out of order"
    # No piece is larger than an even share (rounded up), so the greedy rule keeps every rank under two of them.
    share = -(-sum(sizes) // world_size)
    assert max(sum(map(len, parts)) for parts in plan) < 2 * share or share == 1
    assert plan_shards(sizes, world_size) == plan


def test_verticals_stay_whole_where_ranks_come_out_even_so():
    assert plan_shards([5, 4, 3, 2], 2) == [
        [Part(0, 0, 5), Part(3, 0, 2)],
        [Part(1, 0, 4), Part(2, 0, 3)],
    ]


def test_a_vertical_of_more_than_an_even_share_is_cut():
    assert plan_shards([90, 10, 2], 3) == [
        [Part(0, 0, 30), Part(2, 0, 2)],
        [Part(0, 30, 60), Part(1, 0, 10)],
        [Part(0, 60, 90)],
    ] or plan_shards([90, 10, 2], 3) == [
        [Part(0, 0, 30), Part(1, 0, 10)],
        [Part(0, 30, 60), Part(2, 0, 2)],
        [Part(0, 60, 90)],
    ]


def test_one_rank_holds_all():
    assert plan_shards([3, 1], 1) == [[Part(0, 0, 3), Part(1, 0, 1)]]


def test_fewer_classes_than_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"3 classes for 4 processes.*use fewer processes"):
        plan_shards([2, 1], 4)
