"""A bitmap in guest memory, as the kernel keeps it: ``unsigned long[]``, bit 0 lowest, little endian.

The bits are the guest's own bytes, viewed through bitarray without a copy. Bits are counted from the start of
the bitmap; what a bit stands for is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

from guest.memory import AccessKind, GuestMemory, PhysicalMemory
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP


class GuestBitmap:
    """The bitmap that starts at guest physical address ``gpa``.

    It has no length of its own, as in C: an access to any bit is an access to the byte that holds it, and the
    memory's gate judges it; a look from outside has the bytes without the gate.
    """

    def __init__(self, memory: GuestMemory | PhysicalMemory, gpa: int) -> None:
        self._memory = memory
        self.gpa = gpa

    def set(self, start: int, end: int) -> None:
        """Set bits ``start <= bit < end`` (``bitmap_set``)."""
        for bits, low, high, _ in self._pieces(start, end, "write"):
            bits[low:high] = 1

    def clear(self, start: int, end: int) -> None:
        """Clear bits ``start <= bit < end`` (``bitmap_clear``)."""
        for bits, low, high, _ in self._pieces(start, end, "write"):
            bits[low:high] = 0

    def test(self, bit: int) -> bool:
        """True if ``bit`` is set (``test_bit``)."""
        return self.any(bit, bit + 1)

    def any(self, start: int, end: int) -> bool:
        """True if a bit of ``start <= bit < end`` is set."""
        return any(bits.find(1, low, high) >= 0 for bits, low, high, _ in self._pieces(start, end, "read"))

    def count(self, start: int, end: int) -> int:
        """Number of set bits in ``start <= bit < end`` (``bitmap_weight``)."""
        return sum(bits.count(1, low, high) for bits, low, high, _ in self._pieces(start, end, "read"))

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Maximal runs of set bits, clipped to ``start <= bit < end`` (``for_each_set_bitrange_from``).

        Runs are found one after the other, so the loop may clear the run that it was given.
        """
        while start < end:
            first = self._find(1, start, end)
            last = self._find(0, first, end)
            if first < last:
                yield first, last
            start = last

    def _find(self, value: int, start: int, end: int) -> int:
        """The first bit of ``value`` in ``start <= bit < end``, or ``end``."""
        for bits, low, high, base in self._pieces(start, end, "read"):
            found = bits.find(value, low, high)
            if found >= 0:
                return base + found
        return end

    def _pieces(self, start: int, end: int, kind: AccessKind) -> Iterator[tuple[bitarray, int, int, int]]:
        """``(bits, low, high, base)``: the wanted bits are ``bits[low:high]``; ``bits[0]`` is bit ``base``."""
        if not 0 <= start <= end:
            raise ValueError(f"bits {start}..{end}: expected 0 <= start <= end")
        if start == end:
            return
        first, last = start // BITS_PER_BYTE, DIV_ROUND_UP(end, BITS_PER_BYTE)
        for address, view in self._memory.views(self.gpa + first, self.gpa + last, kind):
            base = (address - self.gpa) * BITS_PER_BYTE
            bits = bitarray(buffer=view, endian="little")
            yield bits, max(start - base, 0), min(end - base, len(bits)), base
