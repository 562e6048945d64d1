"""Splits: nothing moves when samples come, no group is torn, and each split is as large as it is asked to be."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concentration.data.split_assignment import SPLITS, SplitConfig, assign_splits
from concentration.errors import ConfigError
from concentration.schema import parse_config


@dataclass(frozen=True)
class Sample:
    key: str
    labels: tuple[str, ...]
    split: str = "train"
    group: str | None = None


def split_all(samples, kept=None, **options) -> dict[str, str]:
    assignment = assign_splits(samples, parse_config(SplitConfig, options), kept or {})
    return {sample.key: split for sample, split in zip(samples, assignment.splits, strict=True)}


@st.composite
def draw_samples(draw, own_splits=("train",)) -> list[Sample]:
    count = draw(st.integers(1, 60))
    labels = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map(tuple)
    groups = st.one_of(st.none(), st.integers(0, 12).map(str))
    return [Sample(f"k{n}", draw(labels), draw(st.sampled_from(own_splits)), draw(groups)) for n in range(count)]


CONFIGS = st.sampled_from(
    [
        {},
        {"val_share": 0.3, "test_share": 0.4},
        {"test_per_class": 2},
        {"val_per_class": 1, "test_per_class": 3},
        {"val_share": 0.5, "test_per_class": 2},
    ]
)


@given(draw_samples(), CONFIGS)
def test_a_group_lies_in_one_split(samples, options):
    split_of = split_all(samples, **options)
    for group in {sample.group for sample in samples} - {None}:
        assert len({split_of[sample.key] for sample in samples if sample.group == group}) == 1
    assert assign_splits(samples, parse_config(SplitConfig, options), {}).num_torn == 0


@given(draw_samples(), CONFIGS, st.data())
def test_what_is_prepared_stays_when_samples_come_and_go_and_new_members_join_their_group(samples, options, data):
    first = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique_by=lambda sample: sample.key))
    earlier = split_all(first, **options)
    later = split_all(samples, earlier, **options)
    assert {key: later[key] for key in earlier} == earlier
    for sample in samples:
        friends = {earlier[other.key] for other in first if other.group == sample.group}
        if sample.group is not None and friends:
            assert {later[sample.key]} == friends
    gone = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique_by=lambda sample: sample.key))
    assert split_all(gone, later, **options) == {sample.key: later[sample.key] for sample in gone}


@given(draw_samples(), st.permutations(range(60)), CONFIGS)
def test_the_order_of_the_listing_does_not_matter(samples, order, options):
    shuffled = [samples[place] for place in order if place < len(samples)]
    assert split_all(shuffled, **options) == split_all(samples, **options)


@given(draw_samples(), st.data())
def test_shares_need_no_memory_to_stay_as_they_are(samples, data):
    some = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique_by=lambda sample: sample.key))
    options = {"val_share": 0.3, "test_share": 0.3}
    assert split_all(some, **options).items() <= split_all(samples, **options).items()


@given(draw_samples(own_splits=SPLITS), CONFIGS)
def test_what_the_source_gives_is_kept_and_only_what_it_lacks_is_cut_off_its_training_samples(samples, options):
    given_splits = {sample.split for sample in samples}
    config = parse_config(SplitConfig, options)
    if any(config.asks_for(split) for split in given_splits & {"val", "test"}):
        with pytest.raises(ConfigError, match=r"the source has its own (val|test), so that .* have no effect"):
            assign_splits(samples, config, {})
        return
    split_of = split_all(samples, **options)
    for sample in samples:
        if sample.split == "train":
            assert split_of[sample.key] == "train" or split_of[sample.key] not in given_splits
        else:
            assert split_of[sample.key] == sample.split


def test_an_own_split_does_not_draw_its_groups_out_of_training_and_torn_groups_are_counted():
    """A photographer with one image in the validation set would take all of his training images there."""
    samples = [Sample("a", ("x",), "val", "ann"), *(Sample(f"b{n}", ("x",), "train", "ann") for n in range(9))]
    samples += [Sample("c", ("x",), "train", "bob"), Sample("d", ("x",), "val", "cid")]
    assignment = assign_splits(samples, SplitConfig(test_share=0), {})
    assert assignment.splits == ["val", *["train"] * 10, "val"]
    assert assignment.num_torn == 1


@pytest.mark.parametrize("has_groups", [False, True])
def test_shares_converge_to_what_was_asked_for(has_groups):
    samples = [Sample(f"k{n}", ("a",), group=f"g{n // 3}" if has_groups else None) for n in range(12_000)]
    splits = list(split_all(samples, val_share=0.2, test_share=0.3).values())
    num_groups = 4_000 if has_groups else 12_000
    for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        assert abs(splits.count(split) / 12_000 - share) < 4 * (share * (1 - share) / num_groups) ** 0.5
    halves = [sum(1 for split in splits[start : start + 6_000] if split == "test") for start in (0, 6_000)]
    assert abs(halves[0] - halves[1]) < 500, "no part of the listing is another's test"
    assert list(split_all(samples).values()).count("val") in range(1000, 1400), "a tenth where nothing is said"


@given(draw_samples(), st.integers(1, 4), st.integers(1, 4))
def test_every_class_has_its_number_or_would_lose_its_last_training_group(samples, num_val, num_test):
    config = SplitConfig(val_per_class=num_val, test_per_class=num_test)
    assignment = assign_splits(samples, config, {})

    def groups_of(label: str, split: str) -> set[str]:
        chosen = zip(samples, assignment.splits, strict=True)
        return {sample.group or sample.key for sample, found in chosen if label in sample.labels and found == split}

    for label in {label for sample in samples for label in sample.labels}:
        assert groups_of(label, "train"), f"{label} has lost its last training group"
    for split, count in (("val", num_val), ("test", num_test)):
        found = {label: 0 for sample in samples for label in sample.labels}
        for sample, where in zip(samples, assignment.splits, strict=True):
            for label in sample.labels:
                found[label] += where == split
        assert assignment.short_of[split] == sorted(label for label in found if found[label] < count)
    # A class is short only because each training group that could be taken holds some class's last one.
    for label in assignment.short_of["val"]:
        for group in groups_of(label, "train"):
            others = {other for s in samples if (s.group or s.key) == group for other in s.labels}
            assert any(len(groups_of(other, "train")) == 1 for other in others)


def test_a_class_has_exactly_its_number_where_samples_are_single_and_many():
    samples = [Sample(f"{label}{n}", (label,)) for label in "abc" for n in range(200)]
    split_of = split_all(samples, val_per_class=10, test_per_class=50)
    for label in "abc":
        found = [split for key, split in split_of.items() if key[0] == label]
        assert [found.count(split) for split in SPLITS] == [140, 10, 50]


def test_a_key_and_a_group_of_the_same_text_are_two_groups():
    samples = [Sample("x", ("a",)), *(Sample(f"k{n}", ("a",), group="x") for n in range(3))]
    kept = {"k0": "test"}
    assert split_all(samples, kept, val_share=0, test_share=0)["x"] == "train"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"test_share": 0.2, "test_per_class": 5}, r"test_share=0\.2 and test_per_class=5: give one of them"),
        ({"val_share": 0.6, "test_share": 0.6}, "more than all samples"),
        ({"val_per_class": 0}, "val_per_class=0"),
        ({"test_shares": 0.1}, "did you mean 'test_share'"),
    ],
)
def test_what_contradicts_itself_is_refused(options, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config(SplitConfig, options)


def test_a_prepared_sample_stays_also_where_the_source_or_its_group_says_otherwise_now():
    samples = [Sample("a", ("x",), "test"), Sample("b", ("x",), group="g"), Sample("c", ("x",), group="g")]
    kept = {"a": "val", "b": "test", "c": "val"}
    assert split_all([*samples, Sample("d", ("x",), group="g")], kept) == {**kept, "d": "val"}


def test_a_prepared_sample_of_an_own_split_does_not_draw_later_training_samples_there():
    samples = [Sample("a", ("x",), "val", "ann"), Sample("b", ("x",), "train", "ann")]
    assert split_all(samples, {"a": "val"}, test_share=0) == {"a": "val", "b": "train"}


def test_all_but_one_group_of_a_class_may_be_taken():
    samples = [Sample(f"k{n}", ("x",), group=f"g{n // 2}") for n in range(6)]
    splits = list(split_all(samples, val_share=0, test_per_class=4).values())
    assert [splits.count(split) for split in SPLITS] == [2, 0, 4]


def test_samples_without_a_group_are_counted_where_groups_are_asked_for_and_something_is_cut_off():
    samples = [
        Sample("a", ("x",), "train", "ann"),
        Sample("b", ("x",), "train", None),
        Sample("c", ("x",), "val", None),
    ]
    for options, more, expected in (({"group": "who"}, (), 1), ({}, (), 0), ({"group": "who"}, ("test",), 0)):
        given = [*samples, *(Sample(split, ("x",), split, None) for split in more)]
        assert assign_splits(given, parse_config(SplitConfig, options), {}).num_ungrouped == expected
