"""The unaccepted memory bitmap before the kernel runs: one bit stands for 2 MiB, counted from address 0.

Source: v9 07/14 and 08/14, arch/x86/boot/compressed/mem.c and bitmap.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PMD_SIZE, round_down, round_up

Accept = Callable[[int, int], None]
"""``accept(start, end)``: accept that range now, or stop the stage."""


def bitmap_size(descriptors: Iterable[MemoryDescriptor]) -> int | None:
    """Bytes of the bitmap that the stub allocates for a memory map; None if nothing in it is unaccepted.

    Every descriptor counts, whatever its type; one unit more is room for the kernel's guard, which looks at the
    unit behind a range.
    """
    ends = [(d.end, d.type) for d in descriptors]
    if all(kind != EfiMemoryType.EfiUnacceptedMemoryType for _, kind in ends):
        return None
    max_addr = max(end for end, _ in ends) + PMD_SIZE
    return DIV_ROUND_UP(max_addr, PMD_SIZE * BITS_PER_BYTE)


def process_unaccepted_memory(bitmap: GuestBitmap, accept: Accept, start: int, end: int) -> None:
    """Put ``[start, end)`` on record as unaccepted; accept now what the bitmap cannot describe.

    A range below 4 MiB is accepted as a whole, since it may hold no complete unit. Else the parts outside whole
    units are accepted, and the bits of the units between are set, one at least.
    """
    if end - start < 2 * PMD_SIZE:
        accept(start, end)
        return
    first, last = round_up(start, PMD_SIZE), round_down(end, PMD_SIZE)
    if start != first:
        accept(start, first)
    if end != last:
        accept(last, end)
    bitmap.set(first // PMD_SIZE, last // PMD_SIZE)


def accept_memory(bitmap: GuestBitmap, accept: Accept, start: int, end: int) -> None:
    """Accept every unaccepted unit that ``[start, end)`` touches, and clear its bit. There is no guard here."""
    for first, last in bitmap.runs(start // PMD_SIZE, DIV_ROUND_UP(end, PMD_SIZE)):
        accept(first * PMD_SIZE, last * PMD_SIZE)
        bitmap.clear(first, last)
