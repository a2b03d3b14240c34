"""Zones: DMA below 16 MiB, DMA32 below 4 GiB, Normal above (arch/x86/mm/init.c, mm/mm_init.c).

One node, number 0. Zones Movable and Device exist in the kernel but are empty here; they show only where the
kernel prints their names or counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from guest.ranges import Range
from guest.units import PAGE_SHIFT, PFN_DOWN, PFN_PHYS, PFN_UP, SZ_4G, SZ_16M
from kernel.free_area import BlockRuns, FreeArea
from kernel.memblock_type import MemblockRegion
from kernel.watermark import (
    LOWMEM_RESERVE_RATIO,
    WATERMARK_SCALE_FACTOR,
    Watermarks,
    calculate_min_free_kbytes,
    lowmem_reserves,
    recommended_min_free_kbytes,
    zone_wmarks,
)

MAX_DMA_PFN = PFN_DOWN(SZ_16M)
MAX_DMA32_PFN = PFN_DOWN(SZ_4G)
MAX_NR_ZONES = len(LOWMEM_RESERVE_RATIO)
THP_MIN_PAGES = 512 << 20 - PAGE_SHIFT
"""Transparent huge pages are off in a guest with less memory: 512 MiB."""


class ZoneType(IntEnum):
    """``enum zone_type``."""

    ZONE_DMA = 0
    ZONE_DMA32 = 1
    ZONE_NORMAL = 2


ZONE_NAMES = ("DMA", "DMA32", "Normal")


@dataclass(slots=True)
class Zone:
    """``struct zone``. Numbers are pages; ``managed_pages`` is what the page allocator was given so far.

    ``nr_free_pages`` counts the unaccepted pages too (NR_FREE_PAGES), ``nr_unaccepted`` them alone.
    """

    zone_type: ZoneType
    zone_start_pfn: int
    spanned_pages: int
    present_pages: int
    managed_pages: int = 0
    watermark: Watermarks = field(default_factory=Watermarks)
    watermark_boost: int = 0
    lowmem_reserve: tuple[int, ...] = (0,) * MAX_NR_ZONES
    nr_free_pages: int = 0
    nr_unaccepted: int = 0
    nr_reserved_highatomic: int = 0
    node: int = 0
    free_area: FreeArea = field(default_factory=FreeArea, repr=False)
    unaccepted_pages: BlockRuns = field(default_factory=BlockRuns, repr=False)

    @property
    def name(self) -> str:
        return ZONE_NAMES[self.zone_type]

    @property
    def end_pfn(self) -> int:
        """First page frame behind the zone (``zone_end_pfn``)."""
        return self.zone_start_pfn + self.spanned_pages

    @property
    def populated(self) -> bool:
        """True if there is memory in the zone (``populated_zone``)."""
        return self.present_pages > 0


def mem_pfn_ranges(memory: Iterable[MemblockRegion]) -> Iterator[Range]:
    """Whole pages of each memory region, as page frame numbers (``for_each_mem_pfn_range``)."""
    ranges = (Range(PFN_UP(region.base), PFN_DOWN(region.end)) for region in memory)
    return (r for r in ranges if r.start < r.end)


def zone_pfn_ranges(memory: Sequence[MemblockRegion], max_pfn: int) -> list[Range]:
    """Page frames that each zone may have; e820's RAM ends before page frame ``max_pfn``.

    The first zone starts with the first page of memory. Source: zone_sizes_init(), free_area_init().
    """
    start_pfn = PFN_UP(memory[0].base) if memory else 0
    ranges = []
    for limit in (MAX_DMA_PFN, MAX_DMA32_PFN, max_pfn):
        end_pfn = max(min(limit, max_pfn), start_pfn)
        ranges.append(Range(start_pfn, end_pfn))
        start_pfn = end_pfn
    return ranges


def free_area_init(memory: Sequence[MemblockRegion], max_pfn: int) -> list[Zone]:
    """The three zones for memblock's memory, still without managed pages.

    A zone spans no more than there is memory for, even if e820 has more (``mem=``).
    """
    pages = list(mem_pfn_ranges(memory))
    node_end_pfn = pages[-1].end if pages else 0
    zones = []
    for zone_type, (low, high) in zip(ZoneType, zone_pfn_ranges(memory, max_pfn), strict=True):
        end_pfn = max(min(high, node_end_pfn), low)
        present = sum(max(min(r.end, end_pfn) - max(r.start, low), 0) for r in pages)
        zones.append(Zone(zone_type, low, end_pfn - low, present))
    return zones


def setup_zone_wmarks(zones: Sequence[Zone], *, transparent_hugepage: bool) -> int:
    """Set watermarks and reserves from the managed pages of now; returns vm.min_free_kbytes.

    The kernel does this late, as initcalls after all CPUs are up; until then all watermarks are zero. With
    ``transparent_hugepage`` khugepaged raises them, unless the guest has less than 512 MiB.
    Source: init_per_zone_wmark_min(), hugepage_init().
    """
    lowmem_pages = sum(zone.managed_pages for zone in zones)
    min_free_kbytes = calculate_min_free_kbytes(lowmem_pages)
    setup_per_zone_wmarks(zones, min_free_kbytes)
    for node in {zone.node for zone in zones}:
        own = {zone.zone_type: zone for zone in zones if zone.node == node}
        reserves = lowmem_reserves([own[kind].managed_pages if kind in own else 0 for kind in ZoneType])
        for zone in own.values():
            zone.lowmem_reserve = reserves[zone.zone_type]
    if transparent_hugepage and lowmem_pages >= THP_MIN_PAGES:
        free_buffer_pages = sum(max(zone.managed_pages - zone.watermark.high, 0) for zone in zones)
        nr_zones = sum(zone.populated for zone in zones)
        min_free_kbytes = recommended_min_free_kbytes(min_free_kbytes, nr_zones, free_buffer_pages)
        setup_per_zone_wmarks(zones, min_free_kbytes)
    return min_free_kbytes


def setup_per_zone_wmarks(
    zones: Sequence[Zone], min_free_kbytes: int, scale_factor: int = WATERMARK_SCALE_FACTOR
) -> None:
    """Set all watermarks of all zones from vm.min_free_kbytes and vm.watermark_scale_factor."""
    lowmem_pages = sum(zone.managed_pages for zone in zones)
    for zone in zones:
        zone.watermark = zone_wmarks(min_free_kbytes, zone.managed_pages, lowmem_pages, scale_factor)


def totalreserve_pages(zones: Iterable[Zone]) -> int:
    """Pages that are never counted as available: of each zone its high watermark and its largest reserve.

    Source: calculate_totalreserve_pages().
    """
    return sum(
        min(max(zone.lowmem_reserve[zone.zone_type :]) + zone.watermark.high, zone.managed_pages) for zone in zones
    )


def zone_ranges_lines(memory: Sequence[MemblockRegion], max_pfn: int) -> list[str]:
    """dmesg: ``Zone ranges:`` and what follows, up to the line on movable zones (``free_area_init``)."""
    spans = [*zone_pfn_ranges(memory, max_pfn), Range(max_pfn, max_pfn)]
    lines = [f"  {name:<8} {_mem_text(*span)}" for name, span in zip((*ZONE_NAMES, "Device"), spans, strict=True)]
    return ["Zone ranges:", *lines, "Movable zone start for each node"]


def memory_node_lines(memory: Sequence[MemblockRegion]) -> list[str]:
    """dmesg: ``Early memory node ranges`` and the node's extent (``free_area_init``)."""
    ranges = list(mem_pfn_ranges(memory))
    lines = [f"  node   0: {_mem_text(r.start, r.end)}" for r in ranges]
    extent = _mem_text(ranges[0].start, ranges[-1].end) if ranges else "as memoryless"
    return ["Early memory node ranges", *lines, f"Initmem setup node 0 {extent}"]


def _mem_text(start_pfn: int, end_pfn: int) -> str:
    """A range as the kernel prints it, its end inclusive: ``[mem %#018Lx-%#018Lx]``."""
    if start_pfn == end_pfn:
        return "empty"
    return f"[mem {PFN_PHYS(start_pfn):#018x}-{PFN_PHYS(end_pfn) - 1:#018x}]"
