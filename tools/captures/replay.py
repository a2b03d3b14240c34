"""Running our kernel stages on a capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guest.errors import GuestPanic
from guest.trace import Print
from kernel.mm_init import mm_init
from kernel.mmzone import Zone
from kernel.setup_arch import setup_arch
from tools.captures.capture import Capture
from tools.captures.causes import cause_of
from tools.captures.compare import Difference, Row, compare_lines
from tools.captures.machine import image_size, machine_of
from tools.captures.zones import compare_zones

_PANIC = "Kernel panic - not syncing: "


@dataclass(frozen=True, slots=True)
class Replay:
    """Our log, our zones if mm-init was reached, and the words of our panic if there was one."""

    log: list[str]
    zones: Sequence[Zone] = ()
    panic: str | None = None


def replay(capture: Capture) -> Replay:
    """Run setup-arch and mm-init in a plain guest as the capture found it."""
    machine = machine_of(capture)
    zones: Sequence[Zone] = ()
    panic = None
    try:
        kernel = setup_arch(machine, capture.version, image_size(capture))
        mm_init(kernel)
        zones = kernel.allocator.zones if kernel.allocator is not None else ()
    except GuestPanic as error:
        panic = error.text
    log = [record.event.text for record in machine.trace.records if isinstance(record.event, Print)]
    return Replay(log, zones, panic)


def compare(capture: Capture, ours: Replay) -> Iterator[Row]:
    """Every subject of which the capture speaks."""
    yield from compare_lines(capture, ours.log, cause_of)
    yield _memory_total(capture, ours)
    yield from compare_zones(capture, ours.zones)
    theirs = next((line for line in capture.log if line.startswith(_PANIC)), "").removeprefix(_PANIC)
    if theirs or ours.panic:
        differs = theirs != (ours.panic or "")
        yield Row("panic", 1, (Difference(ours.panic or "", theirs),) if differs else ())


def _memory_total(capture: Capture, ours: Replay) -> Row:
    """The second number of the ``Memory:`` line: all present pages."""
    totals = [[line.split("/")[1].split("K")[0] for line in log if _is_memory(line)] for log in (ours.log, capture.log)]
    mine, theirs = ((found or [""])[0] for found in totals)
    return Row("Memory: total", int(bool(theirs)), (Difference(mine, theirs),) if theirs and mine != theirs else ())


def _is_memory(line: str) -> bool:
    return line.startswith("Memory: ") and "K available" in line
