"""Per-CPU lists: their sizes, and how many pages move at once."""

from __future__ import annotations

import pytest

from kernel.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.per_cpu_pages import (
    NR_PCP_LISTS,
    order_to_pindex,
    pcp_allowed_order,
    pindex_to_order,
    zone_batchsize,
    zone_highsize,
)
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest

GIB_PAGES = 1 << 18


@pytest.fixture
def zone_of_4_gib(new_bitmap):
    """``zone_of_4_gib(rules)``: the allocator of one zone Normal, with its per-CPU lists set up."""

    def make(rules):
        guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 4 * GIB_PAGES), rules=rules)
        guest.allocator.init_per_zone_wmark_min(transparent_hugepage=False)
        return guest.allocator, guest.allocator.buddies[0].pagesets[0]

    return make


@pytest.mark.parametrize(
    ("managed", "batch"),
    [(0, 1), (1806, 1), (3840, 1), (131_072, 31), (475_613, 63), (486_056, 63), (1 << 28, 63)],
)
def test_batch(managed, batch):
    """A thousandth of the zone, 63 pages at most, a power of two less one; captures have 1 and 63."""
    assert zone_batchsize(managed) == batch


def test_high():
    """The low watermark, split among the node's CPUs, or four batches; captures have 18 and 10231."""
    assert zone_highsize(18, 1, 1) == 18
    assert zone_highsize(10_231, 63, 1) == 10_231
    assert zone_highsize(10_231, 63, 4) == 2557
    assert zone_highsize(100, 63, 8) == 252


def test_lists():
    """Three lists for each of the orders 0 to 3, two for huge pages."""
    assert [order for order in range(11) if pcp_allowed_order(order)] == [0, 1, 2, 3, 9]
    numbers = [order_to_pindex(mt, order) for order in range(4) for mt in range(3)]
    assert numbers == list(range(12))
    assert [order_to_pindex(mt, 9) for mt in range(3)] == [12, 13, 12]
    assert [pindex_to_order(pindex) for pindex in range(NR_PCP_LISTS)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 9, 9]


@pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
def test_boot_pageset_holds_nothing(new_bitmap, rules):
    """Until the lists are set up every page comes from the free lists and goes back there."""
    guest = AllocGuest(new_bitmap, (2, NORMAL_PFN, 4096), rules=rules)
    pfn = guest.allocator.alloc_pages()
    assert guest.zones[0].nr_free_pages == 4095
    guest.allocator.free_pages(pfn, 0)
    assert guest.zones[0].nr_free_pages == 4096
    assert guest.allocator.buddies[0].pagesets[0].count == 0


def test_refills_of_6_3_are_a_batch(zone_of_4_gib):
    """63 pages at a time, fewer blocks of higher order, two huge pages."""
    allocator, pcp = zone_of_4_gib(V9_MM)
    for order, blocks in ((0, 63), (1, 31), (3, 7), (9, 2)):
        before = pcp.count
        allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, order)
        assert pcp.count - before == (blocks - 1) << order


def test_refills_of_6_12_double(zone_of_4_gib):
    """A CPU that only allocates gets twice as many pages each time, up to 32 batches."""
    allocator, pcp = zone_of_4_gib(MAINLINE_MM)
    zone, sizes = allocator.zones[0], []
    for _ in range(8000):
        before = zone.nr_free_pages
        allocator.alloc_pages(GFP_HIGHUSER_MOVABLE)
        if zone.nr_free_pages != before:
            sizes.append(before - zone.nr_free_pages)
    assert sizes == [63, 126, 252, 504, 1008, 2016, 2016, 2016]
    assert pcp.count == sum(sizes) - 8000


def test_frees_of_6_3_double(zone_of_4_gib):
    """A full list gives back a batch, then two, four and so on, but keeps one."""
    allocator, pcp = zone_of_4_gib(V9_MM)
    pages = [allocator.alloc_pages(GFP_HIGHUSER_MOVABLE) for _ in range(8000)]
    allocator.drain_all_pages()
    high, zone, steps = pcp.high, allocator.zones[0], []
    for pfn in pages:
        before = zone.nr_free_pages
        allocator.free_pages(pfn, 0)
        if zone.nr_free_pages != before:
            steps.append(zone.nr_free_pages - before)
        assert pcp.count < high
    assert steps[:5] == [63, 126, 252, 504, 1008]
    assert max(steps) == high - 63


def test_free_of_6_12_follows_the_run_of_frees(zone_of_4_gib):
    """The first full list gives back as many pages as were freed in a row, but keeps a batch, and may grow."""
    allocator, pcp = zone_of_4_gib(MAINLINE_MM)
    pages = [allocator.alloc_pages(GFP_HIGHUSER_MOVABLE) for _ in range(8000)]
    allocator.drain_all_pages()
    pcp.high = pcp.high_min
    zone, first = allocator.zones[0], None
    for number, pfn in enumerate(pages, 1):
        before = zone.nr_free_pages
        allocator.free_pages(pfn, 0)
        if first is None and zone.nr_free_pages != before:
            first = (number, zone.nr_free_pages - before)
    freed_in_a_row = 63 << 5
    assert first == (pcp.high_min, min(freed_in_a_row, pcp.high_min - 63))
    assert pcp.high_min <= pcp.high <= pcp.high_max


def test_freed_last_is_used_first(zone_of_4_gib):
    """A list is a stack, so that what is in the CPU's cache is used again."""
    allocator, _ = zone_of_4_gib(MAINLINE_MM)
    pages = [allocator.alloc_pages(GFP_KERNEL) for _ in range(3)]
    for pfn in pages:
        allocator.free_pages(pfn, 0)
    assert [allocator.alloc_pages(GFP_KERNEL) for _ in range(3)] == pages[::-1]


def test_cpus_have_lists_of_their_own(zone_of_4_gib):
    """A page freed on one CPU is not seen by another; one that comes online makes the lists shorter."""
    allocator, pcp = zone_of_4_gib(V9_MM)
    high = pcp.high
    assert allocator.online_cpu() == 1
    assert pcp.high == high // 2
    pfn = allocator.alloc_pages(GFP_KERNEL, cpu=0)
    allocator.free_pages(pfn, 0, cpu=1)
    assert allocator.alloc_pages(GFP_KERNEL, cpu=0) != pfn
    assert allocator.alloc_pages(GFP_KERNEL, cpu=1) == pfn


def test_drain(zone_of_4_gib):
    """All lists are given back, and what can be joined is."""
    allocator, pcp = zone_of_4_gib(MAINLINE_MM)
    pages = {order: allocator.alloc_pages(GFP_KERNEL, order) for order in (0, 1, 2, 3, 9)}
    for order, pfn in pages.items():
        allocator.free_pages(pfn, order)
    assert pcp.count > 0
    allocator.drain_all_pages()
    zone = allocator.zones[0]
    assert pcp.count == 0
    assert zone.nr_free_pages == 4 * GIB_PAGES
    assert zone.free_area.nr_free(10) == 4 * GIB_PAGES >> 10
