"""A whole student's step beside the same base network with a head of 1,000 classes, and how both grow with the classes.

python tests/benchmarks/student.py         some 15 minutes on one CPU core

Inception-V2 at 224 pixels, FC4096-SC512 in 20 verticals, forward, backward and Adagrad's step; from 100K classes on also with
`trainer.update_in_backward`. Each row is timed in a process of its own, rows in turns, in seconds of
the processor; peak memory is the process's, all in all.

Shapes: B images.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from measure import Comparison, cpu_seconds, mixed_precision, publish, resident_bytes
from torch import nn

from concentration.networks.bases import build_base
from concentration.networks.bases.inception_v2 import InceptionV2Config
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.targets import SoftTargets
from concentration.training.backward_updates import BackwardUpdates
from concentration.training.optimizers import AdagradConfig, RunLength, build_optimizer

IMAGE_SIZE, NUM_VERTICALS, NUM_LISTED = 224, 20, 100
REFERENCE = "1,000-class head"
SIDES = {
    REFERENCE: (1000, False),
    "student, N=1,000": (1_000, False),
    "student, N=10,000": (10_000, False),
    "student, N=100,000": (100_000, False),
    "student, N=100,000, update in backward": (100_000, True),
    "student, N=1,000,000, update in backward": (1_000_000, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="measures one row and prints it as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.batch)))
        return
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(arguments.turns):
        for side, measured in found.items():
            measured.append(measure_in_fresh_process(side, arguments.batch))
    seconds = {side: min(each["seconds"] for each in measured) for side, measured in found.items()}
    peaks = {side: min(each["peak_bytes"] for each in measured) / 1e6 for side, measured in found.items()}
    rows = []
    for side in SIDES:
        rate, reference_rate = (arguments.batch / seconds[name] for name in (side, REFERENCE))
        rows.append(Comparison(side, "images/s", rate, reference_rate, REFERENCE))
        rows.append(Comparison(f"{side}, peak", "MB", peaks[side], peaks[REFERENCE], REFERENCE))
    publish("student", f"Inception-V2 at {IMAGE_SIZE}, FC4096-SC512, B={arguments.batch}; float32, one thread", rows)


def measure_in_fresh_process(side: str, batch_size: int) -> dict:
    command = [sys.executable, __file__, "--side", side, "--batch", str(batch_size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(side: str, batch_size: int) -> dict:
    step = build_step(*SIDES[side], batch_size, is_reference=side == REFERENCE)
    seconds = [cpu_seconds(step) for _ in range(3)]
    return {"seconds": min(seconds), "peak_bytes": resident_bytes("VmHWM")}


def build_step(
    num_classes: int, update_in_backward: bool, batch_size: int, is_reference: bool, device: str = "cpu"
) -> Callable[[], None]:
    """In float32 on a CPU, in bf16 mixed precision on a GPU."""
    torch.manual_seed(0)
    share = num_classes // NUM_VERTICALS
    config = NetworkConfig(
        base=InceptionV2Config(),
        top=TopConfig(kind="fc_sc", top1=4096, top2=512),
        pace=PaceConfig(kind="vertical", log=True, offset="class"),
        image_size=IMAGE_SIZE,
        verticals={str(number): share for number in range(NUM_VERTICALS)},
    )
    images = torch.randint(256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    if is_reference:
        return build_reference_step(config, images)
    student = Student(config).to(device)
    adagrad = AdagradConfig(lr=1e-3)
    updates = BackwardUpdates(student, adagrad, RunLength(1, 1)) if update_in_backward else None
    optimizer = build_optimizer(adagrad, student, updates.weights if updates else ())
    vertical_B1 = torch.randint(NUM_VERTICALS, (batch_size, 1))
    index_BK = vertical_B1 * share + torch.randint(share, (batch_size, NUM_LISTED))
    targets = SoftTargets(index_BK, torch.rand(batch_size, NUM_LISTED) ** 4).to(device)

    def step() -> None:
        optimizer.zero_grad()
        with mixed_precision(images.device):
            loss = student(images, targets).mean()
        loss.backward()
        optimizer.step()

    return step


def build_reference_step(config: NetworkConfig, images: torch.Tensor) -> Callable[[], None]:
    """The base network under one linear layer and softmax cross-entropy, as it is trained on ImageNet."""
    base = build_base(config.base, config.image_size).to(images.device)
    classify = nn.Linear(base.num_features, 1000, device=images.device)
    optimizer = torch.optim.Adagrad([*base.parameters(), *classify.parameters()], lr=1e-3)
    labels_B = torch.randint(1000, (len(images),), device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        with mixed_precision(images.device):
            loss = nn.functional.cross_entropy(classify(base(images.float() / 255)), labels_B)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
