"""Stage ``mm-init``: node and zones, the last memblock callers, then everything to the page allocator.

Sources: arch/x86/mm/{numa,init_64}.c, mm/{sparse,mm_init,memblock}.c, mm/percpu.c (6.3).
Sizes are those that the named functions compute; callers that take a few hundred bytes are left out.
"""

from __future__ import annotations

from guest.ranges import Range, RangeSet
from guest.units import (
    DIV_ROUND_UP,
    PAGE_SHIFT,
    PAGE_SIZE,
    PFN_DOWN,
    PFN_PHYS,
    PFN_UP,
    PMD_SIZE,
    SZ_1G,
    SZ_1M,
    SZ_16M,
    SZ_64M,
    SZ_128M,
    round_up,
)
from kernel.efi import efi_free_boot_services
from kernel.events import STRUCT_PAGE_SIZE
from kernel.fake_unaccepted import page_unaccepted_memory
from kernel.kernel import Kernel
from kernel.memblock import SMP_CACHE_BYTES
from kernel.mmzone import (
    MAX_DMA_PFN,
    Zone,
    free_area_init,
    mem_pfn_ranges,
    memory_node_lines,
    zone_ranges_lines,
)
from kernel.page_alloc import PageAllocator
from kernel.swiotlb import swiotlb_init

NODE_DATA_SIZE = 43 * PAGE_SIZE
"""pg_data_t of a 6.x distribution kernel in whole pages (alloc_node_data())."""
JIFFY_NS = 4_000_000
SECTION_SIZE = SZ_128M
SECTIONS_PER_ROOT = 256
MEMMAP_PER_SECTION = SECTION_SIZE // PAGE_SIZE * STRUCT_PAGE_SIZE
USEMAP_PER_SECTION = 56
PERCPU_UNIT_SIZE, PERCPU_USED_PAGES = PMD_SIZE, 66
"""One CPU's unit, and what of it stays after pcpu_embed_first_chunk() gave the rest back (6.12, one CPU)."""


def mm_init(kernel: Kernel) -> None:
    """From memblock to free lists: after this, pages are allocated by the page allocator only."""
    _initmem_init(kernel)
    _sparse_init(kernel)
    zones = _zone_sizes_init(kernel)
    _setup_per_cpu_areas(kernel)
    present = sum(zone.present_pages for zone in zones)
    allocator = kernel.allocator = PageAllocator(
        zones,
        page_unaccepted_memory(kernel),
        lazy=kernel.early.lazy_accept,
        rules=kernel.mm_rules,
        record=kernel.machine.trace.add,
    )
    if not kernel.mm_rules.prints_memory_late:
        _print_zonelists(kernel, allocator)
    for name, scale in (("Dentry", 13), ("Inode", 14)):
        _alloc_large_system_hash(kernel, name, present, scale)
    if kernel.mm_rules.prints_memory_late:
        _print_zonelists(kernel, allocator)
    swiotlb_init(kernel)
    memory = list(mem_pfn_ranges(kernel.memblock.memory.regions))
    allocator.memblock_free_all(kernel.memblock.free_all(kernel.max_pfn), memory)
    if not kernel.mm_rules.prints_memory_late:
        _mem_init_print_info(kernel, allocator)
    allocator.setup_per_cpu_pageset()
    efi_free_boot_services(kernel, allocator)
    page_alloc_init_late(kernel, allocator)


def page_alloc_init_late(kernel: Kernel, allocator: PageAllocator) -> None:
    """Free the deferred pages; the time it takes is given in ticks of 4 ms, as jiffies count it (HZ=250)."""
    start = kernel.machine.clock.ns
    for node in allocator.page_alloc_init_late():
        ticks = kernel.machine.clock.ns // JIFFY_NS - start // JIFFY_NS
        kernel.machine.print(f"node {node} deferred pages initialised in {ticks * JIFFY_NS // 1_000_000}ms")
    if kernel.mm_rules.prints_memory_late:
        _mem_init_print_info(kernel, allocator)


def _print_zonelists(kernel: Kernel, allocator: PageAllocator) -> None:
    """The fallback order of each node, and how many pages there are (build_all_zonelists())."""
    for line in allocator.zonelists.lines():
        kernel.machine.print(line)
    pages = sum(zone.present_pages for zone in allocator.zones)
    if not kernel.mm_rules.prints_memory_late:
        pages -= sum(map(_memmap_pages, allocator.zones)) + _dma_reserve(kernel)
    nodes = len(allocator.zonelists.nodes)
    kernel.machine.print(f"Built {nodes} zonelists, mobility grouping on.  Total pages: {pages}")


def _memmap_pages(zone: Zone) -> int:
    """Pages for a zone's struct pages, as 6.3 guesses them to estimate its managed pages (calc_memmap_size())."""
    sparse = zone.spanned_pages > zone.present_pages + (zone.present_pages >> 4)
    pages = zone.present_pages if sparse else zone.spanned_pages
    return DIV_ROUND_UP(pages * STRUCT_PAGE_SIZE, PAGE_SIZE)


def _dma_reserve(kernel: Kernel) -> int:
    """Pages below 16 MiB that memblock keeps (6.3, memblock_find_dma_reserve())."""
    present = mem_pfn_ranges(kernel.memblock.memory.regions)
    free = (Range(PFN_UP(r.start), PFN_DOWN(r.end)) for r in kernel.memblock.free_ranges())
    below = [sum(max(min(end, MAX_DMA_PFN) - start, 0) for start, end in ranges) for ranges in (present, free)]
    return below[0] - below[1]


def _initmem_init(kernel: Kernel) -> None:
    """One node for all memory; its data go to the top of memory."""
    kernel.machine.print("No NUMA configuration found")
    end = PFN_PHYS(kernel.max_pfn)
    kernel.machine.print(f"Faking a node at [mem {0:#018x}-{end - 1:#018x}]")
    node_data = kernel.memblock_alloc(NODE_DATA_SIZE, SMP_CACHE_BYTES)
    kernel.machine.print(f"NODE_DATA(0) allocated [mem {node_data:#x}-{node_data + NODE_DATA_SIZE - 1:#x}]")


def _sparse_init(kernel: Kernel) -> None:
    """Struct pages for each section of 128 MiB that has memory: 2 MiB a section, in one piece if there is room."""
    sections = _present_units(kernel, SECTION_SIZE)
    roots = _present_units(kernel, SECTION_SIZE * SECTIONS_PER_ROOT)
    kernel.memblock_alloc(roots * PAGE_SIZE, SMP_CACHE_BYTES)
    kernel.memblock_alloc(sections * USEMAP_PER_SECTION, SMP_CACHE_BYTES)
    memmap = sections * MEMMAP_PER_SECTION
    if not kernel.try_memblock_alloc(memmap, PMD_SIZE, SZ_16M):
        for _ in range(sections):
            kernel.memblock_alloc(MEMMAP_PER_SECTION, PMD_SIZE, SZ_16M)
    kernel.memblock_alloc((1 + DIV_ROUND_UP(memmap, SZ_1G)) * PAGE_SIZE, PAGE_SIZE, SZ_16M)


def _present_units(kernel: Kernel, size: int) -> int:
    """Number of units of ``size`` bytes that hold memory (memory_present())."""
    regions = kernel.memblock.memory.regions
    return RangeSet((r.base // size, DIV_ROUND_UP(r.end, size)) for r in regions).total()


def _zone_sizes_init(kernel: Kernel) -> list[Zone]:
    """Zones and the lines about them."""
    regions = kernel.memblock.memory.regions
    for line in [*zone_ranges_lines(regions, kernel.max_pfn), *memory_node_lines(regions)]:
        kernel.machine.print(line)
    return free_area_init(regions, kernel.max_pfn)


def _setup_per_cpu_areas(kernel: Kernel) -> None:
    """The boot CPU's per-CPU area: a 2 MiB unit, of which the unused tail is given back."""
    unit = kernel.memblock_alloc(PERCPU_UNIT_SIZE, PMD_SIZE)
    used = PERCPU_USED_PAGES * PAGE_SIZE
    kernel.memblock.phys_free(unit + used, PERCPU_UNIT_SIZE - used)


def _alloc_large_system_hash(kernel: Kernel, name: str, pages: int, scale: int) -> None:
    """A table with one 8-byte bucket for each 2^scale bytes of memory, a power of two of them.

    Above 64 GiB the scale grows by one with each fourfold memory. Source: mm/mm_init.c.
    """
    entries = round_up(pages, SZ_1M >> PAGE_SHIFT)
    adapt = SZ_64M << 10 >> PAGE_SHIFT
    while adapt < entries:
        scale, adapt = scale + 1, adapt << 2
    entries = 1 << ((entries >> (scale - PAGE_SHIFT)) - 1).bit_length()
    size = entries * 8
    order = (max(size, PAGE_SIZE) // PAGE_SIZE).bit_length() - 1
    kernel.memblock_alloc(size, SMP_CACHE_BYTES)
    kernel.machine.print(
        f"{name}{'-' if name == 'Inode' else ' '}cache hash table entries: {entries} "
        f"(order: {order}, {size} bytes, linear)"
    )


def _mem_init_print_info(kernel: Kernel, allocator: PageAllocator) -> None:
    """The ``Memory:`` line, without the sizes of the kernel's sections, which its image does not tell.

    6.3 prints it when deferred pages are not free yet, but does not call them reserved.
    """
    free, managed, present = (
        sum(getattr(zone, name) for zone in allocator.zones) << PAGE_SHIFT - 10
        for name in ("nr_free_pages", "managed_pages", "present_pages")
    )
    managed += allocator.deferred.total() << PAGE_SHIFT - 10
    kernel.machine.print(f"Memory: {free}K/{present}K available ({present - managed}K reserved, 0K cma-reserved)")
