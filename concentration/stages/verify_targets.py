"""`concentrate targets verify=true`: stored targets against what their teacher says now, and what they alone are worth.

Shapes: N records that are looked at, K kept classes, V classes of the vertical.
"""

from pathlib import Path

import numpy as np
import torch

from concentration.data.sample_targets import load_manifest
from concentration.data.split import Split
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.metrics.evaluation import Evaluator
from concentration.progress import Progress
from concentration.stages.teacher_answers import TeacherAnswers
from concentration.targets import TargetFile, keep_top_k

#: Worse than this is no rounding: float16 and the packed codec keep probabilities to 0.02, and swap near-equal classes.
_LEAST_AGREEMENT, _MOST_DIFFERENCE = 0.95, 0.01


def verify_targets(
    directory: Path, vertical: str, answers: TeacherAnswers, num_verified: int, progress: Progress
) -> str:
    """Looks at `num_verified` records, spread evenly, writes `verification.json` and returns it as a line.

    index_agreement: the share of the teacher's top K that are stored. mean_difference: mean |dp| of the stored classes.
    retained_mass: of the sum of all sigmoids, what the top K hold. ap: the vertical's average precision on these training
    images, from the stored targets alone.

    Raises:
        DataError: the manifest, a file or a view does not fit, or the targets are not what the teacher says.
    """
    split = answers.split
    manifest = load_manifest(directory, split)
    routed = split.routed(vertical)
    num_views = max(1, answers.num_views)
    chosen = np.unique(
        np.linspace(0, len(routed) * num_views - 1, min(num_verified, len(routed) * num_views)).astype(int)
    )
    ordinals, views = routed[chosen // num_views], chosen % num_views
    index_NK, probability_NK, tail_N, view_NV = _read_stored(directory, vertical, manifest, split, ordinals, views)
    expected_NV, seen_NV = _ask_again(answers, ordinals, views)
    if view_NV is not None and not np.array_equal(view_NV, seen_NV):
        raise DataError(f"{directory}: holds other views than this version draws; make the targets again")
    progress.advance(len(chosen))
    facts = _compare(index_NK, probability_NK, tail_N, expected_NV)
    facts["ap"] = _score_stored(split, vertical, ordinals, index_NK, probability_NK, expected_NV.shape[1])
    write_atomically(directory / "verification.json", {"num_verified": len(chosen), **facts})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in facts.items() if value is not None)
    if facts["index_agreement"] < _LEAST_AGREEMENT or facts["mean_difference"] > _MOST_DIFFERENCE:
        raise DataError(f"{directory}: not what the teacher says now: {shown}; make the targets again")
    return f"{directory}: {len(chosen)} records: {shown}"


def _read_stored(
    directory: Path, vertical: str, manifest: dict, split: Split, ordinals: np.ndarray, views: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    outputs = split.taxonomy.vertical_slice(vertical)
    parts, first = [], 0
    for shard, inside in enumerate(split.by_shard(ordinals)):
        if not len(inside):
            continue
        path = directory / f"{split.index_names[shard]}.safetensors"
        file = TargetFile(path, outputs.stop - outputs.start, manifest["num_kept"])
        file.verify()
        rows = inside - split.shard_start[shard]
        places = np.searchsorted(file.row, rows)
        if places.max() >= len(file.row) or not np.array_equal(file.row[places], rows):
            raise DataError(f"{path}: lacks rows of the shard; make the targets again")
        records = places * file.num_views + views[first : first + len(inside)]
        parts.append((*file.read(records), file.read_views(records)))
        first += len(inside)
    index_NK, probability_NK, tail_N, view_NV = zip(*parts, strict=True)
    stored_views = None if view_NV[0] is None else np.concatenate(view_NV)
    return np.concatenate(index_NK), np.concatenate(probability_NK), np.concatenate(tail_N), stored_views


def _ask_again(answers: TeacherAnswers, ordinals: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's sigmoids (N, V) of these samples in these views, and the views' records."""
    unique, place = np.unique(ordinals, return_inverse=True)
    asked = list(answers.ask([unique]))
    probability = torch.cat([answer.probability_BV for answer in asked]).numpy()
    seen = torch.cat([answer.view_BV for answer in asked]).numpy()
    rows = views * len(unique) + place  # the teacher is asked view by view
    return probability[rows], seen[rows]


def _compare(
    index_NK: np.ndarray, probability_NK: np.ndarray, tail_N: np.ndarray, expected_NV: np.ndarray
) -> dict[str, float]:
    is_decoded_N = expected_NV.any(axis=1)
    index_NK, probability_NK, tail_N, expected_NV = (
        array[is_decoded_N] for array in (index_NK, probability_NK, tail_N, expected_NV)
    )
    top_index_NK = keep_top_k(torch.from_numpy(expected_NV), index_NK.shape[1])[0].numpy()
    is_stored_NV = np.zeros(expected_NV.shape, dtype=bool)
    np.put_along_axis(is_stored_NV, index_NK, True, axis=1)
    agreement = np.take_along_axis(is_stored_NV, top_index_NK, axis=1).mean()
    kept_N = probability_NK.sum(1, dtype=np.float64)
    return {
        "index_agreement": float(agreement),
        "mean_difference": float(np.abs(np.take_along_axis(expected_NV, index_NK, axis=1) - probability_NK).mean()),
        "retained_mass": float((kept_N / (kept_N + tail_N)).mean()),
    }


def _score_stored(
    split: Split,
    vertical: str,
    ordinals: np.ndarray,
    index_NK: np.ndarray,
    probability_NK: np.ndarray,
    num_classes: int,
) -> float | None:
    outputs = split.taxonomy.vertical_slice(vertical)
    score_NV = np.zeros((len(ordinals), num_classes), dtype=np.float32)
    np.put_along_axis(score_NV, index_NK, probability_NK, axis=1)
    evaluator = Evaluator(split.taxonomy.restrict(vertical))
    labels = [
        [o - outputs.start for o in split.labels(n) if outputs.start <= o < outputs.stop] for n in ordinals.tolist()
    ]
    evaluator.update(torch.from_numpy(score_NV).clamp(1e-7, 1 - 1e-7).logit(), labels)
    return evaluator.compute().mpvap
