"""The report as a page: well formed, self-contained, honest, and there whatever is missing."""

import base64
import html
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser

import pytest

from concentration.stages.report_headline import describe_gap, subject_of
from concentration.stages.report_page import ReportInputs, build_report_page

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'{{ 7*7 }}\x00\u202e"
VERTICALS = [f"vertical {n}" for n in range(20)]


class _Page(HTMLParser):
    """Walks a page: fails where a tag is closed that is not open, and collects tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is not the innermost open tag"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def _evaluation(mpvap: float, names: Mapping[str, str] | None = None) -> dict:
    verticals = list(names or dict.fromkeys(VERTICALS))
    classes = [
        {"id": f"{v}/{n}", "name": f"{v} class {n}", "vertical": v, "ap": n / 4 if n else None, "num_train": 10 * n}
        | {"num_test": n, "is_leaf": n > 0}
        for v in verticals
        for n in range(5)
    ]
    prediction = {"name": "A", "vertical": verticals[0], "probability": 0.7, "lineage": ["upper", "A"], "correct": True}
    return {
        "mpvap": mpvap,
        "pvap": {v: min(mpvap + 0.01 * n, 1.0) for n, v in enumerate(verticals)},
        "mpvap_log_softmax": mpvap + 0.01,
        "pvap_log_softmax": dict.fromkeys(verticals, mpvap),
        "top1": 0.5,
        "top5": 0.75,
        "num_classes": len(classes),
        "num_samples": 1000,
        "num_parameters": {"base": 1e6, "top": 5e5, "total": 1.5e6},
        "multiply_adds": 2e7,
        "checkpoint": "0123abcd",
        "ap_by_frequency": {"few": {"ap": None, "num_classes": 0}, "many": {"ap": 0.9, "num_classes": 7}},
        "classes": classes,
        "gallery": [
            {"key": "k", "image": PIXEL, "labels": ["A"], "vertical": verticals[0]}
            | {"top3": [prediction, prediction | {"name": "B", "lineage": [], "correct": False}]}
        ],
    }


def _lines(num_lines: int, verticals: list[str]) -> list[dict]:
    lines = []
    for step in range(num_lines):
        line = {"step": step, "train/loss": 100 / (step + 1), "train/samples_per_second": 1000.0}
        for n, v in enumerate(verticals):
            line |= {f"train/{v}/gamma": 5.0 + n + step / num_lines, f"train/{v}/loss": 9 / (step + 1)}
        lines.append(line)
        if step % 10 == 9:
            lines.append({"step": step, "val/mpvap": 0.5, **{f"val/{v}/ap": 0.5 for v in verticals}})
    return lines


def _full_inputs(**changes) -> ReportInputs:
    inputs = {
        "title": "A report",
        "workdir": "runs/demo",
        "evaluations": {n: _evaluation(v) for n, v in (("generalist", 0.6), ("student", 0.7), ("specialists", 0.75))},
        "curves": {
            "students/generalist": _lines(50, []),
            "students/student": _lines(50, VERTICALS),
            **{f"teachers/{v}": _lines(12, []) for v in VERTICALS},
        },
        "configs": {
            "students/generalist": {"seed": 0, "top": {"name": "fc_fc"}},
            "students/student": {"seed": 0, "top": {"name": "fc_sc", "widths": [1, 2]}},
        },
        "data_picture": base64.b64decode(PIXEL.partition(",")[2]),
        "data_text": "vertical  classes\nbirds           5\n",
        "commands": ["concentrate run workdir=runs/demo"],
        "facts": {"machine": "two cores"},
    }
    return ReportInputs(**(inputs | changes))


def test_a_full_page_is_well_formed_and_shows_every_part():
    page = _Page(build_report_page(_full_inputs()))
    anchors = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert anchors == {
        *(
            "results",
            "verticals",
            "training",
            "pace",
            "teachers",
            "gallery",
            "classes",
            "data",
            "definitions",
            "configuration",
        ),
        "reproduce",
    }
    linked = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert linked == {f"#{anchor}" for anchor in anchors}
    for vertical in VERTICALS:
        assert page.text.count(vertical) >= 4
    for text in (
        "70.0%",
        "fc_sc",
        "concentrate run workdir=runs/demo",
        "two cores",
        "0123abcd",
        "› ",
        "birds           5\n",
    ):
        assert text in page.text


def test_a_long_name_stays_beside_its_swatch_on_a_narrow_screen(browser, tmp_path):
    name = "a_name_of_a_network_without_a_place_to_break_it"
    page = build_report_page(_full_inputs(evaluations={"generalist": _evaluation(0.6), name: _evaluation(0.7)}))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.set_window_size(500, 900)
    browser.get((tmp_path / "page.html").as_uri())
    script = """return [...document.querySelectorAll('.swatch, .legend i')].map(swatch => {
        const own = swatch.getBoundingClientRect(), name = swatch.nextElementSibling.getClientRects()[0];
        return name.left >= own.right && name.top < own.bottom && own.top < name.bottom; })"""
    beside = browser.execute_script(script)
    assert beside
    assert all(beside)


def test_the_page_loads_nothing():
    page = build_report_page(_full_inputs())
    assert not re.search(r"https?:|url\(|@import|<script|<link", page, flags=re.IGNORECASE)
    for tag, attributes in _Page(page).tags:
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value[:60]!r}>"


@pytest.mark.parametrize(
    "image",
    ["https://tracker.example/a.png", "data:image/svg+xml;base64,AAAA", 'data:image/png;base64,A" onerror="x', 7],
)
def test_an_image_that_is_no_bitmap_in_a_data_uri_is_left_out(image):
    evaluation = _evaluation(0.7)
    evaluation["gallery"][0]["image"] = image
    page = build_report_page(_full_inputs(data_picture=b"", evaluations={"student": evaluation}))
    assert "no image" in page
    assert str(image) not in page or image == 7
    assert not any(tag == "img" for tag, _ in _Page(page).tags)


def test_verticals_without_a_test_image_are_said_beside_the_number_of_images():
    whole, part = _evaluation(0.7), _evaluation(0.7)
    del part["pvap"][VERTICALS[0]]
    count = len(VERTICALS)
    for evaluation, note in (
        (whole, f"in {count} verticals, 1,000 test images"),
        (part, f"in {count} verticals (1 without a test image, which mpvap leaves out), 1,000 test images"),
    ):
        assert note in build_report_page(_full_inputs(evaluations={"student": evaluation}))


def test_undecodable_images_are_said_beside_the_number_of_images():
    evaluation = _evaluation(0.7)
    for skipped, note in ((0, "1,000 test images</"), (3, "1,000 test images (3 more cannot be decoded)</")):
        page = build_report_page(_full_inputs(evaluations={"student": evaluation | {"num_samples_skipped": skipped}}))
        assert note in page


def test_hostile_names_are_escaped_everywhere():
    def poison(value):
        if isinstance(value, dict):
            return {(k if k in known_keys else HOSTILE + k): poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE + value if isinstance(value, str) and value != PIXEL else value

    known_keys = {*_evaluation(0.5), "base", "top", "total", "ap", "id", "name", "vertical", "is_leaf", "num_train"}
    known_keys |= {"num_test", "key", "image", "labels", "top3", "probability", "lineage", "correct", "num_classes"}
    curves = {f"students/{HOSTILE}": _lines(20, [HOSTILE + "v"]), f"teachers/{HOSTILE}": _lines(20, []), HOSTILE: []}
    evaluations = {"student": poison(_evaluation(0.7)), HOSTILE: poison(_evaluation(0.6))}
    page = build_report_page(
        ReportInputs(
            title=HOSTILE,
            workdir=HOSTILE,
            evaluations=evaluations,
            curves=curves,
            configs={
                "students/generalist": {HOSTILE: HOSTILE},
                "students/student": {"a": [HOSTILE]},
                HOSTILE: {"b": {HOSTILE: 1}},
            },
            data_text=HOSTILE,
            commands=[HOSTILE],
            facts={HOSTILE: HOSTILE},
        )
    )
    parsed = _Page(page)
    assert "<script" not in page
    assert "\x00" not in page
    assert "{{ 7*7 }}" in parsed.text
    assert not [tag for tag, attributes in parsed.tags if "onerror" in attributes]
    assert all(attributes["src"] == PIXEL for tag, attributes in parsed.tags if tag == "img")
    assert html.escape("<script>alert(1)</script>") in page


def test_a_lone_surrogate_of_json_can_still_be_written_as_utf8():
    page = build_report_page(_full_inputs(title=json.loads('"\\ud800 title"')))
    assert "� title" in page.encode("utf-8").decode("utf-8")


@pytest.mark.parametrize("name", ["student", "table2-fc_sc"])
@pytest.mark.parametrize("key", [None, *_evaluation(0.5)])
def test_a_single_evaluation_with_a_missing_or_broken_key_is_still_a_page(name, key):
    whole = _evaluation(0.7)
    for broken in ({}, {key: None}, {key: float("nan")}, {key: "text"}, {key: [1, None]}, {key: {"x": {}}}):
        evaluation = {k: v for k, v in whole.items() if k != key} | (broken if key else {})
        page = _Page(build_report_page(ReportInputs("t", "w", {name: evaluation})))
        assert name in page.text
        assert "nan" not in page.text


@pytest.mark.parametrize("evaluations", [{}, {"student": {}}, {"student": {"mpvap": 0.5}}, {"student": None}])
def test_almost_nothing_is_still_a_page(evaluations):
    page = _Page(build_report_page(ReportInputs("t", "w", evaluations)))
    assert "Results" in page.text
    assert "data" not in {attributes.get("id") for _, attributes in page.tags}


def test_broken_lines_of_curves_are_left_out():
    nan, infinity = float("nan"), float("inf")
    lines = [
        *({}, {"step": None, "train/loss": 1.0}, {"step": 1}, {"step": 2, "train/loss": nan}, None, "text"),
        {"step": 3, "train/loss": infinity, "train/a/gamma": 0.0, "train/a/loss": -1.0, "val/a/ap": nan},
        {"step": 4, "train/loss": 1.5, "train/a/gamma": 2.0, "train/a/loss": 10**400, "val/mpvap": True},
    ]
    page = _Page(build_report_page(ReportInputs("t", "w", {}, curves={"students/student": lines, "teachers/a": []})))
    assert "1.5" in page.text
    assert "nan" not in page.text
    assert "inf" not in page.text.replace("info", "")


def test_long_curves_make_no_long_page():
    lines = [{"step": step, "train/loss": 1.0 + step % 7} for step in range(100_000)]
    page = build_report_page(ReportInputs("t", "w", {}, curves={"students/student": lines}))
    assert len(page) < 60_000


def test_one_model_has_one_look_in_all_parts_and_no_other_has_it():
    """Also where there are more networks than colours, and those of the three that are compared stay theirs."""
    more = [f"network {n}" for n in range(28)]
    evaluations = {name: _evaluation(0.5) for name in ("generalist", *more, "student", "specialists")}
    curves = {f"students/{name}": _lines(12, []) for name in evaluations if name != "specialists"}
    page = build_report_page(_full_inputs(evaluations=evaluations, curves=curves))
    looks = {name: set(re.findall(rf'style="([^"]+)"></(?:i|span)><bdi>{name}</bdi>', page)) for name in evaluations}
    assert [len(found) for found in looks.values()] == [1] * 31
    assert len(set.union(*looks.values())) == 31
    drawn = {
        name: set(re.findall(rf'<g class="series" style="([^"]+)">[^"]*<path [^>]*><title>{name}[:,]', page))
        for name in more
    }
    assert drawn == {name: looks[name] for name in more}
    for name, color in (("generalist", "var(--m0)"), ("student", "var(--m1)"), ("specialists", "var(--m2)")):
        assert looks[name] == {f"--c:{color}"}
        assert [other for other, found in looks.items() if color in str(found)] == [name]


def test_a_page_is_about_the_network_that_was_asked_for():
    values = {"generalist": 0.6, "next": 0.7, "student": 0.65, "specialists": 0.8}
    evaluations = {name: _evaluation(value) for name, value in values.items()}
    configs = {f"students/{name}": {"seed": n} for n, name in enumerate(values)}
    curves = {f"students/{name}": _lines(20, VERTICALS) for name in ("student", "next")}
    page = build_report_page(_full_inputs(evaluations=evaluations, subject="next", configs=configs, curves=curves))
    text = _Page(page).text
    assert "next, at 70.0%, closes 50% of the 20.0 points between the generalist (60.0% mpvap)" in text
    assert "by log-softmax: next, at 71.0%, closes 50% of" in text
    assert "The model next at a glance" in text
    assert "mpvap: generalist 60.0%, specialists 80.0%, next 70.0%" in page
    assert "Shown for next." in text
    assert "Where next differs from the generalist" in text
    legend = page.partition('<section id="verticals">')[2].partition("</ul>")[0]
    assert re.findall(r"<bdi>([^<]+)</bdi></li>", legend) == ["generalist", "next", "specialists"]
    reference = _Page(build_report_page(_full_inputs(evaluations=evaluations, subject="generalist"))).text
    assert (
        "generalist reaches 60.0% mpvap, where specialists reaches 80.0% mpvap, the highest of 4 evaluations."
        in reference
    )


def test_correct_predictions_are_told_by_more_than_colour():
    text = _Page(build_report_page(_full_inputs())).text
    assert "✓correct: vertical 0 › upper › A" in text.replace("\n", "")
    assert "✗wrong: vertical 0 › B" in text.replace("\n", "")


def test_only_leaf_classes_with_an_ap_are_ranked():
    page = build_report_page(_full_inputs(evaluations={"student": _evaluation(0.7)}))
    tables = page.partition('id="classes"')[2].partition("</section>")[0]
    assert "class 0" not in tables
    hardest, easiest = tables.split("<h3>Easiest")
    assert "class 1" in hardest
    assert "class 4" not in hardest
    assert "class 4" in easiest


def test_settings_that_differ_stand_before_all_settings():
    page = build_report_page(_full_inputs())
    differences = page.partition("differs from the generalist")[2].partition("<details>")[0]
    assert "top.name" in differences
    assert "top.widths" in differences
    assert "seed" not in differences


@pytest.mark.parametrize(
    ("generalist", "student", "specialists", "expected"),
    [
        (0.70, 0.78, 0.80, "closes 80% of the 10.0 points"),
        (0.70, 0.70, 0.80, "closes 0% of the 10.0 points"),
        (0.70, 0.80, 0.80, "closes 100% of the 10.0 points"),
        (0.30, 0.799, 0.80, "closes over 99% of the 50.0 points"),
        (0.70, 0.83, 0.80, "closes all of the 10.0 points .* is 3.0 points above the specialists"),
        (0.70, 0.65, 0.80, "closes none of the 10.0 points .* is 5.0 points below the generalist"),
        (0.70, 0.72, 0.65, "no gap to close: .* are worse than the generalist .* is 2.0 points above it"),
        (0.70, 0.60, 0.65, "no gap to close: .* are worse than the generalist .* is 10.0 points below it"),
        (0.70, 0.71, 0.7001, "no gap to close: .* are level with the generalist .* is 1.0 point above it"),
        (0.70, 0.7001, 0.70, "no gap to close: .* level with it"),
        (None, 0.70, 0.80, "specialists reaches 80.0% .* cannot be said without generalist"),
        (None, 0.70, None, "^student reaches 70.0% mpvap; .* without generalist and specialists"),
        (0.70, float("nan"), 0.80, "without student"),
        (None, None, None, "No evaluation"),
    ],
)
def test_the_gap_sentence_is_true_in_any_order(generalist, student, specialists, expected):
    values = {"generalist": generalist, "student": student, "specialists": specialists}
    sentence = describe_gap({name: {"mpvap": value} for name, value in values.items() if value is not None}, "student")
    assert re.search(expected, sentence), sentence
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0


def test_what_was_measured_elsewhere_is_in_no_comparison():
    values = {"generalist": 0.6, "student": 0.7, "small": 0.5, "specialists": 0.75}
    evaluations = {name: _evaluation(value) for name, value in values.items()}
    elsewhere = {"lucky": _evaluation(0.99, dict.fromkeys(VERTICALS[:9])) | {"multiply_adds": 1e6}, "broken": None}
    page = build_report_page(_full_inputs(evaluations=evaluations, elsewhere=elsewhere))
    text = _Page(page).text
    results = page.partition('id="results"')[2].partition("</section>")[0]
    assert "67%" in results, "of the gap closed"
    assert re.search(r"<bdi>lucky</bdi></span></th><td>99\.0%</td>.*<td>–</td>", results), (
        "neither bold nor part of a gap"
    )
    assert "1,000 test images in 9 verticals (vertical 0, " in text
    assert "vertical 5 and 3 more)" in text
    assert "– test images in unknown verticals" in text
    for section in ("tradeoff", "verticals", "classes"):
        assert "student" in page.partition(f'<section id="{section}">')[2].partition("</section>")[0]
        assert "lucky" not in page.partition(f'<section id="{section}">')[2].partition("</section>")[0]


def test_teachers_that_differ_only_in_their_vertical_have_one_configuration():
    teachers = {
        f"teachers/v{number:03}": {"vertical": f"v{number:03}", "optimizer": {"lr": 0.5}} for number in range(300)
    }
    teachers["teachers/slow"] = {"vertical": "slow", "optimizer": {"lr": 0.25}}
    students = {name: {"seed": 0} for name in ("students/generalist", "students/student")}
    page = build_report_page(_full_inputs(configs=students | teachers))
    assert page.count("optimizer.lr") == 2
    assert page.count("(each its own)") == 1
    text = " ".join(_Page(page).text.split())
    assert "teachers/v000 and 299 more" in text
    assert "teachers/v299" in text
    assert "students/generalist and 1 more" in text


@pytest.mark.parametrize(("total", "shown"), [(2.1e6, "1.4×"), (148.6e6, "99×"), (607.5e6, "405×"), (7.5e9, "5,000×")])
def test_the_specialists_size_is_a_plain_number(total, shown):
    inputs = _full_inputs()
    inputs.evaluations["specialists"]["num_parameters"] = {"base": None, "top": None, "total": total}
    assert f"the specialists hold {shown}" in _Page(build_report_page(inputs)).text


def test_the_page_is_about_the_student_or_the_best_of_those_for_all_classes():
    measured = {"generalist": (9, 0.9), "wide": (9, 0.6), "wider": (9, 0.7), "fruit": (3, 0.95), "lost": (9, None)}
    evaluations = {name: {"num_classes": classes, "mpvap": mpvap} for name, (classes, mpvap) in measured.items()}
    assert subject_of(evaluations) == "wider"
    assert subject_of({**evaluations, "student": {}}) == "student"
    assert subject_of({name: evaluations[name] for name in ("generalist",)}) == "generalist"
    assert subject_of({}) == ""
