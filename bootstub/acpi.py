"""What the decompressor looks up in ACPI's tables: the RSDP, and memory that can not be unplugged.

Sources: arch/x86/boot/compressed/acpi.c, get_rsdp_addr() and count_immovable_mem_regions(); efi.c; ACPI 6.4, sections
5.2.5 (RSDP) and 5.2.16 (SRAT).
"""

from __future__ import annotations

import re
import struct
from uuid import UUID

from bootstub.cmdline import find_option
from bootstub.setup_data import SETUP_DATA, SetupDataType, walk_setup_data
from bootstub.slots import MemVector
from firmware.efi_types import ACPI_20_TABLE_GUID, ACPI_TABLE_GUID, guid_bytes
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES
from guest.machine import Machine
from guest.memory import GuestMemory
from guest.records import GuestRecord
from guest.units import PHYSICAL_ADDRESS_END, SZ_1M

EL32, EL64 = 0x3233_4C45, 0x3436_4C45
"""efi_loader_signature: an EFI of 32 or 64 bits started the loader."""

_RSDP, _RSDP_SIZE, _RSDP_V1_SIZE = b"RSD PTR ", 36, 20
_EBDA_POINTER, _EBDA_WINDOW, _EBDA_MIN = 0x40E, 1024, 0x400
_BIOS_WINDOW, _BIOS_WINDOW_SIZE, _SCAN_STEP = 0xE0000, 0x20000, 16
_HEADER, _SRAT_HEADER_SIZE = struct.Struct("<4sI28x"), 48
_MAX_TABLE = SZ_1M
_EFI_SETUP_DATA_TABLES = 16
"""Offset of ``tables`` in struct efi_setup_data."""
_SRAT_MEMORY, _HOT_PLUGGABLE = 1, 1 << 1
_MEMORY_AFFINITY = struct.Struct("<BBIHQQII8x")
MAX_IMMOVABLE = 2 << 6
"""MAX_NUMNODES * 2, with CONFIG_NODES_SHIFT 6 as distributions have it."""


def efi_configuration_table(memory: GuestMemory, params: GuestRecord, guid: UUID) -> int | None:
    """Address of the configuration table ``guid``; None without it, or without an EFI.

    After kexec the tables are where setup_data of type SETUP_EFI says. Source: efi.c, efi_get_conf_table().
    """
    system_table = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    if params["efi_info.efi_loader_signature"] != EL64 or not system_table:
        return None
    record, size = GuestRecord(memory, system_table, EFI_SYSTEM_TABLE), EFI_CONFIGURATION_TABLE.sizeof()
    tables = _kexec_tables(memory, params) or record["ConfigurationTable"]
    data = memory.read(tables, min(record["NumberOfTableEntries"], MAX_CONFIGURATION_TABLES) * size)
    for at in range(0, len(data), size):
        if data[at : at + 16] == guid_bytes(guid):
            return int.from_bytes(data[at + 16 : at + size], "little")
    return None


def get_rsdp_addr(machine: Machine, params: GuestRecord) -> int:
    """The RSDP that boot_params, EFI or the BIOS's memory has; 0 if there is none."""
    if params["acpi_rsdp_addr"]:
        return params["acpi_rsdp_addr"]
    signature = params["efi_info.efi_loader_signature"]
    if signature in (EL32, EL64) and not params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]:
        raise machine.panic("EFI support advertised, but unable to locate system table.")
    for guid in (ACPI_20_TABLE_GUID, ACPI_TABLE_GUID):
        rsdp = efi_configuration_table(machine.memory, params, guid)
        if rsdp:
            return rsdp
    return _bios_get_rsdp_addr(machine.memory)


def immovable_mem(memory: GuestMemory, params: GuestRecord, line: bytes) -> list[MemVector]:
    """Memory that the SRAT does not call hot-pluggable; none, if there are more ranges than nodes can have."""
    if find_option(line, b"acpi") == b"off":
        return []
    regions = _immovable(_srat(memory, params, line))
    return regions if len(regions) < MAX_IMMOVABLE else []


def _kexec_tables(memory: GuestMemory, params: GuestRecord) -> int:
    for node in walk_setup_data(memory.read, params["hdr.setup_data"]):
        if node.type == SetupDataType.SETUP_EFI:
            return memory.read_uint(node.gpa + SETUP_DATA.sizeof() + _EFI_SETUP_DATA_TABLES, 8)
    return 0


def _bios_get_rsdp_addr(memory: GuestMemory) -> int:
    """bios_get_rsdp_addr(): in the first KiB of the EBDA, then from 0xE0000 to 1 MiB, on borders of 16 bytes."""
    ebda = memory.read_uint(_EBDA_POINTER, 2) << 4
    windows = [(ebda, _EBDA_WINDOW)] if ebda > _EBDA_MIN else []
    for start, size in [*windows, (_BIOS_WINDOW, _BIOS_WINDOW_SIZE)]:
        data = memory.read(start, size)
        for found in re.finditer(_RSDP, data):
            at = found.start()
            if at % _SCAN_STEP == 0 and _valid(data[at : at + _RSDP_SIZE]):
                return start + at
    return 0


def _valid(rsdp: bytes) -> bool:
    """Both checksums of an RSDP of revision 2, the first of an older one."""
    return not sum(rsdp[:_RSDP_V1_SIZE]) % 256 and (rsdp[15] < 2 or not sum(rsdp) % 256)


def _srat(memory: GuestMemory, params: GuestRecord, line: bytes) -> bytes:
    """get_acpi_srat_table(): the table, found through XSDT or RSDT; empty without one."""
    rsdp_at = _given_rsdp(line) or params["acpi_rsdp_addr"]
    if not rsdp_at:
        return b""
    rsdp = memory.read(rsdp_at, _RSDP_SIZE)
    revision, rsdt, xsdt = rsdp[15], *struct.unpack_from("<I4xQ", rsdp, 16)
    use_xsdt = find_option(line, b"acpi") != b"rsdt" and xsdt and revision > 1
    root, size = (xsdt, 8) if use_xsdt else (rsdt, 4)
    table = _table(memory, root) if root else b""
    for at in range(_HEADER.size, len(table) - size + 1, size):
        address = int.from_bytes(table[at : at + size], "little")
        if address and memory.read(address, 4) == b"SRAT":
            return _table(memory, address)
    return b""


def _given_rsdp(line: bytes) -> int:
    """``acpi_rsdp=``, hexadecimal digits up to a length that 64 bits have."""
    text = (find_option(line, b"acpi_rsdp") or b"").decode("latin-1")
    try:
        address = int(text, 16) if 0 < len(text) < 19 and "_" not in text else 0
    except ValueError:
        return 0
    return address if 0 <= address < PHYSICAL_ADDRESS_END else 0


def _table(memory: GuestMemory, at: int) -> bytes:
    """A table as long as it says, but no longer than any is."""
    _, length = _HEADER.unpack(memory.read(at, _HEADER.size))
    return memory.read(at, min(length, _MAX_TABLE))


def _immovable(srat: bytes) -> list[MemVector]:
    """The memory affinity structures of an SRAT whose memory stays; none at all if a structure has no length."""
    at, found = _SRAT_HEADER_SIZE, []
    while at + 2 < len(srat):
        if not srat[at + 1]:
            return []
        if srat[at] == _SRAT_MEMORY and at + _MEMORY_AFFINITY.size <= len(srat):
            _, _, _, _, start, size, _, flags = _MEMORY_AFFINITY.unpack_from(srat, at)
            if size and not flags & _HOT_PLUGGABLE:
                found.append(MemVector(start, size))
        at += srat[at + 1]
    return found
