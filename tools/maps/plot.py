"""A map as a picture: SVG or PNG, through matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from guest.errors import FormatError
from guest.units import size_text
from tools.maps.bar import weight
from tools.maps.kinds import Span, totals

EXTRA = "unaccepted[plot]"
_SUFFIXES = (".svg", ".png")
_SIZE = (12, 3.2)
_LABELS = 12
_DPI = 150


def check_plot_path(path: str) -> None:
    """Refuse a file name that says no known form, before any work is done."""
    if Path(path).suffix not in _SUFFIXES:
        raise FormatError("--plot", found=repr(path[-40:]), expected="a name that ends in .svg or .png", source=EXTRA)


def plot(cut: Sequence[Span], title: str, path: str) -> None:
    """Draw the ranges as one bar, as wide as :mod:`tools.maps.bar` has them. One map gives one file, to the byte."""
    matplotlib = _matplotlib()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = [0.0, *accumulate(weight(span) for span in cut)]
    with matplotlib.rc_context({"svg.hashsalt": "unaccepted"}):
        figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
        for kind, count, size in totals(cut):
            bars = [(edges[i], weight(span)) for i, span in enumerate(cut) if span.kind is kind]
            label = f"{kind.word}: {size_text(size)} in {count}"
            axes.broken_barh(bars, (0, 1), facecolors=kind.web, label=label)
        _finish(axes, cut, edges, title)
        figure.legend(ncols=4, loc="outside lower center", fontsize="small", frameon=False)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=_DPI, metadata=metadata)
        pyplot.close(figure)


def _finish(axes: Any, cut: Sequence[Span], edges: Sequence[float], title: str) -> None:
    """Addresses where the widest ranges begin, and what the scale is."""
    widest = sorted(range(len(cut)), key=lambda index: -cut[index].size)[:_LABELS]
    axes.set_xticks([edges[i] for i in widest], [f"{cut[i].start:#x}" for i in widest], rotation=30, ha="right")
    axes.set_xlim(0, edges[-1])
    axes.set_yticks([])
    axes.set_title(f"{title} (not to scale: widths grow with the logarithm of the size)", fontsize="medium")


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise FormatError("--plot", found="no matplotlib", expected=f"pip install '{EXTRA}'", source=EXTRA) from error
    return matplotlib
