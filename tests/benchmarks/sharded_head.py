"""A head that is spread over processes, beside the same head on every one of them: bytes sent, memory, seconds a step.

python tests/benchmarks/sharded_head.py

Gloo on one machine, one thread each. Beside is DistributedDataParallel over the whole student; what it sends for the head is
counted by the formula of a ring all-reduce, what the spread head sends is counted as it is sent.

Shapes: B a process's samples, K kept classes.
"""

import os
import socket
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from measure import Comparison, publish
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from concentration.networks.sharded_head import all_reduce_bytes
from concentration.networks.student import NetworkConfig, Student
from concentration.schema import parse_config
from concentration.targets import SoftTargets

NUM_SAMPLES, NUM_KEPT, NUM_STEPS = 32, 100, 4
TOP1, TOP2 = 512, 128
MEBIBYTE = 1 << 20


class Head(NamedTuple):
    """Verticals of a size, and one that is larger."""

    what: str
    kind: str
    largest: int
    others: tuple[int, ...]


HEADS = (
    Head("100,000 classes, 20 verticals", "fc_sc", 5000, (5000,) * 19),
    Head("100,000 classes, one vertical of 60,000", "fc_sc", 60_000, (4000,) * 10),
    Head("100,000 classes, 20 verticals, fc_fc", "fc_fc", 5000, (5000,) * 19),
)


def main() -> None:
    comparisons = []
    for world_size in (2, 4):
        for head in HEADS:
            seconds, sent, held = run(head, world_size)
            name = f"{world_size} processes, {head.what}"
            reduced = all_reduce_bytes(held["whole"] * 4, world_size)
            comparisons += [
                Comparison(f"{name}: sent, MiB a step", "MiB", sum(sent.values()) / MEBIBYTE, reduced / MEBIBYTE,
                           "all-reducing the head's gradients, by the formula"),
                Comparison(f"{name}: parameters of the head in a process", "million", held["spread"] / 1e6,
                           held["whole"] / 1e6, "the whole head"),
                Comparison(f"{name}: a step", "ms", seconds["spread"] * 1e3, seconds["whole"] * 1e3,
                           "DistributedDataParallel"),
            ]  # fmt: skip
            parts = ", ".join(f"{what} {count / MEBIBYTE:.2f}" for what, count in sent.items())
            print(f"{name}: MiB sent by a process in a step: {parts}")
    publish("sharded_head", f"A head spread over processes, {NUM_SAMPLES} samples each, K={NUM_KEPT}", comparisons)


def run(head: Head, world_size: int) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Least seconds of a step both ways, bytes sent in one by the spread head, parameters: of the rank with the most of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(measure_rank, (head, world_size, port, results), nprocs=world_size)
    found = [results.get() for _ in range(world_size)]
    seconds = {side: max(one[0][side] for one in found) for side in ("whole", "spread")}
    sent = max((one[1] for one in found), key=lambda one: sum(one.values()))
    held = {side: max(one[2][side] for one in found) for side in ("whole", "spread")}
    return seconds, sent, held


def measure_rank(rank: int, head: Head, world_size: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    seconds, held, sent = {}, {}, {}
    students = {"whole": build(head), "spread": build(head)}
    students["spread"].shard_head()
    networks = {}
    for side, student in students.items():
        names = [name for name in student.state_dict() if name.startswith(("top.classifiers.", "pace."))]
        held[side] = sum(p.numel() for name, p in student.named_parameters() if name in names)
        if side == "spread":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, names)
        networks[side] = DistributedDataParallel(student)
    images, targets = draw_batch(sum([head.largest, *head.others]), rank)
    for step in range(NUM_STEPS):  # in turns; the first is not counted
        for side, network in networks.items():
            students["spread"].sharding.sent.clear()
            dist.barrier()
            started = time.perf_counter()
            network.zero_grad()
            network(images, targets).sum().backward()
            if step:
                seconds[side] = min(seconds.get(side, float("inf")), time.perf_counter() - started)
            sent = dict(students["spread"].sharding.sent)
    results.put((seconds, sent, held))
    dist.barrier()
    dist.destroy_process_group()


def build(head: Head) -> Student:
    torch.manual_seed(0)
    verticals = {f"vertical{number}": size for number, size in enumerate((head.largest, *head.others))}
    values = {
        "base": {"kind": "small", "channels": [8, 16], "norm": "group"},
        "top": {"kind": head.kind, "top1": TOP1, "top2": TOP2},
        "pace": {"kind": "vertical", "log": True, "offset": "class"},
        "image_size": 16,
        "verticals": verticals,
    }
    return Student(parse_config(NetworkConfig, values))


def draw_batch(num_classes: int, rank: int) -> tuple[Tensor, SoftTargets]:
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(256, (NUM_SAMPLES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    index_BK = torch.randint(num_classes, (NUM_SAMPLES, NUM_KEPT), generator=generator)
    return images, SoftTargets(index_BK, torch.rand(NUM_SAMPLES, NUM_KEPT, generator=generator) / NUM_KEPT)


if __name__ == "__main__":
    main()
