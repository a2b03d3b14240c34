"""Order of the free lists: which block is handed out next."""

from __future__ import annotations

import pytest

from kernel.free_area import MAX_ORDER, BlockRuns, FreeArea


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
    area = FreeArea()
    area.free_one_page(64, 3, to_tail=True)
    assert area.rmqueue_smallest(0) == 64
    assert [list(area.blocks(order)) for order in range(4)] == [[(65, 66)], [(66, 68)], [(68, 72)], []]


def test_buddies_merge_up_to_max_order():
    """Freeing the last missing page joins blocks of all orders into one of MAX_ORDER."""
    area = FreeArea()
    for order in range(MAX_ORDER):
        area.free_one_page(1024 + (1 << order), order, to_tail=True)
    area.free_one_page(1024, 0, to_tail=False)
    assert [area.nr_free(order) for order in range(MAX_ORDER + 1)] == [0] * MAX_ORDER + [1]
    assert list(area.blocks(MAX_ORDER)) == [(1024, 2048)]


def test_neighbours_that_are_no_buddies_stay_apart():
    """Pages 1 and 2 touch but do not merge."""
    area = FreeArea()
    area.free_one_page(1, 0, to_tail=True)
    area.free_one_page(2, 0, to_tail=True)
    assert list(area.blocks(0)) == [(1, 2), (2, 3)]


def test_normal_free_goes_to_the_head_and_fresh_memory_to_the_tail():
    """The page freed last is handed out first, unless it came from boot."""
    area = FreeArea()
    area.free_one_page(8, 0, to_tail=False)
    area.free_one_page(16, 0, to_tail=False)
    area.free_one_page(24, 0, to_tail=True)
    assert [area.rmqueue_smallest(0) for _ in range(4)] == [16, 8, 24, None]


def test_page_whose_merge_is_likely_goes_to_the_tail():
    """If the rest of the larger block is free, the page is kept back."""
    area = FreeArea()
    area.free_one_page(8, 0, to_tail=False)
    area.free_one_page(18, 1, to_tail=False)
    area.free_one_page(16, 0, to_tail=False)
    assert list(area.blocks(0)) == [(8, 9), (16, 17)]


def test_smallest_fitting_block_is_used():
    """A larger block is split only if no smaller one fits."""
    area = FreeArea()
    area.free_one_page(1024, MAX_ORDER, to_tail=True)
    area.free_one_page(64, 2, to_tail=True)
    assert area.rmqueue_smallest(1) == 64
    assert area.rmqueue_smallest(3) == 1024
