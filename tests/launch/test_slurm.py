"""The job scripts of `launch/slurm/` without a SLURM: stand-ins for its commands say what the scripts make of an end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from slurm_words import CANCELLED, OUT_OF_TIME, REQUEUED, RUNNING

from concentration.config import check_config, find_config_directory

LAUNCH = Path(__file__).parents[2] / "launch/slurm"
PREEMPTED = 'echo saved >"$CONCENTRATION_PREEMPTED"; exit 1'  # srun gives the highest code of all tasks


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """`srun` and `scontrol show` do as the test says; `scontrol requeue` is noted; and a job does not wait for its end."""
    scontrol = f'if [ $1 = requeue ]; then echo "$@" >>{tmp_path}/said; else echo "$SAYS"; fi'
    for name, body in (("srun", 'eval "$SRUN"'), ("scontrol", scontrol), ("sleep", ":")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run_job(folder: Path, srun: str, script: str = "student.sh", *arguments: str, **environment: str):
    values = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an active environment
        "SLURM_JOB_ID": "9",
        "CONCENTRATION_LAUNCH": str(LAUNCH),
        "SRUN": srun,
        "SAYS": RUNNING,
    }
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], cwd=folder, env={**values, **environment}, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("srun", "restarts", "code", "is_requeued"),
    [
        pytest.param("exit 0", "0", 0, False, id="finished"),
        pytest.param(PREEMPTED, "0", 75, True, id="preempted"),
        pytest.param(PREEMPTED, "2", 75, True, id="preempted-for-the-last-time"),
        pytest.param(PREEMPTED, "3", 75, False, id="preempted-too-often"),
        pytest.param("exit 2", "0", 2, False, id="mistake"),
        pytest.param("exit 137", "0", 137, False, id="killed"),
        pytest.param("exit 143", "0", 75, True, id="SIGTERM-before-signals-are-noted"),
        pytest.param("exit 138", "0", 75, True, id="SIGUSR1-before-signals-are-noted"),
    ],
)
def test_what_was_saved_is_requeued_as_often_as_environment_sh_allows(stand_ins, srun, restarts, code, is_requeued):
    launch = Path(shutil.copytree(LAUNCH, stand_ins / "launch"))
    environment = launch / "environment.sh"
    cap = "export MAX_RESTARTS=${MAX_RESTARTS:-100}"
    assert cap in environment.read_text()
    environment.write_text(environment.read_text().replace(cap, "export MAX_RESTARTS=3"))
    done = run_job(stand_ins, srun, SLURM_RESTART_COUNT=restarts, CONCENTRATION_LAUNCH=str(launch))
    assert done.returncode == code, done.stderr
    said = (stand_ins / "said").read_text() if (stand_ins / "said").exists() else ""
    assert said == ("requeue 9\n" if is_requeued else "")


@pytest.mark.parametrize(
    ("says", "restarts", "code", "is_requeued"),
    [
        pytest.param(CANCELLED, "0", 143, False, id="cancelled"),
        pytest.param(CANCELLED, "1", 75, True, id="requeued-by-slurm"),
        pytest.param(OUT_OF_TIME, "0", 75, True, id="out-of-time"),
        pytest.param(REQUEUED, "0", 75, True, id="requeued-by-slurm"),
    ],
)
def test_a_job_that_scancel_ends_is_not_requeued(stand_ins, says, restarts, code, is_requeued):
    done = run_job(stand_ins, PREEMPTED, SAYS=says, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    assert (stand_ins / "said").exists() == is_requeued
    assert not list(stand_ins.glob(".preempted*"))
    assert ("ended by scancel" in done.stderr) != is_requeued


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_while_the_environment_is_set_up_has_it_requeued_before_anything_runs(stand_ins, name):
    launch = Path(shutil.copytree(LAUNCH, stand_ins / "launch"))
    with open(launch / "environment.sh", "a") as environment:
        environment.write(f"kill -{name} $$\n")
    done = run_job(stand_ins, f"touch {stand_ins}/ran", CONCENTRATION_LAUNCH=str(launch))
    assert done.returncode == 75, done.stderr
    assert (stand_ins / "said").read_text() == "requeue 9\n"
    assert not (stand_ins / "ran").exists()


def test_a_task_of_the_array_trains_the_vertical_of_its_number(stand_ins):
    (stand_ins / "work/shards").mkdir(parents=True)
    classes = ", ".join(f'{{"id": "{name}", "vertical": "{name[0]}"}}' for name in ("a1", "a2", "b1", "c1"))
    (stand_ins / "work/shards/taxonomy.json").write_text(f'{{"classes": [{classes}]}}')
    said = f'echo "$@" >{stand_ins}/command'
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    done = run_job(stand_ins, said, "teacher_array.sh", "workdir=work", "trainer.max_epochs=1", TRAINER="cpu", **array)
    assert done.returncode == 0, done.stderr
    command = (stand_ins / "command").read_text().strip()
    assert command.endswith("teacher vertical=c trainer=cpu workdir=work trainer.max_epochs=1")
    done = run_job(stand_ins, said, "teacher_array.sh", "workdir=work", **{**array, "SLURM_ARRAY_TASK_ID": "3"})
    assert done.returncode == 2
    assert done.stderr == "teacher_array.sh: task 3: no vertical of this number; submit it with --array=0-2\n"
    done = run_job(stand_ins, said, "teacher_array.sh", "workdir=work")
    assert done.returncode == 2
    assert (
        done.stderr == "teacher_array.sh: no task of an array; submit it with --array=0-2, a task for each vertical\n"
    )


def test_an_array_whose_data_are_not_prepared_says_so_in_one_line(stand_ins):
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    done = run_job(stand_ins, "echo", "teacher_array.sh", "workdir=no work", **array)
    assert done.returncode == 2
    assert done.stderr == (
        f"teacher_array.sh: no work/shards/taxonomy.json: not there (in {stand_ins}); run `concentrate prepare` first, or "
        "correct workdir=no work\n"
    )


@pytest.mark.parametrize(
    "vertical", ["2020", "1.5", "null", "a,b", "café au lait", "women's", "back\\", "${seed}", "all \"'s"]
)
def test_a_task_of_the_array_trains_a_vertical_of_any_name(stand_ins, vertical):
    (stand_ins / "work/shards").mkdir(parents=True)
    classes = [{"id": str(number), "vertical": vertical} for number in range(2)]
    (stand_ins / "work/shards/taxonomy.json").write_text(json.dumps({"classes": classes}))
    said = f'printf "%s\\n" "$@" >{stand_ins}/command'
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0"}
    done = run_job(stand_ins, said, "teacher_array.sh", "workdir=work", **array)
    assert done.returncode == 0, done.stderr
    [given] = [word for word in (stand_ins / "command").read_text().splitlines() if word.startswith("vertical=")]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        assert check_config("teacher", hydra.compose("teacher", [given])).vertical == vertical


@pytest.mark.parametrize("folder", ["launch", "my launch"])
@pytest.mark.parametrize("arguments", [(), ("workdir=my work", "base.name=student.sh")])
def test_the_last_task_of_an_array_finds_the_folder_of_its_script(stand_ins, folder, arguments):
    """Its number is the array's, of which `scontrol show job` tells task by task."""
    launch = Path(shutil.copytree(LAUNCH, stand_ins / folder))
    says = f"   Command={' '.join([f'{launch}/teacher_array.sh', *arguments])}\n   WorkDir=/shared\n" * 2
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1", "VERTICALS": "birds cars"}
    done = run_job(stand_ins, "echo $@", "teacher_array.sh", *arguments, SAYS=says, CONCENTRATION_LAUNCH="", **array)
    assert done.returncode == 0, done.stderr


def test_a_task_of_an_array_that_is_asked_to_stop_asks_no_other(stand_ins):
    """Of the last one, SLURM_JOB_ID is the number of the whole array."""
    (stand_ins / "scancel").write_text(f'#!/bin/bash\necho "$@" >>{stand_ins}/signalled\n')
    (stand_ins / "scancel").chmod(0o755)
    srun = f"kill -USR1 $PPID; for _ in {{1..1000}}; do [ -e {stand_ins}/signalled ] && exit 75; /bin/sleep 0.01; done"
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1", "VERTICALS": "birds cars"}
    assert run_job(stand_ins, srun, "teacher_array.sh", **array).returncode == 75
    assert set((stand_ins / "signalled").read_text().splitlines()) == {"--signal=USR1 9_1"}


def test_a_task_of_an_array_is_requeued_alone(stand_ins):
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1", "VERTICALS": "birds cars"}
    assert run_job(stand_ins, PREEMPTED, "teacher_array.sh", **array).returncode == 75
    assert (stand_ins / "said").read_text() == "requeue 9_1\n"
