"""What a boot stage hands to the next one by pointer, and the sanitizer's rule for it.

All that the next stage will read must lie in RAM that the guest has accepted. The pieces are found as the next stage
finds them: from boot_params in RSI on, through pointers that may be anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.cmdline import COMMAND_LINE_SIZE
from bootstub.setup_data import read_indirect, walk_setup_data
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, guid_bytes
from firmware.memory_descriptor import MemoryDescriptor, unpack_map
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES
from guest.errors import FormatError
from guest.memory import PhysicalMemory
from guest.ranges import TOP
from guest.records import RecordCopy
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PHYSICAL_ADDRESS_END, PMD_SIZE
from tdx.sanitizer import AcceptanceRule

if TYPE_CHECKING:
    from tools.pipeline import Boot

HANDING_OVER = ("efi-stub", "decompress")
"""Stages whose successor starts from boot_params."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that the next stage reads: ``[start, end)``, which may be no memory at all."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TableAt:
    """A table of unaccepted memory: where its bitmap lies, and what the bitmap stands for."""

    gpa: int
    bitmap: int
    size: int
    unit_size: int
    phys_base: int

    @property
    def described_end(self) -> int:
        """Address behind the last unit that has a bit."""
        return min(self.phys_base + self.size * BITS_PER_BYTE * self.unit_size, TOP)


def check_handover(boot: Boot) -> None:
    """Report what the stage hands over that the next one cannot read; at stage borders that are a handover."""
    sanitizer = boot.sanitizer
    if sanitizer is None or boot.trace.stage not in HANDING_OVER:
        return
    try:
        for piece in handover(boot):
            _check(boot, piece)
    except FormatError as error:
        at = error.at or 0
        sanitizer.report(AcceptanceRule.HANDOVER_BROKEN, at, at, f"{error.what}: {error.found}", str(error.expected))


def _check(boot: Boot, piece: Piece) -> None:
    sanitizer, ram, end = boot.sanitizer, boot.host.ram, min(piece.end, TOP)
    start = min(piece.start, end)
    assert sanitizer is not None
    if ram.covers(start, end) and sanitizer.accepted.covers(start, end):
        return
    for low, high in ram.gaps(start, end):
        sanitizer.report(AcceptanceRule.HANDOVER_NO_RAM, low, high, f"{piece.name}, no RAM", "accepted RAM")
    for part in ram.within(start, end):
        for low, high in sanitizer.accepted.gaps(part.start, part.end):
            sanitizer.report(AcceptanceRule.HANDOVER, low, high, f"{piece.name}, not accepted", "accepted RAM")


def handover(boot: Boot) -> Iterator[Piece]:
    """The pieces. A setup_data list that cannot be followed is a ``FormatError``."""
    gpa, read = boot.machine.regs.rsi, boot.physical.read
    yield Piece("boot_params", gpa, gpa + BOOT_PARAMS_SIZE)
    yield Piece("entry point", boot.machine.regs.rip, boot.machine.regs.rip + 1)
    data = peek(boot.physical, gpa, BOOT_PARAMS_SIZE)
    if data is None:
        return
    params = RecordCopy(data, BOOT_PARAMS)
    yield from _pointed_to(boot, params)
    for node in walk_setup_data(read, params["hdr.setup_data"]):
        yield Piece("setup_data", node.gpa, node.end)
        indirect = read_indirect(read, node)
        if indirect is not None:
            yield Piece("setup_indirect", indirect.addr, indirect.addr + indirect.len)


def _pointed_to(boot: Boot, params: RecordCopy) -> Iterator[Piece]:
    """What boot_params have the address of; copy_bootdata() copies a command line of full length."""
    line = params["ext_cmd_line_ptr"] << 32 | params["hdr.cmd_line_ptr"]
    if line:
        yield Piece("command line", line, line + COMMAND_LINE_SIZE)
    initrd = params["ext_ramdisk_image"] << 32 | params["hdr.ramdisk_image"]
    yield Piece("initrd", initrd, initrd + (params["ext_ramdisk_size"] << 32 | params["hdr.ramdisk_size"]))
    memmap = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    yield Piece("EFI memory map", memmap, memmap + params["efi_info.efi_memmap_size"])
    bitmap = params["unaccepted_memory"]
    if bitmap:
        end = max((part.end for part in boot.host.ram), default=0)
        yield Piece("bitmap", bitmap, bitmap + DIV_ROUND_UP(end, PMD_SIZE * BITS_PER_BYTE))
    systab = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    if systab:
        yield from _system_table(boot.physical, systab)


def _system_table(memory: PhysicalMemory, gpa: int) -> Iterator[Piece]:
    size = EFI_SYSTEM_TABLE.sizeof()
    yield Piece("system table", gpa, gpa + size)
    data = peek(memory, gpa, size)
    if data is None:
        return
    table = RecordCopy(data, EFI_SYSTEM_TABLE)
    at, count = table["ConfigurationTable"], table["NumberOfTableEntries"]
    yield Piece("configuration tables", at, at + count * EFI_CONFIGURATION_TABLE.sizeof())
    found = _unaccepted_table(memory, data)
    if found is not None:
        yield Piece("table of unaccepted memory", found.gpa, found.bitmap + found.size)


def unaccepted_table(boot: Boot) -> TableAt | None:
    """Mainline's table, by the system table as the stub left it, or as it is before the stub is done; else None."""
    data = boot.system_table
    if boot.boot_params is None and boot.system_table_gpa:
        data = peek(boot.physical, boot.system_table_gpa, EFI_SYSTEM_TABLE.sizeof())
    return _unaccepted_table(boot.physical, data) if data is not None else None


def _unaccepted_table(memory: PhysicalMemory, system_table: bytes) -> TableAt | None:
    """The table in memory, by the bytes of the system table."""
    fields, size = RecordCopy(system_table, EFI_SYSTEM_TABLE), EFI_CONFIGURATION_TABLE.sizeof()
    count = min(fields["NumberOfTableEntries"], MAX_CONFIGURATION_TABLES)
    tables = peek(memory, fields["ConfigurationTable"], count * size) or b""
    for at in range(0, len(tables), size):
        if tables[at : at + 16] == guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID):
            return _table_at(memory, int.from_bytes(tables[at + 16 : at + size], "little"))
    return None


def _table_at(memory: PhysicalMemory, gpa: int) -> TableAt | None:
    data = peek(memory, gpa, EFI_UNACCEPTED_MEMORY.sizeof())
    if data is None:
        return None
    header = RecordCopy(data, EFI_UNACCEPTED_MEMORY)
    return TableAt(gpa, gpa + len(data), header["size"], header["unit_size"], header["phys_base"])


def memory_map_of(boot: Boot) -> list[MemoryDescriptor]:
    """The EFI memory map as the stub left it; before it is done, as the firmware has it. Empty if it cannot be read."""
    if boot.boot_params is None:
        return boot.firmware_map.descriptors() if boot.firmware_map is not None else []
    stride = RecordCopy(boot.boot_params, BOOT_PARAMS)["efi_info.efi_memdesc_size"]
    try:
        return unpack_map(boot.memmap, stride, at=0)
    except FormatError:
        return []


def peek(memory: PhysicalMemory, gpa: int, size: int) -> bytes | None:
    """``size`` bytes at an address out of the guest's own memory; None if no memory can be there."""
    return memory.read(gpa, size) if gpa + size <= PHYSICAL_ADDRESS_END else None
