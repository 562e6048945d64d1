"""k-means against scikit-learn on points with known groups, in memory and as a stream, balanced and not."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize

from concentration.errors import DataError
from concentration.grouping.kmeans import Centroids, StreamedKMeans, fit_kmeans


def draw_points(sizes=(200, 200, 200, 200), distance=6.0, seed=0) -> tuple[torch.Tensor, np.ndarray]:
    """Normal clouds of these sizes in 5 dimensions, shuffled, and which cloud each point is of."""
    rng = np.random.default_rng(seed)
    centre_KD = distance * rng.normal(size=(len(sizes), 5))
    group_N = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    point_ND = centre_KD[group_N] + rng.normal(size=(len(group_N), 5))
    return torch.from_numpy(point_ND).float(), group_N


def inertia(point_ND: torch.Tensor, centroids: Centroids) -> float:
    return float((point_ND[:, None] - centroids.centroid_KD).square().sum(2).min(1).values.sum())


def test_it_finds_what_scikit_learn_finds():
    point_ND, group_N = draw_points(distance=2.0)
    centroids = fit_kmeans(point_ND, 4, seed=0)
    expected = KMeans(4, n_init=10, random_state=0).fit(point_ND.numpy())
    assert inertia(point_ND, centroids) == pytest.approx(expected.inertia_, rel=1e-3)
    found_N, cost_N = centroids.assign(point_ND)
    assert adjusted_rand_score(expected.labels_, found_N) > 0.99
    assert adjusted_rand_score(group_N, found_N) > 0.9
    assert float(cost_N.sum()) == pytest.approx(expected.inertia_, rel=1e-3)
    again = fit_kmeans(point_ND, 4, seed=0)
    assert torch.equal(again.centroid_KD, centroids.centroid_KD), "the same seed gives the same groups"


def test_a_stream_ends_where_all_points_together_would():
    point_ND, group_N = draw_points(sizes=(2000, 1000, 500, 300))
    start_ND, rest = point_ND[:300], point_ND[300:].split(128)
    streamed = StreamedKMeans(fit_kmeans(start_ND, 4, seed=0), start_ND, balanced=False)
    for point_BD in rest:
        streamed.step(point_BD)
    whole = fit_kmeans(point_ND, 4, seed=0)
    assert inertia(point_ND, streamed.centroids) == pytest.approx(inertia(point_ND, whole), rel=0.01)
    assert adjusted_rand_score(group_N, streamed.centroids.assign(point_ND)[0]) > 0.99
    # Each centroid is the mean of what it was given, the start's points among them.
    assert torch.allclose(streamed._seen_K.sum(), torch.tensor(float(len(point_ND)), dtype=torch.float64))


def test_balanced_groups_are_about_equal_and_plain_ones_are_not():
    point_ND, _ = draw_points(sizes=(2500, 700, 500, 300), distance=2.0)
    start_ND = point_ND[:1000]
    largest = {}
    for balanced in (False, True):
        streamed = StreamedKMeans(fit_kmeans(start_ND, 4, 0, balanced), start_ND, balanced)
        for point_BD in point_ND[1000:].split(128):
            streamed.step(point_BD)
        count_K = torch.bincount(streamed.finish().assign(point_ND)[0], minlength=4)
        largest[balanced] = count_K.max().item() / (len(point_ND) / 4)
    assert largest[False] > 1.5
    assert largest[True] < 1.15
    assert abs(float(streamed.centroids.price_K.mean())) < 1e-5


def draw_unit_points(kind: str, seed: int) -> torch.Tensor:
    """Features of length 1, in eight tight clouds of very different sizes, or in none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (400, 200, 100, 50, 50, 25, 25, 10) if kind == "clouds" else (860,)
    spread = 0.1 if kind == "clouds" else 100
    clouds = [
        normalize(torch.randn(1, 64, generator=generator)) + spread * torch.randn(size, 64, generator=generator) / 8
        for size in sizes
    ]
    return normalize(torch.cat(clouds))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_groups", [2, 3, 8])
@pytest.mark.parametrize("kind", ["clouds", "random"])
def test_the_largest_balanced_group_is_close_to_its_share(kind, num_groups, seed):
    """Also where one cloud, far from all others, has half of the points; 5% are aimed at."""
    point_ND = draw_unit_points(kind, seed)
    group_N, _ = fit_kmeans(point_ND, num_groups, seed, balanced=True).assign(point_ND)
    count_K = torch.bincount(group_N, minlength=num_groups)
    assert count_K.max() <= 1.1 * len(point_ND) / num_groups
    assert not fit_kmeans(point_ND, num_groups, seed).price_K.any()


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_tight_clouds_ends_balanced(seed):
    """Of the points of its start, as prices are found with those."""
    start_ND = draw_unit_points("clouds", seed)
    generator = torch.Generator().manual_seed(seed)
    streamed = StreamedKMeans(fit_kmeans(start_ND, 4, seed, balanced=True), start_ND, balanced=True)
    for _ in range(30):
        streamed.step(start_ND[torch.randint(len(start_ND), (128,), generator=generator)])
    count_K = torch.bincount(streamed.finish().assign(start_ND)[0], minlength=4)
    assert count_K.max() <= 1.1 * len(start_ND) / 4


def test_a_balanced_start_is_taken_before_a_closer_one_that_is_not():
    """Of these clouds the start that costs least has a group of 3.7 times its share."""
    generator = torch.Generator().manual_seed(1)
    sizes = (400, 200, 100, 50, 50, 25, 25, 10)
    clouds = [torch.randn(n, 8, generator=generator) + 8 * torch.randn(8, generator=generator) for n in sizes]
    point_ND = torch.cat(clouds)
    group_N, _ = fit_kmeans(point_ND, 8, seed=1, balanced=True).assign(point_ND)
    assert torch.bincount(group_N).max() <= 1.1 * len(point_ND) / 8


def test_a_price_moves_the_border_and_nothing_else():
    centroids = Centroids(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 0.2]))
    # |x|^2 = (x - 1)^2 + 0.2 at x = 0.6
    assert centroids.assign(torch.tensor([[0.59], [0.61]]))[0].tolist() == [0, 1]
    assert torch.allclose(centroids.compute_costs(torch.tensor([[2.0]])), torch.tensor([[4.0, 1.2]]))


def test_fewer_different_points_than_groups_are_refused():
    with pytest.raises(DataError, match="2 different points for 3 groups"):
        fit_kmeans(torch.tensor([[0.0], [1.0]]).repeat(5, 1), 3, seed=0)
