"""launch/tables/at_once.py: several rows of a table as one graph, with what they share done once."""

import sys
from pathlib import Path

from real_runs import TINY, load_json, run_command

ROOT = Path(__file__).parents[2]
SMALL = ("data.verticals=[greek,arrows]", "data.num_classes=12", "data.num_drawings=4", "data.image_size=16")


def test_rows_share_data_teachers_and_generalist_and_a_second_start_finds_all_done(tmp_path):
    teachers = tuple(f"teacher.{option}" for option in TINY if not option.startswith("base."))
    command = [sys.executable, ROOT / "launch/tables/at_once.py", "table1", "runs/seed-3", "seed=3", "num_processes=2",
               "method=fc_fc_hard,fc_fc_d", *SMALL, *TINY, "generalist.top.top1=12", "generalist.top.top2=8",
               "generalist.top.norm=layer", *teachers]  # fmt: skip
    first = run_command(*command, directory=tmp_path)
    workdir = tmp_path / "runs/seed-3"
    found = {path.stem for path in (workdir / "evaluations").glob("*.json")}
    assert found == {"generalist", "specialists", "fc_fc_hard", "fc_fc_d"}
    for job in ("student generalist", "teacher greek", "targets arrows", "student fc_fc_d"):
        assert first.err.count(f"] {job}: ") == 1, first.err
    assert not (workdir / "report").exists()
    assert {"student fc_fc_hard", "student fc_fc_d", "evaluate fc_fc_d"} <= set(
        load_json(workdir / "jobs/jobs.json")["jobs"]
    )
    again = run_command(*command, directory=tmp_path)
    assert again.err.count("was done already") == first.err.count("done in"), again.err


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "launch/tables/at_once.py", "table1", "runs", "data.num_classes=1"]
    finished = run_command(*command, directory=tmp_path, code=2)
    assert finished.err.startswith("at_once.py: "), finished.err
    assert finished.err.count("\n") == 1, finished.err
