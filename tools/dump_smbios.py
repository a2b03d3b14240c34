"""What ``unaccepted dump smbios`` shows: the firmware's SMBIOS structures, or those of a file.

A file is what ``dmidecode --dump-bin`` writes, or the kernel's /sys/firmware/dmi/tables/DMI, structures alone.
Source: DMTF DSP0134 3.0, sections 5.2 (entry points) and 6.1 (structures).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from firmware.efi_types import SMBIOS3_TABLE_GUID
from firmware.tables import EFI_SYSTEM_TABLE
from guest.errors import FormatError
from guest.units import SZ_1K, SZ_1M, SZ_16M, size_text
from tools.files import read_file
from tools.handover import configuration_table
from tools.maps.td import PREFIX, td_boot

_SOURCE = "DMTF DSP0134 3.0"
_HEADER = struct.Struct("<BBH")
_ENTRY_POINT_3 = struct.Struct("<5sBBBBBBBIQ")
_ENTRY_POINT_2_SIZE = 31
_DUMP_TABLE_AT = 0x20
"""Where dmidecode puts the structures behind the entry point, and says so in it."""
_MAX_STRUCTURES = 1 << 16
"""A handle has 16 bits."""
_END_OF_TABLE = 127
_MEMORY_DEVICE, _MEMORY_ARRAY_MAPPED = 17, 19
_UNKNOWN_SIZE, _EXTENDED_SIZE, _EXTENDED_ADDRESS = 0xFFFF, 0x7FFF, 0xFFFF_FFFF
_NAMES = {
    0: "BIOS Information", 1: "System Information", 2: "Baseboard Information", 3: "System Enclosure",
    4: "Processor Information", 7: "Cache Information", 8: "Port Connector", 9: "System Slots", 11: "OEM Strings",
    16: "Physical Memory Array", 17: "Memory Device", 19: "Memory Array Mapped Address", 20: "Memory Device Mapped",
    32: "System Boot Information", 41: "Onboard Devices", _END_OF_TABLE: "End Of Table",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Structure:
    """A structure: its address (in a file, its offset), type and handle, its fields with the header, its strings."""

    at: int
    type: int
    handle: int
    fields: bytes
    strings: tuple[str, ...]

    @property
    def name(self) -> str:
        return _NAMES.get(self.type, f"type {self.type}")


@dataclass(frozen=True, slots=True)
class Smbios:
    """The entry point's bytes, none of structures alone; where the structures are, their bytes, and each of them."""

    entry_point: bytes
    at: int
    table: bytes
    structures: tuple[Structure, ...]


def read(source: str) -> Smbios:
    """The structures of a file, or of ``td:MEMORY[,MACHINE][,OPTION=VALUE]...``.

    Raises ``FormatError`` and ``OSError``.
    """
    return _of_td(source) if source.startswith(PREFIX) else of_file(read_file(source))


def of_file(data: bytes) -> Smbios:
    """The structures of a file. Raises ``FormatError``."""
    if len(data) > SZ_16M:
        raise FormatError("SMBIOS", found=f"{len(data)} bytes", expected="at most 16 MiB", source=_SOURCE)
    if data.startswith((b"_SM3_", b"_SM_")):
        point = data[: _ENTRY_POINT_3.size if data.startswith(b"_SM3_") else _ENTRY_POINT_2_SIZE]
        return _smbios(point, _DUMP_TABLE_AT, data[_DUMP_TABLE_AT:])
    return _smbios(b"", 0, data)


def text(found: Smbios) -> Iterator[str]:
    """A line for the entry point, and one for each structure, with its strings and what it says of memory."""
    if found.entry_point:
        state = "checksum ok" if sum(found.entry_point) % 256 == 0 else "checksum WRONG"
        yield f"SMBIOS {_version(found.entry_point)}, {len(found.table)} bytes of structures at {found.at:#x}, {state}"
    for each in found.structures:
        details = [*_memory(each), *(f"{string!r}" for string in each.strings)]
        tail = f": {', '.join(details)}" if details else ""
        yield f"{each.at:#x} {each.name}, handle {each.handle:#06x}, {len(each.fields)} bytes{tail}"


def to_json(found: Smbios) -> dict[str, object]:
    """The structures for programs; addresses are text, since JSON readers lose low bits."""
    rows = [
        {"at": f"{each.at:#x}", "type": each.type, "name": each.name, "handle": each.handle,
         "fields": each.fields.hex(), "strings": list(each.strings), "memory": list(_memory(each))}
        for each in found.structures
    ]  # fmt: skip
    version = _version(found.entry_point) if found.entry_point else None
    return {"version": version, "at": f"{found.at:#x}", "size": len(found.table), "structures": rows}


def dump_file(found: Smbios) -> bytes:
    """A file that ``dmidecode --from-dump`` reads: the entry point with the structures' new place, and these."""
    if not found.entry_point.startswith(b"_SM3_"):
        raise FormatError("--save", found="no entry point of SMBIOS 3.0", expected="one", source=_SOURCE)
    point = bytearray(found.entry_point)
    point[16:24] = _DUMP_TABLE_AT.to_bytes(8, "little")
    point[5] = (point[5] - sum(point)) % 256
    return bytes(point).ljust(_DUMP_TABLE_AT, b"\0") + found.table


def save(found: Smbios, path: Path) -> None:
    """Write :func:`dump_file`."""
    path.write_bytes(dump_file(found))


def _of_td(source: str) -> Smbios:
    boot = td_boot(source)
    boot.run("firmware")
    get, at = boot.physical.read, None
    if boot.system_table_gpa:
        system_table = get(boot.system_table_gpa, EFI_SYSTEM_TABLE.sizeof())
        at = configuration_table(boot.physical, system_table, SMBIOS3_TABLE_GUID)
    if not at:
        raise FormatError(source, found="no SMBIOS table", expected="one of a firmware with UEFI", source=_SOURCE)
    point = get(at, _ENTRY_POINT_3.size)
    size, table = _ENTRY_POINT_3.unpack(point)[-2:]
    return _smbios(point, table, get(table, size))


def _smbios(entry_point: bytes, at: int, data: bytes) -> Smbios:
    structures = tuple(_structures(data, at))
    last = structures[-1]
    return Smbios(entry_point, at, data[: _end(data, last.at - at + len(last.fields))], structures)


def _structures(data: bytes, base: int) -> Iterator[Structure]:
    """The structures up to the one that ends them, or to the end of the bytes."""
    start = 0
    for _ in range(_MAX_STRUCTURES):
        kind, length, handle = _HEADER.unpack(data[start : start + 4].ljust(4, b"\0"))
        end = _end(data, start + length)
        if length < _HEADER.size or end < 0:
            raise FormatError(
                "SMBIOS structure", at=base + start, found=f"length {length} with {len(data) - start} bytes left",
                expected="4 or more, strings, and two NULs", source=_SOURCE,
            )  # fmt: skip
        strings = data[start + length : end].rstrip(b"\0").split(b"\0")
        texts = tuple(string.decode("utf-8", "replace") for string in strings if string)
        yield Structure(base + start, kind, handle, data[start : start + length], texts)
        start = end
        if kind == _END_OF_TABLE or start == len(data):
            return
    expected = f"at most {_MAX_STRUCTURES}"
    raise FormatError("SMBIOS structures", at=base + start, found="one more", expected=expected, source=_SOURCE)


def _end(data: bytes, at: int) -> int:
    """Where the strings at ``at`` are over, behind their two NULs; -1 if they are not."""
    found = data.find(b"\0\0", at)
    return found + 2 if found >= 0 else -1


def _version(entry_point: bytes) -> str:
    at = 7 if entry_point.startswith(b"_SM3_") else 6
    return f"{entry_point[at]}.{entry_point[at + 1]}"


def _memory(each: Structure) -> Iterator[str]:
    """Size of a memory device, range of a mapped address."""
    fields = each.fields
    if each.type == _MEMORY_DEVICE and len(fields) >= 14:
        (size,) = struct.unpack_from("<H", fields, 12)
        if size == _EXTENDED_SIZE and len(fields) >= 32:
            yield size_text(int.from_bytes(fields[28:32], "little") * SZ_1M)
        elif size not in (0, _UNKNOWN_SIZE, _EXTENDED_SIZE):
            yield size_text((size & 0x7FFF) * (SZ_1K if size & 0x8000 else SZ_1M))
    if each.type == _MEMORY_ARRAY_MAPPED and len(fields) >= 15:
        first, last = struct.unpack_from("<II", fields, 4)
        start, end = first * SZ_1K, (last + 1) * SZ_1K
        if first == _EXTENDED_ADDRESS and len(fields) >= 31:
            start, end = (number for number in struct.unpack_from("<QQ", fields, 15))
            end += 1
        yield f"[{start:#x}, {end:#x}) {size_text(max(end - start, 0))}"
