"""Training by the real command line: how long, clipping, optimizers, precision, failures, and damaged images."""

import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_runs import FEW, LABELS, assert_close_weights, curve, largest_difference, train
from real_runs import (
    TINY,
    TINY_NETWORK,
    Plant,
    Running,
    concentrate,
    draw_image,
    load_json,
    load_lines,
    load_weights,
    one_line,
    prepare_shards,
    write_shards,
    write_tar,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("trainer.max_epochs=3", "trainer.validate_every_epochs=2"), [26, 39]),
        (("trainer.max_epochs=2", "trainer.accumulate=2"), [13, 26]),
        (("trainer.max_steps=16",), [13, 16]),
        (("trainer.max_epochs=1", "trainer.min_steps=20"), [13, 20]),
    ],
)
def test_the_network_that_is_saved_has_been_validated(prepared, options, expected):
    """Also where the run is no multiple of the interval: 200 images in batches of 16 are 13 steps."""
    name = f"last{expected[-1]}"
    out = concentrate("student", f"name={name}", f"workdir={prepared}", *TINY_NETWORK, *LABELS, "trainer.num_workers=0",
                      "trainer.batch_size=16", *options, "trainer.keep_best=true", "optimizer.lr=0.05",
                      directory=prepared.parent).out  # fmt: skip
    run_path = prepared / "students" / name
    assert [line["step"] for line in load_lines(run_path) if "val/mpvap" in line] == expected
    mpvap = curve(run_path, "val/mpvap")[-1]
    assert out == f"{run_path}: {expected[-1]} steps; mpvap on val {100 * mpvap:.1f} %\n"
    assert (run_path / "best.safetensors").exists()


def test_at_least_and_at_most_so_many_steps(prepared):
    """What epochs give, where it lies between."""
    long = ("trainer.max_epochs=2", "trainer.min_steps=20")
    short = ("trainer.max_epochs=1", "trainer.min_steps=14", "trainer.max_steps=14")
    for name, options, steps in (("long", long, 26), ("short", short, 14)):
        options = (*TINY_NETWORK, *LABELS, "trainer.num_workers=0", "trainer.batch_size=16", *options)
        assert load_json(train(prepared, name, *options) / "DONE.json")["step"] == steps
    options = (*FEW, "trainer.min_steps=6")
    assert "min_steps=6 with max_steps=5: no run has both" in one_line(train(prepared, "never", *options, code=2))


def test_clipping_bounds_the_step(prepared):
    """Plain gradient descent moves by lr * gradient: the first step is as long as the clipped norm allows."""
    options = (*FEW, "optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.schedule=constant")
    options = (*options, "optimizer.lr=0.01", "trainer.max_steps=1")
    start = load_weights(train(prepared, "still", *options, "optimizer.lr=1e-12"))
    moved = {}
    for name, clip in (("free", "null"), ("clipped", "0.25")):
        run_path = train(prepared, name, *options, f"trainer.clip_norm={clip}")
        now = load_weights(run_path)
        moved[name] = math.sqrt(sum(float(np.square(now[key] - start[key]).sum()) for key in now))
        norm = curve(run_path, "train/gradient_norm")[0]
    assert norm > 1, "the norm that is logged is the one before clipping"
    assert moved["free"] == pytest.approx(0.01 * norm, rel=1e-2)
    assert moved["clipped"] == pytest.approx(0.01 * 0.25, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "precision", "clip"),
    [
        ("sgd", "16-mixed", 0.1),
        ("adagrad", "bf16-mixed", 0.1),
        ("adamw", "bf16-mixed", 1e-6),  # where its epsilon, 1e-8, counts
    ],
)
def test_clipping_in_mixed_precision_is_that_of_full_precision(prepared, kind, precision, clip):
    """By the length of the first step, which is longer without clipping."""
    options = (
        *FEW,
        f"optimizer={kind}",
        "optimizer.weight_decay=0",
        "optimizer.schedule=constant",
        "trainer.max_steps=1",
    )
    start = load_weights(train(prepared, f"{kind}-still", *options, "optimizer.lr=1e-12"))
    moved = {}
    for name, *switches in (
        ("full", f"trainer.clip_norm={clip}"),
        ("mixed", f"trainer.clip_norm={clip}", f"trainer.precision={precision}"),
        ("free", f"trainer.precision={precision}"),
    ):
        now = load_weights(train(prepared, f"{kind}-{name}", *options, "optimizer.lr=0.01", *switches))
        moved[name] = math.sqrt(sum(float(np.square(now[key] - start[key]).sum()) for key in now))
    assert moved["mixed"] == pytest.approx(moved["full"], rel=0.03)
    assert moved["mixed"] < 0.8 * moved["free"]


def test_gamma_has_a_learning_rate_of_its_own(prepared):
    options = (*FEW, "optimizer=sgd", "optimizer.momentum=0", "optimizer.schedule=constant", "optimizer.lr=1e-12",
               "pace=vertical", "pace.log=false", "pace.offset=none")  # fmt: skip
    still = load_weights(train(prepared, "gamma0", *options))
    moving = load_weights(train(prepared, "gamma1", *options, "pace.lr=0.1"))
    changed = {name for name in still if np.abs(still[name] - moving[name]).max() > 1e-6}
    assert changed == {"pace.gamma"}


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw", "sgd", "paper", "googlenet"])
def test_every_optimizer_takes_steps(prepared, optimizer):
    run_path = train(prepared, optimizer, *FEW, f"optimizer={optimizer}")
    losses = curve(run_path, "train/loss")
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    rates = curve(run_path, "train/learning_rate")
    assert all(rate > 0 for rate in rates[:-1])
    if optimizer in ("adamw", "sgd"):
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < rates[0] / 2
    else:
        assert len(set(rates)) == 1


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_classifiers_updated_in_the_backward_pass_take_the_same_steps(prepared, optimizer):
    options = (*TINY, *LABELS, f"optimizer={optimizer}", "optimizer.lr=0.01", "optimizer.schedule=cosine",
               "optimizer.weight_decay=0.01", "optimizer.warmup_steps=3")  # fmt: skip
    together = train(prepared, f"together-{optimizer}", *options)
    early = train(prepared, f"early-{optimizer}", *options, "trainer.update_in_backward=true")
    assert_close_weights(early, together, tolerance=1e-4)
    start = train(prepared, f"start-{optimizer}", *options, "trainer.max_steps=1")
    assert largest_difference(start, together) > 0.01, "it has trained"


def test_single_images_of_which_a_batch_norm_has_no_statistics_are_refused_at_once(prepared):
    options = (*FEW, "trainer.batch_size=7", "trainer.accumulate=4")
    message = one_line(train(prepared, "single", *options, "top.norm=batch", code=2))
    assert message.startswith(
        "a batch of 7 images for 1 processes with 4 micro-batches each: top.norm=batch has no stat"
    )
    train(prepared, "single-layer", *options, "trainer.max_steps=1")


@pytest.mark.parametrize("option", ["accumulate=2", "clip_norm=1", "precision=16-mixed", "devices=2"])
def test_updates_in_the_backward_pass_are_refused_where_the_gradient_is_not_yet_known(prepared, option):
    options = ("trainer.update_in_backward=true", f"trainer.{option}")
    message = one_line(train(prepared, "early", *FEW, *options, code=2))
    assert f"trainer.update_in_backward=true with trainer.{option}" in message


def test_a_spread_head_changes_nothing_in_the_one_process_of_updates_in_the_backward_pass(prepared):
    options = (*FEW, "trainer.update_in_backward=true", "trainer.checkpoint_every_seconds=0")
    whole = train(prepared, "backward-whole", *options)
    spread = train(prepared, "backward-spread", *options, "trainer.shard_head=true")
    assert largest_difference(whole, spread) == 0
    assert curve(whole, "train/gradient_norm") == curve(spread, "train/gradient_norm")


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="NOT TESTED: trainer.compile=true, because neither g++ nor clang++ is installed",
)
def test_a_compiled_network_learns_the_same(prepared):
    eager = train(prepared, "eager", *FEW, "optimizer.lr=0.01")
    compiled = train(prepared, "compiled", *FEW, "optimizer.lr=0.01", "trainer.compile=true")
    assert curve(compiled, "train/loss") == pytest.approx(curve(eager, "train/loss"), rel=1e-3)


def test_compiling_without_a_compiler_is_refused_at_once(prepared, tmp_path):
    finished = train(prepared, "no_compiler", *FEW, "trainer.compile=true", code=2, PATH=str(tmp_path))
    assert "needs a C++ compiler" in one_line(finished)


def test_bf16_learns_nearly_the_same(prepared):
    full = train(prepared, "float32", *FEW, "optimizer.lr=0.01")
    half = train(prepared, "bf16", *FEW, "optimizer.lr=0.01", "trainer.precision=bf16-mixed")
    assert curve(half, "train/loss") == pytest.approx(curve(full, "train/loss"), rel=0.03)
    assert curve(half, "train/loss") != curve(full, "train/loss")
    assert {array.dtype for array in load_weights(half).values()} == {np.dtype("float32")}


def test_a_gpu_where_there_is_none_is_refused(prepared):
    if torch.cuda.is_available():
        pytest.skip("NOT TESTED: the refusal of trainer=gpu, because this machine has one")
    assert "torch finds no GPU here" in one_line(train(prepared, "gpu", *FEW, "trainer=gpu", code=2))


def test_a_diverging_run_names_step_and_samples_and_keeps_the_last_good_checkpoint(prepared):
    options = (*TINY, *LABELS, "optimizer=sgd", "optimizer.warmup_steps=20", "optimizer.lr=1e30")
    options = (*options, "trainer.checkpoint_every_seconds=0", "trainer.max_steps=30")
    # lr rises linearly over the warm-up: the first step alone is already far too long.
    finished = train(prepared, "diverged", *options, code=2)
    assert "Traceback" not in finished.err
    message = next(line for line in finished.err.splitlines() if line.startswith("concentrate: "))
    assert "step " in message
    assert "train-00000" in message  # SHARD/KEY of samples
    assert "the last good checkpoint is kept" in message
    run_path = prepared / "students" / "diverged"
    assert not (run_path / "DONE.json").exists()
    for path in (run_path / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values()), f"{path.name} is no good checkpoint"


def test_damaged_images_are_skipped_counted_and_named(tmp_path):
    workdir = prepare_shards(tmp_path, damaged=(3, 42, 77))
    run_path = train(workdir, "skips", *TINY, *LABELS, "trainer.max_skipped_share=0.02")
    lines = (run_path / "skipped.txt").read_text().splitlines()
    assert sorted(line.partition(":")[0].partition("/")[2] for line in lines) == ["train3", "train42", "train77"]
    assert {line.partition(": ")[2] for line in lines} == {"cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"}
    finished = train(workdir, "fails", *TINY, *LABELS, "trainer.max_skipped_share=0.01", code=2)
    message = finished.err.splitlines()[-1]
    assert message.startswith("concentrate: 3 of 200 images cannot be decoded")
    assert "skipped.txt" in message
    again = train(workdir, "fails", *TINY, *LABELS, "trainer.max_skipped_share=0.01", code=2)
    assert again.err.splitlines()[-1] == message, "what was listed before the run ended counts"
    gone_on = train(workdir, "fails", *TINY, *LABELS, "trainer.max_skipped_share=0.02")
    assert largest_difference(gone_on, run_path) == 0


def test_one_damaged_image_is_never_too_many(tmp_path):
    workdir = prepare_shards(tmp_path, damaged=(3,))
    run_path = train(workdir, "skips", *TINY, *LABELS)
    assert len((run_path / "skipped.txt").read_text().splitlines()) == 1


def test_a_resumed_run_names_each_damaged_image_once(tmp_path):
    workdir = prepare_shards(tmp_path, damaged=(3, 42, 77))
    options = (*TINY, *LABELS, "trainer.max_skipped_share=0.02", "trainer.checkpoint_every_seconds=0")
    plant = Plant("concentration.training.checkpoints:CheckpointDirectory.save", 15, "after")
    train(workdir, "skips", *options, code=-signal.SIGKILL, plant=plant)
    run_path = train(workdir, "skips", *options)
    assert len((run_path / "skipped.txt").read_text().splitlines()) == 3


def test_a_damaged_image_adds_nothing_to_the_loss(tmp_path, prepared):
    """A step over one good and one damaged image is a step over the good one, with half its gradient."""
    given = write_shards(tmp_path / "given")
    for path in given.glob("train-*.tar"):
        path.unlink()
    pictures = {"saw": draw_image("saw", 0), "lemon": b"no image", "hammer": draw_image("hammer", 0)}
    write_tar(given / "train-000000.tar", [(label, [label], content) for label, content in pictures.items()])
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip
    options = (*FEW, "trainer.max_skipped_share=1", "trainer.max_steps=1", "trainer.prior=false")
    run_path = train(tmp_path / "work", "damaged", *options)
    assert np.isfinite(curve(run_path, "train/loss")).all()
    assert len((run_path / "skipped.txt").read_text().splitlines()) == 1


def test_the_curves_of_a_run_that_is_going_on_can_be_read(prepared):
    running = Running(("student", "name=going", f"workdir={prepared}", *TINY_NETWORK, *LABELS, "trainer.max_epochs=400",
                       "trainer.log_every_steps=1"), prepared.parent)  # fmt: skip
    path = prepared / "students/going/metrics.jsonl"
    running.wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 3)
    shown = concentrate("status", f"workdir={prepared}", directory=prepared.parent).out
    running.send(signal.SIGKILL)
    running.wait()
    line = next(line for line in shown.splitlines() if "students/going" in line)
    assert "running" in line
    shown = concentrate("status", f"workdir={prepared}", directory=prepared.parent).out
    line = next(line for line in shown.splitlines() if "students/going" in line)
    assert "failed" in line
    assert "ended without a word; the same command continues" in line
