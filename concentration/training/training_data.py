"""What a network is trained and validated on."""

from dataclasses import dataclass

import numpy as np

from concentration.data.order import Order
from concentration.data.reader import Reader
from concentration.data.resident import ResidentImages
from concentration.data.split import Split
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class TrainingData:
    """Where samples, their order and their targets come from.

    Attributes:
        split: the training split.
        order: the order of the training samples.
        reader: reads their images and targets.
        val_reader: reads validation samples and their hard labels, not smeared; None where there are none.
        val_ordinals: which samples of the validation split are used.
        taxonomy: the taxonomy of the network's outputs.
        teachers: they make the targets in every step, from the labels that `reader` gives; None where it gives the targets.
        resident: the images, where `reader` leaves them out; None where it reads them.
    """

    split: Split
    order: Order
    reader: Reader
    val_reader: Reader | None
    val_ordinals: np.ndarray | None
    taxonomy: Taxonomy
    teachers: RoutedTeachers | None = None
    resident: ResidentImages | None = None
