"""A head whose classes are spread over ranks: each rank holds the classifiers and pace of some verticals, or of a part of one.

Base network, top-1 and top-2 stay on every rank, under DistributedDataParallel. A step moves, by all-to-all,

    top-2 outputs       of each sample, to the ranks with a vertical that sees them
    targets             of all samples, to all ranks
    losses              of each sample in each vertical, back to the sample's rank
    gradients           of the top-2 outputs, back to the sample's rank, which sums them

and no gradient of the head. The loss itself needs no collective, except where a vertical is cut: there the squared norm and the
sum in the norm's Jacobian, two numbers a sample, are summed over the ranks that hold the vertical (and a third one where the
vertical has an offset).

Why all-to-all, and not all-gather and reduce-scatter: ranks may have different numbers of samples, and with top=fc_sc and sc_sc
each rank needs its own verticals' blocks alone. Where all verticals share their features (fc_fc) the bytes are those of
an all-gather, elsewhere they are fewer.

Why top-2 is not spread: its share of the parameters is small in heads that are large enough for this (42 of 592 million, for a
million classes and FC4096-SC512). And from three ranks on, at these sizes, it is cheaper to move its outputs, (W-1)/W M s2
numbers a sample over W ranks, than its inputs, (W-1) s1.

Shapes: B this rank's samples, G all ranks' samples, T all top-2 outputs, t those that a rank needs, K kept classes, M verticals,
C all classes, P the parts that a rank holds (`head_plan.Part`), H the classes that it holds.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # see fused_head
from torch.autograd.function import once_differentiable

from concentration import distributed
from concentration.networks.head_plan import Part, plan_shards
from concentration.objectives import fused_head
from concentration.objectives.fused_block import ClassRange, HeadParameters
from concentration.objectives.fused_head import GradientTime, fused_vertical_loss
from concentration.objectives.target_checks import check_targets
from concentration.targets import SoftTargets

#: Where a vertical is cut, a block has at least so many samples: with fewer, time goes into waiting for sums over ranks. (A step
#: of 400,000 classes on two gloo processes took 0.50 s; 0.61 s with the 5 samples that a cache holds, 0.54 s with 64.)
LEAST_BLOCK_SAMPLES = 16


class ShardedHead:
    """What this rank holds of a head, and how it is reached from the others.

    All ranks make it at the same time, and call its methods in the same order.

    Attributes:
        plan: the parts of every rank.
        parts: the parts of this rank.
        ranges: the same parts, as the loss takes them.
        num_holders: for each of these parts, how many ranks hold parts of its vertical.
        sent: bytes that this rank has sent to others, by kind ("targets", "losses", ...).

    Args:
        vertical_sizes: V of every vertical.
        num_generic: how many top-2 outputs all verticals see.
        individual_sizes: for every vertical, how many top-2 outputs it alone sees.
    """

    def __init__(self, vertical_sizes: Sequence[int], num_generic: int, individual_sizes: Sequence[int]):
        self.vertical_sizes = list(vertical_sizes)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.plan = plan_shards(vertical_sizes, self.world_size)
        self.parts = self.plan[self.rank]
        self.sent: Counter[str] = Counter()
        self._columns = [list_columns(parts, num_generic, individual_sizes) for parts in self.plan]
        holders = [
            tuple(rank for rank, parts in enumerate(self.plan) if any(part.vertical == vertical for part in parts))
            for vertical in range(len(vertical_sizes))
        ]
        # Every rank must make every group, in the same order, also those that it is not in.
        groups = {ranks: dist.new_group(list(ranks)) for ranks in dict.fromkeys(holders) if len(ranks) > 1}
        self.num_holders = [len(holders[part.vertical]) for part in self.parts]
        self.ranges = [self._build_range(part, holders[part.vertical], groups) for part in self.parts]

    @_disable_dynamo
    def loss_by_vertical(
        self,
        top2_BT: Tensor,
        split_top2: Callable[[Tensor], list[Tensor]],
        parameters: Sequence[HeadParameters],
        targets: SoftTargets,
        class_weight_C: Tensor | None,
        gradients: GradientTime,
    ) -> Tensor:
        """The loss of each of this rank's samples in each vertical, (B, M).

        NOTE: the gradients of this rank's `parameters` are the mean over ranks of what each rank's samples give, not the
        sum. DistributedDataParallel does the same for all other parameters, so one factor (`training.module.share_of_sample`)
        is right for both.

        Args:
            top2_BT: top-2 outputs of this rank's samples.
            split_top2: from the columns (G, t) that this rank needs to what the classifier of each of its parts sees.
            parameters: classifier and pace of each of this rank's parts.

        Raises:
            DataError: targets name a class that does not exist, or are not finite.
        """
        check_targets(targets, len(top2_BT), sum(self.vertical_sizes), len(self.vertical_sizes))
        shapes = self._gather_shapes(targets)
        counts = [shape.num_samples for shape in shapes]
        all_targets = self._gather_targets(targets, shapes)
        hidden = split_top2(_Features.apply(top2_BT, self, counts))
        losses = [
            fused_vertical_loss(hidden_GS, vertical, classes, all_targets, part.vertical, class_weight_C, gradients)
            for hidden_GS, vertical, classes, part in zip(hidden, parameters, self.ranges, self.parts, strict=True)
        ]
        return _Losses.apply(torch.stack(losses, dim=1), self, counts)

    @_disable_dynamo
    @torch.no_grad()
    def compute_logits(self, top2_BT: Tensor, compute_held: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Logits of this rank's samples, (B, V) for every vertical. For validation: every logit is sent to its sample's rank.

        Args:
            compute_held: from the top-2 outputs (G, t) that this rank needs to the logits of each of its parts.
        """
        counts = distributed.gather_sizes([len(top2_BT)], top2_BT.device)
        counts = [count for (count,) in counts]
        held_GH = torch.cat(compute_held(self.gather_features(top2_BT, counts)), dim=1)
        widths = [sum(map(len, parts)) for parts in self.plan]
        received = self._exchange("logits", held_GH.split(counts), [(len(top2_BT), width) for width in widths])
        pieces: dict[int, list[Tensor]] = {vertical: [] for vertical in range(len(self.vertical_sizes))}
        for logits_BH, parts in zip(received, self.plan, strict=True):  # ranks hold rising ranges of a vertical
            for part, logits_BV in zip(parts, logits_BH.split([len(part) for part in parts], dim=1), strict=True):
                pieces[part.vertical].append(logits_BV)
        return [torch.cat(pieces[vertical], dim=1) for vertical in sorted(pieces)]

    def gather_features(self, top2_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """The top-2 outputs (G, t) of all ranks' samples that this rank's parts see."""
        sent = [torch.cat([top2_BT[:, columns] for columns in of_rank], dim=1) for of_rank in self._columns]
        width = sent[self.rank].shape[1]
        return torch.cat(self._exchange("features", sent, [(count, width) for count in counts]))

    def scatter_feature_gradients(self, gradient_Gt: Tensor, counts: Sequence[int], num_columns: int) -> Tensor:
        """The gradients (B, T) of this rank's samples, summed over what all ranks found for them."""
        widths = [sum(columns.stop - columns.start for columns in of_rank) for of_rank in self._columns]
        shapes = [(counts[self.rank], width) for width in widths]
        received = self._exchange("feature gradients", gradient_Gt.split(counts), shapes)
        exact = torch.promote_types(gradient_Gt.dtype, torch.float32)
        total_BT = torch.zeros(counts[self.rank], num_columns, dtype=exact, device=gradient_Gt.device)
        for gradient_Bt, of_rank in zip(received, self._columns, strict=True):
            pieces = gradient_Bt.split([columns.stop - columns.start for columns in of_rank], dim=1)
            for columns, piece in zip(of_rank, pieces, strict=True):
                total_BT[:, columns] += piece
        return total_BT

    def return_losses(self, loss_GP: Tensor, counts: Sequence[int]) -> Tensor:
        """The losses (B, M) of this rank's samples, from those that each rank has of all samples in its parts."""
        shapes = [(counts[self.rank], len(parts)) for parts in self.plan]
        received = self._exchange("losses", loss_GP.split(counts), shapes)
        loss_BM = loss_GP.new_zeros(counts[self.rank], len(self.vertical_sizes))
        for loss_BP, parts in zip(received, self.plan, strict=True):
            for place, part in enumerate(parts):
                loss_BM[:, part.vertical] += loss_BP[:, place]
        return loss_BM

    def send_loss_gradients(self, gradient_BM: Tensor, counts: Sequence[int]) -> Tensor:
        """The reverse of `return_losses`: gradients (G, P) of all samples in this rank's parts."""
        sent = [torch.stack([gradient_BM[:, part.vertical] for part in parts], dim=1) for parts in self.plan]
        return torch.cat(self._exchange("losses", sent, [(count, len(self.parts)) for count in counts]))

    def sum_by_vertical(self, value_P: Tensor) -> Tensor:
        """(M,) from one number per part: those of a vertical's parts are added."""
        value_M = value_P.new_zeros(len(self.vertical_sizes))
        for value, part in zip(value_P, self.parts, strict=True):
            value_M[part.vertical] = value
        return distributed.sum_over_ranks(value_M)

    def _gather_shapes(self, targets: SoftTargets) -> list["_Shape"]:
        has = [targets.background_BM is not None, targets.weight_BM is not None]
        found = distributed.gather_sizes([*targets.index_BK.shape, *has], targets.index_BK.device)
        shapes = [_Shape(*sizes) for sizes in found]
        assert len({shape[2:] for shape in shapes}) == 1, f"the ranks' targets have different parts: {shapes}"
        return shapes

    def _gather_targets(self, targets: SoftTargets, shapes: Sequence["_Shape"]) -> SoftTargets:
        """The targets of all ranks' samples, each weighted by 1/world_size: see `loss_by_vertical`."""
        num_kept, num_verticals = max(shape.num_kept for shape in shapes), len(self.vertical_sizes)
        padding = (0, num_kept - targets.index_BK.shape[1])
        parts = {
            # int32 is enough for all classes; unused places are class 0 with probability 0.
            "index_BK": torch.nn.functional.pad(targets.index_BK.int(), padding),
            "probability_BK": torch.nn.functional.pad(targets.probability_BK, padding),
            "background_BM": targets.background_BM,
            "weight_BM": targets.weight_BM,
        }
        widths = {"index_BK": num_kept, "probability_BK": num_kept}
        gathered = {}
        for name, part in parts.items():
            if part is not None:
                width = widths.get(name, num_verticals)
                received = self._exchange(
                    "targets", [part] * self.world_size, [(shape.num_samples, width) for shape in shapes]
                )
                gathered[name] = torch.cat(received)
        gathered["index_BK"] = gathered["index_BK"].long()
        found = SoftTargets(**gathered)
        share_G = found.probability_BK.new_full((len(found.index_BK),), 1 / self.world_size)
        return found.weighted(share_G, num_verticals)

    def _exchange(self, what: str, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        others = sum(tensor.numel() for rank, tensor in enumerate(tensors) if rank != self.rank)
        self.sent[what] += others * tensors[0].element_size()
        return distributed.all_to_all(tensors, shapes)

    def _build_range(
        self, part: Part, ranks: tuple[int, ...], groups: dict[tuple[int, ...], dist.ProcessGroup]
    ) -> ClassRange:
        start, size = sum(self.vertical_sizes[: part.vertical]) + part.start, self.vertical_sizes[part.vertical]
        if len(ranks) == 1:
            return ClassRange(start, size)

        def sum_over_shards(value: Tensor) -> Tensor:
            self.sent["sums of cut verticals"] += all_reduce_bytes(value.numel() * value.element_size(), len(ranks))
            dist.all_reduce(value, group=groups[ranks])
            return value

        largest = max(len(other) for parts in self.plan for other in parts if other.vertical == part.vertical)
        block_elements = fused_head.BLOCK_ELEMENTS["cuda" if dist.get_backend() == "nccl" else "cpu"]
        block_samples = max(LEAST_BLOCK_SAMPLES, block_elements // largest)
        return ClassRange(start, size, sum_over_shards, block_samples)


def list_columns(parts: Sequence[Part], num_generic: int, individual_sizes: Sequence[int]) -> list[slice]:
    """The columns of the top-2 outputs that these parts' classifiers see."""
    bounds = list(itertools.pairwise(itertools.accumulate(individual_sizes, initial=num_generic)))
    seen = [(0, num_generic), *(bounds[part.vertical] for part in parts)]
    return [slice(start, stop) for start, stop in seen if stop > start]


def all_reduce_bytes(num_bytes: int, world_size: int) -> int:
    """What each rank sends in a ring all-reduce of `num_bytes`: all but one share, first to sum them, then to spread the sums."""
    return 2 * (world_size - 1) * num_bytes // world_size


class _Shape(NamedTuple):
    """The shape of a rank's targets."""

    num_samples: int
    num_kept: int
    has_background: int
    has_weight: int


class _Features(torch.autograd.Function):
    """From (B, T) of this rank's samples to (G, t) of this rank's parts."""

    @staticmethod
    def forward(ctx, top2_BT: Tensor, head: ShardedHead, counts: list[int]) -> Tensor:
        ctx.head, ctx.counts, ctx.num_columns, ctx.dtype = head, counts, top2_BT.shape[1], top2_BT.dtype
        return head.gather_features(top2_BT, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_Gt: Tensor):
        gradient_BT = ctx.head.scatter_feature_gradients(gradient_Gt, ctx.counts, ctx.num_columns)
        # The losses were divided by the world size; DistributedDataParallel divides what comes of this gradient once more.
        return gradient_BT.mul_(ctx.head.world_size).to(ctx.dtype), None, None


class _Losses(torch.autograd.Function):
    """From losses (G, P) of this rank's parts, each divided by the world size, to losses (B, M) of this rank's samples."""

    @staticmethod
    def forward(ctx, loss_GP: Tensor, head: ShardedHead, counts: list[int]) -> Tensor:
        ctx.head, ctx.counts = head, counts
        return head.return_losses(loss_GP, counts).mul_(head.world_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BM: Tensor):
        # NOTE: not multiplied by the world size: the gradients of the head's parameters must be those of the divided losses.
        return ctx.head.send_loss_gradients(gradient_BM, ctx.counts), None, None
