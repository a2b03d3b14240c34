"""A simple page cache, processes, and what kswapd, direct reclaim and the OOM killer do with them (mm/vmscan.c,
mm/oom_kill.c).

Enough to see the two ways in which unaccepted memory has hung or killed real guests: reclaim that never ends because
it does not take unaccepted memory for free memory, and an OOM kill although memory is left to accept. Pages of the
cache are clean: to reclaim one is to free it. There is no swap: pages of processes stay until they end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from kernel.buddy import ZoneBuddy
from kernel.events import EndlessReclaim
from kernel.gfp import ALLOC_WMARK_HIGH, GFP_HIGHUSER_MOVABLE, Gfp
from kernel.page_alloc import PageAllocator
from kernel.slowpath import MAX_RECLAIM_RETRIES, MOST_RECLAIM_ROUNDS
from kernel.zone_watermark import wmark_pages, zone_watermark_ok

SWAP_CLUSTER_MAX = 32
"""Pages that one round of reclaim wants."""
MOST_READ_AGAIN = 50_000
"""Pages of a cache in use that are read again during one command; from then on it shrinks, and thrashing ends."""
_READ_AGAIN = GFP_HIGHUSER_MOVABLE & ~(Gfp.DIRECT_RECLAIM | Gfp.KSWAPD_RECLAIM)
"""Others do that, while reclaim is at work."""


class PageCache:
    """Pages that hold data of files, in the order of their use, and the pages of processes that can be killed.

    With ``in_use`` a page is read again as soon as it is gone, as those of a program that runs. The hooks of
    ``allocator`` become this cache's. ``touch(pfn)`` writes to a page that was just taken. kswapd gives up after
    ``most_rounds`` rounds, as one that would go on for ever.
    """

    def __init__(
        self, allocator: PageAllocator, *, in_use: bool = False, most_rounds: int = MOST_RECLAIM_ROUNDS,
        touch: Callable[[int], None] = lambda pfn: None,
    ) -> None:  # fmt: skip
        self._allocator, self._most_rounds, self._touch = allocator, most_rounds, touch
        self.in_use = in_use
        self._pages: dict[int, deque[int]] = {buddy.code: deque() for buddy in allocator.buddies}
        self._processes: dict[str, list[int]] = {}
        self._kswapd_runs = False
        self._kswapd_failures: dict[int, int] = {}
        self._endless: set[int] = set()
        """Nodes whose kswapd goes on for ever."""
        self._read_again = 0
        self.reclaimed = 0
        """Pages reclaimed so far."""
        self.kswapd_woken = 0
        self.kswapd_hopeless = 0
        """How often kswapd went on without getting a zone balanced."""
        self.kills = 0
        hooks = allocator.hooks
        hooks.wakeup_kswapd = lambda buddy, order: self.wakeup_kswapd(buddy.zone.node, order)
        hooks.direct_reclaim = lambda ac, order: self._direct_reclaim(ac.zonelist)
        hooks.reclaimable_pages = lambda buddy: len(self._pages[buddy.code])
        hooks.out_of_memory = lambda gfp, order: self._kill()

    def __len__(self) -> int:
        return sum(map(len, self._pages.values()))

    def new_command(self) -> None:
        """Those who use the cache have new patience."""
        self._read_again = 0

    # Who takes pages.

    def read(self, count: int = 1, *, node: int = 0, cpu: int = 0, gfp: int = GFP_HIGHUSER_MOVABLE) -> int:
        """Read ``count`` pages of files into memory; how many there was room for."""
        for done in range(count):
            pfn = self._allocator.alloc_pages(gfp, 0, node, cpu)
            if pfn is None:
                return done
            self._touch(pfn)
            buddy = self._allocator.page_zone(pfn)
            buddy.inactive_file += 1
            self._pages[buddy.code].append(pfn)
        return count

    def start(self, name: str) -> None:
        """A process of that name runs, if it does not yet."""
        self._processes.setdefault(name, [])

    def run(self, count: int, name: str = "process", *, node: int = 0, cpu: int = 0) -> int:
        """Let a process take ``count`` pages; how many it got before there were no more, or it was killed."""
        pages = self._processes.setdefault(name, [])
        alloc_pages, page_zone = self._allocator.alloc_pages, self._allocator.page_zone
        for done in range(count):
            pfn = alloc_pages(GFP_HIGHUSER_MOVABLE, 0, node, cpu)
            if self._processes.get(name) is not pages:
                if pfn is not None:
                    self._allocator.free_pages(pfn, 0, cpu)
                return done
            if pfn is None:
                return done
            self._touch(pfn)
            page_zone(pfn).inactive_anon += 1
            pages.append(pfn)
        return count

    def runs(self, name: str) -> bool:
        """True for a process that took memory and has not ended."""
        return name in self._processes

    def exit(self, name: str) -> int:
        """End a process; how many pages it gave back."""
        pages = self._processes.pop(name, [])
        for pfn in pages:
            self._allocator.page_zone(pfn).inactive_anon -= 1
            self._allocator.free_pages(pfn, 0)
        return len(pages)

    # kswapd.

    def wakeup_kswapd(self, node: int, order: int = 0) -> None:
        """Reclaim on a node until one of its zones meets its high watermark, then end boosts (``balance_pgdat``).

        After 16 times without any page it is not woken again until direct reclaim finds some.
        """
        own = [buddy for buddy in self._allocator.buddies if buddy.zone.node == node and buddy.zone.populated]
        if self._kswapd_runs or self._kswapd_failures.get(node, 0) >= MAX_RECLAIM_RETRIES:
            return
        self.kswapd_woken += 1
        self._allocator.vm_events["pageoutrun"] += 1
        self._set_reclaim_active(own, active=True)
        before, rounds = self.reclaimed, self._balance(node, own, order)
        self._set_reclaim_active(own, active=False)
        if rounds >= self._most_rounds:
            self._say_endless(node, rounds, self.reclaimed - before)
        for buddy in own:
            buddy.zone.watermark_boost = 0

    def _balance(self, node: int, own: list[ZoneBuddy], order: int) -> int:
        """How many rounds it took; one that goes on for ever does one more each time that anybody looks."""
        rounds, most = 0, 1 if node in self._endless else self._most_rounds
        while not any(self._balanced(buddy, order) for buddy in own):
            freed = self._shrink(own, "kswapd")
            self._kswapd_failures[node] = 0 if freed else self._kswapd_failures.get(node, 0) + 1
            rounds += 1
            if rounds >= most or self._kswapd_failures[node] >= MAX_RECLAIM_RETRIES:
                self.kswapd_hopeless += 1
                return rounds
        self._endless.discard(node)
        return rounds

    def _say_endless(self, node: int, rounds: int, freed: int) -> None:
        self._endless.add(node)
        unaccepted = sum(zone.nr_unaccepted for zone in self._allocator.zones if zone.node == node)
        self._allocator.record(EndlessReclaim(f"kswapd{node}", rounds, freed, unaccepted))

    def _set_reclaim_active(self, buddies: Iterable[ZoneBuddy], *, active: bool) -> None:
        self._kswapd_runs = active
        for buddy in buddies:
            buddy.reclaim_active = active

    def _balanced(self, buddy: ZoneBuddy, order: int) -> bool:
        """``pgdat_balanced`` for one zone."""
        zone, mark = buddy.zone, wmark_pages(buddy.zone, ALLOC_WMARK_HIGH)
        return zone_watermark_ok(zone, self._allocator.rules, order, mark, zone.zone_type)

    # Reclaim.

    def _direct_reclaim(self, buddies: Iterable[ZoneBuddy]) -> int:
        freed = self._shrink(buddies, "direct")
        if freed:
            self._kswapd_failures.clear()
        return freed

    def _shrink(self, buddies: Iterable[ZoneBuddy], who: str) -> int:
        """Free up to 32 of the pages that were used longest ago, past the per-CPU lists; how many."""
        freed = node = 0
        for buddy in buddies:
            node = node if freed else buddy.zone.node
            pages = self._pages[buddy.code]
            while pages and freed < SWAP_CLUSTER_MAX:
                self._allocator.free_pages(pages.popleft(), 0)
                buddy.inactive_file -= 1
                freed += 1
            for pcp in buddy.pagesets if freed else ():
                pcp.drain()
        self.reclaimed += freed
        for name in _counters(who):
            self._allocator.vm_events[name] += freed
        if self.in_use and freed and self._read_again < MOST_READ_AGAIN:
            self._read_again += freed
            self.read(freed, node=node, gfp=_READ_AGAIN)
            if self._read_again >= MOST_READ_AGAIN:
                unaccepted = sum(zone.nr_unaccepted for zone in self._allocator.zones)
                rounds = self._read_again // SWAP_CLUSTER_MAX
                self._allocator.record(EndlessReclaim("thrashing", rounds, self._read_again, unaccepted))
        return freed

    def _kill(self) -> str:
        """Kill the process with most pages, if there is one; its name (``oom_kill_process``)."""
        victim = max(self._processes, key=lambda name: len(self._processes[name]), default="")
        if not victim or not self._processes[victim]:
            return ""
        self.exit(victim)
        self.kills += 1
        self._allocator.vm_events["oom_kill"] += 1
        return victim


def _counters(who: str) -> Iterator[str]:
    """The events of /proc/vmstat that count a reclaimed page: all that were looked at are clean."""
    return (f"{what}_{of}" for what in ("pgscan", "pgsteal") for of in (who, "file"))
