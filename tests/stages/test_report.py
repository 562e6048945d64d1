"""`report` on a run directory that holds little, and on one whose evaluations were measured on different test images."""

import json
import re

import pytest
from real_runs import TINY, append_sky, concentrate, concentrate_here, load_json, prepare_shards, prepare_shards_here


def test_the_page_shows_the_data_where_they_were_summarised_and_is_there_without(tmp_path):
    workdir = prepare_shards(tmp_path)
    (workdir / "evaluations").mkdir()
    (workdir / "evaluations" / "generalist.json").write_text(json.dumps({"split": "test", "mpvap": 0.5}))
    pages = []
    for _ in range(2):
        concentrate("report", "name=generalist", f"workdir={workdir}", directory=tmp_path)
        pages.append((workdir / "report" / "index.html").read_text())
        (workdir / "shards" / "summary.txt").unlink(missing_ok=True)
        (workdir / "shards" / "summary.png").unlink(missing_ok=True)
    assert '<section id="data">' in pages[0]
    assert "data:image/png;base64," in pages[0]
    assert "all            10       7    200   40    60 " in pages[0]
    assert '<section id="data">' not in pages[1]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Two students and a teacher, evaluated before a vertical came; and one evaluated after."""
    directory = tmp_path_factory.mktemp("report")
    workdir = prepare_shards_here(directory)
    common = (f"workdir={workdir}", *TINY, "trainer.max_epochs=1")
    concentrate_here("teacher", "vertical=fruit", *common)
    for name in ("generalist", "student"):
        concentrate_here("student", f"name={name}", "targets=labels", *common)
    for name in ("generalist", "student", "fruit"):
        concentrate_here("evaluate", f"name={name}", f"workdir={workdir}", "gallery=0")
    append_sky(directory)
    concentrate_here("student", "name=next", "targets=labels", *common)
    concentrate_here("evaluate", "name=next", f"workdir={workdir}", "gallery=0")
    return workdir


def _read_results(workdir) -> tuple[str, str]:
    """The first table of the page, and the whole page."""
    page = (workdir / "report" / "index.html").read_text()
    return page.partition('<section id="results">')[2].partition("</section>")[0], page


@pytest.mark.parametrize(
    ("name", "beside", "below"),
    [("student", ["generalist", "student"], ["fruit", "next"]), ("next", ["next"], ["fruit", "generalist", "student"])],
)
def test_evaluations_on_other_test_images_stand_apart(grown, name, beside, below):
    concentrate_here("report", f"name={name}", f"workdir={grown}")
    results, page = _read_results(grown)
    first, *others = results.partition("<tbody>")[2].split("<tbody>")
    assert re.findall(r"<bdi>(\w+)</bdi></th>", first) == beside
    assert sorted(re.findall(r"<bdi>(\w+)</bdi></th>", "".join(others))) == below
    assert 'class="best"' in first
    assert 'class="best"' not in "".join(others)
    found = {n: load_json(grown / "evaluations" / f"{n}.json")["num_samples"] for n in ("student", "fruit", "next")}
    assert found["fruit"] < found["student"] < found["next"]
    lines = {
        "fruit": f"{found['fruit']} test images in 1 vertical (fruit)",
        "student": f"{found['student']} test images in 2 verticals (fruit, tools)",
        "next": f"{found['next']} test images in 3 verticals (fruit, tools, sky)",
    }
    assert {n for n, line in lines.items() if f"<bdi>{line}</bdi>" in results} == set(lines) - {name}
    legend = page.partition('<section id="verticals">')[2].partition("</section>")[0]
    assert set(re.findall(r"</i><bdi>(\w+)</bdi>", legend)) == set(beside)
    assert load_json(grown / "report" / "metrics.json").keys() == {"generalist", "student", "fruit", "next"}


def test_a_comparison_over_different_test_images_is_of_the_verticals_of_both(grown):
    concentrate_here("report", "compare=[student,next]", f"workdir={grown}")
    page = _read_results(grown)[1]
    before, after = (load_json(grown / "evaluations" / f"{name}.json")["pvap"] for name in ("student", "next"))
    of_both = [(e["fruit"] + e["tools"]) / 2 for e in (before, after)]
    shown = " → ".join(f"{100 * value:.1f}%" for value in of_both)
    assert f"next against student: mpvap over the 2 verticals of both {shown} (" in page
    assert "They were measured on different test images: 60 test images in 2 verticals (fruit, tools), and " in page
    assert "top-1 " not in page.partition("next against student:")[2].partition("</p>")[0]


def test_evaluations_on_one_set_of_images_are_all_in_one_table(grown):
    """Also one whose fingerprint is not known, because it was made by hand."""
    own = grown.parent / "same"
    (own / "evaluations").mkdir(parents=True)
    for name in ("generalist", "student"):
        (own / "evaluations" / f"{name}.json").write_bytes((grown / "evaluations" / f"{name}.json").read_bytes())
    concentrate_here("report", "compare=[generalist,student]", f"workdir={own}")
    results, page = _read_results(own)
    assert results.count("<tbody>") == 1
    assert "different test images" not in page
