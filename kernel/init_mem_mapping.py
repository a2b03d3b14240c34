"""The direct map: which page tables it needs, in which order, and where they come from.

Tables come from a buffer in the kernel's brk area where that does not lie in the range being mapped, else from
memblock: from memory that is mapped already, and so from the top of RAM.

Source: arch/x86/mm/init.c, init_mem_mapping(), memory_map_top_down(), split_mem_range(), alloc_low_pages();
arch/x86/mm/init_64.c, kernel_physical_mapping_init().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guest.ranges import Range
from guest.units import PAGE_SHIFT, PAGE_SIZE, PFN_PHYS, PMD_SIZE, SZ_1G, SZ_1M, round_down, round_up
from kernel.kernel import Kernel
from kernel.mmzone import mem_pfn_ranges

ISA_END_ADDRESS = SZ_1M
_PUD_SIZE, _PGD_SIZE, _P4D_SIZE = SZ_1G, SZ_1G << 9, SZ_1G << 18
_STEP_SHIFT = 8


def init_mem_mapping(kernel: Kernel) -> None:
    """Map all RAM up to ``max_pfn``, as the kernel does: the first MiB, then from the top downwards.

    With ``movable_node`` from the kernel upwards, then what is below it. A probe of 2 MiB at the top is given back at
    once, and yet its memory was accepted.
    """
    mapping = _DirectMap(kernel)
    if kernel.gbpages:
        kernel.machine.print("Using GB pages for direct mapping")
    mapping.init_memory_mapping(0, ISA_END_ADDRESS)
    if not kernel.early.nokaslr and kernel.memory_kaslr:
        mapping.use_brk(2 if kernel.la57 else 1)  # the trampoline's own tables
    end = PFN_PHYS(kernel.max_pfn)
    if kernel.memblock.bottom_up:
        mapping.bottom_up(kernel.image.end, end)
        mapping.bottom_up(ISA_END_ADDRESS, kernel.image.end)
    else:
        mapping.top_down(ISA_END_ADDRESS, end)
    kernel.memblock.current_limit = PFN_PHYS(mapping.max_pfn_mapped)
    kernel.mapped = mapping.mapped


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A range that is mapped with pages of at most ``page_size`` bytes."""

    start: int
    end: int
    page_size: int


class _DirectMap:
    """Page tables so far; ``max_pfn_mapped`` is the end of what is mapped."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tables: set[tuple[int, int]] = set()
        self._leaves: set[int] = set()
        self._buffer = kernel.pgt_buf
        self._min_pfn_mapped = 0
        self._can_use_brk = True
        self.max_pfn_mapped = 0
        self.mapped: list[Range] = []

    def top_down(self, map_start: int, map_end: int) -> None:
        """memory_map_top_down(): steps of growing size, from the top."""
        memblock = self._kernel.memblock
        who = "init_mem_mapping"
        probe = memblock.phys_alloc_range(PMD_SIZE, PMD_SIZE, map_start, map_end, who=who)
        if probe:
            memblock.phys_free(probe, PMD_SIZE, who=who)
            real_end = probe + PMD_SIZE
        else:
            self._kernel.machine.print("Failed to release memory for alloc_low_pages()")
            real_end = max(map_start, round_down(map_end, PMD_SIZE))
        self._min_pfn_mapped = real_end >> PAGE_SHIFT
        step, done, last = PMD_SIZE, 0, real_end
        while last > map_start:
            start = max(round_down(last - 1, step), map_start) if last > step else map_start
            size = self._init_range(start, last)
            done += size
            last = start if size else max(map_start, self._skip_hole(start, step))
            self._min_pfn_mapped = last >> PAGE_SHIFT
            if done >= step:
                step <<= _STEP_SHIFT
        if real_end < map_end:
            self._init_range(real_end, map_end)

    def _skip_hole(self, start: int, step: int) -> int:
        """Where the next step that meets memory ends, below ``start``: steps over a hole do nothing."""
        below = [region.end for region in self._kernel.memblock.memory.regions if region.base < start]
        return min(start, round_up(below[-1], step)) if below else 0

    def bottom_up(self, start: int, map_end: int) -> None:
        """memory_map_bottom_up()."""
        self._min_pfn_mapped = start >> PAGE_SHIFT
        step, done = PMD_SIZE, 0
        while start < map_end:
            end = min(round_up(start + 1, step), map_end)
            done += self._init_range(start, end)
            start = end
            if done >= step:
                step <<= _STEP_SHIFT

    def _init_range(self, start: int, end: int) -> int:
        """Map what memory there is in the range; its size (init_range_memory_mapping())."""
        size = 0
        for pages in list(mem_pfn_ranges(self._kernel.memblock.memory.regions)):
            low, high = max(PFN_PHYS(pages.start), start), min(PFN_PHYS(pages.end), end)
            if low < high:
                self._can_use_brk = max(low, self._buffer.start) >= min(high, self._buffer.end)
                self.init_memory_mapping(low, high)
                self._can_use_brk = True
                size += high - low
        return size

    def init_memory_mapping(self, start: int, end: int) -> None:
        """Map a range, and take the tables that it needs."""
        for mapping in self._split_mem_range(start, end):
            self._map(mapping)
        self.max_pfn_mapped = max(self.max_pfn_mapped, end >> PAGE_SHIFT)
        self.mapped.append(Range(start, end))

    def _split_mem_range(self, start: int, end: int) -> Iterator[_Mapping]:
        """Parts of the range by the page size that they allow."""
        sizes = (PMD_SIZE, _PUD_SIZE) if self._kernel.gbpages else (PMD_SIZE,)
        for low, high, aligned in _aligned_parts(start, end, self._kernel.gbpages):
            fitting = [size for size in sizes if self._all_memory(round_down(low, size), round_up(high, size))]
            yield _Mapping(low, high, max([aligned, *fitting]))

    def _all_memory(self, start: int, end: int) -> bool:
        """Whether a page that is larger than the range maps nothing but memory."""
        return self._kernel.memblock.is_region_memory(start, end - start)

    def _map(self, mapping: _Mapping) -> None:
        """Take tables for the range in the order of its addresses."""
        for top in range(round_down(mapping.start, _PGD_SIZE), mapping.end, _PGD_SIZE):
            if self._kernel.la57:
                self._table(round_down(top, _P4D_SIZE), _P4D_SIZE)
            self._table(top, _PGD_SIZE)
            for gib in range(
                round_down(max(mapping.start, top), _PUD_SIZE), min(mapping.end, top + _PGD_SIZE), _PUD_SIZE
            ):
                self._map_gib(gib, mapping)

    def _map_gib(self, gib: int, mapping: _Mapping) -> None:
        if (gib, _PUD_SIZE) not in self._tables and (gib in self._leaves or mapping.page_size == _PUD_SIZE):
            self._leaves.add(gib)
            return
        self._table(gib, _PUD_SIZE)
        if mapping.page_size == PAGE_SIZE:
            low, high = max(mapping.start, gib), min(mapping.end, gib + _PUD_SIZE)
            for at in range(round_down(low, PMD_SIZE), high, PMD_SIZE):
                self._table(at, PMD_SIZE)

    def _table(self, at: int, covers: int) -> None:
        """The table for ``covers`` bytes at ``at``, unless it is there."""
        if (at, covers) not in self._tables:
            self._tables.add((at, covers))
            self._alloc_low_page()

    def use_brk(self, count: int) -> None:
        """Take ``count`` pages of the buffer."""
        self._buffer = Range(min(self._buffer.start + count * PAGE_SIZE, self._buffer.end), self._buffer.end)

    def _alloc_low_page(self) -> None:
        if self._buffer.size and self._can_use_brk:
            self.use_brk(1)
            return
        kernel, found = self._kernel, 0
        if self._min_pfn_mapped < self.max_pfn_mapped:
            low, high = PFN_PHYS(self._min_pfn_mapped), PFN_PHYS(self.max_pfn_mapped)
            found = kernel.memblock.phys_alloc_range(PAGE_SIZE, PAGE_SIZE, low, high, who="alloc_low_pages")
        if found:
            kernel.machine.memory.clear(found, found + PAGE_SIZE)
        elif not self._can_use_brk:
            raise kernel.machine.panic("alloc_low_pages: can not alloc memory")


def _aligned_parts(start: int, end: int, gbpages: bool) -> Iterator[tuple[int, int, int]]:
    """Head, middle and tail of a range, each with the largest page size that its borders allow."""
    head = min(round_up(start, PMD_SIZE), end)
    last_pmd = max(head, round_down(end, PMD_SIZE))
    first_pud = min(round_up(head, _PUD_SIZE), last_pmd)
    last_pud = max(first_pud, round_down(end, _PUD_SIZE))
    borders = (start, head, first_pud, last_pud, max(last_pud, last_pmd), end)
    sizes = (PAGE_SIZE, PMD_SIZE, _PUD_SIZE if gbpages else PMD_SIZE, PMD_SIZE, PAGE_SIZE)
    for low, high, size in zip(borders, borders[1:], sizes, strict=False):
        if low < high:
            yield low, high, size
