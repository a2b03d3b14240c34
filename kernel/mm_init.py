"""Stage ``mm-init``: nodes and zones, the last memblock callers, then everything to the page allocator.

Sources: arch/x86/kernel/setup.c, the end of setup_arch(); arch/x86/mm/{numa,init_64}.c, mm/{sparse,mm_init,memblock}.c;
init/main.c, start_kernel(). Sizes are those that the named functions compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from bootstub.cmdline import COMMAND_LINE_SIZE
from bootstub.e820_types import E820_TYPE_RAM, E820_TYPE_RESERVED_KERN
from guest.units import (
    DIV_ROUND_UP,
    PAGE_SHIFT,
    PAGE_SIZE,
    PFN_DOWN,
    PFN_PHYS,
    PFN_UP,
    SZ_1M,
    SZ_64M,
    round_up,
)
from kernel.acpi_tables import read_table
from kernel.crash_reserve import reserve_crashkernel
from kernel.e820_setup import e820_setup_pci_gap
from kernel.efi import efi_free_boot_services
from kernel.events import STRUCT_PAGE_SIZE
from kernel.hugetlb import parse_hugetlb
from kernel.kernel import Kernel
from kernel.madt import Madt, parse_madt
from kernel.memblock import SMP_CACHE_BYTES
from kernel.mm_core_init import mem_init, new_page_allocator, page_alloc_init_late, print_zonelists
from kernel.mmzone import Zone, free_area_init, memory_node_lines, nodes_of, unavailable_ranges, zone_ranges_lines
from kernel.numa import initmem_init
from kernel.percpu import setup_per_cpu_areas
from kernel.sparse import sparse_init
from kernel.srat import Srat, parse_srat
from kernel.swiotlb import swiotlb_init
from kernel.zone_movable import find_zone_movable_pfns

_RESOURCE_SIZE, _FIRMWARE_MAP_ENTRY_SIZE, _NOSAVE_REGION_SIZE = 64, 104, 32
"""sizeof(struct resource), of struct firmware_map_entry and struct nosave_region."""
_HPET_NAME_SIZE, _IOAPIC_NAME_SIZE = 9, 11
_PASSED_ON = ("nokaslr", "page_poison", "min_free_kbytes")
"""Parameters that the kernel itself does not know: the stub's, and some that people give it."""
_FIXMAP_TABLES = 3
"""Page tables for what is mapped at fixed virtual addresses, seen in logs (spp_getpage())."""


def mm_init(kernel: Kernel) -> None:
    """From memblock to free lists: after this, pages are allocated by the page allocator only."""
    srat, madt = _srat(kernel), _madt(kernel)
    initmem_init(kernel, srat, _slit_localities(kernel))
    reserve_crashkernel(kernel)
    sparse_init(kernel)
    zones = _zone_sizes_init(kernel)
    hash_pages = _nr_kernel_pages(kernel, zones)
    _reserve_resources(kernel, madt)
    e820_setup_pci_gap(kernel)
    _setup_command_line(kernel)
    nodes = nodes_of(kernel.memblock.memory.regions) or [0]
    kernel.cpu_nodes = _cpu_nodes(kernel, srat, madt)
    setup_per_cpu_areas(kernel, kernel.cpu_nodes)
    for _ in range(max(nodes) + 1 + kernel.version.percpu_cpumasks):
        kernel.memblock_alloc(8, SMP_CACHE_BYTES, "alloc_bootmem_cpumask_var")
    allocator = new_page_allocator(kernel, zones)
    if not kernel.mm_rules.prints_memory_late:
        print_zonelists(kernel, allocator)
    _print_unknown_bootoptions(kernel)
    parse_hugetlb(kernel, allocator)
    if len(nodes) == 1:  # else they are spread over nodes by vmalloc, later (hashdist)
        for name, scale in (("Dentry", 13), ("Inode", 14)):
            _alloc_large_system_hash(kernel, name, hash_pages, scale)
    if kernel.mm_rules.prints_memory_late:
        print_zonelists(kernel, allocator)
    for _ in range(_FIXMAP_TABLES):
        kernel.memblock_alloc(PAGE_SIZE, PAGE_SIZE, "spp_getpage")
    swiotlb_init(kernel, madt.possible_cpus)
    mem_init(kernel, allocator)
    efi_free_boot_services(kernel, allocator)
    page_alloc_init_late(kernel, allocator)
    for place in kernel.memblock.discard():
        allocator.free_pages_core(PFN_DOWN(place.start), PFN_DOWN(place.end))


def _table(kernel: Kernel, signature: str) -> bytes | None:
    """ACPI's first table of that name."""
    table = next((table for table in kernel.acpi if table.signature == signature), None)
    return None if table is None else read_table(kernel.machine, table)


def _srat(kernel: Kernel) -> Srat | None:
    data = _table(kernel, "SRAT")
    return None if data is None else parse_srat(data)


def _slit_localities(kernel: Kernel) -> int:
    """Number of localities between which SLIT gives distances; 0 without it."""
    data = _table(kernel, "SLIT")
    return int.from_bytes((data or b"")[36:44], "little")


def _madt(kernel: Kernel) -> Madt:
    """Processors and IO-APICs; without the table one processor."""
    data = _table(kernel, "APIC")
    madt = Madt() if data is None else parse_madt(data)
    return madt.limited(kernel.early.values.get("nr_cpus"))


def _cpu_nodes(kernel: Kernel, srat: Srat | None, madt: Madt) -> list[int]:
    """The node of each possible CPU; a node without memory stands for node 0."""
    nodes = nodes_of(kernel.memblock.memory.regions)
    known = dict(srat.cpus) if srat is not None and len(nodes) > 1 else {}
    return [nid if (nid := known.get(apic, 0)) in nodes else 0 for apic in madt.apic_ids]


def _zone_sizes_init(kernel: Kernel) -> list[Zone]:
    """Zones and the lines about them."""
    regions, print_line = kernel.memblock.memory.regions, kernel.machine.print
    movable_pfn, notes = find_zone_movable_pfns(regions, kernel.max_pfn, kernel.early)
    for line in [*notes, *zone_ranges_lines(regions, kernel.max_pfn, movable_pfn), *memory_node_lines(regions)]:
        print_line(line)
    zones = free_area_init(regions, kernel.max_pfn, movable_pfn)
    for node, name, count in unavailable_ranges(regions, zones):
        if count:
            print_line(f"On node {node}, zone {name}: {count} pages in unavailable ranges")
    return zones


def _nr_kernel_pages(kernel: Kernel, zones: Sequence[Zone]) -> int:
    """What hash tables are sized by: free memory (6.10 on), or memory without its struct pages."""
    if kernel.version.hashes_by_free_memory:
        counts = (PFN_DOWN(free.end) - PFN_UP(free.start) for free in kernel.memblock.free_ranges())
        return sum(count for count in counts if count > 0)
    total = 0
    for zone in zones:
        sparse = zone.spanned_pages > zone.present_pages + (zone.present_pages >> 4)
        pages = zone.present_pages if sparse else zone.spanned_pages
        total += zone.present_pages - DIV_ROUND_UP(pages * STRUCT_PAGE_SIZE, PAGE_SIZE)
    return total


def _reserve_resources(kernel: Kernel, madt: Madt) -> None:
    """Resources of /proc/iomem, entries of /sys/firmware/memmap, and what hibernation leaves out."""
    if any(table.signature == "HPET" for table in kernel.acpi):
        kernel.memblock_alloc(_RESOURCE_SIZE + _HPET_NAME_SIZE, SMP_CACHE_BYTES, "acpi_parse_hpet")
    if madt.ioapics:
        size = madt.ioapics * (_RESOURCE_SIZE + _IOAPIC_NAME_SIZE)
        kernel.memblock_alloc(size, SMP_CACHE_BYTES, "io_apic_init_mappings")
    kernel.memblock_alloc(len(kernel.e820) * _RESOURCE_SIZE, SMP_CACHE_BYTES, "e820__reserve_resources")
    for _ in kernel.e820_firmware:
        kernel.memblock_alloc(_FIRMWARE_MAP_ENTRY_SIZE, SMP_CACHE_BYTES, "firmware_map_add_early")
    _register_nosave_regions(kernel)


def _register_nosave_regions(kernel: Kernel) -> None:
    """Holes between ranges of RAM, up to its end (e820__register_nosave_regions())."""
    last, known_end = 0, 0
    entries = [e for e in kernel.e820 if e.type in (E820_TYPE_RAM, E820_TYPE_RESERVED_KERN)]
    holes = []
    for entry in entries:
        if last < entry.addr:
            holes.append((PFN_DOWN(last), PFN_UP(entry.addr)))
        last = entry.addr + entry.size
    for start, end in [*holes, (PFN_DOWN(last), kernel.max_pfn)]:
        if start >= end:
            continue
        if not known_end or start > known_end:
            kernel.memblock_alloc(_NOSAVE_REGION_SIZE, SMP_CACHE_BYTES, "register_nosave_region")
        known_end = end
        where = f"[mem {PFN_PHYS(start):#010x}-{PFN_PHYS(end) - 1:#010x}]"
        kernel.machine.print(f"PM: hibernation: Registered nosave memory: {where}")


def _setup_command_line(kernel: Kernel) -> None:
    """Two copies of the command line (setup_command_line())."""
    size = min(len(kernel.command_line.encode()), COMMAND_LINE_SIZE - 1) + 1
    for _ in range(2):
        kernel.memblock_alloc(size, SMP_CACHE_BYTES, "start_kernel")


def _print_unknown_bootoptions(kernel: Kernel) -> None:
    """Say what goes to user space; the text is put together in memory that is given back at once."""
    values = kernel.early.values
    words = [name if values[name] is None else f"{name}={values[name]}" for name in _PASSED_ON if name in values]
    if not words:
        return
    size = 1 + sum(len(word) + 1 for word in words)
    found = kernel.memblock_alloc(size, SMP_CACHE_BYTES, "start_kernel")
    text = " ".join(words)
    kernel.machine.print(f'Unknown kernel command line parameters "{text}", will be passed to user space.')
    kernel.memblock.phys_free(found, size, who="start_kernel")


def _alloc_large_system_hash(kernel: Kernel, name: str, pages: int, scale: int) -> None:
    """A table with one 8-byte bucket for each 2^scale bytes of memory, a power of two of them.

    Above 64 GiB the scale grows by one with each fourfold memory. Source: mm/mm_init.c.
    """
    entries = round_up(pages, SZ_1M >> PAGE_SHIFT)
    adapt = SZ_64M << 10 >> PAGE_SHIFT
    while adapt < entries:
        scale, adapt = scale + 1, adapt << 2
    entries = 1 << (max(entries >> (scale - PAGE_SHIFT), PAGE_SIZE // 8) - 1).bit_length()
    size = entries * 8
    order = (max(size, PAGE_SIZE) // PAGE_SIZE).bit_length() - 1
    kernel.memblock_alloc(size, SMP_CACHE_BYTES, "alloc_large_system_hash")
    kernel.machine.print(
        f"{name}{'-' if name == 'Inode' else ' '}cache hash table entries: {entries} "
        f"(order: {order}, {size} bytes, linear)"
    )
