"""Deferred struct pages: where they begin, how they grow on demand, and how the rest comes late."""

from __future__ import annotations

import pytest

from kernel.deferred import PAGES_PER_SECTION, first_deferred_pfn
from kernel.gfp import GFP_KERNEL
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.mmzone import Zone, ZoneType
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest

S = PAGES_PER_SECTION


@pytest.mark.parametrize(
    ("start", "memory", "first"),
    [
        (NORMAL_PFN, [(NORMAL_PFN, NORMAL_PFN + 3 * S)], NORMAL_PFN + S),
        (4096, [(1, 4096), (4096, 520_159)], 2 * S),  # the first 16 MiB are another zone's
        (NORMAL_PFN, [(NORMAL_PFN, NORMAL_PFN + S)], None),
        (NORMAL_PFN, [(NORMAL_PFN, NORMAL_PFN + S + 1)], NORMAL_PFN + S),
        (NORMAL_PFN, [(NORMAL_PFN, NORMAL_PFN + 100), (NORMAL_PFN + S, NORMAL_PFN + 4 * S)], NORMAL_PFN + 2 * S),
        (NORMAL_PFN, [(NORMAL_PFN, NORMAL_PFN + S), (NORMAL_PFN + S + 8, NORMAL_PFN + 4 * S)], NORMAL_PFN + 2 * S),
    ],
)
def test_first_deferred_pfn(start, memory, first):
    """A section border behind the first 32768 pages of the zone, where there is memory."""
    zone = Zone(ZoneType.ZONE_NORMAL, start, memory[-1][1] - start, 1)
    assert first_deferred_pfn(zone, memory) == first


def deferred(new_bitmap, rules=MAINLINE_MM, unaccepted=()):
    """4 sections in DMA32, then 8 in Normal, all free in memblock."""
    guest = AllocGuest(
        new_bitmap, (1, S, 4 * S), (2, NORMAL_PFN, 8 * S), rules=rules, unaccepted=unaccepted, free=False
    )
    memory = [(S, 5 * S), (NORMAL_PFN, NORMAL_PFN + 8 * S)]
    guest.allocator.memblock_free_all(memory, memory)
    return guest


def test_only_the_last_zone_is_deferred(new_bitmap):
    """One section of Normal is there, all of DMA32; the rest comes late, node by node."""
    guest = deferred(new_bitmap)
    dma32, normal = guest.zones
    assert (dma32.managed_pages, normal.managed_pages) == (4 * S, S)
    assert guest.allocator.deferred.total() == 7 * S
    assert list(guest.allocator.page_alloc_init_late()) == [0]
    assert normal.managed_pages == normal.nr_free_pages == 8 * S
    assert list(normal.free_area.blocks(10)) == [(NORMAL_PFN, NORMAL_PFN + 8 * S)]
    assert list(guest.allocator.page_alloc_init_late()) == []


def test_growth_on_demand(new_bitmap):
    """A zone grows by a section when it is used up, before a lower zone is asked."""
    guest = deferred(new_bitmap)
    for number in range(S // 1024):
        assert guest.allocator.alloc_pages(GFP_KERNEL, 10) == NORMAL_PFN + 1024 * number
    assert guest.zones[1].managed_pages == S
    assert guest.allocator.alloc_pages(GFP_KERNEL, 10) == NORMAL_PFN + S
    assert guest.zones[1].managed_pages == 2 * S
    guest.take_all(GFP_KERNEL, 10)
    assert guest.zones[1].managed_pages == 8 * S
    assert guest.allocator.deferred.total() == 0
    assert guest.zones[0].nr_free_pages == 0


@pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
def test_deferred_unaccepted_memory_waits(new_bitmap, rules):
    """Whole blocks go to the unaccepted list when their turn comes."""
    guest = deferred(new_bitmap, rules, unaccepted=((NORMAL_PFN, NORMAL_PFN + 8 * S),))
    normal = guest.zones[1]
    assert normal.nr_unaccepted == S
    list(guest.allocator.page_alloc_init_late())
    assert normal.nr_unaccepted == 8 * S
    assert list(normal.unaccepted_pages.runs()) == [(NORMAL_PFN, NORMAL_PFN + 8 * S)]
    assert guest.accepted == []


def test_small_pieces_are_accepted_in_one(new_bitmap):
    """What is less than a 4 MiB block is accepted at once, with its guard; freed early it is block by block."""
    for early in (False, True):
        end = NORMAL_PFN + 4 * S
        guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 4 * S), unaccepted=((NORMAL_PFN, end),), free=False)
        piece = (NORMAL_PFN + 2 * S + 1, NORMAL_PFN + 2 * S + 1023)
        memory = () if early else ((NORMAL_PFN, end),)
        guest.allocator.memblock_free_all([piece], memory)
        list(guest.allocator.page_alloc_init_late())
        base = (NORMAL_PFN + 2 * S) * 4096
        units = [(base, base + (2 << 20)), (base + (2 << 20), base + (4 << 20))]
        assert guest.accepted == (units if early else [(base, base + (4 << 20))])
