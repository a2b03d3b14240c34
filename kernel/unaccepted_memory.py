"""The kernel's bitmap of unaccepted memory (v9 10/14 and 11/14, arch/x86/mm/unaccepted_memory.c).

One bit stands for 2 MiB, counted from physical address 0; a set bit is memory that is not accepted.

load_unaligned_zeropad() may read past the end of a page. A read of unaccepted memory is fatal and cannot be
fixed up, so both functions treat a range that ends on a 2 MiB boundary as if it were one unit longer: the
guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guest.bitmap import GuestBitmap
from guest.ranges import RangeMap
from guest.units import DIV_ROUND_UP, PMD_SIZE, round_down, round_up


class UnacceptedMemory:
    """Unaccepted memory, by the bitmap in guest memory; ``bitmap`` is None if boot_params names none.

    ``arch_accept(start, end)`` makes the platform accept a range of whole units. The bitmap is trusted, as the
    kernel trusts it: what else was written to its bytes is taken for bits.
    """

    def __init__(self, bitmap: GuestBitmap | None, arch_accept: Callable[[int, int], None]) -> None:
        self._bitmap = bitmap
        self._arch_accept = arch_accept

    def accept_memory(self, start: int, end: int) -> None:
        """Accept what is unaccepted of every unit that ``[start, end)`` and its guard touch.

        Each maximal run of set bits is accepted, then cleared, one after the other.
        """
        if self._bitmap is None:
            return
        for first, last in self._bitmap.runs(start // PMD_SIZE, DIV_ROUND_UP(_guarded(end), PMD_SIZE)):
            self._arch_accept(first * PMD_SIZE, last * PMD_SIZE)
            self._bitmap.clear(first, last)

    def range_contains_unaccepted_memory(self, start: int, end: int) -> bool:
        """True if ``[start, end)`` or its guard is unaccepted.

        The kernel steps by 2 MiB from ``start``. From a start that is no multiple of 2 MiB the last step can
        fall short of the last unit, which is then not looked at.
        """
        if self._bitmap is None or start >= _guarded(end):
            return False
        first, steps = start // PMD_SIZE, DIV_ROUND_UP(_guarded(end) - start, PMD_SIZE)
        return self._bitmap.any(first, first + steps)

    def block_runs(self, start: int, end: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """The blocks of ``size`` bytes in ``[start, end)``, as runs of equal state, ascending.

        The third value is what :meth:`range_contains_unaccepted_memory` says of each block of the run.
        ``size`` is a multiple of 2 MiB; ``start`` and ``end`` are multiples of ``size``.
        """
        states = RangeMap(False)
        if self._bitmap is not None:
            for first, last in self._bitmap.runs(start // PMD_SIZE, _guarded(end) // PMD_SIZE):
                # A block's guard is the first unit of the next one: a run that begins there makes both unaccepted.
                low = round_down((first - 1) * PMD_SIZE, size)
                states.assign(max(low, start), min(round_up(last * PMD_SIZE, size), end), True)
        return states.runs(start, end)


def _guarded(end: int) -> int:
    """``end``, with the guard if it is on a 2 MiB boundary."""
    return end + PMD_SIZE if end % PMD_SIZE == 0 else end
