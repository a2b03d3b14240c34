"""Struct pages that are initialised late, and the memory that waits for them (mm/mm_init.c).

Of the last zone of each node one section is enough to start with; the rest is added when an allocation fails, and at
last by page_alloc_init_late(). Numbers are page frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from guest.ranges import RangeSet
from guest.units import PAGE_SHIFT, SZ_128M, round_down, round_up
from kernel.mmzone import Zone

PAGES_PER_SECTION = SZ_128M >> PAGE_SHIFT


def first_deferred_pfn(zone: Zone, memory: Iterable[tuple[int, int]]) -> int | None:
    """Where the deferred pages of a node's last zone begin: at a section, behind 32768 pages (``defer_init``).

    ``memory`` is ranges of page frames, ascending. None if nothing is deferred.
    """
    initialised = 0
    for region_start, region_end in memory:
        start, end = max(region_start, zone.zone_start_pfn), min(region_end, zone.end_pfn)
        pfn = round_up(max(start, start + PAGES_PER_SECTION - initialised), PAGES_PER_SECTION)
        if start < end and pfn < end:
            return pfn
        initialised += max(end - start, 0)
    return None


class DeferredPages:
    """What memblock left free behind ``first_deferred_pfn`` of each node. ``free`` gives a range to the free lists."""

    def __init__(self, free: Callable[[Zone, int, int], None]) -> None:
        self._free = free
        self._first: dict[int, int] = {}
        self._waiting: dict[int, RangeSet] = {}

    def prepare(self, zones: Sequence[Zone], memory: Sequence[tuple[int, int]]) -> None:
        """Find out where each node's deferred pages begin."""
        last = {zone.node: zone for zone in zones if zone.populated}
        for node, zone in last.items():
            first = first_deferred_pfn(zone, memory)
            if first is not None:
                self._first[node] = first

    def early(self, zone: Zone, start_pfn: int, end_pfn: int) -> int:
        """Keep what is deferred of a range of a zone; returns the end of what is not."""
        first = self._first.get(zone.node, end_pfn)
        if first >= end_pfn:
            return end_pfn
        self._waiting.setdefault(zone.node, RangeSet()).add(max(start_pfn, first), end_pfn)
        return max(start_pfn, first)

    def total(self) -> int:
        """Pages that wait."""
        return sum(pages.total() for pages in self._waiting.values())

    def grow(self, zone: Zone, order: int) -> bool:
        """Free whole sections of a zone until there are as many pages as asked for, a section at least.

        False if the zone has no deferred pages. Source: deferred_grow_zone().
        """
        waiting = self._waiting.get(zone.node)
        if not waiting or not zone.zone_start_pfn <= next(iter(waiting)).start < zone.end_pfn:
            return False
        needed, freed = round_up(1 << order, PAGES_PER_SECTION), 0
        while waiting and freed < needed:
            start, end = next(iter(waiting))
            end = min(end, round_down(start, PAGES_PER_SECTION) + PAGES_PER_SECTION)
            waiting.remove(start, end)
            self._free(zone, start, end)
            freed += end - start
        return True

    def init_late(self, zones: Sequence[Zone]) -> Iterator[int]:
        """Free all the rest, node by node; yields each node that had some (``deferred_init_memmap``)."""
        for node in sorted(self._first):
            zone = next(zone for zone in reversed(zones) if zone.node == node and zone.populated)
            for start, end in self._waiting.pop(node, RangeSet()):
                self._free(zone, start, end)
            yield node
        self._first.clear()
