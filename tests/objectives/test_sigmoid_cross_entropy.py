"""The sparse loss against torch's dense binary cross-entropy, and the properties that keep it so.

Shapes: B batch, C all classes, V classes of one vertical, M verticals, K kept classes.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from concentration.errors import DataError
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy, sigmoid_cross_entropy_by_vertical
from concentration.objectives.softmax_cross_entropy import softmax_cross_entropy
from concentration.targets import SoftTargets


def draw(
    seed: int, num_samples: int, vertical_sizes: list[int], num_kept: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], SoftTargets]:
    """Logits, and targets whose classes lie anywhere and may be listed twice, each at most 1 in sum."""
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(num_samples, size, generator=generator, dtype=torch.float64).mul(4).to(dtype)
        for size in vertical_sizes
    ]
    index_BK = torch.randint(sum(vertical_sizes), (num_samples, num_kept), generator=generator)
    probability_BK = torch.rand(num_samples, num_kept, generator=generator) / num_kept
    return logits, SoftTargets(index_BK, probability_BK)


def reference(logits: list[Tensor], targets: SoftTargets, weight_C: Tensor | None = None) -> Tensor:
    """(B, C) float64: torch's dense loss of every class."""
    sizes = [logits_BV.shape[1] for logits_BV in logits]
    logits_BC = torch.cat(logits, dim=1).double()
    dense_BC = targets.dense(*sizes).double()
    weight_C = None if weight_C is None else weight_C.double()
    loss_BC = binary_cross_entropy_with_logits(logits_BC, dense_BC, weight=weight_C, reduction="none")
    if targets.weight_BM is not None:
        loss_BC = loss_BC * targets.weight_BM.double().repeat_interleave(torch.tensor(sizes), dim=1)
    return loss_BC


cases = given(
    st.integers(0, 2**31), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 8)
)
few = settings(max_examples=40, deadline=None, database=None)


@cases
@few
def test_the_loss_is_torchs_binary_cross_entropy_over_dense_targets(seed, num_samples, vertical_sizes, num_kept):
    logits, targets = draw(seed, num_samples, vertical_sizes, num_kept)
    expected_B = reference(logits, targets).sum(1)
    # The reference adds a class's two probabilities in float32, hence not 1e-15.
    torch.testing.assert_close(sigmoid_cross_entropy(logits, targets), expected_B, rtol=1e-7, atol=1e-6)
    narrow = [logits_BV.float() for logits_BV in logits]
    torch.testing.assert_close(sigmoid_cross_entropy(narrow, targets), expected_B.float(), rtol=1e-5, atol=1e-5)


@cases
@few
def test_the_sums_by_vertical_are_each_verticals_own_loss_and_add_up(seed, num_samples, vertical_sizes, num_kept):
    logits, targets = draw(seed, num_samples, vertical_sizes, num_kept)
    loss_BM = sigmoid_cross_entropy_by_vertical(logits, targets)
    expected = [block_BV.sum(1) for block_BV in reference(logits, targets).split(vertical_sizes, dim=1)]
    torch.testing.assert_close(loss_BM, torch.stack(expected, dim=1), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(loss_BM.sum(1), sigmoid_cross_entropy(logits, targets))


@cases
@few
def test_backgrounds_and_weights_of_verticals_are_those_of_dense_targets(seed, num_samples, vertical_sizes, num_kept):
    logits, targets = draw(seed, num_samples, vertical_sizes, num_kept)
    generator = torch.Generator().manual_seed(seed)
    background_BM, weight_BM = torch.rand(2, num_samples, len(vertical_sizes), generator=generator) / 4
    weight_BM[torch.rand(weight_BM.shape, generator=generator) < 0.3] = 0
    weight_C = torch.rand(sum(vertical_sizes), generator=generator, dtype=torch.float64)
    targets = dataclasses.replace(targets, background_BM=background_BM, weight_BM=weight_BM)
    leaves = [logits_BV.clone().requires_grad_() for logits_BV in logits]
    for class_weight_C in (None, weight_C):
        loss_BM = sigmoid_cross_entropy_by_vertical(leaves, targets, class_weight_C)
        blocks = reference(leaves, targets, class_weight_C).split(vertical_sizes, dim=1)
        expected_BM = torch.stack([block_BV.sum(1) for block_BV in blocks], dim=1)
        torch.testing.assert_close(loss_BM, expected_BM, rtol=1e-6, atol=1e-6)
        gradients = torch.autograd.grad(loss_BM.sum(), leaves)
        expected = torch.autograd.grad(expected_BM.sum(), leaves)
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)


@cases
@few
def test_padding_changes_nothing_and_duplicates_add(seed, num_samples, vertical_sizes, num_kept):
    logits, targets = draw(seed, num_samples, vertical_sizes, num_kept)
    loss_B = sigmoid_cross_entropy(logits, targets)
    nothing = torch.zeros(num_samples, 3)
    padded = SoftTargets(
        torch.cat([targets.index_BK, nothing.long()], dim=1), torch.cat([targets.probability_BK, nothing], dim=1)
    )
    torch.testing.assert_close(sigmoid_cross_entropy(logits, padded), loss_B)
    halved = SoftTargets(targets.index_BK.repeat(1, 2), targets.probability_BK.repeat(1, 2) / 2)
    torch.testing.assert_close(sigmoid_cross_entropy(logits, halved), loss_B)
    order = torch.randperm(num_kept)
    shuffled = SoftTargets(targets.index_BK[:, order], targets.probability_BK[:, order])
    torch.testing.assert_close(sigmoid_cross_entropy(logits, shuffled), loss_B)


@cases
@few
def test_class_weights_are_torchs_dense_ones(seed, num_samples, vertical_sizes, num_kept):
    logits, targets = draw(seed, num_samples, vertical_sizes, num_kept)
    weight_C = torch.rand(sum(vertical_sizes), generator=torch.Generator().manual_seed(seed)) + 0.1
    expected_B = reference(logits, targets, weight_C).sum(1)
    torch.testing.assert_close(sigmoid_cross_entropy(logits, targets, weight_C), expected_B, rtol=1e-6, atol=1e-6)
    ones_B = sigmoid_cross_entropy(logits, targets, torch.ones_like(weight_C))
    torch.testing.assert_close(ones_B, sigmoid_cross_entropy(logits, targets))


def test_a_loss_by_hand():
    # softplus(0) = ln 2 for each of three classes; the listed one has y = 0, so z does not count: 3 ln 2.
    logits = [torch.zeros(1, 2), torch.zeros(1, 1)]
    targets = SoftTargets(torch.tensor([[1]]), torch.tensor([[0.7]]))
    torch.testing.assert_close(sigmoid_cross_entropy(logits, targets), torch.tensor([3 * 0.6931471805599453]))
    # 0.25 * -ln sigmoid(2) + 0.75 * -ln sigmoid(-2) = 0.25 * 0.126928 + 0.75 * 2.126928, and ln(1 + e^-1) of the other.
    logits = [torch.tensor([[2.0, -1.0]])]
    targets = SoftTargets(torch.tensor([[0]]), torch.tensor([[0.25]]))
    torch.testing.assert_close(sigmoid_cross_entropy(logits, targets), torch.tensor([1.626928 + 0.313262]))


def test_gradients_are_right_in_double_precision():
    logits, targets = draw(seed=0, num_samples=3, vertical_sizes=[4, 2, 5], num_kept=6)
    weight_C = torch.rand(11, dtype=torch.float64) + 0.5
    inputs = [logits_BV.requires_grad_() for logits_BV in logits]

    def loss_BM(*logits):
        return sigmoid_cross_entropy_by_vertical(logits, targets, weight_C)

    assert torch.autograd.gradcheck(loss_BM, inputs)


def test_the_gradient_is_the_sigmoid_less_the_target():
    logits, targets = draw(seed=1, num_samples=3, vertical_sizes=[4, 5], num_kept=6)
    inputs = [logits_BV.requires_grad_() for logits_BV in logits]
    sigmoid_cross_entropy(inputs, targets).sum().backward()
    gradient_BC = torch.cat([logits_BV.grad for logits_BV in inputs], dim=1)
    expected_BC = torch.cat(logits, dim=1).sigmoid() - targets.dense(9)
    torch.testing.assert_close(gradient_BC, expected_BC.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compute_loss", [sigmoid_cross_entropy, softmax_cross_entropy])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: dataclasses.replace(t, index_BK=t.index_BK[:2], probability_BK=t.probability_BK[:2]),
            "for 3 samples",
        ),
        (
            lambda t: dataclasses.replace(t, probability_BK=t.probability_BK[:, :1]),
            r"\(3, 4\) classes and \(3, 1\) prob",
        ),
        (lambda t: dataclasses.replace(t, index_BK=t.index_BK + 9), "name classes 9 to .*expected 0 to 8"),
        (lambda t: dataclasses.replace(t, probability_BK=t.probability_BK * 5), r"outside \[0, 1\], or NaN"),
        (lambda t: dataclasses.replace(t, weight_BM=torch.ones(2)), r"weight \(2,\), expected \(3, 2\)"),
        (lambda t: dataclasses.replace(t, weight_BM=torch.ones(3, 1)), r"weight \(3, 1\), expected \(3, 2\)"),
        (lambda t: [[1], [2], [3]], "targets are a list, expected SoftTargets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(compute_loss, change, message):
    """Most of them would give a loss: of other samples' targets, or by broadcasting."""
    logits, targets = draw(seed=0, num_samples=3, vertical_sizes=[4, 5], num_kept=4)
    targets = dataclasses.replace(targets, probability_BK=targets.probability_BK.clamp_min(0.21))
    with pytest.raises(DataError, match=message):
        compute_loss(logits, change(targets))


def test_logits_that_are_not_split_by_vertical_are_refused():
    logits, targets = draw(seed=0, num_samples=3, vertical_sizes=[4, 5], num_kept=4)
    with pytest.raises(
        DataError, match=r"logits are a tensor \(3, 9\); expected a list with \(samples, classes\) for each"
    ):
        sigmoid_cross_entropy(torch.cat(logits, dim=1), targets)
    with pytest.raises(DataError, match=r"logits are tensors \[\(3, 4\), \(2, 5\)\]; expected a list"):
        sigmoid_cross_entropy([logits[0], logits[1][:2]], targets)


def test_gradients_of_each_sample_are_to_be_had_by_vmap():
    logits, targets = draw(seed=0, num_samples=3, vertical_sizes=[4, 5], num_kept=4)
    weight = torch.ones(9, dtype=torch.float64)

    def compute_loss(weight, logit_C, index_K, probability_K):
        logits = (weight * logit_C)[None].split([4, 5], dim=1)
        return sigmoid_cross_entropy(logits, SoftTargets(index_K[None], probability_K[None])).sum()

    samples = torch.cat(logits, dim=1), targets.index_BK, targets.probability_BK
    found = torch.func.vmap(torch.func.grad(compute_loss), (None, 0, 0, 0))(weight, *samples)
    for row, gradient in enumerate(found):
        expected = torch.func.grad(compute_loss)(weight, *(tensor[row] for tensor in samples))
        torch.testing.assert_close(gradient, expected)


def test_huge_logits_give_finite_losses_and_gradients():
    logits_BV = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    targets = SoftTargets(torch.tensor([[0, 1]]), torch.ones(1, 2))
    loss_B = sigmoid_cross_entropy([logits_BV], targets)
    assert loss_B.tolist() == [2e4]  # class 1 is missed by 1e4, class 2 is asserted by 1e4; the others are right
    loss_B.sum().backward()
    assert logits_BV.grad.tolist() == [[0, -1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    # 5,000 softplus values of 0.0067 each: a running sum in bfloat16 stops growing at 2, in float16 it strays.
    logits_BV = torch.full((1, 5000), -5.0, dtype=dtype)
    nothing = SoftTargets.from_labels([()])
    loss_B = sigmoid_cross_entropy([logits_BV], nothing)
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, reference([logits_BV], nothing).sum(1).float(), rtol=1e-5, atol=0)
