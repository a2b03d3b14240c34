"""Per-CPU lists of free pages of a zone (``struct per_cpu_pages``, mm/page_alloc.c); counts are pages.

6.3's are here, and 6.12's, which tune themselves.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from guest.units import PAGE_SHIFT, SZ_1M
from kernel.migratetype import MIGRATE_MOVABLE, MIGRATE_PCPTYPES, PAGEBLOCK_ORDER

if TYPE_CHECKING:
    from kernel.buddy import ZoneBuddy

PAGE_ALLOC_COSTLY_ORDER = 3
NR_LOWORDER_PCP_LISTS = MIGRATE_PCPTYPES * (PAGE_ALLOC_COSTLY_ORDER + 1)
NR_PCP_LISTS = NR_LOWORDER_PCP_LISTS + 2
PCP_BATCH_SCALE_MAX = 5
"""CONFIG_PCP_BATCH_SCALE_MAX."""
MIN_PERCPU_PAGELIST_HIGH_FRACTION = 8


def pcp_allowed_order(order: int) -> bool:
    """True if per-CPU lists hold blocks of this order: up to 3, and huge pages."""
    return order <= PAGE_ALLOC_COSTLY_ORDER or order == PAGEBLOCK_ORDER


def order_to_pindex(migratetype: int, order: int) -> int:
    """Number of the list for blocks of an order and a migrate type."""
    if order > PAGE_ALLOC_COSTLY_ORDER:
        return NR_LOWORDER_PCP_LISTS + (migratetype == MIGRATE_MOVABLE)
    return MIGRATE_PCPTYPES * order + migratetype


def pindex_to_order(pindex: int) -> int:
    """Order of the blocks on a list."""
    return PAGEBLOCK_ORDER if pindex >= NR_LOWORDER_PCP_LISTS else pindex // MIGRATE_PCPTYPES


def zone_batchsize(managed_pages: int) -> int:
    """How many pages go to or come from the free lists at once; never 0 (``zone_batchsize``)."""
    batch = max(min(managed_pages >> 10, SZ_1M >> PAGE_SHIFT) // 4, 1)
    return max((1 << (batch + batch // 2).bit_length() - 1) - 1, 1)


def zone_highsize(total_pages: int, batch: int, cpus: int) -> int:
    """Size of a CPU's list if ``total_pages`` are split among ``cpus`` (``zone_highsize``)."""
    return max(total_pages // cpus, batch << 2)


class PerCpuPages:
    """One CPU's lists of one zone, as 6.3 has them. Until :meth:`update` they hold nothing (the boot pageset)."""

    __slots__ = ("_buddy", "alloc_factor", "batch", "count", "fast_allocs", "free_count", "high", "lists")

    def __init__(self, buddy: ZoneBuddy) -> None:
        self._buddy = buddy
        self.count = 0
        self.high = 0
        self.batch = 1
        self.alloc_factor = 0
        self.free_count = 0
        """Frees in a row, halved by each allocation; 6.3's ``free_factor`` is the doublings of the batch."""
        self.fast_allocs = 0
        """Pages that were allocated without a look at anything but these lists."""
        self.lists: tuple[deque[int], ...] = tuple(deque() for _ in range(NR_PCP_LISTS))

    def update(self, low_wmark: int, managed_pages: int, cpus: int) -> None:
        """Set batch and high anew, from the zone's low watermark or size (``zone_set_pageset_high_and_batch``)."""
        self.batch = zone_batchsize(managed_pages)
        self.high = zone_highsize(low_wmark, self.batch, cpus)

    def rmqueue(self, order: int, migratetype: int, alloc_flags: int) -> int | None:
        """Take a block off a list, which is filled first if it is empty (``rmqueue_pcplist``)."""
        self.free_count >>= 1
        pages = self.lists[order_to_pindex(migratetype, order)]
        if not pages:
            got = self._buddy.rmqueue_bulk(order, self._nr_alloc(order), migratetype, alloc_flags, pages)
            self.count += got << order
            if not pages:
                return None
        self.count -= 1 << order
        return pages.popleft()

    def free(self, pfn: int, migratetype: int, order: int) -> None:
        """Put a block at the head of a list; a list that is full gives some back (``free_unref_page_commit``)."""
        pindex = order_to_pindex(migratetype, order) if order else migratetype
        self.lists[pindex].appendleft(pfn)
        count = self.count = self.count + (1 << order)
        free_high = order and order <= PAGE_ALLOC_COSTLY_ORDER and self.free_count
        if count >= self.high or free_high or self._buddy.reclaim_active:
            self._drain_some(pindex, bool(free_high))

    def _drain_some(self, pindex: int, free_high: bool) -> None:
        """Give back what is too much; all, if blocks of a higher order are freed one after the other."""
        high = min(self.batch << 2, self.high) if self._buddy.reclaim_active else self.high
        if free_high:
            self.free_bulk(self.count, pindex)
        elif self.count >= high:
            self.free_bulk(self._nr_free(high), pindex)

    def _nr_alloc(self, order: int) -> int:
        return max(self.batch >> order, 2) if self.batch > 1 else 1

    def _nr_free(self, high: int) -> int:
        """A batch, twice as many with each free that no allocation came between (``nr_pcp_free``)."""
        if high < self.batch:
            return 1
        batch, most = self.batch << self.free_count, high - self.batch
        if batch < most:
            self.free_count += 1
        return min(max(batch, self.batch), most)

    def free_bulk(self, count: int, pindex: int = 0) -> None:
        """Give ``count`` pages back, from list ``pindex`` on, those that were freed first (``free_pcppages_bulk``)."""
        count = min(count, self.count)
        while count > 0:
            pages = self.lists[pindex]
            order = pindex_to_order(pindex)
            while pages and count > 0:
                count -= 1 << order
                self.count -= 1 << order
                self._buddy.free_to_lists(pages.pop(), order)
            pindex = (pindex + 1) % NR_PCP_LISTS

    def drain(self) -> None:
        """Give everything back, in large steps (``drain_pages_zone``)."""
        while self.count:
            self.free_bulk(min(self.count, self.batch << PCP_BATCH_SCALE_MAX))


class TunedPages(PerCpuPages):
    """The same of 6.12: ``high`` moves between ``high_min`` and ``high_max``, batches grow with their use."""

    __slots__ = ("_freed_high_order", "high_max", "high_min")

    def __init__(self, buddy: ZoneBuddy) -> None:
        super().__init__(buddy)
        self.high_min = self.high_max = 0
        self._freed_high_order = False

    def update(self, low_wmark: int, managed_pages: int, cpus: int) -> None:
        self.batch = zone_batchsize(managed_pages)
        self.high_min = zone_highsize(low_wmark, self.batch, cpus)
        self.high_max = zone_highsize(managed_pages // MIN_PERCPU_PAGELIST_HIGH_FRACTION, self.batch, cpus)
        self.high = min(self.high, self.high_max)

    def _clamped(self) -> int:
        self.high = min(max(self.high, self.high_min), self.high_max)
        return self.high

    def _nr_alloc(self, order: int) -> int:
        """``nr_pcp_alloc``."""
        base, high = self.batch, self._clamped()
        if high < base:
            return 1
        batch = base if order else base << self.alloc_factor
        if self.high_min != self.high_max and not self._buddy.below_high:
            high = self.high = min(high + batch, self.high_max)
        if not order:
            most = max(high - self.count - base, base)
            if batch <= most and self.alloc_factor < PCP_BATCH_SCALE_MAX:
                self.alloc_factor += 1
            batch = min(batch, most)
        return max(batch >> order, 2) if batch > 1 else batch

    def free(self, pfn: int, migratetype: int, order: int) -> None:
        self.alloc_factor >>= 1
        free_high = self._freed_high_order
        self._freed_high_order = 0 < order <= PAGE_ALLOC_COSTLY_ORDER
        pindex = order_to_pindex(migratetype, order) if order else migratetype
        self.lists[pindex].appendleft(pfn)
        count = self.count = self.count + (1 << order)
        free_high = free_high and self._freed_high_order and self.free_count >= self.batch
        if self.free_count < self.batch << PCP_BATCH_SCALE_MAX:
            self.free_count += 1 << order
        if count >= self.high or free_high or self._buddy.below_high or self._buddy.reclaim_active:
            self._drain_some(pindex, free_high)

    def _drain_some(self, pindex: int, free_high: bool) -> None:
        high = self._nr_high(free_high)
        if self.count >= high:
            if free_high:
                count = min(self.count, self.batch << PCP_BATCH_SCALE_MAX)
            else:
                count = 1 if high < self.batch else min(max(self.free_count, self.batch), high - self.batch)
            self.free_bulk(count, pindex)
            self._buddy.check_below_high()

    def _nr_high(self, free_high: bool) -> int:
        """How many pages may stay (``nr_pcp_high``)."""
        high = self._clamped()
        if not high:
            return 0
        if free_high:
            self.high = max(high - (self.batch << PCP_BATCH_SCALE_MAX), self.high_min)
            return 0
        free_count = max(self.free_count, self.batch)
        if self._buddy.reclaim_active:
            self.high = max(high - free_count, self.high_min)
            return min(self.batch << 2, self.high)
        if self.high_min == self.high_max:
            return high
        if self._buddy.below_high:
            self.high = max(high - free_count, self.high_min)
            return max(self.count, self.high_min)
        if self.count >= high:
            self.high = max(self.high, min(max(self.free_count + self.batch, self.high_min), self.high_max))
        return high
