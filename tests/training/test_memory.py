"""The memory plan against what torch's allocator, and the operating system, see of the same steps."""

import json
import os
import subprocess
import sys

import pydantic
import pytest
import torch

from concentration.errors import ConfigError
from concentration.networks.student import NetworkConfig, Student
from concentration.schema import parse_config
from concentration.training import memory
from concentration.training.backward_updates import BackwardUpdates
from concentration.training.configs import TrainerConfig
from concentration.training.memory import MOMENTS, StepShape, make_batch, plan_memory
from concentration.training.optimizers import OptimizerConfig, RunLength, build_optimizer

MIB = 2**20
PAPERS = {"kind": "vertical"}
#: Of 20,000 classes in 20 verticals: some 160 MiB.
LARGE = {"classes": 1000, "top1": 1024, "top2": 256, "batch": 64}


def describe(classes=50, top1=256, top2=64, pace=PAPERS, base=None, image_size=32, **_) -> NetworkConfig:
    values = {
        "base": base or {"kind": "small"},
        "top": {"kind": "fc_sc", "top1": top1, "top2": top2},
        "pace": pace,
        "image_size": image_size,
        "verticals": {f"v{number}": classes for number in range(20)},
    }
    return parse_config(NetworkConfig, values)


def optimizer_of(kind: str) -> OptimizerConfig:
    return pydantic.TypeAdapter(OptimizerConfig).validate_python({"kind": kind, "lr": 0.001})


def run_steps(network, optimizer, trainer, shape, num_steps=3, device="cpu") -> None:
    """Steps of a real network, in Lightning's order."""
    student = Student(network).train().to(device)
    if trainer.class_weight != "none":
        student.class_weight_C = torch.ones(student.num_outputs, device=device)
    updates = (
        BackwardUpdates(student, optimizer, RunLength(num_steps, num_steps)) if trainer.update_in_backward else None
    )
    is_fused = trainer.accelerator == "cpu" or (optimizer.fuses_on_gpu and trainer.precision != "16-mixed")
    stepper = build_optimizer(optimizer, student, updates.weights if updates else (), is_fused)
    for group in stepper.param_groups:
        group["foreach"] = not is_fused
    images, targets = make_batch(student, trainer.batch_size // trainer.accumulate, shape)
    images, targets = images.to(device), targets.to(device)
    precision = {"32-true": None, "bf16-mixed": torch.bfloat16}[trainer.precision]
    for _ in range(num_steps):
        for number in range(trainer.accumulate):
            with torch.autocast(device, dtype=precision, enabled=precision is not None):
                loss = student(images, targets).sum()
            if number == 0:
                stepper.zero_grad()
            loss.backward()
            del loss
        if trainer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(student.parameters(), trainer.clip_norm)
        stepper.step()


def measure_allocated(network, optimizer, trainer, shape) -> int:
    """The most bytes that torch's CPU allocator had given out, by its own reports to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_steps(network, optimizer, trainer, shape)
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize(
    ("network", "optimizer", "trainer", "shape"),
    [
        (LARGE, "adagrad", {}, {}),
        (LARGE, "adamw", {}, {}),
        ({"pace": {"kind": "none"}}, "sgd", {}, {}),
        ({"pace": {"kind": "class", "offset": "class"}}, "sgd", {"batch_size": 256}, {}),
        ({}, "adagrad", {"accumulate": 4, "batch_size": 256}, {}),
        ({}, "adagrad", {"accelerator": "gpu", "clip_norm": 1.0}, {}),  # as on a GPU: all parameters at once
        ({}, "adagrad", {"class_weight": "inverse_sqrt"}, {"has_background": True, "has_weight": True}),
        ({}, "adagrad", {"precision": "bf16-mixed"}, {}),
        (LARGE, "adamw", {"update_in_backward": True}, {}),
        ({"base": {"kind": "inception_v2", "end_point": "mixed3b"}, "image_size": 64}, "adagrad", {}, {}),
        ({"base": {"kind": "timm", "name": "vit_tiny_patch16_224"}, "image_size": 64}, "adamw", {}, {}),
    ],
)
def test_the_plan_is_what_torch_allocates(network, optimizer, trainer, shape):
    options = TrainerConfig(**{"batch_size": 64, **trainer})
    arguments = describe(**network), optimizer_of(optimizer), options, StepShape(100, **shape)
    plan = plan_memory(*arguments)
    of_tensors = plan.peak_bytes - plan.at_peak[plan.moment]["work space of products"]
    assert of_tensors == pytest.approx(measure_allocated(*arguments), rel=0.05)


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="NOT TESTED: no /proc here")
@pytest.mark.parametrize("network", [LARGE, {**LARGE, "classes": 5000, "batch": 256}])
def test_the_plan_is_what_the_operating_system_sees(network):
    """In a fresh process whose C library gives freed blocks back; without that, it holds up to 45 % more."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
torch.set_num_threads(1)
from test_memory import *
def peak_bytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
shape = StepShape(100)
run_steps(describe(classes=3, top1=8, top2=8), optimizer_of("adagrad"), TrainerConfig(batch_size=2), shape)
before = peak_bytes()
run_steps(describe(**{network}), optimizer_of("adagrad"), TrainerConfig(batch_size={network["batch"]}), shape)
print(peak_bytes() - before)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    trainer = TrainerConfig(batch_size=network["batch"])
    plan = plan_memory(describe(**network), optimizer_of("adagrad"), trainer, StepShape(100))
    assert plan.peak_bytes == pytest.approx(json.loads(done.stdout.splitlines()[-1]), rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no GPU here")
@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_plan_is_what_a_gpu_needs(optimizer, precision):
    trainer = TrainerConfig(batch_size=64, accelerator="gpu", precision=precision)
    arguments = describe(**LARGE), optimizer_of(optimizer), trainer, StepShape(100)
    torch.cuda.reset_peak_memory_stats()
    run_steps(*arguments, device="cuda")
    assert plan_memory(*arguments).peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_several_processes_share_the_batch_and_keep_buckets_of_gradients():
    def plan(**options):
        trainer = TrainerConfig(batch_size=65, **options)
        return plan_memory(describe(), optimizer_of("adagrad"), trainer, StepShape(10))

    one, four, averaged = plan(), plan(devices=2, num_nodes=2, accumulate=2), plan(ema_decay=0.9)
    assert (one.local_batch, four.local_batch) == (65, 9)
    for moment in MOMENTS:
        assert four.at_peak[moment]["DDP's buckets"] == one.at_peak[moment]["parameters"]
        assert one.at_peak[moment]["DDP's buckets"] == one.at_peak[moment]["moving average"] == 0
        assert averaged.at_peak[moment]["moving average"] >= one.at_peak[moment]["parameters"]
    assert averaged.peak_bytes > one.peak_bytes


def test_the_parts_are_what_the_optimizers_keep():
    def plan(kind):
        return plan_memory(describe(), optimizer_of(kind), TrainerConfig(batch_size=8), StepShape(10)).at_peak

    parameters = sum(p.numel() * 4 for p in Student(describe()).parameters())
    for kind, copies in (("adagrad", 1), ("adamw", 2), ("sgd", 1)):
        parts = plan(kind)["optimizer"]
        assert parts["parameters"] == parts["gradients"] == parameters
        assert parts["optimizer state"] == pytest.approx(copies * parameters, rel=0.001)
        assert parts["activations"] == 0


def test_a_million_classes_are_planned_in_no_memory():
    """Their head alone would be 1.9 GiB."""
    network = describe(classes=50_000, top1=1024, top2=512)
    plan = plan_memory(network, optimizer_of("adagrad"), TrainerConfig(batch_size=64), StepShape(100))
    assert plan.at_peak["optimizer"]["parameters"] > 1900 * MIB


def test_a_head_that_is_spread_is_not_planned():
    trainer = TrainerConfig(batch_size=64, devices=2, shard_head=True)
    with pytest.raises(ConfigError, match=r"trainer\.shard_head=true and 2 processes: .* is not planned"):
        plan_memory(describe(), optimizer_of("adagrad"), trainer, StepShape(10))


def test_a_batch_too_small_for_the_processes_is_one_clear_error():
    trainer = TrainerConfig(batch_size=3, devices=2, accumulate=2)
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=3 is too small for 2 processes with 2 micro-batches"):
        plan_memory(describe(), optimizer_of("adagrad"), trainer, StepShape(10))


def test_single_images_of_which_a_batch_norm_has_no_statistics_are_one_clear_error():
    trainer = TrainerConfig(batch_size=3, accumulate=2)
    network = describe()
    network = network.model_copy(update={"top": network.top.model_copy(update={"norm": "batch"})})
    with pytest.raises(
        ConfigError, match=r"a batch of 3 images for 1 processes with 2 micro-batches each: top\.norm=batch"
    ):
        plan_memory(network, optimizer_of("adagrad"), trainer, StepShape(10))
    assert plan_memory(network, optimizer_of("adagrad"), TrainerConfig(batch_size=4, accumulate=2), StepShape(10))


def test_a_new_peak_does_not_copy_what_is_alive():
    copied = []

    class Alive(dict):
        def __iter__(self):  # copying walks through it, or asks for its keys
            copied.append(len(self))
            return super().__iter__()

        def keys(self):
            copied.append(len(self))
            return super().keys()

    with memory._Ledger() as ledger:
        ledger._alive = Alive(ledger._alive)
        ledger.begin_moment()
        tensors = [torch.empty(number) for number in range(1, 101)]
        del tensors[50:]  # after the peak
        tensors.append(torch.empty(7))
        peak = ledger.end_moment(set())
    assert peak.total == 4 * sum(range(1, 101))
    assert len(copied) <= 1
