"""A pipeline on SLURM to which something happens: nothing is lost, each sample comes once an epoch, the results are the same."""

import random
from pathlib import Path

import pytest
from cluster.faults import FAULTS, TIME_LIMIT, Fault, Victim
from cluster.pipelines import (
    ON_SLURM,
    Pipeline,
    assert_each_sample_once,
    assert_same_results,
    copy_stages,
    recording,
    wait_for_queue,
)
from real_runs import load_taken, wait_for_hold

pytestmark = [pytest.mark.cluster, pytest.mark.long]

NUM_EPOCHS = 2
#: A checkpoint after every step; and a rank that waits for one that hangs gives up soon.
OPTIONS = (
    "trainer.checkpoint_every_seconds=0",
    "teacher.trainer.checkpoint_every_seconds=0",
    "trainer.timeout_seconds=15",
)
BEFORE_TEACHERS = ("shards", "students/generalist", "evaluations/generalist")
BEFORE_STUDENT = (*BEFORE_TEACHERS, "teachers", "targets/default/fruit", "targets/default/tools")


@pytest.fixture(scope="module")
def expected(shards, undisturbed, tmp_path_factory) -> tuple[Path, Path]:
    """A whole run on this machine whose students have two ranks, and the record of its samples."""
    folder = tmp_path_factory.mktemp("expected")
    workdir = copy_stages(undisturbed, folder / "work", "shards")
    Pipeline(workdir, shards, recording(folder / "records"), OPTIONS).run("trainer.devices=2")
    return workdir, folder / "records"


@pytest.fixture
def disturb(slurm, shards, expected, tmp_path):
    """Runs the rest of a pipeline on SLURM, does something to one of its jobs at a step, and compares what comes out."""

    def run(fault: Fault, job: str, stage: str, step: int, num_ranks: int, done: tuple[str, ...]) -> None:
        name, records = stage.replace("/", "-"), tmp_path / "records"
        workdir = copy_stages(expected[0], tmp_path / "work", *done)
        environment = {**slurm.environment, "MASTER_ADDR": "127.0.0.1", **recording(records, f"{name}:{step}")}
        pipeline = Pipeline(workdir, shards, environment, (*OPTIONS, "trainer.num_nodes=2"))
        pipeline.run(*ON_SLURM)
        wait_for_hold(records, name, num_ranks)
        fault.inject(Victim(slurm, pipeline.ids()[job], workdir / stage, random.Random(0)))
        if not fault.is_gentle:
            (records / "go").touch()
        wait_for_queue(slurm)
        if not pipeline.is_finished():
            pipeline.run(*ON_SLURM)
            wait_for_queue(slurm)
        assert pipeline.is_finished(), pipeline.log()
        assert_same_results(workdir, expected[0])
        for trained in ("teachers-fruit", "teachers-tools", "students-student"):
            taken, wanted = (load_taken(folder, trained) for folder in (records, expected[1]))
            if taken or trained == name:
                assert_each_sample_once(taken, wanted, NUM_EPOCHS, may_repeat=not fault.is_gentle)

    return run


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.needs_ranks], ids=lambda fault: fault.name)
def test_a_teacher_of_an_array_ends_as_if_nothing_had_happened(disturb, fault):
    disturb(fault, "teacher fruit", "teachers/fruit", 8, 1, BEFORE_TEACHERS)


@pytest.mark.parametrize("fault", [*FAULTS, TIME_LIMIT], ids=lambda fault: fault.name)
def test_a_student_of_two_nodes_ends_as_if_nothing_had_happened(disturb, fault):
    disturb(fault, "student student", "students/student", 15, 2, BEFORE_STUDENT)
