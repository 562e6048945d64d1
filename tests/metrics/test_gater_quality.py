"""How a gater's loads and choices are summed up, on cases that can be said in words."""

import numpy as np
import pytest

from concentration.metrics.gater_quality import measure_gater


def test_even_loads_use_all_experts():
    chosen_N = np.arange(12) % 4
    quality = measure_gater(chosen_N, chosen_N, np.ones((12, 4)))
    assert quality.load == [0.25] * 4
    assert quality.effective_experts == pytest.approx(4)
    assert quality.largest_load == pytest.approx(1)
    assert quality.agreement == 1


def test_one_busy_expert_counts_as_one():
    quality = measure_gater(np.zeros(8, dtype=int), np.arange(8) % 2, np.ones((8, 2)))
    assert (quality.effective_experts, quality.largest_load, quality.agreement) == (1, 2, 0.5)


def test_the_losses_are_of_the_chosen_the_best_and_all():
    loss_NE = np.array([[1.0, 3.0], [5.0, 2.0], [4.0, 6.0]])
    quality = measure_gater(np.array([0, 0, 1]), np.array([0, 1, 1]), loss_NE)
    assert quality.loss_chosen == pytest.approx((1 + 5 + 6) / 3)
    assert quality.loss_best == pytest.approx((1 + 2 + 4) / 3)
    assert quality.loss_mean == pytest.approx(21 / 6)
    assert quality.best_expert == pytest.approx(1 / 3)
    assert quality.agreement == pytest.approx(2 / 3)
