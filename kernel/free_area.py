"""Free lists of a zone (``struct free_area``, mm/page_alloc.c) and the list of unaccepted blocks (v9 02/14).

The largest blocks are kept as runs of neighbours, so that a terabyte of fresh memory is one element. There is
one migrate type.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

MAX_ORDER = 10
"""Largest order, inclusive."""
MAX_ORDER_NR_PAGES = 1 << MAX_ORDER
NR_PAGE_ORDERS = MAX_ORDER + 1


def page_blocks(start_pfn: int, end_pfn: int) -> Iterator[tuple[int, int]]:
    """First page and order of the largest naturally aligned blocks in the range, ascending (__free_pages_memory())."""
    while start_pfn < end_pfn:
        order = min(MAX_ORDER, (end_pfn - start_pfn).bit_length() - 1)
        if start_pfn:
            order = min(order, (start_pfn & -start_pfn).bit_length() - 1)
        yield start_pfn, order
        start_pfn += 1 << order


class BlockRuns:
    """A list of blocks of order ``MAX_ORDER``; blocks that follow each other in list and memory are one run."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, int]] = deque()
        self._nr_blocks = 0

    def __len__(self) -> int:
        return self._nr_blocks

    def runs(self) -> Iterator[tuple[int, int]]:
        """``(start_pfn, end_pfn)`` of each run, head first."""
        return iter(self._runs)

    def append_run(self, start_pfn: int, end_pfn: int) -> None:
        """Put the blocks of ``[start_pfn, end_pfn)`` at the tail, ascending."""
        self._nr_blocks += (end_pfn - start_pfn) // MAX_ORDER_NR_PAGES
        if self._runs and self._runs[-1][1] == start_pfn:
            start_pfn = self._runs.pop()[0]
        self._runs.append((start_pfn, end_pfn))

    def push(self, pfn: int) -> None:
        """Put one block at the head."""
        self._nr_blocks += 1
        end_pfn = pfn + MAX_ORDER_NR_PAGES
        if self._runs and self._runs[0][0] == end_pfn:
            end_pfn = self._runs.popleft()[1]
        self._runs.appendleft((pfn, end_pfn))

    def pop(self) -> int:
        """Take the block at the head; its page frame number. ``IndexError`` if there is none."""
        start_pfn, end_pfn = self._runs.popleft()
        self._nr_blocks -= 1
        if start_pfn + MAX_ORDER_NR_PAGES < end_pfn:
            self._runs.appendleft((start_pfn + MAX_ORDER_NR_PAGES, end_pfn))
        return start_pfn


class FreeArea:
    """The buddy lists of all orders. Blocks are named by the number of their first page frame."""

    def __init__(self) -> None:
        self._lists: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(MAX_ORDER))
        self.max_order_blocks = BlockRuns()

    def nr_free(self, order: int) -> int:
        """Number of free blocks of ``order``."""
        return len(self.max_order_blocks if order == MAX_ORDER else self._lists[order])

    def blocks(self, order: int) -> Iterator[tuple[int, int]]:
        """``(start_pfn, end_pfn)`` of the free blocks of ``order``, head first; runs of them at ``MAX_ORDER``."""
        if order == MAX_ORDER:
            return self.max_order_blocks.runs()
        return ((pfn, pfn + (1 << order)) for pfn in self._lists[order])

    def free_one_page(self, pfn: int, order: int, to_tail: bool) -> None:
        """Free a block and join it with its buddy as often as possible (``__free_one_page``).

        Unless ``to_tail``, it goes to the head of its list, or to the tail if it is likely to be joined soon
        (``buddy_merge_likely``): then it should not be handed out first.
        """
        while order < MAX_ORDER and (buddy := pfn ^ (1 << order)) in self._lists[order]:
            del self._lists[order][buddy]
            pfn &= buddy
            order += 1
        if order == MAX_ORDER and to_tail:
            self.max_order_blocks.append_run(pfn, pfn + MAX_ORDER_NR_PAGES)
        elif order == MAX_ORDER:
            self.max_order_blocks.push(pfn)
        else:
            self._lists[order][pfn] = None
            if not (to_tail or self._merge_likely(pfn, order)):
                self._lists[order].move_to_end(pfn, last=False)

    def rmqueue_smallest(self, order: int) -> int | None:
        """Take a block of ``order`` from the head of the smallest list that has one, None if there is none.

        The lower half of a larger block is used and the upper halves are put back, each to the head of its
        list. Source: __rmqueue_smallest(), expand().
        """
        for current in range(order, NR_PAGE_ORDERS):
            if self.nr_free(current):
                pfn = self._take(current)
                for high in reversed(range(order, current)):
                    upper = pfn + (1 << high)
                    self._lists[high][upper] = None
                    self._lists[high].move_to_end(upper, last=False)
                return pfn
        return None

    def _take(self, order: int) -> int:
        if order == MAX_ORDER:
            return self.max_order_blocks.pop()
        return self._lists[order].popitem(last=False)[0]

    def _merge_likely(self, pfn: int, order: int) -> bool:
        """True if the buddy of the block of twice the size is free, so that one more free joins all four parts."""
        if order >= MAX_ORDER - 1:
            return False
        larger = pfn & ~(1 << order)
        return larger ^ (1 << order + 1) in self._lists[order + 1]
