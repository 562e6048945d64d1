"""A split that tests of this folder only read."""

import pytest
from labelled_shards import LABELS

from concentration.data.split import Split


@pytest.fixture(scope="session")
def split(make_split, tmp_path_factory) -> Split:
    """The shards of `labelled_shards.LABELS`; a test that damages shards writes its own."""
    return make_split(tmp_path_factory.mktemp("split"), LABELS)
