"""SetVirtualAddressMap(): the runtime services go on at virtual addresses, and their tables point there.

Source: UEFI 2.10, section 8.4.1; edk2 RuntimeDriverSetVirtualAddressMap() for the pointers that are converted.
"""

from __future__ import annotations

from firmware.memory_descriptor import EFI_MEMORY_DESCRIPTOR
from firmware.tables import EFI_RUNTIME_SERVICES, EFI_SYSTEM_TABLE, RUNTIME_SERVICES, seal
from guest.machine import Machine
from guest.records import GuestRecord, RecordCopy
from guest.units import PAGE_SHIFT

_SYSTEM_TABLE_POINTERS = ("FirmwareVendor", "ConfigurationTable", "RuntimeServices")


class VirtualMap:
    """A memory map in which each range has a virtual address, ``stride`` bytes a descriptor."""

    def __init__(self, data: bytes, stride: int) -> None:
        descriptors = (RecordCopy(data[at : at + stride], EFI_MEMORY_DESCRIPTOR) for at in range(0, len(data), stride))
        self._ranges = [
            (d["PhysicalStart"], d["PhysicalStart"] + (d["NumberOfPages"] << PAGE_SHIFT), d["VirtualStart"])
            for d in descriptors
        ]

    def convert(self, gpa: int) -> int | None:
        """The virtual address of ``gpa``; None if no range has it."""
        return next((virtual + gpa - start for start, end, virtual in self._ranges if start <= gpa < end), None)


def move_runtime_services(machine: Machine, system_table_at: int, virtual_map: VirtualMap) -> bool:
    """Let the runtime services answer at their virtual addresses too, and convert the pointers to them.

    Returns False, and changes nothing, if the map has not all of them.
    """
    memory = machine.memory
    system_table = GuestRecord(memory, system_table_at, EFI_SYSTEM_TABLE)
    runtime = GuestRecord(memory, system_table["RuntimeServices"], EFI_RUNTIME_SERVICES)
    pointers = [(runtime, name) for name, _ in RUNTIME_SERVICES]
    pointers += [(system_table, name) for name in _SYSTEM_TABLE_POINTERS]
    moved: list[tuple[GuestRecord, str, int, int]] = []
    for record, name in pointers:
        gpa = record[name]
        address = virtual_map.convert(gpa)
        if address is None:
            return False
        moved.append((record, name, gpa, address))
    for record, name, gpa, address in moved:
        gate = machine.gates.at(gpa)
        if gate is not None and machine.gates.at(address) is None:
            machine.gates.install(address, gate)
        record[name] = address
    seal(memory, runtime.gpa, EFI_RUNTIME_SERVICES.sizeof())
    seal(memory, system_table_at, EFI_SYSTEM_TABLE.sizeof())
    return True
