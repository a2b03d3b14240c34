"""Migrate types and pageblocks: which pages may lie beside each other (include/linux/mmzone.h, mm/page_alloc.c)."""

from __future__ import annotations

from enum import IntEnum

PAGEBLOCK_ORDER = 9
"""2 MiB, a huge page (HUGETLB_PAGE_ORDER)."""
PAGEBLOCK_NR_PAGES = 1 << PAGEBLOCK_ORDER


class MigrateType(IntEnum):
    """``enum migratetype`` of a kernel without CMA."""

    MIGRATE_UNMOVABLE = 0
    MIGRATE_MOVABLE = 1
    MIGRATE_RECLAIMABLE = 2
    MIGRATE_HIGHATOMIC = 3
    MIGRATE_ISOLATE = 4


MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_HIGHATOMIC, MIGRATE_ISOLATE = map(int, MigrateType)
MIGRATE_PCPTYPES = 3
"""The first three: what per-CPU lists hold and what falls back on each other."""
MIGRATE_TYPES = len(MigrateType)
MIGRATETYPE_NAMES = ("Unmovable", "Movable", "Reclaimable", "HighAtomic", "Isolate")

FALLBACKS = (
    (MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE),
    (MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE),
    (MIGRATE_UNMOVABLE, MIGRATE_MOVABLE),
)
"""Where a request of a type looks when its own lists are empty (``fallbacks[]``)."""


class Pageblocks:
    """The migrate type of each pageblock. All start as movable, so only the others are kept."""

    def __init__(self) -> None:
        self.others: dict[int, int] = {}
        """Type by number of pageblock, where it is not movable."""

    def get(self, pfn: int) -> int:
        """Type of the pageblock of a page (``get_pfnblock_migratetype``)."""
        return self.others.get(pfn >> PAGEBLOCK_ORDER, MIGRATE_MOVABLE)

    def set(self, pfn: int, migratetype: int, order: int = PAGEBLOCK_ORDER) -> None:
        """Set it for the pageblock of a page, or for all those of a larger block (``change_pageblock_range``)."""
        first = pfn >> PAGEBLOCK_ORDER
        for block in range(first, first + (1 << max(order - PAGEBLOCK_ORDER, 0))):
            if migratetype == MIGRATE_MOVABLE:
                self.others.pop(block, None)
            else:
                self.others[block] = migratetype
