"""k-means: of points that are in memory, and of a stream that is seen once, on one process or several; balanced if asked.

A point belongs to the group with the least |x - c_k|^2 + p_k. The prices p are 0, unless groups are to be balanced: then they
are what makes all groups about equally large, so that where a new point belongs is decided by the same rule as for an old one.

Shapes: N points, B points of a batch, K groups, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from concentration.distributed import sum_over_ranks
from concentration.errors import DataError

#: Costs that are held at once while points are assigned.
_COSTS_PER_BLOCK = 1 << 24
#: Rounds in which prices are found for points in memory, and the first step in units of the mean squared distance.
_PRICE_ROUNDS, _PRICE_STEP = 60, 0.5
#: The step of prices in a stream.
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

    Raises:
        DataError: there are fewer different points than groups.

    Source: Arthur and Vassilvitskii 2007 (k-means++). Balanced groups are those of least cost among groups of equal size, an
        optimal transport whose dual variables are the prices (Aurenhammer, Hoffmann and Aronov 1998).
    """
    generator = torch.Generator().manual_seed(seed)
    point_ND = point_ND.float()
    fits = [_fit_once(point_ND, num_groups, balanced, max_rounds, generator) for _ in range(num_starts)]
    centroids, _ = min(fits, key=lambda fit: fit[1])
    return centroids


class StreamedKMeans:
    """k-means of points that come in batches and are not kept: each centroid is the mean of all points that it was given.

    All ranks make one from equal centroids and call `step` with their shares of the same batch.

    Source: Sculley 2010, "Web-scale k-means clustering".
    """

    def __init__(self, start: Centroids, point_ND: Tensor, balanced: bool):
        """`start` was fitted to `point_ND`, which count as seen."""
        group_N, _ = start.assign(point_ND)
        self.centroids = start
        self._balanced = balanced
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


def _fit_once(
    point_ND: Tensor, num_groups: int, balanced: bool, max_rounds: int, generator: torch.Generator
) -> tuple[Centroids, float]:
    """A local optimum, and the mean squared distance to the centroids."""
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
    return centroids, _mean_square(point_ND, centroids.centroid_KD, group_N)


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
    """The same centroids with the prices that make the groups of these points about equally large.

    They maximise a concave function whose slope in p_k is group k's share beyond its due; the step falls from round to round.
    """
    cost_NK = Centroids(centroids.centroid_KD, torch.zeros_like(centroids.price_K)).compute_costs(point_ND)
    scale = cost_NK.min(1).values.mean().item()
    price_K = centroids.price_K
    best_K, least_excess = price_K, torch.inf
    for number in range(_PRICE_ROUNDS):
        count_K = torch.bincount((cost_NK + price_K).argmin(1), minlength=len(price_K))
        excess = int(count_K.max())
        if excess < least_excess:
            best_K, least_excess = price_K, excess
        price_K = _raise_prices(price_K, count_K, _PRICE_STEP * scale / (1 + number) ** 0.75)
    return Centroids(centroids.centroid_KD, best_K)


def _raise_prices(price_K: Tensor, count_K: Tensor, step: float) -> Tensor:
    """Dearer where too many points are, cheaper where too few; with mean 0, since only differences matter."""
    share_K = count_K / count_K.sum() * len(count_K)
    price_K = price_K + (step * (share_K - 1)).float()
    return price_K - price_K.mean()


def _sum_by_group(point_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """(K, D + 1) float64: the sum of each group's points, and their number."""
    sum_KE = torch.zeros(num_groups, point_ND.shape[1] + 1, dtype=torch.float64, device=point_ND.device)
    one_N1 = torch.ones(len(point_ND), 1, dtype=torch.float64, device=point_ND.device)
    return sum_KE.index_add_(0, group_N, torch.cat([point_ND.double(), one_N1], dim=1))


def _mean_square(point_ND: Tensor, centroid_KD: Tensor, group_N: Tensor) -> float:
    return (point_ND - centroid_KD[group_N]).square().sum(1).mean().item()
