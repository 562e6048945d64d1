"""Spectral clustering on planted partitions, against scikit-learn's and a dense solution."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from concentration.errors import DataError
from concentration.grouping.class_groups import NO_GROUP
from concentration.grouping.spectral import Similarity, cluster_classes

SIZES = (40, 30, 30, 20)


def plant(inside=0.3, across=0.02, sizes=SIZES, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix A whose classes are detected together inside blocks more often than across, and the block of each class."""
    rng = np.random.default_rng(seed)
    block_C = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    chance_CC = np.where(block_C[:, None] == block_C, inside, across)
    a_CC = (rng.random(chance_CC.shape) < chance_CC) * rng.random(chance_CC.shape) + np.eye(len(block_C))
    return a_CC.astype(np.float32), block_C


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("across", [0.005, 0.02, 0.03])
def test_a_planted_partition_is_found_as_scikit_learn_finds_it(is_sparse, across):
    a_CC, block_C = plant(across=across)
    similarity = Similarity(scipy.sparse.csr_array(a_CC) if is_sparse else a_CC)
    found = cluster_classes(similarity, 4, max_groups=10, seed=0)
    assert adjusted_rand_score(block_C, found.group_C) > 0.93
    b_CC = a_CC.T @ a_CC
    np.fill_diagonal(b_CC, 0)
    theirs = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(b_CC)
    assert adjusted_rand_score(theirs, found.group_C) > 0.93, "one or two of 120 classes are in doubt at 0.03"


def test_the_eigenvalues_are_those_of_the_whole_matrix():
    a_CC, _ = plant()
    b_CC = a_CC.astype(np.float64).T @ a_CC
    np.fill_diagonal(b_CC, 0)
    scale_C = b_CC.sum(1) ** -0.5
    expected = np.linalg.eigvalsh(scale_C[:, None] * b_CC * scale_C)[::-1][:6]
    found = cluster_classes(Similarity(scipy.sparse.csr_array(a_CC)), 5, max_groups=10, seed=0)
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-4)
    assert found.eigenvalues[0] == pytest.approx(1, abs=1e-5)


def test_the_product_is_that_of_the_matrix_without_its_diagonal():
    a_CC, _ = plant()
    b_CC = a_CC.T @ a_CC
    np.fill_diagonal(b_CC, 0)
    value_CN = np.random.default_rng(1).normal(size=(len(a_CC), 3))
    np.testing.assert_allclose(Similarity(a_CC).multiply(value_CN), b_CC @ value_CN, atol=1e-3)
    np.testing.assert_allclose(Similarity(a_CC).degree_C, b_CC.sum(1), rtol=1e-4)


def test_the_eigengap_counts_the_blocks():
    for sizes in (SIZES, (60, 60), (25, 25, 25, 25, 25, 25)):
        a_CC, block_C = plant(sizes=sizes)
        found = cluster_classes(Similarity(a_CC), "eigengap", max_groups=12, seed=0)
        assert len(np.unique(found.group_C)) == len(sizes)
        assert adjusted_rand_score(block_C, found.group_C) > 0.97


def test_classes_that_have_nothing_in_common_with_others_have_no_group():
    a_CC, block_C = plant()
    a_CC[:, 7] = 0
    a_CC[:, 9] = 0
    a_CC[9, 9] = 1  # detected where it is annotated, and nowhere else
    a_CC[9, :9] = a_CC[9, 10:] = 0
    found = cluster_classes(Similarity(scipy.sparse.csr_array(a_CC)), 4, max_groups=10, seed=0)
    assert np.flatnonzero(found.group_C == NO_GROUP).tolist() == [7, 9]
    kept = found.group_C != NO_GROUP
    assert adjusted_rand_score(block_C[kept], found.group_C[kept]) > 0.97


def test_more_groups_than_classes_in_common_are_refused():
    with pytest.raises(DataError, match="only 0 classes have anything in common, for up to 3 groups"):
        cluster_classes(Similarity(np.eye(10, dtype=np.float32)), 3, max_groups=10, seed=0)
