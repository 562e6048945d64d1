"""The model card of an export: what the network is, how well and how fast it answers, and where it errs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import concentration
from concentration.metrics.confusions import Confusions
from concentration.serving.export_folder import NEIGHBOURS_FOLDER
from concentration.stages.export_standalone import REQUIREMENTS
from concentration.taxonomy import Taxonomy

CARD_FILE = "README.md"
_NUM_PAIRS, _NUM_VERTICAL_PAIRS, _NUM_WEAK = 15, 10, 15


@dataclass(frozen=True)
class CardInputs:
    """Everything that the card is made from.

    Attributes:
        name, path, workdir: of the export.
        training, data: the configs of the student and of the prepared data.
        splits: what `prepare` said of each split.
        evaluation: `evaluations/NAME.json`.
        measures: `measures.json`.
    """

    name: str
    path: Path
    workdir: Path
    taxonomy: Taxonomy
    training: Mapping[str, Any]
    data: Mapping[str, Any]
    splits: Mapping[str, Any]
    image_size: int
    evaluation: Mapping[str, Any]
    measures: Mapping[str, Any]
    confusions: Confusions


def build_card(inputs: CardInputs) -> str:
    """The card as Markdown."""
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
    return environment.get_template("model_card.md.jinja").render(
        inputs=inputs,
        version=concentration.__version__,
        requirements=" ".join(REQUIREMENTS),
        has_neighbours=(inputs.path / NEIGHBOURS_FOLDER).is_dir(),
        training=_describe_training(inputs.training),
        verticals=_list_verticals(inputs),
        weak_classes=_list_weak_classes(inputs.evaluation),
        class_pairs=_list_class_pairs(inputs),
        vertical_pairs=_list_vertical_pairs(inputs),
    )


def _describe_training(training: Mapping[str, Any]) -> dict[str, str]:
    """What of the training's config a reader asks for first; the whole config is in the run directory."""
    described = {}
    for part in ("base", "top", "pace", "targets", "optimizer"):
        values = training.get(part)
        if isinstance(values, Mapping):
            described[part] = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    return described


def _list_verticals(inputs: CardInputs) -> list[dict]:
    """A row for each, the weakest first."""
    evaluation, confusions, taxonomy = inputs.evaluation, inputs.confusions, inputs.taxonomy
    rows = []
    for number, vertical in enumerate(taxonomy.verticals):
        of_vertical = confusions.vertical_MM[number]
        asked = int(of_vertical.sum())
        elsewhere = (asked - int(of_vertical[number])) / asked if asked else None
        pvap = evaluation["pvap"].get(vertical)
        size = taxonomy.vertical_sizes[number]
        rows.append({"name": vertical, "size": size, "asked": asked, "pvap": pvap, "elsewhere": elsewhere})
    return sorted(rows, key=lambda row: (row["pvap"] is None, row["pvap"]))


def _list_weak_classes(evaluation: Mapping[str, Any]) -> list[dict]:
    known = [c for c in evaluation["classes"] if c["ap"] is not None]
    return sorted(known, key=lambda c: (c["ap"], c["num_train"]))[:_NUM_WEAK]


def _list_class_pairs(inputs: CardInputs) -> list[dict]:
    taxonomy = inputs.taxonomy
    return [
        {
            "label": taxonomy.class_of_output(pair.label),
            "answer": taxonomy.class_of_output(pair.answer),
            "count": pair.count,
        }
        for pair in inputs.confusions.worst_classes(_NUM_PAIRS)
    ]


def _list_vertical_pairs(inputs: CardInputs) -> list[dict]:
    names = inputs.taxonomy.verticals
    return [
        {"label": names[pair.label], "answer": names[pair.answer], "count": pair.count}
        for pair in inputs.confusions.worst_verticals(_NUM_VERTICAL_PAIRS)
    ]
