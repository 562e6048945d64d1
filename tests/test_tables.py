"""docs/tables.py: what it collects from finished runs, and the page that it makes of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from concentration.config import find_config_directory
from concentration.errors import ConfigError

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)


def write_run(workdir: Path, seed: int, name: str, mpvap: float, losses: list[float]) -> None:
    folder = workdir / f"seed-{seed}"
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    values = {"mpvap": mpvap, "mpvap_log_softmax": 0.5, "top1": 0.25, "num_parameters": {"total": 1234567}}
    values["pvap"] = {"bird": mpvap - 0.1, "food": mpvap + 0.1}
    (folder / "evaluations" / f"{name}.json").write_text(json.dumps(values))
    if losses:
        (folder / "students" / name).mkdir(parents=True)
        lines = [{"step": 20 * n, "train/loss": loss} for n, loss in enumerate(losses, 1)] + [
            {"step": 9, "val/mpvap": 0.1}
        ]
        (folder / "students" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_rows_of_a_table_are_those_of_its_experiment():
    assert list(tables.list_rows("table1")) == ["fc_fc_hard", "fc_fc_d", "sc_sc_hard", "sc_sc_d"]
    expected = [f"fc_sc_generic{x}_d" for x in (0, 8)]
    assert list(tables.list_rows("table3", ["top.generic=0,8", "trainer.max_epochs=1"])) == expected


@pytest.mark.parametrize("table", sorted(tables.PRINTED))
def test_what_the_papers_print_are_rows(table):
    assert (find_config_directory() / "experiment" / f"{table}.yaml").exists()
    assert set(tables.PRINTED[table]) <= {*tables.list_rows(table), *tables.REFERENCES}


def test_finished_rows_of_all_seeds_are_collected_and_written(tmp_path, monkeypatch):
    for seed, mpvap in ((0, 0.5), (10, 0.7), (9, 0.6)):
        write_run(tmp_path, seed, "fc_fc_d", mpvap, [4.0, 3.0, 2.0, 1.0])
        write_run(tmp_path, seed, "specialists", 0.9, [])
        if seed:
            write_run(tmp_path, seed, "generalist", 0.4, [2.0])
    write_run(tmp_path, 0, "not_of_this_table", 0.9, [1.0])
    result = tables.collect("table1", tmp_path, ["trainer.max_epochs=1"])
    assert list(result["rows"]) == ["fc_fc_d", "generalist", "specialists"]
    assert list(result["rows"]["fc_fc_d"]["seeds"]) == ["0", "9", "10"]
    assert result["rows"]["fc_fc_d"]["seeds"]["0"]["loss"] == [[20, 4.0], [40, 3.0], [60, 2.0], [80, 1.0]]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "table1.json").write_text(json.dumps(result))
    (tmp_path / "table4.json").write_text(json.dumps(result | {"table": "glyphs_gpu,table4"}))
    page = tables.write_page()
    assert "| vertical | fc_fc_d | generalist | specialists |" in page
    assert "| bird | 50.0 | 30.0 | 80.0 |" in page
    tables.draw_pictures()
    assert (tmp_path / "table4.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "table1.png").exists()
    assert (
        "| fc_fc_d | 0, 9, 10 | 1,234,567 | 10.0 ± 0.0 | 60.0 ± 10.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 50 ± 10 | 1.00 ± 0.00 | 31.5 |"
        in page
    )
    assert "| generalist | 9, 10 | 1,234,567 |" in page
    assert "| specialists | 0, 9, 10 | 1,234,567 |  | 90.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |  |  |  |" in page
    assert "`launch/tables/run.sh table1 trainer.max_epochs=1`" in page


def test_a_long_curve_is_kept_in_twelve_points(tmp_path):
    write_run(tmp_path, 0, "x", 0.5, list(map(float, range(600, 0, -1))))
    curve = tables._read_metrics(tmp_path / "seed-0/students/x/metrics.jsonl")["loss"]
    assert len(curve) == tables.NUM_CURVE_POINTS
    assert curve[-1] == [12000, 25.5]


def test_pieces_of_a_table_from_several_machines_make_one(tmp_path):
    options = ["data=glyphs_100k", "method=fc_fc_d", "trainer.max_epochs=4"]
    write_run(tmp_path / "first", 0, "fc_fc_d", 0.5, [2.0])
    write_run(tmp_path / "first", 0, "generalist", 0.4, [2.0])
    write_run(tmp_path / "other", 0, "generalist", 0.45, [2.0])
    write_run(tmp_path / "other", 0, "fc_sc_d", 0.65, [2.0])
    write_run(tmp_path / "other", 2, "generalist", 0.6, [2.0])
    write_run(tmp_path / "other", 2, "fc_sc_d", 0.7, [2.0])
    first = tables.collect("table4", tmp_path / "first", options)
    other = tables.collect("table4", tmp_path / "other", [*options[:1], "method=fc_sc_d,fc_fc_d", options[2]])
    found = tables.merge(first, other)
    assert list(found["rows"]) == ["fc_fc_d", "fc_sc_d", "generalist"]
    mpvap = {name: {n: seed["mpvap"] for n, seed in row["seeds"].items()} for name, row in found["rows"].items()}
    assert mpvap == {"fc_fc_d": {"0": 0.5}, "fc_sc_d": {"0": 0.65, "2": 0.7}, "generalist": {"0": 0.45, "2": 0.6}}
    assert tables.merge(found, other)["rows"] == found["rows"]
    assert set(tables.list_rows("table4", found["overrides"])) == {"fc_fc_d", "fc_sc_d"}
    with pytest.raises(ConfigError, match="table4-glyphs_100k: the rows that are there were trained with"):
        tables.merge(first, {**other, "overrides": ["data=glyphs_100k", "trainer.max_epochs=5", "method=fc_sc_d"]})


def test_the_page_says_which_commit_trained_which_seeds():
    rows = {
        "a": {"seeds": {"0": {"commit": "abc"}, "10": {"commit": "def"}, "2": {"commit": "def"}}},
        "b": {"seeds": {"0": {"commit": "abc"}}},
    }
    assert tables._write_seeds(rows) == "commit abc, seeds 0; commit def, seeds 2, 10"


def test_nothing_finished_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no finished row of table1; run launch/tables/run.sh table1"):
        tables.collect("table1", tmp_path, [])
    command = [sys.executable, ROOT / "docs/tables.py", "collect", "table1", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode
    assert ended.stderr.startswith("tables: ")
    assert ended.stderr.count("\n") == 1


def test_the_page_is_up_to_date():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.write_page(), "run `python docs/tables.py`"
