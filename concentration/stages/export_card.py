"""The model card of an export: what the network is, how well and how fast it answers, and where it errs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

import concentration
from concentration.schema import parse_json
from concentration.serving.calibration import CALIBRATION_FILE
from concentration.serving.export_folder import EXPORTS, NEIGHBOURS_FOLDER, load_export
from concentration.stages.export_standalone import REQUIREMENTS
from concentration.stages.folders import SHARDS, STUDENTS
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory

CARD_FILE, MEASURES_FILE = "README.md", "measures.json"
_NUM_WEAK = 15


def build_card(name: str, workdir: Path, evaluation: Mapping[str, Any], calibration: bytes | None) -> str:
    """The card as Markdown, from what the run and the export have written, and the file of the calibration, if there is one."""
    path = workdir / EXPORTS / name
    export = load_export(path)
    measures = parse_json((path / MEASURES_FILE).read_bytes(), MEASURES_FILE)
    shards = RunDirectory(workdir / SHARDS)
    student = RunDirectory(workdir / STUDENTS / name)
    # What `add`, `remove` and `merge` made keeps how the student before it had learned.
    learning = as_mapping(student.load_done(f"concentrate student name={name}").get("learning"))
    training = {**student.load_config(), **learning}
    return _load_template().render(
        name=name,
        version=concentration.__version__,
        requirements=" ".join(REQUIREMENTS),
        taxonomy=export.taxonomy,
        image_size=export.preprocessing.image_size,
        source=shards.load_config()["data"]["kind"],
        splits=shards.load_done("concentrate prepare", splits=dict)["splits"],
        learned=_describe_learning(training),
        training=_describe_training(training),
        e=evaluation,
        m=measures,
        calibration=None if calibration is None else parse_json(calibration, CALIBRATION_FILE),
        has_neighbours=(path / NEIGHBOURS_FOLDER).is_dir(),
        has_gpu=any(speed["device"] != "one core" for speed in measures["speed"]),
        verticals=_list_verticals(export.taxonomy.vertical_sizes, evaluation, measures["confusions"]["by_vertical"]),
        weak_classes=_list_weak_classes(evaluation),
    )


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda value: "–" if value is None else f"{100 * value:.1f}",
        "count": lambda value: "–" if value is None else f"{value:,}",
        "mb": lambda value: f"{value / 1e6:,.1f}",
        "cell": lambda text: str(text).replace("|", "\\|"),
    }
    return environment.get_template("model_card.md.jinja")


def _describe_learning(training: Mapping[str, Any]) -> str:
    kind = as_mapping(training.get("targets")).get("kind")
    taught = "concentrated from a specialist for each vertical"
    return {"labels": "trained on labels", "soft": taught, "online": taught}.get(kind, "made of trained networks")


def _describe_training(training: Mapping[str, Any]) -> dict[str, str]:
    """What of the training's config a reader asks for first; the whole config is in the run directory."""
    described = {}
    for part in ("base", "top", "pace", "targets", "optimizer"):
        values = training.get(part)
        if isinstance(values, Mapping):
            described[part] = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    return described


def _list_verticals(sizes: tuple[int, ...], evaluation: Mapping[str, Any], asked: Mapping[str, Any]) -> list[dict]:
    """A row for each, the weakest first; those without a test image last."""
    rows = []
    for size, (vertical, found) in zip(sizes, asked.items(), strict=True):
        count = found["num_images"]
        elsewhere = found["elsewhere"] / count if count else None
        pvap = evaluation["pvap"].get(vertical)
        rows.append({"name": vertical, "size": size, "num_images": count, "pvap": pvap, "elsewhere": elsewhere})
    return sorted(rows, key=lambda row: (row["pvap"] is None, row["pvap"]))


def _list_weak_classes(evaluation: Mapping[str, Any]) -> list[dict]:
    known = [c for c in evaluation["classes"] if c["ap"] is not None]
    return sorted(known, key=lambda c: (c["ap"], c["num_train"]))[:_NUM_WEAK]
