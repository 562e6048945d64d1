"""The report's table of models and crops: what is compared with what."""

from concentration.stages.report_crops import build_crops_part
from concentration.stages.report_page import ReportInputs, build_report_page


def describe(models: list[str], crops: int, top5: float | None, top1: float = 0.5) -> dict:
    return {"models": models, "num_crops": crops, "top5": top5, "top1": top1, "mpvap": 0.25,
            "multiply_adds": 1_500_000_000 * len(models) * crops}  # fmt: skip


#: The numbers of Table 3, of two networks.
EVALUATIONS = {
    "b": describe(["b"], 1, 0.88, top1=0.4),
    "a": describe(["a"], 1, 0.8993, top1=0.6),
    "a+b.144-crops": describe(["a", "b"], 144, 0.9333),
    "a.10-crops": describe(["a"], 10, 0.9086),
    "other": describe(["other"], 1, 0.99, top1=0.9),
}


def test_rows_are_sorted_and_compared_with_the_best_single_network():
    part = build_crops_part(EVALUATIONS)
    assert part["base"] == "a", "of the networks in the table the one with the best top-1"
    assert [row["name"] for row in part["rows"]] == ["b", "a", "a.10-crops", "a+b.144-crops"]
    by_name = {row["name"]: row["cells"] for row in part["rows"]}
    assert by_name["a"] == ["1", "1", "", "1", "1.5G", "10.1%", "base", "40.0%", "25.0%"]
    assert by_name["a.10-crops"] == ["1", "10", "mean", "10", "15G", "9.1%", "−0.9", "50.0%", "25.0%"]
    assert by_name["a+b.144-crops"][:7] == ["2", "144", "mean", "288", "432G", "6.7%", "−3.4"]
    assert by_name["b"][6] == "+1.9"


def test_without_several_crops_or_models_there_is_no_part():
    assert build_crops_part({"a": EVALUATIONS["a"], "old": {"mpvap": 0.1}}) is None
    assert build_crops_part({}) is None


def test_what_is_missing_is_a_dash():
    part = build_crops_part({"a.10-crops": describe(["a"], 10, None)})
    assert part["base"] is None
    assert part["rows"][0]["cells"][5:7] == ["–", "–"]


def test_the_page_shows_it():
    page = build_report_page(ReportInputs(title="t", workdir="w", evaluations=EVALUATIONS))
    assert "<h2>Models and crops</h2>" in page
    assert "432G" in page
