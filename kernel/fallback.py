"""A request that finds its own lists empty takes pages of another migrate type (mm/page_alloc.c).

6.3 moves what is free in a pageblock, 6.12 claims the whole pageblock or takes one page only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel.events import MmPageAllocExtfrag
from kernel.free_area import MAX_ORDER, NR_PAGE_ORDERS
from kernel.gfp import ALLOC_KSWAPD, ALLOC_NOFRAGMENT
from kernel.migratetype import (
    FALLBACKS,
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
)

if TYPE_CHECKING:
    from kernel.buddy import ZoneBuddy
    from kernel.mmzone import Zone

WATERMARK_BOOST_FACTOR = 15_000
"""vm.watermark_boost_factor: most of a boost, in ten-thousandths of the high watermark."""


def can_steal_fallback(order: int, start_type: int) -> bool:
    """True if more than the one block may change hands: a large one, or for a request that would pollute others."""
    return order >= PAGEBLOCK_ORDER // 2 or start_type in (MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE)


def find_suitable_fallback(buddy: ZoneBuddy, order: int, start_type: int) -> int | None:
    """The type with a free block of exactly this order that comes first as a fallback."""
    return next((mt for mt in FALLBACKS[start_type] if buddy.zone.free_area.nr_free(order, mt)), None)


def boost_watermark(zone: Zone) -> bool:
    """Raise the watermarks by a pageblock, so that reclaim makes future fallbacks less likely."""
    if zone.managed_pages < PAGEBLOCK_NR_PAGES * 4:
        return False
    most = zone.watermark.high * WATERMARK_BOOST_FACTOR // 10_000
    if not most:
        return False
    zone.watermark_boost = min(zone.watermark_boost + PAGEBLOCK_NR_PAGES, max(PAGEBLOCK_NR_PAGES, most))
    return True


def claim(buddy: ZoneBuddy, order: int, start_type: int, alloc_flags: int) -> int | None:
    """Claim a pageblock of another type, from the largest free block down (``__rmqueue_claim``, 6.12)."""
    for current in range(MAX_ORDER, _min_order(order, alloc_flags) - 1, -1):
        fallback = find_suitable_fallback(buddy, current, start_type)
        if fallback is None:
            continue
        if not can_steal_fallback(current, start_type):
            break
        pfn = _try_to_claim_block(buddy, current, order, start_type, fallback, alloc_flags)
        if pfn is not None:
            _record(buddy, pfn, order, current, start_type, fallback)
            return pfn
    return None


def steal(buddy: ZoneBuddy, order: int, start_type: int) -> int | None:
    """Take one block of another type, the smallest there is; its pageblock stays as it is (``__rmqueue_steal``)."""
    for current in range(order, NR_PAGE_ORDERS):
        fallback = find_suitable_fallback(buddy, current, start_type)
        if fallback is not None:
            area = buddy.zone.free_area
            pfn = area.take(current, fallback)
            area.expand(pfn, order, current, fallback)
            _record(buddy, pfn, order, current, start_type, fallback)
            return pfn
    return None


def move_fallback(buddy: ZoneBuddy, order: int, start_type: int, alloc_flags: int) -> bool:
    """Move free pages of another type to the lists of ``start_type`` (``__rmqueue_fallback``, 6.3).

    From the largest block down; but a movable request that can take only one block takes the smallest.
    """
    orders = range(MAX_ORDER, _min_order(order, alloc_flags) - 1, -1)
    found = ((o, mt) for o in orders if (mt := find_suitable_fallback(buddy, o, start_type)) is not None)
    current, fallback = next(found, (0, None))
    if fallback is None:
        return False
    whole = can_steal_fallback(current, start_type)
    if not whole and start_type == MIGRATE_MOVABLE and current > order:
        for current in range(order, NR_PAGE_ORDERS):
            fallback = find_suitable_fallback(buddy, current, start_type)
            if fallback is not None:
                break
        assert fallback is not None
        whole = can_steal_fallback(current, start_type)
    pfn = buddy.zone.free_area.first(current, fallback)
    assert pfn is not None
    _steal_suitable_fallback(buddy, pfn, current, start_type, fallback, whole, alloc_flags)
    _record(buddy, pfn, order, current, start_type, fallback)
    return True


def _min_order(order: int, alloc_flags: int) -> int:
    """Without fragmentation only whole pageblocks change hands."""
    return PAGEBLOCK_ORDER if order < PAGEBLOCK_ORDER and alloc_flags & ALLOC_NOFRAGMENT else order


def _try_to_claim_block(
    buddy: ZoneBuddy, current: int, order: int, start_type: int, fallback: int, alloc_flags: int
) -> int | None:
    """``try_to_steal_block``: the block itself if it is a whole pageblock, else all if half of it is free or alike."""
    area = buddy.zone.free_area
    pfn = area.first(current, fallback)
    assert pfn is not None
    block_type = buddy.pageblocks.get(pfn)
    if block_type == MIGRATE_HIGHATOMIC:
        return None
    if current >= PAGEBLOCK_ORDER:
        area.take(current, fallback)
        buddy.pageblocks.set(pfn, start_type, current)
        area.expand(pfn, order, current, start_type)
        return pfn
    _boost(buddy, alloc_flags)
    usable = buddy.count_pageblock(pfn)
    if usable is None or usable[0] + _alike(start_type, block_type, *usable) < PAGEBLOCK_NR_PAGES // 2:
        return None
    buddy.move_freepages_block(pfn, start_type)
    return area.rmqueue_smallest(order, start_type)


def _steal_suitable_fallback(
    buddy: ZoneBuddy, pfn: int, current: int, start_type: int, fallback: int, whole: bool, alloc_flags: int
) -> None:
    area, block_type = buddy.zone.free_area, buddy.pageblocks.get(pfn)
    if block_type != MIGRATE_HIGHATOMIC and current >= PAGEBLOCK_ORDER:
        buddy.pageblocks.set(pfn, start_type, current)
    elif block_type != MIGRATE_HIGHATOMIC:
        _boost(buddy, alloc_flags)
        usable = buddy.count_pageblock(pfn) if whole else None
        if usable is not None:
            alike = _alike(start_type, block_type, *usable)
            owns = usable[0] + alike >= PAGEBLOCK_NR_PAGES // 2
            buddy.move_freepages_block(pfn, start_type, set_type=owns)
            return
    area.take(current, fallback)
    area.add(pfn, current, start_type, to_tail=True)


def _boost(buddy: ZoneBuddy, alloc_flags: int) -> None:
    if boost_watermark(buddy.zone) and alloc_flags & ALLOC_KSWAPD:
        buddy.boosted = True


def _alike(start_type: int, block_type: int, free_pages: int, movable_pages: int) -> int:
    """Pages in use in a pageblock that are of the request's type, as far as that can be told."""
    if start_type == MIGRATE_MOVABLE:
        return movable_pages
    return PAGEBLOCK_NR_PAGES - free_pages - movable_pages if block_type == MIGRATE_MOVABLE else 0


def _record(buddy: ZoneBuddy, pfn: int, order: int, fallback_order: int, start_type: int, fallback: int) -> None:
    """The trace event; it looks at the pageblock as it is now."""
    buddy.record(
        MmPageAllocExtfrag(
            pfn, order, fallback_order, PAGEBLOCK_ORDER, start_type, fallback,
            fallback_order < PAGEBLOCK_ORDER, start_type == buddy.pageblocks.get(pfn),
        )
    )  # fmt: skip
