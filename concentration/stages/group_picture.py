"""Draws a grouping: from which verticals the classes of each group come, and how similar classes are.

Shapes: C all classes, G groups, M verticals, P points along a side of the matrix of similarities.
"""

import io
import warnings

import numpy as np

from concentration.grouping.class_groups import ClassGroups
from concentration.grouping.spectral import Similarity

_PAPER, _INK, _SOFT = "#fcfcfa", "#1c1f26", "#5c636e"
_COLORS = ("#3553c9", "#d98716", "#16806c", "#b53f76", "#7554bd", "#86683a", "#2f8dbf", "#9aa53a")
#: The most points along a side of the matrix. If there are more classes, neighbours share a point.
_MAX_POINTS = 480
#: How many verticals have a colour of their own in the bars; the smaller ones share one.
_MAX_SHOWN = len(_COLORS)


def draw_groups(groups: ClassGroups, similarity: Similarity | None) -> bytes:
    """A PNG with a bar for each group and, if `similarity` is given, the similarities of all classes, sorted by group."""
    import matplotlib.figure  # here, since importing it takes long
    import matplotlib.text

    width = 6.5 if similarity is None else 13
    height = max(4.5, 1.2 + 0.28 * groups.num_groups)
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=110, facecolor=_PAPER, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 if similarity is None else 2))
    _draw_bars(axes[0], groups)
    if similarity is not None:
        _draw_similarity(axes[1], groups, similarity)
    for each in axes:
        each.set_facecolor(_PAPER)
        each.spines[:].set_visible(False)
        each.tick_params(colors=_SOFT, labelsize=9, length=0)
    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)  # names may contain dollars, which would start a formula
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_bars(axes, groups: ClassGroups) -> None:
    """A bar for each group, divided by the verticals of its classes."""
    count_GM = groups.count_verticals()
    largest = np.argsort(-count_GM.sum(0), kind="stable")
    shown, others = largest[:_MAX_SHOWN], largest[_MAX_SHOWN:]
    columns = [(groups.taxonomy.verticals[v], count_GM[:, v], _COLORS[n]) for n, v in enumerate(shown)]
    if len(others):
        columns.append((f"{len(others)} others", count_GM[:, others].sum(1), "#c9ccd1"))
    start_G = np.zeros(groups.num_groups)
    for name, count_G, color in columns:
        axes.barh(range(groups.num_groups), count_G, left=start_G, height=0.7, color=color, label=name)
        start_G += count_G
    for row, size in enumerate(groups.sizes):
        axes.text(size, row, f" {size}", va="center", color=_SOFT, fontsize=9)
    axes.set_yticks(range(groups.num_groups), groups.names, color=_INK)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="lower right", title="given vertical", title_fontsize=8)
    axes.set_title("Classes of each group", loc="left", color=_INK, fontsize=11, fontweight="bold")


def _draw_similarity(axes, groups: ClassGroups, similarity: Similarity) -> None:
    """The normalised similarities D^-1/2 B D^-1/2, averaged over the classes of each point, without forming the matrix B."""
    order_C = np.argsort(groups.group_C, kind="stable")
    block_C = np.empty(len(order_C), dtype=np.int64)
    num_points = min(len(order_C), _MAX_POINTS)
    block_C[order_C] = np.arange(len(order_C)) * num_points // len(order_C)
    scale_C = np.where(similarity.degree_C > 0, similarity.degree_C, np.inf) ** -0.5
    sum_CP = np.zeros((len(order_C), num_points))
    sum_CP[np.arange(len(order_C)), block_C] = scale_C
    mean_PP = np.zeros((num_points, num_points))
    np.add.at(mean_PP, block_C, scale_C[:, None] * similarity.multiply(sum_CP))
    count_P = np.bincount(block_C)
    mean_PP /= np.outer(count_P, count_P)
    floor = max(np.quantile(mean_PP, 0.05), mean_PP.max() * 1e-6, 1e-300)
    axes.imshow(np.log(np.maximum(mean_PP, floor)), cmap="viridis", interpolation="nearest")
    edges = np.cumsum(groups.sizes)[:-1] * num_points / len(order_C) - 0.5
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=0.6)
        axes.axvline(edge, color="white", linewidth=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
        "Similarity of the classes, by group (log scale)", loc="left", color=_INK, fontsize=11, fontweight="bold"
    )
