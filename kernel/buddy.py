"""The free pages of one zone: what mm/page_alloc.c does under ``zone->lock``, and the per-CPU lists in front of it."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from enum import IntEnum

from guest.trace import Event
from guest.units import round_down, round_up
from kernel import fallback
from kernel.free_area import MAX_ORDER, NR_PAGE_ORDERS
from kernel.gfp import ALLOC_HIGHATOMIC, ALLOC_NOFRAGMENT, ALLOC_NON_BLOCK, ALLOC_OOM, ALLOC_WMARK_HIGH
from kernel.migratetype import (
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_PCPTYPES,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    Pageblocks,
)
from kernel.mm_rules import MmRules
from kernel.mmzone import Zone, ZoneType
from kernel.per_cpu_pages import PerCpuPages, TunedPages
from kernel.zone_watermark import wmark_pages, zone_watermark_ok

ORDER_BITS, TYPE_BITS = 4, 4


class RmqueueMode(IntEnum):
    """Where the last page was found, so that a bulk request goes on there (``enum rmqueue_mode``)."""

    NORMAL = 0
    CLAIM = 1
    STEAL = 2


class ZoneBuddy:
    """One zone's part of the page allocator.

    ``allocated`` is the allocator's table of pages in use: order, migrate type and number of the zone of each block.
    ``record`` takes the trace events.
    """

    def __init__(
        self, zone: Zone, number: int, pageblocks: Pageblocks, allocated: dict[int, int], rules: MmRules,
        record: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.zone, self.pageblocks, self.rules, self.record = zone, pageblocks, rules, record
        self.code = number << ORDER_BITS + TYPE_BITS
        self._allocated = allocated
        self.pagesets: list[PerCpuPages] = []
        """One for each CPU that is online."""
        self.below_high = False
        """ZONE_BELOW_HIGH: the high watermark was not met lately."""
        self.reclaim_active = False
        """ZONE_RECLAIM_ACTIVE: kswapd is at work."""
        self.boosted = False
        """ZONE_BOOSTED_WATERMARK: kswapd is to be woken."""
        self.pgalloc = 0
        """Pages handed out, but for those that the per-CPU lists count (``fast_allocs``)."""
        self.fresh = 0
        """Pages that came from memblock or were accepted (part of PGFREE)."""
        self.inactive_file = self.inactive_anon = 0
        """Pages of the page cache and of processes (NR_ZONE_INACTIVE_FILE, NR_ZONE_INACTIVE_ANON)."""
        self.numa_hit = self.numa_miss = self.numa_foreign = self.numa_local = self.numa_other = 0

    def add_cpu(self) -> None:
        """A pageset for one more CPU."""
        self.pagesets.append((TunedPages if self.rules.tunes_pcp else PerCpuPages)(self))

    def check_below_high(self) -> None:
        """The high watermark is met again?"""
        high = wmark_pages(self.zone, ALLOC_WMARK_HIGH)
        if self.below_high and zone_watermark_ok(self.zone, self.rules, 0, high, ZoneType.ZONE_MOVABLE):
            self.below_high = False

    # Free pages.

    def free_one_page(self, pfn: int, order: int, migratetype: int, *, to_tail: bool) -> None:
        """Free a block and join it with its buddy as often as possible (``__free_one_page``).

        Unless ``to_tail``, it goes to the head of its list, or to the tail if it is likely to be joined soon
        (``buddy_merge_likely``): then it should not be handed out first. A pageblock of the reserve joins no other.
        """
        area = self.zone.free_area
        self.zone.nr_free_pages += 1 << order
        while order < MAX_ORDER:
            buddy = pfn ^ (1 << order)
            if area.buddy_order(buddy) != order:
                break
            if order >= PAGEBLOCK_ORDER:
                buddy_type = self.pageblocks.get(buddy)
                if buddy_type != migratetype:
                    if max(buddy_type, migratetype) >= MIGRATE_PCPTYPES:
                        break
                    self.pageblocks.set(buddy, migratetype, order)
            area.remove(buddy)
            pfn &= buddy
            order += 1
        area.add(pfn, order, migratetype, to_tail=to_tail or self._merge_likely(pfn, order))

    def _merge_likely(self, pfn: int, order: int) -> bool:
        """True if the buddy of the block of twice the size is free, so that one more free joins all four parts."""
        if order >= MAX_ORDER - 1:
            return False
        return self.zone.free_area.buddy_order((pfn & ~(1 << order)) ^ (2 << order)) == order + 1

    def free_to_lists(self, pfn: int, order: int, *, to_tail: bool = False) -> None:
        """Free a block, each pageblock of it to the lists of its own type (``split_large_buddy``)."""
        step = min(order, PAGEBLOCK_ORDER)
        for start in range(pfn, pfn + (1 << order), 1 << step):
            self.free_one_page(start, step, self.pageblocks.get(start), to_tail=to_tail)

    # Pages to hand out.

    def rmqueue(
        self, order: int, migratetype: int, alloc_flags: int, mode: RmqueueMode = RmqueueMode.NORMAL
    ) -> tuple[int | None, RmqueueMode]:
        """Take a block, of another type if there is none of this one; and where it was found (``__rmqueue``)."""
        area = self.zone.free_area
        pfn = None
        if mode == RmqueueMode.NORMAL:
            pfn = area.rmqueue_smallest(order, migratetype)
        if pfn is None and self.rules.claims:
            pfn, mode = self._claim_or_steal(order, migratetype, alloc_flags, mode)
        elif pfn is None:
            while pfn is None and fallback.move_fallback(self, order, migratetype, alloc_flags):
                pfn = area.rmqueue_smallest(order, migratetype)
        if pfn is not None:
            self.zone.nr_free_pages -= 1 << order
        return pfn, mode

    def _claim_or_steal(
        self, order: int, migratetype: int, alloc_flags: int, mode: RmqueueMode
    ) -> tuple[int | None, RmqueueMode]:
        if mode != RmqueueMode.STEAL:
            pfn = fallback.claim(self, order, migratetype, alloc_flags)
            if pfn is not None:
                return pfn, RmqueueMode.NORMAL
        if not alloc_flags & ALLOC_NOFRAGMENT:
            pfn = fallback.steal(self, order, migratetype)
            if pfn is not None:
                return pfn, RmqueueMode.STEAL
        return None, mode

    def rmqueue_bulk(
        self, order: int, count: int, migratetype: int, alloc_flags: int, pages: MutableSequence[int]
    ) -> int:
        """Take up to ``count`` blocks to the tail of a list; how many there were."""
        mode = RmqueueMode.NORMAL
        for done in range(count):
            pfn, mode = self.rmqueue(order, migratetype, alloc_flags, mode)
            if pfn is None:
                return done
            pages.append(pfn)
        return count

    def rmqueue_buddy(self, order: int, migratetype: int, alloc_flags: int) -> int | None:
        """Take a block from the free lists, or from the reserve if the request may use it."""
        pfn = None
        if alloc_flags & ALLOC_HIGHATOMIC:
            pfn = self._rmqueue_reserve(order)
        if pfn is None:
            pfn, _ = self.rmqueue(order, migratetype, alloc_flags)
        if pfn is None and alloc_flags & (ALLOC_OOM | (ALLOC_NON_BLOCK if self.rules.claims else 0)):
            pfn = self._rmqueue_reserve(order)
        return pfn

    def _rmqueue_reserve(self, order: int) -> int | None:
        pfn = self.zone.free_area.rmqueue_smallest(order, MIGRATE_HIGHATOMIC)
        if pfn is not None:
            self.zone.nr_free_pages -= 1 << order
        return pfn

    # Pageblocks.

    def count_pageblock(self, pfn: int) -> tuple[int, int] | None:
        """Free and movable pages of a page's pageblock; None if it reaches beyond the zone.

        Movable are those that were allocated so (``prep_move_freepages_block``; PageLRU there).
        """
        start = round_down(pfn, PAGEBLOCK_NR_PAGES)
        end = start + PAGEBLOCK_NR_PAGES
        if start < self.zone.zone_start_pfn or end > self.zone.end_pfn:
            return None
        free = sum(1 << order for _, order in self.zone.free_area.free_in_pageblock(start))
        movable = 0
        for page in range(start, end):
            code = self._allocated.get(page)
            if code is not None and code >> ORDER_BITS & (1 << TYPE_BITS) - 1 == MIGRATE_MOVABLE:
                movable += 1 << (code & (1 << ORDER_BITS) - 1)
        return free, movable

    def move_freepages_block(self, pfn: int, migratetype: int, *, set_type: bool = True) -> bool:
        """Move the free pages of a page's pageblock to another type's lists; False beyond the zone."""
        area, start = self.zone.free_area, round_down(pfn, PAGEBLOCK_NR_PAGES)
        if start < self.zone.zone_start_pfn or start + PAGEBLOCK_NR_PAGES > self.zone.end_pfn:
            return False
        for page, order in list(area.free_in_pageblock(start)):
            area.remove(page)
            area.add(page, order, migratetype, to_tail=True)
        if set_type:
            self.pageblocks.set(start, migratetype)
        return True

    def reserve_highatomic_pageblock(self, pfn: int, order: int) -> None:
        """Keep the rest of a pageblock for requests of high order that cannot wait: up to about 1 % of the zone."""
        percent = self.zone.managed_pages // 100
        most = percent + PAGEBLOCK_NR_PAGES
        if self.rules.claims:  # 6.12: no pageblock in a small zone
            most = round_up(percent, PAGEBLOCK_NR_PAGES) if percent >= PAGEBLOCK_NR_PAGES else 0
        if self.zone.nr_reserved_highatomic >= most:
            return
        if self.pageblocks.get(pfn) >= MIGRATE_PCPTYPES:
            return
        if order >= PAGEBLOCK_ORDER:
            self.pageblocks.set(pfn, MIGRATE_HIGHATOMIC, order)
        elif not self.move_freepages_block(pfn, MIGRATE_HIGHATOMIC):
            return
        self.zone.nr_reserved_highatomic += max(1 << order, PAGEBLOCK_NR_PAGES)

    def unreserve_highatomic_pageblock(self, migratetype: int, *, force: bool) -> bool:
        """Give a pageblock of the reserve to a migrate type; all but the last one unless ``force``."""
        zone, area = self.zone, self.zone.free_area
        if not force and zone.nr_reserved_highatomic <= PAGEBLOCK_NR_PAGES:
            return False
        for order in range(NR_PAGE_ORDERS):
            pfn = area.first(order, MIGRATE_HIGHATOMIC)
            if pfn is None:
                continue
            zone.nr_reserved_highatomic -= min(max(PAGEBLOCK_NR_PAGES, 1 << order), zone.nr_reserved_highatomic)
            if order < PAGEBLOCK_ORDER:
                return self.move_freepages_block(pfn, migratetype)
            area.take(order, MIGRATE_HIGHATOMIC)
            area.add(pfn, order, migratetype, to_tail=True)
            self.pageblocks.set(pfn, migratetype, order)
            return True
        return False
