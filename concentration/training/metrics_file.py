"""`metrics.jsonl`: the curves of a run, read without the libraries that write them."""

import json
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


def load_metrics(run_path: Path) -> list[dict]:
    """The lines of a run's metrics, without those that a kill has cut off."""
    path = run_path / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if step_of_line(line) < float("inf")]


def step_of_line(line: str) -> float:
    """The step that a line is about; infinite where a kill has cut the line off."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
