"""The calibration of an export: true probabilities, from which one on an answer is given, and "none of these".

Shapes: B batch, C all classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concentration.errors import DataError, unreadable
from concentration.metrics.calibration import Scaling, load_scaling
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What `concentrate calibrate` found.

    Attributes:
        scaling: of logits.
        threshold_C: (C,) an answer of the class is given from this probability on; infinite where none is right often enough.
        rejection: an image whose best answer is below this probability shows none of the classes.
    """

    scaling: Scaling
    threshold_C: np.ndarray
    rejection: float

    @classmethod
    def load(cls, path: Path, taxonomy: Taxonomy) -> "Calibration":
        """Raises: DataError where the file is damaged, or was made for other verticals or classes."""
        try:
            content = parse_json(path.read_bytes(), str(path))
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            scaling = load_scaling(content, taxonomy)
            threshold_C = np.full(taxonomy.num_classes, np.inf)
            for vertical, found in content["thresholds"]["by_vertical"].items():
                threshold_C[taxonomy.vertical_slice(vertical)] = _as_threshold(found["threshold"])
            for class_id, threshold in content["thresholds"]["by_class"].items():
                threshold_C[taxonomy.output(class_id)] = _as_threshold(threshold)
            return cls(scaling, threshold_C, float(content["none_of_these"]["threshold"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: no calibration ({type(error).__name__}: {error}); calibrate and export again with overwrite=true"
            ) from None

    def scale(self, logits_BC: np.ndarray, taxonomy: Taxonomy) -> np.ndarray:
        """Calibrated logits (B, C)."""
        return self.scaling.scale(logits_BC, taxonomy.vertical_of_output)


def load_calibration(folder: Path, taxonomy: Taxonomy) -> Calibration | None:
    """That of an export; None where it has none. Raises: as `Calibration.load`."""
    path = folder / CALIBRATION_FILE
    return Calibration.load(path, taxonomy) if path.exists() else None


def _as_threshold(value: float | None) -> float:
    return np.inf if value is None else float(value)
