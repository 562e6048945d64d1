"""`report` on a run directory that holds little."""

import json

from real_runs import concentrate, prepare_shards


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
