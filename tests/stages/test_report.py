"""`report` on a run directory that holds little, and on one whose evaluations were measured on different test images."""

import base64
import html
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_runs import TINY, append_sky, concentrate, concentrate_here, load_json, prepare_shards, prepare_shards_here

from concentration.errors import ConfigError, DataError
from concentration.schema import write_override


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
    assert concentrate_here("report", f"name={name}", f"workdir={grown}") == f"report: {grown}/report/index.html\n"
    results, page = _read_results(grown)
    first, *others = results.partition("<tbody>")[2].split("<tbody>")
    assert re.findall(r"<bdi>(\w+)</bdi></span></th>", first) == beside
    assert sorted(re.findall(r"<bdi>(\w+)</bdi></span></th>", "".join(others))) == below
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
    assert f"<b><bdi>{name}</bdi></b> at a glance" in results
    legend = page.partition('<section id="verticals">')[2].partition("</section>")[0]
    assert set(re.findall(r"</i><bdi>(\w+)</bdi>", legend)) == set(beside)
    assert load_json(grown / "report" / "metrics.json").keys() == {"generalist", "student", "fruit", "next"}


def test_a_network_that_was_trained_anew_after_its_evaluation_is_named(grown, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(grown, workdir)
    done = workdir / "students/next/DONE.json"
    done.write_text(json.dumps({**load_json(done), "checkpoint": "another"}))
    (workdir / "students/generalist/DONE.json").unlink()  # it is being trained: nobody knows what it will be
    note = "next changed after the evaluation, whose numbers are shown"
    assert note in concentrate_here("report", "name=next", f"workdir={workdir}")
    assert f"<b>Note</b> {note}" in _read_results(workdir)[0]
    (workdir / "evaluations/next/DONE.json").unlink()  # an evaluation of the new network has begun, and was killed
    assert note in concentrate_here("report", "name=next", f"workdir={workdir}")
    shutil.rmtree(workdir / "shards")
    assert "changed" not in concentrate_here("report", "name=fruit", f"workdir={workdir}")


def test_the_command_on_the_page_can_be_typed_where_the_workdir_has_a_space(grown, tmp_path):
    workdir = Path(shutil.copytree(grown, tmp_path / "my work"))
    concentrate_here("report", "name=next", f"workdir={workdir}")
    assert f"concentrate report {write_override('workdir', str(workdir))} name=next" in html.unescape(
        _read_results(workdir)[1]
    )


def test_a_network_that_was_not_evaluated_is_refused_by_name(grown):
    with pytest.raises(ConfigError) as error:
        concentrate_here("report", "name=nxt", f"workdir={grown}")
    assert "name: no evaluation of nxt on test (there: fruit, generalist, next, student)" in str(error.value)


@pytest.mark.parametrize("file", ["evaluations/student.json", "gates/fruit.json", "calibrations/next.json", "run.json"])
def test_a_damaged_file_that_the_page_shows_is_named(file, grown, tmp_path):
    shutil.copytree(grown, tmp_path / "work")
    damaged = tmp_path / "work" / file
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text('{"split": "te')
    with pytest.raises(DataError, match=rf"^{damaged}: not JSON .*; bring it back, or write it again$"):
        concentrate_here("report", "name=next", f"workdir={tmp_path / 'work'}")
    damaged.write_text("[]")
    with pytest.raises(DataError, match=f"^{damaged}: a list, expected an object; bring it back, or make it again$"):
        concentrate_here("report", "name=next", f"workdir={tmp_path / 'work'}")


def test_calibrations_on_other_test_images_stand_apart_as_evaluations_do(grown):
    """A teacher's is of its vertical alone."""
    own = Path(shutil.copytree(grown, grown.parent / "calibrated"))
    concentrate_here("evaluate", "name=fruit", f"workdir={own}", "gallery=0", "overwrite=changed")
    for name in ("next", "fruit"):
        concentrate_here("calibrate", f"name={name}", f"workdir={own}")
    for name, apart in (("next", ["fruit"]), ("fruit", ["next"])):
        concentrate_here("report", f"name={name}", f"workdir={own}")
        section = _read_results(own)[1].partition('<section id="calibration">')[2]
        first, *others = section.partition("</table>")[0].partition("<tbody>")[2].split("<tbody>")
        assert re.findall(r"<bdi>(\w+)</bdi></th>", first) == [name]
        assert re.findall(r"<bdi>(\w+)</bdi></th>", "".join(others)) == apart
        assert f"Not comparable with those of <bdi>{name}</bdi>, because measured on other test images" in section


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


def test_a_table_that_goes_on_beyond_a_narrow_screen_shows_it_and_can_be_scrolled_by_keys(browser, grown):
    concentrate_here("report", f"workdir={grown}")
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    shades = {}
    for width in (390, 1280):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": width})
        browser.get((grown / "report/index.html").as_uri())
        table = browser.find_element("css selector", "#results .wide")
        for place, left in (("start", 0), ("end", 10_000)):
            browser.execute_script("arguments[0].scrollLeft = arguments[1]", table, left)
            right, top = browser.execute_script(
                "const r = arguments[0].getBoundingClientRect(); return [r.right, r.top + scrollY]", table
            )
            clip = {
                "x": right - 5,
                "y": top + 5,
                "width": 5,
                "height": 5,
                "scale": 1,
            }  # above the titles of the columns
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
            pixels = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("L")
            shades[width, place] = np.asarray(pixels, dtype=float).mean()
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert shades[390, "start"] < shades[390, "end"] - 20, "the shadow lies where there is more, and only there"
    assert shades[1280, "start"] == shades[1280, "end"] == shades[390, "end"]
    assert (table.get_attribute("role"), table.get_attribute("tabindex")) == ("region", "0")
    assert table.get_attribute("aria-label") == "Evaluations: accuracy and cost by model"
