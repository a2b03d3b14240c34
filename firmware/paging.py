"""The page tables that UEFI runs on: every address maps to itself (UEFI 2.10, section 2.3.4)."""

from __future__ import annotations

import struct

from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from guest.memory import GuestMemory
from guest.units import PAGE_SIZE, SZ_1G, round_up

_PRESENT_WRITABLE, _PAGE_SIZE = 3, 1 << 7
_ENTRIES = 512


def build_identity_map(memory: GuestMemory, arena: Arena) -> int:
    """Map the first 512 GiB with pages of 1 GiB; returns CR3."""
    at = arena.reserve(EfiMemoryType.EfiBootServicesData, 3 * PAGE_SIZE)
    pml4 = round_up(at, PAGE_SIZE)
    pdpt = pml4 + PAGE_SIZE
    memory.clear(pml4, pml4 + PAGE_SIZE)
    memory.write_uint(pml4, pdpt | _PRESENT_WRITABLE, 8)
    entries = (number * SZ_1G | _PAGE_SIZE | _PRESENT_WRITABLE for number in range(_ENTRIES))
    memory.write(pdpt, struct.pack(f"<{_ENTRIES}Q", *entries))
    return pml4
