"""The e820 tables on their way through setup_arch().

Sources: arch/x86/kernel/e820.c, e820__memory_setup() to e820__setup_pci_gap(); arch/x86/kernel/setup.c,
e820_add_kernel_range(), trim_bios_range(); v9 09/14.
"""

from __future__ import annotations

from bootstub.boot_params import E820_MAX_ENTRIES_ZEROPAGE, e820_table_of, parse_e820_table
from bootstub.e820_types import (
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_RESERVED_KERN,
    E820_TYPE_SOFT_RESERVED,
)
from bootstub.setup_data import SetupData, SetupDataType, read_indirect
from guest.ranges import Range
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PAGE_SHIFT, PAGE_SIZE, PFN_DOWN, PMD_SIZE, SZ_1M, SZ_4G
from kernel.e820 import E820Table, memory_setup, remove_line, update_line
from kernel.kernel import Kernel
from kernel.version import MAX_NUMNODES

MAX_ENTRIES = E820_MAX_ENTRIES_ZEROPAGE + 3 * MAX_NUMNODES
"""E820_MAX_ENTRIES."""
BIOS_BEGIN, BIOS_END = 0xA0000, SZ_1M
_NOT_FOR_KEXEC = frozenset({SetupDataType.SETUP_EFI, SetupDataType.SETUP_IMA, SetupDataType.SETUP_RNG_SEED})
"""setup_data that kexec makes anew."""


def e820_memory_setup(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """The firmware's table, and its extension in setup_data."""
    machine, params = kernel.machine, kernel.params
    entries = e820_table_of(params.data)
    who, kernel.e820 = memory_setup(entries, params["alt_mem_k"], params["screen_info.ext_mem_k"], MAX_ENTRIES)
    _copy_tables(kernel)
    _print_table(kernel, "BIOS-provided physical RAM map:", who)
    for node in setup_data:
        if node.type != SetupDataType.SETUP_E820_EXT:
            continue
        kernel.e820.append_table(parse_e820_table(machine.memory.read(node.data_gpa, node.len)))
        kernel.e820.update_table()
        _copy_tables(kernel)
        _print_table(kernel, "extended physical RAM map:", "extended")


def _copy_tables(kernel: Kernel) -> None:
    kernel.e820_kexec, kernel.e820_firmware = kernel.e820.copy(), kernel.e820.copy()


def _print_table(kernel: Kernel, title: str, who: str) -> None:
    for line in (title, *kernel.e820.print_lines(who)):
        kernel.machine.print(line)


def apply_map_edits(kernel: Kernel) -> None:
    """What ``mem=`` and ``memmap=`` change; the table is not sorted after it."""
    for edit in kernel.early.map_edits:
        said = edit.apply(kernel.e820)
        if said is not None:
            kernel.machine.print(said)


def e820_reserve_setup_data(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """Mark setup_data as RAM that the kernel keeps (e820__reserve_setup_data())."""
    if not setup_data:
        return
    for node in setup_data:
        tables = [kernel.e820]
        if kernel.version.updates_kexec_table and node.type not in _NOT_FOR_KEXEC:
            tables.append(kernel.e820_kexec)
        for place in (Range(node.gpa, node.end), *indirect_places(kernel, node)):
            for table in tables:
                _update(kernel, table, place.start, place.size, E820_TYPE_RAM, E820_TYPE_RESERVED_KERN)
    kernel.e820.update_table()
    if kernel.version.updates_kexec_table:
        kernel.e820_kexec.update_table()
    _print_table(kernel, "extended physical RAM map:", "reserve setup_data")


def indirect_places(kernel: Kernel, node: SetupData) -> list[Range]:
    """Where the data of an indirect node lie; none for other nodes, and for an indirect one behind it."""
    found = read_indirect(kernel.machine.memory.read, node)
    if found is None or found.type == SetupDataType.SETUP_INDIRECT:
        return []
    return [Range(found.addr, found.addr + found.len)]


def e820_finish_early_params(kernel: Kernel) -> None:
    """Sort and print the table that the user changed."""
    if not kernel.early.user_map:
        return
    if kernel.e820.update_table() < 0:
        raise kernel.machine.panic("Invalid user supplied memory map")
    _print_table(kernel, "user-defined physical RAM map:", "user")


def _update(kernel: Kernel, table: E820Table, start: int, size: int, old_type: int, new_type: int) -> None:
    kernel.machine.print(update_line(start, size, old_type, new_type))
    table.range_update(start, size, old_type, new_type)


def e820_add_kernel_range(kernel: Kernel) -> None:
    """The kernel's image is RAM, whatever the table says."""
    start, end = kernel.image.start, max(kernel.image.end, kernel.brk.end)
    if kernel.e820.mapped_all(start, end, E820_TYPE_RAM):
        return
    kernel.machine.print(".text .data .bss are not marked as E820_TYPE_RAM!")
    kernel.machine.print(remove_line(start, end - start, None))
    kernel.e820.range_remove(start, end - start)
    kernel.e820.range_add(start, end - start, E820_TYPE_RAM)


def trim_bios_range(kernel: Kernel) -> None:
    """Page 0 is reserved, and the ISA range is no RAM."""
    _update(kernel, kernel.e820, 0, PAGE_SIZE, E820_TYPE_RAM, E820_TYPE_RESERVED)
    kernel.machine.print(remove_line(BIOS_BEGIN, BIOS_END - BIOS_BEGIN, E820_TYPE_RAM))
    kernel.e820.range_remove(BIOS_BEGIN, BIOS_END - BIOS_BEGIN, E820_TYPE_RAM)
    kernel.e820.update_table()


def find_last_pfns(kernel: Kernel) -> None:
    """max_pfn, and the end of RAM below 4 GiB."""
    limit, types = kernel.max_arch_pfn, kernel.version.ram_types
    kernel.max_pfn = kernel.e820.end_of_ram_pfn(limit, types)
    last_pfns = [kernel.max_pfn]
    if kernel.max_pfn > PFN_DOWN(SZ_4G):
        last_pfns.append(kernel.e820.end_of_low_ram_pfn(types))
    for last_pfn in last_pfns:
        kernel.machine.print(f"last_pfn = {last_pfn:#x} max_arch_pfn = {limit:#x}")


def e820_memblock_setup(kernel: Kernel) -> None:
    """e820 becomes memblock, whose arrays may grow now; v9 reserves the bitmap first, since the table is final here.

    The reservation is sized by the end of RAM, not by what the stub allocated: the bit of the guard behind the
    last RAM may lie outside it.
    """
    memblock, who = kernel.memblock, "e820__memblock_setup"
    memblock.allow_resize()
    bitmap = kernel.params["unaccepted_memory"]
    if bitmap:
        size = DIV_ROUND_UP(kernel.max_pfn << PAGE_SHIFT, PMD_SIZE * BITS_PER_BYTE)
        memblock.reserve(bitmap, size, who=who)
    for entry in kernel.e820:
        if entry.type == E820_TYPE_SOFT_RESERVED:
            memblock.reserve(entry.addr, entry.size, who=who)
        if entry.type in (E820_TYPE_RAM, E820_TYPE_RESERVED_KERN):
            memblock.add(entry.addr, entry.size, who=who)
    memblock.trim_memory(PAGE_SIZE)
    memblock.dump_all()


def e820_setup_pci_gap(kernel: Kernel) -> None:
    """Say where PCI devices find room."""
    start, size = kernel.e820.search_gap(kernel.max_pfn)
    kernel.machine.print(f"[mem {start:#010x}-{start + size - 1:#010x}] available for PCI devices")
