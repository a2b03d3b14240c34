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
class Allocation(Event):
    """``count`` allocations of 2^order pages succeeded out of ``wanted``; ``accepted_pages`` became accepted."""

    order: int
    count: int
    wanted: int
    accepted_pages: int
