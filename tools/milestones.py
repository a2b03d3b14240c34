"""How far acceptance was when the kernel came past its well-known lines: lazy acceptance as a table and as a curve.

Everything is counted from the trace, so it is there for every kind of boot, our stages' and real code's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guest.ranges import RangeSet
from guest.trace import Print, Record
from tdx.events import PageAdd, TdCall
from tdx.sept import LEVEL_SIZE
from tdx.status import TDX_SUCCESS
from tools.report import ACCEPT

_LINE = re.compile(
    r"(?:\[ *[0-9]+\.[0-9]+\] )?(?:(BIOS-e820|Zone ranges|Memory|Run /init)\b|unaccepted-init: (touched [0-9]+ MiB))"
)
"""First words of the lines, after dmesg's time stamp. Only the first of the kernel's lines of each kind counts."""
_OPERAND_LEVEL, _OPERAND_FLAGS = 7, 0xFFF


@dataclass(frozen=True, slots=True)
class Milestone:
    """A line of the log, and the sums at that moment: ``unaccepted_bytes`` of RAM neither added nor accepted."""

    name: str
    stage: str
    accepted_bytes: int
    unaccepted_bytes: int
    tdcalls: int
    virtual_ns: int


class Acceptance:
    """Sums over a trace, record by record. ``ram`` is the guest's memory."""

    def __init__(self, ram: RangeSet) -> None:
        self.unaccepted = ram.copy()
        self.added_bytes = self.accepted_bytes = self.tdcalls = 0

    def take(self, record: Record) -> None:
        """Take one event into account."""
        match record.event:
            case TdCall(leaf, rcx, status, count):
                self.tdcalls += count
                if leaf == ACCEPT and status == TDX_SUCCESS:
                    start, size = rcx & ~_OPERAND_FLAGS, count * LEVEL_SIZE[rcx & _OPERAND_LEVEL]
                    self.accepted_bytes += size
                    self.unaccepted.remove(start, start + size)
            case PageAdd(start, end):
                self.added_bytes += end - start
                self.unaccepted.remove(start, end)


def milestones(records: Iterable[Record], ram: RangeSet) -> list[Milestone]:
    """The milestones that a boot came past, in order."""
    sums, seen, found = Acceptance(ram), set(), []
    for record in records:
        sums.take(record)
        name = _name(record)
        if name is not None and name not in seen:
            seen.add(name)
            found.append(
                Milestone(
                    name, record.stage, sums.accepted_bytes, sums.unaccepted.total(), sums.tdcalls, record.ns
                )
            )  # fmt: skip
    return found


def accepted_over_time(records: Iterable[Record], end_ns: int) -> Iterator[tuple[int, int]]:
    """Virtual nanoseconds and bytes accepted by then: corners of a curve, which rises while an accept takes its time.

    A record has the time before what it tells of; its effect is whole when the next one comes. Processors that work
    side by side leave records whose times go back.
    """
    sums, last = Acceptance(RangeSet()), (0, 0)
    yield last
    for record in sorted(records, key=lambda record: record.ns):  # CPUs side by side go back in time
        point = record.ns, sums.accepted_bytes
        if point != last:
            yield point
            last = point
        sums.take(record)
    yield end_ns, sums.accepted_bytes


def _name(record: Record) -> str | None:
    match = _LINE.match(record.event.text) if isinstance(record.event, Print) else None
    return (match[1] or match[2]) if match is not None else None


def milestone_rows(found: Sequence[Milestone]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table."""
    headers = ["accepted by", "accepted", "unaccepted", "TDCALLs", "virtual time"]
    rows = [
        [
            each.name,
            f"{each.accepted_bytes >> 10} KiB",
            f"{each.unaccepted_bytes >> 10} KiB",
            str(each.tdcalls),
            f"{each.virtual_ns / 1e6:.3f} ms",
        ]
        for each in found
    ]
    return headers, rows


def milestones_json(found: Sequence[Milestone]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [asdict(each) for each in found]
