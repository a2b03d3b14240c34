"""The console that an image prints on: EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL.

Source: UEFI 2.10, section 12.4. Of its functions only OutputString() does something; the others answer
EFI_UNSUPPORTED, which the trace shows.
"""

from __future__ import annotations

import construct as c

from firmware.boot_services import EfiServices
from firmware.char16 import read_char16
from firmware.efi_types import EfiMemoryType, EfiStatus

_FUNCTIONS = (
    ("Reset", 2),
    ("OutputString", 2),
    ("TestString", 2),
    ("QueryMode", 4),
    ("SetMode", 2),
    ("SetAttribute", 2),
    ("ClearScreen", 1),
    ("SetCursorPosition", 3),
    ("EnableCursor", 2),
)
EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL = c.Struct(*(name / c.Int64ul for name, _ in _FUNCTIONS), "Mode" / c.Int64ul)


def install_console(services: EfiServices) -> int:
    """Write the protocol; returns its address. Each complete line is put out by the machine."""
    machine, line = services.machine, [""]

    def output_string(this: int, string: int) -> int:
        *complete, line[0] = (line[0] + read_char16(machine.memory, string)).split("\n")
        for each in complete:
            machine.print(each.rstrip("\r"))
        return EfiStatus.EFI_SUCCESS

    def unsupported(*args: int) -> int:
        return EfiStatus.EFI_UNSUPPORTED

    code = EfiMemoryType.EfiBootServicesCode
    gates = [
        services.install_gates((function,), code, output_string if function[0] == "OutputString" else unsupported)[0]
        for function in _FUNCTIONS
    ]
    fields = {name: gate for (name, _), gate in zip(_FUNCTIONS, gates, strict=True)}
    protocol = EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL.build(fields | {"Mode": 0})
    return services.arena.put(EfiMemoryType.EfiBootServicesData, protocol)
