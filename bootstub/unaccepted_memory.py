"""The unaccepted memory bitmap before the kernel runs: one bit stands for 2 MiB, counted from address 0.

Source: v9 07/14 and 08/14, arch/x86/boot/compressed/mem.c and bitmap.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PMD_SIZE, round_down, round_up

if TYPE_CHECKING:
    from bootstub.efi_call import EfiCalls

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


def split_range(accept: Accept, start: int, end: int, unit: int = PMD_SIZE) -> tuple[int, int] | None:
    """Accept what of ``[start, end)`` lies outside whole units, and return the units between, one at least.

    A range below two units is accepted as a whole, since it may hold no complete unit: then there are none.
    """
    if end - start < 2 * unit:
        accept(start, end)
        return None
    first, last = round_up(start, unit), round_down(end, unit)
    if start != first:
        accept(start, first)
    if end != last:
        accept(last, end)
    return first, last


def process_unaccepted_memory(bitmap: GuestBitmap, accept: Accept, start: int, end: int) -> None:
    """Put ``[start, end)`` on record as unaccepted; accept now what the bitmap cannot describe."""
    whole = split_range(accept, start, end)
    if whole is not None:
        bitmap.set(whole[0] // PMD_SIZE, whole[1] // PMD_SIZE)


def accept_memory(bitmap: GuestBitmap, accept: Accept, start: int, end: int) -> None:
    """Accept every unaccepted unit that ``[start, end)`` touches, and clear its bit. There is no guard here."""
    for first, last in bitmap.runs(start // PMD_SIZE, DIV_ROUND_UP(end, PMD_SIZE)):
        accept(first * PMD_SIZE, last * PMD_SIZE)
        bitmap.clear(first, last)


class BitmapOfStub:
    """The stub's side: a bitmap in pages of its own, whose address goes into boot_params (v9 07/14)."""

    def __init__(self, machine: Machine, efi: EfiCalls, boot_params: GuestRecord, accept: Accept) -> None:
        self._machine, self._efi, self._boot_params, self._accept = machine, efi, boot_params, accept

    def allocate(self, descriptors: Iterable[MemoryDescriptor]) -> None:
        """allocate_unaccepted_memory(): a cleared bitmap if memory is unaccepted, else a null pointer."""
        size = bitmap_size(descriptors)
        if size is None:
            self._boot_params["unaccepted_memory"] = 0
            return
        bitmap = self._efi.allocate_pages(size)
        self._machine.memory.clear(bitmap, bitmap + size)
        self._boot_params["unaccepted_memory"] = bitmap
        self._machine.note(f"unaccepted memory bitmap at {bitmap:#x}, {size:#x} bytes")

    def process(self, start: int, end: int) -> None:
        """process_unaccepted_memory() for one descriptor."""
        bitmap = GuestBitmap(self._machine.memory, self._boot_params["unaccepted_memory"])
        process_unaccepted_memory(bitmap, self._accept, start, end)
