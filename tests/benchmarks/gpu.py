"""The head and a whole student's step on one NVIDIA GPU in bf16 mixed precision, beside what no version can be faster than.

python tests/benchmarks/gpu.py             some two minutes; --compiled adds torch.compile of the plain composition, minutes more

The head is that of `head.py`, a student's step that of `student.py`. Sides are timed in turns, by the GPU's clock, with its
second-level cache emptied before each call; "in a graph" is the same call replayed as a CUDA graph, without the time Python takes
to launch kernels. The floor is the longer of two times: of the products, at the rate of a large product on this GPU; and of the
bytes that must be moved, at the rate of a large copy. Those are 2 read and 4 of gradient written for each weight, and ten for
each logit (in bf16: written, read, read again, its derivative written and read).

Shapes: B samples, V classes of a vertical, S features of a classifier.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from head import VERTICAL_SIZES, WIDTH, Head, build_head, join_step, list_sizes
from measure import Comparison, mixed_precision, publish
from student import build_step
from triton.testing import do_bench

from concentration.training.optimizers import AdamWConfig

BATCHES = (64, 256, 1024)
STUDENT_SIDES = {
    "student, N=1,000": (1000, False),
    "student, N=10,000": (10_000, False),
    "student, N=100,000": (100_000, False),
    "student, N=1,000,000": (1_000_000, False),
    "student, N=1,000,000, update in backward": (1_000_000, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["head", "million", "student"])
    parser.add_argument(
        "--compiled", type=int, nargs="*", default=[], metavar="B", help="batches of torch.compile's side"
    )
    parser.add_argument("--batch", type=int, default=256, help="images of a student's step")
    arguments = parser.parse_args()
    rows = []
    if arguments.only in (None, "head"):
        ceilings = measure_ceilings()
        print(f"a large copy: {ceilings[0] / 1e12:.2f} TB/s; a large product in bf16: {ceilings[1] / 1e12:.0f} TFLOP/s")
        rows += [row for batch in BATCHES for row in compare_head(batch, ceilings, batch in arguments.compiled)]
    if arguments.only in (None, "million"):
        rows += compare_million()
    if arguments.only in (None, "student"):
        rows += compare_student(arguments.batch)
    publish("gpu", f"{torch.cuda.get_device_name()}, bf16 mixed precision", rows)


def measure_ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, counting both ways, and operations a second of a product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_seconds = time_seconds(lambda: target.copy_(source))
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * len(source) / copy_seconds, 2 * 8192**3 / time_seconds(lambda: left @ right)


def compare_head(batch_size: int, ceilings: tuple[float, float], with_compiled: bool) -> list[Comparison]:
    head = move(build_head(batch_size, VERTICAL_SIZES))
    num_logits = batch_size * sum(VERTICAL_SIZES)
    bytes_per_second, operations_per_second = ceilings
    memory = (6 * sum(VERTICAL_SIZES) * WIDTH + 10 * num_logits) / bytes_per_second
    arithmetic = 6 * num_logits * WIDTH / operations_per_second
    floor, floor_is = max((memory, "memory traffic"), (arithmetic, "arithmetic"))
    sides = {"plain": in_bf16(head, head.plain_loss), "fused": in_bf16(head, head.fused_loss)}
    if with_compiled:
        sides["compiled"] = in_bf16(head, torch.compile(head.plain_loss, dynamic=False))
    peaks = {name: peak_megabytes(run) for name, run in sides.items()}
    sides["fused in a graph"] = capture(sides["fused"])
    seconds = time_in_turns(sides)
    what = f"N={sum(VERTICAL_SIZES):,}, B={batch_size}"
    return [
        *(Comparison(f"{what}: {name}", "us", 1e6 * seconds[name], 1e6 * seconds["plain"], "plain") for name in sides),
        *(
            Comparison(f"{what}: {name}, beside the floor", "us", 1e6 * seconds[name], 1e6 * floor, floor_is)
            for name in ("fused", "fused in a graph")
        ),
        *(Comparison(f"{what}: {name}, peak", "MB", peaks[name], peaks["plain"], "plain") for name in peaks),
    ]


def compare_million() -> list[Comparison]:
    """AdamW's step on a million classes: parameters, gradients, optimizer state and all that a step needs, in megabytes."""
    found = {}
    for name in ("plain step", "fused step", "update in backward"):
        torch.cuda.empty_cache()
        head = move(build_head(64, list_sizes(10)))
        run = build_adamw_step(name, head)
        run()
        found[name] = peak_megabytes(run, from_zero=True), time_seconds(run)
        del head, run
    what = f"N={10 * sum(VERTICAL_SIZES):,}, B=64, AdamW"
    (plain_peak, plain_seconds), *_ = found.values()
    return [
        row
        for name, (peak, seconds) in found.items()
        for row in (
            Comparison(f"{what}: {name}", "ms", 1e3 * seconds, 1e3 * plain_seconds, "plain step"),
            Comparison(f"{what}: {name}, all memory", "MB", peak, plain_peak, "plain step"),
        )
    ]


def compare_student(batch_size: int) -> list[Comparison]:
    """Images a second of a step, and the memory at its peak, each beside the same base network under 1,000 classes."""
    found = {}
    for name, (num_classes, in_backward) in {"1,000-class head": (1000, False), **STUDENT_SIDES}.items():
        torch.cuda.empty_cache()
        step = build_step(num_classes, in_backward, batch_size, name == "1,000-class head", "cuda")
        step()
        peak = peak_megabytes(step, from_zero=True)
        found[name] = batch_size / time_seconds(step), peak
        del step
    (reference_rate, reference_peak), *_ = found.values()
    return [
        row
        for name, (rate, peak) in found.items()
        for row in (
            Comparison(f"{name}, B={batch_size}", "images/s", rate, reference_rate, "1,000-class head"),
            Comparison(f"{name}, B={batch_size}, peak", "MB", peak, reference_peak, "1,000-class head"),
        )
    ]


def move(head: Head) -> Head:
    return Head(
        [torch.nn.Parameter(weight_VS.detach().cuda()) for weight_VS in head.weights],
        [torch.nn.Parameter(bias_V.detach().cuda()) for bias_V in head.biases],
        head.pace.cuda(),
        head.hidden.detach().to("cuda", torch.bfloat16).requires_grad_(),  # as a layer before it leaves it
        head.targets.to("cuda"),
    )


def in_bf16(head: Head, compute_loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with mixed_precision(head.hidden.device):
            loss = compute_loss()
        loss.backward()
        head.drop_gradients()

    return run


def build_adamw_step(name: str, head: Head) -> Callable[[], None]:
    config = AdamWConfig(lr=1e-3)
    in_backward = name == "update in backward"
    early = [config.build([{"params": [weight_VS]}]) for weight_VS in head.weights] if in_backward else []
    late = [*head.biases, *head.pace.parameters()] if in_backward else head.parameters
    return join_step(name, head, early, config.build([{"params": late}]))


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_in_turns(sides: dict[str, Callable[[], None]], num_turns: int = 3) -> dict[str, float]:
    """The median over turns of each side's median seconds."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_turns):
        for name, run in sides.items():
            found[name].append(time_seconds(run))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def time_seconds(run: Callable[[], object]) -> float:
    return do_bench(run, warmup=20, rep=100, return_mode="median") / 1e3


def peak_megabytes(run: Callable[[], None], from_zero: bool = False) -> float:
    """The most that torch had allocated during a call; without what was there before it, unless `from_zero`."""
    run()
    torch.cuda.synchronize()
    before = 0 if from_zero else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


if __name__ == "__main__":
    main()
