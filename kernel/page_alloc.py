"""The page allocator with the list of unaccepted blocks (mm/page_alloc.c with v9 02/14 and 04/14).

One migrate type, one CPU, no per-CPU lists, no reclaim. ``MAX_ORDER`` is inclusive, as in the tree the series is
based on. Page frames are named by their number (pfn).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Literal

from guest.ranges import RangeSet
from guest.units import PAGE_SIZE, PFN_DOWN, PFN_PHYS, memparse, round_down, round_up
from kernel.free_area import MAX_ORDER, MAX_ORDER_NR_PAGES, NR_PAGE_ORDERS, page_blocks
from kernel.mmzone import Zone, ZoneType
from kernel.unaccepted_memory import UnacceptedMemory

MAX_ORDER_SIZE = PAGE_SIZE << MAX_ORDER
_SPACES = " \t\n\v\f\r"


def watermark_unusable_free(zone: Zone, order: int) -> int:
    """Free pages that a request of ``order`` cannot count on (v9: ``__zone_watermark_unusable_free``)."""
    return (1 << order) - 1 + zone.nr_unaccepted


def zone_watermark_ok(zone: Zone, order: int, mark: int) -> bool:
    """True if a block of ``order`` can be taken and more than ``mark`` usable pages stay free.

    The request may use zone Normal, so lower zones keep their reserve. Source: __zone_watermark_ok().
    """
    free_pages = zone.nr_free_pages - watermark_unusable_free(zone, order)
    if free_pages <= mark + zone.lowmem_reserve[ZoneType.ZONE_NORMAL]:
        return False
    return order == 0 or any(zone.free_area.nr_free(o) for o in range(order, NR_PAGE_ORDERS))


class PageAllocator:
    """Buddy allocator over ``zones``.

    With ``lazy`` (``accept_memory=lazy``) whole blocks of unaccepted memory wait on ``zone.unaccepted_pages``
    until they are needed; otherwise all memory is accepted when it is freed for the first time.
    """

    def __init__(self, zones: Sequence[Zone], unaccepted: UnacceptedMemory, *, lazy: bool) -> None:
        self.zones = tuple(zones)
        self.build_all_zonelists()
        self._unaccepted = unaccepted
        self._lazy = lazy
        self._managed = RangeSet()
        self._allocated: dict[int, int] = {}

    def build_all_zonelists(self) -> None:
        """Find out which zones have memory."""
        self._zonelist = tuple(zone for zone in reversed(self.zones) if zone.populated)

    # Memory from memblock.

    def free_pages_core(self, start_pfn: int, end_pfn: int) -> None:
        """Take the pages ``[start_pfn, end_pfn)`` over from memblock; they become managed and free.

        They are cut into the largest naturally aligned blocks, ascending. A block with unaccepted memory is
        accepted now, unless it is of ``MAX_ORDER`` and acceptance is lazy: then it goes to the tail of the
        zone's unaccepted list. Source: __free_pages_memory(), __free_pages_core().
        """
        if self._managed.overlaps(start_pfn, end_pfn):
            raise ValueError(f"pages [{start_pfn:#x}, {end_pfn:#x}): some are managed already")
        slices = list(self._zone_slices(start_pfn, end_pfn))
        self._managed.add(start_pfn, end_pfn)
        for zone, low_pfn, high_pfn in slices:
            zone.managed_pages += high_pfn - low_pfn
            first = min(round_up(low_pfn, MAX_ORDER_NR_PAGES), high_pfn)
            last = max(round_down(high_pfn, MAX_ORDER_NR_PAGES), first)
            self._free_small_blocks(zone, low_pfn, first)
            self._free_max_order_blocks(zone, first, last)
            self._free_small_blocks(zone, last, high_pfn)

    def _zone_slices(self, start_pfn: int, end_pfn: int) -> Iterator[tuple[Zone, int, int]]:
        """``[start_pfn, end_pfn)`` cut at zone borders; ``ValueError`` if some page is in no zone."""
        while start_pfn < end_pfn:
            zone = self._page_zone(start_pfn)
            yield zone, start_pfn, min(end_pfn, zone.end_pfn)
            start_pfn = zone.end_pfn

    def _page_zone(self, pfn: int) -> Zone:
        for zone in self._zonelist:
            if zone.zone_start_pfn <= pfn < zone.end_pfn:
                return zone
        raise ValueError(f"page {pfn:#x}: it is in no zone")

    def _free_small_blocks(self, zone: Zone, start_pfn: int, end_pfn: int) -> None:
        """Free less than a ``MAX_ORDER`` block; what is unaccepted is accepted at once."""
        for pfn, order in page_blocks(start_pfn, end_pfn):
            start, end = PFN_PHYS(pfn), PFN_PHYS(pfn + (1 << order))
            if self._unaccepted.range_contains_unaccepted_memory(start, end):
                self._unaccepted.accept_memory(start, end)
            self._free_one_page(zone, pfn, order, to_tail=True)

    def _free_max_order_blocks(self, zone: Zone, start_pfn: int, end_pfn: int) -> None:
        """Free whole ``MAX_ORDER`` blocks, in runs of accepted and of unaccepted ones."""
        runs = self._unaccepted.block_runs(PFN_PHYS(start_pfn), PFN_PHYS(end_pfn), MAX_ORDER_SIZE)
        for start, end, unaccepted in runs:
            low_pfn, high_pfn = PFN_DOWN(start), PFN_DOWN(end)
            if unaccepted and not self._lazy:
                self._accept_blocks(low_pfn, high_pfn)
            zone.nr_free_pages += high_pfn - low_pfn
            if unaccepted and self._lazy:
                zone.nr_unaccepted += high_pfn - low_pfn
                zone.unaccepted_pages.append_run(low_pfn, high_pfn)
            else:
                zone.free_area.max_order_blocks.append_run(low_pfn, high_pfn)

    def _accept_blocks(self, start_pfn: int, end_pfn: int) -> None:
        """Accept block by block, as the kernel does: each is a request of its own to the platform."""
        for pfn in range(start_pfn, end_pfn, MAX_ORDER_NR_PAGES):
            self._unaccepted.accept_memory(PFN_PHYS(pfn), PFN_PHYS(pfn + MAX_ORDER_NR_PAGES))

    # Acceptance.

    def try_to_accept_memory_one(self, zone: Zone) -> bool:
        """Accept the block that has waited longest and free it to the tail of its list; False if there is none."""
        if not zone.unaccepted_pages:
            return False
        pfn = zone.unaccepted_pages.pop()
        zone.nr_free_pages -= MAX_ORDER_NR_PAGES
        zone.nr_unaccepted -= MAX_ORDER_NR_PAGES
        self._accept_blocks(pfn, pfn + MAX_ORDER_NR_PAGES)
        self._free_one_page(zone, pfn, MAX_ORDER, to_tail=True)
        return True

    def try_to_accept_memory(self, zone: Zone, order: int) -> bool:
        """Accept one block, and more until the usable free pages reach the high watermark.

        True if at least one block was accepted.
        """
        usable = zone.nr_free_pages - watermark_unusable_free(zone, order)
        to_accept = zone.watermark.high - usable
        accepted = False
        while self.try_to_accept_memory_one(zone):
            accepted = True
            to_accept -= MAX_ORDER_NR_PAGES
            if to_accept <= 0:
                break
        return accepted

    def accept_memory_sysfs(self, text: str) -> int:
        """A write to /sys/kernel/mm/page_alloc/accept_memory: ``all``, or a size rounded up to 4 MiB blocks.

        Returns the number of characters taken, or -EINVAL; a size may have a suffix and trailing white space.
        """
        if text in ("all", "all\n"):
            to_accept = 1 << 64
        else:
            to_accept, rest = memparse(text)
            if rest.lstrip(_SPACES) or not to_accept:
                return -errno.EINVAL
        for zone in self.zones:
            while self.try_to_accept_memory_one(zone):
                if to_accept <= MAX_ORDER_SIZE:
                    return len(text)
                to_accept -= MAX_ORDER_SIZE
        return len(text)

    # Allocation.

    def alloc_pages(self, order: int) -> int | None:
        """Allocate a block of ``order``: its first pfn, or None where the kernel would have to reclaim.

        Zones are tried down to their low watermark, then once more down to the minimum.
        Source: __alloc_pages(), __alloc_pages_slowpath().
        """
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order {order}: expected 0..{MAX_ORDER}")
        pfn = self.get_page_from_freelist(order, "low")
        return self.get_page_from_freelist(order, "min") if pfn is None else pfn

    def get_page_from_freelist(self, order: int, wmark: Literal["min", "low"]) -> int | None:
        """Take a block from the first zone that has one above its watermark: Normal, DMA32, DMA.

        Memory is accepted when the watermark fails, and when no block was found in spite of it.
        """
        for zone in self._zonelist:
            mark = zone.watermark.low if wmark == "low" else zone.watermark.min
            if not zone_watermark_ok(zone, order, mark) and not self.try_to_accept_memory(zone, order):
                continue
            pfn = self._rmqueue(zone, order)
            while pfn is None and self.try_to_accept_memory(zone, order):
                pfn = self._rmqueue(zone, order)
            if pfn is not None:
                return pfn
        return None

    def free_pages(self, pfn: int, order: int) -> None:
        """Free a block that :meth:`alloc_pages` gave out; anything else is a ``ValueError``."""
        if self._allocated.get(pfn) != order:
            raise ValueError(f"free of page {pfn:#x}, order {order}: it is not allocated so")
        del self._allocated[pfn]
        self._free_one_page(self._page_zone(pfn), pfn, order, to_tail=False)

    def _rmqueue(self, zone: Zone, order: int) -> int | None:
        pfn = zone.free_area.rmqueue_smallest(order)
        if pfn is not None:
            zone.nr_free_pages -= 1 << order
            self._allocated[pfn] = order
        return pfn

    def _free_one_page(self, zone: Zone, pfn: int, order: int, *, to_tail: bool) -> None:
        zone.nr_free_pages += 1 << order
        zone.free_area.free_one_page(pfn, order, to_tail)
