"""What an allocation does when the first look at the free lists gave nothing: kswapd, direct reclaim, the OOM killer.

There is no compaction. Source: mm/page_alloc.c, ``__alloc_pages_slowpath``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel.buddy import ZoneBuddy
from kernel.events import EndlessReclaim, OutOfMemory
from kernel.gfp import (
    ALLOC_KSWAPD,
    ALLOC_MIN_RESERVE,
    ALLOC_NO_WATERMARKS,
    ALLOC_WMARK_HIGH,
    Gfp,
    gfp_to_alloc_flags,
)
from kernel.mmzone import ZoneType
from kernel.per_cpu_pages import PAGE_ALLOC_COSTLY_ORDER
from kernel.zone_watermark import zone_watermark_ok

if TYPE_CHECKING:
    from kernel.page_alloc import PageAllocator
    from kernel.zonelist import AllocContext

MAX_RECLAIM_RETRIES = 16
MOST_RECLAIM_ROUNDS = 1000
"""A request that reclaimed so often and got nothing would go on for ever; here it fails."""


@dataclass(slots=True)
class Hooks:
    """What the page allocator asks of the rest of the kernel.

    Without them (``kernel/reclaim.py``) there is no kswapd (so boosts of watermarks stay), no page to reclaim and no
    process to kill.
    """

    wakeup_kswapd: Callable[[ZoneBuddy, int], None] = lambda buddy, order: None
    """``wakeup_kswapd(zone, order)``."""
    direct_reclaim: Callable[[AllocContext, int], int] = lambda ac, order: 0
    """Reclaim for a request; how many pages became free (``try_to_free_pages``)."""
    reclaimable_pages: Callable[[ZoneBuddy], int] = lambda buddy: 0
    """Pages of a zone that could be reclaimed (``zone_reclaimable_pages``)."""
    out_of_memory: Callable[[int, int], str] = lambda gfp, order: ""
    """Kill a process for a request with these flags and order: its name, empty if there is none to kill."""


def alloc_pages_slowpath(allocator: PageAllocator, ac: AllocContext, order: int, cpu: int) -> int | None:
    """Allocate below the low watermark, then reclaim, retry and kill, as the request's flags allow.

    None where the kernel returns NULL, or where nothing is left to kill.
    """
    gfp = ac.gfp
    alloc_flags = gfp_to_alloc_flags(gfp, order)
    if alloc_flags & ALLOC_KSWAPD:
        _wake_all_kswapds(allocator, ac, order)
    pfn = allocator.get_page_from_freelist(ac, order, cpu, alloc_flags)
    if gfp & Gfp.MEMALLOC and not gfp & Gfp.NOMEMALLOC:
        alloc_flags = ALLOC_NO_WATERMARKS | alloc_flags & ALLOC_KSWAPD
        pfn = allocator.get_page_from_freelist(ac, order, cpu, alloc_flags) if pfn is None else pfn
    no_progress_loops = rounds = reclaimed = 0
    while pfn is None and gfp & Gfp.DIRECT_RECLAIM:
        rounds += 1
        progress, pfn = _direct_reclaim(allocator, ac, order, cpu, alloc_flags)
        if pfn is not None or gfp & Gfp.NORETRY or order > PAGE_ALLOC_COSTLY_ORDER:
            break
        reclaimed += progress
        if rounds >= MOST_RECLAIM_ROUNDS and reclaimed:
            allocator.record(EndlessReclaim("direct reclaim", rounds, reclaimed, _unaccepted(ac.zonelist)))
            break
        no_progress_loops = 0 if progress else no_progress_loops + 1
        if not _should_reclaim_retry(allocator, ac, order, alloc_flags, no_progress_loops):
            pfn = allocator.get_page_from_freelist(ac, order, cpu, ALLOC_WMARK_HIGH)
            if pfn is not None or not _out_of_memory(allocator, ac, order):
                break
            no_progress_loops = 0
        pfn = allocator.get_page_from_freelist(ac, order, cpu, alloc_flags)
    if pfn is None and gfp & Gfp.NOFAIL and gfp & Gfp.DIRECT_RECLAIM:
        pfn = allocator.get_page_from_freelist(ac, order, cpu, ALLOC_MIN_RESERVE)
    return pfn


def _wake_all_kswapds(allocator: PageAllocator, ac: AllocContext, order: int) -> None:
    """One for each node of the list."""
    last = None
    for buddy in ac.zonelist:
        if buddy.zone.node != last:
            allocator.hooks.wakeup_kswapd(buddy, order)
        last = buddy.zone.node


def _direct_reclaim(
    allocator: PageAllocator, ac: AllocContext, order: int, cpu: int, alloc_flags: int
) -> tuple[int, int | None]:
    """Pages reclaimed, and a block if that was enough; else the per-CPU lists and the reserve are emptied first."""
    allocator.vm_events[f"allocstall_{ZoneType(ac.highest_zoneidx).name.removeprefix('ZONE_').lower()}"] += 1
    progress = allocator.hooks.direct_reclaim(ac, order)
    if not progress:
        return 0, None
    pfn = allocator.get_page_from_freelist(ac, order, cpu, alloc_flags)
    if pfn is None:
        _unreserve(ac, force=False)
        allocator.drain_all_pages()
        pfn = allocator.get_page_from_freelist(ac, order, cpu, alloc_flags)
    return progress, pfn


def _should_reclaim_retry(
    allocator: PageAllocator, ac: AllocContext, order: int, alloc_flags: int, no_progress_loops: int
) -> bool:
    """True while more reclaim can lead somewhere; before giving up the highatomic reserve is given back."""
    if no_progress_loops <= MAX_RECLAIM_RETRIES:
        for buddy in ac.zonelist:
            zone, reclaimable = buddy.zone, allocator.hooks.reclaimable_pages(buddy)
            mark = zone.watermark.min + zone.watermark_boost
            if zone_watermark_ok(zone, allocator.rules, order, mark, ac.highest_zoneidx, alloc_flags, reclaimable):
                return True
    return _unreserve(ac, force=True)


def _unreserve(ac: AllocContext, *, force: bool) -> bool:
    return any(buddy.unreserve_highatomic_pageblock(ac.migratetype, force=force) for buddy in ac.zonelist)


def _out_of_memory(allocator: PageAllocator, ac: AllocContext, order: int) -> bool:
    """Kill a process, unless the request may fail or a kill may not help its zones; True if one was killed."""
    if ac.gfp & (Gfp.RETRY_MAYFAIL | Gfp.THISNODE) or ac.highest_zoneidx < ZoneType.ZONE_NORMAL:
        return False
    unaccepted = _unaccepted(ac.zonelist)
    victim = allocator.hooks.out_of_memory(ac.gfp, order)
    allocator.record(OutOfMemory(ac.gfp, order, victim, unaccepted))
    return bool(victim)


def _unaccepted(buddies: Iterable[ZoneBuddy]) -> int:
    return sum(buddy.zone.nr_unaccepted for buddy in buddies)
