"""Guest physical memory: the bytes, and the gate that every access of a stage passes.

``PhysicalMemory`` is the bytes alone. The host and the TDX module own it; tools look at it. A stage gets a
``GuestMemory``, which asks the platform before each access.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from guest.trace import Trace
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1G, round_down, round_up

WINDOW_SIZE = SZ_1G
_LINUX = sys.platform == "linux"
_MAP_NORESERVE = 0x4000 if _LINUX else 0  # include/uapi/asm-generic/mman.h; not named by Python 3.11

AccessKind = Literal["read", "write"]


class PhysicalMemory:
    """52 bits of sparse memory. What was never written reads as zero and costs nothing.

    The backing is one private anonymous mapping for each GiB that was written to, reserved lazily, so that a
    bitarray or a CPU emulator can work on the same bytes without a copy.
    """

    def __init__(self) -> None:
        self._windows: dict[int, mmap.mmap] = {}
        self.on_write: Callable[[int, int], None] | None = None
        """Called with start and end before bytes change, whoever changes them: for a journal of writes."""

    def read(self, gpa: int, size: int) -> bytes:
        """The ``size`` bytes at ``gpa``."""
        offset = gpa % WINDOW_SIZE
        window = self._windows.get(gpa // WINDOW_SIZE)
        if window is not None and offset + size <= WINDOW_SIZE:
            return window[offset : offset + size]
        return b"".join(self._read_piece(start, end) for start, end in self.pieces(gpa, gpa + size))

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Store ``data`` at ``gpa``."""
        if self.on_write is not None:
            self.on_write(gpa, gpa + len(data))
        at = 0
        for start, end in self.pieces(gpa, gpa + len(data)):
            self._window(start)[start % WINDOW_SIZE : (end - 1) % WINDOW_SIZE + 1] = data[at : at + end - start]
            at += end - start

    def view(self, gpa: int, size: int) -> memoryview:
        """The bytes themselves, writable. The range must not cross a window; see :meth:`pieces`."""
        offset = gpa % WINDOW_SIZE
        if offset + size > WINDOW_SIZE or not 0 <= gpa < PHYSICAL_ADDRESS_END:
            raise ValueError(
                f"view of {size:#x} bytes at {gpa:#x}: expected a range inside one window of 1 GiB, below 2^52"
            )
        return memoryview(self._window(gpa))[offset : offset + size]

    def views(self, start: int, end: int, kind: AccessKind = "read") -> Iterator[tuple[int, memoryview]]:
        """The bytes of ``[start, end)`` themselves, as ``(address, bytes)`` pieces; to change them ask for "write"."""
        if self.on_write is not None and kind == "write":
            self.on_write(start, end)
        if 0 <= start < end <= PHYSICAL_ADDRESS_END and start // WINDOW_SIZE == (end - 1) // WINDOW_SIZE:
            return iter(((start, self.view(start, end - start)),))
        return ((low, self.view(low, high - low)) for low, high in self.pieces(start, end))

    def clear(self, start: int, end: int) -> None:
        """Make ``[start, end)`` read as zero; whole pages are given back, not written."""
        if self.on_write is not None:
            self.on_write(start, end)
        index = start // WINDOW_SIZE
        if index not in self._windows and 0 <= start < end <= min((index + 1) * WINDOW_SIZE, PHYSICAL_ADDRESS_END):
            return
        for low, high in self.pieces(start, end):
            window = self._windows.get(low // WINDOW_SIZE)
            if window is not None:
                self._clear_piece(window, low % WINDOW_SIZE, (high - 1) % WINDOW_SIZE + 1)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """``[start, end)`` cut where one mapping ends and the next begins."""
        if not 0 <= start <= end <= PHYSICAL_ADDRESS_END:
            raise ValueError(f"[{start:#x}, {end:#x}): expected a range below 2^52")
        while start < end:
            stop = min(end, round_down(start, WINDOW_SIZE) + WINDOW_SIZE)
            yield start, stop
            start = stop

    def _window(self, gpa: int) -> mmap.mmap:
        index = gpa // WINDOW_SIZE
        window = self._windows.get(index)
        if window is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            window = self._windows[index] = mmap.mmap(-1, WINDOW_SIZE, flags=flags)
        return window

    def _read_piece(self, start: int, end: int) -> bytes:
        window = self._windows.get(start // WINDOW_SIZE)
        if window is None:
            return bytes(end - start)
        return window[start % WINDOW_SIZE : (end - 1) % WINDOW_SIZE + 1]

    @staticmethod
    def _clear_piece(window: mmap.mmap, start: int, end: int) -> None:
        first, last = round_up(start, PAGE_SIZE), round_down(end, PAGE_SIZE)
        if not _LINUX or first >= last:
            window[start:end] = bytes(end - start)
            return
        window[start:first] = bytes(first - start)
        window.madvise(mmap.MADV_DONTNEED, first, last - first)
        window[last:end] = bytes(end - last)


class Gate(Protocol):
    """Whoever decides which guest physical addresses can be accessed."""

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """Return the accessible run ``(start, end)`` around the access, or raise ``MemoryFault``."""
        ...


class GuestMemory:
    """Memory as the guest's CPU sees it: every access is admitted by the platform first.

    The last admitted run is remembered, as a TLB remembers a translation; whoever takes access away must call
    :meth:`flush`. ``writes`` holds ``(event number, start, end)`` for every write, in order: with the trace it
    tells who wrote a byte.
    """

    def __init__(self, physical: PhysicalMemory, gate: Gate, trace: Trace) -> None:
        self._physical = physical
        self._gate = gate
        self._trace = trace
        self._low = self._high = 0
        self.writes: list[tuple[int, int, int]] = []

    def flush(self) -> None:
        """Forget which run was admitted last."""
        self._low = self._high = 0

    def read(self, gpa: int, size: int) -> bytes:
        """The ``size`` bytes at ``gpa``. Raises ``MemoryFault``."""
        self._admit(gpa, size, "read")
        return self._physical.read(gpa, size)

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Store ``data`` at ``gpa``. Raises ``MemoryFault``; then nothing was stored."""
        self._admit(gpa, len(data), "write")
        self.writes.append((self._trace.count, gpa, gpa + len(data)))
        self._physical.write(gpa, data)

    def clear(self, start: int, end: int) -> None:
        """Store zeros in ``[start, end)``. Raises ``MemoryFault``; then nothing was stored."""
        self._admit(start, end - start, "write")
        self.writes.append((self._trace.count, start, end))
        self._physical.clear(start, end)

    def touch(self, start: int, end: int) -> None:
        """Read ``[start, end)`` page by page without a look at the bytes. Raises ``MemoryFault``."""
        while start < end:
            self._admit(start, min(PAGE_SIZE, end - start), "read")
            start = max(self._high, start + PAGE_SIZE)

    def read_uint(self, gpa: int, size: int) -> int:
        """The unsigned little-endian integer of ``size`` bytes at ``gpa``."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_uint(self, gpa: int, value: int, size: int) -> None:
        """Store ``value`` as an unsigned little-endian integer of ``size`` bytes at ``gpa``."""
        self.write(gpa, value.to_bytes(size, "little"))

    def views(self, start: int, end: int, kind: AccessKind) -> Iterator[tuple[int, memoryview]]:
        """The bytes of ``[start, end)`` themselves, as ``(address, bytes)`` pieces, admitted for ``kind``."""
        self._admit(start, end - start, kind)
        if kind == "write":
            self.writes.append((self._trace.count, start, end))
        return self._physical.views(start, end, kind)

    def _admit(self, gpa: int, size: int, kind: AccessKind) -> None:
        if not self._low <= gpa <= gpa + size <= self._high:
            self._low, self._high = self._gate.admit(gpa, size, kind)
