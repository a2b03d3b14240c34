"""Whether a zone has enough free pages for a request (mm/page_alloc.c, ``__zone_watermark_ok`` and its helpers)."""

from __future__ import annotations

from kernel.gfp import (
    ALLOC_HIGHATOMIC,
    ALLOC_MIN_RESERVE,
    ALLOC_NON_BLOCK,
    ALLOC_OOM,
    ALLOC_RESERVES,
    ALLOC_WMARK_MASK,
    ALLOC_WMARK_MIN,
)
from kernel.migratetype import MIGRATE_HIGHATOMIC
from kernel.mm_rules import MmRules
from kernel.mmzone import Zone

WATERMARK_NAMES = ("min", "low", "high", "promo")


def wmark_pages(zone: Zone, wmark: int) -> int:
    """A watermark by its number in ``enum zone_watermarks``, with its boost."""
    return int(getattr(zone.watermark, WATERMARK_NAMES[wmark])) + zone.watermark_boost


def unusable_free(zone: Zone, rules: MmRules, order: int, alloc_flags: int = 0) -> int:
    """Free pages that a request cannot count on (``__zone_watermark_unusable_free``)."""
    unusable = (1 << order) - 1
    if not alloc_flags & ALLOC_RESERVES:
        unusable += zone.nr_reserved_highatomic if rules.keeps_reserve else zone.free_area.nr_free_highatomic
    return unusable if rules.unaccepted_is_usable else unusable + zone.nr_unaccepted


def zone_watermark_ok(
    zone: Zone, rules: MmRules, order: int, mark: int, highest_zoneidx: int, alloc_flags: int = 0,
    reclaimable: int = 0,
) -> bool:  # fmt: skip
    """True if a block of ``order`` can be taken and more than ``mark`` usable pages stay free.

    The zone also keeps its reserve against requests that zone ``highest_zoneidx`` could serve. ``reclaimable`` pages
    count as free.
    """
    free_pages = zone.nr_free_pages + reclaimable - unusable_free(zone, rules, order, alloc_flags)
    if free_pages <= _reduced(mark, alloc_flags) + zone.lowmem_reserve[highest_zoneidx]:
        return False
    if order == 0 or zone.free_area.suitable(order):
        return True
    may_use_reserve = alloc_flags & (ALLOC_HIGHATOMIC | ALLOC_OOM)
    return bool(may_use_reserve) and zone.free_area.suitable(order, range(MIGRATE_HIGHATOMIC, MIGRATE_HIGHATOMIC + 1))


def zone_watermark_fast(
    zone: Zone, rules: MmRules, order: int, mark: int, highest_zoneidx: int, alloc_flags: int
) -> bool:
    """The same, but a boost of the minimum does not stop single pages for those who may use reserves."""
    if zone_watermark_ok(zone, rules, order, mark, highest_zoneidx, alloc_flags):
        return True
    if order or not zone.watermark_boost or not alloc_flags & ALLOC_MIN_RESERVE:
        return False
    if alloc_flags & ALLOC_WMARK_MASK != ALLOC_WMARK_MIN:
        return False
    return zone_watermark_ok(zone, rules, order, zone.watermark.min, highest_zoneidx, alloc_flags)


def _reduced(mark: int, alloc_flags: int) -> int:
    """``mark`` for those who may go below it: half for high priority, less if they cannot block; half for a victim."""
    if alloc_flags & ALLOC_MIN_RESERVE:
        mark -= mark // 2
        if alloc_flags & ALLOC_NON_BLOCK:
            mark -= mark // 4
    if alloc_flags & ALLOC_OOM:
        mark -= mark // 2
    return mark
