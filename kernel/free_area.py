"""Free lists of a zone (``struct free_area``, mm/page_alloc.c) and the list of unaccepted blocks (v9 02/14).

The largest blocks are kept as runs of neighbours, so that a terabyte of fresh memory is one element.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from kernel.migratetype import MIGRATE_HIGHATOMIC, MIGRATE_PCPTYPES, MIGRATE_TYPES, PAGEBLOCK_NR_PAGES

MAX_ORDER = 10
"""Largest order, inclusive."""
MAX_ORDER_NR_PAGES = 1 << MAX_ORDER
NR_PAGE_ORDERS = MAX_ORDER + 1
_TYPE_BITS = 3


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

    def first(self) -> int:
        """The block at the head; ``IndexError`` if there is none."""
        return self._runs[0][0]

    def pop(self) -> int:
        """Take the block at the head; its page frame number. ``IndexError`` if there is none."""
        start_pfn, end_pfn = self._runs.popleft()
        self._nr_blocks -= 1
        if start_pfn + MAX_ORDER_NR_PAGES < end_pfn:
            self._runs.appendleft((start_pfn + MAX_ORDER_NR_PAGES, end_pfn))
        return start_pfn


class FreeArea:
    """The free lists of all orders and migrate types. Blocks are named by the number of their first page frame."""

    def __init__(self) -> None:
        self._lists: tuple[tuple[OrderedDict[int, None], ...], ...] = tuple(
            tuple(OrderedDict() for _ in range(MIGRATE_TYPES)) for _ in range(MAX_ORDER)
        )
        self._max_order = tuple(BlockRuns() for _ in range(MIGRATE_TYPES))
        self._blocks: dict[int, int] = {}
        """Order and list of each free block below ``MAX_ORDER`` (``PageBuddy``, ``buddy_order``)."""
        self.nr_free_highatomic = 0
        """Free pages on the lists of MIGRATE_HIGHATOMIC."""

    def nr_free(self, order: int, migratetype: int | None = None) -> int:
        """Number of free blocks of ``order``, of one migrate type or of all."""
        lists = self._max_order if order == MAX_ORDER else self._lists[order]
        return len(lists[migratetype]) if migratetype is not None else sum(map(len, lists))

    def suitable(self, order: int, migratetypes: range = range(MIGRATE_PCPTYPES)) -> bool:
        """True if a block of ``order`` or more is free on the list of one of the types."""
        return any(self.nr_free(o, mt) for o in range(order, NR_PAGE_ORDERS) for mt in migratetypes)

    def blocks(self, order: int, migratetype: int | None = None) -> Iterator[tuple[int, int]]:
        """``(start_pfn, end_pfn)`` of the free blocks of ``order``, head first; runs of them at ``MAX_ORDER``."""
        for mt in range(MIGRATE_TYPES) if migratetype is None else (migratetype,):
            if order == MAX_ORDER:
                yield from self._max_order[mt].runs()
            else:
                yield from ((pfn, pfn + (1 << order)) for pfn in self._lists[order][mt])

    def buddy_order(self, pfn: int) -> int | None:
        """Order of the free block below ``MAX_ORDER`` that begins with this page, None if none does."""
        found = self._blocks.get(pfn)
        return None if found is None else found >> _TYPE_BITS

    def add(self, pfn: int, order: int, migratetype: int, *, to_tail: bool) -> None:
        """Put a block on a list (``__add_to_free_list``)."""
        if migratetype == MIGRATE_HIGHATOMIC:
            self.nr_free_highatomic += 1 << order
        if order == MAX_ORDER:
            runs = self._max_order[migratetype]
            runs.append_run(pfn, pfn + MAX_ORDER_NR_PAGES) if to_tail else runs.push(pfn)
            return
        pages = self._lists[order][migratetype]
        pages[pfn] = None
        if not to_tail:
            pages.move_to_end(pfn, last=False)
        self._blocks[pfn] = order << _TYPE_BITS | migratetype

    def append_run(self, start_pfn: int, end_pfn: int, migratetype: int) -> None:
        """Put the blocks of order ``MAX_ORDER`` of a range at the tail of their list."""
        self._max_order[migratetype].append_run(start_pfn, end_pfn)

    def remove(self, pfn: int) -> tuple[int, int]:
        """Take the block below ``MAX_ORDER`` that begins with this page off its list; its order and migrate type."""
        found = self._blocks.pop(pfn)
        order, migratetype = found >> _TYPE_BITS, found & (1 << _TYPE_BITS) - 1
        del self._lists[order][migratetype][pfn]
        if migratetype == MIGRATE_HIGHATOMIC:
            self.nr_free_highatomic -= 1 << order
        return order, migratetype

    def first(self, order: int, migratetype: int) -> int | None:
        """The block at the head of a list (``get_page_from_free_area``)."""
        if order == MAX_ORDER:
            runs = self._max_order[migratetype]
            return runs.first() if runs else None
        return next(iter(self._lists[order][migratetype]), None)

    def take(self, order: int, migratetype: int) -> int:
        """Take the block at the head of a list that is not empty."""
        if order == MAX_ORDER:
            if migratetype == MIGRATE_HIGHATOMIC:
                self.nr_free_highatomic -= MAX_ORDER_NR_PAGES
            return self._max_order[migratetype].pop()
        pfn = next(iter(self._lists[order][migratetype]))
        self.remove(pfn)
        return pfn

    def expand(self, pfn: int, low: int, high: int, migratetype: int) -> None:
        """Put all but the first 2^``low`` pages of a block of order ``high`` back, the upper halves at the heads."""
        for order in reversed(range(low, high)):
            self.add(pfn + (1 << order), order, migratetype, to_tail=False)

    def rmqueue_smallest(self, order: int, migratetype: int) -> int | None:
        """Take a block of ``order`` from the head of the smallest list that has one, None if there is none.

        The lower half of a larger block is used. Source: __rmqueue_smallest().
        """
        for current in range(order, NR_PAGE_ORDERS):
            if self.nr_free(current, migratetype):
                pfn = self.take(current, migratetype)
                self.expand(pfn, order, current, migratetype)
                return pfn
        return None

    def free_in_pageblock(self, start_pfn: int) -> Iterator[tuple[int, int]]:
        """First page and order of each free block in a pageblock, ascending."""
        pfn, end_pfn = start_pfn, start_pfn + PAGEBLOCK_NR_PAGES
        while pfn < end_pfn:
            order = self.buddy_order(pfn)
            if order is not None:
                yield pfn, order
            pfn += 1 << (order or 0)
