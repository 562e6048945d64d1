"""Teachers in the loop against dense targets made class by class.

Shapes: B batch, C all classes, V classes of one vertical.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from concentration.label_mix import LabelMix
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.targets import SoftTargets

SIZES = (5, 3, 4)


class Fake:
    """A `Classifier` whose logits are a product of the image's mean and numbers of its own."""

    def __init__(self, num_outputs: int):
        self.num_outputs = num_outputs
        self.weight_V = torch.randn(num_outputs, generator=torch.Generator().manual_seed(num_outputs))
        self.asked: list[int] = []
        self.device = torch.device("cpu")

    def to(self, device):
        self.device = device
        return self

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        return images.float().mean((1, 2, 3))[:, None] * self.weight_V


LABELS = [[0], [6, 4], [11], [], [8, 0, 7]]
IMAGES = torch.rand(len(LABELS), 3, 2, 2, generator=torch.Generator().manual_seed(0))


def dense_slowly(teachers: list[Fake], top_k: int, tail: str) -> Tensor:
    """(B, C): of every vertical with a label, the teacher's largest sigmoids, and perhaps the mean of the others."""
    dense_BC = torch.zeros(len(LABELS), sum(SIZES))
    for row, labels in enumerate(LABELS):
        for number, teacher in enumerate(teachers):
            start = sum(SIZES[:number])
            if not any(start <= label < start + SIZES[number] for label in labels):
                continue
            probability_V = teacher(IMAGES[row : row + 1])[0].sigmoid()
            kept = probability_V.argsort(descending=True)[:top_k].tolist()
            left_out = [c for c in range(SIZES[number]) if c not in kept]
            for c in range(SIZES[number]):
                value = probability_V[c] if c in kept else probability_V[left_out].mean() if tail == "spread" else 0.0
                dense_BC[row, start + c] = value
    return dense_BC


@pytest.mark.parametrize("top_k", [1, 2, 4, 100])
@pytest.mark.parametrize("tail", ["zero", "spread"])
def test_targets_are_what_the_teachers_of_a_samples_verticals_say(top_k, tail):
    teachers = [Fake(size) for size in SIZES]
    targets = RoutedTeachers(teachers, top_k, tail)(IMAGES, SoftTargets.from_labels(LABELS))
    torch.testing.assert_close(targets.dense(*SIZES), dense_slowly(teachers, top_k, tail))


@pytest.mark.parametrize("tail", ["zero", "spread"])
def test_a_share_of_the_labels_is_added_where_they_say_a_leaf(tail):
    teachers = [Fake(size) for size in SIZES]
    is_leaf_C = np.isin(np.arange(sum(SIZES)), [0, 8, 11])
    mix = LabelMix(0.25, is_leaf_C, np.repeat(np.arange(len(SIZES)), SIZES))
    found = RoutedTeachers(teachers, 2, tail, mix)(IMAGES, SoftTargets.from_labels(LABELS))
    expected_BC = dense_slowly(teachers, 2, tail)
    for row, labels in enumerate(LABELS):
        for number, size in enumerate(SIZES):
            start = sum(SIZES[:number])
            inside = [label for label in labels if start <= label < start + size]
            if is_leaf_C[inside].any():
                expected_BC[row, start : start + size] *= 0.75
                expected_BC[row, inside] += 0.25
    torch.testing.assert_close(found.dense(*SIZES), expected_BC)


def test_a_teacher_sees_the_images_of_its_vertical_alone():
    teachers = [Fake(size) for size in SIZES]
    RoutedTeachers(teachers, 2, "zero")(IMAGES, SoftTargets.from_labels(LABELS))
    assert [teacher.asked for teacher in teachers] == [[3], [2], [2]]
    nobody = [Fake(size) for size in SIZES]
    targets = RoutedTeachers(nobody, 2, "zero")(IMAGES[:1], SoftTargets.from_labels([[]]))
    assert [teacher.asked for teacher in nobody] == [[], [], []]
    assert not targets.dense(*SIZES).any()


def test_the_weights_of_verticals_are_kept_and_teachers_move():
    teachers = [Fake(size) for size in SIZES]
    routed = RoutedTeachers(teachers, 2, "zero")
    labels = SoftTargets.from_labels(LABELS)
    weight_BM = torch.rand(len(LABELS), len(SIZES))
    targets = routed(IMAGES, SoftTargets(labels.index_BK, labels.probability_BK, weight_BM=weight_BM))
    assert targets.weight_BM is weight_BM
    routed.to(torch.device("meta"))
    assert {teacher.device.type for teacher in teachers} == {"meta"}
