"""Groups of classes: made valid as verticals, permuted for the control, written as a taxonomy, and described.

Shapes: C all classes (by output), G groups, M given verticals, N samples, P pairs of a sample and a label.
"""

from dataclasses import dataclass, replace

import numpy as np

from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

#: Of a class about which nothing is known, and of a sample whose image cannot be decoded.
NO_GROUP = -1


@dataclass(frozen=True)
class ClassGroups:
    """A partition of the classes; groups come by falling size.

    Attributes:
        group_C: of each output of `taxonomy`.
        taxonomy: that was partitioned.
        num_placed: classes that were put to those of their vertical, since nothing was known of them or they were alone.
    """

    group_C: np.ndarray
    taxonomy: Taxonomy
    num_placed: int = 0

    @classmethod
    def build(cls, group_C: np.ndarray, taxonomy: Taxonomy) -> "ClassGroups":
        """Groups of any numbers, NO_GROUP among them, as verticals may be: every class in one, and two classes in each.

        A class without a group, or alone in its group, goes where most classes of its vertical are.

        Raises:
            DataError: fewer than two groups are left.
        """
        group_C = group_C.copy()
        numbers, counts = np.unique(group_C[group_C != NO_GROUP], return_counts=True)
        group_C[np.isin(group_C, numbers[counts == 1])] = NO_GROUP
        homeless = np.flatnonzero(group_C == NO_GROUP)
        known_C = group_C != NO_GROUP
        if np.sum(counts > 1) < 2:
            raise DataError(
                f"grouping: {np.sum(counts > 1)} groups of two classes or more are left of {len(counts)}; ask for another "
                "number of groups, or look at more images"
            )
        largest = numbers[counts.argmax()]
        for output in homeless:
            siblings = group_C[known_C & (taxonomy.vertical_of_output == taxonomy.vertical_of_output[output])]
            group_C[output] = np.bincount(siblings).argmax() if len(siblings) else largest
        return cls(_number_by_size(group_C), taxonomy, len(homeless))

    @property
    def num_groups(self) -> int:
        return int(self.group_C.max()) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of the groups as verticals."""
        width = len(str(self.num_groups - 1))
        return tuple(f"group-{number:0{width}}" for number in range(self.num_groups))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.group_C).tolist())

    def permute(self, seed: int) -> "ClassGroups":
        """Groups of the same sizes with the classes drawn at random (Warde-Farley et al., section 5.2: the control)."""
        return ClassGroups(np.random.default_rng(seed).permutation(self.group_C), self.taxonomy)

    def build_taxonomy(self) -> Taxonomy:
        """The same classes in the same order, with the groups as their verticals."""
        names, output_of = self.names, self.taxonomy.output_of_position
        return Taxonomy(
            [
                replace(c, vertical=names[self.group_C[output_of[position]]])
                for position, c in enumerate(self.taxonomy.classes)
            ],
            "grouping",
        )

    def count_verticals(self) -> np.ndarray:
        """(G, M): how many classes of each given vertical are in each group."""
        count_GM = np.zeros((self.num_groups, self.taxonomy.num_verticals), dtype=np.int64)
        np.add.at(count_GM, (self.group_C, self.taxonomy.vertical_of_output), 1)
        return count_GM

    def compute_purity(self) -> float:
        """The share of the classes that are of the vertical which most classes of their group are of."""
        return float(self.count_verticals().max(1).sum() / len(self.group_C))

    def describe(self, num_shown: int = 30) -> str:
        """Of each group its size, the verticals that its classes are of, and the names of its first classes.

        Source: Warde-Farley et al., Table 1.
        """
        lines = [f"{self.num_groups} groups of {len(self.group_C)} classes; {self.compute_purity():.1%} of the classes are of "
                 "the vertical that is the most frequent in their group.", ""]  # fmt: skip
        if self.num_placed:
            lines[1:1] = [
                f"{self.num_placed} classes, of which nothing was known, were put to those of their vertical."
            ]
        verticals = self.taxonomy.verticals
        for number, (name, count_M) in enumerate(zip(self.names, self.count_verticals(), strict=True)):
            shares = [f"{count_M[v]} {verticals[v]}" for v in np.argsort(-count_M, kind="stable") if count_M[v]]
            outputs = np.flatnonzero(self.group_C == number)
            names = [self.taxonomy.class_of_output(int(output)).name for output in outputs[:num_shown]]
            dots = ", ..." if len(outputs) > num_shown else ""
            lines += [f"{name}: {len(outputs)} classes ({', '.join(shares)})", f"    {', '.join(names)}{dots}", ""]
        return "\n".join(lines)


def load_class_groups(taxonomy: Taxonomy, grouped: Taxonomy, where: str) -> ClassGroups:
    """The groups that the verticals of `grouped` make of the classes of `taxonomy`.

    Raises:
        DataError: `grouped` has not the same classes.
    """
    if set(taxonomy.position) != set(grouped.position):
        differing = sorted(set(taxonomy.position) ^ set(grouped.position))
        raise DataError(
            f"{where}: not of the classes of this data: {len(differing)} are in one of them alone, {differing[0]!r} for one; "
            "group again"
        )
    ids = [taxonomy.class_of_output(output).id for output in range(taxonomy.num_classes)]
    group_C = np.array([grouped.vertical_of_output[grouped.output(class_id)] for class_id in ids])
    return ClassGroups(_number_by_size(group_C), taxonomy)


def vote(
    group_N: np.ndarray, sample_P: np.ndarray, output_P: np.ndarray, num_groups: int, num_classes: int
) -> np.ndarray:
    """(C,) the group that most samples of each class are in; NO_GROUP where it has no sample.

    Args:
        group_N: of each sample.
        sample_P, output_P: the labels of the samples, each pair once.
    """
    group_P = group_N[sample_P]
    is_known_P = group_P != NO_GROUP
    count_CG = np.zeros((num_classes, num_groups), dtype=np.int64)
    np.add.at(count_CG, (output_P[is_known_P], group_P[is_known_P]), 1)
    return np.where(count_CG.any(1), count_CG.argmax(1), NO_GROUP)


def _number_by_size(group_C: np.ndarray) -> np.ndarray:
    """The same partition, numbered from 0 by falling size; of equal ones that with the first class comes first."""
    numbers, first, counts = np.unique(group_C, return_index=True, return_counts=True)
    rank = np.empty(len(numbers), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(numbers))
    return rank[np.searchsorted(numbers, group_C)]
