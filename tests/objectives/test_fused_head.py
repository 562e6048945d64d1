"""The fused head against the readable composition of classifiers, pace and loss, and against finite differences.

Shapes: B batch, S features of a classifier, M verticals, C all classes, K kept classes.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import linear, softplus

from concentration.errors import ConfigError, DataError
from concentration.networks.pace import Pace, PaceConfig
from concentration.objectives import fused_block, fused_head
from concentration.objectives.fused_block import ClassRange, HeadParameters, VerticalTargets
from concentration.objectives.fused_head import fused_loss_by_vertical
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy_by_vertical
from concentration.targets import SoftTargets

PACES = [
    PaceConfig(kind="none"),
    PaceConfig(kind="fixed"),
    PaceConfig(kind="fixed", offset="vertical"),
    PaceConfig(kind="vertical"),
    PaceConfig(kind="vertical", init=10, offset="class"),
    PaceConfig(kind="vertical", log=True, offset="vertical", deviation=0.5),
    PaceConfig(kind="class", deviation=0.5),
    PaceConfig(kind="class", log=True, offset="class", deviation=0.5),
    PaceConfig(kind="class", offset="vertical"),
]


class Head(nn.Module):
    """Classifiers and pace of random weights, in float64, and features of a batch."""

    def __init__(self, seed: int, sizes: list[int], config: PaceConfig, num_samples: int, width: int = 3):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.ParameterList(torch.randn(num_samples, width) for _ in sizes)
        self.classifiers = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.pace = Pace(sizes, config)
        if config.offset != "none":
            nn.init.normal_(self.pace.offset)
        self.double()

    def plain(self, targets: SoftTargets, class_weight_C: Tensor | None = None) -> Tensor:
        logits = [
            linear(hidden_BS, classify.weight, classify.bias)
            for hidden_BS, classify in zip(self.hidden, self.classifiers, strict=True)
        ]
        return sigmoid_cross_entropy_by_vertical(self.pace(logits), targets, class_weight_C)

    def fused(self, targets: SoftTargets, class_weight_C: Tensor | None = None, gradients: str = "forward") -> Tensor:
        return fused_loss_by_vertical(list(self.hidden), self.parameters_of_head(), targets, class_weight_C, gradients)

    def parameters_of_head(self) -> list[HeadParameters]:
        return [
            HeadParameters(classify.weight, classify.bias, gamma, offset)
            for classify, (gamma, offset) in zip(self.classifiers, self.pace.by_vertical(), strict=True)
        ]

    def gradients_of(self, loss: Tensor) -> dict[str, Tensor]:
        self.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def draw_targets(
    seed: int, num_samples: int, sizes: list[int], num_kept: int, background: bool, weight: bool
) -> SoftTargets:
    """Classes of any verticals, some twice, some places unused; K may exceed the classes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    index_BK = torch.randint(sum(sizes), (num_samples, num_kept), generator=generator)
    is_used_BK = uniform(num_samples, num_kept) < 0.8
    return SoftTargets(
        torch.where(is_used_BK, index_BK, 0),
        torch.where(is_used_BK, uniform(num_samples, num_kept) / num_kept, 0.0),
        uniform(num_samples, len(sizes)) / 4 if background else None,
        (uniform(num_samples, len(sizes)) * 2).round() / 2 if weight else None,
    )


cases = given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    num_samples=st.integers(1, 6),
    num_kept=st.integers(1, 14),
    pace=st.sampled_from(PACES),
    background=st.booleans(),
    weight=st.booleans(),
    class_weight=st.booleans(),
    block_elements=st.sampled_from([1, 10, 1 << 20]),
    piece_elements=st.sampled_from([1, 20, 1 << 20]),
)


@cases
@settings(max_examples=150, deadline=None, database=None)
def test_values_and_gradients_are_those_of_the_readable_form(
    seed, sizes, num_samples, num_kept, pace, background, weight, class_weight, block_elements, piece_elements
):
    head = Head(seed, sizes, pace, num_samples)
    targets = draw_targets(seed, num_samples, sizes, num_kept, background, weight)
    class_weight_C = torch.rand(sum(sizes), dtype=torch.float64) + 0.1 if class_weight else None
    expected_BM = head.plain(targets, class_weight_C)
    expected = head.gradients_of(expected_BM.mean())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_head.BLOCK_ELEMENTS, "cpu", block_elements)
        patch.setattr(fused_block, "PIECE_ELEMENTS", piece_elements)
        for time in ("forward", "backward"):
            found_BM = head.fused(targets, class_weight_C, time)
            torch.testing.assert_close(found_BM, expected_BM, rtol=1e-10, atol=1e-10)
            found = head.gradients_of(found_BM.mean())
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=f"{time} {name}")


@pytest.mark.parametrize("pace", PACES, ids=str)
def test_the_gradient_is_that_of_finite_differences(pace):
    head = Head(1, [4, 1, 6], pace, num_samples=3)
    targets = draw_targets(2, 3, [4, 1, 6], 5, background=True, weight=True)
    class_weight_C = torch.rand(11, dtype=torch.float64) + 0.1

    def each(*_: Tensor) -> Tensor:
        return head.fused(targets, class_weight_C, "backward")

    assert torch.autograd.gradcheck(each, tuple(head.parameters()))
    # gradcheck goes back through one loss several times, so the other way is held against differences of its own.
    found = head.gradients_of(head.fused(targets, class_weight_C).sum())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], central_differences(head, parameter, targets, class_weight_C), msg=name)


@torch.no_grad()
def central_differences(head: Head, parameter: Tensor, targets: SoftTargets, class_weight_C: Tensor) -> Tensor:
    slopes = torch.zeros_like(parameter)
    for place in range(parameter.numel()):
        flat, step = parameter.view(-1), 1e-5
        kept = flat[place].clone()
        losses = []
        for value in (kept + step, kept - step):
            flat[place] = value
            losses.append(head.fused(targets, class_weight_C).sum())
        flat[place] = kept
        slopes.view(-1)[place] = (losses[0] - losses[1]) / (2 * step)
    return slopes


def test_gradients_taken_in_the_backward_pass_allow_any_weights_of_samples():
    head = Head(0, [4, 5], PaceConfig(kind="vertical"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    weight_BM = torch.tensor([[1.0, 2.0], [0.0, 0.5], [3.0, 1.0]])
    expected = head.gradients_of((head.plain(targets) * weight_BM).sum())
    found = head.gradients_of((head.fused(targets, gradients="backward") * weight_BM).sum())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


def test_weights_after_the_loss_are_refused_where_its_gradients_are_already_taken():
    head = Head(0, [4, 5], PaceConfig(kind="vertical"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    with pytest.raises(DataError, match=r"give weights as `targets\.weight_BM`"):
        (head.fused(targets).sum(1) * torch.tensor([1.0, 0.0, 1.0])).sum().backward()


def test_a_second_backward_pass_is_refused_where_the_gradients_are_used_up():
    head = Head(0, [4], PaceConfig(kind="none"), num_samples=3)
    loss = head.fused(draw_targets(0, 3, [4], 4, background=False, weight=False)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_the_second_derivative_is_refused(gradients):
    """torch would take it for 0 where the loss is summed."""
    head = Head(0, [4], PaceConfig(kind="vertical"), num_samples=3)
    loss = head.fused(draw_targets(0, 3, [4], 4, background=False, weight=False), gradients=gradients).sum()
    with pytest.raises(RuntimeError, match="no second derivative; take it of `sigmoid_cross_entropy`"):
        torch.autograd.grad(loss, head.hidden[0], create_graph=True)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_without_samples_all_gradients_are_zero(gradients):
    """Also where the memory that they are given held something else."""
    head = Head(0, [400, 500], PaceConfig(kind="class", log=True, offset="class"), num_samples=0, width=30)
    freed = [torch.full_like(classify.weight, torch.nan) for classify in head.classifiers for _ in range(20)]
    del freed
    loss_BM = head.fused(SoftTargets.from_labels([]), gradients=gradients)
    assert loss_BM.shape == (0, 2)
    for gradient in head.gradients_of(loss_BM.sum()).values():
        assert not gradient.any()


@pytest.mark.parametrize("part", ["probability_BK", "weight_BM", "background_BM", "class_weight_C"])
def test_targets_that_want_a_gradient_are_refused_as_they_would_get_none(part):
    head = Head(0, [4, 5], PaceConfig(kind="vertical"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=True, weight=True)
    class_weight_C = torch.ones(9, dtype=torch.float64, requires_grad=part == "class_weight_C")
    if part != "class_weight_C":
        targets = dataclasses.replace(targets, **{part: getattr(targets, part).requires_grad_()})
    with pytest.raises(DataError, match="require a gradient, and would get none; detach them"):
        head.fused(targets, class_weight_C)
    with torch.no_grad():
        assert head.fused(targets, class_weight_C).isfinite().all()


def test_gradients_of_several_losses_add_up():
    head = Head(0, [4, 5], PaceConfig(kind="vertical", log=True, offset="class"), num_samples=3)
    several = [draw_targets(seed, 3, [4, 5], 4, background=False, weight=False) for seed in range(3)]
    expected = head.gradients_of(sum(head.plain(targets).sum() for targets in several))
    head.zero_grad()
    for targets in several:
        head.fused(targets).sum().backward()
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    head = Head(0, [4, 5], PaceConfig(kind="vertical", offset="class"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    expected = head.gradients_of(head.plain(targets).sum())
    head.hidden.requires_grad_(False)
    head.classifiers[0].requires_grad_(False)
    head.zero_grad(set_to_none=True)
    head.fused(targets).sum().backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


def test_without_gradients_the_loss_is_the_same():
    head = Head(0, [4, 5], PaceConfig(kind="class", offset="class"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=True, weight=False)
    with torch.no_grad():
        loss_BM = head.fused(targets)
    assert not loss_BM.requires_grad
    torch.testing.assert_close(loss_BM, head.plain(targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_only_the_products_are_narrow(dtype):
    sizes = [40, 300]
    head = Head(0, sizes, PaceConfig(kind="vertical", log=True, offset="class"), num_samples=16, width=64).float()
    targets = draw_targets(0, 16, sizes, 20, background=False, weight=True)
    targets = dataclasses.replace(targets, **{
        name: getattr(targets, name).float() for name in ("probability_BK", "weight_BM")
    })  # fmt: skip
    exact_BM = head.plain(targets)
    exact = head.gradients_of(exact_BM.sum())
    with torch.autocast("cpu", dtype):
        found_BM = head.fused(targets)
    assert found_BM.dtype == torch.float32
    torch.testing.assert_close(found_BM, exact_BM, rtol=0.01, atol=0.05)
    for name, gradient in head.gradients_of(found_BM.sum()).items():
        assert gradient.dtype == torch.float32, name
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert error < 0.03, (name, error)


def test_gradients_far_below_the_range_of_float16_are_kept():
    head = Head(0, [30], PaceConfig(kind="none"), num_samples=4, width=16).float()
    with torch.no_grad():
        head.classifiers[0].bias.fill_(-20.0)  # sigmoids of 2e-9
    targets = SoftTargets(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1))
    expected = head.gradients_of(head.plain(targets).sum())["classifiers.0.weight"]
    with torch.autocast("cpu", torch.float16):
        loss = head.fused(targets).sum()
    found = head.gradients_of(loss)["classifiers.0.weight"]
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_a_loss_scale_keeps_the_features_gradients_in_float16(gradients):
    """Of a vertical that no sample is of: many small pulls, far below what float16 holds without a scale."""
    scale = 2.0**16
    torch.manual_seed(0)
    hidden_BS = torch.randn(16, 64)
    vertical = HeadParameters(torch.randn(500, 64) / 64, torch.full((500,), -9.0))
    share_BM = torch.full((16, 1), 1 / 4096)  # of a sample in a large batch, as training weighs it
    targets = SoftTargets(torch.zeros(16, 1, dtype=torch.int64), torch.zeros(16, 1), weight_BM=share_BM)

    def differentiate(hidden_BS: torch.Tensor) -> torch.Tensor:
        hidden_BS = hidden_BS.detach().requires_grad_()
        loss_BM = fused_loss_by_vertical([hidden_BS], [vertical], targets, gradients=gradients)
        (loss_BM.sum() * scale).backward()
        return hidden_BS.grad.float() / scale

    exact = differentiate(hidden_BS.half().float())
    with torch.autocast("cpu", torch.float16):
        found = differentiate(hidden_BS.half())
    assert exact.abs().median() < 2.0**-24
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("centre", [-60.0, -12.0, 0.0, 12.0])
def test_the_loss_of_any_number_of_classes_in_float32_is_as_exact_as_float32(centre, spread):
    for width in (*range(1, 26), 1000):
        logits_RV = centre + spread * torch.randn(5, width, generator=torch.Generator().manual_seed(width))
        none = VerticalTargets.of(SoftTargets.from_labels([[]] * 5), 0, slice(0, width), None)
        vertical = HeadParameters(torch.empty(width, 1), torch.empty(width))
        found_R = fused_block.compute_block(logits_RV.clone(), vertical, none, ClassRange(0, width), None, False).loss_R
        expected_R = softplus(logits_RV.double(), threshold=700).sum(1)
        torch.testing.assert_close(found_R.double(), expected_R, rtol=2e-6, atol=0, msg=f"{width} classes")


def test_the_loss_in_float32_is_exact_for_logits_far_from_zero():
    """Also of one class alone: in a sum the small ones would be drowned."""
    logits = torch.linspace(-80, 80, 321, dtype=torch.float64)
    vertical = HeadParameters(torch.zeros(1, 1), torch.zeros(1), offset=None)
    targets = SoftTargets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
    for logit in logits:
        found = fused_loss_by_vertical([torch.zeros(1, 1)], [vertical._replace(bias=logit.float()[None])], targets)
        expected = softplus(logit, threshold=700)
        torch.testing.assert_close(found[0, 0].double(), expected, rtol=3e-7, atol=1e-44)


def test_equal_inputs_give_equal_bits():
    head = Head(0, [40, 7], PaceConfig(kind="vertical", offset="class"), num_samples=16).float()
    targets = draw_targets(0, 16, [40, 7], 20, background=False, weight=False)
    first = head.gradients_of(head.fused(targets).sum())
    second = head.gradients_of(head.fused(targets).sum())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_hook_sees_one_vertical_s_gradient_before_the_next_exists():
    """What update-in-backward stands on: a hook that steps and drops each gradient leaves no two of them alive."""
    head = Head(0, [4, 5, 6], PaceConfig(kind="vertical"), num_samples=3)
    alive = []
    for classify in head.classifiers:

        def drop(parameter: nn.Parameter) -> None:
            alive.append(sum(other.weight.grad is not None for other in head.classifiers))
            parameter.grad = None

        classify.weight.register_post_accumulate_grad_hook(drop)
    head.fused(draw_targets(0, 3, [4, 5, 6], 4, background=False, weight=False), gradients="backward").sum().backward()
    assert alive == [1, 1, 1]


def test_it_works_under_torch_compile():
    head = Head(0, [4, 5], PaceConfig(kind="vertical", offset="class"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    expected = head.gradients_of(head.plain(targets).sum())
    compiled = torch.compile(lambda: head.fused(targets).sum() * 2, backend="aot_eager")
    for name, gradient in head.gradients_of(compiled()).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-8, atol=1e-10)


def replaced(targets: SoftTargets, **parts: Tensor) -> SoftTargets:
    return dataclasses.replace(targets, **parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replaced(t, index_BK=t.index_BK + 9), "name classes 9 to .*expected 0 to 8"),
        (lambda t: replaced(t, index_BK=t.index_BK - 1), "name classes -1 to .*expected 0 to 8"),
        (lambda t: replaced(t, probability_BK=t.probability_BK + 1.5), r"outside \[0, 1\], or NaN"),
        (lambda t: replaced(t, probability_BK=t.probability_BK * float("nan")), r"outside \[0, 1\], or NaN"),
        (lambda t: replaced(t, probability_BK=t.probability_BK[:, :1]), r"\(3, 4\) classes and \(3, 1\) probabilities"),
        (lambda t: replaced(t, index_BK=t.index_BK[:2], probability_BK=t.probability_BK[:2]), "for 3 samples"),
        (lambda t: replaced(t, weight_BM=torch.ones(3, 3)), r"weight \(3, 3\), expected \(3, 2\)"),
        (lambda t: replaced(t, background_BM=torch.ones(2, 2)), r"background \(2, 2\), expected \(3, 2\)"),
    ],
)
def test_targets_that_cannot_be_are_named(change, message):
    head = Head(0, [4, 5], PaceConfig(kind="vertical"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    targets = replaced(targets, index_BK=torch.arange(12).reshape(3, 4) % 9)
    with pytest.raises(DataError, match=message):
        head.fused(change(targets))


def test_a_misspelt_time_of_the_gradients_is_refused():
    """It would give a loss, and no gradient at all."""
    head = Head(0, [4, 5], PaceConfig(kind="vertical"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    with pytest.raises(
        ConfigError, match="gradients=backwards: expected 'forward' or 'backward'; did you mean 'backward'"
    ):
        head.fused(targets, gradients="backwards")


def test_parts_that_do_not_fit_are_named():
    head = Head(0, [4, 5], PaceConfig(kind="class"), num_samples=3)
    targets = draw_targets(0, 3, [4, 5], 4, background=False, weight=False)
    hidden, parameters = list(head.hidden), head.parameters_of_head()
    with pytest.raises(DataError, match="1 verticals of features for 2 verticals of classes"):
        fused_loss_by_vertical(hidden[:1], parameters, targets)
    with pytest.raises(DataError, match=r"vertical 1 has the shapes .*\(3, 2\).*expected .*\(3, 3\)"):
        fused_loss_by_vertical([hidden[0], hidden[1][:, :2]], parameters, targets)
    wrong = parameters[0]._replace(gamma=parameters[1].gamma)
    with pytest.raises(DataError, match=r"vertical 0 .*'gamma': \(5,\).*expected .*'gamma': \(4,\)"):
        fused_loss_by_vertical(hidden, [wrong, parameters[1]], targets)
    with pytest.raises(DataError, match=r"features of torch\.float32 and weights of torch\.float64"):
        fused_loss_by_vertical([h.float() for h in hidden], parameters, targets)
    with pytest.raises(DataError, match=r"class weights \(4,\), expected \(9,\)"):
        fused_loss_by_vertical(hidden, parameters, targets, torch.ones(4))
    with pytest.raises(DataError, match=r"lies on .*cpu.*meta"):
        fused_loss_by_vertical([h.to("meta") for h in hidden], parameters, targets)


def test_on_a_gpu_the_host_never_waits_for_a_value(monkeypatch):
    """Tensors of torch's fake mode lie on a GPU that need not be here and hold no values: who asks for one gets an error."""
    monkeypatch.setattr(fused_head, "_choose_kernels", lambda *_: fused_block)
    with FakeTensorMode():

        def make(*shape: int) -> Tensor:
            return torch.zeros(shape, device="cuda", requires_grad=True)

        sizes = (30, 200)
        hidden = [make(6, 8) for _ in sizes]
        parameters = [HeadParameters(make(size, 8), make(size), make(), make(size)) for size in sizes]
        index_BK = torch.zeros(6, 9, dtype=torch.int64, device="cuda")
        targets = SoftTargets(index_BK, make(6, 9).detach(), make(6, 2).detach(), make(6, 2).detach())
        loss_BM = fused_loss_by_vertical(hidden, parameters, targets, make(230).detach())
        assert (loss_BM.device.type, loss_BM.shape) == ("cuda", (6, 2))
        # torch's backward pass wants a real device; these are the steps that ours takes in it.
        found = fused_head._Gradients(*(tensor.detach() for tensor in (hidden[0], *parameters[0])))
        fused_head._scale(found, make(6).detach())
        with pytest.raises(DataDependentOutputException):
            bool(loss_BM.sum() > 0)
