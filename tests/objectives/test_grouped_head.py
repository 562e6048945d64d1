"""The head in groups of verticals against the head vertical by vertical: in Triton's interpreter on a CPU, compiled on a GPU.

With products in float32 both must be equal to rounding of float32; with those in bf16, which torch has, to rounding of bf16.

Shapes: B samples, M verticals, S features, V classes, P columns, K listed classes.
"""

import itertools

import pytest
import torch
from torch import Tensor

from concentration.objectives import grouped_head, vertical_groups
from concentration.objectives.fused_block import HeadParameters
from concentration.objectives.fused_head import fused_loss_by_vertical
from concentration.objectives.grouped_head import grouped_loss_by_vertical
from concentration.targets import SoftTargets

pytest.importorskip("triton", reason="Triton is not made for this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES, WIDTH, NUM_SAMPLES, NUM_LISTED = (5, 16, 300, 3), 8, 6, 9


def multiply_exactly(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """torch's `grouped_mm` for the three forms that the head has, product by product."""
    starts = [0, *offs.tolist()]
    spans = [slice(*pair) for pair in itertools.pairwise(starts)]
    if left.ndim == 3:
        return torch.cat([a @ right[:, span] for a, span in zip(left, spans, strict=True)], 1)
    if right.ndim == 3:
        return torch.cat([left[span] @ b for b, span in zip(right, spans, strict=True)])
    return torch.stack([left[:, span] @ right[span] for span in spans])


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(grouped_head, "grouped_mm", multiply_exactly)
    monkeypatch.setattr(grouped_head, "PRODUCT_TYPE", torch.float32)


def draw(gamma: int | None, offset: int | None, options: bool, sizes=SIZES, width=WIDTH):
    """Hidden, parameters, targets, class weights, and all that has gradients."""
    generator = torch.Generator().manual_seed(len(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    def pace(axes: int | None, size: int) -> Tensor | None:
        return None if axes is None else normal(*(size,) * axes)

    hidden = [normal(NUM_SAMPLES, width) for _ in sizes]
    parameters = [
        HeadParameters(normal(size, width), normal(size), pace(gamma, size), pace(offset, size)) for size in sizes
    ]
    index_BK = torch.randint(sum(sizes), (NUM_SAMPLES, NUM_LISTED), generator=generator)
    index_BK[:, 1] = index_BK[:, 0]  # listed twice
    index_BK[:, 2] = sum(sizes) - 1
    probability_BK = torch.rand(NUM_SAMPLES, NUM_LISTED, generator=generator) / 2
    probability_BK[:, 3:5] = 0  # places without a class
    index_BK[:, 3:5] = 0
    of_verticals = [
        torch.rand(NUM_SAMPLES, len(sizes), generator=generator).to(DEVICE) if options else None for _ in range(2)
    ]
    targets = SoftTargets(index_BK.to(DEVICE), probability_BK.to(DEVICE), *of_verticals)
    class_weight_C = torch.rand(sum(sizes), generator=generator).to(DEVICE) if options else None
    leaves = [*hidden, *(t for vertical in parameters for t in vertical if t is not None)]
    return hidden, parameters, targets, class_weight_C, leaves


def run(compute_loss, drawn, factor: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    *arguments, leaves = drawn
    loss_BM = compute_loss(*arguments)
    return loss_BM.detach(), list(torch.autograd.grad(loss_BM.sum() * factor, leaves))


@pytest.mark.parametrize(
    ("gamma", "offset", "options"), list(itertools.product([None, 0, 1], [None, 0, 1], [False, True]))
)
def test_groups_are_their_verticals_one_by_one(exact, gamma, offset, options):
    drawn = draw(gamma, offset, options)
    expected_loss, expected = run(fused_loss_by_vertical, drawn, 0.5)
    loss, found = run(grouped_loss_by_vertical, drawn, 0.5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    for gradient, of_reference in zip(found, expected, strict=True):
        assert gradient.shape == of_reference.shape
        torch.testing.assert_close(gradient, of_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_most", [1, 6 * 21, 6 * 321])
def test_any_division_into_groups_gives_the_same(exact, monkeypatch, at_most):
    drawn = draw(0, 1, options=True)
    expected_loss, expected = run(grouped_loss_by_vertical, drawn)
    monkeypatch.setattr(vertical_groups, "GROUP_ELEMENTS", at_most)
    loss, found = run(grouped_loss_by_vertical, drawn)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, of_reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, of_reference)


@pytest.mark.parametrize("width", [1, 7, 19])
def test_a_width_that_is_padded_gives_the_same(exact, width):
    drawn = draw(0, 1, options=True, width=width)
    expected_loss, expected = run(fused_loss_by_vertical, drawn, 0.5)
    loss, found = run(grouped_loss_by_vertical, drawn, 0.5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    for gradient, of_reference in zip(found, expected, strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, of_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 16), (1, 1, 1), (2100,)])
def test_verticals_without_padding_of_one_class_and_alone(exact, sizes):
    drawn = draw(1, 1, options=False, sizes=sizes)
    expected_loss, expected = run(fused_loss_by_vertical, drawn)
    loss, found = run(grouped_loss_by_vertical, drawn)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    for gradient, of_reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, of_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [64, 19])
def test_torchs_own_products_give_the_same_to_rounding_of_bf16(width):
    drawn = draw(0, 1, options=True, width=width)
    expected_loss, expected = run(fused_loss_by_vertical, drawn)
    loss, found = run(grouped_loss_by_vertical, drawn)
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0.02)
    for gradient, of_reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - of_reference).norm() <= 0.02 * of_reference.norm() + 1e-3


def test_the_loss_alone_needs_no_gradients(exact):
    hidden, parameters, targets, class_weight_C, _ = draw(0, 0, options=True)
    with torch.no_grad():
        found = grouped_loss_by_vertical(hidden, parameters, targets, class_weight_C)
        expected = fused_loss_by_vertical(hidden, parameters, targets, class_weight_C)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_second_derivative_and_a_second_backward_pass_are_refused(exact):
    hidden, parameters, targets, class_weight_C, _ = draw(0, 0, options=False)
    loss = grouped_loss_by_vertical(hidden, parameters, targets, class_weight_C).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward pass"):
        loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no GPU here")
def test_on_a_gpu_autocast_takes_this_form_and_a_graph_can_hold_it():
    drawn = draw(0, 1, options=True, sizes=(5, 1600, 300), width=64)
    *arguments, leaves = drawn
    expected_loss, expected = run(fused_loss_by_vertical, drawn)
    assert not grouped_head.can_group(*arguments[:2])

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            assert grouped_head.can_group(*arguments[:2])
            assert not grouped_head.can_group([hidden_BS[:0] for hidden_BS in arguments[0]], arguments[1])
            loss_BM = fused_loss_by_vertical(*arguments)
        return loss_BM.detach(), *torch.autograd.grad(loss_BM.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, *found = step()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0.02)
    for gradient, of_reference in zip(found, expected, strict=True):
        assert (gradient - of_reference).norm() <= 0.03 * of_reference.norm() + 1e-3
