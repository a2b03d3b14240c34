"""The page allocator (mm/page_alloc.c, with v9 02/14 and 04/14 or as in 6.12: ``kernel/mm_rules.py``).

``MAX_ORDER`` is inclusive, as in the tree the series is based on. Page frames are named by their number (pfn).
There is no CMA, no compaction and no memory cgroup. What reclaim does is up to hooks (``kernel/reclaim.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from guest.ranges import Range, RangeMap, RangeSet
from guest.trace import Event
from guest.units import PFN_DOWN, PFN_PHYS, round_down, round_up
from kernel import slowpath
from kernel.buddy import ORDER_BITS, TYPE_BITS, ZoneBuddy
from kernel.deferred import PAGES_PER_SECTION, DeferredPages
from kernel.free_area import MAX_ORDER, MAX_ORDER_NR_PAGES, page_blocks
from kernel.gfp import (
    ALLOC_HIGHATOMIC,
    ALLOC_KSWAPD,
    ALLOC_NO_WATERMARKS,
    ALLOC_NOFRAGMENT,
    ALLOC_WMARK_HIGH,
    ALLOC_WMARK_MASK,
    GFP_KERNEL,
)
from kernel.hstate import Hugetlb
from kernel.lazy_accept import MAX_ORDER_SIZE, LazyAccept
from kernel.migratetype import MIGRATE_MOVABLE, MIGRATE_PCPTYPES, PAGEBLOCK_ORDER, Pageblocks
from kernel.mm_rules import V9_MM, MmRules
from kernel.mmzone import Zone, setup_zone_wmarks
from kernel.per_cpu_pages import pcp_allowed_order
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.zone_watermark import wmark_pages, zone_watermark_fast
from kernel.zonelist import AllocContext, Contexts, Distances, Zonelists

_ORDER_MASK = (1 << ORDER_BITS) - 1
_ZONE_SHIFT = ORDER_BITS + TYPE_BITS


class PageAllocator:
    """Buddy allocator over ``zones``, which may be of several nodes; only hot-add makes spans of zones overlap.

    With ``lazy`` (``accept_memory=lazy``) whole blocks of unaccepted memory wait on ``zone.unaccepted_pages``
    until they are needed; otherwise all memory is accepted when it is freed for the first time. ``record`` takes
    trace events. One CPU is there from the beginning, number 0, on the first zone's node.
    """

    def __init__(
        self, zones: Sequence[Zone], unaccepted: UnacceptedMemory, *, lazy: bool, rules: MmRules = V9_MM,
        record: Callable[[Event], None] = lambda event: None, distances: Distances | None = None,
    ) -> None:  # fmt: skip
        self.zones, self.rules, self.record = tuple(zones), rules, record
        self.pageblocks = Pageblocks()
        self._pageblock_types = self.pageblocks.others
        self._allocated: dict[int, int] = {}
        self.buddies = tuple(
            ZoneBuddy(zone, number, self.pageblocks, self._allocated, rules, record)
            for number, zone in enumerate(zones)
        )
        self.accept = LazyAccept(unaccepted, rules, lazy=lazy)
        self.deferred = DeferredPages(self._free_deferred)
        self._zone_of_page: RangeMap[int | None] = RangeMap(None)
        for number, zone in enumerate(zones):
            self._zone_of_page.assign(zone.zone_start_pfn, zone.end_pfn, number)
        self._managed = RangeSet()
        self.sections = RangeSet()
        """Sections of struct pages that there are, as page frames."""
        self._distances = distances or {}
        self._pagesets_ready = False
        self.cpu_nodes: list[int] = []
        """The node of each CPU that is online."""
        self.hooks = slowpath.Hooks()
        self.hugetlb = Hugetlb()
        self.vm_events = Counter[str]()
        """Events of /proc/vmstat, but for those that zones and lists count."""
        self.online_cpu(zones[0].node if zones else 0)

    @property
    def nr_sections(self) -> int:
        """Number of sections of struct pages."""
        return self.sections.total() // PAGES_PER_SECTION

    def nr_in_use(self) -> int:
        """Pages that are allocated."""
        return sum(1 << (code & _ORDER_MASK) for code in self._allocated.values())

    # CPUs and nodes.

    def online_cpu(self, node: int = 0) -> int:
        """One more CPU, on a node; returns its number (``page_alloc_cpu_online``)."""
        self.cpu_nodes.append(node)
        for buddy in self.buddies:
            buddy.add_cpu()
        self.build_all_zonelists()
        if self._pagesets_ready:
            self.setup_per_cpu_pageset()
        return len(self.cpu_nodes) - 1

    def build_all_zonelists(self) -> None:
        """Find which zones have memory, and the order in which each node's requests look at them."""
        self.zonelists = Zonelists(self.buddies, set(self.cpu_nodes), self._distances)
        self._contexts = {node: Contexts(self.zonelists, node) for node in self.zonelists.nodes}

    def move_pfn_range_to_zone(self, zone: Zone, start_pfn: int, end_pfn: int) -> None:
        """Let a zone have the pages ``[start_pfn, end_pfn)``, all of them present; its span can reach over others."""
        low = min(zone.zone_start_pfn, start_pfn) if zone.populated else start_pfn
        zone.spanned_pages = max(zone.end_pfn, end_pfn) - low
        zone.zone_start_pfn = low
        zone.present_pages += end_pfn - start_pfn
        self._zone_of_page.assign(start_pfn, end_pfn, self.zones.index(zone))
        self.build_all_zonelists()

    def pages_of_zone(self, zone: Zone) -> Iterator[Range]:
        """The ranges of a zone's span that are not another zone's."""
        number = self.zones.index(zone)
        runs = self._zone_of_page.runs(zone.zone_start_pfn, zone.end_pfn)
        return (Range(start, end) for start, end, owner in runs if owner == number)

    def setup_per_cpu_pageset(self) -> None:
        """Give the per-CPU lists their sizes; before that they hold nothing."""
        self._pagesets_ready = True
        for buddy in self.buddies:
            zone = buddy.zone
            cpus = self.cpu_nodes.count(zone.node) or len(self.cpu_nodes)
            for pcp in buddy.pagesets:
                pcp.update(zone.watermark.low + zone.watermark_boost, zone.managed_pages, cpus)

    def init_per_zone_wmark_min(self, *, transparent_hugepage: bool) -> int:
        """Watermarks, reserves and sizes of per-CPU lists, which are zero until now; returns vm.min_free_kbytes."""
        kbytes = setup_zone_wmarks(self.zones, transparent_hugepage=transparent_hugepage)
        for zone in self.zones:
            zone.watermark_boost = 0
        self.setup_per_cpu_pageset()
        return kbytes

    def drain_all_pages(self) -> None:
        """Spill all per-CPU lists back into the free lists."""
        for buddy in self.buddies:
            for pcp in buddy.pagesets:
                pcp.drain()

    # Memory from memblock.

    def memblock_free_all(self, ranges: Iterable[tuple[int, int]], memory: Sequence[tuple[int, int]] = ()) -> None:
        """Take over what memblock has free, ascending; deferred pages wait for :meth:`page_alloc_init_late`.

        ``memory`` is all memory, from which each node's deferred pages follow; without it none are deferred.
        """
        self.deferred.prepare(self.zones, memory)
        for start_pfn, end_pfn in memory:
            self._add_sections(start_pfn, end_pfn)
        for start_pfn, end_pfn in ranges:
            for buddy, low_pfn, high_pfn in self._zone_slices(start_pfn, end_pfn):
                self.free_pages_core(low_pfn, self.deferred.early(buddy.zone, low_pfn, high_pfn))

    def page_alloc_init_late(self) -> Iterator[int]:
        """Add all deferred pages; yields the number of each node that had some, when it is done."""
        return self.deferred.init_late(self.zones)

    def free_pages_core(self, start_pfn: int, end_pfn: int) -> None:
        """Take the pages ``[start_pfn, end_pfn)`` over from memblock; they become managed and free.

        They are cut into the largest naturally aligned blocks, ascending. A block with unaccepted memory is
        accepted now, unless it is of ``MAX_ORDER`` and acceptance is lazy: then it goes to the tail of the
        zone's unaccepted list. Source: __free_pages_memory(), __free_pages_core().
        """
        for buddy, low_pfn, high_pfn in self._new_slices(start_pfn, end_pfn):
            first = min(round_up(low_pfn, MAX_ORDER_NR_PAGES), high_pfn)
            last = max(round_down(high_pfn, MAX_ORDER_NR_PAGES), first)
            self._free_small_blocks(buddy, low_pfn, first)
            self._free_max_order_blocks(buddy, first, last)
            self._free_small_blocks(buddy, last, high_pfn)

    def _free_deferred(self, zone: Zone, start_pfn: int, end_pfn: int) -> None:
        """The same for deferred pages: what is less than a ``MAX_ORDER`` block is accepted in one piece."""
        head_end = min(round_up(start_pfn, MAX_ORDER_NR_PAGES), end_pfn)
        tail_start = max(round_down(end_pfn, MAX_ORDER_NR_PAGES), head_end)
        for low_pfn, high_pfn in ((start_pfn, head_end), (tail_start, end_pfn)):
            if low_pfn < high_pfn:
                self.accept.unaccepted.accept_memory(PFN_PHYS(low_pfn), PFN_PHYS(high_pfn))
        self.free_pages_core(start_pfn, end_pfn)

    def _new_slices(self, start_pfn: int, end_pfn: int) -> list[tuple[ZoneBuddy, int, int]]:
        """The slices of a range of zones, which become managed pages; refused as a whole if one cannot."""
        if self._managed.overlaps(start_pfn, end_pfn):
            raise ValueError(f"pages [{start_pfn:#x}, {end_pfn:#x}): some are managed already")
        slices = list(self._zone_slices(start_pfn, end_pfn))
        self._managed.add(start_pfn, end_pfn)
        self._add_sections(start_pfn, end_pfn)
        for buddy, low_pfn, high_pfn in slices:
            buddy.zone.managed_pages += high_pfn - low_pfn
        return slices

    def _add_sections(self, start_pfn: int, end_pfn: int) -> None:
        if start_pfn < end_pfn:
            self.sections.add(round_down(start_pfn, PAGES_PER_SECTION), round_up(end_pfn, PAGES_PER_SECTION))

    def _zone_slices(self, start_pfn: int, end_pfn: int) -> Iterator[tuple[ZoneBuddy, int, int]]:
        """``[start_pfn, end_pfn)`` cut at zone borders; ``ValueError`` if some page is in no zone."""
        for low_pfn, high_pfn, _ in self._zone_of_page.runs(start_pfn, end_pfn):
            yield self.page_zone(low_pfn), low_pfn, high_pfn

    def page_zone(self, pfn: int) -> ZoneBuddy:
        """The zone of a page; ``ValueError`` if it is in none."""
        number = self._zone_of_page[pfn]
        if number is None or not self.zones[number].populated:
            raise ValueError(f"page {pfn:#x}: it is in no zone")
        return self.buddies[number]

    def _free_small_blocks(self, buddy: ZoneBuddy, start_pfn: int, end_pfn: int) -> None:
        """Free less than a ``MAX_ORDER`` block; what is unaccepted is accepted at once."""
        unaccepted = self.accept.unaccepted
        buddy.fresh += end_pfn - start_pfn
        for pfn, order in page_blocks(start_pfn, end_pfn):
            start, end = PFN_PHYS(pfn), PFN_PHYS(pfn + (1 << order))
            if unaccepted.range_contains_unaccepted_memory(start, end):
                unaccepted.accept_memory(start, end)
            buddy.free_to_lists(pfn, order, to_tail=True)

    def _free_max_order_blocks(self, buddy: ZoneBuddy, start_pfn: int, end_pfn: int) -> None:
        """Free whole ``MAX_ORDER`` blocks, in runs of accepted and of unaccepted ones."""
        runs = self.accept.unaccepted.block_runs(PFN_PHYS(start_pfn), PFN_PHYS(end_pfn), MAX_ORDER_SIZE)
        for start, end, unaccepted in runs:
            low_pfn, high_pfn = PFN_DOWN(start), PFN_DOWN(end)
            if unaccepted and self.accept.lazy:
                self.accept.free_unaccepted(buddy, low_pfn, high_pfn)
                continue
            if unaccepted:
                self.accept.accept_blocks(low_pfn, high_pfn)
            buddy.zone.nr_free_pages += high_pfn - low_pfn
            buddy.fresh += high_pfn - low_pfn
            buddy.zone.free_area.append_run(low_pfn, high_pfn, MIGRATE_MOVABLE)

    # Acceptance by hand.

    def accept_memory_sysfs(self, text: str) -> int:
        """A write to /sys/kernel/mm/page_alloc/accept_memory; the number of characters taken, or -EINVAL."""
        return self.accept.store(self.buddies, text)

    # Allocation.

    def alloc_pages(self, gfp: int = GFP_KERNEL, order: int = 0, node: int = 0, cpu: int = 0) -> int | None:
        """Allocate a block of ``order`` for a CPU, from a node if possible: its first pfn, None if there is none.

        ``gfp`` is flags of ``kernel/gfp.py``, ``cpu`` the number of one that is online. Wrong orders and nodes are
        ``ValueError``.

        A single page comes from the CPU's list where that is possible without a look at anything else: the list
        has one, and the zone so many free pages that no watermark is near and nothing is to be accepted.
        Source: __alloc_pages().
        """
        if not order:
            try:
                ac = self._contexts[node][gfp]
            except KeyError:
                ac = self._context(gfp, node)
            if ac is not None:
                zone, pcp = ac.zone, ac.pagesets[cpu]
                pages = pcp.lists[ac.migratetype]
                plenty = zone.nr_free_pages - zone.nr_unaccepted - zone.nr_reserved_highatomic - zone.watermark_boost
                mark = zone.watermark.promo if self.rules.accepts_first else zone.watermark.low
                if pages and 0 < mark < plenty - zone.lowmem_reserve[ac.highest_zoneidx]:
                    pcp.free_count >>= 1
                    pcp.count -= 1
                    pcp.fast_allocs += 1
                    pfn = pages.popleft()
                    self._allocated[pfn] = ac.code
                    return pfn
        return self._alloc_pages(gfp, order, node, cpu)

    def _alloc_pages(self, gfp: int, order: int, node: int, cpu: int) -> int | None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order {order}: expected 0..{MAX_ORDER}")
        ac = self._context(gfp, node)
        if ac is None:
            return None
        pfn = self.get_page_from_freelist(ac, order, cpu, ac.alloc_flags)
        return slowpath.alloc_pages_slowpath(self, ac, order, cpu) if pfn is None else pfn

    def _context(self, gfp: int, node: int) -> AllocContext | None:
        if node not in self._contexts:
            raise ValueError(f"node {node}: expected one of {', '.join(map(str, self._contexts))}")
        return self._contexts[node][gfp]

    def alloc_pages_bulk(self, gfp: int, nr_pages: int, node: int = 0, cpu: int = 0) -> list[int]:
        """Allocate up to ``nr_pages`` single pages at once, one at least if there is one (``alloc_pages_bulk``).

        They come from one zone of the node, which must keep its low watermark above all of them. v9 has no hook
        here: without such a zone it is one page, and that accepts memory.
        """
        ac = self._context(gfp, node)
        pages: list[int] = []
        buddy = self._bulk_zone(ac, nr_pages) if ac is not None and nr_pages > 1 else None
        if buddy is not None and ac is not None:
            while len(pages) < nr_pages:
                pfn = buddy.pagesets[cpu].rmqueue(0, ac.migratetype, ac.alloc_flags & ~ALLOC_NOFRAGMENT)
                if pfn is None:
                    break
                pages.append(self._use(ac, buddy, pfn, 0, cpu))
        if not pages and nr_pages > 0:
            pfn = self.alloc_pages(gfp, 0, node, cpu)
            pages += [] if pfn is None else [pfn]
        return pages

    def _bulk_zone(self, ac: AllocContext, nr_pages: int) -> ZoneBuddy | None:
        """The first zone of the preferred node that has room for all of a bulk request."""
        for buddy in ac.zonelist:
            if buddy.zone.node != ac.zonelist[0].zone.node:
                return None
            if self.rules.accepts_first:
                self.accept.accept_up(buddy, 0)
            while True:
                mark = wmark_pages(buddy.zone, ac.alloc_flags & ALLOC_WMARK_MASK) + nr_pages
                highest = ac.zonelist[0].zone.zone_type
                if zone_watermark_fast(buddy.zone, self.rules, 0, mark, highest, ac.alloc_flags):
                    return buddy
                accepted = self.rules.accepts_first and self.accept.accept_up(buddy, 0)
                if not accepted and not self.deferred.grow(buddy.zone, 0):
                    break
        return None

    def get_page_from_freelist(self, ac: AllocContext, order: int, cpu: int, alloc_flags: int) -> int | None:
        """Take a block from the first zone of the list that has one above its watermark.

        With ALLOC_NOFRAGMENT all zones of the preferred node are asked without mixing pageblocks before any mixes.
        """
        preferred = ac.zonelist[0].zone.node
        while True:
            for buddy in ac.zonelist:
                if alloc_flags & ALLOC_NOFRAGMENT and buddy.zone.node != preferred:
                    break
                pfn = self._from_zone(ac, buddy, order, cpu, alloc_flags)
                if pfn is not None:
                    return pfn
            if not alloc_flags & ALLOC_NOFRAGMENT:
                return None
            alloc_flags &= ~ALLOC_NOFRAGMENT

    def _from_zone(self, ac: AllocContext, buddy: ZoneBuddy, order: int, cpu: int, alloc_flags: int) -> int | None:
        """Take a block from a zone; memory is accepted, or deferred pages added, where that helps."""
        if self.rules.accepts_first:
            self.accept.accept_up(buddy, order)
        allowed = self._watermarks_allow(ac, buddy, order, alloc_flags) or self._more_pages(buddy, order)
        if not allowed and not alloc_flags & ALLOC_NO_WATERMARKS:
            return None
        while True:
            pfn = self._rmqueue(ac, buddy, order, cpu, alloc_flags)
            if pfn is not None or not self._more_pages(buddy, order):
                return pfn

    def _more_pages(self, buddy: ZoneBuddy, order: int) -> bool:
        return self.accept.accept_up(buddy, order) or self.deferred.grow(buddy.zone, order)

    def _watermarks_allow(self, ac: AllocContext, buddy: ZoneBuddy, order: int, alloc_flags: int) -> bool:
        zone, highest = buddy.zone, ac.highest_zoneidx
        if self.rules.tunes_pcp and not buddy.below_high:
            mark = wmark_pages(zone, ALLOC_WMARK_HIGH)
            if zone_watermark_fast(zone, self.rules, order, mark, highest, alloc_flags):
                return True
            buddy.below_high = True
        mark = wmark_pages(zone, alloc_flags & ALLOC_WMARK_MASK)
        return zone_watermark_fast(zone, self.rules, order, mark, highest, alloc_flags)

    def _rmqueue(self, ac: AllocContext, buddy: ZoneBuddy, order: int, cpu: int, alloc_flags: int) -> int | None:
        """Take a block from the CPU's list or from the free lists (``rmqueue``)."""
        pfn = None
        if pcp_allowed_order(order):
            pfn = buddy.pagesets[cpu].rmqueue(order, ac.migratetype, alloc_flags)
        if pfn is None:
            pfn = buddy.rmqueue_buddy(order, ac.migratetype, alloc_flags)
        if alloc_flags & ALLOC_KSWAPD and buddy.boosted:
            buddy.boosted = False
            self.hooks.wakeup_kswapd(buddy, 0)
        if pfn is None:
            return None
        self._use(ac, buddy, pfn, order, cpu)
        if alloc_flags & ALLOC_HIGHATOMIC:
            buddy.reserve_highatomic_pageblock(pfn, order)
        return pfn

    def _use(self, ac: AllocContext, buddy: ZoneBuddy, pfn: int, order: int, cpu: int) -> int:
        """Note a block as in use, and count it (``zone_statistics``)."""
        self._allocated[pfn] = buddy.code | ac.migratetype << ORDER_BITS | order
        buddy.pgalloc += 1 << order
        preferred = ac.zonelist[0]
        if buddy.zone.node == preferred.zone.node:
            buddy.numa_hit += 1
        else:
            buddy.numa_miss += 1
            preferred.numa_foreign += 1
        if buddy.zone.node == self.cpu_nodes[cpu]:
            buddy.numa_local += 1
        else:
            buddy.numa_other += 1
        return pfn

    def free_pages(self, pfn: int, order: int, cpu: int = 0) -> None:
        """Free a block that :meth:`alloc_pages` gave out to the list of a CPU; anything else is a ``ValueError``."""
        code = self._allocated.pop(pfn, _ORDER_MASK)
        if code & _ORDER_MASK != order:
            if code != _ORDER_MASK:
                self._allocated[pfn] = code
            raise ValueError(f"free of page {pfn:#x}, order {order}: it is not allocated so")
        buddy = self.buddies[code >> _ZONE_SHIFT]
        if not order or pcp_allowed_order(order):
            migratetype = self._pageblock_types.get(pfn >> PAGEBLOCK_ORDER, MIGRATE_MOVABLE)
            if migratetype >= MIGRATE_PCPTYPES:
                migratetype = MIGRATE_MOVABLE
            buddy.pagesets[cpu].free(pfn, migratetype, order)
        else:
            buddy.free_to_lists(pfn, order)
