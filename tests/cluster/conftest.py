"""What all tests of a cluster share: one SLURM, one data set, one undisturbed run. And `tests/` is importable from here."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.pipelines import Pipeline
from cluster.slurm_cluster import REPOSITORY, SlurmCluster, missing_programs, running_cluster
from real_runs import write_shards


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    """A SLURM of two nodes; tests that ask for it are skipped, loudly, where it is not installed."""
    if missing := missing_programs():
        reason = f"NO TEST OF A CLUSTER WAS RUN: {', '.join(missing)} not found; `apt-get install slurm-wlm munge`"
        warnings.warn(reason, stacklevel=1)  # pytest lists warnings at its end, and skipped tests only as a count
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Of fruit and tools; not prepared."""
    return write_shards(tmp_path_factory.mktemp("given") / "given")


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    """The working directory of a whole run of `NETWORKS` on this machine."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "work"
    Pipeline(workdir, shards, {**os.environ, "PYTHONPATH": str(REPOSITORY)}).run()
    return workdir
