"""fake_unaccepted_start=: memory from there on looks unaccepted to the page allocator (v9 03/14).

Only the page allocator is fooled, not memblock. The answer never changes: it stays true after the accept, which does
nothing where memory is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator

from guest.ranges import RangeMap
from guest.units import round_up
from kernel.kernel import Kernel
from kernel.unaccepted_memory import UnacceptedMemory


def page_unaccepted_memory(kernel: Kernel) -> UnacceptedMemory:
    """What the page allocator asks: the kernel's record, or a fake before it. Mainline does not know the parameter."""
    start = kernel.early.fake_unaccepted_start
    if start is None or kernel.mainline:
        return kernel.unaccepted
    return FakeUnacceptedMemory(kernel.unaccepted, start)


class FakeUnacceptedMemory(UnacceptedMemory):
    """``page_contains_unaccepted()`` over the real record: a block that starts at ``start`` or above is unaccepted."""

    def __init__(self, real: UnacceptedMemory, start: int) -> None:
        super().__init__(None, real.accept_memory)
        self._real, self._start = real, start

    def accept_memory(self, start: int, end: int) -> None:
        """Accept what really is unaccepted."""
        self._real.accept_memory(start, end)

    def range_contains_unaccepted_memory(self, start: int, end: int) -> bool:
        """True for a block from the fake start on, and where it is true."""
        return start >= self._start or self._real.range_contains_unaccepted_memory(start, end)

    def block_runs(self, start: int, end: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """The same for blocks of ``size`` bytes, in runs."""
        states = RangeMap(False)
        for low, high, unaccepted in self._real.block_runs(start, end, size):
            states.assign(low, high, unaccepted)
        first_fake = round_up(self._start, size)
        states.assign(min(max(first_fake, start), end), end, True)
        return states.runs(start, end)
