"""SMBIOS: what the machine is called, and how much memory it has, as QEMU tells it.

The entry point is that of SMBIOS 3.0, with 64 bits. Values are those of QEMU (hw/smbios/smbios.c) where it has any
for a machine without options, names are neutral. Sources: DMTF DSP0134 3.0, sections 5.2.2 and 7; edk2
MdeModulePkg/Universal/SmbiosDxe for the kind of memory.
"""

from __future__ import annotations

import struct
from itertools import islice

from firmware.acpi_table import checksum
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from guest.ranges import RangeSet
from guest.units import SZ_1K, SZ_1M

_ENTRY_POINT_SIZE = 24
_NAME = "unaccepted"
_MEMORY_ARRAY, _MEMORY_DEVICE = 0x1000, 0x1100
_NO_ERROR_INFORMATION = 0xFFFE
_EXTENDED_CAPACITY, _EXTENDED_SIZE, _EXTENDED_ADDRESS = 0x8000_0000, 0x7FFF, 0xFFFF_FFFF
_MAX_SIZE_MIB = 0x7FFE
_MAX_RANGES = 256


def build_smbios(arena: Arena, ram: RangeSet) -> int:
    """Write entry point and structures into runtime services data; returns the address of the entry point."""
    kind = EfiMemoryType.EfiRuntimeServicesData
    table = b"".join([_bios(), _system(), _chassis(), _processor(), *_memory(ram), _boot(), _structure(127, 0x7F00)])
    at = arena.put(kind, table)
    entry = struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, _ENTRY_POINT_SIZE, 3, 0, 0, 1, 0, len(table), at)
    return arena.put(kind, checksum(entry, 5, len(entry)))


def _structure(type: int, handle: int, fields: bytes = b"", *strings: str) -> bytes:
    """A structure: header, ``fields``, and its strings, each with a NUL, and one more at the end."""
    text = b"".join(string.encode() + b"\0" for string in strings) or b"\0"
    return struct.pack("<BBH", type, 4 + len(fields), handle) + fields + text + b"\0"


def _bios() -> bytes:
    """Type 0: characteristics are not given, but for targeted content distribution and UEFI, in a virtual machine."""
    fields = struct.pack("<BBHBBQBBBBBB", 1, 2, 0, 3, 0, 1 << 3, 0, 0x1C, 0, 0, 0xFF, 0xFF)
    return _structure(0, 0, fields, _NAME, "0", "01/01/1970")


def _system() -> bytes:
    """Type 1: no UUID, woken by the power switch."""
    return _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), 6, 0, 0), _NAME, "trust domain")


def _chassis() -> bytes:
    """Type 3: of an other kind, and safe."""
    fields = struct.pack("<BBBBBBBBBIBBBBB", 1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0)
    return _structure(3, 0x300, fields, _NAME)


def _processor() -> bytes:
    """Type 4: a central processor in a socket of an other kind, enabled, with one core and one thread."""
    head = struct.pack("<BBBBQBBHHHBBHHH", 1, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0x41, 1, 0xFFFF, 0xFFFF, 0xFFFF)
    tail = struct.pack("<BBBBBBHHHHH", 0, 0, 0, 1, 1, 1, 2, 1, 1, 1, 1)
    return _structure(4, 0x400, head + tail, "CPU 0", _NAME)


def _memory(ram: RangeSet) -> list[bytes]:
    """Types 16, 17 and 19: one array with one device, mapped where there is RAM, at 256 places at most."""
    kib, mib = ram.total() // SZ_1K, ram.total() // SZ_1M
    small = kib < _EXTENDED_CAPACITY
    capacity = (kib if small else _EXTENDED_CAPACITY, 0 if small else ram.total())
    array = struct.pack("<BBBIHHQ", 1, 3, 6, capacity[0], _NO_ERROR_INFORMATION, 1, capacity[1])
    size, extended = (mib, 0) if mib <= _MAX_SIZE_MIB else (_EXTENDED_SIZE, min(mib, 0x7FFF_FFFF))
    device = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH", _MEMORY_ARRAY, _NO_ERROR_INFORMATION, 0xFFFF, 0xFFFF, size, 9, 0, 1, 0, 7, 2, 0,
        0, 0, 0, 0, 0, extended, 0, 0, 0, 0,
    )  # fmt: skip
    return [
        _structure(16, _MEMORY_ARRAY, array),
        _structure(17, _MEMORY_DEVICE, device, "DIMM 0"),
        *(_mapped(0x1300 + number, part.start, part.end) for number, part in enumerate(islice(ram, _MAX_RANGES))),
    ]


def _mapped(handle: int, start: int, end: int) -> bytes:
    """Type 19: addresses in KiB, the last one included, or in bytes if these have too many bits."""
    first, last = start // SZ_1K, end // SZ_1K - 1
    if last < _EXTENDED_ADDRESS:
        return _structure(19, handle, struct.pack("<IIHBQQ", first, last, _MEMORY_ARRAY, 1, 0, 0))
    fields = _EXTENDED_ADDRESS, _EXTENDED_ADDRESS, _MEMORY_ARRAY, 1, start, end - 1
    return _structure(19, handle, struct.pack("<IIHBQQ", *fields))


def _boot() -> bytes:
    """Type 32: no errors."""
    return _structure(32, 0x2000, bytes(7))
