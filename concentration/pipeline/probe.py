"""How long a step of a network takes on this machine: a few real steps on random images, before a run is begun."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from concentration.distributed import choose_device
from concentration.networks.student import NetworkConfig, Student
from concentration.training.backward_updates import BackwardUpdates
from concentration.training.configs import TrainerConfig
from concentration.training.memory import MemoryPlan, StepShape, make_batch
from concentration.training.optimizers import RunLength, ScheduleConfig, build_optimizer

NUM_WARM_UP, NUM_TIMED = 2, 5
#: A probe ends after this time, but not before it has timed two steps.
MAX_SECONDS = 10.0
#: The share of the free memory that a probe may take.
_MEMORY_SHARE = 0.8


class Speed(NamedTuple):
    """Seconds of an optimizer step in one process without reading images, and of an answer about one image."""

    step_seconds: float
    answer_seconds: float


def find_obstacle(trainer: TrainerConfig, memory: MemoryPlan) -> str | None:
    """Why a step cannot be measured here; None where it can."""
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        return "no GPU here"
    free = _count_free_bytes(trainer)
    if free is not None and memory.peak_bytes > _MEMORY_SHARE * free:
        return f"needs {memory.peak_bytes / 2**30:,.1f} GiB, free are {free / 2**30:,.1f}"
    return None


def measure_speed(
    network: NetworkConfig, optimizer: ScheduleConfig, trainer: TrainerConfig, shape: StepShape, local_batch: int
) -> Speed:
    """Measures a network's speed on this machine; call `find_obstacle` first.

    Raises:
        ConfigError: the base network cannot be built.
    """
    device = choose_device(trainer.accelerator)
    student = Student(network).train().to(device)
    updates = BackwardUpdates(student, optimizer, RunLength(1, 1)) if trainer.update_in_backward else None
    stepper = build_optimizer(optimizer, student, updates.weights if updates else ())
    images, targets = make_batch(student, local_batch, shape)
    images, targets = images.to(device), targets.to(device)
    weight_B = torch.full((local_batch,), 1 / (local_batch * trainer.accumulate), device=device)
    precision = trainer.autocast_dtype

    def step() -> None:
        stepper.zero_grad()
        for _ in range(trainer.accumulate):
            with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                loss_B = student(images, targets, weight_B)
            loss_B.sum().backward()
        stepper.step()

    @torch.inference_mode()
    def answer() -> None:
        student(images).sigmoid().cpu()

    step_seconds = _time(step, device)
    student.eval()
    return Speed(step_seconds, _time(answer, device) / local_batch)


def _time(work: Callable[[], None], device: torch.device) -> float:
    """The median seconds of a call, after some that do not count."""
    begun, seconds = time.perf_counter(), []
    for number in range(NUM_WARM_UP + NUM_TIMED):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= NUM_WARM_UP:
            seconds.append(time.perf_counter() - start)
        if len(seconds) >= 2 and time.perf_counter() - begun > MAX_SECONDS:
            break
    return statistics.median(seconds)


def _count_free_bytes(trainer: TrainerConfig) -> int | None:
    """The free memory; None where the system does not say."""
    if trainer.accelerator == "gpu":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    [line] = [line for line in path.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(line.split()[1]) * 1024
