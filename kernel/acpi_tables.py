"""Finding ACPI's tables in guest memory and keeping their memory.

Only headers are read, and what is read is bounded: a table that does not follow its layout is left out, as the kernel
leaves it out. Checksums are not looked at: the kernel does so only if told to (``acpi_force_table_verification``).

Sources: drivers/acpi/acpica/{tbxfroot,tbutils,tbfadt}.c; drivers/acpi/tables.c, acpi_reserve_initial_tables().
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from guest.machine import Machine
from guest.units import PHYSICAL_ADDRESS_END, SZ_1M, SZ_64K

HEADER_SIZE = 36
MAX_TABLE_SIZE = SZ_64K << 4
"""1 MiB: longer tables are not believed."""
MAX_TABLES = 128
_BIOS_START = 0xE0000
_RSDP_SIZE = 36
_SIGNATURE = b"RSD PTR "


@dataclass(frozen=True, slots=True)
class AcpiTable:
    """A table: signature, address and bytes, header and all."""

    signature: str
    gpa: int
    size: int


def find_rsdp(machine: Machine, known: int) -> int:
    """Address of the RSDP: ``known`` if the boot loader or EFI told, else by looking for it below 1 MiB; 0: none."""
    if known:
        return known
    data = machine.memory.read(_BIOS_START, SZ_1M - _BIOS_START)
    found = next((at for at in range(0, len(data), 16) if data[at : at + 8] == _SIGNATURE), None)
    return 0 if found is None else _BIOS_START + found


def walk_tables(machine: Machine, rsdp: int) -> Iterator[AcpiTable]:
    """The tables that the RSDP at ``rsdp`` leads to, in the order of XSDT or RSDT; FADT's DSDT and FACS follow it."""
    if not rsdp:
        return
    data = machine.memory.read(rsdp, _RSDP_SIZE)
    if data[:8] != _SIGNATURE:
        return
    (rsdt,), (xsdt,) = struct.unpack_from("<I", data, 16), struct.unpack_from("<Q", data, 24)
    root, width = (xsdt, 8) if data[15] >= 2 and xsdt else (rsdt, 4)
    table = _table_at(machine, root)
    if table is None:
        return
    body = machine.memory.read(root + HEADER_SIZE, table.size - HEADER_SIZE)[: MAX_TABLES * width]
    for at in range(0, len(body) - width + 1, width):
        found = _table_at(machine, int.from_bytes(body[at : at + width], "little"))
        if found is not None:
            yield found
            if found.signature == "FACP":
                yield from _of_fadt(machine, found)


def read_table(machine: Machine, table: AcpiTable) -> bytes:
    """All bytes of a table."""
    return machine.memory.read(table.gpa, table.size)


def _of_fadt(machine: Machine, fadt: AcpiTable) -> Iterator[AcpiTable]:
    """DSDT and FACS; 64-bit addresses go before those of 32 bits."""
    data = read_table(machine, fadt).ljust(148, b"\0")
    facs, dsdt = struct.unpack_from("<II", data, 36)
    wide_facs, wide_dsdt = struct.unpack_from("<QQ", data, 132)
    for address in (wide_dsdt or dsdt, wide_facs or facs):
        table = _table_at(machine, address, 8 if address == (wide_facs or facs) else HEADER_SIZE)
        if table is not None:
            yield table


def _table_at(machine: Machine, gpa: int, least: int = HEADER_SIZE) -> AcpiTable | None:
    if not 0 < gpa < PHYSICAL_ADDRESS_END - MAX_TABLE_SIZE:
        return None
    data = machine.memory.read(gpa, 8)
    size = int.from_bytes(data[4:], "little")
    signature = data[:4].decode("ascii", errors="replace")
    return AcpiTable(signature, gpa, size) if least <= size <= MAX_TABLE_SIZE else None
