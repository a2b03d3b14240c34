"""The kernel's look at what EFI left: tables, memory map, boot services memory.

Sources: arch/x86/platform/efi/{efi,memmap,quirks}.c; drivers/firmware/efi/efi.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from bootstub.e820_types import E820_TYPE_RESERVED
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, UnacceptedTable
from firmware.efi_types import (
    ACPI_20_TABLE_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID,
    EfiMemoryAttribute,
    EfiMemoryType,
    guid_bytes,
)
from firmware.memory_descriptor import MemoryDescriptor, unpack_map
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES
from guest.ranges import Range
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE, PAGE_SIZE, PFN_DOWN, PFN_UP, SZ_1M, SZ_64K
from kernel.kernel import Kernel
from kernel.memblock import MAINLINE_MEMBLOCK
from kernel.mm_rules import MAINLINE_MM
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
from tdx.guest import PlatformAccept, tdx_accept_memory

_UNACCEPTED = "Unaccepted"
_TABLE_NAMES = {
    guid_bytes(ACPI_20_TABLE_GUID): "ACPI 2.0",
    guid_bytes(LINUX_EFI_INITRD_MEDIA_GUID): "INITRD",
    guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID): _UNACCEPTED,
}
_MAX_MEMMAP_SIZE = 1 << 24
_MAX_BITMAP_SIZE = 1 << 28
_VENDOR_SIZE = 100
_MMIO_KEPT_BELOW = 4 * SZ_64K

MEMORY_TYPE_NAMES = (
    "Reserved",
    "Loader Code",
    "Loader Data",
    "Boot Code",
    "Boot Data",
    "Runtime Code",
    "Runtime Data",
    "Conventional",
    "Unusable",
    "ACPI Reclaim",
    "ACPI Mem NVS",
    "MMIO",
    "MMIO Port",
    "PAL Code",
    "Persistent",
    "Unaccepted",
)
"""memory_type_name[] by EFI_MEMORY_TYPE."""

ATTRIBUTE_COLUMNS = (
    (EfiMemoryAttribute.EFI_MEMORY_RUNTIME, "RUN"),
    (EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE, "HP"),
    (EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE, "MR"),
    (EfiMemoryAttribute.EFI_MEMORY_CPU_CRYPTO, "CC"),
    (EfiMemoryAttribute.EFI_MEMORY_SP, "SP"),
    (EfiMemoryAttribute.EFI_MEMORY_NV, "NV"),
    (EfiMemoryAttribute.EFI_MEMORY_XP, "XP"),
    (EfiMemoryAttribute.EFI_MEMORY_RP, "RP"),
    (EfiMemoryAttribute.EFI_MEMORY_WP, "WP"),
    (EfiMemoryAttribute.EFI_MEMORY_RO, "RO"),
    (EfiMemoryAttribute.EFI_MEMORY_UCE, "UCE"),
    (EfiMemoryAttribute.EFI_MEMORY_WB, "WB"),
    (EfiMemoryAttribute.EFI_MEMORY_WT, "WT"),
    (EfiMemoryAttribute.EFI_MEMORY_WC, "WC"),
    (EfiMemoryAttribute.EFI_MEMORY_UC, "UC"),
)
"""The columns of an attribute text, in the order in which the kernel prints them."""

_TYPEATTR_SIZE = 64


def efi_md_typeattr_format(d: MemoryDescriptor) -> str:
    """``[Boot Data   |RUN|  |...|UC]``; 63 characters at most, as the kernel's buffer cuts it."""
    name = MEMORY_TYPE_NAMES[d.type] if d.type < len(MEMORY_TYPE_NAMES) else f"type={d.type}"
    text = f"[{name:<12}"
    known = sum(flag for flag, _ in ATTRIBUTE_COLUMNS)
    if d.attribute & ~known:
        text += f"|attr={d.attribute:#018x}]"
    else:
        text += "".join(f"|{word if d.attribute & flag else '':{len(word)}}" for flag, word in ATTRIBUTE_COLUMNS)
        text += "]"
    return text[: _TYPEATTR_SIZE - 1]


def memmap_lines(descriptors: list[MemoryDescriptor]) -> Iterator[str]:
    """The lines of efi_print_memmap()."""
    for number, d in enumerate(descriptors):
        attributes, size = efi_md_typeattr_format(d), d.end - d.start
        yield f"efi: mem{number:02}: {attributes} range=[{d.start:#018x}-{d.end - 1:#018x}] ({size // SZ_1M}MB)"


def efi_memblock_x86_reserve_range(kernel: Kernel) -> None:
    """Read the memory map that the stub left, and reserve its buffer."""
    params = kernel.params
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    size = params["efi_info.efi_memmap_size"]
    if at == 0 or size > _MAX_MEMMAP_SIZE:
        return
    kernel.memblock.reserve(at, size)
    data = kernel.machine.memory.read(at, size)
    kernel.efi_memmap = unpack_map(data, params["efi_info.efi_memdesc_size"], at=at)


def efi_init(kernel: Kernel) -> None:
    """Report the system table, take large MMIO out of e820, and print the map with ``efi=debug``."""
    machine, params = kernel.machine, kernel.params
    at = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    if at == 0:
        return
    system_table = GuestRecord(machine.memory, at, EFI_SYSTEM_TABLE)
    revision, vendor = system_table["Hdr.Revision"], system_table["FirmwareVendor"]
    name = machine.memory.read(vendor, _VENDOR_SIZE * 2).decode("utf-16-le", errors="replace").split("\0")[0]
    machine.print(f"efi: EFI v{revision >> 16}.{(revision & 0xFFFF) // 10} by {name}")
    tables = dict(_known_tables(kernel, system_table))
    kernel.acpi_rsdp = tables.get("ACPI 2.0", 0)
    machine.print("efi: " + "".join(f"{table}={address:#x} " for table, address in tables.items()))
    if _UNACCEPTED in tables:
        _reserve_unaccepted(kernel, tables[_UNACCEPTED])
    _efi_remove_e820_mmio(kernel)
    if "debug" in (kernel.early.values.get("efi") or "").split(","):
        for line in memmap_lines(kernel.efi_memmap):
            machine.print(line)


def efi_reserve_boot_services(kernel: Kernel) -> list[Range]:
    """Reserve boot services memory that nobody else has; returns what :func:`efi_free_boot_services` frees."""
    reserved = []
    for d in kernel.efi_memmap:
        if d.type not in (EfiMemoryType.EfiBootServicesCode, EfiMemoryType.EfiBootServicesData):
            continue
        if not kernel.memblock.is_region_reserved(d.start, d.end - d.start):
            kernel.memblock.reserve(d.start, d.end - d.start)
            if d.start >= SZ_1M:
                reserved.append(Range(d.start, d.end))
    return reserved


def efi_free_boot_services(kernel: Kernel, allocator: PageAllocator) -> None:
    """Give boot services memory that was kept aside to the page allocator."""
    for start, end in kernel.boot_services:
        kernel.memblock.phys_free(start, end - start)
        if PFN_UP(start) < PFN_DOWN(end):
            allocator.free_pages_core(PFN_UP(start), PFN_DOWN(end))


def _known_tables(kernel: Kernel, system_table: GuestRecord) -> Iterator[tuple[str, int]]:
    """Name and address of the configuration tables that the kernel knows."""
    count = min(system_table["NumberOfTableEntries"], MAX_CONFIGURATION_TABLES)
    size = EFI_CONFIGURATION_TABLE.sizeof()
    data = kernel.machine.memory.read(system_table["ConfigurationTable"], count * size)
    for at in range(0, len(data), size):
        name = _TABLE_NAMES.get(data[at : at + 16])
        if name is not None:
            yield name, int.from_bytes(data[at + 16 : at + size], "little")


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
    kernel.memblock.version = MAINLINE_MEMBLOCK
    kernel.mm_rules = MAINLINE_MM
    kernel.memblock.reserve(table, EFI_UNACCEPTED_MEMORY.sizeof() + size)
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
