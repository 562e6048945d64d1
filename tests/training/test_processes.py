"""Training on several processes: the losses and weights of one, and errors that all of them see."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fit_runs import FEW, LABELS, assert_close_weights, curve, largest_difference, train
from real_runs import (
    TINY,
    one_line,
    prepare_shards,
    start_ranks,
)

#: `concentrate` as two processes of torchrun.
TWO_RANKS = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "concentration.cli",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def two_processes(prepared) -> Path:
    """`students/two1` and `students/two2`, with 1 and 2 micro-batches, each trained by two processes.

    200 samples in batches of 15 leave a last batch of 5; the ranks hold 7 and 8 samples of every batch.
    """
    options = ["student", "-m", f"workdir={prepared}", "trainer.devices=2", *UNEVEN]
    options += ["trainer.accumulate=1,2", "name=two${trainer.accumulate}"]
    done = subprocess.run([*TWO_RANKS, *options], cwd=prepared.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return prepared / "students"


#: At a learning rate of 0.05, rounding grows a hundredfold in ten steps, with any order of sums; at 0.01 it stays rounding.
UNEVEN = (*TINY, *LABELS, "trainer.batch_size=15", "optimizer.lr=0.01")


def test_two_processes_give_the_losses_and_weights_of_one(prepared, two_processes):
    one = train(prepared, "one", *UNEVEN)
    two = two_processes / "two1"
    for name in ("train/loss", "train/gradient_norm"):
        np.testing.assert_allclose(curve(two, name), curve(one, name), rtol=1e-4)
    np.testing.assert_allclose(curve(two, "val/mpvap"), curve(one, "val/mpvap"), atol=1e-3)
    assert curve(two, "train/fruit/routed") == curve(one, "train/fruit/routed")
    assert_close_weights(two, one, tolerance=1e-4)
    assert largest_difference(one, train(prepared, "start", *UNEVEN, "trainer.max_steps=1")) > 0.01, "it has trained"


def test_two_processes_with_two_micro_batches_give_the_weights_of_one(prepared, two_processes):
    one = train(prepared, "one", *UNEVEN)
    two = two_processes / "two2"
    np.testing.assert_allclose(curve(two, "train/loss"), curve(one, "train/loss"), rtol=1e-4)
    assert_close_weights(two, one, tolerance=1e-4)


@pytest.mark.parametrize("world_size", [3, 4])
def test_three_and_four_processes_give_the_weights_of_one(world_size, prepared, tmp_path):
    """A batch of 15 that neither divides, and 200 images that no batch divides."""
    one = train(prepared, "one", *UNEVEN)
    options = ["student", f"name=ranks{world_size}", f"workdir={prepared}", f"trainer.devices={world_size}", *UNEVEN]
    running = start_ranks(options, tmp_path, world_size, [{}] * world_size)
    finished = [process.wait() for process in running]
    assert {one.code for one in finished} == {0}, finished[0].err
    many = prepared / "students" / f"ranks{world_size}"
    np.testing.assert_allclose(curve(many, "train/loss"), curve(one, "train/loss"), rtol=1e-4)
    assert_close_weights(many, one, tolerance=1e-4)


def test_two_micro_batches_give_the_weights_of_one_batch(prepared):
    one = train(prepared, "one", *UNEVEN)
    accumulated = train(prepared, "accumulated", *UNEVEN, "trainer.accumulate=2")
    for name in ("train/loss", "train/fruit/loss", "train/tools/loss"):
        assert curve(accumulated, name) == pytest.approx(curve(one, name), rel=1e-4)
    assert_close_weights(accumulated, one, tolerance=1e-4)


@pytest.mark.long
def test_two_processes_note_damaged_images_and_divergence_at_the_last_step(tmp_path):
    """With several ranks, checks are made seldom; the last step is one of those at which they are."""
    workdir = prepare_shards(tmp_path, damaged=(3, 4))
    command = [*TWO_RANKS, "student", f"workdir={workdir}", "trainer.devices=2", *TINY, *LABELS]
    options = [*command, "name=damaged", "trainer.max_epochs=1", "trainer.max_skipped_share=0.02"]
    done = subprocess.run(options, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len((workdir / "students/damaged/skipped.txt").read_text().splitlines()) == 2
    options = [
        *command,
        "name=diverged",
        "trainer.max_steps=7",
        "optimizer=sgd",
        "optimizer.lr=1e30",
        "trainer.max_skipped_share=1",
    ]
    done = subprocess.run(options, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "the loss is not finite" in done.stderr
    assert not (workdir / "students/diverged/DONE.json").exists()


def test_a_rank_ends_as_it_should_but_does_not_take_its_interpreter_apart(prepared, tmp_path):
    """Gloo's threads, which let go of tensors meanwhile, were seen to abort one in thirty."""
    look_at_end = """if True:
        import atexit, os
        class Part:
            def __del__(self): os.write(1, b"taken apart")
        part = Part()
        atexit.register(lambda: print("hooks were run"))
        from concentration.cli import main
        main()
    """
    options = ["student", f"workdir={prepared}", "name=ends", *FEW]
    rank = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}  # fmt: skip
    command = [sys.executable, "-c", look_at_end, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ | rank)
    assert done.returncode == 0, done.stderr
    assert "hooks were run" in done.stdout
    assert "taken apart" not in done.stdout


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("64k", "a batch cannot be handed over by the processes that read ahead (unable to allocate shared memory"),
        ("4k", "/dev/shm: processes that read images need semaphores there, and none can be made (No space left"),
    ],
)
def test_too_little_shared_memory_is_one_line(size, expected, prepared, tmp_path):
    """A container's; the batch was lost, and training waited for it for ever."""
    options = ["student", f"workdir={prepared}", "name=crowded", *FEW, "trainer.num_workers=2"]
    command = shlex.join([sys.executable, "-m", "concentration.cli", *options])
    crowded = [
        "unshare",
        "--mount",
        "bash",
        "-c",
        f"mount -t tmpfs -o size={size} none /dev/shm || exit 99; head -c 4k /dev/zero >/dev/shm/x; exec {command}",
    ]
    done = subprocess.run(crowded, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert expected in message
    assert "--shm-size=8g" in message
    assert "Traceback" not in done.stderr


def test_more_processes_than_were_started_are_refused(prepared):
    message = one_line(train(prepared, "lonely", *FEW, "trainer.devices=2", code=2))
    assert "trainer.devices=2" in message
    assert "torchrun --nproc-per-node=2" in message
