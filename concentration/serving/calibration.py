"""The calibration of an export: how logits become true probabilities, and the thresholds that answers are held against.

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
        scaling: the slope and shift of the logits of each vertical.
        threshold_C: (C,) float64, the probability from which on an answer with this class is sure; infinite if none ever is.
        rejection: an image whose best answer has a smaller probability probably shows none of the classes.
    """

    scaling: Scaling
    threshold_C: np.ndarray
    rejection: float

    @classmethod
    def load(cls, path: Path, taxonomy: Taxonomy) -> "Calibration":
        """Reads a calibration. Raises: DataError if the file is damaged, or was made for other verticals or classes."""
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
        """The calibrated logits, (B, C): their sigmoids are the probabilities of the classes."""
        return self.scaling.scale(logits_BC, taxonomy.vertical_of_output)


def load_calibration(folder: Path, taxonomy: Taxonomy) -> Calibration | None:
    """The calibration of the export in this folder; None if it has none. Raises: as `Calibration.load`."""
    path = folder / CALIBRATION_FILE
    return Calibration.load(path, taxonomy) if path.exists() else None


def _as_threshold(value: float | None) -> float:
    """The threshold, infinite for null."""
    return np.inf if value is None else float(value)
