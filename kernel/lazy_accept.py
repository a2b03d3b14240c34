"""Unaccepted memory in the page allocator: blocks wait on a zone's list and are accepted when they are needed.

v9 02/14 (``try_to_accept_memory``) and mm/page_alloc.c of 6.12 (``cond_accept_memory``); the table of facts is
``kernel/mm_rules.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from guest.units import PAGE_SIZE, PFN_PHYS, memparse
from kernel.buddy import ZoneBuddy
from kernel.free_area import MAX_ORDER, MAX_ORDER_NR_PAGES
from kernel.mm_rules import MmRules
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.zone_watermark import unusable_free

MAX_ORDER_SIZE = PAGE_SIZE << MAX_ORDER
_SPACES = " \t\n\v\f\r"


class LazyAccept:
    """Accepts blocks of order ``MAX_ORDER``; with ``lazy`` (``accept_memory=lazy``) not before they are needed."""

    def __init__(self, unaccepted: UnacceptedMemory, rules: MmRules, *, lazy: bool) -> None:
        self.unaccepted, self._rules, self.lazy = unaccepted, rules, lazy

    def free_unaccepted(self, buddy: ZoneBuddy, start_pfn: int, end_pfn: int) -> None:
        """Put blocks at the tail of the zone's list (``__free_unaccepted``); they count as free pages."""
        zone = buddy.zone
        zone.unaccepted_pages.append_run(start_pfn, end_pfn)
        zone.nr_free_pages += end_pfn - start_pfn
        zone.nr_unaccepted += end_pfn - start_pfn

    def accept_blocks(self, start_pfn: int, end_pfn: int) -> None:
        """Accept block by block, as the kernel does: each is a request of its own to the platform."""
        for pfn in range(start_pfn, end_pfn, MAX_ORDER_NR_PAGES):
            self.unaccepted.accept_memory(PFN_PHYS(pfn), PFN_PHYS(pfn + MAX_ORDER_NR_PAGES))

    def accept_one(self, buddy: ZoneBuddy) -> bool:
        """Accept the block that has waited longest and free it to the tail of its list; False if there is none."""
        zone = buddy.zone
        if not zone.unaccepted_pages:
            return False
        pfn = zone.unaccepted_pages.pop()
        zone.nr_free_pages -= MAX_ORDER_NR_PAGES
        zone.nr_unaccepted -= MAX_ORDER_NR_PAGES
        self.accept_blocks(pfn, pfn + MAX_ORDER_NR_PAGES)
        buddy.free_to_lists(pfn, MAX_ORDER, to_tail=True)
        buddy.fresh += MAX_ORDER_NR_PAGES
        return True

    def accept_up(self, buddy: ZoneBuddy, order: int) -> bool:
        """Accept until the usable free pages reach the watermark; True if at least one block was accepted.

        v9 accepts one block in any case, since it asks only when a check failed. Before there are watermarks
        mainline accepts one block each time.
        """
        zone, rules = buddy.zone, self._rules
        if not zone.unaccepted_pages:
            return False
        wmark = getattr(zone.watermark, rules.accepts_to) + zone.watermark_boost
        if not wmark and rules.accepts_before_watermarks:
            return self.accept_one(buddy)
        usable = zone.nr_free_pages - unusable_free(zone, rules, order)
        if rules.unaccepted_is_usable:
            usable -= zone.nr_unaccepted
        to_accept = wmark - usable
        accepted = False
        while to_accept > 0 or not (accepted or rules.accepts_first):
            if not self.accept_one(buddy):
                break
            accepted = True
            to_accept -= MAX_ORDER_NR_PAGES
        return accepted

    def store(self, buddies: Iterable[ZoneBuddy], text: str) -> int:
        """A write to /sys/kernel/mm/page_alloc/accept_memory (v9 04/14): ``all``, or a size rounded up to blocks.

        Blocks are accepted zone by zone. Returns the number of characters taken, or -EINVAL; a size may have a suffix
        and trailing white space.
        """
        if text in ("all", "all\n"):
            to_accept = 1 << 64
        else:
            to_accept, rest = memparse(text)
            if rest.lstrip(_SPACES) or not to_accept:
                return -errno.EINVAL
        for buddy in buddies:
            while self.accept_one(buddy):
                if to_accept <= MAX_ORDER_SIZE:
                    return len(text)
                to_accept -= MAX_ORDER_SIZE
        return len(text)
