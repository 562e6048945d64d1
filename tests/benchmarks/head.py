"""The fused head beside the plain composition: time and peak memory of forward and backward, and of a step.

python tests/benchmarks/head.py            some 10 minutes on one CPU core

20 verticals of 500 to 20,000 classes (ten times that for a million), 512 features each, 100 listed classes a sample. Sides
are timed in turns in one process, in seconds of the processor; peak memory is measured in a process for each side, beyond what
parameters and inputs take.

Shapes: B samples, M verticals, S features of a classifier, K listed classes.
"""

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Comparison, cpu_seconds, publish, take_best
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from concentration.networks.pace import Pace, PaceConfig
from concentration.objectives.fused_block import HeadParameters
from concentration.objectives.fused_head import fused_loss_by_vertical
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy_by_vertical
from concentration.targets import SoftTargets

VERTICAL_SIZES = (20_000, 15_500, 12_000, 9_500, 7_500, 6_000, 5_000, 4_000, 3_500, 3_000,
                  2_500, 2_300, 2_000, 1_700, 1_500, 1_200, 900, 800, 600, 500)  # fmt: skip
WIDTH, NUM_LISTED = 512, 100
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

    def plain_loss(self) -> Tensor:
        hidden = self.hidden.split(WIDTH, dim=1)
        logits = [linear(*of_vertical) for of_vertical in zip(hidden, self.weights, self.biases, strict=True)]
        return sigmoid_cross_entropy_by_vertical(self.pace(logits), self.targets).sum()

    def fused_loss(self, gradients: str = "forward") -> Tensor:
        verticals = zip(self.weights, self.biases, self.pace.by_vertical(), strict=True)
        parameters = [HeadParameters(weight, bias, *pace) for weight, bias, pace in verticals]
        return fused_loss_by_vertical(
            self.hidden.split(WIDTH, dim=1), parameters, self.targets, gradients=gradients
        ).sum()

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters, self.hidden):
            parameter.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--no-million", action="store_true", help="leave the million classes out")
    parser.add_argument(
        "--peak", nargs=3, metavar=("SIDE", "BATCH", "TIMES"), help="prints the peak of one side in bytes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        side, batch_size, times = arguments.peak
        print(json.dumps(measure_peak(side, int(batch_size), int(times))))
        return
    comparisons = [
        row for batch_size in arguments.batch for row in compare(batch_size, 1, ["fused", "compiled"], "plain")
    ]
    if not arguments.no_million:
        comparisons += compare(64, 10, ["fused step", "update in backward"], "plain step")
    title = f"{len(VERTICAL_SIZES)} verticals, {WIDTH} features each, K={NUM_LISTED}; float32, one thread"
    publish("head", title, comparisons)


def compare(batch_size: int, times: int, sides: list[str], reference: str) -> list[Comparison]:
    """Time and peak memory of sides beside the reference."""
    head = build_head(batch_size, times)
    names = [reference, *sides]
    runs = {name: build_side(name, head) for name in names}
    seconds = take_best({name: lambda run=run: cpu_seconds(run) for name, run in runs.items()}, num_turns=4)
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


def build_head(batch_size: int, times: int) -> Head:
    sizes = [times * size for size in VERTICAL_SIZES]
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, WIDTH, generator=generator) * 0.02) for size in sizes]
    biases = [nn.Parameter(torch.zeros(size)) for size in sizes]
    hidden = torch.randn(batch_size, len(sizes) * WIDTH, generator=generator).relu_().requires_grad_()
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
    """With Adagrad, the paper's optimizer."""
    if name == "update in backward":
        early = [torch.optim.Adagrad([weight], lr=1e-3) for weight in head.weights]
        rest = torch.optim.Adagrad([*head.biases, *head.pace.parameters()], lr=1e-3)
    else:
        early, rest = [], torch.optim.Adagrad(head.parameters, lr=1e-3)

    def run() -> None:
        hooks = [step_in_backward(optimizer) for optimizer in early]
        loss = head.plain_loss() if name == "plain step" else head.fused_loss("backward" if early else "forward")
        loss.backward()
        rest.step()
        head.drop_gradients()
        for hook in hooks:
            hook.remove()

    return run


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
    warm = build_head(2, 1)  # loads kernels and threads
    build_side(side, warm)()
    del warm
    head = build_head(batch_size, times)
    run = build_side(side, head)
    ctypes.CDLL(None).malloc_trim(0)  # what the C library has not given back would be missing in the difference
    before = current_bytes()
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def current_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
