"""Zones: DMA below 16 MiB, DMA32 below 4 GiB, Normal above (arch/x86/mm/init.c, mm/mm_init.c).

Every node has its own zones. Zone Movable is there on nodes where the command line asks for it; zone Device exists in
the kernel but is empty here, and shows only where the kernel prints its name or counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from guest.ranges import Range, RangeSet
from guest.units import PAGE_SHIFT, PFN_DOWN, PFN_PHYS, PFN_UP, SZ_4G, SZ_16M
from kernel.free_area import BlockRuns, FreeArea
from kernel.memblock_type import MemblockRegion
from kernel.watermark import (
    LOWMEM_RESERVE_RATIO,
    WATERMARK_SCALE_FACTOR,
    Watermarks,
    calculate_min_free_kbytes,
    lowmem_reserves,
    movable_zone_wmarks,
    recommended_min_free_kbytes,
    zone_wmarks,
)

MAX_DMA_PFN = PFN_DOWN(SZ_16M)
MAX_DMA32_PFN = PFN_DOWN(SZ_4G)
MAX_NR_ZONES = len(LOWMEM_RESERVE_RATIO)
_SECTION = 27 - PAGE_SHIFT
"""SECTION_SIZE_BITS, in page frames."""
THP_MIN_PAGES = 512 << 20 - PAGE_SHIFT
"""Transparent huge pages are off in a guest with less memory: 512 MiB."""


class ZoneType(IntEnum):
    """``enum zone_type``."""

    ZONE_DMA = 0
    ZONE_DMA32 = 1
    ZONE_NORMAL = 2
    ZONE_MOVABLE = 3


ZONE_NAMES = ("DMA", "DMA32", "Normal", "Movable", "Device")


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


def nodes_of(memory: Iterable[MemblockRegion]) -> list[int]:
    """Numbers of the nodes with memory, ascending."""
    return sorted({node_of(region) for region in memory})


def node_of(region: MemblockRegion) -> int:
    """The region's node; memory that has none yet belongs to node 0."""
    return max(region.nid, 0)


def pfn_range_for_nid(memory: Iterable[MemblockRegion], nid: int) -> Range:
    """First page frame of the node and the one behind its last; 0 and 0 if it has no memory."""
    pages = list(mem_pfn_ranges(region for region in memory if node_of(region) == nid))
    return Range(pages[0].start, pages[-1].end) if pages else Range(0, 0)


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


def free_area_init(
    memory: Sequence[MemblockRegion], max_pfn: int, movable_pfn: Mapping[int, int] | None = None
) -> list[Zone]:
    """The zones of every node for memblock's memory, still without managed pages, node by node.

    ``movable_pfn`` is the first page frame of ZONE_MOVABLE by node. A zone spans no more than its node has memory
    for, even if e820 has more (``mem=``).
    """
    zones: list[Zone] = []
    for nid in nodes_of(memory) or [0]:
        zones += _node_zones(memory, max_pfn, nid, (movable_pfn or {}).get(nid, 0))
    return zones


def _node_zones(memory: Sequence[MemblockRegion], max_pfn: int, nid: int, movable_pfn: int) -> Iterator[Zone]:
    """A node's zones (calculate_node_totalpages(), zone_spanned_pages_in_node())."""
    pages = list(mem_pfn_ranges(region for region in memory if node_of(region) == nid))
    node = pfn_range_for_nid(memory, nid)
    spans = [_clamp(node, span) for span in zone_pfn_ranges(memory, max_pfn)]
    if movable_pfn:
        spans = [Range(min(span.start, movable_pfn), min(span.end, movable_pfn)) for span in spans]
        spans.append(Range(movable_pfn, max(node.end, movable_pfn)))
    for zone_type, (low, high) in zip(ZoneType, spans, strict=False):
        present = sum(max(min(r.end, high) - max(r.start, low), 0) for r in pages)
        yield Zone(zone_type, low, high - low, present, node=nid)


def _clamp(node: Range, span: Range) -> Range:
    """What the node has of a zone's span; an empty piece lies at the span's border."""
    start = min(max(node.start, span.start), span.end)
    return Range(start, max(min(node.end, span.end), start))


def unavailable_ranges(memory: Sequence[MemblockRegion], zones: Sequence[Zone]) -> Iterator[tuple[int, str, int]]:
    """Node, zone and number of the page frames in front of each range of memory that have struct pages but no memory.

    Only sections of 128 MiB in which there is memory have struct pages. Source: memmap_init().
    """
    sections = RangeSet((r.start >> _SECTION, (r.end - 1 >> _SECTION) + 1) for r in mem_pfn_ranges(memory))
    hole_pfn, node, name, end_pfn = 0, 0, "", 0
    for region in memory:
        start, end_pfn, node = PFN_UP(region.base), PFN_DOWN(region.end), node_of(region)
        for zone in zones:
            low, high = max(start, zone.zone_start_pfn), min(end_pfn, zone.end_pfn)
            if zone.node != node or low >= high:
                continue
            if hole_pfn < low:
                yield node, zone.name, _with_struct_page(hole_pfn, low, sections)
            hole_pfn, name = high, zone.name
    yield node, name, _with_struct_page(hole_pfn, -(-end_pfn >> _SECTION) << _SECTION, sections)


def _with_struct_page(start_pfn: int, end_pfn: int, sections: RangeSet) -> int:
    """Number of page frames in the range that lie in ``sections``."""
    touched = sections.within(start_pfn >> _SECTION, (end_pfn - 1 >> _SECTION) + 1)
    return sum(min(end_pfn, s.end << _SECTION) - max(start_pfn, s.start << _SECTION) for s in touched)


def setup_zone_wmarks(zones: Sequence[Zone], *, transparent_hugepage: bool) -> int:
    """Set watermarks and reserves from the managed pages of now; returns vm.min_free_kbytes.

    The kernel does this late, as initcalls after all CPUs are up; until then all watermarks are zero. With
    ``transparent_hugepage`` khugepaged raises them, unless the guest has less than 512 MiB.
    Source: init_per_zone_wmark_min(), hugepage_init().
    """
    lowmem_pages = _lowmem_pages(zones)
    min_free_kbytes = calculate_min_free_kbytes(lowmem_pages)
    setup_per_zone_wmarks(zones, min_free_kbytes)
    setup_per_zone_lowmem_reserve(zones)
    if transparent_hugepage and sum(zone.managed_pages for zone in zones) >= THP_MIN_PAGES:
        free_buffer_pages = sum(
            max(zone.managed_pages - zone.watermark.high, 0) for zone in zones if zone.zone_type < ZoneType.ZONE_MOVABLE
        )
        nr_zones = sum(zone.populated for zone in zones if zone.zone_type < ZoneType.ZONE_MOVABLE)
        min_free_kbytes = recommended_min_free_kbytes(min_free_kbytes, nr_zones, free_buffer_pages)
        setup_per_zone_wmarks(zones, min_free_kbytes)
    return min_free_kbytes


def setup_per_zone_wmarks(
    zones: Sequence[Zone], min_free_kbytes: int, scale_factor: int = WATERMARK_SCALE_FACTOR
) -> None:
    """Set watermarks from vm.min_free_kbytes and vm.watermark_scale_factor (``setup_per_zone_wmarks``)."""
    lowmem_pages = _lowmem_pages(zones)
    for zone in zones:
        managed = zone.managed_pages
        if zone.zone_type == ZoneType.ZONE_MOVABLE:
            zone.watermark = movable_zone_wmarks(min_free_kbytes, managed, lowmem_pages, scale_factor)
        else:
            zone.watermark = zone_wmarks(min_free_kbytes, managed, lowmem_pages, scale_factor)


def setup_per_zone_lowmem_reserve(zones: Sequence[Zone]) -> None:
    """Set what each zone of a node keeps back from requests for higher ones."""
    for nid in {zone.node for zone in zones}:
        node = [zone for zone in zones if zone.node == nid]
        for zone, reserve in zip(node, lowmem_reserves([zone.managed_pages for zone in node]), strict=False):
            zone.lowmem_reserve = reserve


def _lowmem_pages(zones: Iterable[Zone]) -> int:
    """Managed pages that the kernel's own data may use: all but those of zone Movable."""
    return sum(zone.managed_pages for zone in zones if zone.zone_type != ZoneType.ZONE_MOVABLE)


def totalreserve_pages(zones: Iterable[Zone]) -> int:
    """Pages that are never counted as available: of each zone its high watermark and its largest reserve.

    Source: calculate_totalreserve_pages().
    """
    return sum(
        min(max(zone.lowmem_reserve[zone.zone_type :]) + zone.watermark.high, zone.managed_pages) for zone in zones
    )


def zone_ranges_lines(
    memory: Sequence[MemblockRegion], max_pfn: int, movable_pfn: Mapping[int, int] | None = None
) -> list[str]:
    """dmesg: ``Zone ranges:`` and what follows, up to where zone Movable starts (``free_area_init``)."""
    spans = [*zone_pfn_ranges(memory, max_pfn), Range(max_pfn, max_pfn)]
    names = (name for kind, name in enumerate(ZONE_NAMES) if kind != ZoneType.ZONE_MOVABLE)
    lines = [f"  {name:<8} {_mem_text(*span)}" for name, span in zip(names, spans, strict=True)]
    starts = [f"  Node {nid}: {PFN_PHYS(pfn):#018x}" for nid, pfn in sorted((movable_pfn or {}).items())]
    return ["Zone ranges:", *lines, "Movable zone start for each node", *starts]


def memory_node_lines(memory: Sequence[MemblockRegion]) -> list[str]:
    """dmesg: ``Early memory node ranges`` and each node's extent (``free_area_init``)."""
    lines = [
        f"  node {node_of(region):3}: {_mem_text(r.start, r.end)}"
        for region in memory
        for r in mem_pfn_ranges([region])
    ]
    extents = []
    for nid in nodes_of(memory) or [0]:
        extent = pfn_range_for_nid(memory, nid)
        extents.append(f"Initmem setup node {nid} {_mem_text(*extent) if extent.size else 'as memoryless'}")
    return ["Early memory node ranges", *lines, *extents]


def _mem_text(start_pfn: int, end_pfn: int) -> str:
    """A range as the kernel prints it, its end inclusive: ``[mem %#018Lx-%#018Lx]``."""
    if start_pfn == end_pfn:
        return "empty"
    return f"[mem {PFN_PHYS(start_pfn):#018x}-{PFN_PHYS(end_pfn) - 1:#018x}]"
