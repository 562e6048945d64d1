"""docs/costs.md is what `make costs` writes now, and holds every table of the papers."""

import importlib.util
from pathlib import Path

from concentration.config import find_config_directory

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("costs", ROOT / "docs" / "costs.py")
costs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(costs)


def test_the_page_of_costs_is_up_to_date():
    assert costs.PAGE.read_text(encoding="utf-8") == costs.write_page(), "run `make costs`"


def test_every_table_is_on_the_page():
    experiments = costs.list_experiments()
    assert {path.stem for path in (find_config_directory() / "experiment").glob("table*.yaml")} < set(experiments)
    page = costs.PAGE.read_text(encoding="utf-8")
    assert all(f"## {experiment} (" in page for experiment in experiments)
    cells = [
        line.split("|")[6].strip() for line in page.splitlines() if line.startswith("| fc_") or line.startswith("| sc_")
    ]
    assert sorted(filter(None, cells)) == sorted(str(total) for total in costs.PRINTED.values()), (
        "all printed totals are shown"
    )
