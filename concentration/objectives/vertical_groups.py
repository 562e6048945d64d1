"""Groups of verticals whose logits lie side by side in one matrix, so that a kernel can take many verticals at once.

Shapes: B samples, M verticals of a group, S features of a classifier, V classes of a group, P of its columns with padding,
C all classes.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from concentration.targets import SoftTargets

#: A group has at most so many logits, and at most so many features.
GROUP_ELEMENTS = 1 << 25
#: The columns of a vertical begin at a multiple of this: 16 bytes in bf16, as the matrix products want.
ALIGNMENT = 8
#: Classes of a tile: the kernels compute derivatives tile by tile.
TILE_CLASSES = 128


class Layout(NamedTuple):
    """Where the classes and columns of a group's verticals are; the last seven fields are small tables on the device.

    sizes, padded: the numbers of classes and of columns of each vertical.
    first_class: the output index of the group's first class.
    class_start_M, column_start_M, size_M: where each vertical begins inside the group, and its number of classes.
    column_end_M: where each vertical's columns end, as the matrix products want it.
    vertical_V: the vertical of every class.
    tile_vertical_T, tile_first_T: for every tile of TILE_CLASSES classes, its vertical and its first class in that.
    """

    sizes: tuple[int, ...]
    padded: tuple[int, ...]
    first_class: int
    class_start_M: Tensor
    column_start_M: Tensor
    size_M: Tensor
    column_end_M: Tensor
    vertical_V: Tensor
    tile_vertical_T: Tensor
    tile_first_T: Tensor

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    @property
    def num_columns(self) -> int:
        return sum(self.padded)


class Group(NamedTuple):
    """What the kernels need of a group: the `HeadParameters` of its verticals side by side, and the targets that concern it."""

    layout: Layout
    bias_V: Tensor
    gamma: Tensor | None  # (M,) or (V,)
    offset: Tensor | None  # (M,) or (V,)
    class_weight_V: Tensor | None
    background_BM: Tensor | None
    weight_BM: Tensor | None
    targets: SoftTargets

    @property
    def gamma_form(self) -> int:
        return form_of(self.gamma, self.layout)

    @property
    def offset_form(self) -> int:
        return form_of(self.offset, self.layout)


def plan_groups(num_samples: int, weights: Sequence[Tensor]) -> Iterator[tuple[slice, Layout]]:
    """Slices of consecutive verticals with at most `GROUP_ELEMENTS` logits and features, or of one that has more alone."""
    sizes, width = [len(weight_VS) for weight_VS in weights], weights[0].shape[1]
    first = first_class = 0
    while first < len(sizes):
        last, total = first + 1, sizes[first]
        while last < len(sizes):
            elements = num_samples * max(total + sizes[last], (last + 1 - first) * width)
            if elements > GROUP_ELEMENTS:
                break
            total += sizes[last]
            last += 1
        yield slice(first, last), _lay_out(tuple(sizes[first:last]), first_class, weights[0].device)
        first, first_class = last, first_class + total


@lru_cache(maxsize=64)
def _lay_out(sizes: tuple[int, ...], first_class: int, device: torch.device) -> Layout:
    """The layout of these verticals. It is cached, so that a step copies no tables to the device."""
    padded = tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    tiles = [(v, first) for v, size in enumerate(sizes) for first in range(0, size, TILE_CLASSES)]
    vertical_V = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    tables = [
        list(itertools.accumulate(sizes, initial=0))[:-1],
        list(itertools.accumulate(padded, initial=0))[:-1],
        sizes,
        list(itertools.accumulate(padded)),
        vertical_V.tolist(),
        *zip(*tiles, strict=True),
    ]
    return Layout(sizes, padded, first_class, *(torch.tensor(t, dtype=torch.int32, device=device) for t in tables))


def build_group(
    layout: Layout,
    kinds: Sequence[Sequence[Tensor | None]],
    targets: SoftTargets,
    class_weight_C: Tensor | None,
    verticals: slice,
) -> Group:
    """The group of `verticals`; `kinds` are their weights, biases, gammas and offsets."""
    _, biases, gammas, offsets = kinds
    classes = slice(layout.first_class, layout.first_class + layout.num_classes)
    of_samples = (
        None if t is None else t[:, verticals].float().contiguous() for t in (targets.background_BM, targets.weight_BM)
    )
    return Group(
        layout,
        torch.cat(list(biases)).float(),
        *(_join(pace) for pace in (gammas, offsets)),
        None if class_weight_C is None else class_weight_C[classes].float().contiguous(),
        *of_samples,
        targets,
    )


def _join(pace: Sequence[Tensor | None]) -> Tensor | None:
    if pace[0] is None:
        return None
    joined = torch.cat(list(pace)) if pace[0].ndim else torch.stack(list(pace))
    return joined.float()


def form_of(pace: Tensor | None, layout: Layout) -> int:
    """The form of gamma or offsets as the kernels number them: 0 for none, 1 for one per vertical, 2 for one per class."""
    if pace is None:
        return 0
    is_by_class = len(pace) == layout.num_classes and layout.num_classes > len(layout.sizes)
    return 2 if is_by_class else 1
