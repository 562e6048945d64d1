"""What `prepare` says at its end: how many classes and images there are, and how unevenly they are spread.

Images are counted by their own labels, without label smearing. An inner node that is no image's own label is not among
the counted classes: its images are those of its descendants.

Shapes: C all classes, L labels of a split.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from concentration.data.split import Split
from concentration.stages.report_values import format_count, format_percent, format_short, format_tick
from concentration.taxonomy import Taxonomy

#: Of the classes, those with the most images, whose share of all labels is the measure of imbalance.
LARGEST_SHARE = 0.1

# The report's colours on paper.
_PAPER, _INK, _SOFT, _GRID = "#fcfcfa", "#1c1f26", "#5c636e", "#ecece8"
_COLORS = ("#3553c9", "#d98716", "#16806c", "#b53f76", "#7554bd", "#86683a", "#2f8dbf")
#: Room for this many bars at least, so that two are no walls.
_MIN_ROWS = 7
#: And for no more: the picture, with its other half, would be longer than any screen. The text has them all.
_MAX_ROWS = 40
_MAX_NAME = 28
_DPI = 120
#: Where a class without an image lies on a logarithmic scale, which has no zero.
_ZERO_PLACE = 0.5


@dataclass(frozen=True)
class GroupSummary:
    """One vertical, or all of them together.

    Attributes:
        num_classes, num_leaves: inner nodes are classes, too.
        num_samples: by split, the samples with a label in it.
        train_counts: (counted classes,) training images of each, falling.
        num_without_image: classes of which neither they nor a descendant in their vertical have a training image.
    """

    name: str
    num_classes: int
    num_leaves: int
    num_samples: Mapping[str, int]
    train_counts: np.ndarray
    num_without_image: int

    @property
    def largest_share(self) -> float:
        """The share of the labels that belongs to the `LARGEST_SHARE` of the counted classes with the most images."""
        num_largest = max(1, round(LARGEST_SHARE * len(self.train_counts)))
        return float(self.train_counts[:num_largest].sum() / self.train_counts.sum())


@dataclass(frozen=True)
class Summary:
    """The classes and images of a prepared data set, in the order of the verticals and of the splits."""

    verticals: Sequence[GroupSummary]
    total: GroupSummary

    def to_text(self, max_verticals: int | None = None) -> str:
        """A table with a line a vertical, and what its columns count.

        Args:
            max_verticals: of more, only those with the most training images are shown, and long names are cut: for a terminal.
                None shows all, whole.
        """
        shown = self.verticals if max_verticals is None else self.choose_largest(max_verticals)
        num_left_out = len(self.verticals) - len(shown)
        splits = list(self.total.num_samples)
        titles = ["vertical", "classes", "leaves", *splits, "min", "median", "max", "no image"]
        rows = [titles, *(_format_row(group) for group in [*shown, self.total])]
        if max_verticals is not None:
            rows = [[_cut(row[0]), *row[1:]] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        rule = "-" * len(lines[0])
        left_out = [f"({num_left_out} more verticals)"] if num_left_out else []
        return "\n".join([lines[0], rule, *lines[1:-1], *left_out, rule, lines[-1], "", *self._describe()]) + "\n"

    def choose_largest(self, max_verticals: int) -> Sequence[GroupSummary]:
        """All verticals in their order, or of more than so many those with the most training images, the largest first."""
        if len(self.verticals) <= max_verticals:
            return self.verticals
        return sorted(self.verticals, key=lambda group: -group.num_samples["train"])[:max_verticals]

    def _describe(self) -> list[str]:
        share = format_percent(self.total.largest_share)
        return [
            "Training images of a class: min, median, max; no image: neither its own nor a descendant's.",
            f"The largest {LARGEST_SHARE:.0%} of the classes have {share} of the training labels.",
        ]


def summarise_splits(splits: Mapping[str, Split]) -> Summary:
    """Counts all splits of one taxonomy; "train" must be among them and have an image."""
    train = splits["train"]
    taxonomy = train.taxonomy
    count_C = train.count_labels()
    is_counted_C = taxonomy.is_leaf | (count_C > 0)
    is_without_C = ~_has_image(taxonomy, count_C)
    samples_of = {name: _count_samples(split) for name, split in splits.items()}

    def summarise(name: str, outputs: slice, num_samples: Mapping[str, int]) -> GroupSummary:
        return GroupSummary(
            name=name,
            num_classes=outputs.stop - outputs.start,
            num_leaves=int(taxonomy.is_leaf[outputs].sum()),
            num_samples=num_samples,
            train_counts=np.sort(count_C[outputs][is_counted_C[outputs]])[::-1],
            num_without_image=int(is_without_C[outputs].sum()),
        )

    verticals = [
        summarise(name, taxonomy.vertical_slice(name), {split: int(counts[n]) for split, counts in samples_of.items()})
        for n, name in enumerate(taxonomy.verticals)
    ]
    in_all = {name: len(split) for name, split in splits.items()}
    return Summary(verticals, summarise("all", slice(0, taxonomy.num_classes), in_all))


def draw_summary(summary: Summary) -> bytes:
    """A PNG: at the left the classes of every vertical, of many those of the largest, at the right the long tail of images."""
    import matplotlib.figure  # here, because it takes long and is needed once
    import matplotlib.text

    bars = summary.choose_largest(_MAX_ROWS)
    height = 0.9 + 0.3 * max(len(bars), _MIN_ROWS)
    figure = matplotlib.figure.Figure(figsize=(12, height), dpi=_DPI, facecolor=_PAPER, layout="constrained")
    bars_axes, tail_axes = figure.subplots(1, 2)
    for axes in (bars_axes, tail_axes):
        axes.set_facecolor(_PAPER)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=_SOFT, labelsize=9, length=0)
        axes.set_axisbelow(True)
    _draw_bars(bars_axes, bars, len(summary.verticals))
    _draw_tail(tail_axes, summary)
    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font has all scripts: some names become boxes
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _format_row(group: GroupSummary) -> list[str]:
    counts = group.train_counts
    return [
        group.name,
        format_count(group.num_classes),
        format_count(group.num_leaves),
        *(format_count(number) for number in group.num_samples.values()),
        format_count(counts.min()),
        f"{np.median(counts):,.1f}".removesuffix(".0"),
        format_count(counts.max()),
        format_count(group.num_without_image),
    ]


def _has_image(taxonomy: Taxonomy, count_C: np.ndarray) -> np.ndarray:
    """(C,) bool: a class, or a descendant in its vertical, has an image."""
    has_image_C = count_C > 0
    for output in np.flatnonzero(has_image_C):
        has_image_C[list(taxonomy.ancestors[output])] = True
    return has_image_C


def _count_samples(split: Split) -> np.ndarray:
    """(M,) the samples with a label in each vertical: `Split.routed`, without sorting."""
    vertical_L = split.taxonomy.vertical_of_output[split.label_output].astype(np.int32)
    num_verticals = split.taxonomy.num_verticals
    if len(vertical_L) == len(split):
        return np.bincount(vertical_L, minlength=num_verticals)
    sample_L = split.sample_of_label  # rising, so that equal ones are neighbours
    counts = np.zeros(num_verticals, dtype=np.int64)
    for number in range(num_verticals):
        samples = sample_L[vertical_L == number]
        counts[number] = min(1, len(samples)) + np.count_nonzero(samples[1:] != samples[:-1])
    return counts


def _draw_bars(axes, verticals: Sequence[GroupSummary], num_all: int) -> None:
    num_rows = len(verticals)
    sizes = [group.num_classes for group in verticals]
    colors = _COLORS[:num_rows] if num_rows <= len(_COLORS) else _COLORS[0]
    axes.barh(range(num_rows), sizes, height=0.7, color=colors)
    for row, group in enumerate(verticals):
        text = f"  {format_short(group.num_classes)} classes, {format_short(group.num_samples['train'])} images"
        axes.text(group.num_classes, row, text, va="center", color=_SOFT, fontsize=9)
    axes.set_yticks(range(num_rows), [_shorten(group.name) for group in verticals], color=_INK)
    axes.set_ylim(max(num_rows, _MIN_ROWS) - 0.4, -0.6)
    axes.set_xlim(0, 1.6 * max(sizes))  # room for the text behind the longest bar
    axes.set_xticks([])
    which = "each vertical" if num_rows == num_all else f"the {num_rows} largest of {num_all:,} verticals"
    _set_title(axes, f"Classes and training images of {which}")


def _draw_tail(axes, summary: Summary) -> None:
    if len(summary.verticals) <= len(_COLORS):
        for group, color in zip(summary.verticals, _COLORS, strict=False):
            _draw_tail_line(axes, group, label=_shorten(group.name), color=color, linewidth=1.6)
    else:  # so many lines are a shade around the whole, and have no names
        for number, group in enumerate(summary.verticals):
            label = "each vertical" if number == 0 else None
            _draw_tail_line(axes, group, label=label, color=_COLORS[0], linewidth=1.2, alpha=0.35)
    _draw_tail_line(axes, summary.total, label="all classes", color=_INK, linewidth=2.2)
    _set_tail_scale(axes, summary.total.train_counts)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of the classes, those with the most images first", color=_SOFT, fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    _set_title(axes, "Training images of each class")


def _draw_tail_line(axes, group: GroupSummary, **style) -> None:
    counts = np.maximum(group.train_counts, _ZERO_PLACE)
    # The picture has some 700 columns; 100,000 points in it would only take time.
    kept = np.unique(np.linspace(0, len(counts) - 1, 700).astype(np.int64))
    axes.plot(100 * (kept + 0.5) / len(counts), counts[kept], **style)


def _set_tail_scale(axes, train_counts: np.ndarray) -> None:
    """Whole decades around the counts, and below them a zero if there is one."""
    first, last = (int(np.floor(np.log10(max(count, 1)))) for count in (train_counts[-1], train_counts[0]))
    digits = (1, 2, 5) if last - first < 2 else (1,)
    ticks = [d * 10**e for e in range(first, last + 1) for d in digits] + [10 ** (last + 1)]
    places, names = list(map(float, ticks)), [format_tick(tick) for tick in ticks]
    if train_counts[-1] == 0:
        places, names = [_ZERO_PLACE, *places], ["0", *names]
    axes.set_yscale("log")
    axes.set_ylim(places[0] / 1.1, places[-1] * 1.1)
    axes.set_yticks(places, names)
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color=_GRID)


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _shorten(name: str) -> str:
    """NOTE: matplotlib leaves names that start with an underscore out of a legend; it does not see this blank."""
    name = _cut(name)
    return f"\u200b{name}" if name.startswith("_") else name


def _set_title(axes, text: str) -> None:
    axes.set_title(text, loc="left", color=_INK, fontsize=11, fontweight="bold")
