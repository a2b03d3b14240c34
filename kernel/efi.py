"""The kernel's look at what EFI left: tables, memory map, boot services memory.

Sources: arch/x86/platform/efi/{efi,memmap,quirks}.c; drivers/firmware/efi/efi.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bootstub.e820_types import E820_TYPE_RAM, E820_TYPE_RESERVED
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, UnacceptedTable
from firmware.efi_types import (
    ACPI_20_TABLE_GUID,
    ACPI_TABLE_GUID,
    EFI_MEMORY_ATTRIBUTES_TABLE_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID,
    SMBIOS3_TABLE_GUID,
    SMBIOS_TABLE_GUID,
    EfiMemoryAttribute,
    EfiMemoryType,
    guid_bytes,
)
from firmware.memory_descriptor import unpack_map
from firmware.tables import EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES
from guest.machine import Machine
from guest.ranges import Range
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE, PAGE_SHIFT, PAGE_SIZE, PFN_DOWN, PFN_UP, SZ_1M, SZ_64K, round_down, round_up
from kernel.efi_memmap import memmap_lines
from kernel.kernel import Kernel
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.version import V6_12
from tdx.guest import PlatformAccept, tdx_accept_memory

_UNACCEPTED, _ACPI, _ACPI_20, _MEMATTR = "Unaccepted", "ACPI", "ACPI 2.0", "MEMATTR"
_TABLE_NAMES = {
    guid_bytes(SMBIOS_TABLE_GUID): "SMBIOS",
    guid_bytes(ACPI_TABLE_GUID): _ACPI,
    guid_bytes(ACPI_20_TABLE_GUID): _ACPI_20,
    guid_bytes(SMBIOS3_TABLE_GUID): "SMBIOS 3.0",
    guid_bytes(EFI_MEMORY_ATTRIBUTES_TABLE_GUID): _MEMATTR,
    guid_bytes(LINUX_EFI_INITRD_MEDIA_GUID): "INITRD",
    guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID): _UNACCEPTED,
}
_EFI32_LOADER_SIGNATURE = int.from_bytes(b"EL32", "little")
_MAX_MEMMAP_SIZE = 1 << 24
_MAX_BITMAP_SIZE = 1 << 28
_MEMATTR_HEADER_SIZE = 16
_VENDOR_SIZE = 100
_MMIO_KEPT_BELOW = 4 * SZ_64K


def efi_memblock_x86_reserve_range(kernel: Kernel) -> None:
    """Read the memory map that the stub left, and reserve its buffer."""
    params = kernel.params
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    size = params["efi_info.efi_memmap_size"]
    if at == 0 or size > _MAX_MEMMAP_SIZE:
        return
    kernel.memblock.reserve(at, size, who="efi_memblock_x86_reserve_range")
    data = kernel.machine.memory.read(at, size)
    kernel.efi_memmap = unpack_map(data, params["efi_info.efi_memdesc_size"], at=at)


def efi_init(kernel: Kernel) -> None:
    """Report the system table, take large MMIO out of e820, and print the map with ``efi=debug``."""
    machine, params = kernel.machine, kernel.params
    at = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    if at == 0:
        return
    is_64bit = params["efi_info.efi_loader_signature"] != _EFI32_LOADER_SIGNATURE
    found = _system_table(machine, at) if is_64bit else _system_table_32(machine, at)
    name = machine.memory.read(found.vendor, _VENDOR_SIZE * 2).decode("utf-16-le", errors="replace").split("\0")[0]
    minor = kernel.version.efi_minor(found.revision & 0xFFFF)
    machine.print(f"efi: EFI v{found.revision >> 16}.{minor} by {name}")
    tables = dict(_known_tables(kernel, found))
    machine.print("efi: " + "".join(f"{table}={address:#x} " for table, address in tables.items()))
    kernel.dmi = "SMBIOS" in tables or "SMBIOS 3.0" in tables
    kernel.acpi_rsdp = kernel.acpi_rsdp or tables.get(_ACPI_20, 0) or tables.get(_ACPI, 0)
    if _MEMATTR in tables:
        _efi_memattr_init(kernel, tables[_MEMATTR])
    if _UNACCEPTED in tables:
        _reserve_unaccepted(kernel, tables[_UNACCEPTED])
    if kernel.version.removes_efi_mmio:
        _efi_remove_e820_mmio(kernel)
    if _efi_debug(kernel):
        for line in memmap_lines(kernel.efi_memmap):
            machine.print(line)


def _efi_debug(kernel: Kernel) -> bool:
    return "debug" in (kernel.early.values.get("efi") or "").split(",")


def efi_find_mirror(kernel: Kernel) -> None:
    """Tell memblock which memory is mirrored (arch/x86/platform/efi/efi.c)."""
    mirrored = [d for d in kernel.efi_memmap if d.attribute & EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE]
    for d in mirrored:
        kernel.memblock.mark_mirror(d.start, d.end - d.start)
    if mirrored:
        mirror, total = (sum(d.end - d.start for d in part) // SZ_1M for part in (mirrored, kernel.efi_memmap))
        kernel.machine.print(f"efi: Memory: {mirror}M/{total}M mirrored memory")


def efi_reserve_boot_services(kernel: Kernel) -> list[Range]:
    """Reserve boot services memory that nobody else has; returns what :func:`efi_free_boot_services` frees."""
    reserved = []
    for d in kernel.efi_memmap:
        if d.type not in (EfiMemoryType.EfiBootServicesCode, EfiMemoryType.EfiBootServicesData):
            continue
        if not kernel.memblock.is_region_reserved(d.start, d.end - d.start):
            kernel.memblock.reserve(d.start, d.end - d.start, who="efi_reserve_boot_services")
            if d.start >= SZ_1M and _can_free_region(kernel, d.start, d.end):
                reserved.append(Range(d.start, d.end))
    return reserved


def _can_free_region(kernel: Kernel, start: int, end: int) -> bool:
    """Whether nothing but boot services is there: not the kernel, and RAM all over."""
    image = Range(kernel.image.start, max(kernel.image.end, kernel.brk.end))
    return not (end > image.start and start <= image.end) and kernel.e820.mapped_all(start, end, E820_TYPE_RAM)


def efi_free_boot_services(kernel: Kernel, allocator: PageAllocator) -> None:
    """Give boot services memory that was kept aside to the page allocator; ``efi=debug`` keeps it for debugfs."""
    freed = 0
    if _efi_debug(kernel):
        return
    for start, end in kernel.boot_services:
        kernel.memblock.reserved.remove_range(start, end - start)
        if PFN_UP(start) < PFN_DOWN(end):
            allocator.free_pages_core(PFN_UP(start), PFN_DOWN(end))
            freed += PFN_DOWN(end) - PFN_UP(start)
    if freed and kernel.version.says_freed_efi:
        kernel.machine.print(f"Freeing EFI boot services memory: {freed << PAGE_SHIFT - 10}K")


@dataclass(frozen=True, slots=True)
class _SystemTable:
    """What of an EFI system table matters here; ``width`` is the size of a pointer."""

    revision: int
    vendor: int
    count: int
    tables: int
    width: int


def _system_table(machine: Machine, at: int) -> _SystemTable:
    table = GuestRecord(machine.memory, at, EFI_SYSTEM_TABLE)
    count, tables = table["NumberOfTableEntries"], table["ConfigurationTable"]
    return _SystemTable(table["Hdr.Revision"], table["FirmwareVendor"], count, tables, width=8)


def _system_table_32(machine: Machine, at: int) -> _SystemTable:
    """The table of 32-bit firmware, which starts a 64-bit kernel in mixed mode."""
    revision, vendor, count, tables = (machine.memory.read_uint(at + offset, 4) for offset in (8, 24, 64, 68))
    return _SystemTable(revision, vendor, count, tables, width=4)


def _known_tables(kernel: Kernel, found: _SystemTable) -> Iterator[tuple[str, int]]:
    """Name and address of the configuration tables that the kernel knows."""
    count, size = min(found.count, MAX_CONFIGURATION_TABLES), 16 + found.width
    data = kernel.machine.memory.read(found.tables, count * size)
    for at in range(0, len(data), size):
        name = _TABLE_NAMES.get(data[at : at + 16])
        if name is not None:
            yield name, int.from_bytes(data[at + 16 : at + size], "little")


def _efi_memattr_init(kernel: Kernel, table: int) -> None:
    """Keep the table of memory attributes (drivers/firmware/efi/memattr.c)."""
    header = kernel.machine.memory.read(table, _MEMATTR_HEADER_SIZE)
    version, count, size = (int.from_bytes(header[at : at + 4], "little") for at in (0, 4, 8))
    total = _MEMATTR_HEADER_SIZE + count * size
    if 1 <= version <= 2 and total <= _MAX_MEMMAP_SIZE:
        kernel.memblock.reserve(table, total, who="efi_memattr_init")


def _keep(kernel: Kernel, start: int, size: int) -> None:
    """Whole pages that are memory from now on, and taken: firmware calls them ACPI's (reserve_unaccepted())."""
    first, end = round_down(start, PAGE_SIZE), round_up(start + size, PAGE_SIZE)
    kernel.memblock.add(first, end - first, who="efi_config_parse_tables")
    kernel.memblock.reserve(first, end - first, who="efi_config_parse_tables")


def _reserve_unaccepted(kernel: Kernel, table: int) -> None:
    """Keep the table of unaccepted memory that a mainline stub left, and take the bitmap from it.

    Only a mainline kernel knows the table, so this is one.
    """
    memory = kernel.machine.memory
    version = GuestRecord(memory, table, EFI_UNACCEPTED_MEMORY)["version"]
    found = UnacceptedTable.at(memory, table)
    unit_size, size = found.unit_size, found.size
    if version != 1 or unit_size < PAGE_SIZE or unit_size & unit_size - 1 or size > _MAX_BITMAP_SIZE:
        kernel.machine.print(f"efi: Unknown version of unaccepted memory table: {version}")
        return
    kernel.version, kernel.memblock.version = V6_12, V6_12.memblock
    _keep(kernel, table, EFI_UNACCEPTED_MEMORY.sizeof() + size)
    accept = PlatformAccept(kernel.machine, tdx_accept_memory)
    described = size * BITS_PER_BYTE * unit_size
    kernel.unaccepted = UnacceptedMemory(
        found.bitmap, accept, found.phys_base, described, unit_size, guard=kernel.build.zeropad_guard
    )


def _efi_remove_e820_mmio(kernel: Kernel) -> None:
    """Large MMIO ranges leave e820, so that PCI can use them (arch/x86/platform/efi/efi.c, 6.2 on)."""
    for number, d in enumerate(kernel.efi_memmap):
        size = d.end - d.start
        if d.type != EfiMemoryType.EfiMemoryMappedIO or size < _MMIO_KEPT_BELOW:
            continue
        where = f"range=[{d.start:#010x}-{d.end - 1:#010x}] ({size // SZ_1M}MB)"
        kernel.machine.print(f"efi: Remove mem{number:02}: MMIO {where} from e820 map")
        kernel.machine.print(f"e820: remove [mem {d.start:#010x}-{d.end - 1:#010x}] reserved")
        kernel.e820.range_remove(d.start, size, E820_TYPE_RESERVED)
