"""Soft targets: what top-K keeps and leaves out, and files that come back exactly or are refused by name."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concentration.errors import DataError
from concentration.targets import (
    SoftTargets,
    TargetRecords,
    keep_top_k,
    load_arrays,
    load_metadata,
    write_atomically,
)


def make_records(**changes: np.ndarray) -> TargetRecords:
    arrays = {
        "row": np.array([0, 2, 5], dtype=np.int32),
        "index": np.array([[3, 0], [9, 4], [1, 2]], dtype=np.uint16),
        "probability": np.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]], dtype=np.float16),
        "tail": np.array([0.25, 0.0, 3.0], dtype=np.float16),
    }
    return TargetRecords(**{**arrays, **changes})


def save(directory: Path, records: TargetRecords) -> Path:
    path = directory / "train-000000.safetensors"
    records.save(path, {"codec": "plain"})
    return path


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, database=None)
def test_top_k_is_the_head_of_a_dense_sort_and_the_tail_mass_is_the_rest(num_samples, vertical_size, top_k, seed):
    probability_BV = torch.rand(num_samples, vertical_size, generator=torch.Generator().manual_seed(seed))
    index_BK, probability_BK, tail_B = keep_top_k(probability_BV, top_k)
    falling = np.sort(probability_BV.double().numpy(), axis=1)[:, ::-1]
    np.testing.assert_array_equal(probability_BK.double().numpy(), falling[:, :top_k])
    np.testing.assert_array_equal(probability_BV.gather(1, index_BK), probability_BK)
    np.testing.assert_allclose(tail_B, falling[:, top_k:].sum(1), rtol=1e-6, atol=1e-9)
    assert index_BK.dtype == torch.int64
    assert all(len(set(row)) == min(top_k, vertical_size) for row in index_BK.tolist())


def test_a_k_larger_than_the_vertical_keeps_every_class_and_leaves_no_tail():
    probability_BV = torch.rand(4, 7)
    index_BK, probability_BK, tail_B = keep_top_k(probability_BV, 100)
    assert index_BK.shape == probability_BK.shape == (4, 7)
    assert index_BK.sort().values.tolist() == [list(range(7))] * 4
    assert tail_B.tolist() == [0.0] * 4


def test_the_tail_mass_is_not_drowned_by_what_was_kept():
    # In float32, 1000 + 1e-6 is 1000: the difference of two such sums would be 0.
    probability_BV = torch.cat([torch.ones(1, 1000), torch.full((1, 1), 1e-6)], dim=1)
    torch.testing.assert_close(keep_top_k(probability_BV, 1000)[2], torch.tensor([1e-6]))


def test_a_class_that_is_listed_twice_counts_with_the_sum_and_padding_with_nothing():
    targets = SoftTargets(
        torch.tensor([[2, 1, 2, 0], [0, 3, 0, 0]]), torch.tensor([[0.25, 0.5, 0.5, 0], [0.75, 1, 0, 0]])
    )
    assert targets.dense(5).tolist() == [[0, 0.5, 0.75, 0, 0], [0.75, 0, 0, 1, 0]]


def test_hard_labels_become_ones_whatever_their_number():
    targets = SoftTargets.from_labels([(4, 1), (), (0,)])
    assert targets.index_BK.dtype == torch.int64
    assert targets.dense(5).tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert SoftTargets.from_labels([(), ()]).dense(3).tolist() == [[0] * 3] * 2
    assert SoftTargets.from_labels([]).dense(3).shape == (0, 3)


def test_targets_move_with_both_their_tensors():
    targets = SoftTargets.from_labels([(1,)]).to("meta")
    assert targets.index_BK.device.type == targets.probability_BK.device.type == "meta"


def test_records_come_back_as_they_were(tmp_path):
    records = make_records()
    loaded = TargetRecords.load(save(tmp_path, records), vertical_size=10)
    for name in ("row", "index", "probability", "tail"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(records, name))
        assert getattr(loaded, name).dtype == getattr(records, name).dtype
    assert load_metadata(tmp_path / "train-000000.safetensors") == {"codec": "plain"}


def test_no_rows_are_records_too(tmp_path):
    nothing = TargetRecords.from_tensors(
        np.arange(0), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0), 10
    )
    assert TargetRecords.load(save(tmp_path, nothing), vertical_size=10).index.shape == (0, 3)


def test_numpy_reads_a_file_in_three_lines(tmp_path):
    path = save(tmp_path, make_records())
    # What somebody without this package writes:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    first = dict(zip(arrays["index"][0].tolist(), arrays["probability"][0].tolist(), strict=True))
    assert first == pytest.approx({3: 0.9, 0: 0.1}, rel=2**-11)


def test_probabilities_keep_eleven_bits_and_indices_all(tmp_path):
    probability_BV = torch.rand(20, 300, generator=torch.Generator().manual_seed(0)) ** 8  # some are tiny
    index_RK, probability_RK, tail_R = keep_top_k(probability_BV, 50)
    records = TargetRecords.from_tensors(np.arange(20), index_RK, probability_RK, tail_R, 300)
    loaded = TargetRecords.load(save(tmp_path, records), vertical_size=300)
    np.testing.assert_array_equal(loaded.index, index_RK)
    np.testing.assert_allclose(loaded.probability.astype(np.float64), probability_RK, rtol=2**-11, atol=2**-25)
    np.testing.assert_allclose(loaded.tail.astype(np.float64), tail_R, rtol=2**-11)


@pytest.mark.parametrize(
    ("vertical_size", "index_type"), [(5_000, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (10**6, np.uint32)]
)
def test_large_class_indices_survive_the_file(tmp_path, vertical_size, index_type):
    # Peers' bugs: 40,000 is negative as a signed 16-bit number, and no half-precision number above 2,048 is exact.
    kept = [i for i in (0, 2_049, 4_999, 32_768, 40_000, 65_535, 65_536, 999_999) if i < vertical_size]
    records = TargetRecords.from_tensors(
        np.arange(1), torch.tensor([kept]), torch.ones(1, len(kept)), torch.zeros(1), vertical_size
    )
    loaded = TargetRecords.load(save(tmp_path, records), vertical_size)
    assert loaded.index.dtype == index_type
    assert loaded.index.astype(np.int64).tolist() == [kept]


def test_a_tail_mass_beyond_float16_is_kept_as_its_largest_number(tmp_path):
    records = TargetRecords.from_tensors(
        np.arange(1), torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([5e5]), vertical_size=10**6
    )
    assert TargetRecords.load(save(tmp_path, records), 10**6).tail.tolist() == [65504.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([[3, 0], [10, 4], [1, 2]], np.uint16)}, "class index 10 in a vertical of 10 classes"),
        ({"index": np.array([[3, 0], [-1, 4], [1, 2]], np.int64)}, "indices are int64, expected uint16 or uint32"),
        ({"probability": np.full((3, 2), np.nan, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.full((3, 2), 1.001, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.full((3, 2), -0.1, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.zeros((3, 1), np.float16)}, "have different lengths"),
        ({"row": np.arange(2, dtype=np.int32)}, "have different lengths"),
        ({"tail": np.zeros(4, np.float16)}, "have different lengths"),
        ({"tail": np.array([0, np.nan, 0], np.float16)}, "a tail mass is negative or not finite"),
        ({"tail": np.array([0, -1, 0], np.float16)}, "a tail mass is negative or not finite"),
    ],
)
def test_records_that_cannot_be_targets_are_refused_by_name(tmp_path, changes, message):
    path = save(tmp_path, make_records(**changes))
    with pytest.raises(DataError, match=rf"train-000000\.safetensors: .*{message}"):
        TargetRecords.load(path, vertical_size=10)


def test_a_file_that_is_cut_anywhere_is_refused_by_name(tmp_path):
    path = save(tmp_path, make_records())
    whole = path.read_bytes()
    for num_bytes in range(len(whole)):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(DataError, match=r"train-000000\.safetensors: damaged"):
            TargetRecords.load(path, vertical_size=10)
        with pytest.raises(DataError, match=r"train-000000\.safetensors: damaged"):
            load_metadata(path)


def test_a_missing_file_or_array_is_named_with_what_was_found(tmp_path):
    with pytest.raises(DataError, match=r"absent\.safetensors: no such file"):
        TargetRecords.load(tmp_path / "absent.safetensors", vertical_size=10)
    with pytest.raises(DataError, match=r"absent\.safetensors: no such file"):
        load_metadata(tmp_path / "absent.safetensors")
    path = save(tmp_path, make_records())
    with pytest.raises(DataError, match=r"lacks view, found .*row"):
        load_arrays(path, ("row", "view"))


@pytest.mark.parametrize("stops_in", ["fsync", "replace"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, stops_in, interruption):
    path = save(tmp_path, make_records())

    def stop(*_):
        raise interruption

    monkeypatch.setattr(os, stops_in, stop)
    with contextlib.suppress(KeyboardInterrupt, DataError):
        make_records(tail=np.ones(3, np.float16)).save(path, {})
        pytest.fail("the write was not interrupted")
    monkeypatch.undo()
    np.testing.assert_array_equal(TargetRecords.load(path, vertical_size=10).tail, make_records().tail)
    make_records(tail=np.ones(3, np.float16)).save(path, {})
    np.testing.assert_array_equal(TargetRecords.load(path, vertical_size=10).tail, [1, 1, 1])
    assert [file.name for file in tmp_path.iterdir()] == ["train-000000.safetensors"]  # no litter


def test_a_write_that_the_system_refuses_is_an_error_that_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"x\.json: cannot be written \((File exists|Not a directory)\)"):
        write_atomically(tmp_path / "file" / "x.json", {})

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"x\.json: cannot be written \(No space left on device\); free space"):
        write_atomically(tmp_path / "x.json", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]  # no half file, and no temporary one


def test_bytes_text_and_mappings_are_written_into_new_directories(tmp_path):
    for content, expected in ((b"\x00\xff", b"\x00\xff"), ("größe", "größe".encode())):
        write_atomically(tmp_path / "new" / "deep" / "file", content)
        assert (tmp_path / "new" / "deep" / "file").read_bytes() == expected
    write_atomically(tmp_path / "file.json", {"a": ["größe"]})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": ["größe"]}
