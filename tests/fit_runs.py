"""Networks trained by the real command line, and what is read off them: for the tests of training."""

from pathlib import Path

import numpy as np
from real_runs import (
    TINY_NETWORK,
    concentrate,
    load_lines,
    load_weights,
)

LABELS = ("targets=labels",)

#: Five steps, each of them logged.
FEW = (
    *TINY_NETWORK,
    *LABELS,
    "trainer.num_workers=0",
    "trainer.batch_size=16",
    "trainer.max_steps=5",
    "trainer.log_every_steps=1",
)


def train(workdir: Path, name: str, *options: str, code: int = 0, **more):
    """Trains a generalist; returns its run directory, or how it ended where `code` is not 0."""
    finished = concentrate("student", f"name={name}", f"workdir={workdir}", *options, directory=workdir.parent,
                           code=code, **more)  # fmt: skip
    return workdir / "students" / name if code == 0 else finished


def curve(run_path: Path, name: str) -> list[float]:
    return [line[name] for line in load_lines(run_path) if name in line]


def assert_close_weights(found: Path, expected: Path, tolerance: float) -> None:
    weights, other = load_weights(found), load_weights(expected)
    assert weights.keys() == other.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def largest_difference(found: Path, expected: Path) -> float:
    weights, other = load_weights(found), load_weights(expected)
    return max(float(np.abs(weights[name] - other[name]).max()) for name in weights)
