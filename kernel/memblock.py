"""memblock: the allocator of early boot (mm/memblock.c, without NUMA).

Two arrays: ``memory`` is what there is, ``reserved`` what is taken. Functions keep the kernel's names without
the prefix ``memblock_``. Addresses and sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from guest.ranges import TOP, Range
from guest.units import PAGE_SIZE, PFN_DOWN, PFN_UP, round_down, round_up
from kernel.memblock_type import PHYS_ADDR_MAX, MemblockFlags, MemblockRegion, MemblockType, memblock_cap_size

MEMBLOCK_ALLOC_ACCESSIBLE = 0
MEMBLOCK_ALLOC_NOLEAKTRACE = 1
MEMBLOCK_ALLOC_ANYWHERE = PHYS_ADDR_MAX
SMP_CACHE_BYTES = 64


class Memblock:
    """Memory and reservations of early boot.

    ``accept_memory(start, end)`` is called for each allocated block before it is handed out (v9 02/14).
    ``movable_node`` and ``mirrored_kernelcore`` are the boot parameters ``movable_node`` and
    ``kernelcore=mirror``.
    """

    def __init__(
        self,
        accept_memory: Callable[[int, int], None],
        *,
        movable_node: bool = False,
        mirrored_kernelcore: bool = False,
    ) -> None:
        self.memory = MemblockType("memory")
        self.reserved = MemblockType("reserved")
        self.bottom_up = False
        self.current_limit = MEMBLOCK_ALLOC_ANYWHERE
        self._accept_memory = accept_memory
        self._movable_node = movable_node
        self._mirrored_kernelcore = mirrored_kernelcore
        self._has_mirror = False

    # Registering memory.

    def add(self, base: int, size: int, flags: MemblockFlags = MemblockFlags.MEMBLOCK_NONE) -> None:
        """There is memory at ``base``. Nothing is accepted."""
        self.memory.add_range(base, size, int(flags))

    def remove(self, base: int, size: int) -> None:
        """There is no memory in the range any more."""
        self.memory.remove_range(base, size)

    def reserve(self, base: int, size: int) -> None:
        """Take the range, whether there is memory or not. Nothing is accepted."""
        self.reserved.add_range(base, size)

    def phys_free(self, base: int, size: int) -> None:
        """Give the range back."""
        self.reserved.remove_range(base, size)

    # Flags.

    def mark_hotplug(self, base: int, size: int) -> None:
        """The range can be unplugged: no allocations there if ``movable_node``."""
        self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_HOTPLUG)

    def clear_hotplug(self, base: int, size: int) -> None:
        """Undo :meth:`mark_hotplug`."""
        self.memory.setclr_flag(base, size, False, MemblockFlags.MEMBLOCK_HOTPLUG)

    def mark_mirror(self, base: int, size: int) -> None:
        """The range is mirrored: allocations prefer it. Nothing happens without ``mirrored_kernelcore``."""
        if self._mirrored_kernelcore:
            self._has_mirror = True
            self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_MIRROR)

    def mark_nomap(self, base: int, size: int) -> None:
        """The range is memory that the direct map leaves out: never allocated."""
        self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_NOMAP)

    def clear_nomap(self, base: int, size: int) -> None:
        """Undo :meth:`mark_nomap`."""
        self.memory.setclr_flag(base, size, False, MemblockFlags.MEMBLOCK_NOMAP)

    def reserved_mark_noinit(self, base: int, size: int) -> None:
        """The struct pages of the reserved range stay uninitialised."""
        self.reserved.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_RSRV_NOINIT)

    # Limits.

    def trim_memory(self, align: int) -> None:
        """Shrink every memory region to multiples of ``align``; the total is not corrected, as in the kernel."""
        kept: list[MemblockRegion] = []
        for region in self.memory.regions:
            start, end = round_up(region.base, align), round_down(region.end, align)
            if start < end:
                kept.append(MemblockRegion(start, end - start, region.flags))
            else:
                self.memory.total_size -= region.size
        self.memory.regions[:] = kept

    def enforce_memory_limit(self, limit: int) -> None:
        """Keep the first ``limit`` bytes of memory, counted from below, and forget what is reserved above."""
        max_addr = self._find_max_addr(limit)
        if limit and max_addr != PHYS_ADDR_MAX:
            self.memory.remove_range(max_addr, PHYS_ADDR_MAX)
            self.reserved.remove_range(max_addr, PHYS_ADDR_MAX)

    def cap_memory_range(self, base: int, size: int) -> None:
        """Keep memory inside the range only; NOMAP memory stays everywhere."""
        if not size or not self.memory.total_size:
            return
        first, last = self.memory.isolate_range(base, size)
        for index in reversed(range(len(self.memory.regions))):
            outside = not first <= index < last
            if outside and not self.memory.regions[index].flags & MemblockFlags.MEMBLOCK_NOMAP:
                self.memory.remove_regions(index, index + 1)
        self.reserved.remove_range(0, base)
        self.reserved.remove_range(memblock_cap_size(base, size), PHYS_ADDR_MAX)

    def mem_limit_remove_map(self, limit: int) -> None:
        """As :meth:`enforce_memory_limit`, but NOMAP memory above the limit stays."""
        max_addr = self._find_max_addr(limit)
        if limit and max_addr != PHYS_ADDR_MAX:
            self.cap_memory_range(0, max_addr)

    def _find_max_addr(self, limit: int) -> int:
        for region in self.memory.regions:
            if limit <= region.size:
                return region.base + limit
            limit -= region.size
        return PHYS_ADDR_MAX

    # Questions.

    def is_memory(self, address: int) -> bool:
        """True if there is memory at ``address``."""
        return self.memory.search(address) is not None

    def is_map_memory(self, address: int) -> bool:
        """True if there is memory at ``address`` and the direct map has it."""
        region = self.memory.search(address)
        return region is not None and not region.flags & MemblockFlags.MEMBLOCK_NOMAP

    def is_reserved(self, address: int) -> bool:
        """True if ``address`` is taken."""
        return self.reserved.search(address) is not None

    def is_region_memory(self, base: int, size: int) -> bool:
        """True if the whole range lies in one region of memory."""
        region = self.memory.search(base)
        return region is not None and region.end >= memblock_cap_size(base, size)

    def is_region_reserved(self, base: int, size: int) -> bool:
        """True if any address of the range is taken."""
        return self.reserved.overlaps_region(base, size)

    def start_of_DRAM(self) -> int:
        """Lowest address of memory."""
        return self.memory.regions[0].base if self.memory.regions else 0

    def end_of_DRAM(self) -> int:
        """End of memory, exclusive."""
        return self.memory.regions[-1].end if self.memory.regions else 0

    def phys_mem_size(self) -> int:
        """Bytes of memory, as the kernel keeps count (see :meth:`trim_memory`)."""
        return self.memory.total_size

    def reserved_size(self) -> int:
        """Bytes that are taken."""
        return self.reserved.total_size

    def free_ranges(self, flags: MemblockFlags = MemblockFlags.MEMBLOCK_NONE) -> Iterator[Range]:
        """Memory that is not taken, ascending (``for_each_free_mem_range``). Do not change memblock meanwhile.

        With ``MEMBLOCK_MIRROR`` mirrored memory only. As in the kernel, a range is empty where two reserved
        regions touch that differ in flags.
        """
        gaps, first = self._gaps(), 0
        for region in self.memory.regions:
            if self._should_skip_region(region, flags):
                continue
            while gaps[first].end <= region.base:
                first += 1
            for gap in islice(gaps, first, None):
                if gap.start >= region.end:
                    break
                yield Range(max(gap.start, region.base), min(gap.end, region.end))

    def _gaps(self) -> list[Range]:
        """What is not taken: below, between and above the reserved regions, empty where two of them touch."""
        ends = [0, *(r.end for r in self.reserved.regions)]
        bases = [*(r.base for r in self.reserved.regions), TOP]
        return [Range(end, base) for end, base in zip(ends, bases, strict=True)]

    def _should_skip_region(self, region: MemblockRegion, flags: MemblockFlags) -> bool:
        if not region.flags and not flags:  # nearly all of them; the flags of an enum are slow
            return False
        if region.flags & (MemblockFlags.MEMBLOCK_NOMAP | MemblockFlags.MEMBLOCK_DRIVER_MANAGED):
            return True
        if self._movable_node and region.flags & MemblockFlags.MEMBLOCK_HOTPLUG:
            return True
        return bool(flags & MemblockFlags.MEMBLOCK_MIRROR and not region.flags & MemblockFlags.MEMBLOCK_MIRROR)

    # Allocation.

    def phys_alloc_range(self, size: int, align: int, start: int, end: int) -> int:
        """Reserve and accept ``size`` bytes in ``[start, end)``; returns the address, 0 if there is no room.

        ``end`` may be ``MEMBLOCK_ALLOC_ACCESSIBLE``: the current limit. Top-down unless ``bottom_up``. The
        first page is never given out. ``align`` is a power of two, 0 for a cache line.
        Source: memblock_phys_alloc_range(), memblock_alloc_range_nid().
        """
        align = align or SMP_CACHE_BYTES
        found = 0
        if self._has_mirror:
            found = self._find_in_range(size, align, start, end, MemblockFlags.MEMBLOCK_MIRROR)
        found = found or self._find_in_range(size, align, start, end, MemblockFlags.MEMBLOCK_NONE)
        if found:
            self.reserve(found, size)
            self._accept_memory(found, found + size)
        return found

    def _find_in_range(self, size: int, align: int, start: int, end: int, flags: MemblockFlags) -> int:
        """Lowest or highest free place, 0 if there is none (``memblock_find_in_range_node``)."""
        if end in (MEMBLOCK_ALLOC_ACCESSIBLE, MEMBLOCK_ALLOC_NOLEAKTRACE):
            end = self.current_limit
        start = max(start, PAGE_SIZE)
        end = max(start, end)
        ranges = list(self.free_ranges(flags))
        for free in ranges if self.bottom_up else reversed(ranges):
            low, high = (min(max(address, start), end) for address in free)
            if self.bottom_up:
                found = round_up(low, align)
                fits = found < high and found + size <= high
            else:
                found = round_down(high - size, align)
                fits = low <= found
            if fits:
                return found
        return 0

    # Handing over to the page allocator.

    def free_all(self, max_low_pfn: int) -> list[Range]:
        """What the page allocator gets: free memory as ranges of page frame numbers, ascending, whole pages only.

        Hotplug flags are cleared first. Source: memblock_free_all(), free_low_memory_core_early().
        """
        self.clear_hotplug(0, PHYS_ADDR_MAX)
        pages = [Range(PFN_UP(r.start), min(PFN_DOWN(r.end), max_low_pfn)) for r in self.free_ranges()]
        return [r for r in pages if r.start < r.end]
