"""The table of unaccepted memory, mainline's successor of v9's bitmap: an EFI configuration table.

A header, and a bitmap behind it; a bit stands for ``unit_size`` bytes, counted from ``phys_base``. The table outlives
a kexec, so the stub may find one that an earlier kernel left.
Source: include/linux/efi.h, struct efi_unaccepted_memory; drivers/firmware/efi/libstub/unaccepted_memory.c (6.12).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import construct as c

from bootstub.efi_call import EfiCalls, EfiError
from bootstub.unaccepted_memory import Accept, split_range
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, EfiMemoryType, EfiStatus
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.machine import Machine
from guest.memory import GuestMemory
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PMD_SIZE, round_down, round_up

EFI_UNACCEPTED_MEMORY = c.Struct(
    "version" / c.Int32ul,
    "unit_size" / c.Int32ul,
    "phys_base" / c.Int64ul,
    "size" / c.Int64ul,
)
"""The header; ``size`` bytes of bitmap follow it."""
TABLE_VERSION = 1
UNIT_SIZE = PMD_SIZE
"""EFI_UNACCEPTED_UNIT_SIZE of the tables that this stub makes."""


@dataclass(frozen=True, slots=True)
class UnacceptedTable:
    """A table in guest memory: its ``bitmap``, and what the bits stand for."""

    bitmap: GuestBitmap
    unit_size: int
    phys_base: int
    size: int

    @classmethod
    def at(cls, memory: GuestMemory, gpa: int) -> UnacceptedTable:
        """The table at ``gpa``."""
        header = GuestRecord(memory, gpa, EFI_UNACCEPTED_MEMORY)
        bitmap = GuestBitmap(memory, gpa + EFI_UNACCEPTED_MEMORY.sizeof())
        return cls(bitmap, header["unit_size"], header["phys_base"], header["size"])

    @property
    def end(self) -> int:
        """Physical address behind the last unit that the bitmap describes."""
        return self.phys_base + self.size * BITS_PER_BYTE * self.unit_size

    def process(self, accept: Accept, start: int, end: int) -> None:
        """Put ``[start, end)`` on record as unaccepted; accept now what the bitmap cannot describe.

        What lies below ``phys_base`` is accepted, and what lies behind the bitmap. A range that lies wholly behind it
        is accepted from the bitmap's end on, though it does not begin there: as 6.12 does.
        """
        whole = split_range(accept, start, end, self.unit_size)
        if whole is None:
            return
        start, end = whole
        if start < self.phys_base:
            accept(start, min(self.phys_base, end))
            start = self.phys_base
        if end < self.phys_base:
            return
        if end > self.end:
            accept(self.end, end)
            end = self.end
        if start < end:
            unit, base = self.unit_size, self.phys_base
            self.bitmap.set((start - base) // unit, (end - base) // unit)

    def accept_memory(self, accept: Accept, start: int, size: int) -> None:
        """Accept every unaccepted unit that ``size`` bytes from ``start`` on touch, and clear its bit. No guard.

        An empty range inside a unit touches that unit.
        """
        base, unit = self.phys_base, self.unit_size
        low, high = max(start, base) - base, min(start + size, self.end) - base
        for first, last in self.bitmap.runs(low // unit, max(DIV_ROUND_UP(high, unit), low // unit)):
            accept(base + first * unit, base + last * unit)
            self.bitmap.clear(first, last)


class TableOfStub:
    """The stub's side: finding or making the table while boot services run, filling it when they are gone."""

    def __init__(self, machine: Machine, efi: EfiCalls, boot_params: GuestRecord, accept: Accept) -> None:
        self._machine, self._efi, self._accept = machine, efi, accept
        self._gpa: int | None = None

    def allocate(self, descriptors: Iterable[MemoryDescriptor]) -> None:
        """allocate_unaccepted_bitmap(): keep an installed table, else make one if memory is unaccepted."""
        self._gpa = self._efi.configuration_table(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID)
        if self._gpa is not None:
            if GuestRecord(self._machine.memory, self._gpa, EFI_UNACCEPTED_MEMORY)["version"] != TABLE_VERSION:
                self._efi.error("Unknown version of unaccepted memory table")
                raise EfiError(EfiStatus.EFI_UNSUPPORTED)
            return
        kind = EfiMemoryType.EfiUnacceptedMemoryType
        unaccepted = [(d.start, d.end) for d in descriptors if d.type == kind]
        if unaccepted:
            start = round_down(min(start for start, _ in unaccepted), UNIT_SIZE)
            self._gpa = self._make(start, round_up(max(end for _, end in unaccepted), UNIT_SIZE))

    def process(self, start: int, end: int) -> None:
        """process_unaccepted_memory() for one descriptor. Without a table nothing is done."""
        if self._gpa is not None:
            UnacceptedTable.at(self._machine.memory, self._gpa).process(self._accept, start, end)

    def _make(self, start: int, end: int) -> int:
        """Install a table for ``[start, end)`` with no bit set; returns its address."""
        size, memory = DIV_ROUND_UP(end - start, UNIT_SIZE * BITS_PER_BYTE), self._machine.memory
        header = EFI_UNACCEPTED_MEMORY.sizeof()
        gpa = self._efi.allocate_pool(header + size, EfiMemoryType.EfiACPIReclaimMemory)
        fields = {"version": TABLE_VERSION, "unit_size": UNIT_SIZE, "phys_base": start, "size": size}
        memory.write(gpa, EFI_UNACCEPTED_MEMORY.build(fields))
        memory.clear(gpa + header, gpa + header + size)
        self._efi.install_configuration_table(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, gpa)
        self._machine.note(f"table of unaccepted memory at {gpa:#x}, {size:#x} bytes of bitmap from {start:#x} on")
        return gpa
