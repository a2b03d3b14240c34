"""From memblock to the page allocator: zonelists, free lists, deferred pages and what is printed about them.

Source: mm/mm_init.c (mm_core_init(), page_alloc_init_late()), mm/page_alloc.c (build_all_zonelists()).
"""

from __future__ import annotations

from collections.abc import Sequence

from guest.ranges import Range
from guest.units import DIV_ROUND_UP, PAGE_SHIFT, PAGE_SIZE, PFN_DOWN, PFN_UP
from kernel.events import STRUCT_PAGE_SIZE
from kernel.fake_unaccepted import page_unaccepted_memory
from kernel.kernel import Kernel
from kernel.mmzone import MAX_DMA_PFN, Zone, mem_pfn_ranges
from kernel.page_alloc import PageAllocator

_JIFFY_NS = 4_000_000
"""HZ=250."""


def new_page_allocator(kernel: Kernel, zones: Sequence[Zone]) -> PageAllocator:
    """The kernel's page allocator, still without memory."""
    kernel.allocator = PageAllocator(
        zones,
        page_unaccepted_memory(kernel),
        lazy=kernel.early.lazy_accept,
        rules=kernel.mm_rules,
        record=kernel.machine.trace.add,
    )
    return kernel.allocator


def print_zonelists(kernel: Kernel, allocator: PageAllocator) -> None:
    """The fallback order of each node, and how many pages there are (build_all_zonelists())."""
    for line in allocator.zonelists.lines():
        kernel.machine.print(line)
    pages = sum(zone.present_pages for zone in allocator.zones)
    if not kernel.mm_rules.prints_memory_late:
        pages -= sum(map(_memmap_pages, allocator.zones))
        lowest, reserve = allocator.zones[0], _dma_reserve(kernel)
        pages -= reserve if lowest.present_pages - _memmap_pages(lowest) > reserve else 0
    nodes = len(allocator.zonelists.nodes)
    kernel.machine.print(f"Built {nodes} zonelists, mobility grouping on.  Total pages: {pages}")


def mem_init(kernel: Kernel, allocator: PageAllocator) -> None:
    """Give what memblock has free to the page allocator, but for deferred pages; then per-CPU lists can fill."""
    memory = list(mem_pfn_ranges(kernel.memblock.memory.regions))
    allocator.memblock_free_all(kernel.memblock.free_all(kernel.max_pfn), memory)
    if not kernel.mm_rules.prints_memory_late:
        _mem_init_print_info(kernel, allocator)
    allocator.setup_per_cpu_pageset()


def page_alloc_init_late(kernel: Kernel, allocator: PageAllocator) -> None:
    """Free the deferred pages; the time that it takes is counted in jiffies."""
    start = kernel.machine.clock.ns
    for node in allocator.page_alloc_init_late():
        jiffies = kernel.machine.clock.ns // _JIFFY_NS - start // _JIFFY_NS
        kernel.machine.print(f"node {node} deferred pages initialised in {jiffies * _JIFFY_NS // 1_000_000}ms")
    if kernel.mm_rules.prints_memory_late:
        _mem_init_print_info(kernel, allocator)


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
