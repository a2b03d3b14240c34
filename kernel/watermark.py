"""Watermarks and reserves of zones (mm/page_alloc.c, mm/khugepaged.c). Numbers are pages unless named kbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from guest.units import PAGE_SHIFT
from kernel.migratetype import MIGRATE_PCPTYPES, PAGEBLOCK_NR_PAGES

MIN_FREE_KBYTES_MIN = 128
MIN_FREE_KBYTES_MAX = 262_144
WATERMARK_SCALE_FACTOR = 10
"""Distance of watermarks in ten-thousandths of the zone's managed pages (vm.watermark_scale_factor)."""
LOWMEM_RESERVE_RATIO = (256, 256, 32, 0, 0)
"""vm.lowmem_reserve_ratio, by zone type."""
SWAP_CLUSTER_MAX = 32
KBYTES_SHIFT = PAGE_SHIFT - 10


@dataclass(frozen=True, slots=True)
class Watermarks:
    """``enum zone_watermarks``: WMARK_MIN, WMARK_LOW, WMARK_HIGH, WMARK_PROMO. Zero until they are set up."""

    min: int = 0
    low: int = 0
    high: int = 0
    promo: int = 0


def calculate_min_free_kbytes(lowmem_pages: int) -> int:
    """vm.min_free_kbytes for ``lowmem_pages`` of free buffer pages (``calculate_min_free_kbytes``)."""
    root = isqrt((lowmem_pages << KBYTES_SHIFT) * 16)
    return min(max(root, MIN_FREE_KBYTES_MIN), MIN_FREE_KBYTES_MAX)


def recommended_min_free_kbytes(min_free_kbytes: int, nr_zones: int, free_buffer_pages: int) -> int:
    """vm.min_free_kbytes after khugepaged has raised it (``set_recommended_min_free_kbytes``).

    Two page blocks for each populated zone and one for each pair of migrate types, but no more than 5 % of
    ``free_buffer_pages``.
    """
    recommended = PAGEBLOCK_NR_PAGES * nr_zones * (2 + MIGRATE_PCPTYPES * MIGRATE_PCPTYPES)
    recommended = min(recommended, free_buffer_pages // 20)
    return max(min_free_kbytes, recommended << KBYTES_SHIFT)


def zone_wmarks(
    min_free_kbytes: int, managed: int, lowmem_pages: int, scale_factor: int = WATERMARK_SCALE_FACTOR
) -> Watermarks:
    """Watermarks of a zone with ``managed`` pages among ``lowmem_pages`` (``__setup_per_zone_wmarks``)."""
    share = _share(min_free_kbytes, managed, lowmem_pages)
    return _spaced(share, share, managed, scale_factor)


def movable_zone_wmarks(
    min_free_kbytes: int, managed: int, lowmem_pages: int, scale_factor: int = WATERMARK_SCALE_FACTOR
) -> Watermarks:
    """Watermarks of zone Movable: its minimum is for page reclaim alone (``__setup_per_zone_wmarks``)."""
    wmark_min = min(max(managed // 1024, SWAP_CLUSTER_MAX), 128)
    return _spaced(wmark_min, _share(min_free_kbytes, managed, lowmem_pages), managed, scale_factor)


def _share(min_free_kbytes: int, managed: int, lowmem_pages: int) -> int:
    pages_min = min_free_kbytes >> KBYTES_SHIFT
    return pages_min * managed // lowmem_pages if managed and lowmem_pages else 0


def _spaced(wmark_min: int, share: int, managed: int, scale_factor: int) -> Watermarks:
    step = max(share >> 2, managed * scale_factor // 10_000)
    return Watermarks(wmark_min, wmark_min + step, wmark_min + 2 * step, wmark_min + 3 * step)


def lowmem_reserves(managed: Sequence[int]) -> list[tuple[int, ...]]:
    """``lowmem_reserve[]`` of each zone, from the managed pages of all (``setup_per_zone_lowmem_reserve``).

    ``[i][j]`` is what zone i keeps back from requests that zone j could have served; zoneinfo calls it
    protection. Zones are in the order of ``LOWMEM_RESERVE_RATIO``, missing ones at the end are empty.
    """
    managed = [*managed, *[0] * (len(LOWMEM_RESERVE_RATIO) - len(managed))]
    reserves = []
    for i, ratio in enumerate(LOWMEM_RESERVE_RATIO):
        clear = not ratio or not managed[i]
        above = [sum(managed[i + 1 : j + 1]) for j in range(len(managed))]
        reserves.append(tuple(0 if clear else pages // ratio for pages in above))
    return reserves
