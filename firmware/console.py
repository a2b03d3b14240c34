"""The console that an image prints on: EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL (UEFI 2.10, section 12.4)."""

from __future__ import annotations

import construct as c

from firmware.boot_services import EfiServices
from firmware.efi_types import EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL_GUID, EfiMemoryType, EfiStatus
from firmware.tables import EFI_SYSTEM_TABLE, seal
from guest.memory import GuestMemory
from guest.records import GuestRecord
from guest.units import SZ_64K

_BEFORE, _AFTER = (
    (("Reset", 2),),
    (
        ("TestString", 2),
        ("QueryMode", 4),
        ("SetMode", 2),
        ("SetAttribute", 2),
        ("ClearScreen", 1),
        ("SetCursorPosition", 3),
        ("EnableCursor", 2),
    ),
)
_NAMES = [name for name, _ in (*_BEFORE, ("OutputString", 2), *_AFTER)]
EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL = c.Struct(*(name / c.Int64ul for name in _NAMES), "Mode" / c.Int64ul)


def install_console(services: EfiServices) -> None:
    """Make a console output device whose lines go where the firmware prints, and name it in the system table."""
    line = ""

    def output_string(this: int, text: int) -> int:
        nonlocal line
        *lines, line = (line + read_char16(services.machine.memory, text)).split("\n")
        for complete in lines:
            services.machine.print(complete.rstrip("\r"))
        return EfiStatus.EFI_SUCCESS

    code = EfiMemoryType.EfiBootServicesCode
    gates = services.install_gates(_BEFORE, code)
    gates += services.install_gates((("OutputString", 2),), code, output_string)
    gates += services.install_gates(_AFTER, code)
    fields = dict(zip(_NAMES, gates, strict=True)) | {"Mode": 0}
    protocol = services.arena.put(EfiMemoryType.EfiBootServicesData, EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL.build(fields))
    handle = services.new_handle()
    services.install_protocol(handle, EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL_GUID, protocol)
    system_table = GuestRecord(services.machine.memory, services.system_table, EFI_SYSTEM_TABLE)
    system_table["ConsoleOutHandle"], system_table["ConOut"] = handle, protocol
    seal(services.machine.memory, services.system_table, EFI_SYSTEM_TABLE.sizeof())


def read_char16(memory: GuestMemory, gpa: int) -> str:
    """The null-terminated string of 16-bit characters at ``gpa``; what is longer than 64 KiB is cut off."""
    units = bytearray()
    while len(units) < SZ_64K and (unit := memory.read(gpa + len(units), 2)) != b"\0\0":
        units += unit
    return units.decode("utf-16-le", errors="replace")
