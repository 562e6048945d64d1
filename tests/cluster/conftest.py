"""The cluster that all tests here share, and `tests/real_runs.py`, importable from here."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.slurm_cluster import SlurmCluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    """A SLURM of two nodes; tests that ask for it are skipped, loudly, where it is not installed."""
    if missing := missing_programs():
        reason = f"NO TEST OF A CLUSTER WAS RUN: {', '.join(missing)} not found; `apt-get install slurm-wlm munge`"
        warnings.warn(reason, stacklevel=1)  # pytest lists warnings at its end, and skipped tests only as a count
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
