"""The kernel's bitmap of unaccepted memory (v9 10/14 and 11/14, arch/x86/mm/unaccepted_memory.c).

One bit stands for 2 MiB, counted from physical address 0; a set bit is memory that is not accepted.

load_unaligned_zeropad() may read past the end of a page. A read of unaccepted memory is fatal and cannot be
fixed up, so both functions treat a range that ends on a 2 MiB boundary as if it were one unit longer: the
guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from guest.bitmap import GuestBitmap
from guest.ranges import Range, RangeMap
from guest.units import DIV_ROUND_UP, PAGE_SIZE, PMD_SIZE, round_down, round_up


class Exclusion(Protocol):
    """What two CPUs that accept memory at the same time do about each other."""

    def accepting(self, first: int, last: int) -> AbstractContextManager[None]:
        """Inside, the units ``first <= unit < last`` are this CPU's to accept."""
        ...

    def accepted(self) -> None:
        """The platform has accepted a run of them, and time has passed; their bits are still set."""
        ...


class UnacceptedMemory:
    """Unaccepted memory, by the bitmap in guest memory; ``bitmap`` is None if the boot stub left none.

    ``arch_accept(start, end)`` makes the platform accept a range of whole units. The bitmap is trusted, as the
    kernel trusts it: what else was written to its bytes is taken for bits.

    v9 counts bits from physical address 0, and knows no end of the bitmap. Mainline counts from ``phys_base``, and
    keeps to the ``size`` bytes of memory that the bitmap describes, ``unit_size`` bytes a bit
    (drivers/firmware/efi/unaccepted_memory.c). Without ``guard`` neither has the guard.
    """

    def __init__(
        self, bitmap: GuestBitmap | None, arch_accept: Callable[[int, int], None], phys_base: int = 0,
        size: int | None = None, unit_size: int = PMD_SIZE, guard: bool = True,
    ) -> None:  # fmt: skip
        self._bitmap = bitmap
        self.arch_accept = arch_accept
        self._phys_base = phys_base
        self._size = size
        self._unit = unit_size
        self._guard = guard
        self.exclusion: Exclusion | None = None
        """How CPUs keep out of each other's way, once there is more than one."""

    def accept_memory(self, start: int, end: int) -> None:
        """Accept what is unaccepted of every unit that ``[start, end)`` and its guard touch.

        Each maximal run of set bits is accepted, then cleared, one after the other.
        """
        if self._bitmap is None or end < self._phys_base:
            return
        start, end = self._in_bitmap(start, end)
        first, last = start // self._unit, DIV_ROUND_UP(end, self._unit)
        if self.exclusion is None:
            self._accept_units(self._bitmap, first, last)
            return
        with self.exclusion.accepting(first, last):
            self._accept_units(self._bitmap, first, last)

    def _accept_units(self, bitmap: GuestBitmap, first: int, last: int) -> None:
        for low, high in bitmap.runs(first, last):
            self.arch_accept(self._phys_base + low * self._unit, self._phys_base + high * self._unit)
            if self.exclusion is not None:
                self.exclusion.accepted()
            bitmap.clear(low, high)

    def range_contains_unaccepted_memory(self, start: int, end: int) -> bool:
        """True if ``[start, end)`` or its guard is unaccepted.

        The kernel steps by a unit from ``start``. From a start that is no multiple of it the last step can
        fall short of the last unit, which is then not looked at.
        """
        if self._bitmap is None or end < self._phys_base:
            return False
        start, end = self._in_bitmap(start, end)
        if start >= end:
            return False
        first, steps = start // self._unit, DIV_ROUND_UP(end - start, self._unit)
        return self._bitmap.any(first, first + steps)

    def _in_bitmap(self, start: int, end: int) -> tuple[int, int]:
        """The range as offsets from ``phys_base``, with its guard, cut to what the bitmap describes."""
        start, end = max(start, self._phys_base) - self._phys_base, self._guarded(end - self._phys_base)
        return start, end if self._size is None else min(end, self._size)

    def block_runs(self, start: int, end: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """The blocks of ``size`` bytes in ``[start, end)``, as runs of equal state, ascending.

        The third value is what :meth:`range_contains_unaccepted_memory` says of each block of the run.
        ``size`` is a multiple of the unit; ``start`` and ``end`` are multiples of ``size``.
        """
        states = RangeMap(False)
        if self._bitmap is not None and end >= self._phys_base:
            low, high = self._in_bitmap(start, end)
            for first, last in self._bitmap.runs(low // self._unit, DIV_ROUND_UP(max(low, high), self._unit)):
                # A block's guard is the first unit of the next one: a run that begins there makes both unaccepted.
                run_start = round_down(self._phys_base + (first - self._guard) * self._unit, size)
                run_end = round_up(self._phys_base + last * self._unit, size)
                states.assign(max(run_start, start), min(run_end, end), True)
        return states.runs(start, end)

    def unaccepted_pages(self, start: int, end: int) -> Iterator[Range]:
        """The pages of ``[start, end)`` that :meth:`range_contains_unaccepted_memory` says of, one by one, ascending.

        The last page before an unaccepted unit is one too: the unit is its guard (pfn_is_unaccepted_memory()).
        """
        if self._bitmap is None or end < self._phys_base:
            return
        low, high = self._in_bitmap(start, end)
        for first, last in self._bitmap.runs(low // self._unit, DIV_ROUND_UP(max(low, high), self._unit)):
            from_gpa = self._phys_base + first * self._unit - PAGE_SIZE * self._guard
            found = Range(max(from_gpa, start), min(self._phys_base + last * self._unit, end))
            if found.start < found.end:
                yield found

    def _guarded(self, end: int) -> int:
        """``end``, with the guard if it is on a border of two units, unless a test left the guard out."""
        return end + self._unit if self._guard and end % self._unit == 0 else end
