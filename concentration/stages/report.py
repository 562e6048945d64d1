"""`concentrate report`: one self-contained page with everything that was measured, and the same as JSON."""

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import concentration
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.metrics.agreement import compare_in_verticals, compare_overall
from concentration.schema import FolderName, parse_json, write_override
from concentration.stages.earlier_networks import is_earlier, list_verticals
from concentration.stages.evaluate import load_answers
from concentration.stages.folders import CALIBRATIONS, EVALUATIONS, GATES, REPORT, SHARDS, STUDENTS, TARGETS, TEACHERS
from concentration.stages.prepare import SUMMARY_PICTURE, SUMMARY_TEXT
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.report_comparable import IMAGES, split_comparable
from concentration.stages.report_headline import subject_of
from concentration.stages.report_page import ReportInputs, build_report_page
from concentration.stages.run_directory import SPEED_FILE, RunDirectory, StageConfig
from concentration.stages.short_trainings import describe_short_trainings
from concentration.temporaries import clear_temporaries
from concentration.training.metrics_file import load_metrics

#: In the working directory: the command line of the latest `concentrate run`.
COMMAND_FILE = "run.json"
#: Shown first, in this order, around the student's own name.
FIRST, LAST = "generalist", "specialists"
DEFAULT_NAME = "student"


class ReportConfig(StageConfig):
    """Writes `report/index.html` and `report/metrics.json`.

    name: the network that the page is about, or, where there is no `student`, the one with the highest mpvap; evaluations and
        calibrations on other test images than its own stand apart.
    compare: two evaluations, the one in service first: class by class, what the other gained and lost.
    """

    name: FolderName = DEFAULT_NAME
    compare: tuple[str, str] | None = None


def report(config: ReportConfig) -> None:
    """Runs the stage; it is quick, and always drawn anew.

    Raises:
        ConfigError: nothing has been evaluated, or not what is asked for.
    """
    evaluations = _load_evaluations(config)
    picture, text = (config.workdir / SHARDS / name for name in (SUMMARY_PICTURE, SUMMARY_TEXT))
    subject = config.name if config.name in evaluations else subject_of(evaluations)
    comparable, elsewhere = split_comparable(evaluations, evaluations[subject])
    inputs = ReportInputs(
        title=f"Knowledge concentration: {config.workdir.name}",
        workdir=str(config.workdir),
        evaluations=comparable,
        subject=subject,
        elsewhere=elsewhere,
        outdated=(outdated := _describe_outdated(config.workdir, evaluations)),
        short_trainings=describe_short_trainings(config.workdir, (FIRST, subject)),
        curves=_load_curves(config.workdir),
        configs=_load_configs(config.workdir),
        target_sets=_load_target_sets(config.workdir),
        students=_load_students(config.workdir),
        gates={path.stem: _load(path) for path in sorted((config.workdir / GATES).glob("*.json"))},
        agreement=_compare_answers(config.workdir, LAST, subject),
        compare=config.compare or (),
        compare_agreement=_compare_answers(config.workdir, *config.compare) if config.compare else None,
        calibrations=_load_calibrations(config.workdir, evaluations),
        data_picture=picture.read_bytes() if picture.exists() else b"",
        data_text=text.read_text(encoding="utf-8", errors="replace") if text.exists() else "",
        commands=_describe_commands(config),
        facts=_gather_facts(config.workdir),
    )
    directory = config.workdir / REPORT
    clear_temporaries(directory)
    if inputs.agreement:
        evaluations[subject]["agreement"] = inputs.agreement
    without_pictures = {name: {k: v for k, v in e.items() if k != "gallery"} for name, e in evaluations.items()}
    write_atomically(directory / "metrics.json", without_pictures)
    write_atomically(directory / "index.html", build_report_page(inputs))
    print(f"report: {(directory / 'index.html').resolve()}" + (f"; NOTE: {outdated}" if outdated else ""))


def _load(path: Path) -> dict[str, Any]:
    """The object in a file. Raises: DataError where it is damaged."""
    values = parse_json(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise DataError(f"{path}: a {type(values).__name__}, expected an object; bring it back, or make it again")
    return values


def _load_evaluations(config: ReportConfig) -> dict[str, dict]:
    paths = {path.stem: path for path in (config.workdir / EVALUATIONS).glob("*.json")}
    loaded = {name: _load(path) for name, path in paths.items()}
    loaded = {name: evaluation for name, evaluation in loaded.items() if evaluation.get("split", "test") == "test"}
    loaded = {name: e | {IMAGES: _identify_images(paths[name])} for name, e in loaded.items()}
    if not loaded:
        raise ConfigError(
            f"{config.workdir / EVALUATIONS}: nothing evaluated yet; run `concentrate evaluate name=NAME` first"
        )
    # The default name may be that of no network here.
    asked = [("name", config.name)] if config.name != DEFAULT_NAME else []
    for key, name in [*asked, *(("compare", name) for name in config.compare or ())]:
        if name not in loaded:
            raise ConfigError(
                f"{key}: no evaluation of {name} on test (there: {', '.join(sorted(loaded))}); "
                f"run `concentrate evaluate {write_override('name', name)}` first"
            )
    others = sorted(set(loaded) - {FIRST, config.name, LAST})
    return {name: loaded[name] for name in (FIRST, config.name, *others, LAST) if name in loaded}


def _identify_images(path: Path) -> dict[str, str]:
    """What the evaluation read beside the network."""
    return {key: value for key, value in _load_upstream(path).items() if key != "checkpoint"}


def _load_upstream(path: Path) -> dict[str, str]:
    """What the stage that wrote this file read; empty where that is not known, as of one that is being made anew."""
    directory = RunDirectory(path.with_suffix(""))
    return directory.load_upstream() if directory.is_finished else {}


def _describe_outdated(workdir: Path, evaluations: Mapping[str, dict]) -> str:
    """Which evaluations are of earlier networks than there are now, and what to do; empty where none is."""
    verticals = list_verticals(workdir)
    found = [
        title
        for title, evaluation in evaluations.items()
        if is_earlier(workdir, workdir / EVALUATIONS / title, evaluation.get("checkpoint"), verticals)
    ]
    if not found:
        return ""
    return (
        f"{', '.join(found)} changed after the evaluation, whose numbers are shown; `concentrate evaluate` with "
        "overwrite=changed measures what is there now"
    )


def _compare_answers(workdir: Path, first: str, second: str) -> dict | None:
    """How often two networks agree about the same test images; None where the answers of one are not kept, or of other data."""
    found = [load_answers(workdir, name) for name in (first, second)]
    if None in found or found[0][1] != found[1][1]:
        return None
    answers = [each for each, _ in found]
    _, taxonomy, _ = load_prepared(workdir, DataOverrides())
    by_vertical = compare_in_verticals(*answers)
    return {
        "overall": asdict(compare_overall(*answers)),
        "by_vertical": {taxonomy.verticals[number]: asdict(each) for number, each in by_vertical.items()},
    }


def _load_calibrations(workdir: Path, evaluations: Mapping[str, dict]) -> dict[str, dict]:
    """Those of the networks that were evaluated, in the same order; one of an earlier network of that name is left out."""
    paths = {name: workdir / CALIBRATIONS / f"{name}.json" for name in evaluations}
    loaded = {name: _load(path) for name, path in paths.items() if path.exists()}
    return {
        name: c | {IMAGES: {"data": images} if (images := _load_upstream(paths[name]).get("test")) else {}}
        for name, c in loaded.items()
        if c.get("checkpoint") == evaluations[name].get("checkpoint")
    }


def _run_directories(workdir: Path) -> list[Path]:
    return [path for kind in (STUDENTS, TEACHERS) for path in sorted((workdir / kind).glob("*")) if path.is_dir()]


def _load_curves(workdir: Path) -> dict[str, list[dict]]:
    curves = {f"{path.parent.name}/{path.name}": load_metrics(path) for path in _run_directories(workdir)}
    return {name: lines for name, lines in curves.items() if lines}


def _load_configs(workdir: Path) -> dict[str, dict]:
    return {
        f"{path.parent.name}/{path.name}": RunDirectory(path).load_config()
        for path in _run_directories(workdir)
        if (path / "config.json").exists()
    }


def _load_target_sets(workdir: Path) -> dict[str, list[dict]]:
    """By set, what each vertical's finished targets say of themselves."""
    sets: dict[str, list[dict]] = {}
    for path in sorted((workdir / TARGETS).glob("*/*/DONE.json")):
        names = ("manifest.json", "DONE.json", SPEED_FILE)
        facts = [_load(path.parent / name) for name in names if (path.parent / name).exists()]
        sets.setdefault(path.parent.parent.name, []).append({key: fact[key] for fact in facts for key in fact})
    return sets


def _load_students(workdir: Path) -> dict[str, dict]:
    """The targets of each finished student that was trained on some, and how fast it learned from them."""
    students = {}
    for path in sorted((workdir / STUDENTS).glob("*/DONE.json")):
        config, done = RunDirectory(path.parent).load_config(), _load(path)
        targets = done.get("targets") or config.get("targets")  # `add` has them in its record
        if targets is None:  # made from networks that were there: nothing to compare in speed
            continue
        speed = path.parent / SPEED_FILE
        students[path.parent.name] = {
            "targets": targets,
            "num_images": done["step"] * config["trainer"]["batch_size"],
            **(_load(speed) if speed.exists() else {}),
        }
    return students


def _describe_commands(config: ReportConfig) -> list[str]:
    """The command of the whole run, as it was given, where there was one; and the one that draws this page."""
    path = config.workdir / COMMAND_FILE
    run = [_load(path)["command"]] if path.exists() else []
    where = f"{write_override('workdir', str(config.workdir))} {write_override('name', config.name)}"
    return [*run, f"concentrate report {where}"]


def _find_commit() -> str | None:
    """The commit of this package's checkout; None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _gather_facts(workdir: Path) -> dict[str, str]:
    facts = {
        "concentration": concentration.__version__,
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
    }
    if commit := _find_commit():
        facts["commit"] = commit
    for path in _run_directories(workdir):
        seconds = [line["seconds"] for line in load_metrics(path) if "seconds" in line]
        if seconds and math.isfinite(seconds[-1]):
            facts[f"{path.parent.name}/{path.name}"] = f"{seconds[-1]:.0f} s of training"
    return facts
