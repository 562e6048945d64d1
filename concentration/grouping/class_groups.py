"""Groups of classes: a partition of all classes that can replace the verticals of a taxonomy.

Shapes: C all classes (by output), G groups, M verticals of the given taxonomy, N samples, P pairs of a sample and a label.
"""

from dataclasses import dataclass, replace

import numpy as np

from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

#: The group of a class about which nothing is known, and of a sample whose image cannot be decoded.
NO_GROUP = -1


@dataclass(frozen=True)
class ClassGroups:
    """A partition of the classes into groups, which are numbered from the largest to the smallest.

    Attributes:
        group_C: int64, the group of each class.
        taxonomy: the taxonomy whose classes are partitioned.
        num_placed: how many classes were placed by their vertical, since nothing was known of them or they were alone in a group.
        num_alone: how many of these were alone in a group, which is none then.
    """

    group_C: np.ndarray
    taxonomy: Taxonomy
    num_placed: int = 0
    num_alone: int = 0

    @classmethod
    def build(cls, group_C: np.ndarray, taxonomy: Taxonomy) -> "ClassGroups":
        """Turns any grouping into one whose groups can be verticals: every class in a group, and two classes or more in each.

        A class without a group, or alone in its group, goes to the group that has most classes of its vertical.

        Args:
            group_C: integers, the group of each class; NO_GROUP if nothing is known of it.

        Raises:
            DataError: fewer than two groups have two classes or more.
        """
        group_C = group_C.copy()
        numbers, counts = np.unique(group_C[group_C != NO_GROUP], return_counts=True)
        group_C[np.isin(group_C, numbers[counts == 1])] = NO_GROUP
        unplaced = np.flatnonzero(group_C == NO_GROUP)
        known_C = group_C != NO_GROUP
        if np.sum(counts > 1) < 2:
            raise DataError(
                f"grouping: {np.sum(counts > 1)} groups of two classes or more are left of {len(counts)}; ask for another "
                "number of groups, or look at more images"
            )
        largest = numbers[counts.argmax()]
        for output in unplaced:
            siblings = group_C[known_C & (taxonomy.vertical_of_output == taxonomy.vertical_of_output[output])]
            group_C[output] = np.bincount(siblings).argmax() if len(siblings) else largest
        return cls(_number_by_size(group_C), taxonomy, len(unplaced), int(np.sum(counts == 1)))

    @property
    def num_groups(self) -> int:
        return int(self.group_C.max()) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """(G,) the name of each group as a vertical: `group-0` and so on, with as many digits as the last one needs."""
        width = len(str(self.num_groups - 1))
        return tuple(f"group-{number:0{width}}" for number in range(self.num_groups))

    @property
    def sizes(self) -> tuple[int, ...]:
        """(G,) the number of classes of each group."""
        return tuple(np.bincount(self.group_C).tolist())

    def permute(self, seed: int) -> "ClassGroups":
        """Random groups of the same sizes: the control experiment of Warde-Farley et al., section 5.2."""
        return ClassGroups(np.random.default_rng(seed).permutation(self.group_C), self.taxonomy)

    def build_taxonomy(self) -> Taxonomy:
        """A taxonomy with the same classes in the same order, whose verticals are the groups."""
        names, output_of = self.names, self.taxonomy.output_of_position
        return Taxonomy(
            [
                replace(c, vertical=names[self.group_C[output_of[position]]])
                for position, c in enumerate(self.taxonomy.classes)
            ],
            "grouping",
        )

    def count_verticals(self) -> np.ndarray:
        """(G, M) int64: how many classes of each vertical each group has."""
        count_GM = np.zeros((self.num_groups, self.taxonomy.num_verticals), dtype=np.int64)
        np.add.at(count_GM, (self.group_C, self.taxonomy.vertical_of_output), 1)
        return count_GM

    def compute_purity(self) -> float:
        """The purity of the groups: the share of classes whose vertical is the most frequent one in their group."""
        return float(self.count_verticals().max(1).sum() / len(self.group_C))

    def describe(self, num_shown: int = 30) -> str:
        """A text that lists each group's size, the verticals of its classes, and the names of its first `num_shown` classes.

        Source: Warde-Farley et al., Table 1.
        """
        lines = [f"{self.num_groups} groups of {len(self.group_C)} classes; {self.compute_purity():.1%} of the classes are of "
                 "the vertical that is the most frequent in their group.", ""]  # fmt: skip
        if self.num_placed:
            lines[1:1] = [
                f"{self.num_placed} classes were put to those of their vertical: of {self.num_placed - self.num_alone} nothing "
                f"was known, and {self.num_alone} were alone in their group, so that there are {self.num_alone} groups less."
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
    """The groups of the classes of `taxonomy` that are the verticals of `grouped`.

    Args:
        where: what errors call `grouped`.

    Raises:
        DataError: the two taxonomies have different classes.
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


def find_majority_groups(
    group_N: np.ndarray, sample_P: np.ndarray, output_P: np.ndarray, num_groups: int, num_classes: int
) -> np.ndarray:
    """(C,) int64: the group that most samples of each class belong to; NO_GROUP if no sample of the class has a group.

    Args:
        group_N: integers, the group of each sample, or NO_GROUP.
        sample_P, output_P: the labels of all samples: pairs of a sample and an output, each once.
        num_groups: G.
        num_classes: C.
    """
    group_P = group_N[sample_P]
    is_known_P = group_P != NO_GROUP
    count_CG = np.zeros((num_classes, num_groups), dtype=np.int64)
    np.add.at(count_CG, (output_P[is_known_P], group_P[is_known_P]), 1)
    return np.where(count_CG.any(1), count_CG.argmax(1), NO_GROUP)


def _number_by_size(group_C: np.ndarray) -> np.ndarray:
    """The same partition, with its groups numbered by size from the largest, and equally large ones by their lowest output."""
    numbers, first, counts = np.unique(group_C, return_index=True, return_counts=True)
    rank = np.empty(len(numbers), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(numbers))
    return rank[np.searchsorted(numbers, group_C)]
