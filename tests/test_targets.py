"""Soft targets: what top-K keeps and leaves out, and files that come back exactly or are refused by name."""

import dataclasses
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concentration.array_files import load_arrays, load_metadata
from concentration.errors import ConfigError, DataError
from concentration.targets import SoftTargets, TargetFile, TargetRecords, count_target_bytes, keep_top_k


def make_records(**changes: np.ndarray) -> TargetRecords:
    arrays = {
        "row": np.array([0, 2, 5]),
        "index": np.array([[3, 0], [9, 4], [1, 2]]),
        "probability": np.array([[0.875, 0.125], [0.5, 0.5], [1.0, 0.0]], dtype=np.float32),
        "tail": np.array([0.25, 0.0, 3.0], dtype=np.float32),
    }
    return TargetRecords(**{**arrays, **changes})


def save(directory: Path, records: TargetRecords, codec: str = "plain", vertical_size: int = 10) -> Path:
    path = directory / "train-000000.safetensors"
    records.save(path, codec, vertical_size)
    return path


def read_all(path: Path, vertical_size: int = 10, num_kept: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    file = TargetFile(path, vertical_size, num_kept)
    return file.read(np.arange(len(file.row) * file.num_views))


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


def test_hard_labels_are_taken_from_any_lists_of_whole_numbers():
    expected = SoftTargets.from_labels([[4], [1]])
    several = ([(4,), {1}], torch.tensor([[4], [1]]), np.array([[4], [1]]), [torch.tensor([4]), [np.int64(1)]])
    for labels in several:
        assert torch.equal(SoftTargets.from_labels(labels).index_BK, expected.index_BK)


@pytest.mark.parametrize(
    "outputs",
    [3, torch.tensor(3), np.int64(3), [1.5], torch.tensor([1.0]), [True, False], np.array([True]), "ab", ["a"], None, [-1]],
)  # fmt: skip
def test_what_is_no_list_of_labels_is_refused_by_its_place(outputs):
    with pytest.raises(DataError, match=r"labels\[1\] is .*; expected a list of output indices from 0 on"):
        SoftTargets.from_labels([[0], outputs])


@pytest.mark.parametrize("outputs", [[3, 3], torch.tensor([0, 1, 0, 0])])
def test_a_label_that_comes_twice_is_refused(outputs):
    """It would have the target 2; and a row of zeros and ones would be taken for the classes 0 and 1."""
    with pytest.raises(DataError, match=r"labels\[0\] is .*, with an index twice; expected each once"):
        SoftTargets.from_labels([outputs])


def test_a_background_is_added_to_every_class_of_its_vertical():
    background_BM = torch.tensor([[0.125, 0.25]])
    targets = SoftTargets(torch.tensor([[1, 3]]), torch.tensor([[0.5, -0.25]]), background_BM)
    assert targets.dense(2, 3).tolist() == [[0.125, 0.625, 0.25, 0, 0.25]]


def test_targets_move_with_all_their_tensors():
    targets = SoftTargets.from_labels([(1,)]).to("meta")
    assert targets.index_BK.device.type == targets.probability_BK.device.type == "meta"
    assert targets.background_BM is targets.weight_BM is None
    targets = dataclasses.replace(targets, background_BM=torch.ones(1, 1), weight_BM=torch.ones(1, 1)).to("meta")
    assert targets.background_BM.device.type == targets.weight_BM.device.type == "meta"


def test_records_come_back_as_they_were(tmp_path):
    records = make_records()
    path = save(tmp_path, records)
    assert TargetFile(path, 10, 2).row.tolist() == [0, 2, 5]
    for found, expected in zip(read_all(path), (records.index, records.probability, records.tail), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert load_metadata(path).items() >= {"codec": "plain", "num_kept": "2", "vertical_size": "10"}.items()


@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_any_records_are_read_in_any_order_with_the_views_of_each(codec, tmp_path):
    generator = np.random.default_rng(0)
    num_rows, num_views, num_kept, vertical_size = 7, 3, 5, 40
    num_records = num_rows * num_views
    index = np.sort(np.stack([generator.permutation(vertical_size)[:num_kept] for _ in range(num_records)]), axis=1)
    records = TargetRecords(
        np.arange(num_rows) * 2,
        index,
        generator.uniform(0.01, 0.99, index.shape).astype(np.float32),
        generator.uniform(0, 2, num_records).astype(np.float32),
        generator.integers(0, 256, (num_records, 13), dtype=np.uint8),
    )
    file = TargetFile(save(tmp_path, records, codec, vertical_size), vertical_size, num_kept)
    assert file.num_views == num_views
    whole = file.read(np.arange(num_records))
    asked = np.array([20, 3, 3, 0])
    for part, all_of_it in zip(file.read(asked), whole, strict=True):
        np.testing.assert_array_equal(part, all_of_it[asked])
    np.testing.assert_array_equal(file.read_views(asked), records.view[asked])
    np.testing.assert_array_equal(whole[0], index)
    np.testing.assert_allclose(whole[1], records.probability, atol=0.02)
    np.testing.assert_allclose(whole[2], records.tail, rtol=2**-10)


def test_packed_records_take_no_more_than_200_bytes_of_the_disk(tmp_path):
    """K=100 in a vertical of 5,000 classes, with a stored view; the header is shared by a shard's records."""
    num_records = 2000
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(num_records, 5000, generator=generator).topk(100).indices.numpy()
    probability = torch.rand(num_records, 100, generator=generator).numpy()
    view = np.pad(np.full((num_records, 10), 7, dtype=np.uint8), ((0, 0), (0, 3)))
    for view_or_none in (None, view):
        records = TargetRecords(
            np.arange(num_records), index, probability, np.ones(num_records, np.float32), view_or_none
        )
        path = save(tmp_path, records, "packed", 5000)
        assert path.stat().st_size / num_records <= 200


@pytest.mark.parametrize("has_colours", [False, True])
def test_views_without_colours_of_their_own_take_ten_bytes(tmp_path, has_colours):
    """As in files of before views had them, which so are read as they are."""
    records = make_records()
    view = np.random.default_rng(0).integers(1, 256, (len(records.index), 13), dtype=np.uint8)
    view[:, 10:] *= has_colours
    path = save(tmp_path, dataclasses.replace(records, view=view))
    assert safetensors.numpy.load_file(path)["view"].shape[1] == (13 if has_colours else 10)
    file = TargetFile(path, 10, records.index.shape[1])
    np.testing.assert_array_equal(file.read_views(np.arange(len(view))), view)


def test_nothing_of_a_file_is_read_before_it_is_asked_for(tmp_path):
    file = TargetFile(save(tmp_path, make_records()), 10, 2)
    for array in file._arrays.values():
        while isinstance(array, np.ndarray):
            array = array.base
        assert isinstance(array, mmap.mmap)


def test_no_rows_are_records_too(tmp_path):
    nothing = TargetRecords(np.arange(0), np.zeros((0, 2), int), np.zeros((0, 2), np.float32), np.zeros(0, np.float32))
    assert read_all(save(tmp_path, nothing))[0].shape == (0, 2)


def test_numpy_reads_a_file_in_three_lines(tmp_path):
    path = save(tmp_path, make_records())
    # What somebody without this package writes:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    first = dict(zip(arrays["index"][0].tolist(), arrays["probability"][0].tolist(), strict=True))
    assert first == {3: 0.875, 0: 0.125}


def test_probabilities_keep_eleven_bits_and_indices_all(tmp_path):
    probability_BV = torch.rand(20, 300, generator=torch.Generator().manual_seed(0)) ** 8  # some are tiny
    index_RK, probability_RK, tail_R = (part.numpy() for part in keep_top_k(probability_BV, 50))
    path = save(tmp_path, TargetRecords(np.arange(20), index_RK, probability_RK, tail_R), "plain", 300)
    index, probability, tail = read_all(path, 300, 50)
    np.testing.assert_array_equal(index, index_RK)
    np.testing.assert_allclose(probability, probability_RK, rtol=2**-11, atol=2**-25)
    np.testing.assert_allclose(tail, tail_R, rtol=2**-11)


@pytest.mark.parametrize(
    ("vertical_size", "index_type"), [(5_000, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (10**6, np.uint32)]
)
@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_large_class_indices_and_rows_survive_the_file(codec, tmp_path, vertical_size, index_type):
    # Peers' bugs: 40,000 is negative as a signed 16-bit number, and no half-precision number above 2,048 is exact.
    kept = [i for i in (0, 2_049, 4_999, 32_768, 40_000, 65_535, 65_536, 999_999) if i < vertical_size]
    ones = np.ones((1, len(kept)), dtype=np.float32)
    records = TargetRecords(np.array([40_000]), np.array([kept]), ones, np.zeros(1, np.float32))
    path = save(tmp_path, records, codec, vertical_size)
    assert read_all(path, vertical_size, len(kept))[0].tolist() == [kept]
    assert TargetFile(path, vertical_size, len(kept)).row.tolist() == [40_000]
    if codec == "plain":
        assert load_arrays(path, ("index",))["index"].dtype == index_type
    records = TargetRecords(np.array([70_000]), np.array([kept]), ones, np.zeros(1, np.float32))
    path = save(tmp_path, records, codec, vertical_size)
    assert TargetFile(path, vertical_size, len(kept)).row.tolist() == [70_000]


def test_a_tail_mass_beyond_float16_is_kept_as_its_largest_number(tmp_path):
    records = make_records(tail=np.array([5e5, 0, 1], dtype=np.float32))
    assert read_all(save(tmp_path, records))[2].tolist() == [65504.0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([[3, 0], [10, 4], [1, 2]], np.uint16)}, "class index 10 in a vertical of 10 classes"),
        ({"index": np.array([[3, 0], [-1, 4], [1, 2]], np.int64)}, r"holds .*'index': \('i8'"),
        ({"tail": np.zeros(3, np.float64)}, "'tail' is F64, expected one of "),
        ({"probability": np.full((3, 2), np.nan, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.full((3, 2), 1.001, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.full((3, 2), -0.1, np.float16)}, r"a probability lies outside \[0, 1\]"),
        ({"probability": np.zeros((3, 1), np.float16)}, r"holds .*'probability': \('f2', \(1,\)\)"),
        ({"tail": np.full(3, -1, np.float16)}, "a tail mass is negative or not finite"),
        ({"tail": np.full(3, np.inf, np.float16)}, "a tail mass is negative or not finite"),
        ({"tail": np.zeros(4, np.float16)}, r"3 rows, but records \{3, 4\}"),
        ({"row": np.zeros(2, np.uint16)}, r"2 rows, but records \{3\}"),
        ({"row": np.zeros(0, np.uint16), "index": np.zeros((0, 2), np.uint16)}, "0 rows, but records"),
        ({"view": np.zeros((3, 11), np.uint8)}, r"holds .*'view': \('u1', \(11,\)\)"),
        ({"other": np.zeros(3, np.uint8)}, "holds .*'other'"),
        ({"tail": None}, "holds "),
    ],
)
def test_files_that_cannot_be_right_are_refused_by_name(tmp_path, changes, message):
    path = save(tmp_path, make_records())
    metadata, arrays = load_metadata(path), load_arrays(path, ("row", "index", "probability", "tail"))
    arrays = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    safetensors.numpy.save_file(arrays, path, metadata)
    with pytest.raises(DataError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_a_misspelt_codec_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="codec=packt: expected 'plain' or 'packed'; did you mean 'packed'"):
        make_records().save(tmp_path / "records.safetensors", "packt", 10)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["plain", "packed"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([[70_001, 2], [3, 4]])}, "an index lies outside the vertical of 5000 classes"),
        ({"index": np.array([[-65_530, 2], [3, 4]])}, "an index lies outside the vertical of 5000 classes"),
        ({"index": np.array([[1.7, 2], [3, 4]])}, "indices are float64, expected integers"),
        ({"probability": np.array([[1.5, 0.2], [0.1, 0.1]])}, r"a probability lies outside \[0, 1\]"),
        ({"tail": np.array([np.nan, 0])}, "a tail mass is negative or not a number"),
        ({"row": np.array([5, 2])}, "rows do not rise from 0 on"),
        ({"row": np.array([-1, 2])}, "rows do not rise from 0 on"),
        ({"row": np.array([0, 1, 2])}, "3 rows, but 2 records"),
    ],
)
def test_records_that_cannot_be_are_not_written(tmp_path, codec, changes, message):
    """In 16 bits class 70,001, an output index instead of a place in the vertical, would be class 4,465."""
    right = {"row": [0, 1], "index": [[1, 2], [3, 4]], "probability": [[0.5, 0.5], [0.5, 0.5]], "tail": [0.0, 0.0]}
    records = TargetRecords(**{name: np.array(value) for name, value in right.items()} | changes)
    with pytest.raises(DataError, match=f"not written: {message}; correct the records"):
        records.save(tmp_path / "records.safetensors", codec, 5000)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"codec": "new"}, {"codec": ""}, {"vertical_size": "11"}, {"num_kept": "3"}])
def test_files_of_another_codec_or_size_are_refused(tmp_path, changes):
    path = save(tmp_path, make_records())
    arrays = load_arrays(path, ("row", "index", "probability", "tail"))
    safetensors.numpy.save_file(arrays, path, load_metadata(path) | changes)
    with pytest.raises(DataError, match=r"expected \{'vertical_size': '10', 'num_kept': '2'\}"):
        read_all(path)


@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_a_cut_or_missing_file_is_refused_by_name(codec, tmp_path):
    path = save(tmp_path, make_records(), codec)
    content = path.read_bytes()
    for num_bytes in (0, 7, 8, 40, len(content) - 1):
        path.write_bytes(content[:num_bytes])
        with pytest.raises(DataError, match="damaged"):
            read_all(path)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        read_all(path)


def test_arrays_that_changed_places_are_noticed(tmp_path):
    """Indices and probabilities take the same bytes."""
    path = save(tmp_path, make_records(index=np.array([[3, 0], [9, 4], [1, 2]], np.uint16)))
    TargetFile(path, 10, 2).verify()
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    for name, other in (("index", "probability"), ("probability", "index")):
        header[name]["data_offsets"] = json.loads(content[8:size])[other]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])
    with pytest.raises(DataError, match=r"damaged \(its checksum is [0-9a-f]{8}, '[0-9a-f]{8}' when it was written"):
        TargetFile(path, 10, 2).verify()


def test_a_file_without_a_checksum_is_refused(tmp_path):
    path = save(tmp_path, make_records())
    arrays = load_arrays(path, ("row", "index", "probability", "tail"))
    metadata = {name: value for name, value in load_metadata(path).items() if name != "crc32"}
    safetensors.numpy.save_file(arrays, path, metadata)
    with pytest.raises(DataError, match="None when it was written"):
        TargetFile(path, 10, 2).verify()


@pytest.mark.parametrize("codec", ["plain", "packed"])
@pytest.mark.parametrize(("vertical_size", "top_k"), [(5000, 100), (70_000, 100), (40, 100)])
@pytest.mark.parametrize("num_views", [0, 2])
def test_the_bytes_of_targets_are_known_before_they_are_made(tmp_path, codec, vertical_size, top_k, num_views):
    num_rows, kept = 30, min(top_k, vertical_size)
    num_records = num_rows * max(1, num_views)
    records = TargetRecords(
        np.arange(num_rows),
        np.tile(np.arange(kept), (num_records, 1)),
        np.full((num_records, kept), 0.5, dtype=np.float32),
        np.zeros(num_records, dtype=np.float32),
        np.zeros((num_records, 13), dtype=np.uint8) if num_views else None,
    )
    records.save(tmp_path / "targets", codec, vertical_size)
    content = (tmp_path / "targets").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert count_target_bytes(codec, vertical_size, top_k, num_rows, num_views) == len(content) - header
