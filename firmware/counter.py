"""The monotonic counter, which boot and runtime services share (UEFI 2.10, sections 7.5.4 and 8.5.2)."""

from __future__ import annotations

from guest.units import U32_MAX


class MonotonicCounter:
    """64 bits: the high 32 are non-volatile, and grow at each start of the machine; here this is the first."""

    def __init__(self) -> None:
        self._value = 1 << 32

    def next(self) -> int:
        """The next number."""
        self._value += 1
        return self._value

    def next_high(self) -> int:
        """The next number of the high 32 bits; the low ones begin again."""
        self._value = ((self._value >> 32) + 1 & U32_MAX) << 32
        return self._value >> 32
