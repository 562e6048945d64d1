"""Several answers made one, against plain means of sigmoids in float64."""

import pytest
import torch

from concentration.metrics.ensembles import combine_logits


def draw_logits(scale: float) -> torch.Tensor:
    return scale * torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.1, 2, 8])
def test_the_mean_is_that_of_the_probabilities(scale):
    logits_BNC = draw_logits(scale)
    expected = logits_BNC.double().sigmoid().mean(1).logit()
    torch.testing.assert_close(combine_logits(logits_BNC, "mean").double(), expected, rtol=1e-4, atol=1e-5)


def test_the_largest_is_that_of_the_probabilities():
    logits_BNC = draw_logits(2)
    assert torch.equal(combine_logits(logits_BNC, "max"), logits_BNC.max(dim=1).values)


def test_one_answer_stays_as_it_is():
    logits_BNC = draw_logits(5)[:, :1]
    torch.testing.assert_close(combine_logits(logits_BNC, "mean"), logits_BNC[:, 0], rtol=1e-5, atol=1e-5)


def test_certain_answers_are_not_tied():
    logits_BNC = torch.tensor([[[30.0, 40.0], [31.0, 39.0]]])
    low, high = combine_logits(logits_BNC, "mean")[0]
    assert 30 < low < 31 < 39 < high < 40


def test_a_class_that_was_not_computed_counts_as_absent():
    logits_BNC = torch.tensor([[[-torch.inf, -torch.inf], [-torch.inf, 0.0]]])
    found = combine_logits(logits_BNC, "mean")[0]
    assert found[0] == -torch.inf
    assert found[1].sigmoid() == pytest.approx(0.25)


def test_the_order_of_answers_does_not_matter():
    logits_BNC = draw_logits(3)
    torch.testing.assert_close(combine_logits(logits_BNC, "mean"), combine_logits(logits_BNC.flip(1), "mean"))
