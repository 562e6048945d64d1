"""Softmax cross-entropy from sparse targets, against torch's own on dense ones."""

import pytest
import torch
from torch.nn import functional as F

from concentration.objectives.softmax_cross_entropy import (
    LARGEST_LOGIT,
    compute_log_odds,
    softmax_cross_entropy,
    softmax_cross_entropy_by_vertical,
)
from concentration.targets import SoftTargets

SIZES = (4, 1, 6)


def draw_logits(num_samples: int = 5, scale: float = 2.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(num_samples, size, generator=generator, dtype=torch.float64) for size in SIZES]


def test_one_label_is_torchs_cross_entropy():
    logits, labels = draw_logits(), [0, 4, 5, 10, 3]
    found_B = softmax_cross_entropy(logits, SoftTargets.from_labels([[label] for label in labels]))
    torch.testing.assert_close(found_B, F.cross_entropy(torch.cat(logits, 1), torch.tensor(labels), reduction="none"))


@pytest.mark.parametrize("has_background", [False, True])
@pytest.mark.parametrize("has_class_weight", [False, True])
def test_soft_targets_are_divided_by_their_sum(has_background, has_class_weight):
    logits = draw_logits()
    generator = torch.Generator().manual_seed(1)
    index_BK = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(5)])
    probability_BK = torch.rand(5, 3, generator=generator)
    background_BM = torch.rand(5, 3, generator=generator) / 10 if has_background else None
    weight_C = torch.rand(11, generator=generator) if has_class_weight else None
    targets = SoftTargets(index_BK, probability_BK, background_BM, torch.full((5, 3), 0.5))
    dense_BC = targets.dense(*SIZES).double()
    dense_BC /= dense_BC.sum(1, keepdim=True)
    terms_BC = -dense_BC * torch.cat(logits, 1).log_softmax(1) * (1 if weight_C is None else weight_C)
    expected_BM = torch.stack([terms_BV.sum(1) for terms_BV in terms_BC.split(SIZES, 1)], 1)
    found_BM = softmax_cross_entropy_by_vertical(logits, targets, weight_C)
    torch.testing.assert_close(found_BM, 0.5 * expected_BM, rtol=1e-6, atol=1e-6)


def test_a_sample_without_a_target_has_no_loss_and_no_gradient():
    logits = [logits_BV.requires_grad_() for logits_BV in draw_logits(2)]
    loss_B = softmax_cross_entropy(logits, SoftTargets.from_labels([[], [2]]))
    assert loss_B[0] == 0
    loss_B.sum().backward()
    assert all((logits_BV.grad[0] == 0).all() for logits_BV in logits)
    assert all(logits_BV.grad[1].abs().sum() > 0 for logits_BV in logits)


def test_the_sigmoid_of_the_log_odds_is_the_softmax():
    log_BC = torch.cat(draw_logits(), 1).log_softmax(1)
    torch.testing.assert_close(compute_log_odds(log_BC).sigmoid(), log_BC.exp())


def test_log_odds_of_what_is_certain_are_finite_and_keep_their_order():
    log_BC = torch.tensor([[30.0, 0.0], [25.0, 0.0], [500.0, 0.0]]).double().log_softmax(1)
    found = compute_log_odds(log_BC)
    assert found[0, 0] > found[1, 0] > 24
    assert found[2].tolist() == [LARGEST_LOGIT, -LARGEST_LOGIT]
