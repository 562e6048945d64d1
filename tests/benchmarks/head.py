"""The fused head beside the plain composition: time and peak memory of forward and backward, and of a step.

python tests/benchmarks/head.py            some 10 minutes on one CPU core

20 verticals of 500 to 20,000 classes (ten times that for a million), 512 features each, 100 listed classes a sample. Sides
are timed in turns in one process, in seconds of the processor; peak memory is measured in a process for each side, beyond what
parameters and inputs take. Then small heads, of 12 equal verticals with 64 features each and B=64: there the plain composition
is faster, and a student takes it (`student.FEW_LOGITS`).

Shapes: B samples, M verticals, S features of a classifier, K listed classes.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import Comparison, cpu_seconds, mixed_precision, publish, resident_bytes, take_best
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from concentration.networks.pace import Pace, PaceConfig
from concentration.objectives.fused_block import HeadParameters
from concentration.objectives.fused_head import fused_loss_by_vertical
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy_by_vertical
from concentration.targets import SoftTargets
from concentration.training.optimizers import AdagradConfig

VERTICAL_SIZES = (20_000, 15_500, 12_000, 9_500, 7_500, 6_000, 5_000, 4_000, 3_500, 3_000,
                  2_500, 2_300, 2_000, 1_700, 1_500, 1_200, 900, 800, 600, 500)  # fmt: skip
WIDTH, NUM_LISTED = 512, 100
#: All classes of small heads, and the repetitions that make their steps long enough to be timed.
SMALL_SIZES, SMALL_REPEATS = (600, 1500, 6000, 12_000, 24_000), 20
SMALL_VERTICALS, SMALL_WIDTH, SMALL_BATCH = 12, 64, 64
#: Sides that take an optimizer's step, too.
STEPS = ("plain step", "fused step", "update in backward")


@dataclass(frozen=True)
class Head:
    """Classifiers and pace, with the features and targets of a batch."""

    weights: list[nn.Parameter]
    biases: list[nn.Parameter]
    pace: Pace
    hidden: Tensor
    targets: SoftTargets

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.weights, *self.biases, *self.pace.parameters()]

    def split(self) -> tuple[Tensor, ...]:
        """(B, S) of every vertical."""
        return self.hidden.split(self.weights[0].shape[1], dim=1)

    def plain_loss(self) -> Tensor:
        logits = [linear(*of_vertical) for of_vertical in zip(self.split(), self.weights, self.biases, strict=True)]
        return sigmoid_cross_entropy_by_vertical(self.pace(logits), self.targets).sum()

    def products_alone(self) -> None:
        """The three matrix products of forward and backward, without which no head can do."""
        with torch.no_grad():
            for hidden_BS, weight_VS in zip(self.split(), self.weights, strict=True):
                logits_BV = hidden_BS @ weight_VS.T
                _ = logits_BV.T @ hidden_BS, logits_BV @ weight_VS

    def fused_loss(self, gradients: str = "forward") -> Tensor:
        verticals = zip(self.weights, self.biases, self.pace.by_vertical(), strict=True)
        parameters = [HeadParameters(weight, bias, *pace) for weight, bias, pace in verticals]
        return fused_loss_by_vertical(self.split(), parameters, self.targets, gradients=gradients).sum()

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters, self.hidden):
            parameter.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--no-million", action="store_true", help="leave the million classes out")
    parser.add_argument("--small", action="store_true", help="only the small heads")
    parser.add_argument(
        "--peak", nargs=3, metavar=("SIDE", "BATCH", "TIMES"), help="prints the peak of one side in bytes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        side, batch_size, times = arguments.peak
        print(json.dumps(measure_peak(side, int(batch_size), int(times))))
        return
    sides = ["fused", "compiled", "products alone"]
    batches = () if arguments.small else arguments.batch
    comparisons = [row for batch_size in batches for row in compare(batch_size, 1, sides, "plain")]
    if not (arguments.no_million or arguments.small):
        comparisons += compare(64, 10, ["fused step", "update in backward"], "plain step")
    comparisons += [compare_small(num_classes) for num_classes in SMALL_SIZES]
    title = f"{len(VERTICAL_SIZES)} verticals, {WIDTH} features each, K={NUM_LISTED}; float32, one thread"
    publish("head", title, comparisons)


def compare(batch_size: int, times: int, sides: list[str], reference: str) -> list[Comparison]:
    """Time and peak memory of sides beside the reference."""
    head = build_head(batch_size, list_sizes(times))
    names = [reference, *sides]
    runs = {name: build_side(name, head) for name in names}
    seconds = take_best({name: lambda run=run: cpu_seconds(run) for name, run in runs.items()}, num_turns=3)
    del runs
    del head
    megabytes = {name: peak_in_fresh_process(name, batch_size, times) / 1e6 for name in names}
    num_classes = times * sum(VERTICAL_SIZES)
    what = f"N={num_classes:,}, B={batch_size}"
    return [
        row
        for name in sides
        for row in (
            Comparison(f"{what}: {name}", "s", seconds[name], seconds[reference], reference),
            Comparison(f"{what}: {name}, peak", "MB", megabytes[name], megabytes[reference], reference),
        )
    ]


def compare_small(num_classes: int) -> Comparison:
    head = build_head(SMALL_BATCH, [num_classes // SMALL_VERTICALS] * SMALL_VERTICALS, SMALL_WIDTH)
    runs = {name: build_side(name, head) for name in ("plain", "fused")}

    def repeat(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: [run() for _ in range(SMALL_REPEATS)]

    seconds = take_best({name: lambda run=run: cpu_seconds(repeat(run)) for name, run in runs.items()}, num_turns=5)
    num_logits = SMALL_BATCH * num_classes // SMALL_VERTICALS
    what = f"small, N={num_classes:,}, {num_logits:,} logits a vertical: fused"
    to_ms = 1000 / SMALL_REPEATS
    return Comparison(what, "ms", seconds["fused"] * to_ms, seconds["plain"] * to_ms, "plain")


def list_sizes(times: int) -> list[int]:
    return [times * size for size in VERTICAL_SIZES]


def build_head(batch_size: int, sizes: Sequence[int], width: int = WIDTH) -> Head:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, width, generator=generator) * 0.02) for size in sizes]
    biases = [nn.Parameter(torch.zeros(size)) for size in sizes]
    hidden = torch.randn(batch_size, len(sizes) * width, generator=generator).relu_().requires_grad_()
    vertical_B = torch.randint(len(sizes), (batch_size,), generator=generator)
    size_B = torch.tensor(sizes)[vertical_B]
    start_B = torch.tensor([0, *sizes]).cumsum(0)[vertical_B]
    share_BK = torch.rand(batch_size, NUM_LISTED, generator=generator)
    index_BK = start_B[:, None] + (share_BK * size_B[:, None]).long()
    targets = SoftTargets(index_BK, torch.rand(batch_size, NUM_LISTED, generator=generator) ** 4)
    pace = Pace(sizes, PaceConfig(kind="vertical", log=True, offset="class"))
    return Head(weights, biases, pace, hidden, targets)


def build_side(name: str, head: Head) -> Callable[[], None]:
    """Forward and backward, and in `STEPS` the optimizer's step, too."""
    if name in STEPS:
        return build_step(name, head)
    if name == "products alone":
        return head.products_alone
    loss_of = {"plain": head.plain_loss, "fused": head.fused_loss}.get(name)
    if name == "compiled":
        loss_of = torch.compile(head.plain_loss, dynamic=False)
        loss_of().backward()
        head.drop_gradients()

    def run() -> None:
        loss_of().backward()
        head.drop_gradients()

    return run


def build_step(name: str, head: Head) -> Callable[[], None]:
    """With Adagrad, the paper's optimizer: as torch builds it beside the plain loss, as we build it beside ours."""
    if name == "plain step":
        early, rest = [], torch.optim.Adagrad(head.parameters, lr=1e-3)
    elif name == "fused step":
        early, rest = [], build_adagrad(head.parameters)
    else:
        early = [build_adagrad([weight]) for weight in head.weights]
        rest = build_adagrad([*head.biases, *head.pace.parameters()])

    return join_step(name, head, early, rest)


def join_step(
    name: str, head: Head, early: list[torch.optim.Optimizer], rest: torch.optim.Optimizer
) -> Callable[[], None]:
    """Forward, backward and step; `early` are stepped inside the backward pass, and there are none but for its side."""

    def run() -> None:
        hooks = [step_in_backward(optimizer) for optimizer in early]
        with mixed_precision(head.hidden.device):
            loss = head.plain_loss() if name == "plain step" else head.fused_loss("backward" if early else "forward")
        loss.backward()
        rest.step()
        head.drop_gradients()
        for hook in hooks:
            hook.remove()

    return run


def build_adagrad(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdagradConfig(lr=1e-3).build([{"params": parameters}])


def step_in_backward(optimizer: torch.optim.Optimizer) -> RemovableHandle:
    def step(parameter: nn.Parameter) -> None:
        optimizer.step()
        parameter.grad = None

    return optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(step)


def peak_in_fresh_process(side: str, batch_size: int, times: int) -> int:
    command = [sys.executable, __file__, "--peak", side, str(batch_size), str(times)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(side: str, batch_size: int, times: int) -> int:
    """Bytes of resident memory at the highest, beyond parameters, inputs, optimizer state and what libraries take."""
    warm = build_head(2, VERTICAL_SIZES)  # loads kernels and threads
    build_side(side, warm)()
    del warm
    head = build_head(batch_size, list_sizes(times))
    run = build_side(side, head)
    ctypes.CDLL(None).malloc_trim(0)  # what the C library has not given back would be missing in the difference
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


if __name__ == "__main__":
    main()
