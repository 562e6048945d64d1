"""The Triton kernels against the arithmetic in torch: in Triton's interpreter on a CPU, and compiled where there is a GPU.

Shapes: R samples, V classes, K listed classes.
"""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from concentration.objectives import fused_block, fused_head
from concentration.objectives.fused_block import ClassRange, HeadParameters, VerticalTargets
from concentration.objectives.fused_head import fused_loss_by_vertical
from concentration.targets import SoftTargets

pytest.importorskip("triton", reason="Triton is not made for this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels():
    return importlib.import_module("concentration.objectives.fused_block_triton")


def draw(
    num_rows: int, num_classes: int, num_listed: int, gamma: int | None, offset: int | None, options: bool
) -> tuple[Tensor, HeadParameters, VerticalTargets, Tensor]:
    """Logits, pace (a number of axes: 0 a number, 1 one of every class), targets, and upstream weights."""
    generator = torch.Generator().manual_seed(num_rows + num_classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    weight_VS = normal(num_classes, 1)
    shapes = {None: None, 0: (), 1: (num_classes,)}
    vertical = HeadParameters(
        weight_VS, weight_VS[:, 0], *(None if n is None else normal(*shapes[n]).abs() * 3 for n in (gamma, offset))
    )
    index_RK = torch.randint(num_classes, (num_rows, num_listed), generator=generator).to(DEVICE)
    is_used_RK = normal(num_rows, num_listed) > -0.5
    targets = VerticalTargets(
        torch.where(is_used_RK, index_RK, 0),
        torch.where(is_used_RK, normal(num_rows, num_listed).sigmoid(), 0.0),
        background_B1=normal(num_rows, 1).sigmoid() / 4 if options else None,
        weight_B=normal(num_rows).abs() if options else None,
        class_weight_V=normal(num_classes).abs() if options else None,
    )
    return normal(num_rows, num_classes) * 4, vertical, targets, normal(num_rows).abs()


def assert_equal(found: fused_block.Block, expected: fused_block.Block, tolerance: float = 1e-4) -> None:
    def derivative(block: fused_block.Block) -> Tensor:
        return block.slope_RV.float() * block.scale_R[:, None]

    torch.testing.assert_close(found.loss_R, expected.loss_R, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(derivative(found), derivative(expected), rtol=tolerance, atol=tolerance)
    for name in ("gamma", "offset", "bias_V"):
        pair = getattr(found, name), getattr(expected, name)
        assert (pair[0] is None) == (pair[1] is None), name
        if pair[0] is not None:
            torch.testing.assert_close(*pair, rtol=tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize(
    ("gamma", "offset", "options"), list(itertools.product([None, 0, 1], [None, 0, 1], [False, True]))
)
def test_every_form_is_that_of_torch(kernels, gamma, offset, options):
    logits_RV, vertical, targets, upstream_R = draw(5, 300, 7, gamma, offset, options)
    classes = ClassRange(0, 300)
    expected = fused_block.compute_block(logits_RV.clone(), vertical, targets, classes, upstream_R, True)
    assert_equal(kernels.compute_block(logits_RV.clone(), vertical, targets, classes, upstream_R, True), expected)


@pytest.mark.parametrize(("num_rows", "num_classes", "num_listed"), [(1, 1, 1), (70, 5, 9), (3, 2500, 130)])
def test_sizes_that_fill_no_tile(kernels, num_rows, num_classes, num_listed):
    logits_RV, vertical, targets, _ = draw(num_rows, num_classes, num_listed, 0, 1, options=True)
    classes = ClassRange(0, num_classes)
    expected = fused_block.compute_block(logits_RV.clone(), vertical, targets, classes, None, True)
    assert_equal(kernels.compute_block(logits_RV.clone(), vertical, targets, classes, None, True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_narrow_slopes_that_are_never_float16(kernels, dtype):
    logits_RV, vertical, targets, upstream_R = draw(5, 300, 7, 0, 1, options=False)
    classes = ClassRange(0, 300)
    narrow_RV = logits_RV.to(dtype)
    expected = fused_block.compute_block(narrow_RV.float(), vertical, targets, classes, upstream_R, True)
    found = kernels.compute_block(narrow_RV, vertical, targets, classes, upstream_R, True)
    assert found.slope_RV.dtype == torch.bfloat16
    assert found.loss_R.dtype == torch.float32
    error = (found.slope_RV.float() - expected.slope_RV).norm() / expected.slope_RV.norm()
    assert error < 0.01
    torch.testing.assert_close(found.loss_R, expected.loss_R, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.offset, expected.offset, rtol=1e-4, atol=1e-3)


def test_without_gradients_there_is_only_the_loss(kernels):
    logits_RV, vertical, targets, _ = draw(5, 30, 7, 1, 1, options=True)
    found = kernels.compute_block(logits_RV.clone(), vertical, targets, ClassRange(0, 30), None, False)
    expected = fused_block.compute_block(logits_RV.clone(), vertical, targets, ClassRange(0, 30), None, False)
    torch.testing.assert_close(found.loss_R, expected.loss_R, rtol=1e-5, atol=1e-4)
    assert found[1:] == (None,) * 5


def test_a_share_of_a_vertical_adds_its_sums_to_those_of_others(kernels):
    """Twice the same share: all sums over classes double."""
    logits_RV, vertical, targets, _ = draw(5, 30, 7, 0, 0, options=False)
    classes = ClassRange(0, 60, sum_over_shards=lambda value: 2 * value)
    expected = fused_block.compute_block(logits_RV.clone(), vertical, targets, classes, None, True)
    assert_equal(kernels.compute_block(logits_RV.clone(), vertical, targets, classes, None, True), expected)


def test_a_wholly_silent_class_keeps_its_loss(kernels):
    """softplus(-30) is 9.4e-14, far below the spacing of float32 at 1."""
    vertical = HeadParameters(torch.zeros(4, 1, device=DEVICE), torch.zeros(4, device=DEVICE))
    targets = VerticalTargets(
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.zeros(1, 1, device=DEVICE), None, None, None
    )
    found = kernels.compute_block(
        torch.full((1, 4), -30.0, device=DEVICE), vertical, targets, ClassRange(0, 4), None, False
    )
    torch.testing.assert_close(found.loss_R.double().cpu(), 4 * torch.tensor([-30.0]).double().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_are_scaled_by_a_number_on_the_device(kernels, factor):
    tensor = torch.arange(5000.0, device=DEVICE).view(2, 2500)
    expected = tensor * factor
    kernels.scale_in_place(tensor, torch.tensor(factor, device=DEVICE))
    assert torch.equal(tensor, expected)


def test_the_head_is_the_same_with_these_kernels(kernels, monkeypatch):
    sizes = [30, 200]
    torch.manual_seed(0)
    weights = [torch.randn(size, 8, device=DEVICE, requires_grad=True) for size in sizes]
    hidden = [torch.randn(6, 8, device=DEVICE, requires_grad=True) for _ in sizes]
    gamma_M = torch.tensor([3.0, 9.0], device=DEVICE, requires_grad=True)
    parameters = [
        HeadParameters(weight_VS, torch.zeros(len(weight_VS), device=DEVICE), gamma)
        for weight_VS, gamma in zip(weights, gamma_M.unbind(), strict=True)
    ]
    targets = SoftTargets(torch.randint(230, (6, 9), device=DEVICE), torch.rand(6, 9, device=DEVICE))
    leaves = [*weights, *hidden, gamma_M]
    found = {}
    for module in (kernels, fused_block):
        monkeypatch.setattr(fused_head, "_choose_kernels", lambda *_, module=module: module)
        found[module] = torch.autograd.grad(fused_loss_by_vertical(hidden, parameters, targets).mean(), leaves)
    for gradient, expected in zip(found[kernels], found[fused_block], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_kernels_compile_for_a_gpu_that_need_not_be_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 24
