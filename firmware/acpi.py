"""The ACPI tables of a minimal machine: a root pointer and a root table without entries.

Source: ACPI 6.4, sections 5.2.5 (RSDP) and 5.2.8 (XSDT).
"""

from __future__ import annotations

import struct

from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType

_RSDP_V1_SIZE = 20


def build_acpi(arena: Arena) -> int:
    """Write the tables into ACPI reclaim memory; returns the address of the RSDP."""
    kind = EfiMemoryType.EfiACPIReclaimMemory
    xsdt = struct.pack("<4sIBB6s8sI4sI", b"XSDT", 36, 1, 0, b"UNACPT", b"UNACCEPT", 1, b"UNAC", 1)
    xsdt_gpa = arena.put(kind, _checksum(xsdt, 9, len(xsdt)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"UNACPT", 2, 0, 36, xsdt_gpa, 0)
    return arena.put(kind, _checksum(_checksum(rsdp, 8, _RSDP_V1_SIZE), 32, len(rsdp)))


def _checksum(table: bytes, at: int, size: int) -> bytes:
    """``table`` with the byte at ``at`` set so that its first ``size`` bytes add up to 0 modulo 256."""
    return table[:at] + bytes([-sum(table[:size]) % 256]) + table[at + 1 :]
