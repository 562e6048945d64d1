"""k-means: of points that are in memory, and of a stream that is seen once, on one process or several; balanced if asked.

A point belongs to the group with the least |x - c_k|^2 + p_k. The prices p are 0, unless groups are to be balanced: then they
are what makes all groups about equally large, so that where a new point belongs is decided by the same rule as for an old one.

Shapes: N points, B points of a batch, K groups, D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from concentration.distributed import sum_over_ranks
from concentration.errors import DataError

#: Costs that are held at once while points are assigned.
_COSTS_PER_BLOCK = 1 << 24
#: By how much the largest of balanced groups may exceed its share, of points in memory.
_MAX_EXCESS = 0.05
#: Rounds in which prices are found for points in memory.
_PRICE_ROUNDS = 200
#: The first step of a price, as a share of what it costs on average to be in any group instead of the best one.
_FIRST_PRICE_STEP = 0.1
#: A step's factor while its price goes on in one direction, and where that turns.
_FASTER, _SLOWER = 1.3, 0.5
#: The step of prices in a stream, in units of the mean squared distance.
_STREAM_PRICE_STEP = 0.05


class Centroids(NamedTuple):
    """`centroid_KD` and `price_K`, float32."""

    centroid_KD: Tensor
    price_K: Tensor

    def compute_costs(self, point_ND: Tensor) -> Tensor:
        """|x - c_k|^2 + p_k, (N, K) float32."""
        square_N1 = point_ND.square().sum(1, keepdim=True)
        offset_K = self.centroid_KD.square().sum(1) + self.price_K
        return (square_N1 + offset_K).addmm_(point_ND, self.centroid_KD.T, alpha=-2)

    def assign(self, point_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The group of each point, (N,) int64, and its cost, (N,)."""
        block = max(1, _COSTS_PER_BLOCK // len(self.centroid_KD))
        found = [self.compute_costs(points).min(1) for points in point_ND.split(block)]
        return torch.cat([least.indices for least in found]), torch.cat([least.values for least in found])


def fit_kmeans(
    point_ND: Tensor, num_groups: int, seed: int, balanced: bool = False, num_starts: int = 4, max_rounds: int = 100
) -> Centroids:
    """Lloyd's algorithm from the best of several k-means++ starts; the same points and seed give the same result.

    Of balanced starts the best is that whose largest group exceeds its share the least, and the closest of those that exceed it
    by no more than 5%. All may exceed it where many points are nearly one, which no price divides.

    Raises:
        DataError: there are fewer different points than groups.

    Source: Arthur and Vassilvitskii 2007 (k-means++). Balanced groups are those of least cost among groups of equal size, an
        optimal transport whose dual variables are the prices (Aurenhammer, Hoffmann and Aronov 1998).
    """
    generator = torch.Generator().manual_seed(seed)
    point_ND = point_ND.float()
    fits = [_fit_once(point_ND, num_groups, balanced, max_rounds, generator) for _ in range(num_starts)]
    return min(fits, key=lambda fit: fit[1])[0]


class StreamedKMeans:
    """k-means of points that come in batches and are not kept: each centroid is the mean of all points that it was given.

    All ranks make one from equal centroids, call `step` with their shares of the same batch, and `finish` after the last.

    Source: Sculley 2010, "Web-scale k-means clustering".
    """

    def __init__(self, start: Centroids, point_ND: Tensor, balanced: bool):
        """`start` was fitted to `point_ND`, which count as seen."""
        group_N, _ = start.assign(point_ND)
        self.centroids = start
        self._balanced = balanced
        self._start_ND = point_ND if balanced else None
        self._seen_K = torch.bincount(group_N, minlength=len(start.price_K)).double()
        self._scale = _mean_square(point_ND, start.centroid_KD, group_N)

    def step(self, point_BD: Tensor) -> None:
        """Moves the centroids, and the prices where groups are to be balanced."""
        centroid_KD, price_K = self.centroids
        group_B, _ = self.centroids.assign(point_BD)
        sum_KD, count_K = sum_over_ranks(_sum_by_group(point_BD, group_B, len(price_K))).tensor_split([-1], dim=1)
        count_K = count_K.squeeze(1)
        self._seen_K += count_K
        moved_KD = (sum_KD - count_K.unsqueeze(1) * centroid_KD.double()) / self._seen_K.clamp_min(1).unsqueeze(1)
        if self._balanced and count_K.sum():
            price_K = _raise_prices(price_K, count_K, _STREAM_PRICE_STEP * self._scale)
        self.centroids = Centroids((centroid_KD + moved_KD).float(), price_K)

    def finish(self) -> Centroids:
        """The centroids as they are now; where groups are to be balanced, with the prices that make them so for the first points.

        NOTE: `step` alone would not do: where groups lie far apart, a centroid moves a border by more than a price can follow.
        """
        if self._balanced:
            self.centroids = _balance(self._start_ND, self.centroids)
        return self.centroids


def _fit_once(
    point_ND: Tensor, num_groups: int, balanced: bool, max_rounds: int, generator: torch.Generator
) -> tuple[Centroids, tuple[float, float]]:
    """A local optimum, and what it is judged by: by how many points the largest group is too large, where groups are to be
    balanced, and the mean squared distance to the centroids."""
    centroids = Centroids(_choose_starts(point_ND, num_groups, generator), point_ND.new_zeros(num_groups))
    group_N: Tensor | None = None
    for _ in range(max_rounds):
        if balanced:
            centroids = _balance(point_ND, centroids)
        before_N, (group_N, cost_N) = group_N, centroids.assign(point_ND)
        if before_N is not None and torch.equal(before_N, group_N):
            break
        sum_KD, count_K1 = _sum_by_group(point_ND, group_N, num_groups).tensor_split([-1], dim=1)
        centroid_KD = (sum_KD / count_K1.clamp_min(1)).float()
        empty = (count_K1.squeeze(1) == 0).nonzero().squeeze(1)
        if len(empty):  # each starts anew at a point that its group serves worst
            centroid_KD[empty] = point_ND[cost_N.topk(len(empty)).indices]
        centroids = Centroids(centroid_KD, centroids.price_K)
    excess = 0.0
    if balanced:
        centroids = _balance(point_ND, centroids)  # the last round may have moved them
        group_N, _ = centroids.assign(point_ND)
        excess = max(0.0, int(torch.bincount(group_N).max()) - _allow(len(point_ND), num_groups))
    return centroids, (excess, _mean_square(point_ND, centroids.centroid_KD, group_N))


def _choose_starts(point_ND: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """(K, D): k-means++, each start drawn by its squared distance to the nearest one before it."""
    chosen = [int(torch.randint(len(point_ND), (), generator=generator))]
    distance_N = point_ND.new_full((len(point_ND),), torch.inf)
    for number in range(1, num_groups):
        distance_N = distance_N.minimum((point_ND - point_ND[chosen[-1]]).square().sum(1))
        total_N = distance_N.double().cumsum(0)
        if total_N[-1] == 0:
            raise DataError(
                f"k-means: {number} different points for {num_groups} groups; ask for fewer groups, or give more samples"
            )
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(total_N.device) * total_N[-1]
        chosen.append(int(torch.searchsorted(total_N, drawn, right=True).clamp_max(len(point_ND) - 1)))
    return point_ND[torch.tensor(chosen, device=point_ND.device)].clone()


def _balance(point_ND: Tensor, centroids: Centroids) -> Centroids:
    """The same centroids with the best prices that were found, by the size of the largest group of these points.

    They maximise a concave function whose slope in p_k is group k's share beyond its due. How far a price has to go depends on
    what lies between two groups, much or nothing: each has a step of its own, which grows while it goes on in one direction.

    Source: Riedmiller and Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm".
    """
    num_groups = len(centroids.price_K)
    cost_NK = Centroids(centroids.centroid_KD, torch.zeros_like(centroids.price_K)).compute_costs(point_ND)
    due, allowed = len(point_ND) / num_groups, _allow(len(point_ND), num_groups)
    price_K = best_K = centroids.price_K
    least = torch.inf
    step_K = (_FIRST_PRICE_STEP * (cost_NK.mean() - cost_NK.min(1).values.mean())).expand(num_groups)
    before_K = torch.zeros_like(price_K)
    for _ in range(_PRICE_ROUNDS):
        count_K = torch.bincount((cost_NK + price_K).argmin(1), minlength=num_groups)
        largest = int(count_K.max())
        if largest < least:
            best_K, least = price_K, largest
        if largest <= allowed:
            break
        sign_K = (count_K - due).sign()
        turned_K = sign_K * before_K
        step_K = torch.where(turned_K > 0, step_K * _FASTER, torch.where(turned_K < 0, step_K * _SLOWER, step_K))
        price_K, before_K = _centre(price_K + sign_K * step_K), sign_K
    return Centroids(centroids.centroid_KD, best_K)


def _allow(num_points: int, num_groups: int) -> float:
    """How large a balanced group may be."""
    return max((1 + _MAX_EXCESS) * num_points / num_groups, math.ceil(num_points / num_groups))


def _raise_prices(price_K: Tensor, count_K: Tensor, step: float) -> Tensor:
    """Dearer where too many points are, cheaper where too few."""
    share_K = count_K / count_K.sum() * len(count_K)
    return _centre(price_K + (step * (share_K - 1)).float())


def _centre(price_K: Tensor) -> Tensor:
    """With mean 0, since only differences matter."""
    return price_K - price_K.mean()


def _sum_by_group(point_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """(K, D + 1) float64: the sum of each group's points, and their number."""
    sum_KE = torch.zeros(num_groups, point_ND.shape[1] + 1, dtype=torch.float64, device=point_ND.device)
    one_N1 = torch.ones(len(point_ND), 1, dtype=torch.float64, device=point_ND.device)
    return sum_KE.index_add_(0, group_N, torch.cat([point_ND.double(), one_N1], dim=1))


def _mean_square(point_ND: Tensor, centroid_KD: Tensor, group_N: Tensor) -> float:
    return (point_ND - centroid_KD[group_N]).square().sum(1).mean().item()
