"""The head spread over ranks is the head of one process: loss, gradients, weights after steps, logits, in float64.

Real processes that run gloo, and DistributedDataParallel for what is not spread.

Shapes: B a rank's samples, G all ranks', C all classes, M verticals, K kept classes.
"""

import dataclasses
import datetime
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import real_runs  # noqa: F401  its processes, and these, are forked from one that has imported torch already
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from concentration.errors import DataError
from concentration.networks import sharded_head
from concentration.networks.head_plan import Part
from concentration.networks.sharded_head import all_reduce_bytes, list_columns
from concentration.networks.student import NetworkConfig, Student
from concentration.objectives import fused_head
from concentration.schema import parse_config
from concentration.targets import SoftTargets

NUM_STEPS = 3
HEAD = ("top.classifiers.", "pace.")


class Case(NamedTuple):
    """What is trained, and how many samples each of the ranks has in a step: they differ."""

    top: dict
    pace: dict
    sizes: tuple[int, ...] = (23, 2, 5, 1)
    background: bool = False
    weight: bool = False
    class_weight: bool = False
    gradients: str = "forward"
    counts: tuple[int, ...] = (3, 4, 2, 5)
    block_elements: int = 1 << 20
    num_blocks: Mapping[str, int] = MappingProxyType({})


FC_FC = {"kind": "fc_fc", "top1": 6, "top2": 5}
FC_SC = {"kind": "fc_sc", "top1": 6, "top2": 5, "norm": "layer"}
SC_SC = {"kind": "sc_sc", "top1": 4, "top2": 3}
GENERIC = {"kind": "fc_sc_generic", "top1": 6, "top2": 5, "generic": 2}

#: Under 23 classes of 31, two to four ranks share one vertical; with (9, 8, 7) three ranks share none.
CASES = (
    Case(FC_FC, {"kind": "none"}, weight=True),
    Case(FC_FC, {"kind": "vertical", "offset": "class"}, background=True, class_weight=True, counts=(1, 6, 3, 3)),
    Case(FC_SC, {"kind": "vertical", "log": True, "offset": "vertical"}, weight=True, gradients="backward"),
    Case(FC_SC, {"kind": "fixed", "offset": "vertical"}, sizes=(9, 8, 7)),
    Case(SC_SC, {"kind": "class", "log": True, "offset": "class"}, background=True, weight=True, class_weight=True),
    Case(SC_SC, {"kind": "class", "offset": "vertical"}, gradients="backward", background=True),
    Case(GENERIC, {"kind": "vertical", "offset": "class"}, weight=True, block_elements=56, counts=(11, 9, 17, 3)),
    Case(GENERIC, {"kind": "vertical"}, sizes=(40,), class_weight=True),
    Case(GENERIC, {"kind": "vertical", "offset": "class"}, num_blocks={"vertical0": 2, "vertical2": 3}),
)


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_give_the_losses_gradients_weights_and_logits_of_one_process(world_size, tmp_path):
    start(train_each, world_size, tmp_path)
    for number, case in enumerate(CASES):
        expected = train(case, world_size, rank=None)
        found = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(world_size)]
        for quantity in ("losses", "logits", "vertical_losses"):
            gathered = torch.cat([of_rank[quantity] for of_rank in found], dim=1)
            if quantity == "vertical_losses":
                gathered = gathered.unflatten(1, (world_size, -1)).sum(1)
            assert_close(gathered, expected[quantity], f"{case} {quantity}")
        for quantity in ("gradients", "weights"):
            assert_close_parts([of_rank[quantity] for of_rank in found], expected[quantity], f"{case} {quantity}")
        of_head = [whole for name, [(_, whole)] in expected["gradients"].items() if name.startswith(HEAD)]
        square = torch.stack([of_rank["held_square"] for of_rank in found]).sum()
        assert_close(square, torch.nn.utils.get_total_norm(of_head).square(), f"{case} norm of the gradient")
        assert all(torch.equal(of_rank["gamma_M"], found[0]["gamma_M"]) for of_rank in found)
        assert_close(found[0]["gamma_M"], expected["gamma_M"], f"{case} gamma")


def train_each(rank: int, world_size: int, directory: Path) -> None:
    for number, case in enumerate(CASES):
        torch.save(train(case, world_size, rank), directory / f"{number}-{rank}.pt")


def train(case: Case, world_size: int, rank: int | None) -> dict:
    """What a rank, or one process with all samples (rank None), sees: of every step, and of its part of the weights."""
    torch.manual_seed(0)
    verticals = {f"vertical{number}": size for number, size in enumerate(case.sizes)}
    values = {"base": {"kind": "small", "channels": [4], "norm": "group"}, "image_size": 8, "verticals": verticals}
    student = Student(
        parse_config(NetworkConfig, {**values, "top": case.top, "pace": case.pace, "num_blocks": dict(case.num_blocks)})
    ).double()
    if case.pace.get("offset", "none") != "none":
        torch.nn.init.normal_(student.pace.offset)
    if case.class_weight:
        student.class_weight_C = torch.rand(sum(case.sizes), dtype=torch.float64) + 0.1
    student.gradients = case.gradients
    network = student
    share = 1 / sum(case.counts[:world_size])
    if rank is not None:
        with pytest.MonkeyPatch.context() as patch:
            # 56 elements are 7 samples of 8 classes and 8 of 7: ranks that share a vertical must go through the same blocks.
            patch.setitem(fused_head.BLOCK_ELEMENTS, "cpu", case.block_elements)
            patch.setattr(sharded_head, "LEAST_BLOCK_SAMPLES", 1)
            student.shard_head()
        ignored = [name for name in student.state_dict() if name.startswith(HEAD)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, ignored)
        network = DistributedDataParallel(student)
        share *= world_size  # what training.module.share_of_sample says: DistributedDataParallel takes the mean
    optimizer = torch.optim.Adagrad(student.parameters(), lr=0.05, initial_accumulator_value=0.1)
    losses, vertical_losses, gradients, held_square = [], [], {}, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_head.BLOCK_ELEMENTS, "cpu", case.block_elements)
        for step in range(NUM_STEPS):
            images, targets, weight_G = draw_step(case, step, sum(case.counts[:world_size]))
            mine = slice(None)
            if rank is not None:
                mine = slice(sum(case.counts[:rank]), sum(case.counts[: rank + 1]))
                targets = take(targets, mine, num_unused=rank)
            optimizer.zero_grad()
            loss_B = network(images[mine], targets, weight_G[mine] * share)
            loss_B.sum().backward()
            losses.append(loss_B.detach() / share)
            vertical_losses.append(student.vertical_loss_M / share)
            if step == 0:
                gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
                held_square = student.held_square_norm() if rank is not None else None
            optimizer.step()
    student.eval()
    with torch.no_grad():
        logits_BC = student(images[mine])
    return {
        "losses": torch.stack(losses),
        "vertical_losses": torch.stack(vertical_losses),
        "logits": logits_BC.double()[None],
        "gradients": place(student, gradients),
        "weights": place(student, student.state_dict()),
        "held_square": held_square,
        "sent": dict(student.sharding.sent) if student.sharding is not None else {},
        "gamma_M": student.gamma_by_vertical().double() if case.pace["kind"] != "none" else torch.zeros(1),
    }


def place(student: Student, tensors: dict[str, Tensor]) -> dict[str, list[tuple[int, Tensor]]]:
    """Where in the whole tensor of each name these values lie: (first row, rows)."""
    if student.sharding is None:
        return {name: [(0, tensor)] for name, tensor in tensors.items()}
    placed: dict[str, list[tuple[int, Tensor]]] = {}
    parts, ranges = student.sharding.parts, student.sharding.ranges
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner.startswith("top.classifiers"):
            part = parts[int(owner.rpartition(".")[2])]
            placed[f"top.classifiers.{part.vertical}.{key}"] = [(part.start, tensor)]
        elif owner == "pace":
            is_per_class = student.pace.is_per_class(key)
            firsts = [
                classes.start if is_per_class else part.vertical for part, classes in zip(parts, ranges, strict=True)
            ]
            pieces = tensor.split([len(part) if is_per_class else 1 for part in parts])
            placed[name] = list(zip(firsts, pieces, strict=True))
        else:
            placed[name] = [(0, tensor)]
    return placed


def assert_close_parts(ranks: list[dict], expected: dict, message: str) -> None:
    """Each rank's values are those of the whole, and the ranks cover it."""
    for name, [(_, whole)] in expected.items():
        is_seen = torch.zeros(len(whole) if whole.ndim else 1, dtype=torch.bool)
        for of_rank in ranks:
            for first, rows in of_rank.get(name, []):
                assert_close(rows, whole[first : first + len(rows)] if whole.ndim else whole, f"{message} {name}")
                is_seen[first : first + (len(rows) if rows.ndim else 1)] = True
        assert is_seen.all(), f"{message} {name}: no rank has {is_seen.logical_not().nonzero().flatten()}"


def assert_close(found: Tensor, expected: Tensor, message: str) -> None:
    # float32 is what logits are handed over in, and vertical losses are kept in.
    tolerance = 1e-5 if "logits" in message else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}: {text}")


def draw_step(case: Case, step: int, num_samples: int) -> tuple[Tensor, SoftTargets, Tensor]:
    """Images (G, 3, 8, 8), targets and weights of all ranks' samples; one sample weighs nothing."""
    generator = torch.Generator().manual_seed(step)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    images = (uniform(num_samples, 3, 8, 8) * 255).to(torch.uint8)
    index_GK = torch.randint(sum(case.sizes), (num_samples, 4), generator=generator)
    targets = SoftTargets(
        index_GK,
        uniform(num_samples, 4) / 4,
        uniform(num_samples, len(case.sizes)) / 4 if case.background else None,
        (uniform(num_samples, len(case.sizes)) * 2).round() / 2 if case.weight else None,
    )
    weight_G = torch.ones(num_samples, dtype=torch.float64)
    weight_G[-1] = 0
    return images, targets, weight_G


def take(targets: SoftTargets, rows: slice, num_unused: int) -> SoftTargets:
    """A rank's targets; ranks keep different numbers of classes."""
    taken = SoftTargets(
        *(
            None if part is None else part[rows]
            for part in (getattr(targets, f.name) for f in dataclasses.fields(targets))
        )
    )
    pad = (0, num_unused)
    return dataclasses.replace(
        taken,
        index_BK=torch.nn.functional.pad(taken.index_BK, pad),
        probability_BK=torch.nn.functional.pad(taken.probability_BK, pad),
    )


def start(function, world_size: int, directory: Path) -> None:
    """Runs `function(rank, world_size, directory)` in as many processes; an assertion that fails there fails here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (function, world_size, port, directory)
    torch.multiprocessing.start_processes(join, arguments, world_size, start_method="forkserver")


def join(rank: int, function, world_size: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = datetime.timedelta(seconds=60)  # ranks that wait for different things are an error, not a night
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    function(rank, world_size, directory)
    dist.barrier()
    dist.destroy_process_group()


def test_one_process_holds_all_and_sends_nothing():
    case = CASES[1]
    torch.manual_seed(0)
    verticals = {f"vertical{number}": size for number, size in enumerate(case.sizes)}
    values = {"base": {"kind": "small", "channels": [4]}, "image_size": 8, "verticals": verticals}
    student = Student(
        parse_config(NetworkConfig, {**values, "top": case.top, "pace": case.pace, "num_blocks": dict(case.num_blocks)})
    )
    images, targets, _ = draw_step(case, 0, 4)
    targets = dataclasses.replace(targets, background_BM=None, probability_BK=targets.probability_BK.float())
    expected_B = student(images, targets)
    student.shard_head()
    torch.testing.assert_close(student(images, targets), expected_B)
    student.compile(backend="eager")
    torch.testing.assert_close(student(images, targets), expected_B)
    assert not sum(student.sharding.sent.values())
    with pytest.raises(DataError, match=r"name classes 31 to .*expected 0 to 30"):
        student(images, dataclasses.replace(targets, index_BK=targets.index_BK + 31))


def test_what_ranks_send_is_what_the_shapes_say(tmp_path):
    """Two ranks, fc_sc, whole verticals: each sends its samples' blocks of the other's verticals, and gets its own back."""
    start(count_bytes, 2, tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}").exists()


def count_bytes(rank: int, world_size: int, directory: Path) -> None:
    case = Case(FC_SC, {"kind": "vertical"}, sizes=(4, 3, 3), counts=(3, 4))
    sent = train(case, world_size, rank)["sent"]
    own, other = case.counts[rank], case.counts[1 - rank]
    # Greedy: rank 0 holds the first vertical, then rank 1 the other two; the third goes to rank 1, which has less.
    num_mine, num_others = (1, 2) if rank == 0 else (2, 1)
    width = case.top["top2"]
    assert sent == {
        "features": NUM_STEPS * own * num_others * width * 8 + own * num_others * width * 8,
        "feature gradients": NUM_STEPS * other * num_mine * width * 8,
        "losses": NUM_STEPS * (other * num_mine + own * num_others) * 8,
        "targets": NUM_STEPS * own * (5 * (4 + 8) + 3 * 8),  # K is 4 on rank 0 and 5 on rank 1
        "logits": other * (4 if rank == 0 else 6) * 8,
    }
    (directory / f"{rank}").touch()


def test_columns_are_the_generic_part_and_the_verticals_blocks():
    parts = [Part(1, 0, 3), Part(3, 2, 4)]
    assert list_columns(parts, 2, [5] * 4) == [slice(0, 2), slice(7, 12), slice(17, 22)]
    assert list_columns(parts, 0, [5, 10, 5, 5]) == [slice(5, 15), slice(20, 25)], "merged of two"
    assert list_columns([Part(1, 0, 3)], 6, [0, 0]) == [slice(0, 6)]


def test_a_ring_all_reduce_sends_nearly_twice_the_bytes():
    assert [all_reduce_bytes(1200, world_size) for world_size in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]
