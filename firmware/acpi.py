"""The ACPI tables of a minimal machine: a root pointer, and a root table with one entry that asks for nothing.

A root table without entries is refused by the kernel. The entry is what QEMU writes for Windows, the WAET table.
Sources: ACPI 6.4, sections 5.2.5 (RSDP), 5.2.6 and 5.2.8 (XSDT); Windows ACPI Emulated Devices Table.
"""

from __future__ import annotations

import struct

from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType

_RSDP_V1_SIZE = 20
_WAET_RTC_GOOD_TIMER_GOOD = 3


def build_acpi(arena: Arena) -> int:
    """Write the tables into ACPI reclaim memory; returns the address of the RSDP."""
    kind = EfiMemoryType.EfiACPIReclaimMemory
    waet = arena.put(kind, _table(b"WAET", struct.pack("<I", _WAET_RTC_GOOD_TIMER_GOOD)))
    xsdt = arena.put(kind, _table(b"XSDT", struct.pack("<Q", waet)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"UNACPT", 2, 0, 36, xsdt, 0)
    return arena.put(kind, _checksum(_checksum(rsdp, 8, _RSDP_V1_SIZE), 32, len(rsdp)))


def _table(signature: bytes, body: bytes) -> bytes:
    """A table: the header of 36 bytes, and ``body``."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), 1, 0, b"UNACPT", b"UNACCEPT", 1, b"UNAC", 1)
    return _checksum(header + body, 9, len(header) + len(body))


def _checksum(table: bytes, at: int, size: int) -> bytes:
    """``table`` with the byte at ``at`` set so that its first ``size`` bytes add up to 0 modulo 256."""
    return table[:at] + bytes([-sum(table[:size]) % 256]) + table[at + 1 :]
