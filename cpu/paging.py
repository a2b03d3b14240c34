"""Walking the guest's page tables: from a linear address to a guest physical one (SDM volume 3, 4.5)."""

from __future__ import annotations

from collections.abc import Callable

from guest.units import PAGE_SHIFT

_PRESENT, _PAGE_SIZE = 1 << 0, 1 << 7
_ADDRESS = (1 << 52) - (1 << PAGE_SHIFT)
_LEVELS = (39, 30, 21, 12)

ReadPhysical = Callable[[int, int], bytes]
"""``read(gpa, size)``."""


def translate(read: ReadPhysical, cr3: int, linear: int, mask: int = _ADDRESS) -> int | None:
    """Guest physical address of ``linear`` under 4-level paging, None if it is not mapped.

    ``mask`` has the address bits of an entry; permissions are not looked at.
    """
    found = walk(read, cr3, linear, mask)
    return None if found is None else found[0]


def walk(read: ReadPhysical, cr3: int, linear: int, mask: int = _ADDRESS) -> tuple[int, int] | None:
    """The same, with the number of bytes from there to the end of the page."""
    table = cr3 & mask
    for shift in _LEVELS:
        index = linear >> shift & 0x1FF
        entry = int.from_bytes(read(table + 8 * index, 8), "little")
        if not entry & _PRESENT:
            return None
        table = entry & mask
        if shift == PAGE_SHIFT or (entry & _PAGE_SIZE and shift < _LEVELS[0]):
            offset = linear & (1 << shift) - 1
            return (table & ~((1 << shift) - 1)) | offset, (1 << shift) - offset
    return None
