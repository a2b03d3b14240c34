"""Guests for tests of the page allocator: zones by size, some of their memory unaccepted."""

from __future__ import annotations

from collections.abc import Callable

from guest.bitmap import GuestBitmap
from guest.units import PAGE_SIZE, PMD_SIZE
from kernel.mm_rules import MAINLINE_MM, MmRules
from kernel.mmzone import Zone, ZoneType
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory

UNIT_PAGES = PMD_SIZE // PAGE_SIZE
NORMAL_PFN = 1 << 20


class AllocGuest:
    """An allocator over zones ``(type, start, pages)`` on one node, or ``(type, start, pages, node)``.

    ``unaccepted`` is ranges of page frames, in whole units. Requests to the platform are in ``accepted``, trace events
    in ``events``.
    """

    def __init__(
        self, new_bitmap: Callable[[], GuestBitmap], *zones: tuple[int, ...], free: bool = True,
        unaccepted: tuple[tuple[int, int], ...] = (), rules: MmRules = MAINLINE_MM,
    ) -> None:  # fmt: skip
        bitmap = new_bitmap()
        for start, end in unaccepted:
            bitmap.set(start // UNIT_PAGES, end // UNIT_PAGES)
        self.accepted: list[tuple[int, int]] = []
        self.unaccepted = UnacceptedMemory(bitmap, lambda start, end: self.accepted.append((start, end)))
        self.zones = [
            Zone(ZoneType(kind), start, pages, pages, node=node[0] if node else 0)
            for kind, start, pages, *node in zones
        ]
        self.events: list[object] = []
        self.allocator = PageAllocator(self.zones, self.unaccepted, lazy=True, rules=rules, record=self.events.append)
        if free:
            self.allocator.memblock_free_all((zone.zone_start_pfn, zone.end_pfn) for zone in self.zones)

    def take_all(self, gfp: int, order: int = 0) -> int:
        """Allocate until nothing is left; how many blocks there were."""
        count = 0
        while self.allocator.alloc_pages(gfp, order) is not None:
            count += 1
        return count
