"""A simple page cache, and what kswapd, direct reclaim and the OOM killer do with it (mm/vmscan.c, mm/oom_kill.c).

Enough to see the two ways in which unaccepted memory has hung or killed real guests: reclaim that never ends because
it does not take unaccepted memory for free memory, and an OOM kill although memory is left to accept. Pages of the
cache are clean: to reclaim one is to free it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kernel.buddy import ZoneBuddy
from kernel.gfp import ALLOC_WMARK_HIGH, GFP_HIGHUSER_MOVABLE
from kernel.page_alloc import PageAllocator
from kernel.slowpath import MAX_RECLAIM_RETRIES
from kernel.zone_watermark import wmark_pages, zone_watermark_ok

SWAP_CLUSTER_MAX = 32
"""Pages that one round of reclaim wants."""


class PageCache:
    """Pages that hold data of files, in the order of their use, and the pages of one process that can be killed.

    With ``in_use`` a page is read again as soon as it is gone, as those of a program that runs. The hooks of
    ``allocator`` become this cache's. kswapd gives up after ``most_rounds`` rounds, as one that would go on for ever.
    """

    def __init__(self, allocator: PageAllocator, *, in_use: bool = False, most_rounds: int = 1000) -> None:
        self._allocator, self._in_use, self._most_rounds = allocator, in_use, most_rounds
        self._pages: dict[int, deque[int]] = {buddy.code: deque() for buddy in allocator.buddies}
        self._process: list[int] = []
        self._kswapd_runs = False
        self.reclaimed = 0
        """Pages reclaimed so far."""
        self.kswapd_woken = 0
        self.kswapd_hopeless = 0
        """How often kswapd went on without getting a zone balanced."""
        self.kills = 0
        hooks = allocator.hooks
        hooks.wakeup_kswapd = lambda buddy, order: self.wakeup_kswapd(buddy.zone.node, order)
        hooks.direct_reclaim = lambda ac, order: self._shrink(ac.zonelist)
        hooks.reclaimable_pages = lambda buddy: len(self._pages[buddy.code])
        hooks.out_of_memory = lambda gfp, order: self._kill()

    def __len__(self) -> int:
        return sum(map(len, self._pages.values()))

    def read(self, count: int = 1) -> int:
        """Read ``count`` pages of files into memory; how many there was room for."""
        for done in range(count):
            pfn = self._allocator.alloc_pages(GFP_HIGHUSER_MOVABLE)
            if pfn is None:
                return done
            self._pages[self._allocator.page_zone(pfn).code].append(pfn)
        return count

    def run(self, count: int) -> int:
        """Let the process take ``count`` pages; how many it got before there were no more. A kill frees them all."""
        for done in range(count):
            pfn = self._allocator.alloc_pages(GFP_HIGHUSER_MOVABLE)
            if pfn is None:
                return done
            self._process.append(pfn)
        return count

    def wakeup_kswapd(self, node: int, order: int = 0) -> None:
        """Reclaim on a node until one of its zones meets its high watermark, then end boosts (``balance_pgdat``)."""
        if self._kswapd_runs:
            return
        self.kswapd_woken += 1
        own = [buddy for buddy in self._allocator.buddies if buddy.zone.node == node and buddy.zone.populated]
        self._set_reclaim_active(own, active=True)
        failures = rounds = 0
        while not any(self._balanced(buddy, order) for buddy in own):
            failures = 0 if self._shrink(own) else failures + 1
            rounds += 1
            if failures >= MAX_RECLAIM_RETRIES or rounds >= self._most_rounds:
                self.kswapd_hopeless += 1
                break
        self._set_reclaim_active(own, active=False)
        for buddy in own:
            buddy.zone.watermark_boost = 0

    def _set_reclaim_active(self, buddies: Iterable[ZoneBuddy], *, active: bool) -> None:
        self._kswapd_runs = active
        for buddy in buddies:
            buddy.reclaim_active = active

    def _balanced(self, buddy: ZoneBuddy, order: int) -> bool:
        """``pgdat_balanced`` for one zone."""
        zone, mark = buddy.zone, wmark_pages(buddy.zone, ALLOC_WMARK_HIGH)
        return zone_watermark_ok(zone, self._allocator.rules, order, mark, zone.zone_type)

    def _shrink(self, buddies: Iterable[ZoneBuddy]) -> int:
        """Free up to 32 of the pages that were used longest ago, past the per-CPU lists; how many."""
        freed = 0
        for buddy in buddies:
            pages = self._pages[buddy.code]
            while pages and freed < SWAP_CLUSTER_MAX:
                self._allocator.free_pages(pages.popleft(), 0)
                freed += 1
            for pcp in buddy.pagesets:
                pcp.drain()
        self.reclaimed += freed
        if self._in_use:
            self.read(freed)
        return freed

    def _kill(self) -> bool:
        """Kill the process, if it runs (``oom_kill_process``)."""
        killed, self._process = self._process, []
        for pfn in killed:
            self._allocator.free_pages(pfn, 0)
        self.kills += bool(killed)
        return bool(killed)
