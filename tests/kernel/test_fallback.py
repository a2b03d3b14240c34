"""Requests that take pages of another migrate type, and the trace event that tells of it."""

from __future__ import annotations

import pytest

from kernel.events import MmPageAllocExtfrag
from kernel.gfp import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, Gfp
from kernel.migratetype import MIGRATE_HIGHATOMIC, MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.watermark import Watermarks
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest

RULES = pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
GFP_RECLAIMABLE = GFP_KERNEL | Gfp.RECLAIMABLE


def extfrag(guest):
    return [event for event in guest.events if isinstance(event, MmPageAllocExtfrag)]


@RULES
def test_whole_pageblocks_change_hands(new_bitmap, rules):
    """An unmovable page out of 4 MiB of movable memory makes both pageblocks unmovable: that fragments nothing."""
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 4096), rules=rules)
    assert guest.allocator.alloc_pages(GFP_KERNEL) == NORMAL_PFN
    (event,) = extfrag(guest)
    assert event.text == (
        "page=ffffea0004000000 pfn=0x100000 alloc_order=0 fallback_order=10 pageblock_order=9 "
        "alloc_migratetype=0 fallback_migratetype=1 fragmenting=0 change_ownership=1"
    )
    types = [guest.allocator.pageblocks.get(NORMAL_PFN + 512 * block) for block in range(4)]
    assert types == [MIGRATE_UNMOVABLE] * 2 + [MIGRATE_MOVABLE] * 2
    assert guest.zones[0].free_area.nr_free(9, MIGRATE_UNMOVABLE) == 1


@RULES
def test_half_a_free_pageblock_is_claimed(new_bitmap, rules):
    """At least half of a pageblock is free: it changes hands with all that is free in it, and watermarks rise."""
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 2048), rules=rules)
    guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, 7)
    for order in (7, 9, 10):
        assert guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, order) is not None
    guest.zones[0].watermark = Watermarks(0, 0, 1000, 1000)
    guest.allocator.buddies[0].below_high = True
    assert guest.allocator.alloc_pages(GFP_KERNEL | Gfp.MEMALLOC, 8) == NORMAL_PFN + 256
    (event,) = extfrag(guest)
    assert (event.fallback_order, event.fragmenting, event.change_ownership) == (8, True, True)
    assert guest.allocator.pageblocks.get(NORMAL_PFN) == MIGRATE_UNMOVABLE
    assert guest.zones[0].watermark_boost == 512


def small_free_block(new_bitmap, rules):
    """4 MiB, of which only pages 504..511 are free, and their pageblock is used by unmovable pages."""
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 1024), rules=rules)
    for order in (8, 7, 6, 5, 4, 3, 9):
        assert guest.allocator.alloc_pages(GFP_KERNEL, order) is not None
    assert guest.zones[0].nr_free_pages == 8
    guest.events.clear()
    return guest


@RULES
def test_a_movable_request_takes_the_one_block(new_bitmap, rules):
    """From a pageblock in use by others a movable request takes the smallest block that fits and no more."""
    guest = small_free_block(new_bitmap, rules)
    pfn = guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, 1)
    assert pfn == NORMAL_PFN + 504
    (event,) = extfrag(guest)
    assert (event.alloc_migratetype, event.fallback_migratetype) == (MIGRATE_MOVABLE, MIGRATE_UNMOVABLE)
    assert (event.fallback_order, event.fragmenting, event.change_ownership) == (3, True, False)
    assert guest.allocator.pageblocks.get(pfn) == MIGRATE_UNMOVABLE
    kept = MIGRATE_MOVABLE if rules is V9_MM else MIGRATE_UNMOVABLE  # 6.3 moves the whole free block to its own list
    assert [guest.zones[0].free_area.nr_free(order, kept) for order in (1, 2)] == [1, 1]


def test_reclaimable_looks_at_unmovable_first(new_bitmap):
    """The order of fallbacks: reclaimable requests look at unmovable memory before movable memory."""
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 2048))
    guest.allocator.alloc_pages(GFP_KERNEL)
    guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, 10)
    guest.events.clear()
    guest.allocator.alloc_pages(GFP_RECLAIMABLE)
    (event,) = extfrag(guest)
    assert (event.alloc_migratetype, event.fallback_migratetype) == (MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE)


def test_other_zones_are_asked_before_pageblocks_are_mixed(new_bitmap):
    """ALLOC_NOFRAGMENT: with only part of a pageblock left in Normal, an unmovable request goes to DMA32."""
    guest = AllocGuest(new_bitmap, (1, 4096, 1024), (2, NORMAL_PFN, 1024))
    for order in (9, 8):
        guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, order)
    assert guest.allocator.alloc_pages(GFP_KERNEL) == 4096
    assert [event.fallback_order for event in extfrag(guest)] == [10]
    guest.take_all(GFP_KERNEL)
    assert guest.zones[1].nr_free_pages == 0  # in the end it is mixed all the same
    assert extfrag(guest)[-1].fragmenting


def test_boost_is_limited_and_not_for_small_zones(new_bitmap):
    """Up to one and a half times the high watermark; nothing before there is one, nothing in less than 8 MiB."""
    from kernel.fallback import boost_watermark

    zone = AllocGuest(new_bitmap, (2, NORMAL_PFN, 2048)).zones[0]
    assert not boost_watermark(zone)
    zone.watermark = Watermarks(200, 300, 500, 600)
    assert boost_watermark(zone) and zone.watermark_boost == 512
    assert boost_watermark(zone) and zone.watermark_boost == 750
    assert not boost_watermark(AllocGuest(new_bitmap, (2, NORMAL_PFN, 1024)).zones[0])


def highatomic(new_bitmap, rules):
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 1 << 17), rules=rules)
    zone = guest.zones[0]
    zone.watermark = Watermarks(1000, zone.nr_free_pages + 1, zone.nr_free_pages + 2, zone.nr_free_pages + 3)
    return guest, zone


@RULES
def test_highatomic_reserve(new_bitmap, rules):
    """A block of higher order that cannot wait reserves its pageblock, which ordinary requests cannot count on."""
    guest, zone = highatomic(new_bitmap, rules)
    pfn = guest.allocator.alloc_pages(GFP_ATOMIC, 4)
    assert guest.allocator.pageblocks.get(pfn) == MIGRATE_HIGHATOMIC
    assert zone.nr_reserved_highatomic == 512
    assert 0 < zone.free_area.nr_free_highatomic < 512
    assert guest.allocator.alloc_pages(GFP_ATOMIC, 4) >> 9 == pfn >> 9
    assert guest.allocator.alloc_pages(GFP_KERNEL, 4) >> 9 != pfn >> 9


@RULES
def test_reserve_is_given_back_before_an_allocation_fails(new_bitmap, rules):
    """When nothing else is left, the reserve serves ordinary requests too."""
    guest, zone = highatomic(new_bitmap, rules)
    first = guest.allocator.alloc_pages(GFP_ATOMIC, 2)
    zone.watermark = Watermarks()
    guest.take_all(GFP_KERNEL)
    assert zone.nr_free_pages == 0 == zone.nr_reserved_highatomic
    assert guest.allocator.pageblocks.get(first) != MIGRATE_HIGHATOMIC


def test_reserve_is_one_percent(new_bitmap):
    """No more than a hundredth of the zone, in whole pageblocks."""
    guest, zone = highatomic(new_bitmap, MAINLINE_MM)
    for _ in range(2000):
        guest.allocator.alloc_pages(GFP_ATOMIC, 3)
    assert zone.nr_reserved_highatomic == 3 * 512
