"""Builds the report as the text of one self-contained HTML page, from evaluations, curves and configurations.

The page shows what there is and leaves out the rest: an evaluation made by hand may hold nothing but `mpvap`.
"""

import base64
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from concentration.stages import report_curves
from concentration.stages.report_calibration import build_calibration_part
from concentration.stages.report_charts import Bar, draw_bars, draw_legend
from concentration.stages.report_comparison import build_comparison_part, build_teachers_part
from concentration.stages.report_crops import build_crops_part
from concentration.stages.report_headline import (
    HIGH,
    LOW,
    build_headline_table,
    build_tiles,
    describe_gap,
    describe_gap_log_softmax,
    draw_headline_scale,
    subject_of,
)
from concentration.stages.report_looks import assign_looks
from concentration.stages.report_targets import build_targets_part
from concentration.stages.report_tradeoff import build_tradeoff_part
from concentration.stages.report_values import (
    DASH,
    as_mapping,
    as_mappings,
    as_number,
    as_texts,
    flatten_config,
    format_count,
    format_percent,
    read_curves,
)

NUM_CLASSES_SHOWN = 12
NUM_IMAGES_SHOWN = 24
SMALL_IMAGE_PIXELS = 64
EACH_ITS_OWN = "(each its own)"
IMAGE_URI = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
# Control characters are errors in HTML, and lone surrogates (JSON may hold them) cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class ReportInputs:
    """What the page is made of: the parsed files of a working directory. Mappings are in the order in which they are shown."""

    title: str
    workdir: str
    #: The content of each evaluations/NAME.json by NAME; all are on the same test images.
    evaluations: Mapping[str, Mapping[str, Any]]
    #: The evaluation that the page is about; "" takes the student, or the first that is no reference.
    subject: str = ""
    #: The evaluations on other test images, which cannot be compared with those above.
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: A sentence on the evaluations of earlier networks than there are now; empty if there are none.
    outdated: str = ""
    #: A sentence on the trainings that took few steps; empty if none did.
    short_trainings: str = ""
    #: The parsed lines of metrics.jsonl by run, such as "students/generalist" or "teachers/latin".
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    #: The resolved configuration of each run.
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: The stored sets of targets with an entry for each vertical, and the speeds of the students (`report_targets`).
    target_sets: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: The content of each gates/VERTICAL.json, and how the student agrees with its teachers (`report_comparison`).
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    agreement: Mapping[str, Any] | None = None
    #: The names of two evaluations to compare, that of the network in service first, and how their answers agree.
    compare: Sequence[str] = ()
    compare_agreement: Mapping[str, Any] | None = None
    #: The content of each calibrations/NAME.json by NAME.
    calibrations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: A PNG that shows the prepared data, and a text that describes it.
    data_picture: bytes = b""
    data_text: str = ""
    #: The command lines that reproduce the results.
    commands: Sequence[str] = ()
    #: Facts on the machine, the commit, the date, versions and durations.
    facts: Mapping[str, str] = field(default_factory=dict)


def build_report_page(inputs: ReportInputs) -> str:
    """The report as the text of an HTML page that loads nothing. Names are escaped, and missing values are dashes."""
    evaluations = {name: as_mapping(evaluation) for name, evaluation in inputs.evaluations.items()}
    elsewhere = {name: as_mapping(evaluation) for name, evaluation in inputs.elsewhere.items()}
    everything = {**evaluations, **elsewhere}
    runs = {run: read_curves(lines) for run, lines in inputs.curves.items()}
    looks = assign_looks([*everything, *(run.removeprefix("students/") for run in runs if run.startswith("students/"))])
    subject = inputs.subject or subject_of(evaluations)
    sizes = _vertical_sizes(evaluations)
    models = _models_in_charts(evaluations, subject)
    verticals = _verticals_of(evaluations, subject, sizes)
    order = [*verticals, *(v for v in report_curves.verticals_in_curves(runs) if v not in verticals)]
    page = _load_template().render(
        title=inputs.title,
        workdir=inputs.workdir,
        subject=subject,
        looks=looks,
        sentence=describe_gap(evaluations, subject),
        sentence_log_softmax=describe_gap_log_softmax(evaluations, subject),
        notes=[note for note in (inputs.outdated, inputs.short_trainings) if note],
        scale=draw_headline_scale(evaluations, subject, looks),
        tiles=build_tiles(evaluations, subject, sizes),
        headline=build_headline_table(evaluations, elsewhere),
        crops=build_crops_part(evaluations),
        bars=_build_bars(evaluations, models, looks, verticals, sizes),
        pvap_table=_build_pvap_table(evaluations, verticals, sizes),
        tradeoff=build_tradeoff_part(evaluations, looks),
        student_charts=report_curves.draw_student_charts(runs, looks),
        teacher_charts=report_curves.draw_teacher_charts(runs, looks),
        run_rows=report_curves.summarise_runs(runs),
        pace=report_curves.build_pace_part(runs, order, subject),
        loss_charts=report_curves.draw_vertical_charts(runs, looks, order, "train/", "/loss"),
        ap_charts=report_curves.draw_vertical_charts(runs, looks, order, "val/", "/ap"),
        targets=build_targets_part(inputs.target_sets, inputs.students),
        teachers=build_teachers_part(inputs.gates, ("specialists", subject), evaluations, inputs.agreement),
        comparison=build_comparison_part(inputs.compare, everything, inputs.compare_agreement),
        calibration=build_calibration_part(inputs.calibrations, subject, evaluations.get(subject, {})),
        data_picture=f"data:image/png;base64,{base64.b64encode(inputs.data_picture).decode()}"
        if inputs.data_picture
        else "",
        data_text=inputs.data_text,
        gallery=_build_gallery(evaluations, subject),
        classes=_build_class_tables(evaluations, subject, models),
        frequency=_build_frequency(evaluations, models, looks),
        config_changes=_compare_configs(inputs.configs, subject),
        configs=_group_configs(inputs.configs),
        commands=list(inputs.commands),
        facts=dict(inputs.facts),
        checkpoints={name: c for name, e in everything.items() if isinstance(c := e.get("checkpoint"), str)},
    )
    return UNPRINTABLE.sub("\ufffd", page)


@functools.cache
def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_code"] = _mark_code
    return environment.get_template("report.html.jinja")


def _mark_code(text: str) -> Markup:
    """What stands between backticks, as messages on a terminal have it, as code."""
    parts = (Markup("<code>{}</code>" if n % 2 else "{}").format(part) for n, part in enumerate(text.split("`")))
    return Markup("").join(parts)


def _vertical_sizes(evaluations: Mapping[str, Mapping]) -> dict[str, int]:
    """The number of classes of each vertical, from the first evaluation that lists its classes."""
    for evaluation in evaluations.values():
        names = [str(c["vertical"]) for c in as_mappings(evaluation.get("classes")) if "vertical" in c]
        if names:
            return dict(Counter(names))
    return {}


def _verticals_of(evaluations: Mapping[str, Mapping], subject: str, sizes: Mapping[str, int]) -> list[str]:
    """All verticals, those in which the subject has the highest AP first."""
    found = dict.fromkeys(v for e in evaluations.values() for v in as_mapping(e.get("pvap")))
    found |= dict.fromkeys(sizes)
    own = as_mapping(evaluations.get(subject, {}).get("pvap"))
    return sorted(found, key=lambda v: -(as_number(own.get(v)) or 0.0))


def _models_in_charts(evaluations: Mapping[str, Mapping], subject: str) -> list[str]:
    """The networks that charts show: the subject and its references, or if it stands alone, the first two others with it."""
    found = [name for name in dict.fromkeys((LOW, subject, HIGH)) if name in evaluations]
    return found if len(found) > 1 else list(dict.fromkeys([*found, *evaluations]))[:3]


def _build_bars(
    evaluations: Mapping[str, Mapping],
    models: Sequence[str],
    looks: Mapping[str, str],
    verticals: Sequence[str],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    groups = []
    for vertical in verticals:
        bars = [Bar(m, as_number(as_mapping(evaluations[m].get("pvap")).get(vertical)), looks[m]) for m in models]
        groups.append({"name": vertical, "size": sizes.get(vertical), "chart": draw_bars(bars, f"AP of {vertical}")})
    return {"legend": draw_legend([(m, looks[m]) for m in models]), "groups": groups}


def _build_pvap_table(
    evaluations: Mapping[str, Mapping], verticals: Sequence[str], sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row for each vertical: of each evaluation, the AP and the AP after log-softmax."""
    return [
        {
            "name": vertical,
            "size": format_count(sizes.get(vertical)),
            "cells": [
                [
                    format_percent(as_number(as_mapping(evaluation.get(key)).get(vertical)))
                    for key in ("pvap", "pvap_log_softmax")
                ]
                for evaluation in evaluations.values()
            ],
        }
        for vertical in verticals
    ]


def _build_gallery(evaluations: Mapping[str, Mapping], subject: str) -> dict[str, Any]:
    """Test images with the subject's answers, or if it has no gallery, with those of the first network that has."""
    named = {name: as_mappings(evaluation.get("gallery")) for name, evaluation in evaluations.items()}
    model = next((name for name in [subject, *named] if named.get(name)), "")
    return {"model": model, "cards": [_build_card(entry) for entry in named.get(model, [])[:NUM_IMAGES_SHOWN]]}


def _build_card(entry: Mapping) -> dict[str, Any]:
    image = str(entry.get("image", ""))
    labels = as_texts(entry.get("labels"))
    predictions = []
    for prediction in as_mappings(entry.get("top3"))[:3]:
        probability = as_number(prediction.get("probability"))
        predictions.append(
            {
                "path": _lineage(prediction),
                "probability": format_percent(probability),
                "width": f"{100 * min(max(probability or 0.0, 0.0), 1.0):.1f}",
                "is_correct": prediction.get("correct") is True,
            }
        )
    return {
        # NOTE: only a data URI of a bitmap is shown: the page would request an address, and an SVG may contain scripts.
        "image": image if IMAGE_URI.fullmatch(image) else "",
        "is_small": _is_small(image),
        "key": str(entry.get("key", "")),
        "labels": labels,
        "vertical": str(entry.get("vertical", "")),
        "predictions": predictions,
    }


def _lineage(prediction: Mapping) -> list[str]:
    """The names from the vertical down to the class itself."""
    path = as_texts(prediction.get("lineage"))
    name, vertical = str(prediction.get("name", "?")), str(prediction.get("vertical", ""))
    if not path or path[-1] != name:
        path.append(name)
    return path if not vertical or path[0] == vertical else [vertical, *path]


def _is_small(image: str) -> bool:
    """Whether an image is a PNG so small that it should be enlarged without blurring its pixels."""
    header = base64.b64decode(image.partition("base64,")[2][:32]) if IMAGE_URI.fullmatch(image) else b""
    return header[:4] == b"\x89PNG" and 0 < int.from_bytes(header[16:20], "big") <= SMALL_IMAGE_PIXELS


def _build_class_tables(evaluations: Mapping[str, Mapping], subject: str, charted: Sequence[str]) -> dict[str, Any]:
    """The leaves with the lowest and with the highest AP of the subject, with the AP of the other networks in charts."""
    models = [subject, *(m for m in charted if m != subject)] if subject else []
    ap_of = {
        m: {str(c.get("id")): as_number(c.get("ap")) for c in as_mappings(evaluations[m].get("classes"))}
        for m in models
    }
    leaves = []
    for c in as_mappings(evaluations.get(subject, {}).get("classes")):
        ap = as_number(c.get("ap"))
        if ap is not None and c.get("is_leaf", True):
            leaves.append((ap, as_number(c.get("num_test")) or 0.0, c))
    # Of classes with the same AP, the one with more test images comes first in both tables, since its AP is more certain.
    hardest = sorted(leaves, key=lambda leaf: (leaf[0], -leaf[1]))[:NUM_CLASSES_SHOWN]
    easiest = sorted(leaves, key=lambda leaf: (-leaf[0], -leaf[1]))[:NUM_CLASSES_SHOWN]
    return {
        "models": models,
        "tables": [
            (title, [_class_row(c, models, ap_of) for _, _, c in rows])
            for title, rows in (("Hardest", hardest), ("Easiest", easiest))
            if rows
        ],
    }


def _class_row(c: Mapping, models: Sequence[str], ap_of: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    return {
        "name": str(c.get("name", c.get("id"))),
        "vertical": str(c.get("vertical", "")),
        "aps": [format_percent(ap_of[model].get(str(c.get("id")))) for model in models],
        "num_train": format_count(as_number(c.get("num_train"))),
        "num_test": format_count(as_number(c.get("num_test"))),
    }


def _build_frequency(
    evaluations: Mapping[str, Mapping], charted: Sequence[str], looks: Mapping[str, str]
) -> dict[str, Any]:
    """Bars of the AP of classes with few, some and many training samples, for each network in charts."""
    models = [m for m in charted if as_mapping(evaluations[m].get("ap_by_frequency"))]
    bands = dict.fromkeys(band for m in models for band in as_mapping(evaluations[m]["ap_by_frequency"]))
    groups = []
    for band in bands:
        entries = {m: as_mapping(as_mapping(evaluations[m]["ap_by_frequency"]).get(band)) for m in models}
        bars = [Bar(m, as_number(entry.get("ap")), looks[m]) for m, entry in entries.items()]
        size = next((n for entry in entries.values() if (n := as_number(entry.get("num_classes"))) is not None), None)
        groups.append({"name": band, "size": size, "chart": draw_bars(bars, f"AP of classes with {band} samples")})
    return {"legend": draw_legend([(m, looks[m]) for m in models]), "groups": groups}


def _group_configs(configs: Mapping[str, Mapping]) -> list[tuple[list[str], dict[str, str]]]:
    """The runs of each configuration, and its settings; runs that differ only in their vertical have one."""
    groups: dict[tuple, tuple[list[str], dict[str, str]]] = {}
    for run, config in configs.items():
        flat = flatten_config(config)
        shared = tuple((key, value) for key, value in flat.items() if key != "vertical")
        runs, shown = groups.setdefault(shared, ([], flat))
        runs.append(run)
        if shown.get("vertical") != flat.get("vertical"):
            shown["vertical"] = EACH_ITS_OWN
    return list(groups.values())


def _compare_configs(configs: Mapping[str, Mapping], subject: str) -> list[tuple[str, str, str]]:
    """(key, the generalist's value, the subject's value) of each key in which they differ; empty if one has no configuration."""
    generalist, own = (flatten_config(configs.get(f"students/{name}")) for name in (LOW, subject))
    if not generalist or not own:
        return []
    keys = dict.fromkeys([*generalist, *own])
    return [(key, generalist.get(key, DASH), own.get(key, DASH)) for key in keys if generalist.get(key) != own.get(key)]
