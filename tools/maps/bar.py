"""The address space as a bar of characters.

A linear scale would show one huge range and nothing else, so a range's width grows with the logarithm of its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from guest.units import PAGE_SIZE
from tools.maps.kinds import Kind, Span, totals

_SCALE = "not to scale: widths grow with the logarithm of the size"
_LABEL_GAP = 2
_BLOCK = "\N{FULL BLOCK}"


def weight(span: Span) -> float:
    """How much of the bar a range gets: 1 for a page, 1 more for each doubling."""
    return 1 + math.log2(max(span.size / PAGE_SIZE, 1))


def cells(cut: Sequence[Span], width: int) -> list[Span]:
    """The range that each of ``width`` cells shows: the one with the most of it."""
    edges = [0.0]
    for span in cut:
        edges.append(edges[-1] + weight(span))
    out, first = [], 0
    for cell in range(width):
        low, high = cell * edges[-1] / width, (cell + 1) * edges[-1] / width
        while edges[first + 1] <= low:
            first += 1
        best, last = first, first
        while last < len(cut) and edges[last] < high:
            if _share(edges, last, low, high) > _share(edges, best, low, high):
                best = last
            last += 1
        out.append(cut[best])
    return out


def _share(edges: Sequence[float], index: int, low: float, high: float) -> float:
    return min(edges[index + 1], high) - max(edges[index], low)


def bar_lines(cut: Sequence[Span], width: int, colour: bool) -> list[str]:
    """The bar, a ruler of addresses under it, the legend, and what the scale is."""
    shown = cells(cut, width)
    hidden = len(cut) - len({id(span) for span in shown})
    left_out = f"; {hidden} of {len(cut)} ranges are too narrow to be seen" if hidden else ""
    legend = "  ".join(f"{paint(kind, colour)} {kind.word}" for kind, _, _ in totals(cut))
    return ["".join(paint(span.kind, colour) for span in shown), _ruler(shown), legend, f"({_SCALE}{left_out})"]


def paint(kind: Kind, colour: bool) -> str:
    """One cell: a coloured block, or the letter where colours are not wanted."""
    return f"\x1b[{kind.ansi}m{_BLOCK}\x1b[0m" if colour else kind.letter


def _ruler(shown: Sequence[Span]) -> str:
    """Addresses under the cells where their ranges begin, as many as fit."""
    line = ""
    for column, span in enumerate(shown):
        begins = column == 0 or shown[column - 1] is not span
        label = f"{span.start:#x}"
        fits = column + len(label) <= len(shown) and (column == 0 or column >= len(line) + _LABEL_GAP)
        if begins and fits:
            line = f"{line:<{column}}{label}"
    return line
