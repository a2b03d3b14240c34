"""What the kernel wants of ACPI here: how many CPUs there are.

Source: ACPI 6.4, sections 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.12 (MADT: type 0 local APIC, type 9 local x2APIC).
"""

from __future__ import annotations

from guest.memory import GuestMemory
from guest.units import SZ_64K

_HEADER_SIZE, _LENGTH_AT = 36, 4
_XSDT_AT = 24
_MADT_ENTRIES_AT = 44
_FLAGS_AT = {0: 4, 9: 8}
"""Where the flags of a processor stand in its entry, by type."""
_ENABLED = 1
_MAX_TABLE = SZ_64K


def nr_cpus(memory: GuestMemory, rsdp: int) -> int:
    """Enabled processors of the MADT; 1 if there is no MADT or ``rsdp`` is 0."""
    if rsdp == 0 or memory.read(rsdp, 8) != b"RSD PTR ":
        return 1
    xsdt = _table(memory, memory.read_uint(rsdp + _XSDT_AT, 8))
    for at in range(_HEADER_SIZE, len(xsdt) - 7, 8):
        table = _table(memory, int.from_bytes(xsdt[at : at + 8], "little"))
        if table[:4] == b"APIC":
            return max(_enabled(table), 1)
    return 1


def _table(memory: GuestMemory, gpa: int) -> bytes:
    """The table at ``gpa``; what claims to be larger than 64 KiB is taken for empty."""
    length = memory.read_uint(gpa + _LENGTH_AT, 4)
    return memory.read(gpa, length) if length <= _MAX_TABLE else b""


def _enabled(madt: bytes) -> int:
    count, at = 0, _MADT_ENTRIES_AT
    while at + 2 <= len(madt) and madt[at + 1] >= 2:
        flags_at = _FLAGS_AT.get(madt[at])
        if flags_at is not None and flags_at < madt[at + 1] and at + flags_at < len(madt):
            count += madt[at + flags_at] & _ENABLED
        at += madt[at + 1]
    return count
