"""One of memblock's two region arrays: ``struct memblock_type`` (include/linux/memblock.h, mm/memblock.c).

Regions are sorted and never overlap. Regions that touch and have equal flags and node become one when an operation
passes over them, as in the kernel; an operation elsewhere leaves them alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from enum import IntFlag
from errno import ENOMEM
from typing import NamedTuple

PHYS_ADDR_MAX = (1 << 64) - 1
NUMA_NO_NODE = -1
INIT_MEMBLOCK_REGIONS = 128
"""Regions that fit into the arrays of the kernel's image."""


class MemblockFlags(IntFlag):
    """``enum memblock_flags``."""

    MEMBLOCK_NONE = 0
    MEMBLOCK_HOTPLUG = 1
    MEMBLOCK_MIRROR = 2
    MEMBLOCK_NOMAP = 4
    MEMBLOCK_DRIVER_MANAGED = 8
    MEMBLOCK_RSRV_NOINIT = 16


class MemblockRegion(NamedTuple):
    """``struct memblock_region``: the bytes ``[base, base + size)``."""

    base: int
    size: int
    flags: int
    nid: int = NUMA_NO_NODE

    @property
    def end(self) -> int:
        return self.base + self.size


def memblock_cap_size(base: int, size: int) -> int:
    """End of ``size`` bytes at ``base``, cut off at the end of the address space (``memblock_cap_size``)."""
    return base + min(size, PHYS_ADDR_MAX - base)


def _base(region: MemblockRegion) -> int:
    return region.base


class MemblockType:
    """A named array of ``max`` regions.

    ``double_array(self, base, size)`` is called where the kernel calls memblock_double_array(): it doubles ``max``
    and returns True, or returns False, and then the array stays as it is; ``base`` and ``size`` are the range that
    the array is about to take in or to cut. ``total_size`` is what the kernel keeps beside the array: the sum of
    the sizes, until ``memblock_trim_memory`` shortens a region and forgets to subtract.
    """

    def __init__(self, name: str, double_array: Callable[[MemblockType, int, int], bool]) -> None:
        self.name = name
        self.max = INIT_MEMBLOCK_REGIONS
        self.regions: list[MemblockRegion] = []
        self.total_size = 0
        self._double_array = double_array

    def search(self, address: int) -> MemblockRegion | None:
        """The region that holds ``address`` (``memblock_search``)."""
        index = bisect_right(self.regions, address, key=_base) - 1
        if index >= 0 and address < self.regions[index].end:
            return self.regions[index]
        return None

    def overlaps_region(self, base: int, size: int) -> bool:
        """True if a region and the range share an address (``memblock_overlaps_region``)."""
        end = memblock_cap_size(base, size)
        index = bisect_left(self.regions, end, key=_base) - 1
        return index >= 0 and base < self.regions[index].end

    def add_range(self, base: int, size: int, flags: int = 0) -> int:
        """Fill the range's gaps with ``flags``; regions that are there keep theirs (``memblock_add_range``).

        Returns 0, or -ENOMEM if there is no room for the new regions; then nothing was changed.
        """
        end = memblock_cap_size(base, size)
        first, last, filled, fresh = self._fill(base, end, flags)
        if len(self.regions) + len(fresh) > self.max:
            if not self._make_room(len(fresh), base, end):
                return -ENOMEM
            first, last, filled, fresh = self._fill(base, end, flags)  # the new array's place may be in this array
        if not fresh:
            return 0
        if not self.regions:
            self.total_size = 0  # the kernel assigns the size here, so an old error ends
        self.total_size += sum(filled[index].size for index in fresh)
        self.regions[first:last] = filled
        self._merge(first + fresh[0], first + fresh[-1] + 1)
        return 0

    def _fill(self, base: int, end: int, flags: int) -> tuple[int, int, list[MemblockRegion], list[int]]:
        """Index ``[first, last)`` of what overlaps the range, what is to stand there instead, and where that is new."""
        first, last = self._overlapping(base, end)
        filled: list[MemblockRegion] = []
        fresh: list[int] = []
        for region in [*self.regions[first:last], MemblockRegion(end, 0, 0)]:
            if base < region.base:
                fresh.append(len(filled))
                filled.append(MemblockRegion(base, region.base - base, flags))
            filled.append(region)
            base = region.end
        return first, last, filled[:-1], fresh

    def _make_room(self, count: int, base: int, end: int) -> bool:
        """Double the array until it has room for ``count`` more regions; False if that cannot be."""
        while len(self.regions) + count > self.max:
            if not self._double_array(self, base, end - base):
                return False
        return True

    def remove_range(self, base: int, size: int) -> int:
        """Take every address of the range out (``memblock_remove_range``); 0, or -ENOMEM."""
        isolated = self.isolate_range(base, size)
        if isolated is None:
            return -ENOMEM
        self.remove_regions(*isolated)
        return 0

    def remove_regions(self, first: int, last: int) -> None:
        """Drop the regions of index ``first`` up to ``last``, exclusive."""
        self.total_size -= sum(region.size for region in self.regions[first:last])
        del self.regions[first:last]

    def isolate_range(self, base: int, size: int) -> tuple[int, int] | None:
        """Cut regions where the range begins and ends; first and last index, exclusive, of those inside.

        The array must have room for two more regions, needed or not; None if it has not and cannot be doubled.
        Source: memblock_isolate_range().
        """
        end = memblock_cap_size(base, size)
        if base == end:
            return 0, 0
        if not self._make_room(2, base, end):
            return None
        self._cut(base)
        self._cut(end)
        return self._overlapping(base, end)

    def setclr_flag(self, base: int, size: int, set_flag: bool, flag: MemblockFlags) -> int:
        """Set or clear ``flag`` in the range, where there are regions (``memblock_setclr_flag``); 0, or -ENOMEM."""
        isolated = self.isolate_range(base, size)
        if isolated is None:
            return -ENOMEM
        first, last = isolated
        for index in range(first, last):
            region = self.regions[index]
            flags = region.flags | flag if set_flag else region.flags & ~flag
            self.regions[index] = region._replace(flags=int(flags))
        self._merge(first, last)
        return 0

    def set_node(self, base: int, size: int, nid: int) -> int:
        """Give the range to node ``nid``, where there are regions (``memblock_set_node``); 0, or -ENOMEM."""
        isolated = self.isolate_range(base, size)
        if isolated is None:
            return -ENOMEM
        first, last = isolated
        self.regions[first:last] = [region._replace(nid=nid) for region in self.regions[first:last]]
        self._merge(first, last)
        return 0

    def _overlapping(self, base: int, end: int) -> tuple[int, int]:
        """First and last index, exclusive, of the regions that share an address with ``[base, end)``."""
        first = bisect_right(self.regions, base, key=_base)
        if first and self.regions[first - 1].end > base:
            first -= 1
        return first, max(first, bisect_left(self.regions, end, key=_base))

    def _cut(self, address: int) -> None:
        """Let a region begin at ``address`` if one goes across it."""
        index = bisect_left(self.regions, address, key=_base) - 1
        if index >= 0 and address < self.regions[index].end:
            region = self.regions[index]
            low = region._replace(size=address - region.base)
            high = region._replace(base=address, size=region.end - address)
            self.regions[index : index + 1] = low, high

    def _merge(self, first: int, last: int) -> None:
        """Join touching regions of equal flags and node, from one before ``first`` up to ``last``, inclusive.

        Source: memblock_merge_regions().
        """
        first = max(first - 1, 0)
        merged: list[MemblockRegion] = []
        for region in self.regions[first : last + 1]:
            before = merged[-1] if merged else None
            if before and before.end == region.base and before[2:] == region[2:]:
                merged[-1] = MemblockRegion(before.base, before.size + region.size, *before[2:])
            else:
                merged.append(region)
        self.regions[first : last + 1] = merged
