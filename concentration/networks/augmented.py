"""Growing a trained network by auxiliary heads, and asking it with only those heads that an image is likely to need.

Shapes: B batch, C all classes, N groups, G classes of one group.

Source: Warde-Farley, Rabinovich and Anguelov 2014.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.auxiliary_heads import AuxiliaryHead, HeadsConfig
from concentration.networks.student import Student


def augment(student: Student, config: HeadsConfig, group_C: Tensor) -> Student:
    """The network with heads beside its old layers. The old layers keep every bit and are frozen; only the classifier is new.

    The classifier is everything from the last hidden layers to the outputs: their weights and biases, also those of earlier
    heads, and the pace.

    Args:
        group_C: for each output, the number of its head.

    Source: section 2: "We train holding the pre-existing weights and biases fixed, learning only the hidden layer weights for
        the new portions and retraining the classifier layer's weights."
    """
    grown = Student(student.config.model_copy(update={"augmentations": (*student.config.augmentations, config)}))
    grown.augmentations[-1].set_groups(group_C)
    classifier = set(list_classifier(student))
    old = {name: tensor for name, tensor in student.state_dict().items() if name not in classifier}
    grown.load_state_dict(old, strict=False)
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(name not in old)
    top = grown.top
    hidden = [top.top1, top.top1_norm, top.top2, top.top2_norm] if top.has_hidden else []
    earlier = [head for heads in grown.augmentations[:-1] for head in heads.heads]
    grown.frozen_modules = [grown.base, *hidden, *earlier]  # norms and heads keep their statistics
    return grown.train(student.training)


def list_classifier(student: Student) -> list[str]:
    """The tensors of the student's `state_dict` that give its outputs from its last hidden layers."""
    own = [name for name in student.state_dict() if name.startswith(("top.classifiers.", "pace."))]
    of_heads = [
        f"augmentations.{number}.{name}"
        for number, heads in enumerate(student.augmentations)
        for name in heads.classifier_names()
    ]
    return own + of_heads


def choose_widths(
    hidden: Sequence[int], capacity: str, num_classes: Sequence[int], num_samples: Sequence[int]
) -> list[tuple[int, ...]]:
    """The hidden sizes of each head: equal (the paper), or in proportion to its classes or samples, with the same mean.

    Source: section 6 names both as "seemingly relevant factors".
    """
    if capacity == "equal":
        return [tuple(hidden)] * len(num_classes)
    shares = num_classes if capacity == "classes" else num_samples
    factors = [len(shares) * share / max(1, sum(shares)) for share in shares]
    return [tuple(max(8, 8 * round(size * factor / 8)) for size in hidden) for factor in factors]


class ConditionalHeads:
    """A `Classifier` that evaluates a head only for images of which some class in its group is as likely as `threshold`.

    How likely that is, the network says with every head at its mean output, which costs nothing. An image for which a head is
    not evaluated keeps the logits of that answer; their probabilities in the group are all below the threshold.

    Source: section 6: "specialists that are only evaluated when necessary".

    Raises:
        ConfigError: the network has no heads.
    """

    def __init__(self, student: Student, threshold: float):
        if not isinstance(student, Student) or not student.augmentations:
            raise ConfigError(
                "head_threshold: this network has no auxiliary heads; leave it out, or name an augmented one"
            )
        self.student = student
        self.threshold = threshold
        #: For each head, by augmentation: how many images it was evaluated for; and the number of all images.
        self._num_evaluated = [[0] * len(heads.heads) for heads in student.augmentations]
        self._num_images = 0

    @property
    def image_size(self) -> int:
        return self.student.image_size

    @property
    def num_outputs(self) -> int:
        return self.student.num_outputs

    @property
    def device(self) -> torch.device:
        return self.student.device

    def to(self, device: torch.device) -> "ConditionalHeads":
        self.student.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        student, layers = self.student, self.student.compute_layers(images)
        total_BC = torch.cat(student.top.classify(layers.top2), dim=1)
        for heads in student.augmentations:
            total_BC = total_BC + heads.sort([head.add_mean().unsqueeze(0) for head in heads.heads])
        probability_BC = student.finish_logits(total_BC).sigmoid()
        for number, heads in enumerate(student.augmentations):
            features_BD = layers.at(heads.config.layer)
            likeliest_BC = probability_BC[:, torch.argsort(heads.place_C)]  # head by head
            groups = likeliest_BC.split([head.classify.out_features for head in heads.heads], dim=1)
            added = []
            for group, (head, probability_BG) in enumerate(zip(heads.heads, groups, strict=True)):
                is_likely_B = probability_BG.amax(1) >= self.threshold
                added_BG = torch.zeros_like(probability_BG)
                if is_likely_B.any():
                    added_BG[is_likely_B] = head(features_BD[is_likely_B]) - head.add_mean()
                added.append(added_BG)
                self._num_evaluated[number][group] += int(is_likely_B.sum())
            total_BC = total_BC + heads.sort(added)
        self._num_images += len(images)
        return student.finish_logits(total_BC)

    @property
    def num_heads(self) -> int:
        return sum(len(heads.heads) for heads in self.student.augmentations)

    def mean_heads(self) -> float:
        """The heads that were evaluated for an image, on average."""
        return sum(map(sum, self._num_evaluated)) / max(1, self._num_images)

    def count_saved(self) -> int:
        """Multiply-adds that an image did without, on average."""
        return self._average_left_out(count_head)

    def count_left_out_parameters(self) -> int:
        """Trained numbers of the heads that were not evaluated for an image, on average."""
        return self._average_left_out(lambda head: sum(parameter.numel() for parameter in head.parameters()))

    def _average_left_out(self, count: Callable[[AuxiliaryHead], int]) -> int:
        heads = [head for each in self.student.augmentations for head in each.heads]
        evaluated = [number for numbers in self._num_evaluated for number in numbers]
        left_out = [1 - number / max(1, self._num_images) for number in evaluated]
        return round(sum(count(head) * share for head, share in zip(heads, left_out, strict=True)))


def count_head(head: AuxiliaryHead) -> int:
    """Multiply-adds of one head for one image."""
    total, num_places = 0, 1
    for layer in (*head.hidden, head.classify):
        if isinstance(layer, nn.Unflatten):
            num_places = math.prod(layer.unflattened_size[1:])
        elif isinstance(layer, nn.Conv2d):  # of stride 1, padded
            total += layer.weight.numel() * num_places
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()
    return total
