"""k-means of points in memory, or of a stream of batches that is seen once, by one process or several; groups may be balanced.

A point belongs to the group k with the smallest cost |x - c_k|^2 + p_k. In plain k-means the prices p_k are 0. For balanced
groups they are chosen so that all groups are about equally large; a new point is then assigned by the same rule as the old ones.

Shapes: N points, B points of a batch, K groups, D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from concentration.distributed import sum_over_ranks
from concentration.errors import DataError

#: How many costs (points times groups) are held at once while points are assigned.
_COSTS_PER_BLOCK = 1 << 24
#: The share by which the largest of balanced groups may exceed N / K.
_MAX_EXCESS = 0.05
#: The most steps in which prices are sought.
_PRICE_ROUNDS = 200
#: The first step of each price, as a share of the mean difference between the cost of an average group and that of the best one.
_FIRST_PRICE_STEP = 0.1
#: The factor by which the step of a price grows while the price keeps its direction, and shrinks when the direction turns.
_FASTER, _SLOWER = 1.3, 0.5
#: The step of the prices in a stream, in units of the mean squared distance of the points to their centroids.
_STREAM_PRICE_STEP = 0.05


class Centroids(NamedTuple):
    """The centroids (K, D) and the prices (K,) of the groups, float32."""

    centroid_KD: Tensor
    price_K: Tensor

    def compute_costs(self, point_ND: Tensor) -> Tensor:
        """The cost of each point in each group, |x - c_k|^2 + p_k: (N, K) float32."""
        square_N1 = point_ND.square().sum(1, keepdim=True)
        offset_K = self.centroid_KD.square().sum(1) + self.price_K
        return (square_N1 + offset_K).addmm_(point_ND, self.centroid_KD.T, alpha=-2)

    def assign(self, point_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The group with the smallest cost for each point, (N,) int64, and that cost, (N,) float32."""
        block = max(1, _COSTS_PER_BLOCK // len(self.centroid_KD))
        found = [self.compute_costs(points).min(1) for points in point_ND.split(block)]
        return torch.cat([least.indices for least in found]), torch.cat([least.values for least in found])


def fit_kmeans(
    point_ND: Tensor, num_groups: int, seed: int, balanced: bool = False, num_starts: int = 4, max_rounds: int = 100
) -> Centroids:
    """The best result of Lloyd's algorithm from several k-means++ starts. The same points and seed give the same result.

    The best result has the smallest mean squared distance. If groups are to be balanced, it is the best among the results whose
    largest group exceeds N / K by at most 5%; if there is none, the result that exceeds it the least. That happens if many points
    are nearly equal, since no prices can divide them.

    Args:
        point_ND: the points.
        num_groups: K.
        seed: the seed of the starts.
        balanced: whether prices make the groups about equally large.
        num_starts: how many starts are tried.
        max_rounds: the most rounds of Lloyd's algorithm from each start.

    Raises:
        DataError: there are fewer different points than groups.

    Source: Arthur and Vassilvitskii 2007 (k-means++). Finding the groups of equal size with the least cost is an optimal
        transport problem, and the prices are its dual variables (Aurenhammer, Hoffmann and Aronov 1998).
    """
    generator = torch.Generator().manual_seed(seed)
    point_ND = point_ND.float()
    fits = [_fit_once(point_ND, num_groups, balanced, max_rounds, generator) for _ in range(num_starts)]
    return min(fits, key=lambda fit: fit[1])[0]


class StreamedKMeans:
    """k-means of points that come in batches and are not kept: each centroid is the mean of all points that were assigned to it.

    Every rank makes one from the same centroids, calls `step` with its share of each batch, and `finish` after the last batch.

    Args:
        start: centroids that were fitted to `point_ND`.
        point_ND: the points that `start` was fitted to; they count as seen.
        balanced: whether prices keep the groups about equally large.

    Source: Sculley 2010, "Web-scale k-means clustering".
    """

    def __init__(self, start: Centroids, point_ND: Tensor, balanced: bool):
        group_N, _ = start.assign(point_ND)
        self.centroids = start
        self._balanced = balanced
        self._start_ND = point_ND if balanced else None
        self._seen_K = torch.bincount(group_N, minlength=len(start.price_K)).double()
        self._scale = _mean_square(point_ND, start.centroid_KD, group_N)

    def step(self, point_BD: Tensor) -> None:
        """Assigns the points of a batch, and updates the centroids and, for balanced groups, the prices."""
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
        """The final centroids; for balanced groups, with the prices that balance the points of the start.

        NOTE: the prices of `step` are not good enough: if groups lie far apart, a moving centroid shifts the border between two
        of them faster than the prices follow.
        """
        if self._balanced:
            self.centroids = _balance(self._start_ND, self.centroids)
        return self.centroids


def _fit_once(
    point_ND: Tensor, num_groups: int, balanced: bool, max_rounds: int, generator: torch.Generator
) -> tuple[Centroids, tuple[float, float]]:
    """A local optimum, and by what optima are compared: first the number of points by which the largest group is too large (0 if
    groups need not be balanced), then the mean squared distance of the points to their centroids."""
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
        if len(empty):  # an empty group starts anew at one of the points with the highest cost
            centroid_KD[empty] = point_ND[cost_N.topk(len(empty)).indices]
        centroids = Centroids(centroid_KD, centroids.price_K)
    excess = 0.0
    if balanced:
        centroids = _balance(point_ND, centroids)  # once more, since the last round may have moved the centroids
        group_N, _ = centroids.assign(point_ND)
        excess = max(0.0, int(torch.bincount(group_N).max()) - _allow(len(point_ND), num_groups))
    return centroids, (excess, _mean_square(point_ND, centroids.centroid_KD, group_N))


def _choose_starts(point_ND: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """(K, D): the starts of k-means++: a point is drawn in proportion to its squared distance from the nearest earlier start."""
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
    """The same centroids with the prices for which the largest group of these points is smallest, of all prices that were tried.

    The right prices maximise a concave function (the dual of the optimal transport) whose derivative in p_k is the number of
    points that group k has beyond N / K. How far a price has to move depends on how many points lie between two groups, so each
    price has a step of its own, which grows while the price keeps its direction.

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
    """How many points a balanced group may have: N / K and `_MAX_EXCESS` of it, or N / K rounded up if that is more."""
    return max((1 + _MAX_EXCESS) * num_points / num_groups, math.ceil(num_points / num_groups))


def _raise_prices(price_K: Tensor, count_K: Tensor, step: float) -> Tensor:
    """New prices: higher for a group with more than its share of a batch's points, lower for one with fewer."""
    share_K = count_K / count_K.sum() * len(count_K)
    return _centre(price_K + (step * (share_K - 1)).float())


def _centre(price_K: Tensor) -> Tensor:
    """The same prices shifted to mean 0. Only differences matter, and so prices cannot drift."""
    return price_K - price_K.mean()


def _sum_by_group(point_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """(K, D + 1) float64: the sum of each group's points, and in the last column their number."""
    sum_KE = torch.zeros(num_groups, point_ND.shape[1] + 1, dtype=torch.float64, device=point_ND.device)
    one_N1 = torch.ones(len(point_ND), 1, dtype=torch.float64, device=point_ND.device)
    return sum_KE.index_add_(0, group_N, torch.cat([point_ND.double(), one_N1], dim=1))


def _mean_square(point_ND: Tensor, centroid_KD: Tensor, group_N: Tensor) -> float:
    return (point_ND - centroid_KD[group_N]).square().sum(1).mean().item()
