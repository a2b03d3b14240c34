"""GFP flags, and what they mean for the page allocator (include/linux/gfp_types.h, gfp.h; mm/internal.h; 6.12).

The kernel's ``__GFP_X`` is ``Gfp.X`` here. Flags about cpusets, accounting or poisoning are left out.
"""

from __future__ import annotations

from enum import IntFlag

from kernel.migratetype import MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE


class Gfp(IntFlag):
    """Single flags (``___GFP_*_BIT``)."""

    DMA = 1 << 0
    HIGHMEM = 1 << 1
    DMA32 = 1 << 2
    MOVABLE = 1 << 3
    RECLAIMABLE = 1 << 4
    HIGH = 1 << 5
    IO = 1 << 6
    FS = 1 << 7
    ZERO = 1 << 8
    DIRECT_RECLAIM = 1 << 10
    KSWAPD_RECLAIM = 1 << 11
    NOWARN = 1 << 13
    RETRY_MAYFAIL = 1 << 14
    NOFAIL = 1 << 15
    NORETRY = 1 << 16
    MEMALLOC = 1 << 17
    COMP = 1 << 18
    NOMEMALLOC = 1 << 19
    HARDWALL = 1 << 20
    THISNODE = 1 << 21


_RECLAIM = Gfp.DIRECT_RECLAIM | Gfp.KSWAPD_RECLAIM
_USER = _RECLAIM | Gfp.IO | Gfp.FS | Gfp.HARDWALL | Gfp.HIGHMEM | Gfp.MOVABLE

GFP_ATOMIC = int(Gfp.HIGH | Gfp.KSWAPD_RECLAIM)
GFP_KERNEL = int(_RECLAIM | Gfp.IO | Gfp.FS)
GFP_NOWAIT = int(Gfp.KSWAPD_RECLAIM | Gfp.NOWARN)
GFP_NOIO = int(_RECLAIM)
GFP_NOFS = int(_RECLAIM | Gfp.IO)
GFP_USER = int(_RECLAIM | Gfp.IO | Gfp.FS | Gfp.HARDWALL)
GFP_DMA = int(Gfp.DMA)
GFP_DMA32 = int(Gfp.DMA32)
GFP_HIGHUSER = int(_USER & ~Gfp.MOVABLE)
GFP_HIGHUSER_MOVABLE = int(_USER)
GFP_TRANSHUGE_LIGHT = int((_USER | Gfp.COMP | Gfp.NOMEMALLOC | Gfp.NOWARN) & ~_RECLAIM)
GFP_TRANSHUGE = GFP_TRANSHUGE_LIGHT | int(Gfp.DIRECT_RECLAIM)

GFP_NAMES = {
    "GFP_ATOMIC": GFP_ATOMIC,
    "GFP_KERNEL": GFP_KERNEL,
    "GFP_NOWAIT": GFP_NOWAIT,
    "GFP_NOIO": GFP_NOIO,
    "GFP_NOFS": GFP_NOFS,
    "GFP_USER": GFP_USER,
    "GFP_DMA": GFP_DMA,
    "GFP_DMA32": GFP_DMA32,
    "GFP_HIGHUSER": GFP_HIGHUSER,
    "GFP_HIGHUSER_MOVABLE": GFP_HIGHUSER_MOVABLE,
    "GFP_TRANSHUGE_LIGHT": GFP_TRANSHUGE_LIGHT,
    "GFP_TRANSHUGE": GFP_TRANSHUGE,
}
"""The combinations that callers use, by name."""

ALLOC_WMARK_MIN, ALLOC_WMARK_LOW, ALLOC_WMARK_HIGH = 0, 1, 2
ALLOC_NO_WATERMARKS = 0x04
ALLOC_WMARK_MASK = ALLOC_NO_WATERMARKS - 1
ALLOC_OOM = 0x08
ALLOC_NON_BLOCK = 0x10
ALLOC_MIN_RESERVE = int(Gfp.HIGH)
ALLOC_NOFRAGMENT = 0x100
ALLOC_HIGHATOMIC = 0x200
ALLOC_KSWAPD = int(Gfp.KSWAPD_RECLAIM)
ALLOC_RESERVES = ALLOC_NON_BLOCK | ALLOC_MIN_RESERVE | ALLOC_HIGHATOMIC | ALLOC_OOM

_ZONE_DMA, _ZONE_DMA32, _ZONE_NORMAL, _ZONE_MOVABLE = range(4)


def gfp_zone(gfp: int) -> int:
    """Index of the highest zone that a request may use (``gfp_zone``). DMA goes before DMA32, and both before Movable.

    Without highmem ``HIGHMEM`` alone is Normal; together with ``MOVABLE`` it is zone Movable.
    """
    if gfp & Gfp.DMA:
        return _ZONE_DMA
    if gfp & Gfp.DMA32:
        return _ZONE_DMA32
    both = Gfp.HIGHMEM | Gfp.MOVABLE
    return _ZONE_MOVABLE if gfp & both == both else _ZONE_NORMAL


def gfp_migratetype(gfp: int) -> int:
    """Migrate type of the pages that a request gets (``gfp_migratetype``)."""
    if gfp & Gfp.MOVABLE:
        return MIGRATE_MOVABLE
    return MIGRATE_RECLAIMABLE if gfp & Gfp.RECLAIMABLE else MIGRATE_UNMOVABLE


def gfp_to_alloc_flags(gfp: int, order: int) -> int:
    """Flags of the slow path: down to the minimum, and what reserves may be used (``gfp_to_alloc_flags``)."""
    alloc_flags = ALLOC_WMARK_MIN | gfp & (ALLOC_MIN_RESERVE | ALLOC_KSWAPD)
    if not gfp & Gfp.DIRECT_RECLAIM and not gfp & Gfp.NOMEMALLOC:
        alloc_flags |= ALLOC_NON_BLOCK
        if order > 0 and alloc_flags & ALLOC_MIN_RESERVE:
            alloc_flags |= ALLOC_HIGHATOMIC
    return alloc_flags
