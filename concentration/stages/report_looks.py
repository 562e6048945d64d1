"""Gives each network its look, which is the same in all charts of the report.

Networks differ by their colours and, if there are more networks than colours, by dashes and the shape of marks, too. A look is a
text of CSS custom properties: `--c` is the colour; `--d` the dashes of a line; `--cap` the shape of a mark and `--hole` what
fills its middle; `--s`, `--w`, `--h` and `--r` are the background, width, height and corners of the swatch in a legend. A
property that is not given has its plain value.
"""

from collections.abc import Sequence
from itertools import accumulate

#: The networks with a colour of their own, and its number in the page's palette.
RESERVED = {"generalist": 0, "student": 1, "specialists": 2}
#: The numbers of the other networks' colours; and the dashes (pixels of strokes and gaps) for the first time that all these
#: colours are used, the second time, and so on.
COLORS = range(3, 10)
DASHES = ((), (7, 4), (2, 4), (11, 3, 3, 3))


def plain(color: str) -> str:
    """The look with this CSS colour, and all else plain."""
    return f"--c:{color}"


def assign_looks(names: Sequence[str]) -> dict[str, str]:
    """The looks of these networks, and of those with a colour of their own. After 28 others, looks repeat."""
    looks = {name: plain(f"var(--m{number})") for name, number in RESERVED.items()}
    others = [name for name in dict.fromkeys(names) if name not in RESERVED]
    for number, name in enumerate(others):
        again, color = divmod(number, len(COLORS))
        looks[name] = plain(f"var(--m{COLORS[color]})") + _describe_dashes(again % len(DASHES))
    return looks


def _describe_dashes(again: int) -> str:
    """The properties of dashes, swatch and marks when the colours are used for the (`again` + 1)-th time."""
    dashes = DASHES[again]
    if not dashes:
        return ""
    edges = [0, *accumulate(dashes)]
    colors = ["var(--c)", "transparent"] * (len(dashes) // 2)
    stripes = ",".join(f"{c} {a}px {b}px" for c, a, b in zip(colors, edges, edges[1:], strict=False))
    swatch = f"--s:repeating-linear-gradient(90deg,{stripes});--w:24px;--h:4px;--r:0"
    cap = ";--cap:square" if again % 2 else ""
    hole = ";--hole:var(--paper)" if again > 1 else ""
    return f";--d:{' '.join(map(str, dashes))};{swatch}{cap}{hole}"
