"""Which rank holds which classes of a head that is too large for one."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from concentration.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Classes `start` to `stop` of one vertical, the `vertical`-th, counted inside it."""

    vertical: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(vertical_sizes: Sequence[int], world_size: int) -> list[list[Part]]:
    """The parts that each rank holds, in the order of the outputs: at least one part, and at most one of each vertical.

    A class costs the same wherever it is (a row of the classifier and a column of logits), so the cost of a part is its number
    of classes. A vertical with more than an even share of all classes is first cut into equal pieces of no more than that
    share. Then the largest piece that is left goes to the rank with the fewest classes, until none is left; no rank gets more
    than 4/3 of what the fullest rank has in the best plan for these pieces (Graham 1969). A vertical's pieces on one rank are
    made consecutive, hence one part. Equal arguments give equal plans.

    Raises:
        ConfigError: there are fewer classes than ranks.
    """
    num_classes = sum(vertical_sizes)
    if num_classes < world_size:
        raise ConfigError(
            f"trainer.shard_head=true: {num_classes} classes for {world_size} processes; expected a class each, at least: "
            "use fewer processes, or trainer.shard_head=false"
        )
    pieces = []
    for vertical, size in enumerate(vertical_sizes):
        num_pieces = -(-size * world_size // num_classes)
        bounds = [number * size // num_pieces for number in range(num_pieces + 1)]
        pieces += [(stop - start, vertical) for start, stop in itertools.pairwise(bounds)]
    load = [0] * world_size
    held: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # classes by vertical and rank
    for size, vertical in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        rank = load.index(min(load))
        load[rank] += size
        held[vertical][rank] += size
    plan: list[list[Part]] = [[] for _ in range(world_size)]
    for vertical in sorted(held):
        start = 0
        for rank, size in sorted(held[vertical].items()):
            plan[rank].append(Part(vertical, start, start + size))
            start += size
    return plan
