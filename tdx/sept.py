"""Secure EPT: the state and mapping level of every private page, exact to 4 KiB, kept as ranges.

Source: Intel TDX Module 1.5, Secure EPT entry states. A table page is not kept: a 2 MiB entry is a leaf if its
whole range has one state at level 1, free if nothing in it is mapped, and else points to a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from guest.ranges import TOP, RangeMap, RangeSet
from guest.units import PAGE_SIZE, PMD_SIZE, PUD_SIZE

LEVEL_4K, LEVEL_2M, LEVEL_1G = 0, 1, 2
LEVEL_SIZE = (PAGE_SIZE, PMD_SIZE, PUD_SIZE)
"""Bytes of a page at each level."""


class SeptState(Enum):
    """State of a Secure EPT entry."""

    FREE = "FREE"
    """No page: the host has not backed this address."""
    PENDING = "PENDING"
    """TDH.MEM.PAGE.AUG was done, the guest has not accepted."""
    MAPPED = "MAPPED"
    """Accepted, or added while the TD was built: the guest can use it."""


class SeptEntry(NamedTuple):
    """State of an address and the level of the leaf that maps it (0 if there is none)."""

    state: SeptState
    level: int


FREE = SeptEntry(SeptState.FREE, LEVEL_4K)


class SecureEpt:
    """The Secure EPT of one TD."""

    def __init__(self) -> None:
        self._entries: RangeMap[SeptEntry] = RangeMap(FREE)

    def run_at(self, gpa: int) -> tuple[int, int, SeptEntry]:
        """The maximal run ``(start, end, entry)`` of equal entries around ``gpa``."""
        return self._entries.run_at(gpa)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, SeptEntry]]:
        """The runs of equal entries in ``[start, end)``."""
        return self._entries.runs(start, end)

    def mapped(self, start: int = 0, end: int = TOP) -> RangeSet:
        """The addresses of ``[start, end)`` that the guest can use."""
        runs = self._entries.runs(start, end)
        return RangeSet((low, high) for low, high, entry in runs if entry.state is SeptState.MAPPED)

    def page_add(self, start: int, end: int) -> None:
        """FREE to MAPPED, 4 KiB pages, while the TD is built (TDH.MEM.PAGE.ADD)."""
        self._move(start, end, SeptState.FREE, SeptEntry(SeptState.MAPPED, LEVEL_4K))

    def page_aug(self, start: int, end: int, level: int) -> None:
        """FREE to PENDING, pages of ``level`` (TDH.MEM.PAGE.AUG)."""
        self._move(start, end, SeptState.FREE, SeptEntry(SeptState.PENDING, level))

    def page_demote(self, start: int, end: int) -> None:
        """PENDING 2 MiB pages to PENDING 4 KiB pages (TDH.MEM.PAGE.DEMOTE)."""
        self._move(start, end, SeptState.PENDING, SeptEntry(SeptState.PENDING, LEVEL_4K))

    def page_accept(self, start: int, end: int, level: int) -> None:
        """PENDING to MAPPED, pages of ``level`` (TDG.MEM.PAGE.ACCEPT)."""
        self._move(start, end, SeptState.PENDING, SeptEntry(SeptState.MAPPED, level))

    def _move(self, start: int, end: int, before: SeptState, after: SeptEntry) -> None:
        for low, high, entry in self._entries.runs(start, end):
            if entry.state is not before:
                raise ValueError(f"Secure EPT [{low:#x}, {high:#x}): found {entry.state.name}, expected {before.name}")
        self._entries.assign(start, end, after)
