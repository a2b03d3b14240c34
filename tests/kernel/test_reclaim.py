"""Guests with much unaccepted and little free memory: who reclaims, who is killed, and under which rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernel.events import EndlessReclaim, OutOfMemory
from kernel.gfp import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT, Gfp
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.reclaim import PageCache
from kernel.watermark import Watermarks
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest

BEFORE_THE_FIX = replace(MAINLINE_MM, accepts_before_watermarks=False)
"""Mainline without "mm/page_alloc: fix memory accept before watermarks gets initialized"."""
RULES = pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
MARKS = Watermarks(1000, 2000, 3000, 4000)


def guest_with(new_bitmap, rules, *, accepted=4096, unaccepted=1 << 17):
    """Zone Normal: some pages that are accepted, many that are not."""
    start = NORMAL_PFN + accepted
    return AllocGuest(
        new_bitmap, (2, NORMAL_PFN, accepted + unaccepted), rules=rules, unaccepted=((start, start + unaccepted),)
    )


def between_low_and_high(new_bitmap, rules):
    """A guest that has just started its init: a small page cache in use, free memory between low and high."""
    guest = guest_with(new_bitmap, rules)
    cache = PageCache(guest.allocator, in_use=True)
    guest.zones[0].watermark = MARKS
    assert cache.read(200) == 200
    while guest.zones[0].nr_free_pages - guest.zones[0].nr_unaccepted > 2500:
        assert guest.allocator.alloc_pages() is not None
    return guest, cache


def test_endless_reclaim(new_bitmap):
    """Where unaccepted memory is not free memory to kswapd, it reclaims the same cache over and over.

    "mm: fix endless reclaim on machines with unaccepted memory": since then it goes back to sleep at once.
    """
    guest, cache = between_low_and_high(new_bitmap, V9_MM)
    cache.wakeup_kswapd(0)
    assert cache.kswapd_hopeless == 1
    assert cache.reclaimed >= 100 * len(cache)
    assert guest.zones[0].nr_unaccepted > 100_000

    guest, cache = between_low_and_high(new_bitmap, replace(V9_MM, unaccepted_is_usable=True))
    cache.wakeup_kswapd(0)
    assert (cache.kswapd_woken, cache.kswapd_hopeless, cache.reclaimed) == (1, 0, 0)


def test_mainline_does_not_get_there(new_bitmap):
    """Mainline tops the zone up before it looks: free memory does not stay below the promo watermark."""
    guest = guest_with(new_bitmap, MAINLINE_MM)
    cache = PageCache(guest.allocator, in_use=True)
    guest.zones[0].watermark = MARKS
    cache.read(3000)
    zone = guest.zones[0]
    assert zone.nr_free_pages - zone.nr_unaccepted > MARKS.high
    cache.wakeup_kswapd(0)
    assert cache.reclaimed == 0


def before_watermarks(new_bitmap, rules):
    """A guest early in its boot, all watermarks zero, and a process that takes all memory: how much it got."""
    guest = guest_with(new_bitmap, rules, accepted=2048, unaccepted=8192)
    cache = PageCache(guest.allocator)
    return guest, cache, cache.run(10_240)


def test_premature_out_of_memory(new_bitmap):
    """With watermarks at zero "enough" is always true: nothing is accepted and the first process is killed.

    The fix accepts one block at each look, so all memory can be used.
    """
    guest, cache, _ = before_watermarks(new_bitmap, BEFORE_THE_FIX)
    assert cache.kills > 0
    assert OutOfMemory(GFP_HIGHUSER_MOVABLE, 0, "process", 9216) in guest.events
    assert (guest.accepted, guest.zones[0].nr_unaccepted) == ([], 9216)  # a free block waits too, for its guard
    guest, cache, got = before_watermarks(new_bitmap, MAINLINE_MM)
    assert (got, cache.kills, guest.zones[0].nr_unaccepted) == (10_240, 0, 0)


def test_the_cure_accepts_a_block_for_each_look(new_bitmap):
    """Before watermarks exist each refill of a list accepts 4 MiB, needed or not; v9 accepts none of it."""
    for rules, blocks in ((MAINLINE_MM, 20), (V9_MM, 0)):
        guest = guest_with(new_bitmap, rules)
        for _ in range(20):
            guest.allocator.alloc_pages(GFP_KERNEL)
        assert len(guest.accepted) == blocks


ENTRY_POINTS = {
    "alloc_pages": lambda allocator: [allocator.alloc_pages(GFP_KERNEL)],
    "order 3": lambda allocator: [allocator.alloc_pages(GFP_KERNEL, 3)],
    "order 9": lambda allocator: [allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, 9)],
    "order 10": lambda allocator: [allocator.alloc_pages(GFP_KERNEL, 10)],
    "atomic": lambda allocator: [allocator.alloc_pages(GFP_ATOMIC, 1)],
    "nowait": lambda allocator: [allocator.alloc_pages(GFP_NOWAIT)],
    "bulk": lambda allocator: allocator.alloc_pages_bulk(GFP_KERNEL, 100),
    "bulk of one": lambda allocator: allocator.alloc_pages_bulk(GFP_KERNEL, 1),
}


@RULES
@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("marks", [Watermarks(), MARKS], ids=["early", "late"])
def test_every_way_to_allocate_can_accept(new_bitmap, rules, entry, marks):
    """With nothing free but unaccepted memory each kind of request accepts some."""
    guest = guest_with(new_bitmap, rules, accepted=0)
    guest.zones[0].watermark = marks
    assert None not in ENTRY_POINTS[entry](guest.allocator)
    assert guest.accepted


@pytest.mark.parametrize(("rules", "pages"), [(V9_MM, 1), (MAINLINE_MM, 500)], ids=["v9", "mainline"])
def test_bulk_requests(new_bitmap, rules, pages):
    """v9's bulk allocator does not accept and falls back to a single page; mainline's tops up the zone first."""
    guest = guest_with(new_bitmap, rules, accepted=2048)
    guest.zones[0].watermark = MARKS
    guest.allocator.setup_per_cpu_pageset()
    assert len(guest.allocator.alloc_pages_bulk(GFP_KERNEL, 500)) == pages
    assert len(guest.allocator.alloc_pages_bulk(GFP_KERNEL, 500)) == 500
    assert guest.allocator.alloc_pages_bulk(GFP_KERNEL, 0) == []


@RULES
def test_direct_reclaim(new_bitmap, rules):
    """A request that finds nothing reclaims some of the cache; one that cannot wait fails."""
    guest = guest_with(new_bitmap, rules, unaccepted=0)
    cache = PageCache(guest.allocator)
    while cache.read() == 1 and guest.zones[0].nr_free_pages:
        pass
    guest.allocator.drain_all_pages()
    full, woken = len(cache), cache.kswapd_woken
    assert guest.allocator.alloc_pages(GFP_ATOMIC & ~Gfp.KSWAPD_RECLAIM) is None
    assert len(cache) == full
    assert guest.allocator.alloc_pages(GFP_KERNEL) is not None
    assert (cache.reclaimed > 0, cache.kswapd_woken > woken, cache.kills) == (True, True, 0)


@RULES
@pytest.mark.parametrize(
    ("gfp", "order"),
    [
        (GFP_KERNEL | Gfp.NORETRY, 0),
        (GFP_KERNEL | Gfp.RETRY_MAYFAIL, 0),
        (GFP_KERNEL | Gfp.THISNODE, 0),
        (GFP_KERNEL, 4),
        (GFP_ATOMIC, 0),
    ],
)
def test_who_is_not_worth_a_kill(new_bitmap, rules, gfp, order):
    """Requests that may fail, cannot wait or are too large kill nobody."""
    guest = guest_with(new_bitmap, rules, unaccepted=0)
    cache = PageCache(guest.allocator)
    cache.run(4096)
    assert guest.allocator.alloc_pages(gfp, order) is None
    assert cache.kills == 0
    assert guest.allocator.alloc_pages(GFP_KERNEL) is not None
    assert cache.kills == 1


@RULES
def test_below_the_minimum(new_bitmap, rules):
    """GFP_ATOMIC goes to three eighths of the minimum, GFP_KERNEL not below it, MEMALLOC takes all."""
    guest = guest_with(new_bitmap, rules, unaccepted=0)
    zone = guest.zones[0]
    zone.watermark = MARKS
    for gfp, left in ((GFP_NOWAIT, 1000), (GFP_ATOMIC, 375), (GFP_KERNEL | Gfp.MEMALLOC | Gfp.NORETRY, 0)):
        guest.take_all(gfp)
        assert zone.nr_free_pages == left


@RULES
def test_thrashing_ends(new_bitmap, rules, monkeypatch):
    """A cache in use that is larger than memory is read again for so long only: then it makes room."""
    monkeypatch.setattr("kernel.reclaim.MOST_READ_AGAIN", 500)
    guest = guest_with(new_bitmap, rules, accepted=1024, unaccepted=0)
    cache = PageCache(guest.allocator, in_use=True)
    assert cache.read(3000) == 3000
    assert len(cache) <= 1024
    (thrashing,) = (event for event in guest.events if isinstance(event, EndlessReclaim))
    assert thrashing.who == "thrashing"
    assert 500 <= thrashing.reclaimed <= 532


@RULES
def test_a_killed_process_stays_dead(new_bitmap, rules):
    """What it asked for last is given back too."""
    guest = guest_with(new_bitmap, rules, accepted=1024, unaccepted=0)
    cache = PageCache(guest.allocator)
    cache.start("init")
    assert cache.run(2000, "init") <= 1024
    assert (cache.runs("init"), cache.kills, guest.allocator.nr_in_use()) == (False, 1, 0)
