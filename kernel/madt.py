"""ACPI's MADT: processors and IO-APICs (ACPI 6.4, section 5.2.12; arch/x86/kernel/acpi/boot.c)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from guest.units import simple_strtoull

_FIRST_ENTRY = 44
_LOCAL_APIC, _IO_APIC, _LOCAL_X2APIC = 0, 1, 9
_SIZES = {_LOCAL_APIC: 8, _IO_APIC: 12, _LOCAL_X2APIC: 16}
_ENABLED = 1
MAX_CPUS = 8192


@dataclass(frozen=True, slots=True)
class Madt:
    """APIC IDs of the processors that are there, and the number of IO-APICs."""

    apic_ids: tuple[int, ...] = (0,)
    ioapics: int = 0

    @property
    def possible_cpus(self) -> int:
        """Number of processors."""
        return len(self.apic_ids)

    def limited(self, nr_cpus: str | None) -> Madt:
        """What ``nr_cpus=`` leaves."""
        count = simple_strtoull(nr_cpus or "")[0]
        return replace(self, apic_ids=self.apic_ids[:count]) if count else self


def parse_madt(data: bytes) -> Madt:
    """Read a whole table, up to an entry that has no length or does not fit."""
    at, ioapics = _FIRST_ENTRY, 0
    apic_ids: list[int] = []
    while at + 2 <= len(data):
        kind, size = data[at], data[at + 1]
        if size < 2 or at + size > len(data):
            break
        entry = data[at : at + size]
        at += size
        if size < _SIZES.get(kind, 0):
            continue
        if kind == _IO_APIC:
            ioapics += 1
        elif kind == _LOCAL_APIC and entry[4] & _ENABLED:
            apic_ids.append(entry[3])
        elif kind == _LOCAL_X2APIC and entry[8] & _ENABLED:
            apic_ids.append(int.from_bytes(entry[4:8], "little"))
    return Madt(tuple(apic_ids[:MAX_CPUS]) or (0,), ioapics)
