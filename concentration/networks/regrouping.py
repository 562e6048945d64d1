"""A trained network whose verticals are fewer: some are cut out, or several have become one, and nothing is trained.

A vertical that stays keeps its blocks, classifier and pace bit by bit. One that was merged from several keeps the blocks of all
(`NetworkConfig.num_blocks`); its classifier sees all of them and starts block-diagonal: a class's weights for the blocks of the
other parts are 0. Its logits are those of its parts, but the L2 norm of Equation 3 is over all of them now. So each part's rows
are first divided by the norm that the part's logits usually have, and multiplied by the part's gamma. With the merged gamma at
the root of the sum of the parts' gamma^2, an image whose parts have these norms gets the logits that it had; where the parts'
are sqrt(N_v), the merged one is sqrt(N_v), too.

Shapes: B batch, C all classes of the new network, V classes of one vertical, P parts of a merged vertical.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from concentration.errors import ConfigError
from concentration.networks.student import Student


def regroup_student(
    old: Student, parts_of: Mapping[str, Sequence[str]], old_output_C: np.ndarray, norm_of: Mapping[str, float]
) -> Student:
    """A network with these verticals, in eval mode.

    Args:
        old: trained.
        parts_of: by new vertical, in order, the old ones whose classes it has; old ones that are in none are cut out.
        old_output_C: the old output of each new one; those of a vertical are all of its parts'.
        norm_of: by old vertical that is merged, what norm its raw logits usually have: the root of the mean of
            `compute_square_norms` over images of the parts.

    Raises:
        ConfigError: the network has auxiliary heads, whose groups go across verticals.
    """
    if old.augmentations:
        raise ConfigError(
            "a network that was grown by auxiliary heads cannot be regrouped; take the one it was grown from"
        )
    sizes, blocks = old.config.verticals, dict(zip(old.config.verticals, old.config.list_num_blocks(), strict=True))
    has_blocks = old.top.block_size > 0
    merged_blocks = {vertical: sum(blocks[part] for part in parts) for vertical, parts in parts_of.items()}
    config = old.config.model_copy(
        update={
            "verticals": {vertical: sum(sizes[part] for part in parts) for vertical, parts in parts_of.items()},
            "num_blocks": {v: count for v, count in merged_blocks.items() if has_blocks and count > 1},
        }
    )
    new = Student(config)
    kept = _list_kept_blocks(parts_of, blocks) if has_blocks else []
    own, was = new.state_dict(), old.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if not name.startswith(("top.classifiers.", "pace.")):
                tensor.copy_(_take_blocks(name, was, kept, old))
        outputs = torch.from_numpy(np.asarray(old_output_C)).split(list(config.verticals.values()))
        for number, (parts, output_V) in enumerate(zip(parts_of.values(), outputs, strict=True)):
            if len(parts) == 1:
                _copy_vertical(new, old, number, list(sizes).index(parts[0]), output_V)
            else:
                _merge_verticals(new, old, number, parts, output_V, norm_of)
    return new.eval()


@torch.no_grad()
def compute_square_norms(student: Student, images: Tensor) -> Tensor:
    """(B, M): the squared L2 norm of each vertical's raw logits, before the pace."""
    raw = student.top.classify(student.compute_layers(images).top2)
    return torch.stack([logits_BV.double().square().sum(1) for logits_BV in raw], dim=1)


def _list_kept_blocks(parts_of: Mapping[str, Sequence[str]], blocks: Mapping[str, int]) -> list[int]:
    """The numbers of the old network's SC blocks that the new one has, in its order."""
    starts = dict(zip(blocks, itertools.accumulate(blocks.values(), initial=0), strict=False))
    return [starts[p] + number for parts in parts_of.values() for p in parts for number in range(blocks[p])]


def _take_blocks(name: str, was: Mapping[str, Tensor], kept: Sequence[int], old: Student) -> Tensor:
    """A parameter or buffer of the new network from those of the old one: of SC layers the rows of the blocks that are kept."""
    top, layer, *rest = (*name.split("."), "", "")
    is_blocked = {"top1": old.top.has_hidden and old.top.top1_blocks > 1, "top2": old.top.block_size > 0}
    if top != "top" or not is_blocked.get(layer.removesuffix("_norm"), False) or name.endswith("num_batches_tracked"):
        return was[name]
    num_shared = old.top.num_generic if layer.startswith("top2") else 0
    if rest[0] == "norms":  # one module a block, the first of the generic part where there is one
        number, has_shared = int(rest[1]), num_shared > 0
        block = number if has_shared and number == 0 else kept[number - has_shared] + has_shared
        return was[f"top.{layer}.norms.{block}.{rest[2]}"]
    if was[name].dim() == 3:  # BlockLinear
        return was[name][list(kept)]
    size = old.config.top.top1 if layer.startswith("top1") else old.top.block_size
    rows = [*range(num_shared), *(num_shared + block * size + row for block in kept for row in range(size))]
    return was[name][rows]


def _copy_vertical(new: Student, old: Student, number: int, part: int, output_V: Tensor) -> None:
    """Classifier and pace of a vertical that stays."""
    row_V = output_V - _first_outputs(old)[part]
    for mine, theirs in zip(
        new.top.classifiers[number].parameters(), old.top.classifiers[part].parameters(), strict=True
    ):
        mine.copy_(theirs[row_V])
    was = old.pace.state_dict()
    for name, values in new.pace.state_dict().items():
        values[_place(new, name, number)] = was[name][output_V if old.pace.is_per_class(name) else part]


def _merge_verticals(
    new: Student, old: Student, number: int, verticals: Sequence[str], output_V: Tensor, norm_of: Mapping[str, float]
) -> None:
    """Classifier and pace of a vertical that several have become."""
    parts = [list(old.config.verticals).index(vertical) for vertical in verticals]
    paces = old.pace.by_vertical()
    has_pace = old.config.pace.kind != "none"
    gamma_P = [_measure_gamma(paces[part][0]) for part in parts]
    merged_gamma = sum(gamma**2 for gamma in gamma_P) ** 0.5
    classify, first, generic = new.top.classifiers[number], _first_outputs(old), new.top.num_generic
    classify.weight.zero_()
    gamma_V, offset_V = torch.full(output_V.shape, merged_gamma), torch.zeros(output_V.shape)
    column = generic
    for part, gamma, vertical in zip(parts, gamma_P, verticals, strict=True):
        theirs, size = old.top.classifiers[part], old.config.verticals[vertical]
        is_mine_V = (output_V >= first[part]) & (output_V < first[part] + size)
        row_V = output_V[is_mine_V] - first[part]
        scale = gamma / norm_of[vertical] if has_pace else 1.0
        width = theirs.in_features - generic
        weight = torch.zeros(len(row_V), classify.in_features)
        weight[:, :generic], weight[:, column : column + width] = (
            scale * theirs.weight[row_V, :generic],
            scale * theirs.weight[row_V, generic:],
        )
        classify.weight[is_mine_V], classify.bias[is_mine_V] = weight, scale * theirs.bias[row_V]
        column += width
        own_gamma, own_offset = paces[part]
        if has_pace and own_gamma.dim():
            gamma_V[is_mine_V] = own_gamma[row_V] * merged_gamma / gamma
        if own_offset is not None:
            offset_V[is_mine_V] = own_offset[row_V] if own_offset.dim() else own_offset
    if has_pace:
        _set_pace(new, number, gamma_V, offset_V)


def _measure_gamma(gamma: Tensor | None) -> float:
    """What the logits of a vertical are scaled by: of one gamma a class, the root of their mean square; 1 without pace."""
    if gamma is None:
        return 1.0
    return float(gamma) if gamma.dim() == 0 else float(gamma.square().mean().sqrt())


def _set_pace(new: Student, number: int, gamma_V: Tensor, offset_V: Tensor) -> None:
    """Sets gamma and offset of a vertical; where it has one for all its classes, their mean."""
    own = new.pace.state_dict()
    gamma_name = "rho" if new.config.pace.log else "gamma"
    for name, values_V in ((gamma_name, gamma_V), ("offset", offset_V)):
        if name in own:
            place = _place(new, name, number)
            value = values_V if new.pace.is_per_class(name) else values_V.mean()
            own[name][place] = (value / own["start"][place]).log() if name == "rho" else value


def _place(network: Student, name: str, number: int) -> slice | int:
    """Where a vertical's numbers lie in a parameter or buffer of the pace."""
    if not network.pace.is_per_class(name):
        return number
    first, size = _first_outputs(network)[number], list(network.config.verticals.values())[number]
    return slice(first, first + size)


def _first_outputs(network: Student) -> list[int]:
    """Of every vertical."""
    return list(itertools.accumulate(network.config.verticals.values(), initial=0))
