"""Walking memblock's free memory: ``for_each_free_mem_range`` and what it skips (mm/memblock.c)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

from guest.ranges import TOP, Range
from kernel.memblock_type import NUMA_NO_NODE, MemblockFlags, MemblockRegion, MemblockType


def free_mem_ranges(
    memory: MemblockType, reserved: MemblockType, flags: MemblockFlags, movable_node: bool, nid: int = NUMA_NO_NODE
) -> Iterator[Range]:
    """Memory of node ``nid``, or of any, that is not reserved, ascending. Do not change the arrays meanwhile.

    As in the kernel, a range is empty where two reserved regions touch that differ in flags.
    """
    gaps, first = _gaps(reserved), 0
    for region in memory.regions:
        if nid not in (NUMA_NO_NODE, region.nid) or _should_skip_region(region, flags, movable_node):
            continue
        while gaps[first].end <= region.base:
            first += 1
        for gap in islice(gaps, first, None):
            if gap.start >= region.end:
                break
            yield Range(max(gap.start, region.base), min(gap.end, region.end))


def free_mem_ranges_reverse(
    memory: MemblockType, reserved: MemblockType, flags: MemblockFlags, movable_node: bool, nid: int, below: int
) -> Iterator[tuple[int, int]]:
    """The same descending, but for ranges that begin at ``below`` or above (``for_each_free_mem_range_reverse``).

    What is looked at is what is asked for: most callers take the first range or one soon after.
    """
    taken = reserved.regions
    for region in reversed(memory.regions[: bisect_left(memory.regions, below, key=_base)]):
        if nid not in (NUMA_NO_NODE, region.nid) or _should_skip_region(region, flags, movable_node):
            continue
        base, region_end = region.base, region.end
        number = bisect_left(taken, min(region_end, below), key=_base)
        end = taken[number].base if number < len(taken) else TOP
        while end > base:
            number -= 1
            before, size = taken[number][:2] if number >= 0 else (0, 0)
            start = before + size
            if start < region_end:
                yield (start if start > base else base), (end if end < region_end else region_end)
            end = before


def _base(region: MemblockRegion) -> int:
    return region.base


def _gaps(reserved: MemblockType) -> list[Range]:
    """What is not taken: below, between and above the reserved regions, empty where two of them touch."""
    ends = [0, *(r.end for r in reserved.regions)]
    bases = [*(r.base for r in reserved.regions), TOP]
    return [Range(end, base) for end, base in zip(ends, bases, strict=True)]


def _should_skip_region(region: MemblockRegion, flags: MemblockFlags, movable_node: bool) -> bool:
    if not region.flags and not flags:  # nearly all of them; the flags of an enum are slow
        return False
    if region.flags & (MemblockFlags.MEMBLOCK_NOMAP | MemblockFlags.MEMBLOCK_DRIVER_MANAGED):
        return True
    if movable_node and region.flags & MemblockFlags.MEMBLOCK_HOTPLUG:
        return True
    return bool(flags & MemblockFlags.MEMBLOCK_MIRROR and not region.flags & MemblockFlags.MEMBLOCK_MIRROR)
