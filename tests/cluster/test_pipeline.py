"""`concentrate run launcher=slurm` on a real SLURM: dependencies, failures, and what is submitted again."""

import re
from pathlib import Path

import pytest
from cluster.slurm_cluster import SlurmCluster
from real_runs import TINY, Finished, Running, load_json, write_shards

NETWORKS = (*TINY, "data.image_size=16", "teacher.top.top1=12", "teacher.top.top2=8", "teacher.trainer.max_epochs=2",
            "teacher.trainer.batch_size=16", "teacher.trainer.num_workers=0", "num_processes=1")  # fmt: skip
ON_SLURM = ("launcher=slurm", "launcher.cpus_per_task=1")


def run(workdir: Path, slurm: SlurmCluster, *options: str, code: int = 0) -> Finished:
    """`concentrate run` on the shards beside the working directory."""
    shards = workdir.parent / "given"
    command = ("run", "data=shards", f"data.path={shards}", f"workdir={workdir}", *NETWORKS, *options)
    finished = Running(command, workdir.parent, slurm.environment).wait(400)
    assert finished.code == code, f"{finished.code}:\n{finished.out}\n{finished.err}"
    assert "Traceback" not in finished.err
    return finished


def status(workdir: Path, slurm: SlurmCluster) -> dict[str, str]:
    """By stage, its state and why."""
    shown = Running(("status", f"workdir={workdir}"), workdir.parent, slurm.environment).wait().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    return {row[0]: f"{row[1]} {row[5]}".strip() for row in rows}


def submitted(finished: Finished) -> dict[str, str]:
    """SLURM's number of every batch that was submitted, by the jobs in it."""
    rows = [[cell.strip() for cell in line.split("│")] for line in finished.out.splitlines() if line.startswith("│")]
    return {row[2]: row[1] for row in rows if row[1].isdigit()}


@pytest.fixture
def workdir(tmp_path) -> Path:
    write_shards(tmp_path / "given")
    return tmp_path / "work"


def test_a_whole_run_on_slurm_makes_what_this_machine_makes(workdir, slurm):
    finished = run(workdir, slurm, *ON_SLURM, "launcher.wait=true")
    batches = submitted(finished)
    assert {"prepare", "teacher fruit, teacher tools", "targets fruit, targets tools", "report"} <= batches.keys()
    assert len(batches) == 9
    assert "report/index.html" in finished.out
    assert set(status(workdir, slurm).values()) == {"done"}
    assert "nothing is to do" in run(workdir, slurm, *ON_SLURM).out

    here = workdir.parent / "here"
    run(here, slurm)
    for name in ("students/student", "students/generalist", "teachers/fruit", "teachers/tools"):
        found, expected = ((root / name / "model.safetensors").read_bytes() for root in (workdir, here))
        assert found == expected, name
    for name in ("student", "generalist", "specialists"):
        found, expected = (load_json(root / f"evaluations/{name}.json") for root in (workdir, here))
        assert found["mpvap"] == expected["mpvap"], name


@pytest.mark.long
def test_a_teacher_that_fails_stops_only_what_depends_on_it(workdir, slurm):
    broken = [f"+teacher.external.fruit.{key}" for key in ("kind=torch", "path=missing.pt2", "classes=identity")]
    broken.append("+teacher.external.fruit.output=sigmoid_logits")
    failed = run(workdir, slurm, *ON_SLURM, "launcher.wait=true", *broken, code=2)
    assert re.search(r"teacher fruit failed \(exit code 2\); the end of .*\n.*missing\.pt2", failed.err)
    waiting = next(line for line in failed.err.splitlines() if "not run because of it" in line)
    assert all(job in waiting for job in ("targets fruit", "student student", "evaluate specialists", "report"))
    assert "targets tools" not in waiting
    states = status(workdir, slurm)
    assert states["teachers/fruit"].startswith("failed")
    assert "missing.pt2" in states["teachers/fruit"]
    assert states["targets/default/fruit"].startswith("waiting for teacher fruit, which failed")
    for done in ("teachers/tools", "targets/default/tools", "students/generalist", "evaluations/generalist"):
        assert states[done] == "done", done

    again = run(workdir, slurm, *ON_SLURM, "launcher.wait=true")
    jobs = {"teacher fruit", "targets fruit", "student student", "evaluate specialists", "evaluate student", "report"}
    assert submitted(again).keys() == jobs
    assert set(status(workdir, slurm).values()) == {"done"}
