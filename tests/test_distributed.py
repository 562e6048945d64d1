"""Ranks and sums over them: the same functions in one process, and in two that run gloo."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from concentration import distributed
from concentration.errors import ConfigError

CPU = torch.device("cpu")

#: How long two processes wait for each other here.
TIMEOUT_SECONDS = 5


def test_one_process_is_rank_zero_of_one_and_sums_to_itself():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_ranks(value).tolist() == [1.0, 2.0]
    assert distributed.broadcast_flag(True, CPU) is True
    assert distributed.broadcast_flag(False, CPU) is False
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.gather_sizes([3, 4], CPU) == [[3, 4]]
    assert [tensor.tolist() for tensor in distributed.all_to_all([value], [(2, 1)])] == [[[1.0], [2.0]]]
    distributed.wait_for_all()
    assert distributed.from_rank_zero(lambda: "computed") == "computed"
    with pytest.raises(ConfigError, match="no"):
        distributed.from_rank_zero(_refuse)


def test_starting_without_torchrun_does_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    distributed.start("cpu")
    assert not dist.is_initialized()


SRUN = {
    "SLURM_JOB_ID": "70", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[9,12-13],cpu1", "gpu9"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("a.b-c1,a.b-c2", "a.b-c1"),
    ],
)
def test_the_ranks_of_srun_meet_at_its_first_machine(nodes, first):
    translated = distributed.translate_slurm({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert translated == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
        "MASTER_ADDR": first, "MASTER_PORT": "20070",
    }  # fmt: skip
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert distributed.translate_slurm({**SRUN, **given, "SLURM_STEP_NODELIST": nodes}).items() >= given.items()


def test_two_steps_of_a_job_meet_at_different_ports():
    ports = {
        distributed.translate_slurm({**SRUN, "SLURM_STEP_NODELIST": "a", "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for step in range(9)
    }
    assert len(ports) == 9


@given(st.integers(0, 1000), st.integers(1, 40))
@settings(max_examples=100, deadline=None, database=None)
def test_the_shares_of_the_ranks_cover_everything_once_in_order_and_evenly(count, world_size):
    shares = [distributed.slice_of_rank(count, rank, world_size) for rank in range(world_size)]
    assert [place for share in shares for place in range(count)[share]] == list(range(count))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_two_processes_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_check_rank, args=(port, tmp_path), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computed-by-0", "passed-0", "passed-1"]


def _check_rank(rank: int, port: int, directory: Path) -> None:
    """What each of two processes sees; an assertion that fails here fails `spawn`."""
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start("cpu", TIMEOUT_SECONDS)
    distributed.start("cpu")  # a second time is no error
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)

    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    assert distributed.sum_over_ranks(own).tolist() == [3.0, 30.0]
    assert own.tolist() == [rank + 1.0, 10.0 * (rank + 1)], "the value itself was changed"

    assert distributed.broadcast_flag(rank == 0, CPU) is True  # rank 0's True, rank 1's False
    assert distributed.broadcast_flag(rank == 1, CPU) is False
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]

    assert distributed.gather_sizes([rank, 7], CPU) == [[0, 7], [1, 7]]
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        # Rank r sends (r + 1, 2) to rank 0 and nothing to rank 1, which sends (2, 2) to rank 0.
        sent = [torch.full((rank + 1, 2), 5 + rank, dtype=dtype), torch.empty(0, 2, dtype=dtype)]
        received = distributed.all_to_all(sent, [(1, 2), (2, 2)] if rank == 0 else [(0, 2), (0, 2)])
        assert [tensor.dtype for tensor in received] == [dtype, dtype]
        expected = [[[5, 5]], [[6, 6], [6, 6]]] if rank == 0 else [[], []]
        assert [tensor.tolist() for tensor in received] == expected
    distributed.wait_for_all()

    def compute() -> list[int]:
        (directory / f"computed-by-{rank}").touch()
        return [7, rank]

    assert distributed.from_rank_zero(compute) == [7, 0]
    with pytest.raises(ConfigError, match="no"):  # on both ranks, though only rank 0 calls it
        distributed.from_rank_zero(_refuse)
    assert distributed.sum_over_ranks(torch.ones(1)).item() == 2.0, "the ranks are out of step after the error"

    def compute_long() -> tuple[int, int]:
        """What a whole stage does: it joins the others, asks rank 0 and waits for all. It takes longer than ranks may wait."""
        distributed.start("cpu")
        time.sleep(TIMEOUT_SECONDS + 1)
        distributed.wait_for_all()
        return distributed.from_rank_zero(distributed.world_size), int(distributed.sum_over_ranks(torch.ones(1)))

    assert distributed.from_rank_zero_at_last(compute_long) == (1, 1)
    with pytest.raises(ConfigError, match="no"):
        distributed.from_rank_zero_at_last(_refuse)
    assert distributed.sum_over_ranks(torch.ones(1)).item() == 2.0
    dist.destroy_process_group()
    (directory / f"passed-{rank}").touch()


def _refuse() -> None:
    raise ConfigError("no")
