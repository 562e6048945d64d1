"""Arrays in safetensors files: equal bytes for equal content, one line for what cannot be read."""

import json

import numpy as np
import pytest

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.errors import DataError


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes(tmp_path):
    arrays = {"square": np.arange(6).reshape(2, 3).T, "flag": np.array([True])}
    metadata = {f"key {number}": str(number) for number in range(20)}
    save_arrays(tmp_path / "one", arrays, metadata)
    save_arrays(tmp_path / "two", dict(reversed(arrays.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert load_metadata(tmp_path / "one") == metadata
    np.testing.assert_array_equal(load_arrays(tmp_path / "one", ["square"])["square"], arrays["square"])


@pytest.mark.parametrize(
    ("entry", "num_bytes", "message"),
    [
        ({"dtype": "U16", "shape": [0, 2**63], "data_offsets": [0, 0]}, 0, r"damaged \('a\\nb': "),
        ({"dtype": "U16", "shape": [1] * 80, "data_offsets": [0, 2]}, 2, r"damaged \('a\\nb': "),
        ({"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}, 2, r"'a\\nb' is F8_E4M3, expected"),
        ({"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}, 2, r"'a\\nb' is BF16, expected"),
        ({"dtype": "new\n", "shape": [1], "data_offsets": [0, 2]}, 2, "damaged"),
    ],
)
def test_arrays_that_numpy_has_not_are_refused_in_one_line(tmp_path, entry, num_bytes, message):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a\nb": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    with pytest.raises(DataError, match=message) as caught:
        load_arrays(path, ["a\nb"])
    assert "\n" not in str(caught.value)
