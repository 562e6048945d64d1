"""Paced logits: values and whole gradients against the formula in float64, where gamma starts, and the loss it allows.

Shapes: B batch, V classes of one vertical, M verticals, C all classes.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from concentration.errors import ConfigError, DataError
from concentration.networks.pace import Pace, PaceConfig, lowest_loss_without_offset, normalise
from concentration.schema import parse_config

SIZES = (100, 36, 7)

# The five settings of Figure 5, in its order.
FIGURE_5 = (
    {"kind": "fixed", "init": "sqrt"},
    {"kind": "vertical", "init": 10},
    {"kind": "class", "init": 10},
    {"kind": "vertical", "init": "sqrt"},
    {"kind": "class", "init": "sqrt"},
)


def build(sizes: tuple[int, ...] = SIZES, seed: int = 0, **options: object) -> Pace:
    torch.manual_seed(seed)
    return Pace(sizes, parse_config(PaceConfig, options))


def draw_logits(sizes: tuple[int, ...] = SIZES, num_samples: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_samples, size, generator=generator, dtype=torch.float64) * 3 - 1 for size in sizes]


def reference(x_V: Tensor, gamma: Tensor | float) -> Tensor:
    """y of one sample and vertical: gamma * x / sqrt(sum x^2 + N_v * 1e-6)."""
    return gamma * x_V / (x_V.square().sum() + len(x_V) * 1e-6).sqrt()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("offset", ["none", "vertical", "class"])
@pytest.mark.parametrize("kind", ["vertical", "class"])
def test_paced_logits_are_the_formula_sample_by_sample(kind, offset, log):
    pace = build(kind=kind, offset=offset, log=log, deviation=0.5)
    if offset != "none":
        torch.nn.init.normal_(pace.offset)
    logits = draw_logits()
    gamma = pace.compute_gamma().detach().double()
    start = 0
    for v, (raw_BV, paced_BV) in enumerate(zip(logits, pace(logits), strict=True)):
        own = slice(start, start := start + SIZES[v])
        own_gamma = gamma[own] if kind == "class" else gamma[v]
        expected = [reference(raw_V, own_gamma) for raw_V in raw_BV]
        if offset != "none":
            own_offset = pace.offset[own] if offset == "class" else pace.offset[v]
            expected = [y_V + own_offset.double() for y_V in expected]
        torch.testing.assert_close(paced_BV, torch.stack(expected))


def test_without_pace_logits_stay_as_they_are():
    logits = draw_logits()
    pace = build(kind="none")
    assert all(a is b for a, b in zip(pace(logits), logits, strict=True))
    assert list(pace.parameters()) == []


@pytest.mark.parametrize("kind", ["none", "fixed", "vertical", "class"])
def test_logits_of_other_verticals_are_refused(kind):
    """gamma and the norm's epsilon are those of a vertical's size, so another's would be paced without a word."""
    logits, pace = draw_logits(), build(kind=kind)
    for wrong in (logits[::-1], logits[:-1], torch.cat(logits, dim=1)):
        with pytest.raises(DataError, match=r"pace: logits of \[.*\] classes by vertical, expected \["):
            pace(wrong)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_paced_vertical_has_the_length_gamma(scale):
    paced = build(kind="fixed")([logits_BV * scale for logits_BV in draw_logits()])
    lengths = [paced_BV.norm(dim=1).mean().item() for paced_BV in paced]
    assert lengths == pytest.approx([math.sqrt(size) for size in SIZES], rel=0.05 if scale == 1e-3 else 1e-5)


@pytest.mark.parametrize("kind", ["fixed", "vertical", "class"])
def test_the_gradient_is_that_of_the_whole_jacobian_with_the_epsilon(kind):
    deviation = {} if kind == "fixed" else {"deviation": 0.5}
    pace = build(kind=kind, **deviation)
    logits = [(logits_BV * 1e-3).requires_grad_() for logits_BV in draw_logits()]  # small, so that the epsilon counts
    gradients = draw_logits(seed=1)  # of a loss by the paced logits: g
    torch.autograd.backward(pace(logits), gradients)
    gammas = pace.compute_gamma().detach().double()
    gammas = gammas.split(SIZES) if kind == "class" else gammas.unbind()
    for x_BV, g_BV, gamma in zip(logits, gradients, gammas, strict=True):
        # The closed form of `fused_block`: dx = (h - xhat <h, xhat>) / n
        n_B1 = (x_BV.detach().square().sum(1, keepdim=True) + x_BV.shape[1] * 1e-6).sqrt()
        xhat_BV, h_BV = x_BV.detach() / n_B1, gamma * g_BV
        expected_BV = (h_BV - xhat_BV * (h_BV * xhat_BV).sum(1, keepdim=True)) / n_B1
        torch.testing.assert_close(x_BV.grad, expected_BV)


@pytest.mark.parametrize("kind", ["vertical", "class"])
@pytest.mark.parametrize("log", [False, True])
def test_all_gradients_are_right_in_double_precision(kind, log):
    pace = build((4, 3), kind=kind, offset=kind, log=log, deviation=0.1).double()
    names = [name for name, _ in pace.named_parameters()]
    inputs = [logits_BV.requires_grad_() for logits_BV in draw_logits((4, 3), num_samples=2)]

    def paced(a_BV, b_BV, *parameters):
        return tuple(torch.func.functional_call(pace, dict(zip(names, parameters, strict=True)), ([a_BV, b_BV],)))

    assert torch.autograd.gradcheck(paced, (*inputs, *pace.parameters()))


def test_the_diagonal_of_equation_5_is_not_the_gradient_once_logits_drift_negative():
    num_classes = 1000
    noise_V = torch.randn(num_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target_V = torch.zeros(num_classes, dtype=torch.float64)
    target_V[[3, 7]] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    gamma = math.sqrt(num_classes)

    def cosine(drift: float) -> float:
        x_V = (noise_V - drift).requires_grad_()
        y_V = gamma * normalise(x_V[None])[0]
        g_V = torch.autograd.grad((softplus(y_V) - target_V * y_V).sum(), x_V)[0]
        n = x_V.norm().item()
        h_V = gamma * (y_V.sigmoid() - target_V)
        diagonal_V = h_V * (1 / n - x_V.square() / n**3)
        return cosine_similarity(diagonal_V, g_V, dim=0).item()

    cosines = [cosine(drift) for drift in (0.5, 1, 2, 3, 4)]
    assert cosines[0] > 0.99
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] < 0.6


def test_the_slope_at_zero_is_finite_where_that_of_torchs_normalize_is_not():
    def slope(function) -> float:
        x_BV = torch.zeros(2, 50, requires_grad=True)
        function(x_BV)[:, 0].sum().backward()
        return x_BV.grad.abs().max().item()

    assert slope(normalise) == pytest.approx(1 / math.sqrt(50 * 1e-6))
    assert slope(torch.nn.functional.normalize) > 1e9
    assert normalise(torch.zeros(2, 50)).tolist() == [[0.0] * 50] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    x_BV = torch.full((1, 4096), 300.0, dtype=dtype)  # the sum of squares is far beyond float16
    y_BV = normalise(x_BV)
    assert y_BV.dtype == torch.float32
    torch.testing.assert_close(y_BV, torch.full((1, 4096), 1 / 64))


@pytest.mark.parametrize("options", FIGURE_5)
def test_gamma_starts_as_in_figure_5(options):
    pace = build(**options)
    expected_M = torch.tensor(SIZES).sqrt() if options["init"] == "sqrt" else torch.full((3,), 10.0)
    gamma = pace.compute_gamma()
    if options["kind"] == "fixed":
        assert torch.equal(gamma, expected_M)
        assert list(pace.parameters()) == []
    else:
        expected = expected_M.repeat_interleave(torch.tensor(SIZES)) if options["kind"] == "class" else expected_M
        difference = gamma.detach() - expected
        assert difference.shape == expected.shape
        assert 0 < difference.abs().max().item() < 5e-3  # five deviations of 1e-3
        assert pace.gamma_parameters() == list(pace.parameters()) == [pace.gamma]
    torch.testing.assert_close(pace.gamma_by_vertical(), expected_M, atol=5e-3, rtol=0)


def test_the_deviation_of_class_gammas_is_the_one_that_was_asked_for():
    gamma = build((5000,), kind="class", init=3, deviation=0.2).gamma
    assert gamma.std().item() == pytest.approx(0.2, rel=0.05)
    assert gamma.mean().item() == pytest.approx(3, abs=0.02)


def test_a_fixed_gamma_travels_with_the_weights_but_is_not_trained():
    pace = build(kind="fixed", init=7)
    assert pace.state_dict()["gamma"].tolist() == [7, 7, 7]
    assert pace.gamma_parameters() == []


@pytest.mark.parametrize("kind", ["vertical", "class"])
def test_a_log_gamma_starts_in_the_same_place_and_stays_positive(kind):
    pace = build(kind=kind, log=True)
    plain = build(kind=kind)  # the same draw
    torch.testing.assert_close(pace.compute_gamma(), plain.compute_gamma(), rtol=1e-6, atol=1e-6)
    assert pace.gamma_parameters() == [pace.rho]
    torch.nn.init.constant_(pace.rho, -20)
    assert 0 < pace.compute_gamma().min().item() < 1e-6
    wild = build((2,) * 500, kind=kind, log=True, init=1, deviation=2.0)
    assert bool((wild.compute_gamma() > 0).all())  # also where start + deviation would be negative


def test_a_step_moves_a_log_gamma_by_a_share():
    pace = build(kind="vertical", log=True, deviation=0.0)
    with torch.no_grad():
        pace.rho += math.log(1.1)
    torch.testing.assert_close(pace.compute_gamma(), torch.tensor(SIZES).sqrt() * 1.1)


def test_a_prior_becomes_the_offsets():
    frequency_C = torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(0)) * 0.3
    zeros = [torch.zeros(2, size) for size in SIZES]

    by_class = build(kind="vertical", offset="class")
    by_class.set_prior(frequency_C.logit())
    torch.testing.assert_close(torch.cat(by_class(zeros), dim=1).sigmoid(), frequency_C.expand(2, -1))

    by_vertical = build(kind="vertical", offset="vertical")
    by_vertical.set_prior(frequency_C.logit())
    for paced_BV, frequency_V in zip(by_vertical(zeros), frequency_C.split(SIZES), strict=True):
        torch.testing.assert_close(paced_BV.sigmoid(), frequency_V.mean().expand_as(paced_BV))

    without = build(kind="vertical")
    without.set_prior(frequency_C.logit())
    assert torch.cat(without(zeros), dim=1).abs().max() == 0


@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(0.1, 60), st.floats(0, 8))
@settings(max_examples=60, deadline=None, database=None)
def test_without_an_offset_no_logits_bring_a_wholly_negative_vertical_under_the_bound(seed, size, gamma, drift):
    x_BV = torch.randn(8, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - drift
    loss_B = softplus(gamma * normalise(x_BV)).sum(1)
    bound = lowest_loss_without_offset(size, gamma)
    assert loss_B.min().item() >= bound * (1 - 1e-9)
    best = softplus(gamma * normalise(torch.full((1, size), -1e4, dtype=torch.float64))).sum()
    assert best.item() == pytest.approx(bound, rel=1e-6)  # it is reached, so it is the greatest lower bound


def test_the_bound_is_a_third_of_the_classes_at_the_start_and_gradient_descent_does_not_get_under_it():
    assert lowest_loss_without_offset(5000, math.sqrt(5000)) == pytest.approx(0.313 * 5000, rel=1e-3)
    x_BV = torch.randn(1, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    pace = build((36,), kind="fixed")
    optimizer = torch.optim.Adam([x_BV], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = softplus(pace([x_BV])[0]).sum()
        loss.backward()
        optimizer.step()
    bound = lowest_loss_without_offset(36, 6)
    assert bound <= loss.item() < bound * 1.01


def test_an_offset_takes_the_loss_under_the_bound():
    pace = build(kind="fixed", offset="vertical")
    pace.set_prior(torch.full((sum(SIZES),), -7.0))
    for logits_BV, size in zip(pace(draw_logits()), SIZES, strict=True):
        assert softplus(logits_BV).sum(1).max().item() < lowest_loss_without_offset(size, math.sqrt(size)) / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none", "offset": "class"}, "pace.offset=class has no effect with pace=none; remove it"),
        ({"kind": "none", "init": 3}, "pace.init=3.0 has no effect with pace=none; remove it"),
        ({"kind": "none", "deviation": 0}, "pace.deviation=0.0 has no effect with pace=none; remove it"),
        ({"kind": "none", "log": True}, "pace.log=True has no effect with pace=none; remove it"),
        ({"kind": "none", "lr": 1}, "pace.lr=1.0 has no effect with pace=none; remove it"),
        ({"kind": "fixed", "deviation": 0.1}, "pace.deviation=0.1 has no effect with pace=fixed; remove it"),
        ({"kind": "fixed", "log": True}, "pace.log=True has no effect with pace=fixed; remove it"),
        ({"kind": "fixed", "lr": 1}, "pace.lr=1.0 has no effect with pace=fixed; remove it"),
        ({"kind": "vertical", "init": "log"}, "init="),
        ({"kind": "vertical", "init": -1}, "init="),
        ({"kind": "vertical", "lr": 0}, "lr=0: "),
        ({"kind": "verticals"}, "kind=verticals: expected 'none', 'vertical', 'class' or 'fixed'; did you mean"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(PaceConfig, options)
    assert str(caught.value).startswith(message)


def test_options_with_an_effect_are_taken():
    for options in ({"kind": "fixed", "init": 3, "offset": "class"}, {"kind": "class", "lr": 0.1, "log": True}):
        parse_config(PaceConfig, options)
