"""Zonelists, and which zone and node a request gets its pages from."""

from __future__ import annotations

import pytest

from kernel.gfp import (
    GFP_ATOMIC,
    GFP_DMA,
    GFP_DMA32,
    GFP_HIGHUSER,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NAMES,
    GFP_NOWAIT,
    GFP_TRANSHUGE,
    Gfp,
    gfp_migratetype,
    gfp_to_alloc_flags,
    gfp_zone,
)
from kernel.zonelist import fallback_orders
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest


def test_two_nodes():
    """As captures have it: each node itself, then the other."""
    assert fallback_orders([0, 1], {0, 1}, {0, 1}, {}) == {0: [0, 1], 1: [1, 0]}


def test_equal_nodes_take_turns():
    """Four nodes at the same distance: each falls back on the next one first."""
    orders = fallback_orders([0, 1, 2, 3], {0, 1, 2, 3}, {0, 1, 2, 3}, {})
    assert orders == {0: [0, 1, 2, 3], 1: [1, 2, 3, 0], 2: [2, 3, 0, 1], 3: [3, 0, 1, 2]}


def test_nearer_nodes_come_first():
    """Two pairs of near nodes."""
    near = {(0, 3): 12, (3, 0): 12, (1, 2): 12, (2, 1): 12}
    orders = fallback_orders([0, 1, 2, 3], {0, 1, 2, 3}, {0, 1, 2, 3}, near)
    assert [order[:2] for order in orders.values()] == [[0, 3], [1, 2], [2, 1], [3, 0]]


def test_nodes_without_memory_or_cpus():
    """A node without memory is nobody's fallback; one without CPUs is preferred."""
    assert fallback_orders([0, 1, 2], {0, 2}, {0, 1}, {}) == {0: [0, 2], 1: [2, 0], 2: [2, 0]}


ZONES = [(0, 1, 4095), (1, 4096, 4096), (2, NORMAL_PFN, 4096), (2, 2 * NORMAL_PFN, 4096, 1)]


@pytest.fixture
def numa(new_bitmap):
    """DMA, DMA32 and Normal on node 0, Normal on node 1."""
    guest = AllocGuest(new_bitmap, *ZONES)
    guest.allocator.online_cpu(1)
    return guest


@pytest.mark.parametrize(
    ("gfp", "node", "zones"),
    [
        (GFP_KERNEL, 0, [2, 1, 0, 3]),
        (GFP_KERNEL, 1, [3, 2, 1, 0]),
        (GFP_KERNEL | GFP_DMA32, 0, [1, 0]),
        (GFP_KERNEL | GFP_DMA32, 1, [1, 0]),
        (GFP_KERNEL | GFP_DMA, 1, [0]),
        (GFP_KERNEL | Gfp.THISNODE, 1, [3]),
        (GFP_KERNEL | Gfp.THISNODE, 0, [2, 1, 0]),
    ],
)
def test_zones_of_a_request(numa, gfp, node, zones):
    """All zones of the node, the highest first, then those of the next node."""
    ac = numa.allocator.zonelists.context(gfp, node)
    assert [numa.allocator.buddies.index(buddy) for buddy in ac.zonelist] == zones


def test_a_zone_that_the_node_does_not_have(numa):
    """A request that no zone may serve gets nothing."""
    assert numa.allocator.alloc_pages(GFP_KERNEL | GFP_DMA | Gfp.THISNODE, 0, node=1) is None


def test_order_of_use(numa):
    """Both nodes are used up, each in its turn; hits and misses are counted."""
    pages = []
    while (pfn := numa.allocator.alloc_pages(GFP_KERNEL, 10, node=1, cpu=1)) is not None:
        pages.append(pfn)
    starts = [2 * NORMAL_PFN + 1024 * k for k in range(4)] + [NORMAL_PFN + 1024 * k for k in range(4)]
    assert pages == starts + [4096 + 1024 * k for k in range(4)] + [1024, 2048, 3072]
    normal, remote = numa.allocator.buddies[2:]
    assert (remote.numa_hit, remote.numa_local, remote.numa_foreign) == (4, 4, 11)
    assert (normal.numa_miss, normal.numa_other) == (4, 4)


def test_dmesg(numa):
    """The lines of build_all_zonelists()."""
    assert numa.allocator.zonelists.lines() == ["Fallback order for Node 0: 0 1 ", "Fallback order for Node 1: 1 0 "]


def test_locality_before_mixing(new_bitmap):
    """With nothing but another node left, pageblocks are mixed on the own one."""
    guest = AllocGuest(new_bitmap, (1, 4096, 1024), (2, NORMAL_PFN, 1024), (2, 2 * NORMAL_PFN, 1024, 1))
    guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_DMA32, 10)
    for order in (9, 8):
        guest.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, order)
    assert guest.zones[2].nr_free_pages == 1024
    assert guest.allocator.alloc_pages(GFP_KERNEL) < 2 * NORMAL_PFN


def test_no_such_node(numa):
    """Wrong use of the API."""
    for node in (2, -1):
        with pytest.raises(ValueError, match="node"):
            numa.allocator.alloc_pages(GFP_KERNEL, 0, node)


def test_gfp():
    """Zone and migrate type of the usual flags; the numbers are those of include/linux/gfp_types.h in 6.12."""
    zones = {name: gfp_zone(gfp) for name, gfp in GFP_NAMES.items()}
    movable = {"GFP_HIGHUSER_MOVABLE", "GFP_TRANSHUGE_LIGHT", "GFP_TRANSHUGE"}
    assert {name for name, zone in zones.items() if zone == 3} == movable
    assert {name for name, gfp in GFP_NAMES.items() if gfp_migratetype(gfp) == 1} == movable
    assert (zones["GFP_DMA"], zones["GFP_DMA32"], zones["GFP_KERNEL"], gfp_zone(GFP_HIGHUSER)) == (0, 1, 2, 2)
    assert (GFP_KERNEL, GFP_ATOMIC, GFP_NOWAIT) == (0xCC0, 0x820, 0x2800)
    assert gfp_migratetype(GFP_KERNEL | Gfp.RECLAIMABLE) == 2


def test_alloc_flags():
    """Who may use which reserve."""
    assert gfp_to_alloc_flags(GFP_KERNEL, 0) == 0x800
    assert gfp_to_alloc_flags(GFP_ATOMIC, 0) == 0x800 | 0x20 | 0x10
    assert gfp_to_alloc_flags(GFP_ATOMIC, 1) == 0x800 | 0x20 | 0x10 | 0x200
    assert gfp_to_alloc_flags(GFP_NOWAIT, 1) == 0x800 | 0x10
    assert gfp_to_alloc_flags(GFP_TRANSHUGE, 9) == 0


def test_a_zone_that_grew(new_bitmap):
    """Memory that is added behind a zone can be freed to it; before, it is nobody's."""
    guest = AllocGuest(new_bitmap, (1, 4096, 4096), (2, NORMAL_PFN, 0))
    assert guest.allocator.alloc_pages(GFP_KERNEL, 10) == 4096
    with pytest.raises(ValueError, match="in no zone"):
        guest.allocator.free_pages_core(NORMAL_PFN, NORMAL_PFN + 2048)
    guest.allocator.move_pfn_range_to_zone(guest.zones[1], NORMAL_PFN, NORMAL_PFN + 2048)
    guest.allocator.free_pages_core(NORMAL_PFN, NORMAL_PFN + 2048)
    assert guest.allocator.alloc_pages(GFP_KERNEL, 10) == NORMAL_PFN
    assert guest.allocator.nr_sections == 2
