"""Training by the real command line: several processes, micro-batches, averages, clipping, failures, and every switch."""

import collections
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from real_runs import (
    LEAVES,
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
    read_labels,
    smear_by_walking,
    start_ranks,
    taxonomy_of_fruit_and_tools,
    write_shards,
    write_tar,
)

from concentration.data.resident import ResidentImages
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.training.weight_averaging import build_weight_averaging

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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("fit"))


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


@pytest.fixture(scope="module")
def two_processes(prepared) -> Path:
    """`students/two1` and `students/two2`, with 1 and 2 micro-batches, each trained by two processes.

    200 samples in batches of 15 leave a last batch of 5; the ranks hold 7 and 8 samples of every batch.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "concentration.cli",
    ]
    options = ["student", "-m", f"workdir={prepared}", "trainer.devices=2", *UNEVEN]
    options += ["trainer.accumulate=1,2", "name=two${trainer.accumulate}"]
    done = subprocess.run([*command, *options], cwd=prepared.parent, capture_output=True, text=True, timeout=300)
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
    assert curve(accumulated, "train/loss") == pytest.approx(curve(one, "train/loss"), rel=1e-4)
    assert_close_weights(accumulated, one, tolerance=1e-4)


@pytest.mark.long
def test_two_processes_note_damaged_images_and_divergence_at_the_last_step(tmp_path):
    """With several ranks, checks are made seldom; the last step is one of those at which they are."""
    workdir = prepare_shards(tmp_path, damaged=(3, 4))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "concentration.cli",
    ]
    command += ["student", f"workdir={workdir}", "trainer.devices=2", *TINY, *LABELS]
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


AVERAGED = (
    *TINY_NETWORK,
    *LABELS,
    "trainer.num_workers=0",
    "trainer.batch_size=16",
    "trainer.validate_every_epochs=1000",
)


@pytest.fixture(scope="module")
def weights_after_steps(prepared) -> list[dict[str, np.ndarray]]:
    """Of runs of one to four steps."""
    return [load_weights(train(prepared, f"steps{n}", *AVERAGED, f"trainer.max_steps={n}")) for n in range(1, 5)]


def test_the_moving_average_is_that_of_the_weights_after_every_step(prepared, weights_after_steps):
    decay = 0.7
    found = load_weights(train(prepared, "averaged", *AVERAGED, "trainer.max_steps=4", f"trainer.ema_decay={decay}"))
    for name in found:
        expected = weights_after_steps[0][name].astype(np.float64)
        for weights in weights_after_steps[1:]:
            expected = decay * expected + (1 - decay) * weights[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.5, 2), (0.99, 3)])
def test_polyaks_average_is_the_mean_of_the_weights_from_its_first_step_on(prepared, weights_after_steps, start, first):
    name = f"polyak{first}"
    found = load_weights(train(prepared, name, *AVERAGED, "trainer.max_steps=4", f"trainer.polyak_start={start}"))
    for name in found:
        expected = np.mean([weights[name].astype(np.float64) for weights in weights_after_steps[min(first, 3) :]], 0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_polyaks_average_is_validated_and_begins_with_the_newest_weights(prepared):
    options = (*TINY, *LABELS, "optimizer.lr=0.05", "trainer.max_epochs=2")
    plain, late, early = (
        curve(train(prepared, f"validated{n}", *options, *more), "val/mpvap")
        for n, more in enumerate([(), ("trainer.polyak_start=0.9",), ("trainer.polyak_start=0",)])
    )
    assert late[0] == plain[0], "before its start the average is the newest weights"
    assert early[0] != plain[0]
    assert len(early) == len(plain) == 2


@pytest.mark.parametrize("average", [("ema_decay", 0.999, None), ("polyak_start", None, 0.0)], ids=lambda each: each[0])
def test_an_average_leaves_frozen_weights_as_they_are_and_copies_no_images_or_teachers(average):
    """What a student keeps from an older one stays bit by bit."""
    callback = build_weight_averaging(*average[1:], total_steps=300)[0]
    module = pl.LightningModule()
    module.frozen = torch.nn.Linear(64, 64).requires_grad_(False)
    module.images = ResidentImages(
        torch.arange(3), torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3) > 0, torch.ones(3) > 0
    )
    module.teachers = RoutedTeachers([], top_k=1, tail="zero")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback.setup(None, module, "fit")
    for _ in range(300):
        callback._average_model.update_parameters(module)
    copied = callback._average_model.module
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    assert copied.frozen.weight is not module.frozen.weight
    assert copied.images is module.images
    assert copied.teachers is module.teachers


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
    run_path = train(prepared, name, *TINY_NETWORK, *LABELS, "trainer.num_workers=0", "trainer.batch_size=16", *options,
                     "trainer.keep_best=true", "optimizer.lr=0.05")  # fmt: skip
    assert [line["step"] for line in load_lines(run_path) if "val/mpvap" in line] == expected
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


def test_two_averages_are_refused(prepared):
    options = ("trainer.ema_decay=0.9", "trainer.polyak_start=0.5")
    assert "one average can be the network; remove one" in one_line(train(prepared, "two", *FEW, *options, code=2))


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


def test_a_balanced_order_shows_rare_classes_as_often_as_common_ones(tmp_path):
    """fruit's classes hold 1 sample in 20: one in seven of what a balanced epoch shows is each class's, nearly."""
    given = write_shards(tmp_path / "given")
    for path in given.glob("train-*.tar"):
        path.unlink()
    rare = [label if number % 20 == 0 else "saw" for number, label in zip(range(200), LEAVES * 30, strict=False)]
    write_tar(given / "train-000000.tar", [(f"t{n}", [label], draw_image(label, n)) for n, label in enumerate(rare)])
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip
    options = (*FEW, "trainer.max_steps=12", "trainer.log_every_steps=12")
    shares = {}
    for sampling in ("natural", "class_balanced"):
        run_path = train(tmp_path / "work", sampling, *options, f"trainer.sampling={sampling}")
        routed = {vertical: curve(run_path, f"train/{vertical}/routed")[-1] for vertical in ("fruit", "tools")}
        shares[sampling] = routed["fruit"] / sum(routed.values())
    present = set(rare)
    assert shares["natural"] < 0.08
    expected = len(present & {"lemon", "yuzu", "cherry"}) / len(present)
    assert shares["class_balanced"] == pytest.approx(expected, abs=0.12)


def test_a_balanced_teacher_counts_the_classes_of_its_own_vertical_alone(prepared):
    """Every seventh image has a label of the other vertical, too, by which no sample is drawn."""
    import concentration.data.index as index
    from concentration.stages.train_network import NetworkStageConfig, Task, _build_order
    from concentration.taxonomy import Taxonomy

    taxonomy = Taxonomy.load(prepared / "shards" / "taxonomy.json")
    split = index.load_split(prepared / "shards", "train", taxonomy)
    trainer = SimpleNamespace(sampling="class_balanced", window_shards=1)
    counts_C = split.count_labels()
    task = Task("", taxonomy, split, split.routed("tools"), None, counts_C, counts_C, vertical="tools")
    order = _build_order(cast(NetworkStageConfig, SimpleNamespace(trainer=trainer, seed=0)), task)
    drawn = order.take(0, np.arange(4000) % len(order)) if len(order) >= 4000 else np.concatenate(
        [order.take(epoch, np.arange(len(order))) for epoch in range(40)])  # fmt: skip
    tools = range(*taxonomy.vertical_slice("tools").indices(taxonomy.num_classes))
    counts = np.bincount(
        [min(o for o in split.labels(int(n)) if o in tools) for n in drawn], minlength=taxonomy.num_classes
    )
    shares = counts[tools.start : tools.stop] / counts.sum()
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_a_balanced_order_names_the_classes_that_it_never_draws_and_those_of_few_images(tmp_path):
    given = write_shards(tmp_path / "given")
    for path in given.glob("train-*.tar"):
        path.unlink()
    rare = [{0: "saw", 1: "yuzu"}.get(number, ("lemon", "hammer")[number % 2]) for number in range(200)]
    write_tar(given / "train-000000.tar", [(f"t{n}", [label], draw_image(label, n)) for n, label in enumerate(rare)])
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip

    def say(name: str, *options: str) -> str:
        workdir = f"workdir={tmp_path}/work"
        return concentrate(
            "student", f"name={name}", workdir, *FEW, "trainer.max_steps=1", *options, directory=tmp_path
        ).out

    said = say("a", "trainer.sampling=class_balanced")
    assert "3 of 7 leaves have no training image here, and are never drawn: cherry, drill, file\n" in said
    often = "2 classes have so few images that an epoch shows each over 20 times"
    assert f"student a: sampling=class_balanced: {often}" in said
    assert ": yuzu (50 times), saw (50 times)\n" in said
    assert "class_balanced" not in say("b")


def test_class_weights_change_the_loss_as_the_formula_says(prepared):
    """At the first step, before anything is learnt, both runs have the same logits."""
    options = (*FEW, "trainer.max_steps=1", "trainer.prior=false", "pace=fixed", "trainer.batch_size=200")
    plain = curve(train(prepared, "unweighted", *options), "train/loss")[0]
    weighted = curve(train(prepared, "weighted", *options, "trainer.class_weight=inverse_sqrt"), "train/loss")[0]
    assert weighted != pytest.approx(plain, rel=1e-3)
    assert 0.5 * plain < weighted < 2 * plain  # the mean weight is 1


def test_the_prior_starts_the_outputs_at_the_frequencies(prepared):
    options = (*FEW, "trainer.max_steps=1", "optimizer.lr=1e-12", "pace=none")
    weights = load_weights(train(prepared, "prior", *options))
    without = load_weights(train(prepared, "no_prior", *options, "trainer.prior=false"))
    taxonomy, count = taxonomy_of_fruit_and_tools(), collections.Counter()
    for labels in read_labels(prepared.parent / "given", "train"):
        count.update(smear_by_walking(labels, taxonomy))
    for number, vertical in enumerate(("fruit", "tools")):
        name = f"top.classifiers.{number}.bias"
        frequency_V = np.array([count[c["id"]] / 200 for c in taxonomy["classes"] if c["vertical"] == vertical])
        np.testing.assert_allclose(weights[name], np.log(frequency_V / (1 - frequency_V)), atol=1e-5)
        assert np.abs(without[name]).max() < 1e-6


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_classifiers_updated_in_the_backward_pass_take_the_same_steps(prepared, optimizer):
    options = (*TINY, *LABELS, f"optimizer={optimizer}", "optimizer.lr=0.01", "optimizer.schedule=cosine",
               "optimizer.weight_decay=0.01", "optimizer.warmup_steps=3")  # fmt: skip
    together = train(prepared, f"together-{optimizer}", *options)
    early = train(prepared, f"early-{optimizer}", *options, "trainer.update_in_backward=true")
    assert_close_weights(early, together, tolerance=1e-4)
    start = train(prepared, f"start-{optimizer}", *options, "trainer.max_steps=1")
    assert largest_difference(start, together) > 0.01, "it has trained"


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


@pytest.fixture(scope="module")
def generalist(prepared) -> Path:
    return train(prepared, "generalist", *TINY, *LABELS)


@pytest.mark.parametrize("how", ["name", "directory", "file"])
def test_a_base_checkpoint_is_where_training_starts(prepared, generalist, how):
    checkpoint = {"name": "generalist", "directory": generalist, "file": generalist / "model.safetensors"}[how]
    options = (*FEW, "optimizer=sgd", "optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.max_steps=1")
    run_path = train(prepared, f"from_{how}", *options, f"base.checkpoint={checkpoint}")
    expected, found = load_weights(generalist), load_weights(run_path)
    bases = [name for name in found if name.startswith("base.")]
    assert len(bases) >= 4
    for name in bases:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-7, err_msg=name)
    assert any(not np.allclose(found[name], expected[name]) for name in found if name.startswith("top."))


def test_a_base_checkpoint_of_another_base_is_refused(prepared, generalist):
    for other in ("base.channels=[4,16]", "base.norm=batch"):
        finished = train(prepared, "mismatch", *FEW, other, "base.checkpoint=generalist", "overwrite=true", code=2)
        message = one_line(finished)
        assert "another base network" in message
        assert "give the same base=" in message


def test_a_base_checkpoint_that_is_not_there_is_refused(prepared):
    message = one_line(train(prepared, "missing", *FEW, "base.checkpoint=genralist", code=2))
    assert "base.checkpoint=genralist: no finished run or file of that name" in message


def test_a_base_checkpoint_that_is_no_network_is_refused(prepared, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind" * 10)
    finished = train(prepared, "nonsense", *FEW, f"base.checkpoint={tmp_path}/other.safetensors", code=2)
    assert "other.safetensors" in one_line(finished)


def test_a_run_with_a_base_checkpoint_is_known_again_from_another_directory(prepared, generalist, tmp_path):
    """A working directory given as a relative path is the same working directory."""
    options = ("name=moved", *FEW, "base.checkpoint=generalist")
    concentrate("student", f"workdir={prepared}", *options, directory=tmp_path)
    concentrate("student", f"workdir={prepared.name}", *options, directory=prepared.parent)


def test_a_split_without_validation_trains(tmp_path):
    given = write_shards(tmp_path / "given")
    (given / "val-000000.tar").unlink()
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip
    run_path = train(tmp_path / "work", "blind", *TINY, *LABELS)
    assert load_json(run_path / "DONE.json")["step"] == 26
    assert not curve(run_path, "val/mpvap")
    # No validation can see what the last step did: the weights themselves are looked at.
    options = (*FEW, "trainer.max_steps=1", "optimizer=sgd", "optimizer.lr=3e38", "optimizer.weight_decay=1000")
    finished = train(tmp_path / "work", "last_step", *options, code=2)
    assert "the last step made weights that are not finite" in finished.err
    assert not (tmp_path / "work/students/last_step/model.safetensors").exists()


def test_a_batch_larger_than_the_data_is_the_data(prepared):
    run_path = train(prepared, "large", *TINY_NETWORK, *LABELS, "trainer.batch_size=1000", "trainer.max_epochs=3")
    assert load_json(run_path / "DONE.json")["step"] == 3


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
