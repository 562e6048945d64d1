"""A stage that is killed at any moment and started again ends with the bytes of an undisturbed one."""

import itertools
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from real_runs import (
    RECORD,
    TINY,
    TINY_NETWORK,
    Plant,
    Running,
    concentrate,
    draw_image,
    load_json,
    load_lines,
    load_taken,
    one_line,
    prepare_shards,
    start_ranks,
)

from concentration.data.index import ShardIndex

#: Batch statistics, a schedule, decay and augmentation: everything that has a state or draws something.
FULL = (
    "base.channels=[4,8]",
    "top.top1=12",
    "top.top2=8",
    "optimizer=adamw",
    "optimizer.warmup_steps=5",
    "trainer.num_workers=0",
    "trainer.batch_size=16",
    "trainer.max_epochs=6",
    "trainer.log_every_steps=5",
)
CHECKPOINTS = "concentration.training.checkpoints:CheckpointDirectory"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A working directory with shards, teachers and targets."""
    directory = tmp_path_factory.mktemp("resume")
    workdir = prepare_shards(directory)
    for vertical in ("fruit", "tools"):
        concentrate("teacher", f"vertical={vertical}", f"workdir={workdir}", *TINY, directory=directory)
    concentrate("targets", f"workdir={workdir}", directory=directory)
    return workdir


@pytest.fixture(scope="module")
def undisturbed(prepared) -> Path:
    """The student of `FULL`, trained without a disturbance."""
    return _train_undisturbed(prepared, "undisturbed")


@pytest.fixture
def workdir(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "work"))


def _train_undisturbed(prepared: Path, name: str, *options: str) -> Path:
    command = ("student", f"name={name}", f"workdir={prepared}", *FULL, *options)
    concentrate(*command, directory=prepared.parent)
    return prepared / "students" / name


@pytest.mark.parametrize(
    ("command", "split"),
    [
        (("student", "targets=labels", "name=half"), "train"),
        (("targets", "targets.name=again"), "train"),
        (("evaluate", "name=specialists"), "test"),
    ],
)
def test_indices_that_were_replaced_since_prepare_are_refused(command, split, workdir, tmp_path):
    """Those of a half-done student by others that are valid: of the same tars, with other labels."""
    options = (*command, f"workdir={workdir}")
    if command[0] == "student":
        options += (*TINY, "trainer.checkpoint_every_seconds=0")
        concentrate(*options, directory=tmp_path, code=-9, plant=Plant(f"{CHECKPOINTS}.save", call=9, when="after"))
    index = sorted((workdir / "shards").glob(f"{split}-*.index"))[-1]
    kept, other = index.read_bytes(), ShardIndex.load(index)
    replace(
        other, path=Path(os.path.relpath(other.path, index.parent)), label_position=other.label_position[::-1]
    ).save(index)
    message = one_line(concentrate(*options, directory=tmp_path, code=2))
    assert f"{split}-*.index: not those that `concentrate prepare` wrote" in message
    index.write_bytes(kept)
    concentrate(*options, directory=tmp_path)


@pytest.mark.parametrize(("every_seconds", "seed"), [(0, 1), (0.2, 2)])
def test_a_student_killed_at_random_moments_ends_with_the_same_weights(
    undisturbed, workdir, tmp_path, every_seconds, seed
):
    rng = random.Random(seed)
    command = (
        "student",
        "name=killed",
        f"workdir={workdir}",
        f"trainer.checkpoint_every_seconds={every_seconds}",
        *FULL,
    )
    run_path = workdir / "students" / "killed"
    num_kills = 0
    longest_wait = min(0.9, 0.6 * load_lines(undisturbed)[-1]["seconds"])  # a fast machine must not finish first
    for _ in range(4):
        running = Running(command, tmp_path)
        running.wait_for((run_path / "status.json").exists)
        time.sleep(rng.uniform(0.05, longest_wait))
        if running.process.is_alive():
            running.send(signal.SIGKILL)
            num_kills += 1
        running.wait()
    assert num_kills >= 2, "the runs ended before they could be killed: the test tests nothing"
    concentrate(*command, directory=tmp_path)
    _assert_same_run(run_path, undisturbed)


def test_every_sample_of_every_epoch_is_taken_once_whatever_is_killed_and_however_many_ranks_go_on(prepared, tmp_path):
    """Two ranks are killed, three go on and are killed, one and its two workers end it; no epoch fills its last batch."""
    workdir = Path(shutil.copytree(prepared, tmp_path / "work"))
    command = ["student", "targets=labels", "name=counted", f"workdir={workdir}", *TINY_NETWORK, "trainer.batch_size=21",
               "trainer.max_epochs=6", "trainer.checkpoint_every_seconds=0", "trainer.num_workers=0"]  # fmt: skip
    run_path = workdir / "students" / "counted"
    taken: dict[int, list[int]] = {}
    for turn, (world_size, is_killed) in enumerate([(2, True), (3, True), (1, False)]):
        record = tmp_path / f"turn{turn}"
        options = [*command, f"trainer.devices={world_size}", *(["trainer.num_workers=2"] if not is_killed else [])]
        running = start_ranks(options, tmp_path, world_size, [{RECORD: str(record)}] * world_size)
        if is_killed:
            running[0].wait_for(lambda folder=record: len(load_taken(folder, "students-counted")) > 8, 120)
            time.sleep(0.2 * turn)
        for process in running if is_killed else []:
            process.send(signal.SIGKILL)
        codes = {process.wait().code for process in running}
        assert codes == ({0} if not is_killed else {-signal.SIGKILL}), "it ended before it could be killed"
        taken_in_turn = load_taken(record, "students-counted")
        of_turn = {step: list(itertools.chain(*takes)) for step, takes in taken_in_turn.items()}
        last = max(of_turn)  # of the killed, perhaps not by all ranks
        for step, ordinals in of_turn.items():
            if step in taken and (not is_killed or step < last):
                assert sorted(ordinals) == taken[step], "a step that is repeated is the same step"
            if not is_killed or step < last:
                taken[step] = sorted(ordinals)
    steps_per_epoch = 10
    assert sorted(taken) == list(range(6 * steps_per_epoch))
    for epoch in range(6):
        seen = [ordinal for step in range(steps_per_epoch) for ordinal in taken[epoch * steps_per_epoch + step]]
        assert sorted(seen) == list(range(200)), f"epoch {epoch}"
    assert load_json(run_path / "DONE.json")["step"] == 60


def test_a_teacher_killed_at_random_moments_ends_with_the_same_weights(prepared, workdir, tmp_path):
    rng = random.Random(3)
    options = ("vertical=fruit", "seed=5", "overwrite=true", "trainer.checkpoint_every_seconds=0", *FULL)
    concentrate("teacher", f"workdir={workdir}", *options, directory=tmp_path)
    expected = Path(shutil.move(workdir / "teachers" / "fruit", tmp_path / "undisturbed"))
    for _ in range(3):
        running = Running(("teacher", f"workdir={workdir}", *options), tmp_path)
        running.wait_for(lambda: any((workdir / "teachers/fruit/checkpoints").glob("*.ckpt")))
        time.sleep(rng.uniform(0, 0.4))
        running.send(signal.SIGKILL)
        running.wait()
    concentrate("teacher", f"workdir={workdir}", *options, directory=tmp_path)
    _assert_same_run(workdir / "teachers" / "fruit", expected)


@pytest.mark.parametrize(
    "plant",
    [
        Plant(f"{CHECKPOINTS}.save", 1, "before"),
        Plant(f"{CHECKPOINTS}.save", 1, "after"),
        Plant(f"{CHECKPOINTS}.save", 13, "after"),  # the end of the first epoch, before its validation
        Plant("os:replace", 20, "before"),  # written, not yet renamed
        Plant("concentration.training.module:StudentModule.on_validation_epoch_end", 2, "before"),
        Plant("concentration.training.module:StudentModule.on_validation_epoch_end", 2, "after"),
        Plant("concentration.training.loggers:JsonlLogger.log_metrics", 6, "after"),
        Plant("concentration.networks.student:Student.save", 1, "before"),  # the last step's checkpoint is there
        Plant("concentration.networks.student:Student.save", 1, "after"),
        Plant("concentration.stages.run_directory:RunDirectory.finish", 1, "after"),
        Plant("shutil:rmtree", 1, "before"),  # finished, and its checkpoints still there
    ],
    ids=lambda plant: f"{plant.when}-{plant.where.rpartition(':')[2]}-{plant.call}",
)
def test_a_kill_at_an_awkward_moment_changes_nothing(undisturbed, workdir, tmp_path, plant):
    command = ("student", "name=killed", f"workdir={workdir}", "trainer.checkpoint_every_seconds=0", *FULL)
    concentrate(*command, directory=tmp_path, plant=plant, code=-signal.SIGKILL)
    concentrate(*command, directory=tmp_path)
    _assert_same_run(workdir / "students" / "killed", undisturbed)
    _assert_nothing_half_written(workdir / "students" / "killed")
    assert not list((workdir / "students" / "killed").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "left", [lambda size: 0, lambda size: size // 2, lambda size: size - 1], ids=["0", "half", "all-1"]
)
def test_a_truncated_checkpoint_is_not_taken_for_whole(undisturbed, workdir, tmp_path, left):
    command = ("student", "name=killed", f"workdir={workdir}", "trainer.checkpoint_every_seconds=0", *FULL)
    concentrate(*command, directory=tmp_path, plant=Plant(f"{CHECKPOINTS}.save", 20, "after"), code=-signal.SIGKILL)
    _, newest = sorted((workdir / "students/killed/checkpoints").glob("*.ckpt"))
    os.truncate(newest, left(newest.stat().st_size))
    finished = concentrate(*command, directory=tmp_path)
    assert f"{newest.name}: damaged" in finished.out + finished.err
    _assert_same_run(workdir / "students" / "killed", undisturbed)


def test_where_every_checkpoint_is_truncated_training_begins_again(undisturbed, workdir, tmp_path):
    command = ("student", "name=killed", f"workdir={workdir}", "trainer.checkpoint_every_seconds=0", *FULL)
    concentrate(*command, directory=tmp_path, plant=Plant(f"{CHECKPOINTS}.save", 20, "after"), code=-signal.SIGKILL)
    for path in (workdir / "students/killed/checkpoints").glob("*.ckpt"):
        os.truncate(path, 1000)
    concentrate(*command, directory=tmp_path)
    _assert_same_run(workdir / "students" / "killed", undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("trainer.ema_decay=0.9", "trainer.accumulate=2"), id="ema"),
        pytest.param(
            (
                "optimizer=googlenet",
                "optimizer.decay_epochs=1",
                "trainer.polyak_start=0.1",
                "optimizer.warmup_steps=0",
                "trainer.keep_best=true",
            ),
            id="polyak",
        ),
        pytest.param(("trainer.num_workers=1",), id="workers", marks=pytest.mark.long),
        pytest.param(("trainer.sampling=class_balanced", "trainer.clip_norm=0.5", "pace.lr=0.01"), id="balanced"),
        pytest.param(("trainer.update_in_backward=true", "optimizer=adamw", "optimizer.lr=0.01"), id="backward"),
    ],
)
def test_resume_is_exact_with(prepared, workdir, tmp_path, options):
    expected = _train_undisturbed(prepared, options[0].replace("=", "-"), *options)
    command = ("student", "name=k", f"workdir={workdir}", "trainer.checkpoint_every_seconds=0", *FULL, *options)
    for call in (7, 12):
        plant = Plant(f"{CHECKPOINTS}.save", call, "after")
        concentrate(*command, directory=tmp_path, plant=plant, code=-signal.SIGKILL)
    concentrate(*command, directory=tmp_path)
    _assert_same_run(workdir / "students" / "k", expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_exits_with_75_and_the_next_run_finishes(undisturbed, workdir, tmp_path, number):
    command = ("student", "name=stopped", f"workdir={workdir}", *FULL)  # no checkpoint by the clock in such a short run
    run_path = workdir / "students" / "stopped"
    running = Running(command, tmp_path)
    running.wait_for(lambda: (run_path / "metrics.jsonl").exists())
    running.send(number)
    finished = running.wait()
    assert finished.code == 75
    assert "which is saved; run the same command again" in finished.err
    assert "Traceback" not in finished.err
    assert any((run_path / "checkpoints").glob("*.ckpt"))
    shown = concentrate("status", f"workdir={workdir}", directory=tmp_path).out.splitlines()
    assert "preempted" in next(line for line in shown if "students/stopped" in line)
    assert " done " in next(line for line in shown if "targets/default " in line)
    assert not (run_path / "DONE.json").exists()
    concentrate(*command, directory=tmp_path)
    _assert_same_run(run_path, undisturbed)


def test_two_processes_do_not_work_in_one_directory(workdir, tmp_path):
    command = ("student", "name=twice", f"workdir={workdir}", *TINY, "trainer.max_epochs=500")
    first = Running(command, tmp_path)
    first.wait_for((workdir / "students/twice/metrics.jsonl").exists)
    second = concentrate(*command, directory=tmp_path, code=2)
    first.send(signal.SIGKILL)
    first.wait()
    assert "another process works here" in one_line(second)


def test_a_finished_stage_is_left_as_it_is(undisturbed, prepared):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir() if path.name != ".lock"}
    finished = concentrate("student", "name=undisturbed", f"workdir={prepared}", *FULL, directory=prepared.parent)
    assert "finished already, nothing is to do" in finished.out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir() if path.name != ".lock"} == before


def test_a_changed_key_is_refused_and_overwrite_replaces(workdir, tmp_path):
    command = ("student", "name=changed", f"workdir={workdir}", *TINY)
    concentrate(*command, directory=tmp_path)
    first = (workdir / "students/changed/model.safetensors").read_bytes()
    message = one_line(concentrate(*command, "optimizer.lr=0.01", directory=tmp_path, code=2))
    assert "optimizer.lr was 0.2, is 0.01" in message
    assert "overwrite=true" in message
    assert (workdir / "students/changed/model.safetensors").read_bytes() == first
    concentrate(*command, "optimizer.lr=0.01", "overwrite=true", directory=tmp_path)
    assert (workdir / "students/changed/model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    "plant",
    [
        Plant("concentration.targets:TargetRecords.save", 2, "before"),
        Plant("concentration.targets:TargetRecords.save", 6, "after"),
        Plant("os:replace", 5, "before"),
        Plant("concentration.stages.run_directory:RunDirectory.finish", 1, "before"),
        Plant("concentration.stages.run_directory:RunDirectory.finish", 2, "after"),
    ],
    ids=lambda plant: f"{plant.when}-{plant.where.rpartition(':')[2]}-{plant.call}",
)
def test_targets_that_were_killed_end_with_the_same_files(workdir, tmp_path, plant):
    command = ("targets", f"workdir={workdir}", "targets.name=killed", "targets.top_k=3")
    concentrate(*command, directory=tmp_path)
    expected = shutil.move(workdir / "targets" / "killed", tmp_path / "expected")
    concentrate(*command, directory=tmp_path, plant=plant, code=-signal.SIGKILL)
    half = _contents(workdir / "targets" / "killed", "*.safetensors")
    concentrate(*command, directory=tmp_path)
    whole = _contents(workdir / "targets" / "killed", "*.safetensors", "manifest.json", "DONE.json")
    assert whole == _contents(expected, "*.safetensors", "manifest.json", "DONE.json")
    assert not list((workdir / "targets").rglob("*.tmp"))
    assert half.items() <= whole.items()


@pytest.mark.parametrize(
    "plant",
    [
        Plant("concentration.metrics.evaluation:Evaluator.compute", 1, "before"),
        *(Plant("os:replace", call, "before") for call in (2, 3, 4, 5)),
        Plant("concentration.stages.run_directory:RunDirectory.finish", 1, "before"),
    ],
    ids=lambda plant: f"{plant.where.rpartition(':')[2]}-{plant.call}",
)
def test_an_evaluation_that_was_killed_ends_with_the_same_file(workdir, tmp_path, plant):
    command = ("evaluate", "name=specialists", f"workdir={workdir}")
    concentrate(*command, directory=tmp_path)
    expected = shutil.move(workdir / "evaluations", tmp_path / "expected")
    concentrate(*command, directory=tmp_path, plant=plant, code=-signal.SIGKILL)
    assert not (workdir / "evaluations/specialists/DONE.json").exists()
    concentrate(*command, directory=tmp_path)
    _assert_nothing_half_written(workdir / "evaluations")
    assert load_json(workdir / "evaluations/specialists.json") == load_json(expected / "specialists.json")


def test_a_killed_preparation_ends_with_the_same_files_and_leaves_no_process(tmp_path):
    for vertical, label in (("fruit", "lemon"), ("fruit", "cherry"), ("tools", "saw"), ("tools", "drill")):
        (tmp_path / "images" / vertical / label).mkdir(parents=True)
        for number in range(60):
            (tmp_path / "images" / vertical / label / f"{number}.png").write_bytes(draw_image(label, number))
    command = ("prepare", "data=image_folder", f"data.path={tmp_path}/images", "data.image_size=16",
               "samples_per_shard=4", "num_processes=2")  # fmt: skip
    concentrate(*command, f"workdir={tmp_path}/expected", directory=tmp_path)
    shards = tmp_path / "killed" / "shards"
    for num_indices in (1, 20):
        running = Running((*command, f"workdir={tmp_path}/killed"), tmp_path)
        running.wait_for(lambda wanted=num_indices: len(list(shards.glob("*.index"))) >= wanted)
        descendants = _descendants(running.process.pid)
        assert descendants
        running.send(signal.SIGKILL)
        running.wait()
        assert not (shards / "DONE.json").exists()
        _assert_end(descendants, within_seconds=10)
    concentrate(*command, f"workdir={tmp_path}/killed", directory=tmp_path)
    patterns = ("*.tar", "*.index", "taxonomy.json", "DONE.json", "skipped.txt")
    assert _contents(shards, *patterns) == _contents(tmp_path / "expected" / "shards", *patterns)
    assert not list(shards.glob(".*.tmp"))


def test_targets_of_a_teacher_that_was_retrained_are_refused_until_they_are_overwritten(workdir, tmp_path):
    train = ("student", f"workdir={workdir}", *TINY)
    concentrate(*train, directory=tmp_path)
    retrain = ("teacher", "vertical=fruit", "seed=1", f"workdir={workdir}", *TINY)
    assert "seed was 0, is 1" in one_line(concentrate(*retrain, directory=tmp_path, code=2))
    concentrate(*retrain, "overwrite=true", directory=tmp_path)
    make_targets = ("targets", f"workdir={workdir}")
    assert "upstream.teacher was " in concentrate(*make_targets, directory=tmp_path, code=2).err
    message = one_line(concentrate("student", "name=other", f"workdir={workdir}", *TINY, directory=tmp_path, code=2))
    assert "fruit" in message
    assert "concentrate targets" in message
    tools = _contents(workdir / "targets/default/tools", "*.safetensors", "*.json")
    concentrate(*make_targets, "overwrite=changed", directory=tmp_path)
    assert _contents(workdir / "targets/default/tools", "*.safetensors", "*.json") == tools, (
        "only what has changed is made again"
    )
    assert "upstream.targets was " in one_line(concentrate(*train, directory=tmp_path, code=2))
    concentrate(*train, "overwrite=true", directory=tmp_path)


def _assert_same_run(run_path: Path, expected: Path) -> None:
    """The same weights, and the same curves, in which each step comes once."""
    assert (run_path / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert load_json(run_path / "DONE.json")["checkpoint"] == load_json(expected / "DONE.json")["checkpoint"]
    of_the_machine = ("seconds", "train/samples_per_second", "train/data_wait_share")
    curves = [
        [{name: value for name, value in line.items() if name not in of_the_machine} for line in load_lines(path)]
        for path in (run_path, expected)
    ]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    assert curves[0] == curves[1]
    seconds = [line["seconds"] for line in load_lines(run_path)]
    assert seconds == sorted(seconds), "time must not jump back where a run was resumed"


def _assert_nothing_half_written(path: Path) -> None:
    """But a status, which others may be writing: that goes once it is old."""
    assert not [left for left in path.rglob("*.tmp") if not left.name.startswith(".status.json.")]


def _contents(directory: Path, *patterns: str) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in directory.rglob(pattern) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _descendants(process: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [process]
    for ancestor in found:  # grows while it is walked
        found.extend(child for child, parent in parents.items() if parent == ancestor)
    return found[1:]


def _assert_end(processes: list[int], within_seconds: float) -> None:
    deadline = time.monotonic() + within_seconds
    while alive := [process for process in processes if _is_running(process)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
