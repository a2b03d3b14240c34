"""``boot --plot FILE``: accepted memory over virtual time, with the borders of stages and the kernel's milestones.

The vertical axis ends at the size of the guest's memory, so pictures of a lazy and of an eager boot compare. The
same boot gives the same SVG, byte by byte, with one version of matplotlib, which is an extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guest.errors import BootError, FormatError
from guest.trace import StageBegin
from guest.units import SZ_1G, SZ_1M, size_text
from tools.milestones import Acceptance, accepted_over_time, milestones
from tools.pipeline import Boot

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes

EXTRA = "unaccepted[plot]"
FORMATS = (".svg", ".png")
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "unaccepted",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
}
_SIZE_INCHES, _DPI = (11, 6.5), 120
_AXES = (0.085, 0.16, 0.885, 0.5)
"""Left, bottom, width and height of the axes; the labels stand above."""
_LABEL_GAP = 0.021
"""Least distance of two labels, of the width of the axes."""
_MAX_LABELS = int(1 / _LABEL_GAP)
_LEADER_END = 1.07
_ACCEPTED, _ADDED, _STAGE, _MILESTONE = "#1f5fa8", "#c26a00", "#555555", "#a03030"


class PlotError(BootError):
    """matplotlib is missing."""


@dataclass(frozen=True, slots=True)
class _Label:
    ns: int
    text: str
    is_stage: bool


def check_plot(path: str) -> None:
    """Refuse, before the boot, a picture that could not be drawn after it."""
    if Path(path).suffix not in FORMATS:
        raise FormatError("--plot", found=repr(path), expected="a name that ends in .svg or .png", source="boot --help")
    directory = Path(path).parent
    if not directory.is_dir():
        raise FormatError("--plot", found=f"no {str(directory)!r}", expected="a directory", source="boot --help")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError(f"--plot needs matplotlib: pip install '{EXTRA}'") from error


def plot(boot: Boot, path: str) -> None:
    """Draw ``boot``, as far as it came, into ``path``; its suffix chooses the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE_INCHES)
        axes = figure.add_axes(_AXES)
        end_ns = max(boot.clock.ns, 1)
        _axes(axes, boot, end_ns)
        _curves(axes, boot)
        _labels(axes, _label_list(boot), end_ns)
        figure.text(_AXES[0], 0.99, _title(boot), fontsize=11, fontweight="bold", va="top")
        figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=8.5, columnspacing=1.6)
        metadata = {"Date": None} if path.endswith(".svg") else {"Software": None}
        figure.savefig(path, dpi=_DPI, metadata=metadata)


def _title(boot: Boot) -> str:
    policy = "eager" if "accept_memory=eager" in boot.config.cmdline.split() else "lazy"
    code = f", real code: {boot.config.run}" if boot.config.run is not None else ""
    return f"Accepted memory of a TD with {size_text(boot.host.ram.total())}, accept_memory={policy}{code}"


def _axes(axes: Axes, boot: Boot, end_ns: int) -> None:
    """Scales: time from 0 to the end, bytes from 0 to the guest's memory, with marks at powers of two."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    total = boot.host.ram.total()
    axes.set_xlim(0, end_ns)
    axes.set_ylim(0, total * 1.02)
    axes.yaxis.set_major_locator(MultipleLocator(1 << max(total // 4, 1).bit_length() - 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(int(value)) if value else "0"))
    unit, name = (1e9, "s") if end_ns >= 10_000_000_000 else (1e6, "ms")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(f"virtual time, {name}")
    axes.set_ylabel("accepted")
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, boot: Boot) -> None:
    records, total = boot.trace.records, boot.host.ram.total()
    sums = Acceptance(boot.host.ram)
    for record in records:
        sums.take(record)
    points = list(accepted_over_time(records, boot.clock.ns))
    x, y = [ns for ns, _ in points], [accepted for _, accepted in points]
    axes.fill_between(x, y, color=_ACCEPTED, alpha=0.12, linewidth=0)
    axes.plot(x, y, color=_ACCEPTED, linewidth=1.6, label=f"accepted by the guest: {sums.accepted_bytes >> 10} KiB")
    added = f"added by the host while it built the TD: {sums.added_bytes >> 10} KiB"
    axes.axhline(sums.added_bytes, color=_ADDED, linewidth=1, linestyle=":", label=added)
    axes.axhline(total, color="black", linewidth=0.8, linestyle="--", label=f"memory: {total >> 10} KiB")
    axes.plot([], [], " ", label=f"still unaccepted: {sums.unaccepted.total() >> 10} KiB")


def _label_list(boot: Boot) -> list[_Label]:
    """What to write above the curve: where stages begin and where the kernel came past its milestones."""
    records = boot.trace.records
    labels = [_Label(r.ns, r.stage, True) for r in records if isinstance(r.event, StageBegin)]
    labels += [
        _Label(each.virtual_ns, f"{each.name}  {_short(each.accepted_bytes)}", False)
        for each in milestones(records, boot.host.ram)[: _MAX_LABELS - len(labels)]
    ]
    return sorted(labels, key=lambda label: label.ns)


def _labels(axes: Axes, labels: list[_Label], end_ns: int) -> None:
    """Upright labels above the axes, side by side, each with a thin line to its time."""
    wanted = [label.ns / end_ns for label in labels]
    for label, at, place in zip(labels, wanted, spread(wanted, _LABEL_GAP), strict=True):
        color = _STAGE if label.is_stage else _MILESTONE
        line: dict[str, Any] = {"color": color, "linewidth": 0.7, "clip_on": False, "transform": axes.transAxes}
        style = (0, (4, 2)) if label.is_stage else "-"
        axes.plot([at, at], [0, 1], linestyle=style, alpha=0.6, **line)
        axes.plot([at, place], [1, _LEADER_END], **line)
        weight = "bold" if label.is_stage else "normal"
        axes.text(
            place, _LEADER_END + 0.01, label.text, transform=axes.transAxes, rotation=90, color=color,
            fontweight=weight, fontsize=8.5, ha="center", va="bottom",
        )  # fmt: skip


def _short(size: int) -> str:
    return f"{size / SZ_1G:.2f} GiB" if size >= SZ_1G else f"{size / SZ_1M:.0f} MiB"


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places from 0 to 1, near the ascending ones that are wanted, at least ``gap`` apart if there is room."""
    places: list[float] = []
    for at in wanted:
        places.append(max(at, places[-1] + gap) if places else at)
    limit = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], limit)
        limit = places[number] - gap
    return places
