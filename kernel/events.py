"""What the kernel puts into the trace beside its log."""

from __future__ import annotations

from dataclasses import dataclass

from guest.trace import Event


@dataclass(frozen=True, slots=True)
class FileRead(Event):
    """A read of a file in /proc: its whole text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class FileWrite(Event):
    """A write to a file in /sys; ``result`` is the number of characters taken or a negative errno."""

    path: str
    text: str
    result: int


@dataclass(frozen=True, slots=True)
class MemoryRead(Event):
    """A reader went through ``ranges`` ranges: bytes that it touched, and bytes that it gave zeros for."""

    reader: str
    ranges: int
    touched: int
    zeros: int


@dataclass(frozen=True, slots=True)
class CommandResult(Event):
    """What the kernel answered to a command: 0 or a negative errno, and why if it says so."""

    command: str
    result: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MemoryAdded(Event):
    """The host added RAM and the kernel took it over; ``accepted`` if its driver accepted it before."""

    start: int
    end: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class ParallelAllocation(Event):
    """``cpus`` allocated side by side: blocks in all, as of :class:`Allocation`, and how long that took."""

    cpus: str
    order: int
    count: int
    wanted: int
    accepted_pages: int
    ns: int


@dataclass(frozen=True, slots=True)
class Allocation(Event):
    """``count`` allocations of 2^order pages succeeded out of ``wanted``; ``accepted_pages`` became accepted."""

    order: int
    count: int
    wanted: int
    accepted_pages: int
