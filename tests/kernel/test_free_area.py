"""Order of the free lists of one migrate type: which block is handed out next."""

from __future__ import annotations

import pytest

from kernel.buddy import ZoneBuddy
from kernel.free_area import MAX_ORDER, BlockRuns
from kernel.migratetype import MIGRATE_MOVABLE, Pageblocks
from kernel.mm_rules import V9_MM
from kernel.mmzone import Zone, ZoneType


def new_buddy():
    """An empty zone of 32 MiB."""
    zone = Zone(ZoneType.ZONE_DMA, 0, 8192, 8192)
    return ZoneBuddy(zone, 0, Pageblocks(), {}, V9_MM, lambda event: None)


def add(buddy, pfn, order, to_tail):
    buddy.free_one_page(pfn, order, MIGRATE_MOVABLE, to_tail=to_tail)


def take(buddy, order):
    return buddy.zone.free_area.rmqueue_smallest(order, MIGRATE_MOVABLE)


def test_block_runs_are_one_element_for_neighbours():
    """Runs that follow each other in list and memory are one; order of the list stays."""
    runs = BlockRuns()
    runs.append_run(4096, 8192)
    runs.append_run(8192, 9216)
    runs.append_run(0, 1024)
    runs.push(3072)
    assert list(runs.runs()) == [(3072, 9216), (0, 1024)]
    assert len(runs) == 7
    assert [runs.pop() for _ in range(7)] == [3072, 4096, 5120, 6144, 7168, 8192, 0]


def test_empty_block_runs_have_nothing_to_pop():
    """Taking from an empty list is an IndexError."""
    with pytest.raises(IndexError):
        BlockRuns().pop()


def test_split_uses_the_lower_half():
    """An order-3 block split for one page leaves its upper parts on the lists of orders 0, 1 and 2."""
    buddy = new_buddy()
    add(buddy, 64, 3, to_tail=True)
    assert take(buddy, 0) == 64
    assert [list(buddy.zone.free_area.blocks(order)) for order in range(4)] == [[(65, 66)], [(66, 68)], [(68, 72)], []]


def test_buddies_merge_up_to_max_order():
    """Freeing the last missing page joins blocks of all orders into one of MAX_ORDER."""
    buddy = new_buddy()
    for order in range(MAX_ORDER):
        add(buddy, 1024 + (1 << order), order, to_tail=True)
    add(buddy, 1024, 0, to_tail=False)
    assert [buddy.zone.free_area.nr_free(order) for order in range(MAX_ORDER + 1)] == [0] * MAX_ORDER + [1]
    assert list(buddy.zone.free_area.blocks(MAX_ORDER)) == [(1024, 2048)]


def test_neighbours_that_are_no_buddies_stay_apart():
    """Pages 1 and 2 touch but do not merge."""
    buddy = new_buddy()
    add(buddy, 1, 0, to_tail=True)
    add(buddy, 2, 0, to_tail=True)
    assert list(buddy.zone.free_area.blocks(0)) == [(1, 2), (2, 3)]


def test_normal_free_goes_to_the_head_and_fresh_memory_to_the_tail():
    """The page freed last is handed out first, unless it came from boot."""
    buddy = new_buddy()
    add(buddy, 8, 0, to_tail=False)
    add(buddy, 16, 0, to_tail=False)
    add(buddy, 24, 0, to_tail=True)
    assert [take(buddy, 0) for _ in range(4)] == [16, 8, 24, None]


def test_page_whose_merge_is_likely_goes_to_the_tail():
    """If the rest of the larger block is free, the page is kept back."""
    buddy = new_buddy()
    add(buddy, 8, 0, to_tail=False)
    add(buddy, 18, 1, to_tail=False)
    add(buddy, 16, 0, to_tail=False)
    assert list(buddy.zone.free_area.blocks(0)) == [(8, 9), (16, 17)]


def test_smallest_fitting_block_is_used():
    """A larger block is split only if no smaller one fits."""
    buddy = new_buddy()
    add(buddy, 1024, MAX_ORDER, to_tail=True)
    add(buddy, 64, 2, to_tail=True)
    assert take(buddy, 1) == 64
    assert take(buddy, 3) == 1024
