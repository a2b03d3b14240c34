"""A page allocator looked at page by page: where each page frame of a guest is, and what must hold of it."""

from __future__ import annotations

from guest.units import PFN_PHYS
from kernel.free_area import MAX_ORDER, MAX_ORDER_NR_PAGES
from kernel.migratetype import MIGRATE_HIGHATOMIC, MIGRATE_PCPTYPES, MIGRATE_TYPES, PAGEBLOCK_ORDER
from kernel.page_alloc import PageAllocator
from kernel.per_cpu_pages import pindex_to_order

FREE, PCP, USED, UNACCEPTED, WAITING = range(1, 6)


class PageModel:
    """A byte for each page frame says where the page is; it is made anew for each look."""

    def __init__(self, allocator: PageAllocator, nr_pages: int, *, lists_are_pure: bool) -> None:
        self.allocator, self.nr_pages, self.lists_are_pure = allocator, nr_pages, lists_are_pure
        self.owner = bytearray(nr_pages)
        self.used: dict[int, int] = {}
        """What the test has allocated: order by first page."""

    def put(self, start: int, end: int, what: int) -> None:
        """Mark pages; none may be marked already."""
        assert self.owner.count(0, start, end) == end - start, f"pages {start:#x}..{end:#x} are in two places"
        self.owner[start:end] = bytes([what]) * (end - start)

    def check(self) -> None:
        """Every page is in one place; counters, alignment, buddies and types are as they should be."""
        self.owner = bytearray(self.nr_pages)
        for buddy in self.allocator.buddies:
            self._zone(buddy)
        for pfn, order in self.used.items():
            self.put(pfn, pfn + (1 << order), USED)
        for waiting in self.allocator.deferred._waiting.values():
            for start, end in waiting:
                self.put(start, end, WAITING)
        managed = sum(zone.managed_pages for zone in self.allocator.zones)
        assert managed == self.nr_pages - self.owner.count(0) - self.owner.count(WAITING)

    def _zone(self, buddy) -> None:
        zone, area = buddy.zone, buddy.zone.free_area
        free, reserve = 0, 0
        for order in filter(area.nr_free, range(MAX_ORDER + 1)):
            for migratetype in range(MIGRATE_TYPES):
                blocks = list(area.blocks(order, migratetype))
                assert area.nr_free(order, migratetype) == sum(end - start for start, end in blocks) >> order
                for start, end in blocks:
                    assert start % (1 << order) == 0
                    assert zone.zone_start_pfn <= start < end <= zone.end_pfn
                    self.put(start, end, FREE)
                    free += end - start
                    reserve += end - start if migratetype == MIGRATE_HIGHATOMIC else 0
                    self._block(buddy, start, order, migratetype)
        for start, end in zone.unaccepted_pages.runs():
            assert start % MAX_ORDER_NR_PAGES == end % MAX_ORDER_NR_PAGES == 0
            self.put(start, end, UNACCEPTED)
        unaccepted = len(zone.unaccepted_pages) * MAX_ORDER_NR_PAGES
        assert zone.nr_unaccepted == unaccepted
        assert zone.nr_free_pages == free + unaccepted
        assert area.nr_free_highatomic == reserve <= zone.nr_reserved_highatomic
        for pcp in buddy.pagesets:
            count = 0
            for pindex, pages in enumerate(pcp.lists):
                order = pindex_to_order(pindex)
                for pfn in pages:
                    self.put(pfn, pfn + (1 << order), PCP)
                count += len(pages) << order
            assert pcp.count == count

    def _block(self, buddy, pfn: int, order: int, migratetype: int) -> None:
        """A free block is on the list of its pageblock's type, and its buddy is not free too."""
        if order == MAX_ORDER:
            return
        types = self.allocator.pageblocks
        if self.lists_are_pure:
            assert types.get(pfn) == migratetype
        assert buddy.zone.free_area.buddy_order(pfn) == order
        other = pfn ^ (1 << order)
        if pfn < other and buddy.zone.free_area.buddy_order(other) == order:
            kinds = {types.get(pfn), types.get(other)}
            assert order >= PAGEBLOCK_ORDER and len(kinds) == 2 and max(kinds) >= MIGRATE_PCPTYPES

    def accepted(self, unaccepted) -> None:
        """What is free, in use or on a CPU's list is accepted, with the guard behind it."""
        pfn = 0
        while pfn < self.nr_pages:
            what, start = self.owner[pfn], pfn
            while pfn < self.nr_pages and self.owner[pfn] == what:
                pfn += 1
            if what in (FREE, PCP, USED):
                assert not unaccepted.range_contains_unaccepted_memory(PFN_PHYS(start), PFN_PHYS(pfn))
