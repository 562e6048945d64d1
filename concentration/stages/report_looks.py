"""How the report draws each network, the same in all charts: by its colour, and where networks outnumber colours, also by dashes
and the shape of marks.

A look is a text of CSS custom properties: `--c` the colour; `--d` the dashes of a line; `--cap` and `--hole` the shape of a
mark, and what fills its middle; `--s`, `--w`, `--h` and `--r` the background, width, height and corners of its swatch. What is
not given is plain.
"""

from collections.abc import Sequence
from itertools import accumulate

#: The numbers of these networks' colours in the page's palette, which no other network has.
RESERVED = {"generalist": 0, "student": 1, "specialists": 2}
#: Of the others' colours, and for each time that all of them are used again, pixels of strokes and gaps.
COLORS = range(3, 10)
DASHES = ((), (7, 4), (2, 4), (11, 3, 3, 3))


def plain(color: str) -> str:
    """The look of what has a CSS colour and nothing else."""
    return f"--c:{color}"


def assign_looks(names: Sequence[str]) -> dict[str, str]:
    """The looks of these networks and of those with a reserved colour; 28 others differ, and then they repeat."""
    looks = {name: plain(f"var(--m{number})") for name, number in RESERVED.items()}
    others = [name for name in dict.fromkeys(names) if name not in RESERVED]
    for number, name in enumerate(others):
        again, color = divmod(number, len(COLORS))
        looks[name] = plain(f"var(--m{COLORS[color]})") + _describe_dashes(again % len(DASHES))
    return looks


def _describe_dashes(again: int) -> str:
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
