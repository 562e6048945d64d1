"""`concentrate calibrate name=NAME`: true probabilities, thresholds and "none of these"; fitted on val, measured on test.

Shapes: N samples, M verticals.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.files import write_atomically
from concentration.metrics.calibration import (
    Answers,
    Form,
    Scaling,
    Scope,
    Winners,
    area_under_roc,
    compute_reliability,
    expected_calibration_error,
    find_rejection_threshold,
    find_threshold,
    fit_scaling,
    log_loss,
    winners,
)
from concentration.metrics.vertical_answers import VerticalAnswers
from concentration.progress import Progress
from concentration.schema import Config
from concentration.stages.evaluate import SubjectConfig, is_model_of_all, load_subject
from concentration.stages.folders import CALIBRATIONS
from concentration.stages.identities import find_checkpoint
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.run_directory import RunDirectory
from concentration.stages.subject import Subject
from concentration.taxonomy import Taxonomy

#: All that is measured, so that one may choose on val: none at first, then from the coarsest to the finest.
METHODS: Mapping[str, tuple[Scope, Form] | None] = {
    "none": None,
    "global temperature": ("global", "temperature"),
    "global platt": ("global", "platt"),
    "vertical temperature": ("vertical", "temperature"),
    "vertical platt": ("vertical", "platt"),
}


class ThresholdsConfig(Config):
    """The probabilities from which on an answer is given.

    precision: the share of a vertical's, or a class's, given answers that should be right.
    min_answers: with fewer answers on val a class takes its vertical's threshold, and a vertical has none.
    false_rejection_rate: the share of images of the taxonomy's classes that may be called "none of these".
    """

    precision: float = pydantic.Field(default=0.9, gt=0, le=1)
    min_answers: pydantic.PositiveInt = 20
    false_rejection_rate: float = pydantic.Field(default=0.05, ge=0, lt=1)


class CalibrateConfig(SubjectConfig):
    """Writes `calibrations/NAME.json`: scaling and thresholds fitted on val, and what they achieve on test.

    scope: `vertical` fits a line for each vertical, which repairs confusion between verticals; `global` one for all.
    form: `platt` is a line with slope and shift, `temperature` one with a slope only.
    thresholds: how low a probability may be before an answer becomes "none of these".
    outside: another working directory; "none of these" is measured on its test images, except those with a class of this one.
    """

    scope: Scope = "vertical"
    form: Form = "platt"
    thresholds: ThresholdsConfig = ThresholdsConfig()
    outside: Path | None = None

    @property
    def output(self) -> Path:
        """Where the calibration goes, without its suffix."""
        return self.workdir / CALIBRATIONS / self.name


def calibrate(config: CalibrateConfig) -> None:
    """Runs the stage; one look at val, one at test, and one at the outside images.

    Raises:
        ConfigError: nothing finished has this name, or all images of `outside` are of its classes.
        DataError: a split is not there, or a network was made for another taxonomy.
    """
    _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
    checkpoint = find_checkpoint(config.workdir, config.name, taxonomy.verticals)
    splits = {name: load_prepared_split(config.workdir, name, taxonomy) for name in ("val", "test")}
    outside = _find_outside(config, taxonomy)
    directory, result_path = RunDirectory(config.output), config.output.with_name(f"{config.output.name}.json")
    upstream = {"checkpoint": checkpoint, **{name: split.fingerprint for name, split in splits.items()}}
    if outside is not None:
        upstream["outside"] = outside.split.fingerprint
    with directory.begin(config, upstream, is_growing=not result_path.exists()) as is_due:
        if not is_due:
            return
        subjects = {name: load_subject(config, taxonomy, split, checkpoint) for name, split in splits.items()}
        answers = {name: _collect(config, subject, name, directory.path) for name, subject in subjects.items()}
        if outside is not None:
            foreign = dataclasses.replace(subjects["test"], split=outside.split, ordinals=outside.ordinals)
            answers["outside"] = _collect(config, foreign, "outside", directory.path, is_outside=True)
        content = _describe(config, subjects["test"].taxonomy, answers)
        write_atomically(result_path, {"name": config.name, "checkpoint": checkpoint, **content})
        directory.finish({"top1": content["after"]["top1"], "ece": content["after"]["ece"]})
        _print(config, content)


class _Outside(NamedTuple):
    """Samples of no class that is known here."""

    split: Split
    ordinals: np.ndarray


def _find_outside(config: CalibrateConfig, taxonomy: Taxonomy) -> _Outside | None:
    """Raises: ConfigError where all samples have a class of the network's."""
    if config.outside is None:
        return None
    is_of_all = is_model_of_all(config.workdir, config.name)
    known = (taxonomy if is_of_all else taxonomy.restrict(config.name)).position
    _, theirs, _ = load_prepared(config.outside, DataOverrides())
    split = load_prepared_split(config.outside, "test", theirs)
    is_known_C = np.array([theirs.class_of_output(output).id in known for output in range(theirs.num_classes)])
    ordinals = np.setdiff1d(np.arange(len(split)), split.sample_of_label[is_known_C[split.label_output]])
    if not len(ordinals):
        raise ConfigError(
            f"outside={config.outside}: all test images there have a class that {config.name} knows, and none is outside; "
            "give other data"
        )
    return _Outside(split, ordinals)


def _collect(config: CalibrateConfig, subject: Subject, split: str, path: Path, is_outside: bool = False) -> Answers:
    answers = VerticalAnswers(subject.taxonomy)
    with Progress(f"calibrate {config.name} ({split})", len(subject.ordinals), "images", path) as progress:
        for scores_BC, ordinal_B in subject.score_all(config.batch_size, config.num_workers, progress):
            labels = [() if is_outside else subject.labels(int(ordinal)) for ordinal in ordinal_B]
            answers.update(scores_BC, labels, ordinal_B, is_outside)
    return answers.compute()


def _describe(config: CalibrateConfig, taxonomy: Taxonomy, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """All that is written, from the answers on val, on test, and on outside images where there are some."""
    nothing = Scaling.identity(taxonomy.num_verticals)
    scalings = {name: fit_scaling(answers["val"], *method) if method else nothing for name, method in METHODS.items()}
    scaling = scalings[f"{config.scope} {config.form}"]
    before, after = (winners(answers["test"], each) for each in (nothing, scaling))
    on_val = winners(answers["val"], scaling)
    lines = zip(taxonomy.verticals, scaling.slope_M.tolist(), scaling.shift_M.tolist(), strict=True)
    return {
        "scope": config.scope,
        "form": config.form,
        "scaling": {vertical: {"slope": slope, "shift": shift} for vertical, slope, shift in lines},
        "without_val": [
            vertical
            for vertical, is_seen in zip(taxonomy.verticals, answers["val"].is_labelled_NM.any(axis=0), strict=True)
            if not is_seen
        ],
        "num_val": len(answers["val"]),
        "num_test": len(answers["test"]),
        "methods": {
            name: {split: _summarise(winners(answers[split], each)) for split in ("val", "test")}
            for name, each in scalings.items()
        },
        "before": _measure(before, taxonomy),
        "after": _measure(after, taxonomy),
        "thresholds": _find_thresholds(config.thresholds, on_val, after, taxonomy),
        "none_of_these": _find_rejection(config.thresholds, answers, scaling, on_val, after, taxonomy),
    }


def _summarise(found: Winners) -> dict[str, float]:
    return {
        "top1": float(found.is_right_N.mean()),
        "ece": expected_calibration_error(found.probability_N, found.is_right_N),
        "log_loss": log_loss(found.probability_N, found.is_right_N),
    }


def _measure(found: Winners, taxonomy: Taxonomy) -> dict[str, Any]:
    """Of all answers, and of those that name a class of each vertical."""
    by_vertical = {}
    for number, vertical in enumerate(taxonomy.verticals):
        own_N = found.vertical_N == number
        if own_N.any():
            of_vertical = Winners(*(getattr(found, field.name)[own_N] for field in dataclasses.fields(found)))
            by_vertical[vertical] = {"num_answers": int(own_N.sum()), **_bins_of(of_vertical)}
    return {**_bins_of(found), "by_vertical": by_vertical}


def _bins_of(found: Winners) -> dict[str, Any]:
    bins = compute_reliability(found.probability_N, found.is_right_N)
    return {**_summarise(found), "reliability": [dataclasses.asdict(each) for each in bins]}


def _find_thresholds(config: ThresholdsConfig, val: Winners, test: Winners, taxonomy: Taxonomy) -> dict[str, Any]:
    """By vertical, and by class where val has enough answers; and what they keep of the test answers."""

    def find(mask_N: np.ndarray) -> float | None:
        found = val.probability_N[mask_N], val.is_right_N[mask_N]
        return find_threshold(*found, config.precision, config.min_answers)

    by_vertical, by_class = {}, {}
    threshold_C = np.full(taxonomy.num_classes, np.inf)
    for number, vertical in enumerate(taxonomy.verticals):
        threshold = find(val.vertical_N == number)
        own_N = test.vertical_N == number
        kept_N = own_N & (test.probability_N >= (np.inf if threshold is None else threshold))
        by_vertical[vertical] = {"threshold": threshold, **_describe_kept(test, own_N, kept_N)}
        if threshold is not None:
            threshold_C[taxonomy.vertical_slice(vertical)] = threshold
    outputs, counts = np.unique(val.output_N, return_counts=True)
    for output in outputs[counts >= config.min_answers]:
        threshold = find(val.output_N == output)
        by_class[taxonomy.class_of_output(output).id] = threshold
        threshold_C[output] = np.inf if threshold is None else threshold
    every_N = np.ones(len(test.output_N), dtype=bool)
    kept_N = test.probability_N >= threshold_C[test.output_N]
    wanted = {"precision": config.precision, "min_answers": config.min_answers}
    return {
        "wanted": wanted,
        "by_vertical": by_vertical,
        "by_class": by_class,
        "test": _describe_kept(test, every_N, kept_N),
    }


def _describe_kept(found: Winners, own_N: np.ndarray, kept_N: np.ndarray) -> dict[str, float | None]:
    return {
        "precision": float(found.is_right_N[kept_N].mean()) if kept_N.any() else None,
        "share_kept": float(kept_N.sum() / own_N.sum()) if own_N.any() else None,
    }


def _find_rejection(
    config: ThresholdsConfig,
    answers: Mapping[str, Answers],
    scaling: Scaling,
    val: Winners,
    test: Winners,
    taxonomy: Taxonomy,
) -> dict[str, Any]:
    """The threshold of "none of these", what it rejects of the taxonomy's own images, and of others."""
    inside_N, val_N = test.probability_N, val.probability_N
    threshold = find_rejection_threshold(val_N, config.false_rejection_rate)

    def reject(known_N: np.ndarray, foreign_N: np.ndarray) -> dict[str, float | int]:
        return {
            "num_images": len(foreign_N),
            "rejected": float((foreign_N < threshold).mean()),
            "auroc": area_under_roc(known_N, foreign_N),
        }

    left_out = {}
    for number, vertical in enumerate(taxonomy.verticals if taxonomy.num_verticals > 1 else ()):
        is_labelled_NM = answers["test"].is_labelled_NM
        is_foreign_N = is_labelled_NM[:, number] & (is_labelled_NM.sum(axis=1) == 1)
        without_N = winners(answers["test"].without(number), scaling).probability_N
        if is_foreign_N.any() and not is_foreign_N.all():
            left_out[vertical] = reject(without_N[~is_foreign_N], without_N[is_foreign_N])
    outside = answers.get("outside")
    return {
        "threshold": threshold,
        "false_rejection_rate": {
            "wanted": config.false_rejection_rate,
            "val": float((val_N < threshold).mean()),
            "test": float((inside_N < threshold).mean()),
        },
        "left_out": left_out,
        "outside": None if outside is None else reject(inside_N, winners(outside, scaling).probability_N),
    }


def _print(config: CalibrateConfig, content: Mapping[str, Any]) -> None:
    if content["without_val"] and config.scope == "vertical":
        print(
            f"calibrate {config.name}: no val image of {', '.join(content['without_val'])}, which takes the line of all "
            "other verticals; prepare val images of it to fit its own"
        )
    for what, key in (("top-1 over all classes", "top1"), ("expected calibration error", "ece")):
        before, after = content["before"][key], content["after"][key]
        print(f"{config.output}.json: {what} on test {100 * before:.1f} % before, {100 * after:.1f} % after")
